"""What is done about workers that end and rows that raise: the book of chunks, and real faults on real clusters."""

from __future__ import annotations

import errno
import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client

import daskinfer as di
from daskinfer.cluster import preflight
from daskinfer.cluster.process_cluster import default_cluster
from daskinfer.core.chunks import Chunk
from daskinfer.errors import ChunkError, ChunkTimeout, ClusterError, ModelError, StorageError, WorkerLost
from daskinfer.execution import dask_inputs, run, tuning, window
from daskinfer.models.shared_files import get_broadcast_path
from daskinfer.planning.job import InferenceJob
from daskinfer.scheduling import retry
from daskinfer.scheduling.retry import MAX_WORKER_DEATHS, RetryQueue, is_fatal_error, make_lost_chunk_error
from daskinfer.transport import shared_memory
from tests.conftest import wait_until
from tests.support import faulty
from tests.support.faulty import CHUNK_ROWS, X

CHUNK, OTHER = Chunk(3, 30, 40, 0), Chunk(4, 40, 50, 0)
OUT_OF_MEMORY = ChunkError("rows 30:31 failed: OutOfMemoryError: CUDA out of memory")
STICKY = ChunkError(f"rows 30:31 failed: RuntimeError: {faulty.STICKY}")


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> RetryQueue:
    """A book that tries what raised again twice, at once."""
    monkeypatch.setattr(retry, "FIRST_BACKOFF_SECONDS", 0.0)
    return RetryQueue(retries=2)


def again(book: RetryQueue, *, alone: bool) -> Chunk | None:
    """The chunk that is tried next, noted as begun."""
    if chunk := book.get_due_chunk(alone=alone):
        book.on_start(chunk)
    return chunk


def test_what_raised_is_tried_again(book: RetryQueue) -> None:
    """A chunk that raises is tried again ``retries`` times, beside others, and then given up."""
    for _ in range(2):
        assert book.on_error(CHUNK, ChunkError("no"))
        assert (book.n_waiting, again(book, alone=True), again(book, alone=False), book.n_waiting) == (1, None, CHUNK, 0)
    assert not book.on_error(CHUNK, ChunkError("no"))
    assert book.on_done(CHUNK) == 3
    assert book.on_done(CHUNK) == 1  # all is forgotten


