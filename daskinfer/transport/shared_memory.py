"""Memory that the client shares with the workers of its host, for rows on their way there and results on their way back.

A :class:`SharedMemoryPool` holds equal slots, one per task in flight, reused from task to task. Fresh pages are the cost
(0.45 s per 0.5 GB, against 0.025 s for a copy into existing pages, measured), so a pool is kept for the next call of its
client. The memory in use is bounded by the tasks in flight, not by the size of the input.

The memory is a ``memfd``, which workers open through ``/proc/<client>/fd``. It has no name, so nothing is left behind
however client or worker end, ``kill -9`` included, and it does not count against ``/dev/shm``, which has 64 MiB in many
containers. On systems without ``memfd`` the pool is a file in the temporary folder, whose space is allocated before it is
mapped; its owner holds a lock on it, and the next pool removes files that nobody has locked.

Whether a worker can attach to a pool is tried, not guessed: it compares a token in the pool's first bytes. Workers on other
hosts, in other containers or of other users get their rows by Dask's comms instead.

A slot is reused only after its attempt has responded. A slot that an abandoned attempt may still write to is never reused:
its pool is discarded, so that the late writer writes into memory that nobody reads.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import pickle
import tempfile
import threading
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from daskinfer.core.arrays import Array
from daskinfer.core.files import lock_descriptor, remove_stale_files

POOL_HEADER_NBYTES = mmap.PAGESIZE  # the token, then padding up to the first slot
RESULT_HEADER_NBYTES = (
    32 << 10
)  # at a slot's end, for the result header of a task: statistics of 64 chunks, some 300 bytes each
ALIGN = 64  # bytes; a cache line, which torch's vectorized code prefers
_PROC_PREFIX, _FILE_PREFIX = "/proc/", "daskinfer-arena-"
MAX_ATTACHED_POOLS = 4  # pools that a worker keeps mapped; arbitrary, a client usually has one


@dataclass(frozen=True)
class ArrayRef:
    """Where an array is in a pool: ``offset`` in bytes, shape and dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def get_array(self, memory: mmap.mmap) -> Array:
        """Return the array as a view of that memory."""
        return np.ndarray(self.shape, self.dtype, memory, self.offset)


@dataclass(frozen=True)
class PoolRef:
    """What a worker needs to attach to a pool; small and picklable."""

    path: str
    token: str
    nbytes: int


class Slot:
    """A part of a pool for one task: arrays are allocated one after the other, the result header is at the end."""

    def __init__(self, pool: SharedMemoryPool, start: int) -> None:
        self.pool = pool
        self.start = start
        self._next_offset = start

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> ArrayRef | None:
        """Allocate the next bytes to an array; return None if too few are free."""
        ref = ArrayRef(self._next_offset, shape, dtype)
        end = self._next_offset + align_nbytes(math.prod(shape) * dtype.itemsize)
        if end > self.header_offset:
            return None
        self._next_offset = end
        return ref

    @property
    def header_offset(self) -> int:
        """Offset of the result header in the pool."""
        return self.start + self.pool.slot_nbytes - RESULT_HEADER_NBYTES

    @property
    def has_header(self) -> bool:
        """Whether the worker has written a result header."""
        return bool(read_result_header_nbytes(self.pool.memory, self.header_offset))

    def read_header(self) -> Any:
        """Return the result header that the worker wrote."""
        return read_result_header(self.pool.memory, self.header_offset)

    def release(self) -> None:
        """Return the slot to its pool: its attempt has responded, and its results were used."""
        self._next_offset = self.start
        self.pool.free_slots.append(self)


class SharedMemoryPool:
    """Shared memory cut into equal slots; the client's side.

    Note: one run uses it at a time (``borrow_pool``), from one thread.
    """

    def __init__(self, slot_nbytes: int, n_slots: int) -> None:
        self.slot_nbytes, self.n_slots = slot_nbytes, n_slots
        nbytes = POOL_HEADER_NBYTES + slot_nbytes * n_slots
        descriptor, path = _create_pool_file()
        self._finalizer = weakref.finalize(self, _close_pool_file, descriptor, path, os.getpid())
        try:
            _reserve_file_space(descriptor, path, nbytes)
            self.memory = mmap.mmap(descriptor, nbytes)
        except OSError:
            self._finalizer()
            raise
        self.ref = PoolRef(path, uuid.uuid4().hex, nbytes)
        self.memory[: len(self.ref.token)] = self.ref.token.encode()
        self.free_slots = [Slot(self, POOL_HEADER_NBYTES + i * slot_nbytes) for i in reversed(range(n_slots))]

    @property
    def is_idle(self) -> bool:
        """Whether no attempt may still write to the pool."""
        return len(self.free_slots) == self.n_slots

    def close(self) -> None:
        """Release the memory; the system frees it once no process maps it any more."""
        self._finalizer()
        # Break the reference cycle of slots and pool. Not memory.close(): NumPy arrays do not keep a map from being closed.
        self.free_slots.clear()


