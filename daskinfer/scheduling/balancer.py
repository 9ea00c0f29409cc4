"""Load balancing: which device gets which rows next; numbers in, chunks out, no clock, no Dask and no device.

A *task* is what a worker gets at once: one chunk, or several small ones. ``StaticBalancer`` assigns what a layout says.
``DynamicBalancer`` cuts tasks by the measured speeds: large ones at first, ever smaller ones towards the end, so that
devices of unequal speed finish together (guided self-scheduling; a task is a fraction of a share, as in factoring).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf
from typing import Protocol

from daskinfer.core.chunks import Chunk
from daskinfer.core.row_ranges import Ranges, subtract_ranges
from daskinfer.scheduling.chunking import CHUNK_NBYTES, ChunkLayout

MIN_TASK_SECONDS = 0.05  # in shorter tasks the scheduler's cost shows, 2 to 3 ms each; arbitrary
MAX_TASK_SECONDS = 0.5  # longer tasks make others wait at the end, or for results in order; arbitrary
MAX_CHUNKS_PER_TASK = 64  # so many chunks run again if the task's worker dies; arbitrary
SHARE_PER_TASK = 1 / 3  # of a device's remaining share; in simulation up to 1 % faster than one half
PROBE_SHARE = 1 / 32  # of an even share of the remaining rows: costs no time on a device 32 times slower; arbitrary
SPEED_DECAY = 0.7  # weight that a task keeps when the next one ends: about three tasks count; arbitrary
MIN_ELAPSED_SECONDS = 1e-6  # lower bound on the time of a task; arbitrary, keeps speeds finite

logger = logging.getLogger(__name__)


class LoadBalancer(Protocol):
    """Assigns rows to devices, one task at a time.

    ``next_task`` is called for every device with a free slot, in any order, and again for all of them after each ``record``.
    While rows remain and nothing is in flight, at least one of these calls returns a task. It is also called for a device
    that was lost, whose tasks run elsewhere. A chunk without rows goes into the task of the chunk before it.
    """

    n_rows_left: int  # rows that are not assigned yet

    @property
    def speeds(self) -> tuple[float | None, ...]:
        """Measured rows per second of each device, mostly in its last tasks; None until one has ended there."""

    def next_task(self, device: int, row_limit: int | None = None) -> tuple[Chunk, ...]:
        """Return the chunks of a device's next task, empty for now if none; none starts at ``row_limit`` or later."""

    def record(self, device: int, chunks: Sequence[Chunk], seconds: float) -> None:
        """Record that a task ended on a device, maybe not the assigned one, and the seconds spent on it alone."""

    def discard(self, chunk: Chunk) -> None:
        """Record that a chunk was given up."""

    def remove_device(self, device: int) -> None:
        """Record that a device is lost for good."""


