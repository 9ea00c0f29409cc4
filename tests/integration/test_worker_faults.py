"""Workers that die and rows that raise: real faults on real clusters."""

from __future__ import annotations

import errno
import gc
import os
import re
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
from daskinfer.errors import ChunkError, StorageError, WorkerLost
from daskinfer.execution import dask_inputs, executors, tuning, window
from daskinfer.models.shared_files import get_broadcast_path
from daskinfer.planning.job import InferenceJob
from daskinfer.scheduling.retry import MAX_WORKER_DEATHS
from daskinfer.transport import shared_memory
from tests.conftest import wait_until
from tests.support import faulty
from tests.support.faulty import CHUNK_ROWS, X


@pytest.fixture
def cpus() -> Iterator[dict[str, Any]]:
    """Yield keywords for two managed workers, which a test may kill, and chunks of 100 rows."""
    yield {"devices": ["cpu", "cpu"], "device_weights": "even", "batch_size": CHUNK_ROWS, "return_report": True}
    di.close()


def make_chunked() -> da.Array:
    """Make the rows a dask array of chunks that tasks take as they are."""
    return da.from_array(X, chunks=CHUNK_ROWS)


def check_all_but(y: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
    """Check that exactly these rows are NaN, and all others right."""
    assert np.flatnonzero(np.isnan(y)).tolist() == rows.tolist()
    np.testing.assert_array_equal(np.delete(y, rows), np.delete(2 * X, rows))


def test_a_worker_that_is_killed_once_costs_its_window(
    cpus: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every row is right, and only chunks that were in flight on the killed worker run again; the report marks it."""
    model = faulty.make_model(tmp_path, faulty.kill, [1234], times=1, seconds=0.06)
    y, report = di.predict(model, make_chunked(), **cpus)
    np.testing.assert_array_equal(y, 2 * X)
    assert (len(faulty.list_acted_pids(tmp_path)), report.failures) == (1, ())
    assert faulty.count_recomputed(tmp_path) <= 3
    assert any(
        re.fullmatch(r"worker for cpu:\d died while computing rows \d+:\d+; retrying them in isolation", line)
        for line in caplog.messages
    )
    (death,) = [mark for mark in report.marks if mark.kind == "worker died"]
    assert {mark.device for mark in report.marks if mark.text.endswith("its worker died")} == {death.device}
    assert "it is being restarted" in report.to_html()


@pytest.mark.parametrize("act", [faulty.kill, faulty.raise_error(faulty.make_bad_row_error)])
def test_a_task_that_failed_is_released(cpus: dict[str, Any], tmp_path: Path, act: Callable[[float], None]) -> None:
    """After a call whose retries succeeded, the kept client holds no task of it, nor the memory that the task used."""

    def count_pools() -> int:
        return sum(type(found) is shared_memory.SharedMemoryPool for found in gc.get_objects())

    gc.collect()
    before = count_pools()
    di.predict(faulty.make_model(tmp_path, act, [1234], times=1), make_chunked(), **cpus)
    assert default_cluster._current is not None
    client = default_cluster._current.client
    wait_until(lambda: gc.collect() >= 0 and not client.futures)
    assert count_pools() <= before + 1  # one is kept for the next call


@pytest.mark.parametrize("n_poison", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_only_poison_chunks_are_filled(cpus: dict[str, Any], tmp_path: Path, n_poison: int) -> None:
    """Chunks that kill every worker are named and filled, and no innocent one is lost."""
    at = [1234.0, 1301.0, 3999.0][:n_poison]
    y, report = di.predict(faulty.make_model(tmp_path, faulty.kill, at), make_chunked(), on_error="skip", **cpus)
    poison = sorted(int(value) // CHUNK_ROWS for value in at)
    check_all_but(y, np.concatenate([np.arange(i * CHUNK_ROWS, (i + 1) * CHUNK_ROWS) for i in poison]))
    assert sorted(failure.start // CHUNK_ROWS for failure in report.failures) == poison
    assert all("WorkerLost: chunk" in failure.exception for failure in report.failures)
    assert len(faulty.list_acted_pids(tmp_path)) <= (1 + MAX_WORKER_DEATHS) * n_poison


def test_poison_ends_the_call(cpus: dict[str, Any], tmp_path: Path) -> None:
    """The error names the chunk that killed two workers in isolation, and holds the rows that were done before."""
    with pytest.raises(
        WorkerLost, match=r"chunk 12 \(rows 1200:1300\) ended its worker tcp://.* 2 times in isolation"
    ) as caught:
        di.predict(faulty.make_model(tmp_path, faulty.kill, [1234]), make_chunked(), **cpus)
    assert caught.value.partial is not None
    y, done = caught.value.partial
    assert done.any() and not done[1200:1300].any()
    np.testing.assert_array_equal(y[done], 2 * X[done])
    # At once: its worker may still be restarting.
    np.testing.assert_array_equal(di.predict(np.negative, X, devices=["cpu", "cpu"]), -X)


@pytest.mark.slow
def test_more_deaths_than_slots(tmp_path: Path) -> None:
    """Once all shared memory was lost to workers that died, outputs come back through Dask's comms, and none is missing."""
    at = [150.0 + 400 * i for i in range(8)]
    keywords = {"devices": "cpu", "batch_size": CHUNK_ROWS, "device_weights": "even"}
    y = di.predict(faulty.make_model(tmp_path, faulty.kill, at, times=1), make_chunked(), **keywords)
    di.close()
    np.testing.assert_array_equal(y, 2 * X)
    assert len(faulty.list_acted_pids(tmp_path)) == len(at)


def test_an_array_that_all_chunks_share_survives_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array that was sent to the cluster once, and was lost with the only worker, is sent again; no chunk is blamed."""
    monkeypatch.setattr(dask_inputs, "SHARED_NBYTES", 0)
    model = faulty.make_model(tmp_path, faulty.kill, [1235], times=1)
    x = make_chunked() + da.from_array(np.ones(1, np.float32), chunks=-1)
    y = di.predict(model, x, devices="cpu", device_weights="even", batch_size=CHUNK_ROWS)
    di.close()
    np.testing.assert_array_equal(y, 2 * (X + 1))
    assert len(faulty.list_acted_pids(tmp_path)) == 1


def test_a_spec_that_is_sent_once_survives_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large spec that was lost with the only worker is sent again."""
    monkeypatch.setattr("daskinfer.execution.task_builder.MAX_INLINE_SPEC_NBYTES", 0)
    model = faulty.make_model(tmp_path, faulty.kill, [1234], times=1)
    y = di.predict(model, make_chunked(), devices="cpu", device_weights="even", batch_size=CHUNK_ROWS)
    di.close()
    np.testing.assert_array_equal(y, 2 * X)


def test_all_workers_die_while_they_are_checked(
    cpus: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call with a new model continues on the workers that replace them, which find its file."""
    di.predict(np.negative, X, **cpus)  # starts the cluster
    replies, check_workers = [], preflight.check_workers

    def kill_and_check(client: Client, requirements: preflight.WorkerRequirements) -> dict[str, preflight.WorkerInfo]:
        if not replies:
            for pid in client.run(os.getpid).values():
                os.kill(pid, signal.SIGKILL)
            replies.append({})  # as if each had died before it could reply
        else:
            replies.append(check_workers(client, requirements))
        return replies[-1]

    monkeypatch.setattr(preflight, "check_workers", kill_and_check)
    y, _ = di.predict(faulty.make_model(tmp_path, faulty.kill, [], times=0), X, **cpus)
    np.testing.assert_array_equal(y, 2 * X)
    assert replies[-1]
    assert replies.count({}) == len(replies) - 1


def test_a_broken_device_gets_a_new_process(cpus: dict[str, Any], tmp_path: Path) -> None:
    """After a sticky CUDA error the worker gets a new process, and the output is complete."""
    model = faulty.make_model(tmp_path, faulty.raise_error(lambda value: RuntimeError(faulty.STICKY)), [1234], times=2)
    y, report = di.predict(model, X, **cpus)
    np.testing.assert_array_equal(y, 2 * X)
    assert len(set(faulty.list_acted_pids(tmp_path))) == 2
    assert report.failures == ()


# Faults that kill no worker: one cluster for all tests.


@pytest.fixture
def two(two_cpus: list[str]) -> dict[str, Any]:
    """Return keywords for two managed workers that stay alive."""
    return {"devices": two_cpus, "device_weights": "even", "batch_size": CHUNK_ROWS}


@pytest.mark.parametrize("devices", ["inline", None])
def test_a_transient_exception_is_forgotten(two: dict[str, Any], tmp_path: Path, devices: str | None) -> None:
    """An exception that does not come back after two attempts is no error."""
    keywords = {"devices": devices, "batch_size": CHUNK_ROWS} if devices else two
    model = faulty.make_model(tmp_path, faulty.raise_error(faulty.make_bad_row_error), [1234], times=2)
    np.testing.assert_array_equal(di.predict(model, X, **keywords), 2 * X)
    assert len(faulty.list_acted_pids(tmp_path)) == 2


def test_without_retries_the_first_exception_ends_the_call(tmp_path: Path) -> None:
    """An exception that is raised once is an error if there are no retries."""
    model = faulty.make_model(tmp_path, faulty.raise_error(faulty.make_bad_row_error), [1234], times=1)
    with pytest.raises(ChunkError, match=r"rows 1200:1300 on cpu failed: ValueError: bad 1234"):
        di.predict(model, X, retries=0, devices="inline", batch_size=CHUNK_ROWS)


@pytest.mark.parametrize("devices", ["inline", None])
def test_a_transient_read_error_is_forgotten(two: dict[str, Any], tmp_path: Path, devices: str | None) -> None:
    """A block of a dask array that cannot be read the first time is read again."""
    keywords = {"devices": devices, "batch_size": CHUNK_ROWS} if devices else two
    flaky = faulty.make_model(tmp_path, faulty.raise_error(lambda value: TimeoutError("the share is busy")), [1234], times=1)
    y = di.predict(np.negative, make_chunked().map_blocks(flaky, dtype=X.dtype, meta=X[:0]), **keywords)
    np.testing.assert_array_equal(y, -2 * X)
    assert len(faulty.list_acted_pids(tmp_path)) == 1


def test_rows_that_cannot_be_read_are_skipped(two: dict[str, Any], tmp_path: Path) -> None:
    """A chunk that cannot be read is filled if rows may fail, otherwise the error names it."""
    torn = faulty.make_model(tmp_path, faulty.raise_error(lambda value: OSError(errno.EIO, "torn")), [1234])
    x = make_chunked().map_blocks(torn, dtype=X.dtype, meta=X[:0])
    y, report = di.predict(np.negative, x, on_error="skip", return_report=True, **two)
    assert report.failed_rows == tuple(range(1200, 1300)) == tuple(np.flatnonzero(np.isnan(y)))
    with pytest.raises(StorageError, match=r"chunk 12 \(rows 1200:1300\) cannot be read: OSError: .*torn") as caught:
        di.predict(np.negative, x, retries=0, **two)
    assert caught.value.number == errno.EIO


@pytest.mark.parametrize("devices", ["inline", None])
def test_rows_that_cannot_be_read_for_tuning(
    two: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    devices: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If the rows to tune with cannot be read, the batch size is kept, and the rows are skipped."""
    monkeypatch.setattr(tuning, "MIN_TUNING_SECONDS", 0.0)
    monkeypatch.setattr(executors, "MIN_BATCHES", 0)
    monkeypatch.setattr(InferenceJob, "batch_size_candidates", property(lambda self: (50, 100)))
    torn = faulty.make_model(tmp_path, faulty.raise_error(lambda value: OSError(errno.EIO, "torn")), [12])
    x = da.from_array(X, chunks=800).map_blocks(torn, dtype=X.dtype, meta=X[:0])
    keywords = ({"devices": devices} if devices else two) | {"batch_size": "auto", "return_report": True}
    model = torch.nn.Threshold(0.0, 7.0)  # not tuned by any other test
    y, report = di.predict(model, x, on_error="skip", retries=0, **keywords)
    assert report.failed_rows == tuple(range(800)) == tuple(np.flatnonzero(np.isnan(y)))
    np.testing.assert_array_equal(y[800:], 2 * X[800:])
    assert any("batch-size tuning failed; keeping batch_size=" in line for line in caplog.messages)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("error", [MemoryError("none"), RuntimeError("CUDA out of memory")], ids=repr)
def test_memory_that_is_short_once(two: dict[str, Any], tmp_path: Path, error: Exception, on_error: str) -> None:
    """Out of memory at a single row is no error if the row fits in isolation, however few retries there are."""
    act = faulty.raise_error(lambda value: error)
    model = faulty.make_model(tmp_path, act, [1234], times=8)  # 7 halvings from 100 rows to 1
    y, report = di.predict(model, X, return_report=True, on_error=on_error, retries=1, **two)
    np.testing.assert_array_equal(y, 2 * X)
    assert report.failures == ()


def test_a_scheduler_that_is_lost_is_named(foreign: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that is lost during a call is a clear error, not a hang, and this host's file of the model is removed."""
    monkeypatch.setattr(window, "WORKER_CHECK_SECONDS", 0.2)
    folder = Path(get_broadcast_path("x")).parent
    model = faulty.make_model(tmp_path, faulty.sleep, [], seconds=0.05)
    blocks = di.stream(model, X, client=foreign, batch_size=10, device_weights=[1, 1])
    next(blocks)
    foreign.cluster.close()
    with pytest.raises(di.errors.SchedulerLost, match=r"lost the connection to the scheduler|was cancelled externally"):
        list(blocks)
    assert not list(folder.glob("model-*"))


def test_two_calls_on_one_cluster_while_a_worker_dies(cpus: dict[str, Any], tmp_path: Path) -> None:
    """A worker that one call kills costs another call on the same cluster nothing but time."""
    from concurrent.futures import ThreadPoolExecutor

    killing, other = tmp_path / "killing", tmp_path / "other"
    killing.mkdir(), other.mkdir()
    models = [
        faulty.make_model(killing, faulty.kill, [1234], times=1, seconds=0.01),
        faulty.make_model(other, faulty.kill, [], seconds=0.05),
    ]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(di.predict, model, make_chunked(), **cpus) for model in models]
        outputs = [future.result()[0] for future in futures]
    for y in outputs:
        np.testing.assert_array_equal(y, 2 * X)