def compute_slot_nbytes(nbytes: int) -> int:
    """Return the bytes of a slot that holds arrays of ``nbytes`` bytes and the result header.

    Examples
    --------
    >>> compute_slot_nbytes(100) - RESULT_HEADER_NBYTES
    4096
    """
    return -(-(nbytes + RESULT_HEADER_NBYTES) // mmap.PAGESIZE) * mmap.PAGESIZE


def align_nbytes(nbytes: int) -> int:
    """Return the bytes that an array of ``nbytes`` bytes takes in a slot."""
    return -(-nbytes // ALIGN) * ALIGN


_cached_pools: weakref.WeakKeyDictionary[Any, SharedMemoryPool] = weakref.WeakKeyDictionary()
_cached_pools_lock = threading.Lock()


@contextlib.contextmanager
def borrow_pool(owner: Any, slot_nbytes: int, n_slots: int) -> Iterator[SharedMemoryPool]:
    """Give a pool to one call; it is kept for the next call of ``owner`` (a client) if all of its slots were returned."""
    with _cached_pools_lock:
        pool = _cached_pools.pop(owner, None)
    if pool is not None and (pool.slot_nbytes < slot_nbytes or pool.n_slots < n_slots):
        pool.close()
        pool = None
    pool = pool or SharedMemoryPool(slot_nbytes, n_slots)
    try:
        yield pool
    finally:
        with _cached_pools_lock:
            if pool.is_idle and owner not in _cached_pools:
                _cached_pools[owner] = pool
            else:
                pool.close()


def close_cached_pool(owner: Any) -> None:
    """Close the pool that is kept for ``owner``, if there is one."""
    with _cached_pools_lock:
        pool = _cached_pools.pop(owner, None)
    if pool is not None:
        pool.close()


# The worker's side.

_attached_pools: OrderedDict[str, mmap.mmap] = OrderedDict()
_attached_pools_lock = threading.Lock()


def attach_pool(ref: PoolRef) -> mmap.mmap:
    """Return the memory of a pool, mapped into this process once.

    Raises
    ------
    OSError
        If the pool cannot be opened, or its path leads to another one.
    """
    with _attached_pools_lock:
        if ref.token not in _attached_pools:
            _attached_pools[ref.token] = _open_pool(ref)
            while len(_attached_pools) > MAX_ATTACHED_POOLS:
                _attached_pools.popitem(last=False)  # unmapped once no array uses it
        _attached_pools.move_to_end(ref.token)
        return _attached_pools[ref.token]


def can_attach(ref: PoolRef) -> bool:
    """Return whether this process can attach to a pool."""
    try:
        attach_pool(ref)
    except OSError:
        return False
    return True


def detach_all_pools() -> None:
    """Drop every pool that this process has mapped."""
    with _attached_pools_lock:
        _attached_pools.clear()


def write_result_header(memory: mmap.mmap, offset: int, header: Any) -> bool:
    """Write a small object for the client; return False, and write nothing, if it does not fit."""
    content = pickle.dumps(header)
    fits = len(content) <= RESULT_HEADER_NBYTES - 4  # the next task's slot begins after it
    memory[offset : offset + 4] = (len(content) if fits else 0).to_bytes(4, "little")
    if fits:
        memory[offset + 4 : offset + 4 + len(content)] = content
    return fits


def read_result_header_nbytes(memory: mmap.mmap, offset: int) -> int:
    """Return the bytes that :func:`write_result_header` wrote; 0 if the object did not fit."""
    return int.from_bytes(memory[offset : offset + 4], "little")


def read_result_header(memory: mmap.mmap, offset: int) -> Any:
    """Return the object that :func:`write_result_header` wrote; None if it did not fit."""
    size = read_result_header_nbytes(memory, offset)
    return pickle.loads(memory[offset + 4 : offset + 4 + size]) if size else None


def _open_pool(ref: PoolRef) -> mmap.mmap:
    descriptor = os.open(ref.path, os.O_RDWR)
    try:
        if (nbytes := os.fstat(descriptor).st_size) != ref.nbytes:
            raise OSError(f"shared memory {ref.path} must have {ref.nbytes} bytes, got {nbytes}")
        memory = mmap.mmap(descriptor, ref.nbytes)
    finally:
        os.close(descriptor)
    if memory[: len(ref.token)] != ref.token.encode():
        raise OSError(f"shared memory {ref.path} belongs to another process")
    return memory


def _create_pool_file() -> tuple[int, str]:
    """Create an empty file; return its descriptor, and the path by which workers open it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("daskinfer", os.MFD_CLOEXEC)
        return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"
    remove_stale_files(_FILE_PREFIX)
    descriptor, path = tempfile.mkstemp(prefix=_FILE_PREFIX)
    lock_descriptor(descriptor)  # for as long as its owner lives
    return descriptor, path


def _reserve_file_space(descriptor: int, path: str, nbytes: int) -> None:
    """Allocate the file's space: mapping more than a full disk holds succeeds, and kills the writer later (SIGBUS)."""
    if path.startswith(_PROC_PREFIX) or not hasattr(os, "posix_fallocate"):
        os.ftruncate(descriptor, nbytes)
    else:
        os.posix_fallocate(descriptor, 0, nbytes)


def _close_pool_file(descriptor: int, path: str, owner_pid: int) -> None:
    os.close(descriptor)
    if not path.startswith(_PROC_PREFIX) and os.getpid() == owner_pid:  # the file of a forked child is its parent's
        os.unlink(path)
