"""Executors: what they share, and how this process computes, retries and gives up chunks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch

from daskinfer.cluster.placement import resolve_placement
from daskinfer.core.chunks import BatchConfig, ChunkResult
from daskinfer.diagnostics.events import BatchSizeChosen, ChunkFailed, ChunkStarted, Event, EventBus
from daskinfer.errors import StorageError
from daskinfer.execution import executors
from daskinfer.execution.executors import InlineExecutor, RunState, make_balancer
from daskinfer.planning.build_job import RunArguments, build_job
from daskinfer.planning.job import InferenceJob
from daskinfer.scheduling import retry
from daskinfer.scheduling.throughput_history import history

X = np.arange(40.0)


@pytest.fixture(autouse=True)
def _retry_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry without a wait."""
    monkeypatch.setattr(retry, "FIRST_BACKOFF_SECONDS", 0.0)


def make_state(model: Any, x: Any = X, listener: Callable[[Event], None] | None = None, **fields: Any) -> RunState:
    """Make the state of a call in this process, with batches and chunks of 10 rows."""
    placement, _ = resolve_placement("inline", None)
    events = EventBus()
    if listener is not None:
        events.add(listener)
    chunked = da.from_array(x, chunks=10) if isinstance(x, np.ndarray) else x
    return RunState(build_job(model, chunked, RunArguments(placement, batch_size=10, fields=fields)), events=events)


def compute_all(state: RunState) -> list[ChunkResult]:
    """Compute every chunk of a call in this process; return the results in the order of their rows."""
    results = InlineExecutor(state).run(make_balancer(state.job, state.job.weights), 0)
    return sorted(results, key=lambda result: result.chunk.start)


def make_torn(n_times: int) -> da.Array:
    """Make an input whose third chunk cannot be read the first ``n_times``."""
    failed = []

    def read(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if 25 in rows and len(failed) < n_times:
            failed.append(rows)
            raise OSError("torn")
        return rows

    return da.from_array(X, chunks=10).map_blocks(read, dtype=X.dtype, meta=X[:0])


def test_every_chunk_is_computed_once() -> None:
    """Without errors each chunk takes one attempt."""
    results = compute_all(make_state(np.negative))
    np.testing.assert_array_equal(np.concatenate([result.arrays[0] for result in results]), -X)
    assert [result.attempts for result in results] == [1] * 4


def test_attempts_in_this_process_are_counted() -> None:
    """A chunk that succeeds at its third attempt says so, and each failed one is an event with its error."""
    failed: list[str] = []
    state = make_state(
        np.negative, make_torn(2), listener=lambda e: failed.append(e.exception) if isinstance(e, ChunkFailed) else None
    )
    results = compute_all(state)
    assert [result.attempts for result in results] == [1, 1, 3, 1]
    np.testing.assert_array_equal(results[2].arrays[0], -X[20:30])
    assert len(failed) == 2
    assert all(reason.startswith("StorageError: chunk 2 (rows 20:30) cannot be read: OSError: torn.") for reason in failed)


def test_a_chunk_that_is_given_up_is_filled() -> None:
    """With on_error="skip" a chunk that cannot be read is filled and named, with its attempts; others are unaffected."""
    results = compute_all(make_state(np.negative, make_torn(99), on_error="skip", retries=1))
    (failure,) = results[2].failures
    assert (failure.start, failure.stop, results[2].attempts) == (20, 30, 2)
    assert np.isnan(results[2].arrays[0]).all()
    np.testing.assert_array_equal(results[3].arrays[0], -X[30:])
    assert results[2].stats.is_abandoned


def test_a_chunk_that_fails_for_good_ends_the_call() -> None:
    """Once the retries are used up, the error of the last attempt is raised."""
    with pytest.raises(StorageError, match=r"chunk 2 \(rows 20:30\) cannot be read: OSError: torn"):
        compute_all(make_state(np.negative, make_torn(99), retries=1))


def test_draining_stops_after_the_current_task() -> None:
    """No further task is started once the run is draining."""
    state = make_state(np.negative)
    balancer = make_balancer(state.job, state.job.weights)
    n_rows = 0
    for result in InlineExecutor(state).run(balancer, 0):
        n_rows += result.chunk.n_rows
        state.draining = True
    assert 0 < n_rows < len(X)
    assert balancer.n_rows_left == len(X) - n_rows


def test_reading_is_timed_without_listeners() -> None:
    """A slow listener does not count as time that the device waited for its rows."""
    state = make_state(np.negative, listener=lambda event: time.sleep(0.05 * isinstance(event, ChunkStarted)))
    assert max(result.stats.read_seconds for result in compute_all(state)) < 0.05


def test_threads_of_this_process() -> None:
    """While it computes, torch has the threads that the executor asks for, and afterwards those it had before."""
    seen, before = [], torch.get_num_threads()
    state = make_state(lambda rows: seen.append(torch.get_num_threads()) or rows)
    seen.clear()  # of dummy rows
    executor = InlineExecutor(state, n_threads=before + 1)
    list(executor.run(make_balancer(state.job, state.job.weights), 0))
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


@pytest.fixture
def _no_history() -> Iterator[None]:
    """Forget what was measured, before and after."""
    history.clear()
    yield
    history.clear()


@pytest.mark.usefixtures("_no_history")
def test_a_known_batch_size_is_used_from_the_first_row_on() -> None:
    """The batch size that an earlier call found is chosen before the first chunk starts."""
    placement, _ = resolve_placement("inline", None)
    job = build_job(np.negative, np.zeros(100_000), RunArguments(placement))
    job.record.batch_sizes["inline"] = 2 * job.run_config.batch.batch_size
    state = RunState(job, events=EventBus())
    kinds: list[type] = []
    state.events.add(lambda event: kinds.append(type(event)))
    results = compute_all(state)
    assert kinds[:2] == [BatchSizeChosen, ChunkStarted]
    assert {result.stats.batch_size for result in results} == {2 * job.run_config.batch.batch_size}


@pytest.mark.usefixtures("_no_history")
def test_a_known_speed_tunes_before_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """If an earlier call measured the speed, the first task may hold all rows, so tuning comes before it."""
    tuned: list[tuple[int, float]] = []

    def tune(job: InferenceJob, read_rows: Any, worker_device: Any, n_rows_left: int, speed: float) -> InferenceJob:
        tuned.append((n_rows_left, speed))
        return replace(job, tunable=False)

    monkeypatch.setattr(executors, "tune_inline", tune)
    placement, _ = resolve_placement("inline", None)
    job = build_job(np.negative, np.zeros(100_000), RunArguments(placement))
    job.record.speeds["inline"] = 1e9
    compute_all(RunState(job))
    assert [n_rows_left for n_rows_left, _ in tuned] == [100_000]
    assert tuned[0][1] == pytest.approx(1e9)


def test_listeners_hear_of_another_batch_configuration() -> None:
    """A job with another batch configuration is told to the listeners, once."""
    chosen: list[Event] = []
    state = make_state(np.negative, listener=chosen.append)
    job = state.job.with_batch_config(BatchConfig(5, {"cpu": 5}))
    for _ in range(2):
        state.update_job(job)
    (event,) = chosen
    assert isinstance(event, BatchSizeChosen)
    assert (event.batch.batch_size, dict(event.batch.by_kind), state.batch.batch_size) == (5, {"cpu": 5}, 5)