class StaticBalancer:
    """Assigns every device exactly its own chunks of a layout, in row order.

    Small chunks share a task: the chunks in a device's task double while a task takes less than ``MIN_TASK_SECONDS``, up to
    ``MAX_CHUNKS_PER_TASK`` and ``chunk_nbytes``, and halve if one takes more than ``MAX_TASK_SECONDS``.

    Parameters
    ----------
    layout
        The chunks, and the device of each.
    row_nbytes, chunk_nbytes
        Bytes that a row takes, input and output together, 0 for no limit by bytes; and bytes that a task may hold.
    n_devices
        Devices of the plan, including those without a chunk.
    done, whole_chunks
        Rows that are done already, and whether a chunk that is done in part is computed again as a whole.

    Examples
    --------
    >>> from daskinfer.scheduling.chunking import make_chunks
    >>> balancer = StaticBalancer(make_chunks(40, [1.0, 1.0], batch_size=5), row_nbytes=4, n_devices=2)
    >>> first = balancer.next_task(0)
    >>> balancer.record(0, first, seconds=0.001)
    >>> first, [(chunk.start, chunk.stop) for chunk in balancer.next_task(0)], balancer.n_rows_left
    ((Chunk(index=0, start=0, stop=5),), [(10, 15), (20, 25)], 25)
    """

    def __init__(
        self,
        layout: ChunkLayout,
        row_nbytes: int,
        *,
        n_devices: int,
        chunk_nbytes: int = CHUNK_NBYTES,
        done: Ranges = (),
        whole_chunks: bool = False,
    ) -> None:
        by_device: list[list[Chunk]] = [[] for _ in range(n_devices)]
        for chunk, device in zip(layout.chunks, layout.devices, strict=True):
            by_device[device].extend(_iter_remaining(chunk, done, whole_chunks=whole_chunks))
        self.n_rows_left = sum(map(_count_rows, by_device))
        self._queues = [_ChunkQueue(iter(chunks)) for chunks in by_device]
        self._chunks_per_task = [1] * n_devices  # of the next task
        self._max_rows = _compute_max_rows(row_nbytes, chunk_nbytes)
        self._speed_estimates = [_SpeedEstimate() for _ in range(n_devices)]

    @property
    def speeds(self) -> tuple[float | None, ...]:
        return tuple(estimate.speed for estimate in self._speed_estimates)

    def next_task(self, device: int, row_limit: int | None = None) -> tuple[Chunk, ...]:
        task = self._queues[device].take(self._max_rows, row_limit, self._chunks_per_task[device])
        self.n_rows_left -= _count_rows(task)
        return task

    def record(self, device: int, chunks: Sequence[Chunk], seconds: float) -> None:
        self._speed_estimates[device].add_task(_count_rows(chunks), seconds)
        n_chunks = self._chunks_per_task[device]
        # Only a task of the current size tells whether it is too short: the window may still hold smaller ones.
        if seconds < MIN_TASK_SECONDS and len(chunks) >= n_chunks:
            self._chunks_per_task[device] = min(2 * n_chunks, MAX_CHUNKS_PER_TASK)
        elif seconds > MAX_TASK_SECONDS:
            self._chunks_per_task[device] = max(1, min(n_chunks, len(chunks)) // 2)

    def discard(self, chunk: Chunk) -> None:
        """Do nothing: a device's remaining work is what is in its queue."""

    def remove_device(self, device: int) -> None:
        """Do nothing: its chunks are still assigned to it, and run elsewhere."""


class DynamicBalancer:
    """Assigns rows in row order to any device with a free slot, by measured speed: the meaning of ``device_weights="auto"``.

    The first rule that matches says how much a device gets:

    1. Its prior is 0, or no rows remain: nothing.
    2. The other devices would finish all remaining rows before this one finished a single grain: nothing for now, so that a
       slow device is not the last one by more than it must be.
    3. Its speed is measured: ``share_per_task`` of what it would still do if all devices finished together, at least
       ``MIN_TASK_SECONDS`` worth of rows; at most ``MAX_TASK_SECONDS`` worth, ``chunk_nbytes``, and twice its largest task
       so far.
    4. It has nothing in flight: a probe of one grain.
    5. All its probes, including one more, are at most ``PROBE_SHARE`` of its even share of the remaining rows: another
       probe, so that it does not wait when the first one ends. Otherwise nothing for now: if grains are few, one too many
       is the last to end.

    On a grid a *grain* is one cell, and a task is one chunk of at least a cell. With chunks that are cut already a grain is
    the next chunk, and a task is up to ``MAX_CHUNKS_PER_TASK`` of them. A device that is not measured counts with its
    prior, scaled to the measured speeds. A chunk may run on another device than the one that it was assigned to; while it
    is in flight, it counts as work of the latter.

    Parameters
    ----------
    chunk_source, n_rows
        What tasks are taken from (see :meth:`from_grid` and :meth:`from_chunks`), and its rows.
    priors
        Relative speed of each device until it is measured; 0 leaves a device out.
    max_rows
        Rows that a task may hold.
    share_per_task
        Fraction of a device's share of the remaining rows that a task takes; 1.0 for a device that is alone, and computes
        one task at a time: there is no other to finish together with.

    Examples
    --------
    >>> balancer = DynamicBalancer.from_grid(10_000, 10, [1.0, 1.0])
    >>> probe = balancer.next_task(1)
    >>> balancer.record(1, probe, seconds=0.01)
    >>> probe, balancer.next_task(1), balancer.speeds
    ((Chunk(index=0, start=0, stop=10),), (Chunk(index=1, start=10, stop=30),), (None, 1000.0))
    """

    def __init__(
        self,
        chunk_source: _RowGrid | _ChunkQueue,
        n_rows: int,
        priors: Sequence[float],
        *,
        max_rows: float,
        share_per_task: float = SHARE_PER_TASK,
    ) -> None:
        self.n_rows_left, self._chunk_source, self._max_rows = n_rows, chunk_source, max_rows
        self._share_per_task = share_per_task
        self._priors = list(priors)
        self._active_devices = [device for device, prior in enumerate(priors) if prior]
        self._estimated_speeds = list(priors)  # rows/s; in the unit of the priors while nothing is measured
        self._in_flight_rows = [0] * len(priors)
        self._assigned_devices: dict[int, int] = {}  # by chunk index, of chunks in flight that have rows
        self._largest_task_rows = [0] * len(priors)  # of the largest task that ended
        self._speed_estimates = [_SpeedEstimate() for _ in priors]

    @classmethod
    def from_grid(
        cls,
        n_rows: int,
        cell_rows: int,
        priors: Sequence[float],
        *,
        row_nbytes: int = 0,
        chunk_nbytes: int = CHUNK_NBYTES,
        done: Ranges = (),
        share_per_task: float = SHARE_PER_TASK,
    ) -> DynamicBalancer:
        """Cut ``n_rows`` rows at the cells of a regular grid; chunks are numbered as they are assigned.

        ``row_nbytes`` are the bytes of a row, 0 for no limit by bytes; ``chunk_nbytes`` are those that a task may hold. Rows
        in ``done`` are left out.
        """
        limit = _compute_max_rows(row_nbytes, chunk_nbytes)
        return cls(
            _RowGrid(n_rows, cell_rows, done),
            _count_rows_left(n_rows, done),
            priors,
            max_rows=limit,
            share_per_task=share_per_task,
        )

    @classmethod
    def from_chunks(
        cls,
        row_chunks: Sequence[int],
        priors: Sequence[float],
        *,
        row_nbytes: int = 0,
        chunk_nbytes: int = CHUNK_NBYTES,
        done: Ranges = (),
        share_per_task: float = SHARE_PER_TASK,
    ) -> DynamicBalancer:
        """Assign chunks that are cut already, of ``row_chunks`` rows each; one ``done`` only in part is computed again."""
        ends = pairwise(accumulate(row_chunks, initial=0))
        chunks = [Chunk(index, start, stop) for index, (start, stop) in enumerate(ends)]
        remaining = [c for c in chunks if not c.n_rows or any(subtract_ranges((c.start, c.stop), done))]
        limit = _compute_max_rows(row_nbytes, chunk_nbytes)
        return cls(
            _ChunkQueue(iter(remaining)), _count_rows(remaining), priors, max_rows=limit, share_per_task=share_per_task
        )

    @property
    def speeds(self) -> tuple[float | None, ...]:
        return tuple(estimate.speed for estimate in self._speed_estimates)

    def next_task(self, device: int, row_limit: int | None = None) -> tuple[Chunk, ...]:
        rule, max_rows = self._choose_task_rows(device)
        task = () if max_rows is None else self._chunk_source.take(max_rows, row_limit)
        n_rows = _count_rows(task)
        self.n_rows_left -= n_rows
        self._in_flight_rows[device] += n_rows
        logger.debug("rule %d: device %d gets %d rows, %d remain", rule, device, n_rows, self.n_rows_left)
        self._assigned_devices.update((chunk.index, device) for chunk in task if chunk.stop > chunk.start)
        return task

    def record(self, device: int, chunks: Sequence[Chunk], seconds: float) -> None:
        for chunk in chunks:
            self.discard(chunk)
        self._largest_task_rows[device] = max(self._largest_task_rows[device], _count_rows(chunks))
        self._speed_estimates[device].add_task(_count_rows(chunks), seconds)
        self._estimated_speeds = _estimate_speeds(self.speeds, self._priors)

    def discard(self, chunk: Chunk) -> None:
        if n_rows := chunk.n_rows:
            self._in_flight_rows[self._assigned_devices.pop(chunk.index)] -= n_rows

    def remove_device(self, device: int) -> None:
        self.set_weight(device, 0.0)

    def set_weight(self, device: int, weight: float) -> None:
        """Change a device's prior: it joins, or leaves with 0; what it has in flight still counts as its own."""
        self._priors[device] = weight
        self._active_devices = [device for device, prior in enumerate(self._priors) if prior]
        self._estimated_speeds = _estimate_speeds(self.speeds, self._priors)

    def seed_speed(self, device: int, speed: float) -> None:
        """Set a device's speed in rows/s, measured in an earlier run, so that it needs no probe."""
        self._speed_estimates[device] = _SpeedEstimate(n_tasks=2, rows=speed * MIN_TASK_SECONDS, seconds=MIN_TASK_SECONDS)
        self._largest_task_rows[device] = max(1, int(speed * MAX_TASK_SECONDS))
        self._estimated_speeds = _estimate_speeds(self.speeds, self._priors)

    def _choose_task_rows(self, device: int) -> tuple[int, int | None]:
        """Apply the rules of the class; return the rule's number, and the most rows for the device, None for nothing."""
        grain, in_flight = self._chunk_source.peek_n_rows(), self._in_flight_rows[device]
        if grain is None or not self._priors[device]:
            return 1, None
        if self._should_leave_to_others(device, grain):
            return 2, None
        if self.speeds[device] is not None:
            return 3, self._compute_task_rows(device)
        if not in_flight:
            return 4, grain
        is_cheap = in_flight + grain <= PROBE_SHARE * self.n_rows_left / len(self._active_devices)
        return 5, grain if is_cheap else None

    def _should_leave_to_others(self, device: int, min_task_rows: int) -> bool:
        """Whether the other devices would finish all remaining rows before this one finished a task of one grain."""
        others = [other for other in self._active_devices if other != device]
        # A grain is not divided: one device has to do it, and the one that would finish it first is not refused.
        soonest = min((self._estimate_end_seconds(other, min_task_rows) for other in others), default=inf)
        return self._estimate_end_seconds(device, min_task_rows) > max(soonest, self._estimate_joint_end_seconds(others))

    def _compute_task_rows(self, device: int) -> int:
        """Compute the rows of a measured device's next task (rule 3)."""
        speed = self._estimated_speeds[device]
        share = speed * self._estimate_joint_end_seconds(self._active_devices) - self._in_flight_rows[device]
        n_rows = min(max(share * self._share_per_task, speed * MIN_TASK_SECONDS), speed * MAX_TASK_SECONDS)
        return int(min(n_rows, self._max_rows, 2 * self._largest_task_rows[device]))

    def _estimate_end_seconds(self, device: int, n_rows: int) -> float:
        """Estimate the seconds until a device has finished what it has in flight and ``n_rows`` more."""
        return (self._in_flight_rows[device] + n_rows) / self._estimated_speeds[device]

    def _estimate_joint_end_seconds(self, devices: Sequence[int]) -> float:
        """Estimate the seconds until these devices have finished all remaining rows; those free first take more."""
        n_rows, speed, end = self.n_rows_left, 0.0, inf
        for device in sorted(devices, key=lambda d: self._estimate_end_seconds(d, 0)):
            n_rows += self._in_flight_rows[device]
            speed += self._estimated_speeds[device]
            end = min(end, n_rows / speed)  # devices that are busy for longer anyway would raise it again
        return end


@dataclass(slots=True)
class _SpeedEstimate:
    """A device's speed: rows over seconds of its tasks, in which recent ones count most."""

    n_tasks: int = 0
    rows: float = 0.0
    seconds: float = 0.0

    def add_task(self, n_rows: int, seconds: float) -> None:
        # The first task includes loading and warming up the model: it counts only until there is a second.
        decay = SPEED_DECAY if self.n_tasks > 1 else 0.0
        if n_rows:
            self.n_tasks += 1
            self.rows = decay * self.rows + n_rows
            self.seconds = decay * self.seconds + max(seconds, MIN_ELAPSED_SECONDS)

    @property
    def speed(self) -> float | None:
        return self.rows / self.seconds if self.n_tasks else None


class _ChunkQueue:
    """Chunks in row order, taken from the front."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._chunks, self._front = chunks, next(chunks, None)

    def peek_n_rows(self) -> int | None:
        return self._front.n_rows if self._front else None

    def take(self, max_rows: float, row_limit: int | None, max_chunks: int = MAX_CHUNKS_PER_TASK) -> tuple[Chunk, ...]:
        """Take as many chunks as the limits allow, but one with rows at least; those without rows do not count."""
        task: list[Chunk] = []
        taken = 0
        while front := self._front:
            is_full = taken and (len(task) >= max_chunks or taken + front.n_rows > max_rows)
            is_ahead = row_limit is not None and front.start >= row_limit
            if (is_full or is_ahead) and (front.n_rows or not task):
                break
            task.append(front)
            taken += front.n_rows
            self._front = next(self._chunks, None)
        return tuple(task)


class _RowGrid:
    """Rows on a regular grid, cut into chunks of whole cells from the front, around those that are done."""

    def __init__(self, n_rows: int, cell_rows: int, done: Ranges) -> None:
        self._cell_rows, self._n_chunks_cut = cell_rows, 0
        self._remaining_ranges = subtract_ranges((0, n_rows), done)
        self._start, self._stop = next(self._remaining_ranges, (0, 0))

    def peek_n_rows(self) -> int | None:
        return min(self._cell_rows, self._stop - self._start) or None

    def take(self, max_rows: int, row_limit: int | None) -> tuple[Chunk, ...]:
        """Cut one chunk of at most ``max_rows``, but of one cell at least; none at ``row_limit`` or later."""
        if row_limit is not None and self._start >= row_limit:
            return ()
        n_cells = max(1, max_rows // self._cell_rows)
        chunk = Chunk(self._n_chunks_cut, self._start, min(self._start + n_cells * self._cell_rows, self._stop))
        self._n_chunks_cut, self._start = self._n_chunks_cut + 1, chunk.stop
        if self._start == self._stop:
            self._start, self._stop = next(self._remaining_ranges, (0, 0))
        return (chunk,)


def _estimate_speeds(speeds: Sequence[float | None], priors: Sequence[float]) -> list[float]:
    """Estimate rows/s of every device: measured, or its prior scaled to those measured; 0 for one that is left out."""
    measured = [(speed, prior) for speed, prior in zip(speeds, priors, strict=True) if speed and prior]
    scale = sum(speed for speed, _ in measured) / sum(prior for _, prior in measured) if measured else 1.0
    return [prior and (speed or prior * scale) for speed, prior in zip(speeds, priors, strict=True)]


def _iter_remaining(chunk: Chunk, done: Ranges, *, whole_chunks: bool) -> Iterator[Chunk]:
    """Yield the pieces of a chunk that are not done; ``whole_chunks``: all of it if any of it is not done."""
    rows = (chunk.start, chunk.stop)
    remaining = list(subtract_ranges(rows, done))
    pieces = [rows] if not chunk.n_rows or (whole_chunks and remaining) else remaining
    yield from (Chunk(chunk.index, start, stop) for start, stop in pieces)


def _count_rows(chunks: Sequence[Chunk]) -> int:
    return sum(chunk.stop - chunk.start for chunk in chunks)


def _count_rows_left(n_rows: int, done: Ranges) -> int:
    return n_rows - sum(stop - start for start, stop in done)


def _compute_max_rows(row_nbytes: int, chunk_nbytes: int) -> float:
    return chunk_nbytes // row_nbytes if row_nbytes else inf
