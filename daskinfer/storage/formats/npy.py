"""NumPy's ``.npy``: one header, then the rows; never unpickled.

Rows are read and written by position, not through a memory map: pages of a mapped file count towards a worker's memory
(16 GB of input made 16 GB of it), and a reader ahead of the device has to have read them, not promised them.
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
from daskinfer.core.files import with_filename
from daskinfer.core.formatting import format_nbytes
from daskinfer.errors import InputError
from daskinfer.storage import staging

_MAX_IO_NBYTES = 1 << 30  # one call of the system reads or writes less than 2 GiB


class Source:
    """Rows of a ``.npy`` file; ``unit_rows`` None: they can be read from anywhere."""

    unit_rows: int | None = None
    chunk_shape: tuple[int, ...] = ()

    def __init__(self, path: str) -> None:
        self.path = path
        with _wrap_input_errors(path):
            self.shape, self.dtype, self._offset = _read_header(path)
        self.ndim = len(self.shape)

    def _open_memmap(self) -> np.memmap[Any, Any]:
        with _wrap_input_errors(self.path):
            mapped: np.memmap[Any, Any] = np.lib.format.open_memmap(self.path, mode="r")
        return mapped

    def __getitem__(self, index: Any) -> np.ndarray[Any, Any]:
        rows = index[0] if isinstance(index, tuple) and len(index) == 1 else index
        if self._offset is None or not isinstance(rows, slice) or rows.step not in (None, 1):
            return np.array(self._open_memmap()[index])
        start, stop, _ = rows.indices(self.shape[0])
        found = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        row_nbytes = found[:1].nbytes if len(found) else 0
        with _wrap_input_errors(self.path), open(self.path, "rb", buffering=0) as file:
            _transfer(os.preadv, file.fileno(), found, self._offset + start * row_nbytes, self.path)
        return found


@dataclass(frozen=True)
class Target:
    """A ``.npy`` file at ``store`` that is being written; a part is the bytes of ``unit_rows`` rows."""

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
        described = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(file, described)
        return file.getvalue()

    def create(self, path: str) -> None:
        # A disk that is full is found out now, not in the middle.
        with open(path, "wb", buffering=0) as file:
            file.write(self._header_bytes)
            _reserve(file.fileno(), path, len(self._header_bytes) + prod(self.shape) * self.dtype.itemsize)

    def write(self, start: int, rows: np.ndarray[Any, Any]) -> tuple[StoredPart, ...]:
        rows = np.ascontiguousarray(rows, self.dtype)
        first = len(self._header_bytes) + start * rows[:1].nbytes
        with staging.write_fence(self.run_folder), with_filename(self.store), open(self.store, "r+b", buffering=0) as file:
            _transfer(os.pwritev, file.fileno(), rows, first, self.store)
        memory, unit_nbytes = rows.reshape(-1).view(np.uint8).data, self.unit_rows * rows[:1].nbytes
        units = [memory[at : at + unit_nbytes] for at in range(0, memory.nbytes, max(1, unit_nbytes))]
        starts = range(first, first + memory.nbytes, max(1, unit_nbytes))
        return tuple(
            StoredPart(f"{at}:{at + unit.nbytes}", unit.nbytes, zlib.crc32(unit))
            for at, unit in zip(starts, units, strict=True)
        )

    def publish(self, parts: Sequence[StoredPart]) -> tuple[StoredPart, ...]:
        return tuple(parts)  # it lies where it stays

    def get_file_paths(self, parts: Sequence[StoredPart]) -> set[str]:
        return {self.store}


_HEADER_PARSERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _read_header(path: str) -> tuple[tuple[int, ...], np.dtype[Any], int | None]:
    """Shape, dtype, and where the rows begin; None where they do not lie one after the other. Nothing else is read."""
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADER_PARSERS:
            raise ValueError(f"its format is {version[0]}.{version[1]}, and only 1.0 and 2.0 hold plain numbers")
        try:
            shape, in_columns, dtype = _HEADER_PARSERS[version](file)
        except Exception as error:  # NumPy's parser of Python literals raises what Python's tokenizer does
            raise ValueError(f"its header cannot be understood ({error})") from error
        offset, nbytes = file.tell(), os.fstat(file.fileno()).st_size
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects, which are never loaded")
    # In Python's numbers: a header may declare more than NumPy can count.
    if min(shape, default=0) < 0 or offset + prod(shape) * dtype.itemsize > nbytes:
        raise ValueError(
            f"its header declares {shape} {dtype}, {format_nbytes(prod(shape) * dtype.itemsize)}, and the file has "
            f"{format_nbytes(nbytes)}"
        )
    return shape, dtype, None if in_columns and len(shape) > 1 else offset


def compute_stat_fingerprint(path: str) -> dict[str, Any]:
    """Bytes and time of change."""
    found = os.stat(path)
    return {"nbytes": found.st_size, "mtime_ns": found.st_mtime_ns}


@contextlib.contextmanager
def _wrap_input_errors(path: str) -> Iterator[None]:
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
        n = call(descriptor, [memory[done : done + _MAX_IO_NBYTES]], offset + done)
        if not n:
            raise OSError(f"the file {path!r} ends before its rows do; it was cut off while it was read")
        done += n


def _reserve(descriptor: int, path: str, nbytes: int) -> None:
    try:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(descriptor, 0, nbytes)
        else:
            os.ftruncate(descriptor, nbytes)
    except OSError as error:
        raise OSError(error.errno, f"{nbytes} bytes for the output cannot be reserved ({error.strerror})", path) from error
