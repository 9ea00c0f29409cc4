"""The one thread of a worker that computes: its order, its errors, and the seconds that its device waited."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from daskinfer.worker import device_thread
from daskinfer.worker.device_thread import DeviceThread
from tests.conftest import wait_until

NEVER = float("inf")  # when a task arrives for which the device never waited
ALWAYS = 0.0  # when a task arrives that is older than the clock


@pytest.fixture
def thread() -> Iterator[DeviceThread]:
    """Make a device thread, ended with the test."""
    made = DeviceThread()
    yield made
    made.close()


class Busy:
    """A device thread that is busy until ``go`` is set, and functions that are queued one after the other meanwhile."""

    def __init__(self, thread: DeviceThread, pool: ThreadPoolExecutor) -> None:
        self.thread, self.pool, self.go = thread, pool, threading.Event()
        begun = threading.Event()
        self.first = pool.submit(thread.run, lambda: (begun.set(), self.go.wait(30), time.perf_counter())[-1], NEVER)
        assert begun.wait(30)
        self.n_waiting = 0

    def add(self, compute: Callable[[], Any], arrived_at: float = NEVER) -> Future[tuple[Any, float]]:
        """Submit another function; it is in the queue when this returns."""
        future = self.pool.submit(self.thread.run, compute, arrived_at)
        self.n_waiting += 1
        wait_until(lambda: self.thread._executor._work_queue.qsize() == self.n_waiting)
        return future


@pytest.fixture
def busy(thread: DeviceThread) -> Iterator[Busy]:
    """Make a device thread that is busy."""
    with ThreadPoolExecutor(8) as pool:
        made = Busy(thread, pool)
        yield made
        made.go.set()


def test_the_result_is_returned(thread: DeviceThread) -> None:
    """The caller gets the value, which is computed in the device's own thread, the same one each time."""
    names = {thread.run(lambda: threading.current_thread().name, NEVER)[0] for _ in range(3)}
    assert len(names) == 1
    assert next(iter(names)).startswith("daskinfer-device")


def test_the_thread_starts_when_it_is_needed() -> None:
    """Until it has something to run, no thread is started."""
    before = threading.active_count()
    DeviceThread()
    assert threading.active_count() == before


def test_one_at_a_time(busy: Busy) -> None:
    """No function starts before the previous one has ended."""
    computing: list[int] = []
    most: list[int] = []

    def compute() -> None:
        computing.append(1)
        most.append(len(computing))
        computing.pop()

    waiting = [busy.add(compute) for _ in range(5)]
    assert not most
    busy.go.set()
    assert [future.result()[0] for future in waiting] == [None] * 5
    assert most == [1] * 5


def test_first_come_first_served(busy: Busy) -> None:
    """Functions run in the order in which they are submitted."""
    order: list[int] = []
    waiting = [busy.add(lambda i=i: order.append(i)) for i in range(6)]
    busy.go.set()
    for future in waiting:
        future.result()
    assert order == list(range(6))


def test_errors_come_back(thread: DeviceThread) -> None:
    """An error is raised in the caller, and the next function runs all the same."""
    with pytest.raises(ZeroDivisionError, match="division"):
        thread.run(lambda: 1 / 0, NEVER)
    assert thread.run(lambda: "well", NEVER)[0] == "well"


def test_an_idle_device_has_waited(thread: DeviceThread) -> None:
    """Time in which a task had arrived and nothing was computed counts."""
    thread.run(int, NEVER)
    assert thread.run(int, ALWAYS)[1] > 0


def test_a_device_does_not_wait_for_a_task_that_has_not_arrived(thread: DeviceThread) -> None:
    """Time before a task arrived at the worker does not count."""
    assert thread.run(int, NEVER)[1] == 0


def test_a_busy_device_has_not_waited(busy: Busy) -> None:
    """Time in which another task was computed does not count, even if that failed."""
    failing = busy.add(lambda: 1 / 0)
    second = busy.add(time.perf_counter, arrived_at=ALWAYS)
    busy.go.set()
    (ended, _), (began, waited) = busy.first.result(), second.result()
    assert isinstance(failing.exception(), ZeroDivisionError)
    assert 0 <= waited <= began - ended


def test_each_worker_has_its_own() -> None:
    """Workers in one process have one device thread each, and keep it."""
    first, second = device_thread.get_device_thread("tcp://a"), device_thread.get_device_thread("tcp://b")
    try:
        assert first is not second
        assert device_thread.get_device_thread("tcp://a") is first
    finally:
        device_thread.close_device_thread("tcp://a")
        device_thread.close_device_thread("tcp://b")


def test_a_worker_gets_a_new_thread_after_close() -> None:
    """A worker whose thread was closed gets a new one; closing a worker without a thread does nothing."""
    first = device_thread.get_device_thread("tcp://a")
    name = first.run(threading.current_thread, NEVER)[0]
    device_thread.close_device_thread("tcp://a")
    device_thread.close_device_thread("tcp://a")
    wait_until(lambda: not name.is_alive())
    assert device_thread.get_device_thread("tcp://a").run(int, NEVER)[0] == 0
    device_thread.close_device_thread("tcp://a")


def test_close_runs_what_is_queued(busy: Busy) -> None:
    """Functions in the queue of a device thread that is closed are still run."""
    waiting = busy.add(lambda: "done")
    busy.thread.close()
    busy.go.set()
    assert waiting.result()[0] == "done"
