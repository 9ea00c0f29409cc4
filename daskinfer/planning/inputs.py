"""What users hand over as input, brought to one form: ports, each an array that dask can cut.

::

    numpy array, memmap       as it is
    list of numbers           an array; Python floats become float32, as in torch
    torch tensor              an array of the same memory where it lies on the CPU; answers are then tensors
    dask array                as it is, with its own chunks on axis 0
    path (.npy, .zarr)        read where the work is done
    dict, tuple               one of these per port
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm, prod
from typing import Any

import dask
import dask.array as da
import numpy as np
import torch

from daskinfer.core.arrays import NUMERIC_KINDS, Array, ArraySource, tensor_to_numpy
from daskinfer.core.formatting import format_nbytes
from daskinfer.core.pytree import Ports
from daskinfer.errors import InputError
from daskinfer.storage.formats import open_source

MAX_INPUT_NBYTES = 1 << 48  # 256 TiB of rows: a plan lists every chunk, 4 million of 64 MiB; arbitrary

# Python's numbers have no precision of their own: read as torch reads them.
_DEFAULT_DTYPES = {"float64": np.float32, "complex128": np.complex64}


@dataclass(frozen=True)
class Inputs:
    """The ports of one input and their arrays, all with the same number of rows.

    ``has_tensors`` says that a port was a torch tensor; ``bfloat16_ports`` names the ports whose numbers NumPy could only hold as
    float32.
    """

    ports: Ports
    arrays: tuple[Any, ...]
    has_tensors: bool
    bfloat16_ports: tuple[str, ...]

    @classmethod
    def from_value(cls, value: Any) -> Inputs:
        """Bring an input of any of the forms above to this one.

        Raises
        ------
        InputError, SourceMissing
            Where a port cannot be read as an array of numbers with rows, or ports differ in length.
        """
        ports = Ports.from_input(value)
        if not ports.names:
            raise InputError("the input has no ports; it needs at least one array. Pass an array, or a dict of arrays.")
        given = ports.split(value)
        arrays = tuple(_make_port_array(name, array) for name, array in zip(ports.names, given, strict=True))
        _check_lengths(ports, arrays)
        tensors = [(n, g) for n, g in zip(ports.names, given, strict=True) if isinstance(g, torch.Tensor)]
        return cls(ports, arrays, bool(tensors), tuple(n for n, t in tensors if t.dtype == torch.bfloat16))

    @property
    def n_rows(self) -> int:
        """Rows of every port."""
        return int(self.arrays[0].shape[0])

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row of all ports."""
        return sum(_compute_nbytes(a.shape[1:], a.dtype) for a in self.arrays)

    @property
    def row_chunks(self) -> tuple[int, ...] | None:
        """The first axis's chunks where a dask array brings its own, else None."""
        return next((a.chunks[0] for a in self.arrays if isinstance(a, da.Array)), None)

    @property
    def unit_rows(self) -> int | None:
        """Rows that are read or computed in one go, of all ports together; None where any can be read alone."""
        units = [unit for a in self.arrays if (unit := _get_unit_rows(a))]
        return lcm(*units) if units else None

    @property
    def paths(self) -> list[str]:
        """Files that are read."""
        return [a.path for a in self.arrays if hasattr(a, "path")]

    def check_sizes(self, max_nbytes: int) -> None:
        """Refuse what declares more than ``nbytes`` in one piece, or more rows than can be planned; nothing is read.

        Raises
        ------
        InputError
            Which says how much it is, and of what.
        """
        for name, array in zip(self.ports.names, self.arrays, strict=True):
            row_nbytes = _compute_nbytes(array.shape[1:], array.dtype)
            pieces = {"row": array.shape[1:], "chunk": getattr(array, "chunk_shape", ())}
            for piece, shape in pieces.items():
                if _compute_nbytes(shape, array.dtype) > max_nbytes:
                    raise InputError(
                        f"a {piece} of {name}{_format_location(array)} takes {format_nbytes(_compute_nbytes(shape, array.dtype))} "
                        f"({tuple(shape)} {array.dtype}) and has to be read whole; the smallest device has "
                        f"{format_nbytes(max_nbytes)}. Store it in smaller ones, or use devices with more memory."
                    )
            if array.shape[0] * max(1, row_nbytes) > MAX_INPUT_NBYTES:
                raise InputError(
                    f"{name}{_format_location(array)} has {array.shape[0]:,} rows of {format_nbytes(row_nbytes)}; one call takes at most "
                    f"{format_nbytes(MAX_INPUT_NBYTES)}. Cut it into parts."
                )

    def make_empty_arrays(self) -> list[Array]:
        """One empty array per port with its shape and dtype; nothing is read."""
        return [np.empty((0, *a.shape[1:]), a.dtype) for a in self.arrays]

    def describe(self) -> tuple[str, ...]:
        """A line per port."""
        return tuple(f"{n}: {tuple(a.shape)} {a.dtype}" for n, a in zip(self.ports.names, self.arrays, strict=True))

    def make_dask_arrays(self, row_chunks: Sequence[int]) -> list[da.Array]:
        """One dask array per port, cut into these chunks; a file is read chunk by chunk where it is needed.

        A file's is 1-d, of dtype object, and its chunks are the rows, (n, ...): taking the later axes off afterwards would
        be a task more per chunk.
        """
        return [self.make_dask_array(array, row_chunks) for array in self.arrays]

    @staticmethod
    def make_dask_array(array: Any, row_chunks: Sequence[int]) -> da.Array:
        """One port's dask array, as :meth:`make_dask_arrays` gives it."""
        return _convert_to_dask(array, tuple(row_chunks))


