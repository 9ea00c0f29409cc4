"""What counts as an array: NumPy's, arrays in another process's memory, and arrays in files."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import numpy as np

if TYPE_CHECKING:
    import dask.array as da

Array = np.ndarray[Any, np.dtype[Any]]

NUMERIC_KINDS = "biufc"  # NumPy's kinds: bool, int, uint, float, complex


def is_dask_array(value: object) -> TypeGuard[da.Array]:
    """Whether it is a dask array; ``dask.array`` is not imported for it.

    That import takes a second (1.0 to 1.3 s of CPU with pandas, xarray and CuPy, measured), a third of a command's start.
    """
    module = sys.modules.get("dask.array")
    return module is not None and isinstance(value, module.Array)


class UnreadableError(OSError):
    """The bytes of a remote array cannot be read."""


class RemoteArray(ABC):
    """An array whose bytes are outside this process, and are copied only when it is read; slicing along axis 0 is free."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def __getitem__(self, rows: slice) -> RemoteArray: ...

    @abstractmethod
    def read_into(self, out: Array) -> None:
        """Copy the whole array into a C-contiguous array of the same shape and dtype."""

    def make_copier(self, out: Array) -> Callable[[int], None]:
        """Return a function that copies ``len(out)`` rows, from a given row on, into ``out`` of the same dtype."""
        return lambda begin: self[begin : begin + len(out)].read_into(out)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        out = np.empty(self.shape, self.dtype)
        self.read_into(out)
        return out if dtype is None else out.astype(dtype, copy=False)


class ArraySource(Protocol):
    """Rows in a file. ``unit_rows`` of them are decoded together; None if each can be read on its own.

    ``chunk_shape`` is the shape of one chunk in the file's own layout; empty if the file has no chunks.
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
    """Copy rows into a C-contiguous array of their shape; a different dtype is cast."""
    if isinstance(rows, RemoteArray) and rows.dtype == out.dtype:
        rows.read_into(out)
    else:
        out[...] = rows


def make_row_copier(rows: Array | RemoteArray, out: Array) -> Callable[[int], None]:
    """Return a function that copies ``len(out)`` rows, from a given row on, into ``out``, like :func:`copy_rows`.

    What can be prepared is prepared once, since the function is called for every micro-batch.
    """
    if isinstance(rows, RemoteArray) and rows.dtype == out.dtype:
        return rows.make_copier(out)
    return lambda begin: copy_rows(rows[begin : begin + len(out)], out)
