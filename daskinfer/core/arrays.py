"""Arrays as NumPy holds them, whatever they were before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[Any]]

NUMERIC_KINDS = "biufc"  # NumPy's kinds: bool, int, uint, float, complex


class UnreadableError(OSError):
    """Bytes that lie elsewhere cannot be had."""


class RemoteArray(ABC):
    """An array whose bytes lie elsewhere and are copied out when asked for; slices of it along axis 0 cost nothing."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def __getitem__(self, rows: slice) -> RemoteArray: ...

    @abstractmethod
    def read_into(self, out: Array) -> None:
        """Copy all of it into a C-contiguous array of the same shape and dtype."""

    def make_copier(self, out: Array) -> Callable[[int], None]:
        """What copies ``len(out)`` rows from a row on into ``out``, of the same dtype; called many times."""
        return lambda begin: self[begin : begin + len(out)].read_into(out)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        out = np.empty(self.shape, self.dtype)
        self.read_into(out)
        return out if dtype is None else out.astype(dtype, copy=False)


class ArraySource(Protocol):
    """Rows in a file; ``unit_rows`` of them are decoded in one go, None where any can be read alone.

    ``chunk_shape`` is what a part of the file declares to hold, empty where there are no parts.
    """

    unit_rows: int | None
    chunk_shape: tuple[int, ...]
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    ndim: int

    def __getitem__(self, index: Any) -> np.ndarray[Any, Any]:
        """Read rows."""


def copy_rows(rows: Array | RemoteArray, out: Array) -> None:
    """Copy rows into a C-contiguous array of their shape; other dtypes are cast."""
    if isinstance(rows, RemoteArray) and rows.dtype == out.dtype:
        rows.read_into(out)
    else:
        out[...] = rows


def make_row_copier(rows: Array | RemoteArray, out: Array) -> Callable[[int], None]:
    """What copies ``len(out)`` rows from a row on into ``out``, as :func:`copy_rows` does; called many times."""
    if isinstance(rows, RemoteArray) and rows.dtype == out.dtype:
        return rows.make_copier(out)
    return lambda begin: copy_rows(rows[begin : begin + len(out)], out)


def tensor_to_numpy(tensor: torch.Tensor) -> Array:
    """A tensor on any device as an ndarray; bfloat16, which NumPy lacks, as float32."""
    try:
        plain: Array = tensor.numpy()
        return plain  # most are, and the steps below would be half of what they cost
    except (RuntimeError, TypeError):
        tensor = tensor.detach()  # on a GPU, part of a graph, conjugated, of a dtype that NumPy lacks
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    array: Array = tensor.cpu().resolve_conj().resolve_neg().numpy()
    return array


def to_numpy(array: Any) -> Array:
    """Anything that a network may take or give as an ndarray; without a copy where that can be."""
    if isinstance(array, torch.Tensor):
        return tensor_to_numpy(array)
    if hasattr(array, "__cuda_array_interface__"):  # CuPy
        array = array.get()  # pragma: no cover - needs a GPU
    return np.asarray(array)