def _compute_nbytes(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """In Python's numbers: what a file declares may be more than NumPy can count."""
    return prod(map(int, shape)) * dtype.itemsize


def _format_location(array: Any) -> str:
    return f" ({array.path!r})" if hasattr(array, "path") else ""


def _get_unit_rows(array: Any) -> int | None:
    """A store's chunk or shard; of a dask array its first chunk, where all but the last are alike."""
    if not isinstance(array, da.Array):
        return getattr(array, "unit_rows", None)
    first, *others = array.chunks[0]
    return first if all(size == first for size in others[:-1]) and (not others or others[-1] <= first) else None


def _make_port_array(name: str, value: Any) -> Any:
    array = _convert_to_array(name, value)
    if array.dtype.kind not in NUMERIC_KINDS:
        raise InputError(
            f"{name} holds {array.dtype}; numbers are needed (bool, int, float or complex). Convert it, or encode it first."
        )
    if array.ndim == 0:
        raise InputError(f"{name} is 0-d; its first axis has to be the examples'. Pass {name}[None] for one example.")
    if isinstance(array, da.Array) and any(np.isnan(size) for axis in array.chunks for size in axis):
        raise InputError(
            f"{name} is a dask array with unknown chunks; where each row lies has to be known. "
            "Call .compute_chunk_sizes() on it first."
        )
    return array


def _convert_to_array(name: str, value: Any) -> Any:
    if isinstance(value, str | os.PathLike):
        return open_source(value)
    if isinstance(value, da.Array):
        return value
    _check_supported_type(name, value)
    try:
        # Of a memmap, a view: a memmap itself is pickled whole with every chunk.
        array = tensor_to_numpy(value) if isinstance(value, torch.Tensor) else np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{name} cannot be read as an array: {str(error).rstrip('.')}. Its rows have to be numbers in one shape; "
            "convert it first."
        ) from error
    if array.dtype.name not in _DEFAULT_DTYPES or not isinstance(value, list) or _has_arrays(value):
        return array
    return array.astype(_DEFAULT_DTYPES[array.dtype.name])


def _check_supported_type(name: str, value: Any) -> None:
    """Refuse what NumPy would take at a price: dask values would be computed here, a mask would be dropped."""
    if isinstance(value, np.ma.MaskedArray):
        raise InputError(f"{name} is a masked array; a network sees no mask. Pass {name}.filled(…).")
    if any(dask.is_dask_collection(item) for item in (value if isinstance(value, list) else [value])):
        raise InputError(
            f"{name} is or holds a dask {type(value).__name__}; one dask array is needed. "
            "Pass the .data of an xarray DataArray, .to_dask_array(lengths=True) of a DataFrame, or dask.array.stack(…)."
        )


def _has_arrays(value: list[Any]) -> bool:
    return any(isinstance(item, np.ndarray | np.generic) or (isinstance(item, list) and _has_arrays(item)) for item in value)


def _check_lengths(ports: Ports, arrays: Sequence[Any]) -> None:
    lengths = {name: int(array.shape[0]) for name, array in zip(ports.names, arrays, strict=True)}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} has {n:,} rows" for name, n in lengths.items())
        raise InputError(f"{said}; all ports need as many. Cut them to one length.")


def _convert_to_dask(array: Any, row_chunks: tuple[int, ...]) -> da.Array:
    if isinstance(array, da.Array):
        return array if array.chunks[0] == row_chunks else array.rechunk({0: row_chunks})
    # No name from the content: hashing an array costs more than cutting it.
    if not isinstance(array, np.ndarray):
        meta = np.empty(0, object)
        return da.from_array(_RowArray(array), chunks=(row_chunks,), name=False, inline_array=True, asarray=False, meta=meta)
    chunks = (row_chunks, *((size,) for size in array.shape[1:]))
    return da.from_array(
        array, chunks=chunks, name=False, inline_array=True, asarray=False, meta=np.empty((0,) * array.ndim, array.dtype)
    )


class _RowArray:
    """A source as a 1-d array whose elements are whole rows."""

    dtype = np.dtype(object)
    ndim = 1

    def __init__(self, source: ArraySource) -> None:
        self._source = source
        self.shape = source.shape[:1]

    def __getitem__(self, index: Any) -> Array:
        return self._source[index]
