"""The window: how much is in flight where, what comes back how, and how a call ends when a worker or a task is lost."""

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
from daskinfer.core.chunks import ChunkStats
from daskinfer.diagnostics.report import RunReport
from daskinfer.errors import ClusterError
from daskinfer.execution import window
from daskinfer.execution.device_queue import DeviceQueue
from daskinfer.execution.results import InFlightTask
from daskinfer.models.model import BroadcastLoader, Model
from daskinfer.models.shared_files import get_broadcast_path
from daskinfer.scheduling.balancer import StaticBalancer
from daskinfer.scheduling.chunking import assign_chunks, make_chunks
from daskinfer.transport import shared_memory
from daskinfer.transport.row_sources import ChunkInput, RowTransferError, Task
from daskinfer.worker.task import ComputedChunk
from tests.conftest import wait_until

N_TINY = 2000  # chunks
IN_FLIGHT = {"waiting", "processing", "queued", "no-worker"}


class Watch(SchedulerPlugin):
    """Counts, in the scheduler, the tasks of calls: all of them, and the most that were in flight or held at a time."""

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
def watched(client: Client) -> Iterator[Watch]:
    """Watch the scheduler of a cluster of ours, which lives in this process."""
    client.register_plugin(Watch())
    try:
        yield client.cluster.scheduler.plugins[Watch.name]
    finally:
        client.unregister_scheduler_plugin(Watch.name)


class Unanswered:
    """A future that nothing comes back for."""

    status = "pending"


def cells(n_chunks: int) -> da.Array:
    """The rows 0, 1, 2, … in chunks of one."""
    return da.from_array(np.arange(float(n_chunks)), chunks=1)


