"""How the rows of an in-memory array reach the workers of this host, and how their answers come back.

Through memory that both map: an :class:`Arena` of equal slots, one per task in flight, reused from task to task. Fresh
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
from daskinfer.core.scratch import remove_ownerless

HEAD_NBYTES = mmap.PAGESIZE  # the token, then nothing up to the first slot
NOTE_NBYTES = 32 << 10  # at a slot's end, for the receipts of a task: 64 of some 300 bytes each
ALIGN = 64  # bytes; a cache line, and what torch's vector code likes
_MEMFD, _FILE_PREFIX = "/proc/", "daskinfer-arena-"
MAX_MAPPED = 4  # arenas that a worker keeps mapped; arbitrary, each client has one as a rule


@dataclass(frozen=True)
class Place:
    """Where an array lies in an arena: ``offset`` in bytes, a shape and a dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def array(self, memory: mmap.mmap) -> Array:
        """The array in that memory, without a copy."""
        return np.ndarray(self.shape, self.dtype, memory, self.offset)


@dataclass(frozen=True)
class ArenaRef:
    """What a worker needs to map an arena: picklable, small."""

    path: str
    token: str
    nbytes: int


class Slot:
    """A part of an arena for one task: arrays are placed one after the other, the receipts at the end."""

    def __init__(self, arena: Arena, start: int) -> None:
        self.arena = arena
        self.start = start
        self._next = start

    def place(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Place | None:
        """Take the next bytes for an array; None where they are not there."""
        place = Place(self._next, shape, dtype)
        after = self._next + aligned(math.prod(shape) * dtype.itemsize)
        if after > self.note_offset:
            return None
        self._next = after
        return place

    @property
    def note_offset(self) -> int:
        """Where the receipts lie."""
        return self.start + self.arena.slot_nbytes - NOTE_NBYTES

    @property
    def noted(self) -> bool:
        """Whether the worker noted anything."""
        return bool(note_nbytes(self.arena.memory, self.note_offset))

    def note(self) -> Any:
        """What the worker noted there."""
        return read_note(self.arena.memory, self.note_offset)

    def free(self) -> None:
        """Give the slot back: its attempt has answered, and the answer was used."""
        self._next = self.start
        self.arena.free.append(self)


class Arena:
    """Shared memory cut into equal slots; the client's side.

    Note: one call of the driver uses it at a time (``lent``), from one thread.
    """

    def __init__(self, slot_nbytes: int, n_slots: int) -> None:
        self.slot_nbytes, self.n_slots = slot_nbytes, n_slots
        nbytes = HEAD_NBYTES + slot_nbytes * n_slots
        descriptor, path = _opened_new()
        self._end = weakref.finalize(self, _ended, descriptor, path, os.getpid())
        try:
            _reserve(descriptor, path, nbytes)
            self.memory = mmap.mmap(descriptor, nbytes)
        except OSError:
            self._end()
            raise
        self.ref = ArenaRef(path, uuid.uuid4().hex, nbytes)
        self.memory[: len(self.ref.token)] = self.ref.token.encode()
        self.free = [Slot(self, HEAD_NBYTES + i * slot_nbytes) for i in reversed(range(n_slots))]

    @property
    def clean(self) -> bool:
        """Whether no attempt may still write to it."""
        return len(self.free) == self.n_slots

    def close(self) -> None:
        """Let go of the memory; it is gone once nobody maps it any more."""
        self._end()
        # Slots and arena name each other. Not memory.close(): NumPy's arrays do not keep a map from being closed.
        self.free.clear()


def slot_nbytes(nbytes: int) -> int:
    """Bytes of a slot that holds arrays of so many bytes, and the receipts.

    Examples
    --------
    >>> slot_nbytes(100) - NOTE_NBYTES
    4096
    """
    return -(-(nbytes + NOTE_NBYTES) // mmap.PAGESIZE) * mmap.PAGESIZE


def aligned(nbytes: int) -> int:
    """Bytes that an array takes in a slot."""
    return -(-nbytes // ALIGN) * ALIGN


_kept: weakref.WeakKeyDictionary[Any, Arena] = weakref.WeakKeyDictionary()
_kept_lock = threading.Lock()


@contextlib.contextmanager
def lent(owner: Any, slot_nbytes: int, n_slots: int) -> Iterator[Arena]:
    """An arena for one call, kept for the next of the same ``owner`` (a client) where all of it was given back."""
    with _kept_lock:
        arena = _kept.pop(owner, None)
    if arena is not None and (arena.slot_nbytes < slot_nbytes or arena.n_slots < n_slots):
        arena.close()
        arena = None
    arena = arena or Arena(slot_nbytes, n_slots)
    try:
        yield arena
    finally:
        with _kept_lock:
            if arena.clean and owner not in _kept:
                _kept[owner] = arena
            else:
                arena.close()


def release(owner: Any) -> None:
    """Let go of the arena that is kept for ``owner``."""
    with _kept_lock:
        arena = _kept.pop(owner, None)
    if arena is not None:
        arena.close()


# The worker's side.

_mapped: OrderedDict[str, mmap.mmap] = OrderedDict()
_mapped_lock = threading.Lock()


def mapped(ref: ArenaRef) -> mmap.mmap:
    """The memory of an arena in this process, mapped once.

    Raises
    ------
    OSError
        Where it cannot be opened, or where another arena lies there.
    """
    with _mapped_lock:
        if ref.token not in _mapped:
            _mapped[ref.token] = _opened(ref)
            while len(_mapped) > MAX_MAPPED:
                _mapped.popitem(last=False)  # unmapped once no array lies in it
        _mapped.move_to_end(ref.token)
        return _mapped[ref.token]


def reaches(ref: ArenaRef) -> bool:
    """Whether this process can map an arena."""
    try:
        mapped(ref)
    except OSError:
        return False
    return True


def unmap_all() -> None:
    """Forget every arena that this process has mapped."""
    with _mapped_lock:
        _mapped.clear()


def write_note(memory: mmap.mmap, offset: int, note: Any) -> bool:
    """Leave something small for the client; False, and nothing, where it is not small enough."""
    content = pickle.dumps(note)
    fits = len(content) <= NOTE_NBYTES - 4  # beyond it another task's slot begins
    memory[offset : offset + 4] = (len(content) if fits else 0).to_bytes(4, "little")
    if fits:
        memory[offset + 4 : offset + 4 + len(content)] = content
    return fits


def note_nbytes(memory: mmap.mmap, offset: int) -> int:
    """Bytes of what :func:`write_note` left; 0 where it did not fit."""
    return int.from_bytes(memory[offset : offset + 4], "little")


def read_note(memory: mmap.mmap, offset: int) -> Any:
    """Read what :func:`write_note` left; None where it did not fit."""
    size = note_nbytes(memory, offset)
    return pickle.loads(memory[offset + 4 : offset + 4 + size]) if size else None


def _opened(ref: ArenaRef) -> mmap.mmap:
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


def _opened_new() -> tuple[int, str]:
    """An open file without bytes, and the path by which others open it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("daskinfer", os.MFD_CLOEXEC)
        return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"
    remove_ownerless(_FILE_PREFIX)
    descriptor, path = tempfile.mkstemp(prefix=_FILE_PREFIX)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # for as long as its owner lives
    return descriptor, path


def _reserve(descriptor: int, path: str, nbytes: int) -> None:
    """Give the file its bytes. A map beyond a full disk succeeds and kills the writer later (SIGBUS): take the space now."""
    if path.startswith(_MEMFD) or not hasattr(os, "posix_fallocate"):
        os.ftruncate(descriptor, nbytes)
    else:
        os.posix_fallocate(descriptor, 0, nbytes)


def _ended(descriptor: int, path: str, owner: int) -> None:
    os.close(descriptor)
    if not path.startswith(_MEMFD) and os.getpid() == owner:  # a forked child's is its parent's
        os.unlink(path)
