"""NumPy's ``.npy`` format: one header, then the rows; nothing is ever unpickled.

Rows are read and written by position, not through a memory map: the pages of a mapped file count as a worker's memory
(measured: 16 GB for 16 GB of input), and a prefetched chunk must really have been read, not only mapped.
"""

from __future__ import annotations

import contextlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from daskinfer.core.chunks import StoredPart
from daskinfer.core.files import add_filename_to_errors
from daskinfer.core.formatting import format_nbytes
from daskinfer.errors import InputError
from daskinfer.storage import staging

_MAX_IO_NBYTES = 1 << 30  # one system call reads or writes less than 2 GiB


class Source:
    """The rows of a ``.npy`` file; ``unit_rows`` is None, since reading can start at any row."""

    unit_rows: int | None = None
    chunk_shape: tuple[int, ...] = ()

    def __init__(self, path: str) -> None:
        self.path = path
        with _wrap_input_errors(path):
            self.shape, self.dtype, self._offset = _read_header(path)
        self.ndim = len(self.shape)

    def _open_memmap(self) -> np.memmap[Any, Any]:
        with _wrap_input_errors(self.path):
            memmap: np.memmap[Any, Any] = np.lib.format.open_memmap(self.path, mode="r")
        return memmap

    def __getitem__(self, index: Any) -> np.ndarray[Any, Any]:
        rows = index[0] if isinstance(index, tuple) and len(index) == 1 else index
        if self._offset is None or not isinstance(rows, slice) or rows.step not in (None, 1):
            return np.array(self._open_memmap()[index])
        start, stop, _ = rows.indices(self.shape[0])
        out = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        row_nbytes = out[:1].nbytes if len(out) else 0
        with _wrap_input_errors(self.path), open(self.path, "rb", buffering=0) as file:
            _transfer(os.preadv, file.fileno(), out, self._offset + start * row_nbytes, self.path)
        return out


@dataclass(frozen=True)
class Target:
    """A ``.npy`` file that is written at ``store``; a part is the bytes of ``unit_rows`` rows."""

    store: str
    run_folder: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    unit_rows: int

    @property
    def writable_path(self) -> str:
        return self.store

    @property
    def metadata_parts(self) -> tuple[str, ...]:
        return (f"0:{len(self._header_bytes)}",)

    @property
    def _header_bytes(self) -> bytes:
        file = io.BytesIO()
        fields = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(file, fields)
        return file.getvalue()

    def create(self, path: str) -> None:
        # Reserving the space now makes a full disk fail here, not in the middle of the run.
        with open(path, "wb", buffering=0) as file:
            file.write(self._header_bytes)
            _reserve(file.fileno(), path, len(self._header_bytes) + prod(self.shape) * self.dtype.itemsize)

    def write(self, start: int, rows: np.ndarray[Any, Any]) -> tuple[StoredPart, ...]:
        rows = np.ascontiguousarray(rows, self.dtype)
        first = len(self._header_bytes) + start * rows[:1].nbytes
        with (
            staging.hold_write_fence(self.run_folder),
            add_filename_to_errors(self.store),
            open(self.store, "r+b", buffering=0) as file,
        ):
            _transfer(os.pwritev, file.fileno(), rows, first, self.store)
        memory, unit_nbytes = rows.reshape(-1).view(np.uint8).data, self.unit_rows * rows[:1].nbytes
        units = [memory[at : at + unit_nbytes] for at in range(0, memory.nbytes, max(1, unit_nbytes))]
        starts = range(first, first + memory.nbytes, max(1, unit_nbytes))
        return tuple(
            StoredPart(f"{at}:{at + unit.nbytes}", unit.nbytes, zlib.crc32(unit))
            for at, unit in zip(starts, units, strict=True)
        )

    def publish(self, parts: Sequence[StoredPart]) -> tuple[StoredPart, ...]:
        return tuple(parts)  # written in place

    def get_file_paths(self, parts: Sequence[StoredPart]) -> set[str]:
        return {self.store}


_HEADER_PARSERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _read_header(path: str) -> tuple[tuple[int, ...], np.dtype[Any], int | None]:
    """Read shape, dtype and the offset of the first row, None in Fortran order; nothing but the header is read."""
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADER_PARSERS:
            raise ValueError(f"its format version must be 1.0 or 2.0, got {version[0]}.{version[1]}")
        try:
            shape, fortran_order, dtype = _HEADER_PARSERS[version](file)
        except Exception as error:  # NumPy's parser of Python literals raises what Python's tokenizer does
            raise ValueError(f"its header is invalid ({error})") from error
        offset, nbytes = file.tell(), os.fstat(file.fileno()).st_size
    if dtype.hasobject:
        raise ValueError("it contains pickled Python objects, which are never loaded")
    # In Python's integers: a header may declare more than NumPy's can hold.
    if min(shape, default=0) < 0 or offset + prod(shape) * dtype.itemsize > nbytes:
        raise ValueError(
            f"its header declares {shape} {dtype} ({format_nbytes(prod(shape) * dtype.itemsize)}), but the file has only "
            f"{format_nbytes(nbytes)}"
        )
    return shape, dtype, None if fortran_order and len(shape) > 1 else offset


def compute_stat_fingerprint(path: str) -> dict[str, Any]:
    """Fingerprint a file by its size and the time of its last change."""
    stat = os.stat(path)
    return {"nbytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


@contextlib.contextmanager
def _wrap_input_errors(path: str) -> Iterator[None]:
    """Raise an error that names the input, whatever goes wrong while reading it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(
            f"the input {path!r} cannot be read: {error}. Save an array of numbers there with "
            "numpy.save(path, array, allow_pickle=False)."
        ) from error


def _transfer(call: Any, descriptor: int, rows: np.ndarray[Any, Any], offset: int, path: str) -> None:
    """Read or write all bytes of ``rows``, in as many system calls as it takes."""
    memory, done = rows.reshape(-1).view(np.uint8), 0
    while done < memory.size:
        n = call(descriptor, [memory[done : done + _MAX_IO_NBYTES]], offset + done)
        if not n:
            raise OSError(f"the file {path!r} ends before its last row; it was truncated while it was in use")
        done += n


def _reserve(descriptor: int, path: str, nbytes: int) -> None:
    try:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(descriptor, 0, nbytes)
        else:
            os.ftruncate(descriptor, nbytes)
    except OSError as error:
        raise OSError(error.errno, f"cannot reserve {nbytes} bytes for the output ({error.strerror})", path) from error
