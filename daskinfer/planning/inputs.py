"""Bring what users pass as input to one form: ports, each an array that can be cut into chunks of rows.

::

    numpy array, memmap       used as it is
    list of numbers           converted to an array; Python floats become float32, as in torch
    torch tensor              an array that shares its memory if it is on the CPU; outputs are then tensors
    dask array                used as it is, with its own chunks on axis 0
    path (.npy, .zarr)        opened here, and read by the workers
    dict, tuple               one of these per port
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm, prod
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import dask
import numpy as np
import torch

from daskinfer.core.arrays import NUMERIC_KINDS, Array, ArraySource, is_dask_array
from daskinfer.core.formatting import format_nbytes
from daskinfer.core.pytree import Ports
from daskinfer.errors import InputError
from daskinfer.planning.input_advice import check_is_array_like, make_conversion_error, make_dtype_error
from daskinfer.storage.formats import open_source
from daskinfer.worker.tensors import tensor_to_numpy

if TYPE_CHECKING:
    import dask.array as da

MAX_INPUT_NBYTES = 1 << 48  # 256 TiB of rows: a plan lists every chunk, here 4 million of 64 MiB; arbitrary

# The types that a port may have, and an input: one port, or several by name or by position.
ArrayLike: TypeAlias = "np.ndarray[Any, Any] | torch.Tensor | da.Array | Sequence[Any] | str | os.PathLike[str]"
InputLike: TypeAlias = "ArrayLike | Mapping[str, ArrayLike] | tuple[ArrayLike, ...]"

# What a user passed for a port: an array of NumPy or Dask, a tensor, a path, or something that is converted to an array.
Form: TypeAlias = Literal["array", "tensor", "path", "other"]

# Python's numbers have no precision of their own: convert them as torch does.
_DEFAULT_DTYPES = {"float64": np.float32, "complex128": np.complex64}


@dataclass(frozen=True)
class Inputs:
    """The ports of one input and their arrays, all with the same number of rows.

    ``forms`` says what the user passed for each port. ``bfloat16_ports`` names the ports that were bfloat16, which NumPy can
    hold only as float32.
    """

    ports: Ports
    arrays: tuple[Any, ...]
    forms: tuple[Form, ...]
    bfloat16_ports: tuple[str, ...]

    @classmethod
    def from_value(cls, value: InputLike) -> Inputs:
        """Convert an input of any form listed in the module's docstring.

        Raises
        ------
        InputError, SourceMissing
            If a port cannot be read as an array of numbers with rows, or ports differ in length.
        """
        ports = Ports.from_input(value)
        if not ports.names:
            raise InputError("the input has no ports. Pass an array, or a dict or tuple with at least one array.")
        named_values = list(zip(ports.names, ports.split(value), strict=True))
        arrays = tuple(_make_port_array(name, port_value) for name, port_value in named_values)
        _check_lengths(ports, arrays)
        forms = tuple(_get_form(port_value) for _, port_value in named_values)
        bfloat16 = (n for n, value in named_values if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16)
        return cls(ports, arrays, forms, tuple(bfloat16))

    @property
    def has_tensors(self) -> bool:
        """Whether at least one port was a torch tensor, so that outputs are tensors too."""
        return "tensor" in self.forms

    @property
    def n_rows(self) -> int:
        """Rows of the input, the same for every port."""
        return int(self.arrays[0].shape[0])

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row of all ports."""
        return sum(_compute_nbytes(a.shape[1:], a.dtype) for a in self.arrays)

    @property
    def row_chunks(self) -> tuple[int, ...] | None:
        """Chunks on axis 0 of the first dask array among the ports; None if there is none."""
        return next((a.chunks[0] for a in self.arrays if is_dask_array(a)), None)

    @property
    def unit_rows(self) -> int | None:
        """Rows that are read or computed at once, as whole units of all ports; None if each row can be read on its own."""
        units = [unit for a in self.arrays if (unit := _get_unit_rows(a))]
        return lcm(*units) if units else None

    @property
    def paths(self) -> list[str]:
        """Paths of the ports that are files or stores."""
        return [a.path for a in self.arrays if hasattr(a, "path")]

    def check_sizes(self, max_nbytes: int) -> None:
        """Refuse a row or chunk that declares more than ``max_nbytes``, and more rows than can be planned; read nothing.

        Raises
        ------
        InputError
            With the port, its declared size and the limit.
        """
        for name, array in zip(self.ports.names, self.arrays, strict=True):
            row_nbytes = _compute_nbytes(array.shape[1:], array.dtype)
            label = f"{name}{_format_location(array)}"
            unit_shapes = {"row": array.shape[1:], "chunk": getattr(array, "chunk_shape", ())}
            for unit, shape in unit_shapes.items():
                if (nbytes := _compute_nbytes(shape, array.dtype)) > max_nbytes:
                    raise InputError(
                        f"a {unit} of {label} takes {format_nbytes(nbytes)} ({tuple(shape)} {array.dtype}) and must be read "
                        f"whole; the smallest device has {format_nbytes(max_nbytes)}. Store it in smaller {unit}s, or use "
                        "devices with more memory."
                    )
            if array.shape[0] * max(1, row_nbytes) > MAX_INPUT_NBYTES:
                raise InputError(
                    f"{label} has {array.shape[0]:,} rows of {format_nbytes(row_nbytes)}; one call takes at most "
                    f"{format_nbytes(MAX_INPUT_NBYTES)}. Split it over several calls."
                )

    def make_empty_arrays(self) -> list[Array]:
        """Return an empty array (0, ...) per port with its row shape and dtype; read nothing."""
        return [np.empty((0, *a.shape[1:]), a.dtype) for a in self.arrays]

    def describe(self) -> tuple[str, ...]:
        """Return a line per port: its name, shape and dtype."""
        return tuple(f"{n}: {tuple(a.shape)} {a.dtype}" for n, a in zip(self.ports.names, self.arrays, strict=True))

    def make_dask_arrays(self, row_chunks: Sequence[int]) -> list[da.Array]:
        """Return a dask array per port, cut into these chunks; the task that needs a chunk of a file reads it.

        The dask array of a file is 1-d, of dtype object, and its chunks hold whole rows, (n, ...): dropping the later axes
        afterwards would cost one more task per chunk.
        """
        return [self.make_dask_array(array, row_chunks) for array in self.arrays]

    @staticmethod
    def make_dask_array(array: Any, row_chunks: Sequence[int]) -> da.Array:
        """Return the dask array of one port, as :meth:`make_dask_arrays` does."""
        return _convert_to_dask(array, tuple(row_chunks))


