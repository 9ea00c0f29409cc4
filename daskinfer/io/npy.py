"""NumPy's ``.npy``: one header, then the rows; never unpickled.

Rows are read and written by position, not through a memory map: pages of a mapped file count towards a worker's memory
(16 GB of input made 16 GB of it), and a reader ahead of the device has to have read them, not promised them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from daskinfer.errors import InputError

_PART_NBYTES = 1 << 30  # one call of the system reads or writes less than 2 GiB


class Source:
    """Rows of a ``.npy`` file; ``unit_rows`` None: they can be read from anywhere."""

    unit_rows: int | None = None

    def __init__(self, path: str) -> None:
        self.path = path
        mapped = self._map()
        self.shape, self.dtype, self.ndim = mapped.shape, mapped.dtype, mapped.ndim
        # Rows lie one after the other, except in Fortran's order.
        self._offset = mapped.offset if mapped.flags.c_contiguous else None

    def _map(self) -> np.memmap[Any, Any]:
        with _said_of(self.path):
            mapped: np.memmap[Any, Any] = np.lib.format.open_memmap(self.path, mode="r")
        return mapped

    def __getitem__(self, index: Any) -> np.ndarray[Any, Any]:
        rows = index[0] if isinstance(index, tuple) and len(index) == 1 else index
        if self._offset is None or not isinstance(rows, slice) or rows.step not in (None, 1):
            return np.array(self._map()[index])
        start, stop, _ = rows.indices(self.shape[0])
        found = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        row_nbytes = found[:1].nbytes if len(found) else 0
        with _said_of(self.path), open(self.path, "rb", buffering=0) as file:
            _transfer(os.preadv, file.fileno(), found, self._offset + start * row_nbytes, self.path)
        return found


class Target:
    """A ``.npy`` file that is being written; its rows begin at byte ``offset``."""

    def __init__(self, path: str, offset: int) -> None:
        self.path = path
        self.offset = offset

    @classmethod
    def create(cls, path: str, shape: tuple[int, ...], dtype: np.dtype[Any], unit_rows: int) -> Target:
        """Make a file of zeros; ``unit_rows`` means nothing here, since rows lie one after the other."""
        mapped = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        offset, nbytes = mapped.offset, mapped.offset + mapped.nbytes
        del mapped
        # A disk that is full is found out now, not in the middle.
        _reserve(path, nbytes)
        return cls(path, offset)

    def write(self, start: int, rows: np.ndarray[Any, Any]) -> None:
        """Write rows to their place in the file."""
        rows = np.ascontiguousarray(rows)
        with open(self.path, "r+b", buffering=0) as file:
            _transfer(os.pwritev, file.fileno(), rows, self.offset + start * rows[:1].nbytes, self.path)


@contextlib.contextmanager
def _said_of(path: str) -> Iterator[None]:
    """Say which input it is, whatever goes wrong with it meanwhile."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(
            f"the input {path!r} cannot be read: {error}; a .npy file of numbers is needed. "
            "Save it with numpy.save(…, allow_pickle=False)."
        ) from error


def _transfer(call: Any, descriptor: int, rows: np.ndarray[Any, Any], offset: int, path: str) -> None:
    """Read or write all bytes of ``rows``, however many calls it takes."""
    memory, done = rows.reshape(-1).view(np.uint8), 0
    while done < memory.size:
        n = call(descriptor, [memory[done : done + _PART_NBYTES]], offset + done)
        if not n:
            raise OSError(f"the file {path!r} ends before its rows do; it was cut off while it was read")
        done += n


def _reserve(path: str, nbytes: int) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        raise OSError(error.errno, f"{nbytes} bytes for the output cannot be reserved ({error.strerror})", path) from error
    finally:
        os.close(descriptor)