def test_each_try_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait doubles from try to try, up to a limit, and what is due already is waited for by nobody."""
    now, waits = 100.0, []
    monkeypatch.setattr(retry.time, "monotonic", lambda: now)
    book = RetryQueue(retries=9)
    for _ in range(8):
        book.on_error(CHUNK, ChunkError("no"))
        assert again(book, alone=False) is None
        waits.append(book.wait_seconds)
        now += book.wait_seconds or 0.0
        assert (book.wait_seconds, again(book, alone=False)) == (None, CHUNK)
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])


def test_a_chunk_is_blamed_alone(book: RetryQueue) -> None:
    """Whoever was in flight on a worker that ended runs alone, and is given up once it has ended two workers so."""
    assert book.on_worker_death(CHUNK, alone=False) and book.on_worker_death(OTHER, alone=False)
    assert (again(book, alone=False), again(book, alone=True), again(book, alone=True)) == (None, CHUNK, OTHER)
    assert book.on_worker_death(CHUNK, alone=True)
    assert again(book, alone=True) == CHUNK
    assert not book.on_worker_death(CHUNK, alone=True)
    assert (book.n_waiting, book.on_done(OTHER), book.on_done(CHUNK)) == (0, 2, 3)


def test_out_of_memory_is_tried_alone_first(book: RetryQueue) -> None:
    """Where memory was short the chunk runs alone, even without retries, and stays alone."""
    assert book.on_error(CHUNK, OUT_OF_MEMORY)
    assert (again(book, alone=False), again(book, alone=True)) == (None, CHUNK)
    assert book.on_error(CHUNK, OUT_OF_MEMORY)
    assert again(book, alone=True) == CHUNK
    assert not book.on_error(CHUNK, OUT_OF_MEMORY)
    strict = RetryQueue(retries=0)
    assert strict.on_error(CHUNK, OUT_OF_MEMORY) and again(strict, alone=True) == CHUNK
    assert not strict.on_error(CHUNK, OUT_OF_MEMORY)


def test_a_broken_device_counts_as_a_death(book: RetryQueue) -> None:
    """A sticky error blames nobody the first time, and who gets it alone twice."""
    assert book.on_error(CHUNK, STICKY) and again(book, alone=True) == CHUNK
    assert book.on_error(CHUNK, STICKY) and again(book, alone=True) == CHUNK
    assert not book.on_error(CHUNK, STICKY)


def test_chunks_of_one_task_run_apart(book: RetryQueue) -> None:
    """Chunks that failed in one task run again at once, each in its own, and none of them has failed yet."""
    book.split([CHUNK, OTHER])
    assert (again(book, alone=False), again(book, alone=False)) == (CHUNK, OTHER)
    assert book.on_error(CHUNK, ChunkError("no")) and again(book, alone=False) and book.on_error(CHUNK, ChunkError("no"))


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (ChunkError("no"), False),
        (StorageError("timed out", errno.ETIMEDOUT), False),
        (StorageError("odd"), False),
        (StorageError("full", errno.ENOSPC), True),
        (StorageError("read only", errno.EROFS), True),
        (ModelError("no network"), True),
        (ClusterError("no cluster"), True),
        (ZeroDivisionError("ours"), True),
    ],
)
def test_what_ends_the_call(error: Exception, ends: bool) -> None:
    """Only what may go away, or is one chunk's own, is tried again."""
    assert is_fatal_error(error) is ends


def test_what_is_said_of_a_chunk_that_is_given_up() -> None:
    """It is named with its rows, its worker and what to do."""
    said = make_lost_chunk_error(CHUNK, "tcp://a", hung=False, timeout_seconds=None)
    assert isinstance(said, WorkerLost)
    assert f"chunk 3 (rows 30:40) ended its worker tcp://a, {MAX_WORKER_DEATHS} times with nothing beside it" in str(said)
    said = make_lost_chunk_error(CHUNK, "tcp://a", hung=True, timeout_seconds=2.5)
    assert isinstance(said, ChunkTimeout)
    assert "chunk 3 (rows 30:40) gave no answer within chunk_timeout=2.5 s on tcp://a, alone too." in str(said)


# Real faults


@pytest.fixture
def cpus() -> Iterator[dict[str, Any]]:
    """Two workers of our own, which a test may end, and chunks of 100 rows."""
    yield {"devices": ["cpu", "cpu"], "device_weights": "even", "batch_size": CHUNK_ROWS, "return_report": True}
    di.close()


def chunked() -> da.Array:
    """The rows in chunks that a task takes as they are."""
    return da.from_array(X, chunks=CHUNK_ROWS)