def _get_form(value: Any) -> Form:
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, str | os.PathLike):
        return "path"
    return "array" if isinstance(value, np.ndarray) or is_dask_array(value) else "other"


def _compute_nbytes(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """Return the bytes of an array, as a Python int: a file may declare more than NumPy can count."""
    return prod(map(int, shape)) * dtype.itemsize


def _format_location(array: Any) -> str:
    return f" ({array.path!r})" if hasattr(array, "path") else ""


def _get_unit_rows(array: Any) -> int | None:
    """Return the rows of a store's chunk or shard, or of a dask array's chunk if all but the last are equal; else None."""
    if not is_dask_array(array):
        return getattr(array, "unit_rows", None)
    first, *rest = array.chunks[0]
    return first if all(size == first for size in rest[:-1]) and (not rest or rest[-1] <= first) else None


def _make_port_array(name: str, value: Any) -> Any:
    array = _convert_to_array(name, value)
    if array.dtype.kind not in NUMERIC_KINDS:
        raise make_dtype_error(name, value, array)
    if array.ndim == 0:
        single_row = f"{name}[None]" if hasattr(value, "ndim") else f"[{name}]"
        raise InputError(f"{name} is 0-d, but its first axis must be the rows. Pass {single_row} for a single row.")
    if is_dask_array(array) and any(np.isnan(size) for axis in array.chunks for size in axis):
        raise InputError(
            f"{name} is a dask array with unknown chunk sizes, so its rows cannot be located. "
            f"Call {name}.compute_chunk_sizes() first."
        )
    return array


def _convert_to_array(name: str, value: Any) -> Any:
    if isinstance(value, str | os.PathLike):
        return open_source(value)
    if is_dask_array(value):
        return value
    check_is_array_like(name, value)
    _check_supported_type(name, value)
    try:
        # np.asarray turns a memmap into a plain view: a memmap itself is pickled whole with every chunk.
        array = tensor_to_numpy(value) if isinstance(value, torch.Tensor) else np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise make_conversion_error(name, value, error) from None  # it says what NumPy or torch said
    if array.dtype.name not in _DEFAULT_DTYPES or not isinstance(value, list) or _has_arrays(value):
        return array
    return array.astype(_DEFAULT_DTYPES[array.dtype.name])


def _check_supported_type(name: str, value: Any) -> None:
    """Refuse what NumPy would convert with a side effect: dask values would be computed here, a mask would be dropped."""
    masked = sys.modules.get("numpy.ma")  # whose import takes 20 ms
    if masked is not None and isinstance(value, masked.MaskedArray):
        raise InputError(f"{name} is a masked array, and models cannot see its mask. Pass {name}.filled(0), for example.")
    if any(dask.is_dask_collection(item) for item in (value if isinstance(value, list) else [value])):
        kind = "list of dask collections" if isinstance(value, list) else f"dask {type(value).__name__}"
        raise InputError(
            f"{name} must be a single dask array, got a {kind}. "
            "Pass the .data of an xarray DataArray, .to_dask_array(lengths=True) of a DataFrame, or dask.array.stack(…)."
        )


def _has_arrays(value: list[Any]) -> bool:
    return any(isinstance(item, np.ndarray | np.generic) or (isinstance(item, list) and _has_arrays(item)) for item in value)


def _check_lengths(ports: Ports, arrays: Sequence[Any]) -> None:
    lengths = {name: int(array.shape[0]) for name, array in zip(ports.names, arrays, strict=True)}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {n:,} rows" for name, n in lengths.items())
        raise InputError(f"{listed}; all ports must have the same number of rows.")


def _convert_to_dask(array: Any, row_chunks: tuple[int, ...]) -> da.Array:
    if is_dask_array(array):
        return array if array.chunks[0] == row_chunks else array.rechunk({0: row_chunks})
    import dask.array as da  # a second, which only map_blocks needs to spend

    # Derive no name from the content: hashing an array costs more than cutting it.
    if not isinstance(array, np.ndarray):
        meta = np.empty(0, object)
        return da.from_array(_RowArray(array), chunks=(row_chunks,), name=False, inline_array=True, asarray=False, meta=meta)
    chunks = (row_chunks, *((size,) for size in array.shape[1:]))
    return da.from_array(
        array, chunks=chunks, name=False, inline_array=True, asarray=False, meta=np.empty((0,) * array.ndim, array.dtype)
    )


class _RowArray:
    """Presents a source as a 1-d array whose elements are whole rows."""

    dtype = np.dtype(object)
    ndim = 1

    def __init__(self, source: ArraySource) -> None:
        self._source = source
        self.shape = source.shape[:1]

    def __getitem__(self, index: Any) -> Array:
        return self._source[index]