def waits_for(go: Path) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """A network that does row 0 at once and all others once the file ``go`` is there."""

    def model(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        while batch.max() > 0 and not go.exists():
            time.sleep(0.01)
        return batch

    return model


@pytest.fixture(scope="module")
def tiny(cluster_client: Client) -> tuple[np.ndarray[Any, Any], RunReport, Watch]:
    """One call over many tiny chunks: the answer, the report, and what the scheduler saw."""
    with watched(cluster_client) as watch:
        how = {"client": cluster_client, "batch_size": 1, "device_weights": [1, 1]}
        y, report = di.predict(np.negative, cells(N_TINY), return_report=True, **how)
    return y, report, watch


@pytest.mark.parametrize(("prefetch", "weights"), [(1, [1, 0]), (3, [1, 0]), (1, [1, 1])])
def test_a_window_per_device(cluster_client: Client, prefetch: int, weights: list[int]) -> None:
    """Each device has prefetch + 2 tasks in flight as long as there are chunks, and never one more."""

    def model(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        time.sleep(0.02)  # stands for a chunk's work
        return batch

    with watched(cluster_client) as watch:
        di.predict(model, cells(30), client=cluster_client, batch_size=1, device_weights=weights, prefetch=prefetch)
    assert watch.most_in_flight == (prefetch + 2) * sum(weights)


def test_the_scheduler_holds_a_window(tiny: tuple[np.ndarray[Any, Any], RunReport, Watch]) -> None:
    """Over thousands of chunks the scheduler holds a few tasks at a time, in flight or not let go yet."""
    y, _, watch = tiny
    np.testing.assert_array_equal(y, -np.arange(float(N_TINY)))
    assert watch.most_in_flight <= 6
    assert watch.most_held <= 30


def test_a_task_carries_several_small_chunks(tiny: tuple[np.ndarray[Any, Any], RunReport, Watch]) -> None:
    """Small chunks share tasks, and each has its receipt all the same."""
    _, report, watch = tiny
    assert sum(device.n_chunks for device in report.devices) == N_TINY
    assert len(watch.keys) < N_TINY / 8


def test_keys_tell_the_kind_of_device(tiny: tuple[np.ndarray[Any, Any], RunReport, Watch]) -> None:
    """Each kind has a prefix of its own, by which Dask estimates how long a task takes."""
    assert {key.rpartition("-")[0].rpartition("-")[0] for key in tiny[2].keys} == {"infer-cpu"}


def test_what_lies_in_shared_memory_is_not_fetched(cluster_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where workers share memory with the client, no result is asked for."""
    monkeypatch.setattr(Future, "result", None)  # asking would fail
    x = np.arange(5000.0)
    np.testing.assert_array_equal(di.predict(np.negative, x, client=cluster_client, batch_size=10), -x)


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("n_sharing", [0, 1])
def test_results_travel_where_memory_is_not_shared(
    cluster_client: Client, monkeypatch: pytest.MonkeyPatch, n_sharing: int, reads: bool
) -> None:
    """Workers that share no memory with the client, all or some, answer through Dask, which may also bring the rows."""
    asked = preflight.check_workers

    def apart(*args: Any) -> dict[str, preflight.WorkerInfo]:
        answers = sorted(asked(*args).items())
        return {
            address: replace(a, shares_memory=i < n_sharing, reads_memory=reads) for i, (address, a) in enumerate(answers)
        }

    n_fetched: list[str] = []
    result = Future.result
    monkeypatch.setattr(preflight, "check_workers", apart)
    monkeypatch.setattr(Future, "result", lambda future, **how: n_fetched.append(future.key) or result(future, **how))
    x = np.arange(5000.0)
    y, report = di.predict(np.negative, x, client=cluster_client, batch_size=10, device_weights=[1, 1], return_report=True)
    np.testing.assert_array_equal(y, -x)
    assert [d.n_rows for d in report.devices] == [2500, 2500]
    assert n_fetched


@pytest.mark.usefixtures("unread")
def test_an_answer_larger_than_its_slot_comes_back_through_dask(
    cluster_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit into a slot goes with the task, and the answer is the same."""
    monkeypatch.setattr(shared_memory, "compute_slot_nbytes", lambda nbytes: 0)
    monkeypatch.setattr(
        "daskinfer.execution.task_builder.slot_nbytes", lambda nbytes: shared_memory.RESULT_HEADER_NBYTES + 4096
    )
    shared_memory.close_cached_pool(cluster_client)
    x = np.arange(20_000.0)
    np.testing.assert_array_equal(di.predict(np.negative, x, client=cluster_client, device_weights=[1, 1]), -x)
    shared_memory.close_cached_pool(cluster_client)


def test_slots_are_given_back(cluster_client: Client) -> None:
    """After a call that went well every slot is free, and the next call has the same memory."""
    x = np.arange(1000.0)
    di.predict(np.negative, x, client=cluster_client, batch_size=1)
    first = shared_memory._cached_pools[cluster_client]
    assert first.is_idle
    di.predict(np.negative, x, client=cluster_client, batch_size=1)
    assert shared_memory._cached_pools[cluster_client] is first


def test_memory_that_a_lost_task_may_write_to_is_let_go(cluster_client: Client) -> None:
    """After a call that failed its memory is not used again: a task of it may still be on its way."""

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


def test_a_task_that_others_cancel_ends_the_call(cluster_client: Client, tmp_path: Path) -> None:
    """A cancelled task is an error that says so, not a hang."""
    go = tmp_path / "go"
    how = {"client": cluster_client, "batch_size": 1, "device_weights": [1, 1], "output": np.empty(0)}
    blocks = di.stream(waits_for(go), cells(100), **how)
    assert next(blocks)[0] == 0
    ours = [Future(key, cluster_client) for key in list(cluster_client.futures) if key.startswith("infer-")]
    cluster_client.cancel(ours, force=True)
    with pytest.raises(ClusterError, match=r"task of rows \d+:\d+ was cancelled, and not by this call"):
        list(blocks)
    go.touch()


def test_a_client_that_is_closed_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can come back any more, the call ends and says why."""
    with Client(processes=False, n_workers=1, dashboard_address=None, set_as_default=False) as client:
        pass
    monkeypatch.setattr(window, "WORKER_CHECK_SECONDS", 0.01)
    lane = DeviceQueue(
        0, "cpu:0", "cpu", {"resources": {}}, 1, None, tasks={Unanswered(): InFlightTask((), None, (), False, 0.0)}
    )
    dealer = StaticBalancer(make_chunks(0, [1.0], batch_size=1), 0, n_devices=1)
    policy = window.FailurePolicy(0, None, WorkerRestarter(client, {}, allow_external=False), None)
    with (
        pytest.raises(ClusterError, match=r"the scheduler of the client is lost \(the client is closed\)"),
        window.TaskWindow(client, len, bytes, [lane], None, policy) as opened,
    ):
        next(opened.run(dealer, lambda: None))


@pytest.mark.slow
def test_a_shipped_network_goes_though_its_receiver_died(foreign: Client) -> None:
    """On a cluster of others the network's file is removed at the end of the call, whichever worker had received it."""
    recipe = Model(torch.nn.Linear(3, 2)).make_loader()
    before = set(fetch_workers(foreign))
    with broadcast.broadcast_model(foreign, recipe, dict.fromkeys(before, ""), set()) as shipment:
        assert isinstance(shipment.loader, BroadcastLoader)
        path = Path(get_broadcast_path(shipment.loader.file_name))
        assert path.exists()
        for pid in foreign.run(os.getpid).values():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(set(fetch_workers(foreign)) - before) == 2, 60)
    assert not path.exists()


# Faults that no real cluster shows in time: a client that has one worker, and loses what it is told to


class Late:
    """A future whose callbacks are called at once, and whose answer is asked for in vain before it comes."""

    def __init__(self, client: OneWorker, block: Any) -> None:
        self.client, self.block, self.n_asked = client, block, 0
        self.status = "finished"

    def add_done_callback(self, call: Callable[[Late], None]) -> None:
        call(self)

    def release(self) -> None:
        self.client.released.append(self)

    def result(self, timeout: float) -> Any:
        self.n_asked += 1
        if self.n_asked == 1:
            raise TimeoutError
        return [self.block]


class OneWorker:
    """A client of a cluster of others, with one worker."""

    status = "running"

    def __init__(self) -> None:
        self.scheduler = SimpleNamespace(identity=None)
        self.submitted: list[Late] = []
        self.released: list[Late] = []

    def sync(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"workers": {"tcp://a": {}}}

    def submit(self, work: Any, order: Any, task: Any, brought: Any, **_: Any) -> Late:
        start, stop = cloudpickle.loads(zlib.decompress(task)).pieces[0].chunk.start, 0
        block = ComputedChunk([np.full(1, start)], ChunkStats(start, stop, "0", "", 1, 0.1, "tcp://a"))
        self.submitted.append(Late(self, block))
        return self.submitted[-1]

    def cancel(self, futures: list[Late], *, force: bool) -> None:
        assert futures == []


def test_what_is_lost_on_the_way_comes_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that cannot be sent, as their worker has just ended, are sent later; an answer is asked for again."""
    monkeypatch.setattr(window, "WORKER_CHECK_SECONDS", 0.01)
    monkeypatch.setattr(window, "MISSING_WORKER_CHECK_SECONDS", 0.01)
    client, refused = OneWorker(), [1, 1]

    def feed(chunks: Any, slot: Any, workers: Any, *, reads: bool) -> tuple[Task, list[Future]]:
        if refused and refused.pop():
            raise RowTransferError(workers)
        return Task(tuple(ChunkInput(chunk, (), None) for chunk in chunks)), []

    arena = shared_memory.SharedMemoryPool(shared_memory.RESULT_HEADER_NBYTES, 1)
    lane = DeviceQueue(0, "0", "cpu", {"workers": ["tcp://a"]}, 1, arena, nanny="tcp://n")
    dealer = StaticBalancer(assign_chunks([1, 0, 1, 1], [1.0], batch_size=1), 0, n_devices=1)
    policy = window.FailurePolicy(0, None, WorkerRestarter(client, {}, allow_external=False), None)
    with window.TaskWindow(client, len, bytes, [lane], feed, policy) as opened:
        found = [(one.chunk.start, int(one.arrays[0][0])) for one in opened.run(dealer, lambda: None)]
    assert sorted(found) == [(0, 0), (1, 1), (2, 2)]
    assert all(future.n_asked == 2 for future in client.submitted)
    assert arena.is_idle
    arena.close()


def test_a_task_whose_answer_is_being_used_is_let_go(cluster_client: Client) -> None:
    """The scheduler forgets a task before its answer is used, or were its worker to end, it would compute it again."""
    blocks = di.stream(np.negative, np.arange(400.0), client=cluster_client, batch_size=10, device_weights="even")
    next(blocks)

    def first() -> list[str]:
        return [key for key in map(str, cluster_client.futures) if key.startswith("infer-") and key.endswith("-0")]

    wait_until(lambda: not first())
    blocks.close()


class Fake:
    """A future of some status."""

    def __init__(self, status: str) -> None:
        self.status = status


def test_no_task_hangs_while_an_answer_waits_to_be_used() -> None:
    """How long a device has been quiet is known once what it answered has been looked at."""
    lane = DeviceQueue(0, "cpu:0", "cpu", {}, 3, None)
    task = InFlightTask((), None, (), alone=False, submitted_at=0.0)
    lane.tasks = {Fake("finished"): task, Fake("pending"): task}  # type: ignore[dict-item]
    assert lane.find_hung_task(1.0, now=10.0) is None
    lane.tasks = {Fake("pending"): task}  # type: ignore[dict-item]
    assert lane.find_hung_task(1.0, now=10.0) is task
