"""Who gets which rows next: numbers in, chunks out; no clock, no Dask and no device.

A *task* is what a worker is handed at once: one chunk, or several small ones. ``Planned`` deals what a layout says.
``Balanced`` cuts as it goes, by the speeds it is told: large tasks while much is left, ever smaller ones towards the end,
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
from daskinfer.core.row_ranges import Ranges, left_over
from daskinfer.scheduling.chunking import CHUNK_NBYTES, Layout

TASK_SECONDS = 0.05  # a shorter task shows the scheduler's cost, 2 to 3 ms each; arbitrary
MAX_TASK_SECONDS = 0.5  # a longer one makes others wait at the end, or for an answer in order; arbitrary
MAX_CHUNKS_PER_TASK = 64  # chunks that are done again when the task's worker dies; arbitrary
SHARE_PER_TASK = 1 / 3  # of what is left to a device; in simulation up to 1 % faster than one half
PROBE_SHARE = 1 / 32  # of a device's even part of what is left: probes cost no time if it is 32 times slower; arbitrary
MEMORY = 0.7  # what a task still counts when the next one ended: a memory of about three tasks; arbitrary
TIMER_SECONDS = 1e-6  # the least that a task can have taken; arbitrary, keeps speeds finite
_UNDEALT = -1  # the device of a chunk before it is dealt

_logger = logging.getLogger(__name__)


class Dealer(Protocol):
    """Deals rows to devices, a task at a time.

    ``deal`` is called for every device with a place free, in any order, and again for all of them after each ``took``.
    While rows are left and nothing is in flight, one of them gets a task. For a device that was given up ``deal`` is
    called too, and those tasks are run elsewhere. A chunk without rows rides along with the one before it.
    """

    n_rows_left: int  # rows that are not dealt yet

    @property
    def speeds(self) -> tuple[float | None, ...]:
        """Measured rows per second of each device, mostly of its last tasks; None until one has ended there."""

    def deal(self, device: int, before: int | None = None) -> tuple[Chunk, ...]:
        """Chunks of the next task of a device; none for now if empty. None of them starts at row ``before`` or later."""

    def took(self, device: int, chunks: Sequence[Chunk], seconds: float) -> None:
        """Tell that a task ended on a device, maybe not the one it was dealt to, and the time spent on it alone."""

    def dropped(self, chunk: Chunk) -> None:
        """Tell that a chunk was given up."""

    def leave(self, device: int) -> None:
        """Tell that a device is gone for good."""


class Planned:
    """Deals every device exactly its own chunks of a layout, in row order.

    Small chunks go together: a device's tasks double in chunks while one takes less than ``TASK_SECONDS``, up to
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
    >>> dealer = Planned(lay_out(40, [1.0, 1.0], batch_size=5), row_nbytes=4, n_devices=2)
    >>> first = dealer.deal(0)
    >>> dealer.took(0, first, seconds=0.001)
    >>> first, [(chunk.start, chunk.stop) for chunk in dealer.deal(0)], dealer.n_rows_left
    ((Chunk(index=0, start=0, stop=5, device=0),), [(10, 15), (20, 25)], 25)
    """

    def __init__(
        self,
        layout: Layout,
        row_nbytes: int,
        *,
        n_devices: int,
        chunk_nbytes: int = CHUNK_NBYTES,
        done: Ranges = (),
        whole: bool = False,
    ) -> None:
        own = [list(_own(layout, device, done, whole=whole)) for device in range(n_devices)]
        self.n_rows_left = sum(map(_n_rows, own))
        self._queues = [_Queue(iter(chunks)) for chunks in own]
        self._n_chunks = [1] * n_devices  # of the next task
        self._max_rows = _fitting_rows(row_nbytes, chunk_nbytes)
        self._paces = [_Pace() for _ in range(n_devices)]

    @property
    def speeds(self) -> tuple[float | None, ...]:
        return tuple(pace.speed for pace in self._paces)

    def deal(self, device: int, before: int | None = None) -> tuple[Chunk, ...]:
        task = self._queues[device].take(self._max_rows, before, self._n_chunks[device])
        self.n_rows_left -= _n_rows(task)
        return task

    def took(self, device: int, chunks: Sequence[Chunk], seconds: float) -> None:
        self._paces[device].add(_n_rows(chunks), seconds)
        n_chunks = self._n_chunks[device]
        # Only a task of the present size says anything of it: the window may hold some that are smaller.
        if seconds < TASK_SECONDS and len(chunks) >= n_chunks:
            self._n_chunks[device] = min(2 * n_chunks, MAX_CHUNKS_PER_TASK)
        elif seconds > MAX_TASK_SECONDS:
            self._n_chunks[device] = max(1, min(n_chunks, len(chunks)) // 2)

    def dropped(self, chunk: Chunk) -> None:
        """Nothing: what a device still has to do is what is in its queue."""

    def leave(self, device: int) -> None:
        """Nothing: its chunks are dealt as before, and run elsewhere."""


class Balanced:
    """Deals rows in row order to whoever has a place free, by measured speed: what ``device_weights="auto"`` means.

    How much a device gets is the first rule that matches:

    1. Its prior is 0, or nothing is left: nothing.
    2. The others would be done with all that is left before this device were with one grain: nothing for now, so that a
       slow device is not the last by more than it must.
    3. It is measured: ``SHARE_PER_TASK`` of what it would still do if all finished together, but ``TASK_SECONDS`` worth
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
    >>> dealer = Balanced.of_grid(10_000, 10, [1.0, 1.0])
    >>> probe = dealer.deal(1)
    >>> dealer.took(1, probe, seconds=0.01)
    >>> probe, dealer.deal(1), dealer.speeds
    ((Chunk(index=0, start=0, stop=10, device=1),), (Chunk(index=1, start=10, stop=30, device=1),), (None, 1000.0))
    """

    def __init__(self, grains: _Grid | _Queue, n_rows: int, priors: Sequence[float], *, max_rows: float) -> None:
        self.n_rows_left, self._grains, self._max_rows = n_rows, grains, max_rows
        self._priors = list(priors)
        self._active = [device for device, prior in enumerate(priors) if prior]
        self._assumed = list(priors)  # rows/s, or in whatever unit the priors are while nothing is measured
        self._in_flight = [0] * len(priors)  # rows
        self._largest = [0] * len(priors)  # rows of the largest task that ended
        self._paces = [_Pace() for _ in priors]

    @classmethod
    def of_grid(
        cls,
        n_rows: int,
        cell_rows: int,
        priors: Sequence[float],
        *,
        row_nbytes: int = 0,
        chunk_nbytes: int = CHUNK_NBYTES,
        done: Ranges = (),
    ) -> Balanced:
        """Cut ``n_rows`` rows at the cells of a regular grid; chunks are numbered as they are dealt."""
        limit = _fitting_rows(row_nbytes, chunk_nbytes)
        return cls(_Grid(n_rows, cell_rows, done), _n_left(n_rows, done), priors, max_rows=limit)

    @classmethod
    def of_chunks(
        cls,
        row_chunks: Sequence[int],
        priors: Sequence[float],
        *,
        row_nbytes: int = 0,
        chunk_nbytes: int = CHUNK_NBYTES,
        done: Ranges = (),
    ) -> Balanced:
        """Deal chunks that are cut already, of these many rows each, whole: one that is done in part is done again."""
        ends = pairwise(accumulate(row_chunks, initial=0))
        chunks = [Chunk(index, start, stop, _UNDEALT) for index, (start, stop) in enumerate(ends)]
        left = [chunk for chunk in chunks if not chunk.n_rows or any(left_over((chunk.start, chunk.stop), done))]
        return cls(_Queue(iter(left)), _n_rows(left), priors, max_rows=_fitting_rows(row_nbytes, chunk_nbytes))

    @property
    def speeds(self) -> tuple[float | None, ...]:
        return tuple(pace.speed for pace in self._paces)

    def deal(self, device: int, before: int | None = None) -> tuple[Chunk, ...]:
        rule, allowed = self._choose(device)
        dealt = () if allowed is None else self._grains.take(allowed, before)
        n_rows = _n_rows(dealt)
        self.n_rows_left -= n_rows
        self._in_flight[device] += n_rows
        _logger.debug("device %d gets %d rows by rule %d; %d are left", device, n_rows, rule, self.n_rows_left)
        return tuple(replace(chunk, device=device) for chunk in dealt)

    def took(self, device: int, chunks: Sequence[Chunk], seconds: float) -> None:
        for chunk in chunks:
            self._in_flight[chunk.device] -= chunk.n_rows
        self._largest[device] = max(self._largest[device], _n_rows(chunks))
        self._paces[device].add(_n_rows(chunks), seconds)
        self._assumed = _assume(self.speeds, self._priors)

    def dropped(self, chunk: Chunk) -> None:
        self._in_flight[chunk.device] -= chunk.n_rows

    def leave(self, device: int) -> None:
        self.weigh(device, 0.0)

    def weigh(self, device: int, prior: float) -> None:
        """Let a device join, or with a prior of 0 leave; what it has in flight is still its own."""
        self._priors[device] = prior
        self._active = [device for device, prior in enumerate(self._priors) if prior]
        self._assumed = _assume(self.speeds, self._priors)

    def expect(self, device: int, speed: float) -> None:
        """Take a device's speed in rows/s from an earlier run, so that it needs no probe."""
        self._paces[device] = _Pace(n_tasks=2, rows=speed * TASK_SECONDS, seconds=TASK_SECONDS)
        self._largest[device] = max(1, int(speed * MAX_TASK_SECONDS))
        self._assumed = _assume(self.speeds, self._priors)

    def _choose(self, device: int) -> tuple[int, int | None]:
        """Apply the ladder: the rule's number, and the rows that the device may get; None for nothing."""
        grain, in_flight = self._grains.next_rows(), self._in_flight[device]
        if grain is None or not self._priors[device]:
            return 1, None
        if self._sooner_elsewhere(device, grain):
            return 2, None
        if self.speeds[device] is not None:
            return 3, self._share(device)
        if not in_flight:
            return 4, grain
        lossless = in_flight + grain <= PROBE_SHARE * self.n_rows_left / len(self._active)
        return 5, grain if lossless else None

    def _sooner_elsewhere(self, device: int, grain: int) -> bool:
        others = [other for other in self._active if other != device]
        # A grain is not shared: somebody has to do it whole, and whoever would be the first to do so is not refused.
        soonest = min((self._end(other, grain) for other in others), default=inf)
        return self._end(device, grain) > max(soonest, self._end_together(others))

    def _share(self, device: int) -> int:
        speed = self._assumed[device]
        share = speed * self._end_together(self._active) - self._in_flight[device]
        wanted = min(max(share * SHARE_PER_TASK, speed * TASK_SECONDS), speed * MAX_TASK_SECONDS)
        return int(min(wanted, self._max_rows, 2 * self._largest[device]))

    def _end(self, device: int, n_rows: int) -> float:
        """Seconds until a device has done what is in flight there and ``n_rows`` more."""
        return (self._in_flight[device] + n_rows) / self._assumed[device]

    def _end_together(self, devices: Sequence[int]) -> float:
        """Seconds until these devices have done what is left, those that are through first taking more of it."""
        n_rows, speed, end = self.n_rows_left, 0.0, inf
        for device in sorted(devices, key=lambda d: self._end(d, 0)):
            n_rows += self._in_flight[device]
            speed += self._assumed[device]
            end = min(end, n_rows / speed)  # it rises again with devices that are busy for longer anyway
        return end


