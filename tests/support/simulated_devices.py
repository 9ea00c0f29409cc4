"""Devices that run the tasks of a balancer in simulated time."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from daskinfer.core.chunks import Chunk
from daskinfer.scheduling.balancer import DynamicBalancer, LoadBalancer

WINDOW = 3  # tasks in flight per device, as in the task window
LATENCY = 0.003  # seconds of overhead per task
IDEAL = 20.0  # seconds of a job that is divided without loss

Task = tuple[Chunk, ...]


@dataclass
class Devices:
    """Devices that run their tasks one after the other, each at its speed, in simulated seconds."""

    speeds: Sequence[float]  # rows/s
    slow: tuple[int, float, float] = (-1, 0.0, 1.0)  # (device, second from which it is slower, factor)
    noise: float = 0.0  # standard deviation of a task's rows/s, relative
    load_seconds: float = 0.0  # of a device's first task
    seed: int = 0
    n_computed: float = field(default=0.0, init=False)  # rows computed, noise included

    def run(self, balancer: LoadBalancer) -> float:
        """Run all tasks of a balancer through a window per device; return the second when the last one ended."""
        rng, now = random.Random(self.seed), 0.0
        queues: list[list[Task]] = [[] for _ in self.speeds]
        running: list[tuple[float, int, float]] = []
        cold = set(range(len(self.speeds)))
        while True:
            for device, queue in enumerate(queues):
                while len(queue) < WINDOW and (task := balancer.next_task(device)):
                    queue.append(task)
            for device in {d for d, queue in enumerate(queues) if queue} - {d for _, d, _ in running}:
                begin = now + LATENCY + self.load_seconds * (device in cold)
                cold.discard(device)
                rows = sum(c.n_rows for c in queues[device][0]) * max(0.1, rng.gauss(1.0, self.noise))
                self.n_computed += rows
                heapq.heappush(running, (self._end(device, begin, rows), device, now))
            if not running:
                return now
            now, device, started = heapq.heappop(running)
            balancer.record(device, queues[device].pop(0), now - started)

    def _end(self, device: int, begin: float, rows: float) -> float:
        speed, (slow, since, times) = self.speeds[device], self.slow
        if device != slow or begin + rows / speed <= since:
            return begin + rows / speed
        before = max(0.0, since - begin) * speed
        return max(begin, since) + (rows - before) / (speed / times)

    def ideal(self) -> float:
        """Return the seconds for the computed rows if all devices finish together and tasks have no overhead."""
        total, (slow, since, times) = sum(self.speeds), self.slow
        if slow < 0 or self.n_computed <= since * total:
            return self.n_computed / total
        return since + (self.n_computed - since * total) / (total - self.speeds[slow] * (1 - 1 / times))


class RecordingBalancer:
    """Any balancer, with a record of what it assigned."""

    def __init__(self, balancer: LoadBalancer) -> None:
        self._balancer, self.n_rows_left = balancer, balancer.n_rows_left
        self.tasks: list[Task] = []
        self.assigned: list[tuple[Chunk, int]] = []  # each chunk with its device

    @property
    def speeds(self) -> tuple[float | None, ...]:
        return self._balancer.speeds

    @property
    def n_unassigned(self) -> int:
        """Rows that the balancer has not assigned yet, by its own count."""
        return self._balancer.n_rows_left

    @property
    def chunks(self) -> list[Chunk]:
        """All chunks, in the order in which they were assigned."""
        return [chunk for task in self.tasks for chunk in task]

    def next_task(self, device: int, row_limit: int | None = None) -> Task:
        task = self._balancer.next_task(device, row_limit)
        self.tasks += [task] if task else []
        self.assigned += [(chunk, device) for chunk in task]
        return task

    def record(self, device: int, chunks: Sequence[Chunk], seconds: float) -> None:
        self._balancer.record(device, chunks, seconds)


def make_grid(speeds: Sequence[float], cell_seconds: float = 0.1, seconds: float = IDEAL) -> DynamicBalancer:
    """Make a job for these devices, with equal priors; a cell takes the slowest device ``cell_seconds``."""
    cell_rows = max(1, round(min(speeds) * cell_seconds))
    return DynamicBalancer.from_grid(round(sum(speeds) * seconds), cell_rows, [1.0] * len(speeds))


def measure_all(balancer: LoadBalancer, rows_per_second: Sequence[float]) -> None:
    """Finish a first task on every device, so that all speeds are measured."""
    for device, task in [(device, balancer.next_task(device)) for device in range(len(rows_per_second))]:
        balancer.record(device, task, sum(c.n_rows for c in task) / rows_per_second[device])


def fill_slots(balancer: LoadBalancer, devices: Sequence[int], row_limit: int | None, queues: dict[int, list[Task]]) -> None:
    """Fill every device's window, as the task window does, until the balancer returns nothing."""
    for device in devices:
        while len(queues[device]) < WINDOW and (task := balancer.next_task(device, row_limit)):
            assert row_limit is None or all(c.start < row_limit for c in task if c.n_rows)
            assert row_limit is None or task[0].start < row_limit
            queues[device].append(task)


def drain(balancer: LoadBalancer, n_devices: int, data: st.DataObject, look_ahead: int | None) -> list[Task]:
    """Assign rows while tasks end in any order and take any time, until no device is busy; return the tasks."""
    queues: dict[int, list[Task]] = {device: [] for device in range(n_devices)}
    done: list[Task] = []
    seconds = st.sampled_from([0.0, 1e-4, 0.01, 0.3, 5.0])
    while True:
        first = min((c.start for queue in queues.values() for task in queue for c in task), default=None)
        n_in_order = sum(c.n_rows for task in done for c in task) if first is None else first
        row_limit = None if look_ahead is None else n_in_order + look_ahead
        fill_slots(balancer, data.draw(st.permutations(range(n_devices))), row_limit, queues)
        busy = [device for device, queue in queues.items() if queue]
        if not busy:
            return done
        device = data.draw(st.sampled_from(busy))
        done.append(queues[device].pop(0))
        balancer.record(device, done[-1], data.draw(seconds))


def drain_around(balancer: RecordingBalancer, n_devices: int, data: st.DataObject) -> None:
    """Assign rows while tasks end in any order, until no device is busy."""
    queues: dict[int, list[Task]] = {device: [] for device in range(n_devices)}
    while True:
        fill_slots(balancer, range(n_devices), None, queues)
        busy = [device for device, queue in queues.items() if queue]
        if not busy:
            return
        device = data.draw(st.sampled_from(busy))
        balancer.record(device, queues[device].pop(0), data.draw(st.sampled_from([1e-4, 0.3])))
