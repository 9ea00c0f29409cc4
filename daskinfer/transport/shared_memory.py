"""How the rows of an in-memory array reach the workers of this host, and how their answers come back.

Through memory that both map: an :class:`SharedMemoryPool` of equal slots, one per task in flight, reused from task to task. Fresh
pages are the cost (0.45 s per 0.5 GB here, a copy into pages that are there 0.025 s), so an arena is kept for the next call
of its client, and memory is bounded by the window, not by the input (decision 5).

The memory is a ``memfd``, opened by the workers through ``/proc/<client>/fd``. It has no name: nothing is left behind
however client or worker end, ``kill -9`` included, and it does not count against the size of ``/dev/shm``, which is 64 MiB
in many containers (this replaces decision 5's named files, their locks and their removal). Where the system has none, the
arena is a file in the temporary folder, its space taken before it is mapped; its owner holds a lock on it, and one that
nobody holds is removed by the next.

Whether a worker can open an arena is tried, never guessed: it compares a token in the arena's first bytes. Workers on
other hosts, in other containers or of other users get their rows by Dask's comms instead.

A slot is reused only after its attempt has answered. What an abandoned attempt may still write to is never reused: the
arena is let go, and the late writer writes into memory that nobody reads.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from daskinfer.core.scratch import remove_stale

POOL_HEADER_NBYTES = mmap.PAGESIZE  # the token, then nothing up to the first slot
RESULT_HEADER_NBYTES = 32 << 10  # at a slot's end, for the receipts of a task: 64 of some 300 bytes each
ALIGN = 64  # bytes; a cache line, and what torch's vector code likes
_PROC_PREFIX, _FILE_PREFIX = "/proc/", "daskinfer-arena-"
MAX_ATTACHED_POOLS = 4  # arenas that a worker keeps mapped; arbitrary, each client has one as a rule


@dataclass(frozen=True)
class ArrayRef:
    """Where an array lies in an arena: ``offset`` in bytes, a shape and a dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def get_array(self, memory: mmap.mmap) -> Array:
        """The array in that memory, without a copy."""
        return np.ndarray(self.shape, self.dtype, memory, self.offset)


@dataclass(frozen=True)
class PoolRef:
    """What a worker needs to map an arena: picklable, small."""

    path: str
    token: str
    nbytes: int


class Slot:
    """A part of an arena for one task: arrays are placed one after the other, the receipts at the end."""

    def __init__(self, pool: SharedMemoryPool, start: int) -> None:
        self.pool = pool
        self.start = start
        self._next_offset = start

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> ArrayRef | None:
        """Take the next bytes for an array; None where they are not there."""
        place = ArrayRef(self._next_offset, shape, dtype)
        after = self._next_offset + align_nbytes(math.prod(shape) * dtype.itemsize)
        if after > self.header_offset:
            return None
        self._next_offset = after
        return place

    @property
    def header_offset(self) -> int:
        """Where the receipts lie."""
        return self.start + self.pool.slot_nbytes - RESULT_HEADER_NBYTES

    @property
    def has_header(self) -> bool:
        """Whether the worker noted anything."""
        return bool(read_result_header_nbytes(self.pool.memory, self.header_offset))

    def read_header(self) -> Any:
        """What the worker noted there."""
        return read_result_header(self.pool.memory, self.header_offset)

    def release(self) -> None:
        """Give the slot back: its attempt has answered, and the answer was used."""
        self._next_offset = self.start
        self.pool.free_slots.append(self)