@dataclass(slots=True)
class _Pace:
    """A device's speed: rows over seconds of its tasks, the recent ones counting most."""

    n_tasks: int = 0
    rows: float = 0.0
    seconds: float = 0.0

    def add(self, n_rows: int, seconds: float) -> None:
        # The first task bears the network's loading and warming up: it counts only until there is a second.
        memory = MEMORY if self.n_tasks > 1 else 0.0
        if n_rows:
            self.n_tasks += 1
            self.rows = memory * self.rows + n_rows
            self.seconds = memory * self.seconds + max(seconds, TIMER_SECONDS)

    @property
    def speed(self) -> float | None:
        return self.rows / self.seconds if self.n_tasks else None


class _Queue:
    """Chunks in row order, taken from the front."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._chunks, self._front = chunks, next(chunks, None)

    def next_rows(self) -> int | None:
        return self._front.n_rows if self._front else None

    def take(self, n_rows: float, before: int | None, n_chunks: int = MAX_CHUNKS_PER_TASK) -> tuple[Chunk, ...]:
        """As many chunks as these limits allow; the first one with rows, and those without, whatever their number."""
        task: list[Chunk] = []
        taken = 0
        while front := self._front:
            full = taken and (len(task) >= n_chunks or taken + front.n_rows > n_rows)
            ahead = before is not None and front.start >= before
            if (full or ahead) and (front.n_rows or not task):
                break
            task.append(front)
            taken += front.n_rows
            self._front = next(self._chunks, None)
        return tuple(task)


class _Grid:
    """Rows on a regular grid, cut into chunks of whole cells from the front, around those that are done."""

    def __init__(self, n_rows: int, cell_rows: int, done: Ranges) -> None:
        self._cell_rows, self._n_dealt = cell_rows, 0
        self._left = left_over((0, n_rows), done)
        self._start, self._stop = next(self._left, (0, 0))

    def next_rows(self) -> int | None:
        return min(self._cell_rows, self._stop - self._start) or None

    def take(self, n_rows: int, before: int | None) -> tuple[Chunk, ...]:
        if before is not None and self._start >= before:
            return ()
        n_cells = max(1, n_rows // self._cell_rows)
        chunk = Chunk(self._n_dealt, self._start, min(self._start + n_cells * self._cell_rows, self._stop), _UNDEALT)
        self._n_dealt, self._start = self._n_dealt + 1, chunk.stop
        if self._start == self._stop:
            self._start, self._stop = next(self._left, (0, 0))
        return (chunk,)


def _assume(speeds: Sequence[float | None], priors: Sequence[float]) -> list[float]:
    """Rows/s of every device: measured, or its prior scaled to those measured; 0 for one that is left out."""
    known = [(speed, prior) for speed, prior in zip(speeds, priors, strict=True) if speed and prior]
    scale = sum(speed for speed, _ in known) / sum(prior for _, prior in known) if known else 1.0
    return [prior and (speed or prior * scale) for speed, prior in zip(speeds, priors, strict=True)]


def _own(layout: Layout, device: int, done: Ranges, *, whole: bool) -> Iterator[Chunk]:
    """A device's chunks, or what is left of them; ``whole``: a chunk that is done in part is done again."""
    for chunk in layout.chunks:
        if chunk.device == device:
            rows = (chunk.start, chunk.stop)
            left = list(left_over(rows, done))
            pieces = [rows] if not chunk.n_rows or (whole and left) else left
            yield from (replace(chunk, start=start, stop=stop) for start, stop in pieces)


def _n_rows(chunks: Sequence[Chunk]) -> int:
    return sum(chunk.n_rows for chunk in chunks)


def _n_left(n_rows: int, done: Ranges) -> int:
    return n_rows - sum(stop - start for start, stop in done)


def _fitting_rows(row_nbytes: int, chunk_nbytes: int) -> float:
    return chunk_nbytes // row_nbytes if row_nbytes else inf
