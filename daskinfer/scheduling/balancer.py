"""Who gets which rows next: numbers in, chunks out; no clock, no Dask and no device.

A *task* is what a worker is handed at once: one chunk, or several small ones. ``StaticBalancer`` deals what a layout says.
``DynamicBalancer`` cuts as it goes, by the speeds it is told: large tasks while much is left, ever smaller ones towards the end,
so that unlike devices finish together (guided self-scheduling; a task is a fraction of a share, as in factoring).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import inf
from typing import Protocol

from daskinfer.core.chunks import Chunk
from daskinfer.core.row_ranges import Ranges, subtract_ranges
from daskinfer.scheduling.chunking import CHUNK_NBYTES, ChunkLayout

MIN_TASK_SECONDS = 0.05  # a shorter task shows the scheduler's cost, 2 to 3 ms each; arbitrary
MAX_TASK_SECONDS = 0.5  # a longer one makes others wait at the end, or for an answer in order; arbitrary
MAX_CHUNKS_PER_TASK = 64  # chunks that are done again when the task's worker dies; arbitrary
SHARE_PER_TASK = 1 / 3  # of what is left to a device; in simulation up to 1 % faster than one half
PROBE_SHARE = 1 / 32  # of a device's even part of what is left: probes cost no time if it is 32 times slower; arbitrary
SPEED_DECAY = 0.7  # what a task still counts when the next one ended: a memory of about three tasks; arbitrary
MIN_ELAPSED_SECONDS = 1e-6  # the least that a task can have taken; arbitrary, keeps speeds finite
_UNASSIGNED = -1  # the device of a chunk before it is dealt

logger = logging.getLogger(__name__)


class LoadBalancer(Protocol):
    """Deals rows to devices, a task at a time.

    ``next_task`` is called for every device with a place free, in any order, and again for all of them after each ``record``.
    While rows are left and nothing is in flight, one of them gets a task. For a device that was given up ``next_task`` is
    called too, and those tasks are run elsewhere. A chunk without rows rides along with the one before it.
    """

    n_rows_left: int  # rows that are not dealt yet

    @property
    def speeds(self) -> tuple[float | None, ...]:
        """Measured rows per second of each device, mostly of its last tasks; None until one has ended there."""

    def next_task(self, device: int, row_limit: int | None = None) -> tuple[Chunk, ...]:
        """Chunks of the next task of a device; none for now if empty. None of them starts at row ``before`` or later."""

    def record(self, device: int, chunks: Sequence[Chunk], seconds: float) -> None:
        """Tell that a task ended on a device, maybe not the one it was dealt to, and the time spent on it alone."""

    def discard(self, chunk: Chunk) -> None:
        """Tell that a chunk was given up."""

    def remove_device(self, device: int) -> None:
        """Tell that a device is gone for good."""


class StaticBalancer:
    """Deals every device exactly its own chunks of a layout, in row order.

    Small chunks go together: a device's tasks double in chunks while one takes less than ``MIN_TASK_SECONDS``, up to
    ``MAX_CHUNKS_PER_TASK`` and ``chunk_nbytes``, and halve when one takes more than ``MAX_TASK_SECONDS``.

    Parameters
    ----------
    row_nbytes, chunk_nbytes
        Bytes that a row takes, input and output together, 0 for no limit by bytes, and bytes that a task may hold.
    n_devices
        Devices of the plan, those without a chunk included.
    done, whole
        Rows that need not be dealt, and whether a chunk that is done in part is dealt whole.

    Examples
    --------
    >>> from daskinfer.scheduling.chunking import lay_out
    >>> dealer = StaticBalancer(lay_out(40, [1.0, 1.0], batch_size=5), row_nbytes=4, n_devices=2)
    >>> first = dealer.next_task(0)
    >>> dealer.record(0, first, seconds=0.001)
    >>> first, [(chunk.start, chunk.stop) for chunk in dealer.next_task(0)], dealer.n_rows_left
    ((Chunk(index=0, start=0, stop=5, device=0),), [(10, 15), (20, 25)], 25)
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
        own = [list(_iter_device_chunks(layout, device, done, whole_chunks=whole_chunks)) for device in range(n_devices)]
        self.n_rows_left = sum(map(_count_rows, own))
        self._queues = [_ChunkQueue(iter(chunks)) for chunks in own]
        self._chunks_per_task = [1] * n_devices  # of the next task
        self._max_rows = _compute_max_rows(row_nbytes, chunk_nbytes)
        self._speed_estimates = [_SpeedEstimate() for _ in range(n_devices)]

    @property
    def speeds(self) -> tuple[float | None, ...]:
        return tuple(pace.speed for pace in self._speed_estimates)

    def next_task(self, device: int, row_limit: int | None = None) -> tuple[Chunk, ...]:
        task = self._queues[device].take(self._max_rows, row_limit, self._chunks_per_task[device])
        self.n_rows_left -= _count_rows(task)
        return task

    def record(self, device: int, chunks: Sequence[Chunk], seconds: float) -> None:
        self._speed_estimates[device].add_task(_count_rows(chunks), seconds)
        n_chunks = self._chunks_per_task[device]
        # Only a task of the present size says anything of it: the window may hold some that are smaller.
        if seconds < MIN_TASK_SECONDS and len(chunks) >= n_chunks:
            self._chunks_per_task[device] = min(2 * n_chunks, MAX_CHUNKS_PER_TASK)
        elif seconds > MAX_TASK_SECONDS:
            self._chunks_per_task[device] = max(1, min(n_chunks, len(chunks)) // 2)

    def discard(self, chunk: Chunk) -> None:
        """Nothing: what a device still has to do is what is in its queue."""

    def remove_device(self, device: int) -> None:
        """Nothing: its chunks are dealt as before, and run elsewhere."""


class DynamicBalancer:
    """Deals rows in row order to whoever has a place free, by measured speed: what ``device_weights="auto"`` means.

    How much a device gets is the first rule that matches:

    1. Its prior is 0, or nothing is left: nothing.
    2. The others would be done with all that is left before this device were with one grain: nothing for now, so that a
       slow device is not the last by more than it must.
    3. It is measured: ``SHARE_PER_TASK`` of what it would still do if all finished together, but ``MIN_TASK_SECONDS`` worth
       of rows at least; ``MAX_TASK_SECONDS`` worth, ``chunk_nbytes`` and twice its largest task so far at most.
    4. It has nothing in flight: a probe of one grain.
    5. All its probes, one more included, are at most ``PROBE_SHARE`` of its even part of what is left: another, so that
       it does not wait when the first ends. Else nothing for now: where grains are few, one too many is the last to end.

    A *grain* is a cell of the grid, where a task is one chunk of at least a cell, or the next of the given chunks, where
    a task is up to ``MAX_CHUNKS_PER_TASK``. A device not measured counts at its prior, scaled to the speeds known.

    Parameters
    ----------
    priors
        Relative speed of each device until it is measured; 0 leaves a device out.
    row_nbytes, chunk_nbytes
        Bytes that a row takes, 0 for no limit by bytes, and bytes that a task may hold.

    Examples
    --------
    >>> dealer = DynamicBalancer.from_grid(10_000, 10, [1.0, 1.0])
    >>> probe = dealer.next_task(1)
    >>> dealer.record(1, probe, seconds=0.01)
    >>> probe, dealer.next_task(1), dealer.speeds
    ((Chunk(index=0, start=0, stop=10, device=1),), (Chunk(index=1, start=10, stop=30, device=1),), (None, 1000.0))
    """

    def __init__(
        self, chunk_source: _RowGrid | _ChunkQueue, n_rows: int, priors: Sequence[float], *, max_rows: float
    ) -> None:
        self.n_rows_left, self._chunk_source, self._max_rows = n_rows, chunk_source, max_rows
        self._priors = list(priors)
        self._active_devices = [device for device, prior in enumerate(priors) if prior]
        self._estimated_speeds = list(priors)  # rows/s, or in whatever unit the priors are while nothing is measured
        self._in_flight_rows = [0] * len(priors)  # rows
        self._largest_task_rows = [0] * len(priors)  # rows of the largest task that ended
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
    ) -> DynamicBalancer:
        """Cut ``n_rows`` rows at the cells of a regular grid; chunks are numbered as they are dealt."""
        limit = _compute_max_rows(row_nbytes, chunk_nbytes)
        return cls(_RowGrid(n_rows, cell_rows, done), _count_rows_left(n_rows, done), priors, max_rows=limit)

    @classmethod
    def from_chunks(
        cls,
        row_chunks: Sequence[int],
        priors: Sequence[float],
        *,
        row_nbytes: int = 0,
        chunk_nbytes: int = CHUNK_NBYTES,
        done: Ranges = (),
    ) -> DynamicBalancer:
        """Deal chunks that are cut already, of these many rows each, whole: one that is done in part is done again."""
        ends = pairwise(accumulate(row_chunks, initial=0))
        chunks = [Chunk(index, start, stop, _UNASSIGNED) for index, (start, stop) in enumerate(ends)]
        left = [chunk for chunk in chunks if not chunk.n_rows or any(subtract_ranges((chunk.start, chunk.stop), done))]
        return cls(_ChunkQueue(iter(left)), _count_rows(left), priors, max_rows=_compute_max_rows(row_nbytes, chunk_nbytes))

    @property
    def speeds(self) -> tuple[float | None, ...]:
        return tuple(pace.speed for pace in self._speed_estimates)

    def next_task(self, device: int, row_limit: int | None = None) -> tuple[Chunk, ...]:
        rule, allowed = self._choose_task_rows(device)
        dealt = () if allowed is None else self._chunk_source.take(allowed, row_limit)
        n_rows = _count_rows(dealt)
        self.n_rows_left -= n_rows
        self._in_flight_rows[device] += n_rows
        logger.debug("device %d gets %d rows by rule %d; %d are left", device, n_rows, rule, self.n_rows_left)
        return tuple(replace(chunk, device_index=device) for chunk in dealt)

    def record(self, device: int, chunks: Sequence[Chunk], seconds: float) -> None:
        for chunk in chunks:
            self._in_flight_rows[chunk.device_index] -= chunk.n_rows
        self._largest_task_rows[device] = max(self._largest_task_rows[device], _count_rows(chunks))
        self._speed_estimates[device].add_task(_count_rows(chunks), seconds)
        self._estimated_speeds = _estimate_speeds(self.speeds, self._priors)

    def discard(self, chunk: Chunk) -> None:
        self._in_flight_rows[chunk.device_index] -= chunk.n_rows

    def remove_device(self, device: int) -> None:
        self.set_weight(device, 0.0)

    def set_weight(self, device: int, weight: float) -> None:
        """Let a device join, or with a prior of 0 leave; what it has in flight is still its own."""
        self._priors[device] = weight
        self._active_devices = [device for device, prior in enumerate(self._priors) if prior]
        self._estimated_speeds = _estimate_speeds(self.speeds, self._priors)

    def seed_speed(self, device: int, speed: float) -> None:
        """Take a device's speed in rows/s from an earlier run, so that it needs no probe."""
        self._speed_estimates[device] = _SpeedEstimate(n_tasks=2, rows=speed * MIN_TASK_SECONDS, seconds=MIN_TASK_SECONDS)
        self._largest_task_rows[device] = max(1, int(speed * MAX_TASK_SECONDS))
        self._estimated_speeds = _estimate_speeds(self.speeds, self._priors)

    def _choose_task_rows(self, device: int) -> tuple[int, int | None]:
        """Apply the ladder: the rule's number, and the rows that the device may get; None for nothing."""
        grain, in_flight = self._chunk_source.peek_n_rows(), self._in_flight_rows[device]
        if grain is None or not self._priors[device]:
            return 1, None
        if self._should_leave_to_others(device, grain):
            return 2, None
        if self.speeds[device] is not None:
            return 3, self._compute_task_rows(device)
        if not in_flight:
            return 4, grain
        lossless = in_flight + grain <= PROBE_SHARE * self.n_rows_left / len(self._active_devices)
        return 5, grain if lossless else None

    def _should_leave_to_others(self, device: int, min_task_rows: int) -> bool:
        others = [other for other in self._active_devices if other != device]
        # A grain is not shared: somebody has to do it whole, and whoever would be the first to do so is not refused.
        soonest = min((self._estimate_end_seconds(other, min_task_rows) for other in others), default=inf)
        return self._estimate_end_seconds(device, min_task_rows) > max(soonest, self._estimate_joint_end_seconds(others))

    def _compute_task_rows(self, device: int) -> int:
        speed = self._estimated_speeds[device]
        share = speed * self._estimate_joint_end_seconds(self._active_devices) - self._in_flight_rows[device]
        wanted = min(max(share * SHARE_PER_TASK, speed * MIN_TASK_SECONDS), speed * MAX_TASK_SECONDS)
        return int(min(wanted, self._max_rows, 2 * self._largest_task_rows[device]))

    def _estimate_end_seconds(self, device: int, n_rows: int) -> float:
        """Seconds until a device has done what is in flight there and ``n_rows`` more."""
        return (self._in_flight_rows[device] + n_rows) / self._estimated_speeds[device]

    def _estimate_joint_end_seconds(self, devices: Sequence[int]) -> float:
        """Seconds until these devices have done what is left, those that are through first taking more of it."""
        n_rows, speed, end = self.n_rows_left, 0.0, inf
        for device in sorted(devices, key=lambda d: self._estimate_end_seconds(d, 0)):
            n_rows += self._in_flight_rows[device]
            speed += self._estimated_speeds[device]
            end = min(end, n_rows / speed)  # it rises again with devices that are busy for longer anyway
        return end


