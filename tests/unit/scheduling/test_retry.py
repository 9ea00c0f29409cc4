"""When failed chunks run again, in isolation or not, and when they are given up."""

from __future__ import annotations

import errno

import pytest

from daskinfer.core.chunks import Chunk
from daskinfer.errors import ChunkError, ChunkTimeout, ClusterError, ModelError, StorageError, WorkerLost
from daskinfer.scheduling import retry
from daskinfer.scheduling.retry import MAX_WORKER_DEATHS, ErrorKind, RetryQueue, is_fatal_error, make_lost_chunk_error

CHUNK, NEXT_CHUNK = Chunk(3, 30, 40), Chunk(4, 40, 50)


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> RetryQueue:
    """A queue that retries twice, without a wait."""
    monkeypatch.setattr(retry, "FIRST_BACKOFF_SECONDS", 0.0)
    return RetryQueue(retries=2)


def start_due(queue: RetryQueue, *, alone: bool) -> Chunk | None:
    """Start the chunk that is due, if any."""
    if chunk := queue.get_due_chunk(alone=alone):
        queue.on_start(chunk)
    return chunk


def test_an_error_is_retried(queue: RetryQueue) -> None:
    """A chunk that raises is retried ``retries`` times, not in isolation, and then given up."""
    for _ in range(2):
        assert queue.on_error(CHUNK, ErrorKind.OTHER)
        assert (
            queue.n_waiting,
            start_due(queue, alone=True),
            start_due(queue, alone=False),
            queue.n_waiting,
        ) == (1, None, CHUNK, 0)
    assert not queue.on_error(CHUNK, ErrorKind.OTHER)
    assert queue.on_done(CHUNK) == 3
    assert queue.on_done(CHUNK) == 1  # its record is deleted


def test_each_retry_waits_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait doubles with each retry, up to a limit; a chunk that is due already adds no wait."""
    now, waits = 100.0, []
    monkeypatch.setattr(retry.time, "monotonic", lambda: now)
    queue = RetryQueue(retries=9)
    for _ in range(8):
        queue.on_error(CHUNK, ErrorKind.OTHER)
        assert start_due(queue, alone=False) is None
        waits.append(queue.wait_seconds)
        now += queue.wait_seconds or 0.0
        assert (queue.wait_seconds, start_due(queue, alone=False)) == (None, CHUNK)
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])


def test_a_chunk_is_blamed_in_isolation_only(queue: RetryQueue) -> None:
    """A chunk in flight on a worker that died runs in isolation, and is given up after it killed two workers there."""
    assert queue.on_worker_death(CHUNK, alone=False) and queue.on_worker_death(NEXT_CHUNK, alone=False)
    assert (start_due(queue, alone=False), start_due(queue, alone=True), start_due(queue, alone=True)) == (
        None,
        CHUNK,
        NEXT_CHUNK,
    )
    assert queue.on_worker_death(CHUNK, alone=True)
    assert start_due(queue, alone=True) == CHUNK
    assert not queue.on_worker_death(CHUNK, alone=True)
    assert (queue.n_waiting, queue.on_done(NEXT_CHUNK), queue.on_done(CHUNK)) == (0, 2, 3)


def test_out_of_memory_is_retried_in_isolation_first(queue: RetryQueue) -> None:
    """A chunk that ran out of memory runs in isolation, even if retries=0, and stays isolated."""
    assert queue.on_error(CHUNK, ErrorKind.OUT_OF_MEMORY)
    assert (start_due(queue, alone=False), start_due(queue, alone=True)) == (None, CHUNK)
    assert queue.on_error(CHUNK, ErrorKind.OUT_OF_MEMORY)
    assert start_due(queue, alone=True) == CHUNK
    assert not queue.on_error(CHUNK, ErrorKind.OUT_OF_MEMORY)
    strict = RetryQueue(retries=0)
    assert strict.on_error(CHUNK, ErrorKind.OUT_OF_MEMORY) and start_due(strict, alone=True) == CHUNK
    assert not strict.on_error(CHUNK, ErrorKind.OUT_OF_MEMORY)


def test_a_sticky_error_counts_as_a_worker_death(queue: RetryQueue) -> None:
    """A sticky error blames no chunk the first time; two in isolation give the chunk up."""
    assert queue.on_error(CHUNK, ErrorKind.STICKY) and start_due(queue, alone=True) == CHUNK
    assert queue.on_error(CHUNK, ErrorKind.STICKY) and start_due(queue, alone=True) == CHUNK
    assert not queue.on_error(CHUNK, ErrorKind.STICKY)


def test_chunks_of_a_failed_task_are_split(queue: RetryQueue) -> None:
    """Chunks that failed in one task run again at once, one task each, and none counts as failed yet."""
    queue.split([CHUNK, NEXT_CHUNK])
    assert (start_due(queue, alone=False), start_due(queue, alone=False)) == (CHUNK, NEXT_CHUNK)
    assert (
        queue.on_error(CHUNK, ErrorKind.OTHER) and start_due(queue, alone=False) and queue.on_error(CHUNK, ErrorKind.OTHER)
    )


@pytest.mark.parametrize(
    ("error", "is_fatal"),
    [
        (ChunkError("no"), False),
        (StorageError("timed out", errno.ETIMEDOUT), False),
        (StorageError("odd"), False),
        (StorageError("full", errno.ENOSPC), True),
        (StorageError("read only", errno.EROFS), True),
        (ModelError("no model"), True),
        (ClusterError("no cluster"), True),
        (ZeroDivisionError("ours"), True),
    ],
)
def test_fatal_errors(error: Exception, is_fatal: bool) -> None:
    """Only errors that may pass, or that belong to one chunk, are retried; all others end the call."""
    assert is_fatal_error(error) is is_fatal


def test_the_error_of_a_chunk_that_is_given_up() -> None:
    """It names the chunk, its rows and its worker, and says what to do."""
    error = make_lost_chunk_error(CHUNK, "tcp://a", hung=False, timeout_seconds=None)
    assert isinstance(error, WorkerLost)
    assert f"chunk 3 (rows 30:40) ended its worker tcp://a {MAX_WORKER_DEATHS} times in isolation" in str(error)
    error = make_lost_chunk_error(CHUNK, "tcp://a", hung=True, timeout_seconds=2.5)
    assert isinstance(error, ChunkTimeout)
    assert "chunk 3 (rows 30:40) timed out on tcp://a in isolation (chunk_timeout=2.5 s)." in str(error)
