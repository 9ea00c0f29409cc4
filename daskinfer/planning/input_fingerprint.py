"""Fingerprint of an input, to detect that it changed between runs: cheap for files, exact for arrays in memory.

::

    .npy, memmap   shape, dtype, size and modification time of the file; for a memmap only if it is read-only
    .zarr          shape, dtype, the bytes of the metadata, the number of files, and the time at which a file was last added,
                   removed or replaced
    in memory      a SHA-256 of the bytes; other memmaps too, since a change in mode "c" never reaches the file, and a tmpfs
                   does not update the modification time for one that does
    dask array     its name, which Dask derives from what it computes, and its chunks

Paths do not count: an input that was moved is the same input. Not detected: a file whose bytes changed and whose
modification time was set back; a Zarr chunk that was changed in place instead of replaced; changes in what a dask array
reads by name.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from daskinfer.core.arrays import Array, is_dask_array
from daskinfer.planning.inputs import Inputs
from daskinfer.storage.formats import compute_stat_fingerprint, npy

_HASH_BLOCK_NBYTES = 64 << 20  # hashed at once, so that an array that is not contiguous is copied in blocks; arbitrary


def compute_input_fingerprint(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Return the fingerprint of an input as a manifest stores it: a record for each port."""
    named = zip(inputs.ports.names, inputs.arrays, strict=True)
    return {
        name: {"shape": list(a.shape), "dtype": np.dtype(a.dtype).str, **_compute_array_fingerprint(a)} for name, a in named
    }


def _compute_array_fingerprint(array: Any) -> dict[str, Any]:
    if is_dask_array(array):
        return {"name": array.name, "chunks": hashlib.sha256(repr(array.chunks).encode()).hexdigest()}
    if not isinstance(array, np.ndarray):
        return compute_stat_fingerprint(array.path)
    memmap = _find_memmap(array)
    if memmap is not None and memmap.mode == "r":
        view = {"at": array.ctypes.data - memmap.ctypes.data, "strides": list(array.strides), "offset": memmap.offset}
        return npy.compute_stat_fingerprint(str(memmap.filename)) | view
    return {"sha256": _compute_sha256(array)}


def _find_memmap(array: Array) -> np.memmap[Any, Any] | None:
    """Return the memmap that the array is a view of, the outermost if there are several; None if there is none."""
    base: Any = array
    memmap = None
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and base.filename is not None:
            memmap = base  # keep the last one: it covers all rows of the file
        base = base.base
    return memmap


def _compute_sha256(array: Array) -> str:
    digest = hashlib.sha256()
    n_rows = max(1, _HASH_BLOCK_NBYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), n_rows):
        digest.update(np.ascontiguousarray(array[start : start + n_rows]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
