"""By what a later run knows that it has the same input: cheap where the input lies in files, exact where it is in memory.

::

    .npy, memmap   shape, dtype, bytes and time of change of the file; of a memmap that nobody can write to
    .zarr          shape, dtype, the metadata's bytes, how many files there are, and when last one came, went or was replaced
    in memory      a SHA-256 of the bytes, also of other memmaps: a change of mode "c" never reaches the file, and of one
                   that does a tmpfs does not note the time
    dask array     its name, which Dask makes of what it computes, and its chunks

Paths do not count: an input that was moved is the same. What is not noticed: bytes of a file that change while its time of
change is set back; bytes of a Zarr chunk that change in place, not by a new file; what a dask array reads by name.
"""

from __future__ import annotations

import hashlib
from typing import Any

import dask.array as da
import numpy as np

from daskinfer.core.arrays import Array
from daskinfer.planning.inputs import Inputs
from daskinfer.storage.formats import compute_stat_fingerprint, npy

_HASH_BLOCK_NBYTES = 64 << 20  # hashed at once, of arrays that lie in pieces


def compute_input_fingerprint(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """What a manifest keeps of an input, by port."""
    named = zip(inputs.ports.names, inputs.arrays, strict=True)
    return {
        name: {"shape": list(a.shape), "dtype": np.dtype(a.dtype).str, **_compute_array_fingerprint(a)} for name, a in named
    }


def _compute_array_fingerprint(array: Any) -> dict[str, Any]:
    if isinstance(array, da.Array):
        return {"name": array.name, "chunks": hashlib.sha256(repr(array.chunks).encode()).hexdigest()}
    if not isinstance(array, np.ndarray):
        return compute_stat_fingerprint(array.path)
    mapped = _find_memmap(array)
    if mapped is not None and mapped.mode == "r":
        view = {"at": array.ctypes.data - mapped.ctypes.data, "strides": list(array.strides), "offset": mapped.offset}
        return npy.compute_stat_fingerprint(str(mapped.filename)) | view
    return {"sha256": _compute_sha256(array)}


def _find_memmap(array: Array) -> np.memmap[Any, Any] | None:
    """The memmap of a file that the array is part of."""
    base: Any = array
    found = None
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and base.filename is not None:
            found = base  # the last: it holds all of the file's
        base = base.base
    return found


def _compute_sha256(array: Array) -> str:
    digest = hashlib.sha256()
    n_rows = max(1, _HASH_BLOCK_NBYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), n_rows):
        digest.update(np.ascontiguousarray(array[start : start + n_rows]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
