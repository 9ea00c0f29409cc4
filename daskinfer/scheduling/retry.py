"""What to do about a task that failed: the rules, and the queue of chunks that have to run again.

=====================  ============================================  ====================================================
fault                  how it shows                                  what is done
=====================  ============================================  ====================================================
transient exception    the model, a read or a write raised           retry up to ``retries`` times, each after a longer wait
bad rows               the same rows raise each time                 "raise": the call ends and names them; "skip": the
                                                                     worker has isolated them by bisection and fills them
out of memory          at the smallest micro-batch                   one more run in isolation, then as bad rows
worker died            its process ended                             each chunk in flight there is retried in isolation; no
                                                                     chunk is blamed yet
poison chunk           it ended ``MAX_WORKER_DEATHS`` workers in     "raise": the call ends; "skip": its rows are filled
                       isolation
hung chunk             no result within ``chunk_timeout``            its worker is restarted; then as a worker that died
sticky device error    CUDA reports it                               its worker is restarted; then as a worker that died
invalid model          it cannot load, or its output is unusable     the call ends at once
full disk              the system reports it                         the call ends at once
lost device            no worker of it for ``MAX_MISSING_SECONDS``   its chunks go to the others; without any the call ends
lost scheduler         the client is no longer connected             the call ends at once
=====================  ============================================  ====================================================

In isolation means: with no other task on the worker, one chunk per task.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from daskinfer.core.chunks import Chunk
from daskinfer.errors import ChunkError, ChunkTimeout, ClusterError, StorageError, WorkerLost

MAX_WORKER_DEATHS = 2  # workers that a chunk may end in isolation; one may be bad luck
FIRST_BACKOFF_SECONDS = 0.1  # before the first retry of a chunk; doubles with each retry; arbitrary
MAX_BACKOFF_SECONDS = 5.0
_PERMANENT_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR}


class ErrorKind(Enum):
    """Kind of an exception that a chunk raised, as far as retrying it depends on it."""

    STICKY = auto()  # the device stays broken for that process: the same as a worker that died
    OUT_OF_MEMORY = auto()  # may pass with no other task on the worker
    OTHER = auto()


def is_fatal_error(error: BaseException) -> bool:
    """Whether the error ends the call: no chunk would profit from a retry."""
    if isinstance(error, StorageError):
        return error.number in _PERMANENT_ERRNOS
    return isinstance(error, ClusterError) or not isinstance(error, ChunkError)


@dataclass
class _AttemptRecord:
    """Attempts and failures of one chunk so far."""

    n_attempts: int = 1  # the coming one included
    n_failures: int = 0
    n_worker_deaths: int = 0  # in isolation
    alone: bool = False  # whether the next attempt runs in isolation


@dataclass
class RetryQueue:
    """Chunks that have to run again: when, and whether in isolation.

    ``retries`` is how often a chunk that raised is retried.
    """

    retries: int
    _records: dict[Chunk, _AttemptRecord] = field(default_factory=dict)
    _waiting: list[tuple[float, Chunk]] = field(default_factory=list)  # (earliest start, chunk), unordered

    @property
    def n_waiting(self) -> int:
        """Number of chunks that wait for a retry."""
        return len(self._waiting)

    def has_no_failures(self, chunks: Sequence[Chunk]) -> bool:
        """Whether none of these chunks has raised yet."""
        return not any(self._records.get(chunk, _AttemptRecord()).n_failures for chunk in chunks)

    def on_error(self, chunk: Chunk, kind: ErrorKind) -> bool:
        """Record that a chunk raised; return whether it will be retried."""
        record = self._records.setdefault(chunk, _AttemptRecord())
        if kind is ErrorKind.STICKY:
            return self.on_worker_death(chunk, alone=record.alone)
        record.n_failures += 1
        if kind is ErrorKind.OUT_OF_MEMORY and not record.alone:
            record.alone = True
            return self._schedule_retry(chunk, record)
        if record.n_failures > self.retries:
            return False
        return self._schedule_retry(
            chunk, record, min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** (record.n_failures - 1))
        )

    def on_worker_death(self, chunk: Chunk, *, alone: bool) -> bool:
        """Record that a chunk's worker died, ``alone`` if in isolation; return whether the chunk will be retried."""
        record = self._records.setdefault(chunk, _AttemptRecord())
        record.alone = True
        record.n_worker_deaths += alone
        return record.n_worker_deaths < MAX_WORKER_DEATHS and self._schedule_retry(chunk, record)

    def split(self, chunks: Sequence[Chunk]) -> None:
        """Schedule chunks that failed together in one task to run again, one task each."""
        for chunk in chunks:
            self._schedule_retry(chunk, self._records.setdefault(chunk, _AttemptRecord()))

    def _schedule_retry(self, chunk: Chunk, record: _AttemptRecord, wait_seconds: float = 0.0) -> bool:
        record.n_attempts += 1
        self._waiting.append((time.monotonic() + wait_seconds, chunk))
        return True

    def get_due_chunk(self, *, alone: bool) -> Chunk | None:
        """Return the longest-due chunk, of those that run in isolation (``alone``) or of the others; None if none is due."""
        now = time.monotonic()
        waiting = (entry for entry in self._waiting if entry[0] <= now and self._records[entry[1]].alone == alone)
        return min(waiting, default=(0.0, None), key=lambda entry: entry[0])[1]

    def on_start(self, chunk: Chunk) -> None:
        """Record that a chunk was submitted: it no longer waits."""
        self._waiting = [entry for entry in self._waiting if entry[1] != chunk]

    @property
    def wait_seconds(self) -> float | None:
        """Seconds until the next chunk becomes due; None if none will. One that is due waits for a slot, not for time."""
        now = time.monotonic()
        return min((when - now for when, _ in self._waiting if when > now), default=None)

    def on_done(self, chunk: Chunk) -> int:
        """Delete the record of a finished chunk; return the number of its attempts."""
        return self._records.pop(chunk, _AttemptRecord()).n_attempts


def make_lost_chunk_error(chunk: Chunk, worker: str, *, hung: bool, timeout_seconds: float | None) -> ChunkError:
    """Build the error of a chunk that ended its worker, or hung, each time it ran in isolation."""
    label = f"chunk {chunk.index} (rows {chunk.start}:{chunk.stop})"
    skip = "or skip its rows with on_error='skip' (--on-error)."
    if hung:
        error: ChunkError = ChunkTimeout(
            f"{label} timed out on {worker} in isolation (chunk_timeout={timeout_seconds:g} s). "
            f"Raise chunk_timeout (--chunk-timeout), {skip}"
        )
        return error
    return WorkerLost(
        f"{label} ended its worker {worker} {MAX_WORKER_DEATHS} times in isolation (out of memory, or the model crashes). "
        f"Use a smaller batch_size (--batch-size), {skip}"
    )