class SharedMemoryPool:
    """Shared memory cut into equal slots; the client's side.

    Note: one call of the driver uses it at a time (``borrow_pool``), from one thread.
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
        """Whether no attempt may still write to it."""
        return len(self.free_slots) == self.n_slots

    def close(self) -> None:
        """Let go of the memory; it is gone once nobody maps it any more."""
        self._finalizer()
        # Slots and arena name each other. Not memory.close(): NumPy's arrays do not keep a map from being closed.
        self.free_slots.clear()


def compute_slot_nbytes(nbytes: int) -> int:
    """Bytes of a slot that holds arrays of so many bytes, and the receipts.

    Examples
    --------
    >>> compute_slot_nbytes(100) - RESULT_HEADER_NBYTES
    4096
    """
    return -(-(nbytes + RESULT_HEADER_NBYTES) // mmap.PAGESIZE) * mmap.PAGESIZE


def align_nbytes(nbytes: int) -> int:
    """Bytes that an array takes in a slot."""
    return -(-nbytes // ALIGN) * ALIGN


_cached_pools: weakref.WeakKeyDictionary[Any, SharedMemoryPool] = weakref.WeakKeyDictionary()
_cached_pools_lock = threading.Lock()


@contextlib.contextmanager
def borrow_pool(owner: Any, slot_nbytes: int, n_slots: int) -> Iterator[SharedMemoryPool]:
    """An arena for one call, kept for the next of the same ``owner`` (a client) where all of it was given back."""
    with _cached_pools_lock:
        arena = _cached_pools.pop(owner, None)
    if arena is not None and (arena.slot_nbytes < slot_nbytes or arena.n_slots < n_slots):
        arena.close()
        arena = None
    arena = arena or SharedMemoryPool(slot_nbytes, n_slots)
    try:
        yield arena
    finally:
        with _cached_pools_lock:
            if arena.is_idle and owner not in _cached_pools:
                _cached_pools[owner] = arena
            else:
                arena.close()


def close_cached_pool(owner: Any) -> None:
    """Let go of the arena that is kept for ``owner``."""
    with _cached_pools_lock:
        arena = _cached_pools.pop(owner, None)
    if arena is not None:
        arena.close()


# The worker's side.

_attached_pools: OrderedDict[str, mmap.mmap] = OrderedDict()
_attached_pools_lock = threading.Lock()


def attach_pool(ref: PoolRef) -> mmap.mmap:
    """The memory of an arena in this process, mapped once.

    Raises
    ------
    OSError
        Where it cannot be opened, or where another arena lies there.
    """
    with _attached_pools_lock:
        if ref.token not in _attached_pools:
            _attached_pools[ref.token] = _open_pool(ref)
            while len(_attached_pools) > MAX_ATTACHED_POOLS:
                _attached_pools.popitem(last=False)  # unmapped once no array lies in it
        _attached_pools.move_to_end(ref.token)
        return _attached_pools[ref.token]


def can_attach(ref: PoolRef) -> bool:
    """Whether this process can map an arena."""
    try:
        attach_pool(ref)
    except OSError:
        return False
    return True


def detach_all_pools() -> None:
    """Forget every arena that this process has mapped."""
    with _attached_pools_lock:
        _attached_pools.clear()


def write_result_header(memory: mmap.mmap, offset: int, header: Any) -> bool:
    """Leave something small for the client; False, and nothing, where it is not small enough."""
    content = pickle.dumps(header)
    fits = len(content) <= RESULT_HEADER_NBYTES - 4  # beyond it another task's slot begins
    memory[offset : offset + 4] = (len(content) if fits else 0).to_bytes(4, "little")
    if fits:
        memory[offset + 4 : offset + 4 + len(content)] = content
    return fits


def read_result_header_nbytes(memory: mmap.mmap, offset: int) -> int:
    """Bytes of what :func:`write_result_header` left; 0 where it did not fit."""
    return int.from_bytes(memory[offset : offset + 4], "little")


def read_result_header(memory: mmap.mmap, offset: int) -> Any:
    """Read what :func:`write_result_header` left; None where it did not fit."""
    size = read_result_header_nbytes(memory, offset)
    return pickle.loads(memory[offset + 4 : offset + 4 + size]) if size else None


def _open_pool(ref: PoolRef) -> mmap.mmap:
    descriptor = os.open(ref.path, os.O_RDWR)
    try:
        if os.fstat(descriptor).st_size != ref.nbytes:
            raise OSError(f"{ref.path} is no arena of {ref.nbytes} bytes")
        memory = mmap.mmap(descriptor, ref.nbytes)
    finally:
        os.close(descriptor)
    if memory[: len(ref.token)] != ref.token.encode():
        raise OSError(f"{ref.path} is another process's")
    return memory


def _create_pool_file() -> tuple[int, str]:
    """An open file without bytes, and the path by which others open it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("daskinfer", os.MFD_CLOEXEC)
        return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"
    remove_stale(_FILE_PREFIX)
    descriptor, path = tempfile.mkstemp(prefix=_FILE_PREFIX)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # for as long as its owner lives
    return descriptor, path


def _reserve_file_space(descriptor: int, path: str, nbytes: int) -> None:
    """Give the file its bytes. A map beyond a full disk succeeds and kills the writer later (SIGBUS): take the space now."""
    if path.startswith(_PROC_PREFIX) or not hasattr(os, "posix_fallocate"):
        os.ftruncate(descriptor, nbytes)
    else:
        os.posix_fallocate(descriptor, 0, nbytes)


def _close_pool_file(descriptor: int, path: str, owner_pid: int) -> None:
    os.close(descriptor)
    if not path.startswith(_PROC_PREFIX) and os.getpid() == owner_pid:  # a forked child's is its parent's
        os.unlink(path)
