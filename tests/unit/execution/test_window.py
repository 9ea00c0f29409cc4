"""The task window: how much is in flight on each device, how results come back, and what happens when a task is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client, Future, Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin

import daskinfer as di
from daskinfer.cluster import broadcast, preflight
from daskinfer.cluster.placement import fetch_workers
from daskinfer.cluster.restart import WorkerRestarter
from daskinfer.core.chunks import ChunkResult, ChunkStats
from daskinfer.diagnostics.report import RunReport
from daskinfer.errors import ClusterError
from daskinfer.execution import window
from daskinfer.execution.device_queue import DeviceQueue
from daskinfer.execution.results import InFlightTask
from daskinfer.models.loaders import BroadcastLoader
from daskinfer.models.model import Model
from daskinfer.models.shared_files import get_broadcast_path
from daskinfer.scheduling.balancer import StaticBalancer
from daskinfer.scheduling.chunking import assign_chunks, make_chunks
from daskinfer.transport import shared_memory
from daskinfer.transport.row_sources import ChunkInput, RowTransferError, Task
from tests.conftest import FREE_PORT, wait_until

N_TINY = 2000  # chunks
IN_FLIGHT = {"waiting", "processing", "queued", "no-worker"}


class Watch(SchedulerPlugin):
    """Counts the tasks of calls in the scheduler: all of them, and the most that were in flight or held at a time."""

    name = "watch"

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.in_flight: set[str] = set()
        self.most_in_flight = self.most_held = 0

    async def start(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        if str(key).startswith("infer-"):
            self.keys.add(key)
            self.in_flight.add(key) if finish in IN_FLIGHT else self.in_flight.discard(key)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        self.most_held = max(self.most_held, len(self._scheduler.tasks))


@contextlib.contextmanager
def watch_scheduler(client: Client) -> Iterator[Watch]:
    """Watch the scheduler of a managed cluster, which runs in this process."""
    client.register_plugin(Watch())
    try:
        yield client.cluster.scheduler.plugins[Watch.name]
    finally:
        client.unregister_scheduler_plugin(Watch.name)


class PendingFuture:
    """A future without a result."""

    status = "pending"


def make_single_row_chunks(n_chunks: int) -> da.Array:
    """Make the rows 0, 1, 2, … in chunks of one."""
    return da.from_array(np.arange(float(n_chunks)), chunks=1)


def make_waiting_model(go: Path) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Make a model that computes row 0 at once, and all others once the file ``go`` exists."""

    def model(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        while batch.max() > 0 and not go.exists():
            time.sleep(0.01)
        return batch

    return model


@pytest.fixture(scope="module")
def tiny(cluster_client: Client) -> tuple[np.ndarray[Any, Any], RunReport, Watch]:
    """Run one call over many tiny chunks: its output, its report, and what the scheduler saw."""
    with watch_scheduler(cluster_client) as watch:
        keywords = {"client": cluster_client, "batch_size": 1, "device_weights": [1, 1]}
        y, report = di.predict(np.negative, make_single_row_chunks(N_TINY), return_report=True, **keywords)
    return y, report, watch


@pytest.mark.parametrize(("prefetch", "weights"), [(1, [1, 0]), (3, [1, 0]), (1, [1, 1])])
def test_a_window_per_device(cluster_client: Client, prefetch: int, weights: list[int]) -> None:
    """Each device has prefetch + 2 tasks in flight as long as there are chunks, and never more."""

    def model(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        time.sleep(0.02)  # stands for a chunk's work
        return batch

    with watch_scheduler(cluster_client) as watch:
        di.predict(
            model, make_single_row_chunks(30), client=cluster_client, batch_size=1, device_weights=weights, prefetch=prefetch
        )
    assert watch.most_in_flight == (prefetch + 2) * sum(weights)


def test_the_scheduler_holds_a_window(tiny: tuple[np.ndarray[Any, Any], RunReport, Watch]) -> None:
    """Over thousands of chunks the scheduler holds a few tasks at a time, in flight or not forgotten yet."""
    y, _, watch = tiny
    np.testing.assert_array_equal(y, -np.arange(float(N_TINY)))
    assert watch.most_in_flight <= 6
    assert watch.most_held <= 30


def test_a_task_carries_several_small_chunks(tiny: tuple[np.ndarray[Any, Any], RunReport, Watch]) -> None:
    """Small chunks share tasks, and each is counted by itself."""
    _, report, watch = tiny
    assert sum(device.n_chunks for device in report.devices) == N_TINY
    assert len(watch.keys) < N_TINY / 8


def test_keys_name_the_kind_of_device(tiny: tuple[np.ndarray[Any, Any], RunReport, Watch]) -> None:
    """Each kind has its own prefix, by which Dask estimates how long a task takes."""
    assert {key.rpartition("-")[0].rpartition("-")[0] for key in tiny[2].keys} == {"infer-cpu"}


def test_results_in_shared_memory_are_not_fetched(cluster_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """If workers share memory with the client, no result is requested."""
    monkeypatch.setattr(Future, "result", None)  # requesting would fail
    x = np.arange(5000.0)
    np.testing.assert_array_equal(di.predict(np.negative, x, client=cluster_client, batch_size=10), -x)


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("n_sharing", [0, 1])
def test_results_travel_if_memory_is_not_shared(
    cluster_client: Client, monkeypatch: pytest.MonkeyPatch, n_sharing: int, reads: bool
) -> None:
    """If workers share no memory with the client, all or some, results come through Dask, which may also bring the rows."""
    check_workers = preflight.check_workers

    def separate(*args: Any) -> dict[str, preflight.WorkerInfo]:
        infos = sorted(check_workers(*args).items())
        return {
            address: replace(info, can_attach_pool=i < n_sharing, can_read_client_memory=reads)
            for i, (address, info) in enumerate(infos)
        }

    fetched: list[str] = []
    result = Future.result
    monkeypatch.setattr(preflight, "check_workers", separate)
    monkeypatch.setattr(
        Future, "result", lambda future, **keywords: fetched.append(future.key) or result(future, **keywords)
    )
    x = np.arange(5000.0)
    y, report = di.predict(np.negative, x, client=cluster_client, batch_size=10, device_weights=[1, 1], return_report=True)
    np.testing.assert_array_equal(y, -x)
    assert [d.n_rows for d in report.devices] == [2500, 2500]
    assert fetched


@pytest.mark.usefixtures("unread")
def test_outputs_larger_than_their_slot_come_back_through_dask(
    cluster_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit into a slot travels with the task, and the output is the same."""
    slot_nbytes = shared_memory.RESULT_HEADER_NBYTES + 4096
    monkeypatch.setattr("daskinfer.execution.task_builder.compute_slot_nbytes", lambda nbytes: slot_nbytes)
    shared_memory.close_cached_pool(cluster_client)
    x = np.arange(20_000.0)
    np.testing.assert_array_equal(di.predict(np.negative, x, client=cluster_client, device_weights=[1, 1]), -x)
    shared_memory.close_cached_pool(cluster_client)


def test_slots_are_returned(cluster_client: Client) -> None:
    """After a call that succeeded every slot is free, and the next call uses the same memory."""
    x = np.arange(1000.0)
    di.predict(np.negative, x, client=cluster_client, batch_size=1)
    first = shared_memory._cached_pools[cluster_client]
    assert first.is_idle
    di.predict(np.negative, x, client=cluster_client, batch_size=1)
    assert shared_memory._cached_pools[cluster_client] is first


def test_memory_that_a_lost_task_may_write_to_is_dropped(cluster_client: Client) -> None:
    """After a call that failed its memory is not used again: one of its tasks may still be running."""

    def fails(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if batch.max() >= 500:
            raise ArithmeticError("no")
        time.sleep(1e-4 * (batch.max() > 250))  # so that something is in flight when the first fails
        return batch

    x = np.arange(1000.0)
    with pytest.raises(di.DaskInferError, match=r"rows \d+:\d+ on cpu failed: ArithmeticError: no"):
        di.predict(fails, x, client=cluster_client, batch_size=1, retries=0, device_weights=[1, 1])
    assert cluster_client not in shared_memory._cached_pools
    np.testing.assert_array_equal(di.predict(np.negative, x, client=cluster_client), -x)


def test_a_task_that_is_cancelled_externally_ends_the_call(cluster_client: Client, tmp_path: Path) -> None:
    """A cancelled task is an error with that message, not a hang."""
    go = tmp_path / "go"
    keywords = {"client": cluster_client, "batch_size": 1, "device_weights": [1, 1], "output": np.empty(0)}
    blocks = di.stream(make_waiting_model(go), make_single_row_chunks(100), **keywords)
    assert next(blocks)[0] == 0
    in_flight = [Future(key, cluster_client) for key in list(cluster_client.futures) if key.startswith("infer-")]
    cluster_client.cancel(in_flight, force=True)
    with pytest.raises(ClusterError, match=r"task for rows \d+:\d+ was cancelled externally"):
        list(blocks)
    go.touch()


def test_a_client_that_is_closed_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no result can come back any more, the call ends and says why."""
    with Client(
        processes=False, n_workers=1, dashboard_address=None, scheduler_kwargs=FREE_PORT, set_as_default=False
    ) as client:
        pass
    monkeypatch.setattr(window, "WORKER_CHECK_SECONDS", 0.01)
    device_queue = DeviceQueue(
        0, "cpu:0", "cpu", {"resources": {}}, 1, None, tasks={PendingFuture(): InFlightTask((), None, (), False, 0.0)}
    )
    balancer = StaticBalancer(make_chunks(0, [1.0], batch_size=1), 0, n_devices=1)
    policy = window.FailurePolicy(0, None, WorkerRestarter(client, {}, allow_external=False), None)
    with (
        pytest.raises(ClusterError, match=r"lost the connection to the scheduler \(the client is closed\)"),
        window.TaskWindow(client, len, bytes, [device_queue], None, policy) as opened,
    ):
        next(opened.run(balancer, lambda: None))


@pytest.mark.slow
def test_a_broadcast_file_is_removed_though_its_receiver_died(foreign: Client) -> None:
    """On an external cluster the model's file is removed when the call ends, even if the worker that received it died."""
    loader = Model(torch.nn.Linear(3, 2)).make_loader()
    before = set(fetch_workers(foreign))
    with broadcast.broadcast_model(foreign, loader, dict.fromkeys(before, ""), set()) as sent:
        assert isinstance(sent.loader, BroadcastLoader)
        path = Path(get_broadcast_path(sent.loader.file_name))
        assert path.exists()
        for pid in foreign.run(os.getpid).values():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(set(fetch_workers(foreign)) - before) == 2, 60)
    assert not path.exists()


# Faults that no real cluster shows in time: a client that has one worker, and loses what a test tells it to lose.


class LateFuture:
    """A future whose callbacks are called at once, and whose result is not ready at the first request."""

    def __init__(self, client: OneWorkerClient, result: Any) -> None:
        self.client, self.n_requests, self._result = client, 0, result
        self.status = "finished"

    def add_done_callback(self, call: Callable[[LateFuture], None]) -> None:
        call(self)

    def release(self) -> None:
        self.client.released.append(self)

    def result(self, timeout: float) -> Any:
        self.n_requests += 1
        if self.n_requests == 1:
            raise TimeoutError
        return [self._result]


class OneWorkerClient:
    """A client of an external cluster with one worker."""

    status = "running"

    def __init__(self) -> None:
        self.scheduler = SimpleNamespace(identity=None)
        self.submitted: list[LateFuture] = []
        self.released: list[LateFuture] = []

    def sync(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"workers": {"tcp://a": {}}}

    def submit(self, function: Any, spec: Any, task: Any, dependencies: Any, **_: Any) -> LateFuture:
        chunk = cloudpickle.loads(zlib.decompress(task)).chunk_inputs[0].chunk
        stats = ChunkStats(chunk.start, chunk.stop, "0", "", 1, 0.1, "tcp://a")
        result = ChunkResult(chunk, [np.full(1, chunk.start)], stats)
        self.submitted.append(LateFuture(self, result))
        return self.submitted[-1]

    def cancel(self, futures: list[LateFuture], *, force: bool) -> None:
        assert futures == []


def test_rows_and_results_that_are_lost_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that cannot be sent because their worker just died are sent later; a result is requested again."""
    monkeypatch.setattr(window, "WORKER_CHECK_SECONDS", 0.01)
    monkeypatch.setattr(window, "MISSING_WORKER_CHECK_SECONDS", 0.01)
    client, refusals = OneWorkerClient(), [1, 1]

    def build_task(chunks: Any, slot: Any, workers: Any, *, reads_process_memory: bool) -> tuple[Task, list[Future]]:
        if refusals and refusals.pop():
            raise RowTransferError(workers)
        return Task(tuple(ChunkInput(chunk, (), None) for chunk in chunks)), []

    pool = shared_memory.SharedMemoryPool(shared_memory.RESULT_HEADER_NBYTES, 1)
    device_queue = DeviceQueue(0, "0", "cpu", {"workers": ["tcp://a"]}, 1, pool, nanny="tcp://n")
    balancer = StaticBalancer(assign_chunks([1, 0, 1, 1], [1.0], batch_size=1), 0, n_devices=1)
    policy = window.FailurePolicy(0, None, WorkerRestarter(client, {}, allow_external=False), None)
    with window.TaskWindow(client, len, bytes, [device_queue], build_task, policy) as opened:
        starts = [(result.chunk.start, int(result.arrays[0][0])) for result in opened.run(balancer, lambda: None)]
    assert sorted(starts) == [(0, 0), (1, 1), (2, 2)]
    assert all(future.n_requests == 2 for future in client.submitted)
    assert pool.is_idle
    pool.close()


def test_a_task_whose_results_are_being_used_is_forgotten(cluster_client: Client) -> None:
    """The scheduler forgets a task before its results are used; otherwise, if its worker died, it would run again."""
    blocks = di.stream(np.negative, np.arange(400.0), client=cluster_client, batch_size=10, device_weights="even")
    next(blocks)

    def find_first_task() -> list[str]:
        return [key for key in map(str, cluster_client.futures) if key.startswith("infer-") and key.endswith("-0")]

    wait_until(lambda: not find_first_task())
    blocks.close()


class FakeFuture:
    """A future with a status."""

    def __init__(self, status: str) -> None:
        self.status = status


def test_no_task_is_hung_while_a_result_waits_to_be_used() -> None:
    """How long a device has not responded is known only once its results have been used."""
    device_queue = DeviceQueue(0, "cpu:0", "cpu", {}, 3, None)
    task = InFlightTask((), None, (), alone=False, submitted_at=0.0)
    device_queue.tasks = {FakeFuture("finished"): task, FakeFuture("pending"): task}  # type: ignore[dict-item]
    assert device_queue.find_hung_task(1.0, now=10.0) is None
    device_queue.tasks = {FakeFuture("pending"): task}  # type: ignore[dict-item]
    assert device_queue.find_hung_task(1.0, now=10.0) is task
