"""Zarr stores (format 2 or 3 read, 3 written), one array each.

Weighted chunks are irregular and Zarr's are not: a store keeps its own regular chunks of ``unit_rows`` rows, and the plan
cuts at multiples of them, so that no two workers ever write into one chunk (decision 6).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import zarr

from daskinfer.errors import InputError


class Source:
    """Rows of a Zarr array; the store is opened anew in each process."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._array: Any = None
        opened = self._open()
        self.shape, self.dtype, self.ndim = opened.shape, opened.dtype, opened.ndim
        # What is decoded in one go: reading part of it costs all of it.
        self.unit_rows: int | None = int((opened.shards or opened.chunks)[0]) if opened.ndim else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}

    def _open(self) -> Any:
        if self._array is None:
            try:
                self._array = zarr.open_array(self.path, mode="r")
            except Exception as error:
                raise InputError(
                    f"the input {self.path!r} cannot be opened as one Zarr array: {type(error).__name__}: "
                    f"{str(error).rstrip('.')}. Name the array itself, not the group that holds it."
                ) from error
        return self._array

    def __getitem__(self, index: Any) -> np.ndarray[Any, Any]:
        return np.asarray(self._open()[index])


class Target:
    """A Zarr array that is being written; the store is opened once in each process."""

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def create(cls, path: str, shape: tuple[int, ...], dtype: np.dtype[Any], unit_rows: int) -> Target:
        """Make an empty array whose chunks hold ``unit_rows`` whole rows."""
        rows = max(1, min(unit_rows, shape[0]))
        zarr.create_array(path, shape=shape, dtype=dtype, chunks=(rows, *(max(1, size) for size in shape[1:])))
        return cls(path)

    def write(self, start: int, rows: np.ndarray[Any, Any]) -> None:
        """Write whole chunks; ``start`` is a multiple of the ``unit_rows`` of :meth:`create`."""
        _writable(self.path)[start : start + len(rows)] = rows


@functools.lru_cache(maxsize=16)
def _writable(path: str) -> Any:
    """A draft's path is its own: nothing else is ever created there."""
    return zarr.open_array(path, mode="r+")
