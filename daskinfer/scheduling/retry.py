"""What is done about a task that did not end well: the policy, and the book of chunks that have to be run once more.

=====================  ============================================  ====================================================
what went wrong        how it shows                                  what is done
=====================  ============================================  ====================================================
a transient exception  the network, a read or a write raised         run again up to ``retries`` times, each a little later
bad rows               the same rows raised each time                "raise": the call ends and names them; "skip": the
                                                                     worker has found them by halving, and they are filled
out of memory          at the smallest micro-batch (``runner``)      as bad rows, after one more run with nothing beside it
worker lost            its process ended                             what was in flight there is run again, chunk by chunk,
                                                                     with nothing beside it; nobody is blamed yet
poison chunk           it ended ``MAX_DEATHS`` workers alone         "raise": the call ends; "skip": its rows are filled
hung chunk             no answer within ``chunk_timeout``            its worker is replaced; then as a lost worker
sticky device error    CUDA says so                                  its worker is replaced; then as a lost worker
the network            it cannot be loaded, its answer is none       the call ends at once
a full disk            the system says so                            the call ends at once
a device that is gone  no worker of it for ``AWAY_SECONDS``          its chunks go to the others; without any the call ends
the scheduler          the client is not connected any more          the call ends at once
=====================  ============================================  ====================================================
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from daskinfer.core.chunks import Chunk
from daskinfer.errors import ChunkError, ChunkTimeout, ClusterError, StorageError, WorkerLost
from daskinfer.worker.error_kinds import is_out_of_memory, is_sticky

MAX_DEATHS = 2  # workers that a chunk may end alone; one may be bad luck
FIRST_WAIT_SECONDS = 0.1  # before a chunk is tried again; twice as long each time; arbitrary
MAX_WAIT_SECONDS = 5.0
_LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR}


def ends_the_call(error: BaseException) -> bool:
    """Whether trying again is of no use to any chunk."""
    if isinstance(error, StorageError):
        return error.number in _LASTING
    return isinstance(error, ClusterError) or not isinstance(error, ChunkError)


@dataclass
class _Record:
    """What happened to a chunk so far."""

    n_attempts: int = 1  # with the one that is to come
    n_failures: int = 0
    n_deaths: int = 0  # alone
    alone: bool = False


@dataclass
class Book:
    """Chunks that have to be run once more: when, and whether with nothing beside them.

    ``retries`` is how often a chunk that raised is tried again.
    """

    retries: int
    _records: dict[Chunk, _Record] = field(default_factory=dict)
    _waiting: list[tuple[float, Chunk]] = field(default_factory=list)  # from when on it may run, in no order

    @property
    def n_left(self) -> int:
        """How many chunks wait for another try."""
        return len(self._waiting)

    def is_new(self, chunks: Sequence[Chunk]) -> bool:
        """Whether none of these chunks has raised before."""
        return not any(self._records.get(chunk, _Record()).n_failures for chunk in chunks)

    def raised(self, chunk: Chunk, error: Exception) -> bool:
        """Note that a chunk raised; whether it will be tried again."""
        record = self._records.setdefault(chunk, _Record())
        if is_sticky(error):
            return self.died(chunk, alone=record.alone)
        record.n_failures += 1
        if is_out_of_memory(error) and not record.alone:
            record.alone = True
            return self._again(chunk, record)
        if record.n_failures > self.retries:
            return False
        return self._again(chunk, record, min(MAX_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (record.n_failures - 1)))

    def died(self, chunk: Chunk, *, alone: bool) -> bool:
        """Note that the worker of a chunk ended; whether the chunk will be tried again."""
        record = self._records.setdefault(chunk, _Record())
        record.alone = True
        record.n_deaths += alone
        return record.n_deaths < MAX_DEATHS and self._again(chunk, record)

    def apart(self, chunks: Sequence[Chunk]) -> None:
        """Have chunks that failed in one task run again, each in its own."""
        for chunk in chunks:
            self._again(chunk, self._records.setdefault(chunk, _Record()))

    def _again(self, chunk: Chunk, record: _Record, wait_seconds: float = 0.0) -> bool:
        record.n_attempts += 1
        self._waiting.append((time.monotonic() + wait_seconds, chunk))
        return True

    def due(self, *, alone: bool) -> Chunk | None:
        """The chunk to try again now that has waited longest, of those that run alone or of the others."""
        now = time.monotonic()
        waiting = (one for one in self._waiting if one[0] <= now and self._records[one[1]].alone == alone)
        return min(waiting, default=(0.0, None), key=lambda one: one[0])[1]

    def begun(self, chunk: Chunk) -> None:
        """Note that a chunk that was due is on its way."""
        self._waiting = [one for one in self._waiting if one[1] != chunk]

    @property
    def wait_seconds(self) -> float | None:
        """How long until one more is due; None: none will be. What is due already waits for a place, not for the clock."""
        now = time.monotonic()
        return min((when - now for when, _ in self._waiting if when > now), default=None)

    def settled(self, chunk: Chunk) -> int:
        """Forget a chunk that is done; how often it was tried."""
        return self._records.pop(chunk, _Record()).n_attempts


def lost(chunk: Chunk, worker: str, *, hung: bool, seconds: float | None) -> ChunkError:
    """What is said of a chunk that ended its worker each time it was alone."""
    which = f"chunk {chunk.index} (rows {chunk.start}:{chunk.stop})"
    advice = "Leave the rows out, or pass on_error='skip' (--on-error) to go on without them."
    if hung:
        error: ChunkError = ChunkTimeout(
            f"{which} gave no answer within chunk_timeout={seconds:g} s on {worker}, alone too. {advice}"
        )
        return error
    return WorkerLost(
        f"{which} ended its worker {worker}, {MAX_DEATHS} times with nothing beside it; a worker has to outlive its chunks. "
        f"Look for an out-of-memory kill or a crash of the network, and use a smaller batch_size (--batch-size). {advice}"
    )
