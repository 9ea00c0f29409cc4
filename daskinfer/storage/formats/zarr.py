"""Zarr stores with one array each: formats 2 and 3 are read, format 3 is written.

Chunks cut by device weights are irregular, Zarr's are not: a store has its own regular chunks of ``unit_rows`` rows, and
the plan cuts at multiples of them, so that two workers never write to the same chunk (see the docstring of
``daskinfer.storage``).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore

from daskinfer.core.chunks import StoredPart
from daskinfer.core.files import add_filename_to_errors
from daskinfer.errors import InputError


class Source:
    """The rows of a Zarr array; each process opens the store itself."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._array: Any = None
        array = self._open()
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim
        # The unit of decoding: reading part of a chunk (or shard) costs as much as reading all of it.
        self.chunk_shape = tuple(int(size) for size in array.shards or array.chunks)
        self.unit_rows: int | None = self.chunk_shape[0] if array.ndim else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}

    def _open(self) -> Any:
        if self._array is None:
            try:
                self._array = zarr.open_array(self.path, mode="r")
            except Exception as error:
                raise InputError(
                    f"the input {self.path!r} cannot be opened as a single Zarr array: {type(error).__name__}: "
                    f"{str(error).rstrip('.')}. Name the array itself, not the group that contains it."
                ) from error
        return self._array

    def __getitem__(self, index: Any) -> np.ndarray[Any, Any]:
        array = self._open()
        try:
            return np.asarray(array[index])
        except (OSError, MemoryError):
            raise
        except Exception as error:  # codecs raise anything
            raise InputError(
                f"the input {self.path!r} cannot be read{self._locate_broken_chunk(array, index)}: {type(error).__name__}: "
                f"{str(error).rstrip('.')}. Copy the store again from its origin."
            ) from error

    def _locate_broken_chunk(self, array: Any, index: Any) -> str:
        """Find the broken chunk by reading one chunk after the other; return a phrase with its key and rows."""
        rows = index[0] if isinstance(index, tuple) else index
        start, stop, _ = (rows if isinstance(rows, slice) else slice(None)).indices(self.shape[0])
        ends = (stop, *self.shape[1:])
        counts = [
            range(first // size, -(-end // size))
            for first, end, size in zip((start, *([0] * len(ends))), ends, self.chunk_shape, strict=False)
        ]
        for chunk in product(*counts):
            try:
                array[tuple(slice(i * size, (i + 1) * size) for i, size in zip(chunk, self.chunk_shape, strict=True))]
            except Exception:
                first = chunk[0] * self.chunk_shape[0]
                last = min(first + self.chunk_shape[0], self.shape[0])
                return f" in chunk {array.metadata.encode_chunk_key(chunk)!r} (rows {first}:{last})"
        return ""


@dataclass(frozen=True)
class Target:
    """A Zarr array that is written at ``store``; each chunk holds ``unit_rows`` whole rows and is one part.

    Every chunk is written, even one of fill values only, so that a missing file always means missing data. All chunks are
    files in one folder (``c.7.0``): Zarr's default of a folder per chunk doubles what is created, renamed and flushed.
    """

    store: str
    writable_path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    unit_rows: int

    @property
    def metadata_parts(self) -> tuple[str, ...]:
        return ("zarr.json",)

    def create(self, path: str) -> None:
        os.mkdir(path)
        _write_file(
            os.path.join(path, *self.metadata_parts),
            _encode_rows(self, 0, np.empty((0, *self.shape[1:]), self.dtype))["zarr.json"],
        )

    def write(self, start: int, rows: np.ndarray[Any, Any]) -> tuple[StoredPart, ...]:
        if not rows.size:
            return ()
        attempt, encoded = uuid.uuid4().hex, _encode_rows(self, start, rows)
        # Without its parents: if these are gone, another run has taken over.
        os.mkdir(os.path.join(self.writable_path, attempt))
        written = []
        for unit in range(start // self.unit_rows, -(-(start + len(rows)) // self.unit_rows)):
            key = ".".join(["c", str(unit), *("0" for _ in self.shape[1:])])
            name, content = f"{attempt}/{key}", encoded[key]
            _write_file(os.path.join(self.writable_path, name), content)
            written.append(StoredPart(name, len(content), zlib.crc32(content)))
        return tuple(written)

    def publish(self, parts: Sequence[StoredPart]) -> tuple[StoredPart, ...]:
        published = [replace(part, name=part.name.partition("/")[2]) for part in parts]
        for part, final in zip(parts, published, strict=True):
            os.replace(os.path.join(self.writable_path, part.name), os.path.join(self.store, final.name))
        for attempt in {part.name.partition("/")[0] for part in parts}:
            os.rmdir(os.path.join(self.writable_path, attempt))
        return tuple(published)

    def get_file_paths(self, parts: Sequence[StoredPart]) -> set[str]:
        return {os.path.join(self.store, part.name) for part in parts}


def compute_stat_fingerprint(path: str) -> dict[str, Any]:
    """Fingerprint a store by its metadata, its number of files, and the last time that a folder of it changed."""
    digest, n_files, changed_ns = hashlib.sha256(), 0, 0
    for folder, _, names in os.walk(path):
        n_files += len(names)
        changed_ns = max(changed_ns, os.stat(folder).st_mtime_ns)
    for name in ("zarr.json", ".zarray"):
        with contextlib.suppress(FileNotFoundError), open(os.path.join(path, name), "rb") as file:
            digest.update(file.read())
    return {"metadata": digest.hexdigest(), "n_files": n_files, "changed_ns": changed_ns}


def _encode_rows(target: Target, start: int, rows: np.ndarray[Any, Any]) -> dict[str, bytes]:
    """Encode the files of a store that holds only these rows; return their bytes by name."""
    store = MemoryStore()
    array = zarr.create_array(
        store,
        shape=target.shape,
        dtype=target.dtype,
        chunks=(target.unit_rows, *(max(1, size) for size in target.shape[1:])),
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    array[start : start + len(rows)] = rows
    return {name: content.to_bytes() for name, content in store._store_dict.items()}


def _write_file(path: str, content: bytes) -> None:
    with add_filename_to_errors(path), open(path, "xb") as file:
        file.write(content)