def right_but(y: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
    """See that exactly these rows are NaN, and all others right."""
    assert np.flatnonzero(np.isnan(y)).tolist() == rows.tolist()
    np.testing.assert_array_equal(np.delete(y, rows), np.delete(2 * X, rows))


def test_a_worker_that_is_killed_once_costs_its_window(cpus: dict[str, Any], tmp_path: Path) -> None:
    """Every row is right, and no more is computed again than was in flight on the worker that was killed."""
    net = faulty.network(tmp_path, faulty.killed, [1234], times=1, seconds=0.06)
    y, report = di.predict(net, chunked(), **cpus)
    np.testing.assert_array_equal(y, 2 * X)
    assert (len(faulty.acted(tmp_path)), report.failures) == (1, ())
    assert faulty.n_again(tmp_path) <= 3


@pytest.mark.parametrize("act", [faulty.killed, faulty.raises(faulty.bad)])
def test_a_task_that_failed_is_let_go(cpus: dict[str, Any], tmp_path: Path, act: Callable[[float], None]) -> None:
    """After a call that mended what failed, the kept client holds no task of it, nor the memory that this one used."""

    def n_arenas() -> int:
        return sum(type(found) is shared_memory.SharedMemoryPool for found in gc.get_objects())

    gc.collect()
    before = n_arenas()
    di.predict(faulty.network(tmp_path, act, [1234], times=1), chunked(), **cpus)
    assert default_cluster._current is not None
    client = default_cluster._current.client
    wait_until(lambda: gc.collect() >= 0 and not client.futures)
    assert n_arenas() <= before + 1  # one is kept for the next call


@pytest.mark.parametrize("n_poison", [1, pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_poison_is_filled_and_nobody_else(cpus: dict[str, Any], tmp_path: Path, n_poison: int) -> None:
    """Chunks that kill every worker are named and filled, and no innocent one is lost."""
    at = [1234.0, 1301.0, 77.0, 3999.0, 2500.0][:n_poison]
    y, report = di.predict(faulty.network(tmp_path, faulty.killed, at), chunked(), on_error="skip", **cpus)
    poison = sorted(int(value) // CHUNK_ROWS for value in at)
    right_but(y, np.concatenate([np.arange(i * CHUNK_ROWS, (i + 1) * CHUNK_ROWS) for i in poison]))
    assert sorted(failure.start // CHUNK_ROWS for failure in report.failures) == poison
    assert all("WorkerLost: chunk" in failure.exception for failure in report.failures)
    assert len(faulty.acted(tmp_path)) <= (1 + MAX_WORKER_DEATHS) * n_poison


def test_poison_ends_the_call(cpus: dict[str, Any], tmp_path: Path) -> None:
    """The chunk that killed two workers alone is named, and what was done so far comes with the error."""
    with pytest.raises(WorkerLost, match=r"chunk 12 \(rows 1200:1300\) ended its worker tcp://.*, 2 times") as caught:
        di.predict(faulty.network(tmp_path, faulty.killed, [1234]), chunked(), **cpus)
    assert caught.value.partial is not None
    y, done = caught.value.partial
    assert done.any() and not done[1200:1300].any()
    np.testing.assert_array_equal(y[done], 2 * X[done])
    # At once: its worker may be on its way back still.
    np.testing.assert_array_equal(di.predict(np.negative, X, devices=["cpu", "cpu"]), -X)


@pytest.mark.slow
def test_more_deaths_than_slots(tmp_path: Path) -> None:
    """Once all shared memory was lost to workers that ended, answers come back by Dask's comms, and none is missing."""
    at = [150.0 + 400 * i for i in range(8)]
    how = {"devices": "cpu", "batch_size": CHUNK_ROWS, "device_weights": "even"}
    y = di.predict(faulty.network(tmp_path, faulty.killed, at, times=1), chunked(), **how)
    di.close()
    np.testing.assert_array_equal(y, 2 * X)
    assert len(faulty.acted(tmp_path)) == len(at)


def test_an_array_that_all_chunks_share_survives_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array in memory that went to the cluster once, and ended with the only worker, is sent again; nobody is blamed."""
    monkeypatch.setattr(dask_inputs, "SHARED_NBYTES", 0)
    net = faulty.network(tmp_path, faulty.killed, [1235], times=1)
    x = chunked() + da.from_array(np.ones(1, np.float32), chunks=-1)
    y = di.predict(net, x, devices="cpu", device_weights="even", batch_size=CHUNK_ROWS)
    di.close()
    np.testing.assert_array_equal(y, 2 * (X + 1))
    assert len(faulty.acted(tmp_path)) == 1


def test_a_network_that_is_sent_once_survives_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large order that ended with the only worker is sent again."""
    monkeypatch.setattr("daskinfer.execution.task_builder.MAX_INLINE_CONTEXT_NBYTES", 0)
    net = faulty.network(tmp_path, faulty.killed, [1234], times=1)
    y = di.predict(net, chunked(), devices="cpu", device_weights="even", batch_size=CHUNK_ROWS)
    di.close()
    np.testing.assert_array_equal(y, 2 * X)


def test_all_workers_end_while_they_are_asked(cpus: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of a new network goes on with the workers that come in their place, which find its file."""
    di.predict(np.negative, X, **cpus)  # the cluster is there
    asked, ask = [], preflight.check_workers

    def killed_and_asked(client: Client, question: preflight.WorkerRequirements) -> dict[str, preflight.WorkerInfo]:
        if not asked:
            for pid in client.run(os.getpid).values():
                os.kill(pid, signal.SIGKILL)
            asked.append({})  # as where each ended before its answer was sent
        else:
            asked.append(ask(client, question))
        return asked[-1]

    monkeypatch.setattr(preflight, "check_workers", killed_and_asked)
    y, _ = di.predict(faulty.network(tmp_path, faulty.killed, [], times=0), X, **cpus)
    np.testing.assert_array_equal(y, 2 * X)
    assert asked[-1]
    assert asked.count({}) == len(asked) - 1


def test_a_broken_device_gets_another_process(cpus: dict[str, Any], tmp_path: Path) -> None:
    """After a sticky error of CUDA's the worker's process is another, and the answer is whole."""
    net = faulty.network(tmp_path, faulty.raises(lambda value: RuntimeError(faulty.STICKY)), [1234], times=2)
    y, report = di.predict(net, X, **cpus)
    np.testing.assert_array_equal(y, 2 * X)
    assert len(set(faulty.acted(tmp_path))) == 2
    assert report.failures == ()


# Without a death: one cluster for all


@pytest.fixture
def two(two_cpus: list[str]) -> dict[str, Any]:
    """Two workers of our own that nothing happens to."""
    return {"devices": two_cpus, "device_weights": "even", "batch_size": CHUNK_ROWS}


@pytest.mark.parametrize("devices", ["inline", None])
def test_a_transient_exception_is_forgotten(two: dict[str, Any], tmp_path: Path, devices: str | None) -> None:
    """What raises twice and then no more is no error."""
    how = {"devices": devices, "batch_size": CHUNK_ROWS} if devices else two
    net = faulty.network(tmp_path, faulty.raises(faulty.bad), [1234], times=2)
    np.testing.assert_array_equal(di.predict(net, X, **how), 2 * X)
    assert len(faulty.acted(tmp_path)) == 2


def test_without_retries_the_first_exception_ends_the_call(tmp_path: Path) -> None:
    """What raises once is an error where nothing is to be tried again."""
    net = faulty.network(tmp_path, faulty.raises(faulty.bad), [1234], times=1)
    with pytest.raises(ChunkError, match=r"rows 1200:1300 on cpu failed: ValueError: bad 1234"):
        di.predict(net, X, retries=0, devices="inline", batch_size=CHUNK_ROWS)


@pytest.mark.parametrize("devices", ["inline", None])
def test_a_transient_read_error_is_forgotten(two: dict[str, Any], tmp_path: Path, devices: str | None) -> None:
    """A block of a dask array that cannot be read the first time is read again."""
    how = {"devices": devices, "batch_size": CHUNK_ROWS} if devices else two
    flaky = faulty.network(tmp_path, faulty.raises(lambda value: TimeoutError("the share is busy")), [1234], times=1)
    y = di.predict(np.negative, chunked().map_blocks(flaky, dtype=X.dtype, meta=X[:0]), **how)
    np.testing.assert_array_equal(y, -2 * X)
    assert len(faulty.acted(tmp_path)) == 1


def test_rows_that_cannot_be_read_are_skipped(two: dict[str, Any], tmp_path: Path) -> None:
    """A chunk that cannot be read at all is filled where rows may fail, and named where not."""
    torn = faulty.network(tmp_path, faulty.raises(lambda value: OSError(errno.EIO, "torn")), [1234])
    x = chunked().map_blocks(torn, dtype=X.dtype, meta=X[:0])
    y, report = di.predict(np.negative, x, on_error="skip", return_report=True, **two)
    assert report.failed_rows == tuple(range(1200, 1300)) == tuple(np.flatnonzero(np.isnan(y)))
    with pytest.raises(StorageError, match=r"chunk 12 \(rows 1200:1300\) cannot be read: OSError: .*torn") as caught:
        di.predict(np.negative, x, retries=0, **two)
    assert caught.value.number == errno.EIO


@pytest.mark.parametrize("devices", ["inline", None])
def test_rows_that_cannot_be_read_to_measure_with(
    two: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    devices: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where the rows to measure with cannot be read, the micro-batch stays as it is, and they are skipped."""
    monkeypatch.setattr(tuning, "MIN_TUNING_SECONDS", 0.0)
    monkeypatch.setattr(run, "MIN_BATCHES", 0)
    monkeypatch.setattr(InferenceJob, "batch_size_candidates", property(lambda self: (50, 100)))
    torn = faulty.network(tmp_path, faulty.raises(lambda value: OSError(errno.EIO, "torn")), [12])
    x = da.from_array(X, chunks=800).map_blocks(torn, dtype=X.dtype, meta=X[:0])
    how = ({"devices": devices} if devices else two) | {"batch_size": "auto", "return_report": True}
    net = torch.nn.Threshold(0.0, 7.0)  # not measured by any other test
    y, report = di.predict(net, x, on_error="skip", retries=0, **how)
    assert report.failed_rows == tuple(range(800)) == tuple(np.flatnonzero(np.isnan(y)))
    np.testing.assert_array_equal(y[800:], 2 * X[800:])
    assert any("the micro-batch stays as it is, since measuring failed" in line for line in caplog.messages)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("error", [MemoryError("none"), RuntimeError("CUDA out of memory")], ids=repr)
def test_memory_that_is_short_once(two: dict[str, Any], tmp_path: Path, error: Exception, on_error: str) -> None:
    """Out of memory at a single row is no error where the row fits with nothing beside it, without retries, too."""
    net = faulty.network(tmp_path, faulty.raises(lambda value: error), [1234], times=8)  # 7 halvings from 100 rows to 1
    y, report = di.predict(net, X, return_report=True, on_error=on_error, retries=1, **two)
    np.testing.assert_array_equal(y, 2 * X)
    assert report.failures == ()


def test_a_scheduler_that_is_lost_is_named(foreign: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that goes away while a call runs is a clear error, not a hang; what this host holds of the call goes."""
    monkeypatch.setattr(window, "WORKER_CHECK_SECONDS", 0.2)
    shipped = Path(get_broadcast_path("x")).parent
    net = faulty.network(tmp_path, faulty.sleeps, [], seconds=0.05)
    blocks = di.stream(net, X, client=foreign, batch_size=10, device_weights=[1, 1])
    next(blocks)
    foreign.cluster.close()
    with pytest.raises(di.errors.SchedulerLost, match="scheduler"):
        list(blocks)
    assert not list(shipped.glob("model-*"))


def test_two_calls_of_one_cluster_while_a_worker_ends(cpus: dict[str, Any], tmp_path: Path) -> None:
    """A worker that one call ends costs another call of the same cluster nothing but time."""
    from concurrent.futures import ThreadPoolExecutor

    killing, other = tmp_path / "killing", tmp_path / "other"
    killing.mkdir(), other.mkdir()
    nets = [
        faulty.network(killing, faulty.killed, [1234], times=1, seconds=0.01),
        faulty.network(other, faulty.killed, [], seconds=0.05),
    ]
    with ThreadPoolExecutor(2) as pool:
        found = [answer.result()[0] for answer in [pool.submit(di.predict, net, chunked(), **cpus) for net in nets]]
    for y in found:
        np.testing.assert_array_equal(y, 2 * X)
