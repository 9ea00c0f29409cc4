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
poison chunk           it ended ``MAX_WORKER_DEATHS`` workers alone         "raise": the call ends; "skip": its rows are filled
hung chunk             no answer within ``chunk_timeout``            its worker is replaced; then as a lost worker
sticky device error    CUDA says so                                  its worker is replaced; then as a lost worker
the network            it cannot be loaded, its answer is none       the call ends at once
a full disk            the system says so                            the call ends at once
a device that is gone  no worker of it for ``MAX_MISSING_SECONDS``          its chunks go to the others; without any the call ends
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

MAX_WORKER_DEATHS = 2  # workers that a chunk may end alone; one may be bad luck
FIRST_BACKOFF_SECONDS = 0.1  # before a chunk is tried again; twice as long each time; arbitrary
MAX_BACKOFF_SECONDS = 5.0
_PERMANENT_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR}


def is_fatal_error(error: BaseException) -> bool:
    """Whether trying again is of no use to any chunk."""
    if isinstance(error, StorageError):
        return error.number in _PERMANENT_ERRNOS
    return isinstance(error, ClusterError) or not isinstance(error, ChunkError)


@dataclass
class _AttemptRecord:
    """What happened to a chunk so far."""

    n_attempts: int = 1  # with the one that is to come
    n_failures: int = 0
    n_worker_deaths: int = 0  # alone
    alone: bool = False


@dataclass
class RetryQueue:
    """Chunks that have to be run once more: when, and whether with nothing beside them.

    ``retries`` is how often a chunk that raised is tried again.
    """

    retries: int
    _records: dict[Chunk, _AttemptRecord] = field(default_factory=dict)
    _waiting: list[tuple[float, Chunk]] = field(default_factory=list)  # from when on it may run, in no order

    @property
    def n_waiting(self) -> int:
        """How many chunks wait for another try."""
        return len(self._waiting)

    def has_no_failures(self, chunks: Sequence[Chunk]) -> bool:
        """Whether none of these chunks has raised before."""
        return not any(self._records.get(chunk, _AttemptRecord()).n_failures for chunk in chunks)

    def on_error(self, chunk: Chunk, error: Exception) -> bool:
        """Note that a chunk raised; whether it will be tried again."""
        record = self._records.setdefault(chunk, _AttemptRecord())
        if is_sticky(error):
            return self.on_worker_death(chunk, alone=record.alone)
        record.n_failures += 1
        if is_out_of_memory(error) and not record.alone:
            record.alone = True
            return self._schedule_retry(chunk, record)
        if record.n_failures > self.retries:
            return False
        return self._schedule_retry(
            chunk, record, min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** (record.n_failures - 1))
        )

    def on_worker_death(self, chunk: Chunk, *, alone: bool) -> bool:
        """Note that the worker of a chunk ended; whether the chunk will be tried again."""
        record = self._records.setdefault(chunk, _AttemptRecord())
        record.alone = True
        record.n_worker_deaths += alone
        return record.n_worker_deaths < MAX_WORKER_DEATHS and self._schedule_retry(chunk, record)

    def split(self, chunks: Sequence[Chunk]) -> None:
        """Have chunks that failed in one task run again, each in its own."""
        for chunk in chunks:
            self._schedule_retry(chunk, self._records.setdefault(chunk, _AttemptRecord()))

    def _schedule_retry(self, chunk: Chunk, record: _AttemptRecord, wait_seconds: float = 0.0) -> bool:
        record.n_attempts += 1
        self._waiting.append((time.monotonic() + wait_seconds, chunk))
        return True

    def get_due_chunk(self, *, alone: bool) -> Chunk | None:
        """The chunk to try again now that has waited longest, of those that run alone or of the others."""
        now = time.monotonic()
        waiting = (one for one in self._waiting if one[0] <= now and self._records[one[1]].alone == alone)
        return min(waiting, default=(0.0, None), key=lambda one: one[0])[1]

    def on_start(self, chunk: Chunk) -> None:
        """Note that a chunk that was due is on its way."""
        self._waiting = [one for one in self._waiting if one[1] != chunk]

    @property
    def wait_seconds(self) -> float | None:
        """How long until one more is due; None: none will be. What is due already waits for a place, not for the clock."""
        now = time.monotonic()
        return min((when - now for when, _ in self._waiting if when > now), default=None)

    def on_done(self, chunk: Chunk) -> int:
        """Forget a chunk that is done; how often it was tried."""
        return self._records.pop(chunk, _AttemptRecord()).n_attempts


def make_lost_chunk_error(chunk: Chunk, worker: str, *, hung: bool, timeout_seconds: float | None) -> ChunkError:
    """What is said of a chunk that ended its worker each time it was alone."""
    which = f"chunk {chunk.index} (rows {chunk.start}:{chunk.stop})"
    advice = "Leave the rows out, or pass on_error='skip' (--on-error) to go on without them."
    if hung:
        error: ChunkError = ChunkTimeout(
            f"{which} gave no answer within chunk_timeout={timeout_seconds:g} s on {worker}, alone too. {advice}"
        )
        return error
    return WorkerLost(
        f"{which} ended its worker {worker}, {MAX_WORKER_DEATHS} times with nothing beside it; a worker has to outlive its chunks. "
        f"Look for an out-of-memory kill or a crash of the network, and use a smaller batch_size (--batch-size). {advice}"
    )