@dataclass(slots=True)
class _SpeedEstimate:
    """A device's speed: rows over seconds of its tasks, the recent ones counting most."""

    n_tasks: int = 0
    rows: float = 0.0
    seconds: float = 0.0

    def add_task(self, n_rows: int, seconds: float) -> None:
        # The first task bears the network's loading and warming up: it counts only until there is a second.
        memory = SPEED_DECAY if self.n_tasks > 1 else 0.0
        if n_rows:
            self.n_tasks += 1
            self.rows = memory * self.rows + n_rows
            self.seconds = memory * self.seconds + max(seconds, MIN_ELAPSED_SECONDS)

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
        """As many chunks as these limits allow; the first one with rows, and those without, whatever their number."""
        task: list[Chunk] = []
        taken = 0
        while front := self._front:
            full = taken and (len(task) >= max_chunks or taken + front.n_rows > max_rows)
            ahead = row_limit is not None and front.start >= row_limit
            if (full or ahead) and (front.n_rows or not task):
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
        if row_limit is not None and self._start >= row_limit:
            return ()
        n_cells = max(1, max_rows // self._cell_rows)
        chunk = Chunk(self._n_chunks_cut, self._start, min(self._start + n_cells * self._cell_rows, self._stop), _UNASSIGNED)
        self._n_chunks_cut, self._start = self._n_chunks_cut + 1, chunk.stop
        if self._start == self._stop:
            self._start, self._stop = next(self._remaining_ranges, (0, 0))
        return (chunk,)


def _estimate_speeds(speeds: Sequence[float | None], priors: Sequence[float]) -> list[float]:
    """Rows/s of every device: measured, or its prior scaled to those measured; 0 for one that is left out."""
    known = [(speed, prior) for speed, prior in zip(speeds, priors, strict=True) if speed and prior]
    scale = sum(speed for speed, _ in known) / sum(prior for _, prior in known) if known else 1.0
    return [prior and (speed or prior * scale) for speed, prior in zip(speeds, priors, strict=True)]


def _iter_device_chunks(layout: ChunkLayout, device: int, done: Ranges, *, whole_chunks: bool) -> Iterator[Chunk]:
    """A device's chunks, or what is left of them; ``whole``: a chunk that is done in part is done again."""
    for chunk in layout.chunks:
        if chunk.device_index == device:
            rows = (chunk.start, chunk.stop)
            left = list(subtract_ranges(rows, done))
            pieces = [rows] if not chunk.n_rows or (whole_chunks and left) else left
            yield from (replace(chunk, start=start, stop=stop) for start, stop in pieces)


def _count_rows(chunks: Sequence[Chunk]) -> int:
    return sum(chunk.n_rows for chunk in chunks)


def _count_rows_left(n_rows: int, done: Ranges) -> int:
    return n_rows - sum(stop - start for start, stop in done)


def _compute_max_rows(row_nbytes: int, chunk_nbytes: int) -> float:
    return chunk_nbytes // row_nbytes if row_nbytes else inf
