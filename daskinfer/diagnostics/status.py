"""How a run stands: the sum of its events so far, as the bar, the log and the dashboard's page show it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from daskinfer.diagnostics.events import (
    BatchSizeChosen,
    BatchTuningStarted,
    ChunkDone,
    ChunkFailed,
    ChunkStarted,
    Connected,
    DeviceChanged,
    Event,
    PlannedDevice,
    RunEnded,
    RunStarted,
)

THROUGHPUT_WINDOW_SECONDS = 10.0  # over which rows/s are averaged, so that a device that slows down shows; arbitrary
_STEP_SECONDS = 0.5  # between two points of that average; arbitrary


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """One device: rows done and failed, chunks in flight, rows/s lately, and its shares of the rows, fractions.

    ``batch_size`` is the micro-batch of its last chunk (rows; 0 before it), ``state`` "", "replaced" or "gone".
    """

    device: str
    label: str
    kind: str
    n_rows: int
    n_failed: int
    n_in_flight: int
    n_retried: int
    rows_per_second: float
    asked_share: float
    done_share: float
    batch_size: int
    state: str


@dataclass(frozen=True, slots=True)
class Status:
    """A run at one moment.

    ``n_done`` are rows that need nothing more, those of earlier calls and those that failed included. ``seconds`` counts
    from the first chunk sent; None before. ``seconds_left`` is what is left by the speed of late; None where nobody knows.
    ``measures``: devices try micro-batches of several sizes before the first chunk. ``dashboard`` is the URL of the page
    that shows the run; empty where there is none.
    """

    run: str
    model: str
    n_rows: int
    n_done: int
    n_failed: int
    n_retried: int
    seconds: float | None
    seconds_left: float | None
    rows_per_second: float
    batch_size: int
    devices: tuple[DeviceStatus, ...]
    ended: bool
    error: str
    measures: bool = False
    dashboard: str = ""

    @property
    def fraction_done(self) -> float:
        """How much of the run is done, a fraction."""
        return self.n_done / self.n_rows if self.n_rows else 1.0


class StatusTracker:
    """Sums a run's events up; :meth:`get_status` says how it stands.

    Note: one thread tells it events, any may ask; both hold a lock for microseconds.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started = RunStarted("", 0.0, "", (), (), (0, 0), (), 0, ())
        self._first_chunk_at: float | None = None
        self._ended: RunEnded | None = None
        self._batch_size = 0
        self._is_tuning = False
        self._dashboard = ""
        self._devices: dict[str, _DeviceTracker] = {}
        self._throughput = _RollingThroughput()
        self._n_done = self._n_failed = self._n_retried = 0

    def __call__(self, event: Event) -> None:
        with self._lock:
            _HANDLERS[type(event)](self, event)

    def get_status(self, now: float) -> Status:
        """How the run stands ``now``, in seconds since 1970."""
        with self._lock:
            now = self._ended.at if self._ended else now
            n_new = sum(device.n_rows for device in self._devices.values())
            speed = self._throughput.compute_rows_per_second(now)
            n_left = self._started.n_rows - self._n_done
            return Status(
                run=self._started.run,
                model=self._started.model,
                n_rows=self._started.n_rows,
                n_done=self._n_done,
                n_failed=self._n_failed,
                n_retried=self._n_retried,
                seconds=None if self._first_chunk_at is None else now - self._first_chunk_at,
                seconds_left=n_left / speed if speed else None,
                rows_per_second=speed,
                batch_size=self._batch_size,
                devices=tuple(device.get_status(now, n_new) for device in self._devices.values()),
                ended=self._ended is not None,
                error=self._ended.error if self._ended else "",
                measures=self._is_tuning,
                dashboard=self._dashboard,
            )

    def _get_device(self, name: str) -> _DeviceTracker:
        if name not in self._devices:  # this process, where no device was named
            self._devices[name] = _DeviceTracker(PlannedDevice(name, "", name.partition(":")[0], 0.0))
        return self._devices[name]

    def _handle_run_started(self, event: RunStarted) -> None:
        self._started, self._batch_size, self._n_done = event, event.batch_size, event.n_rows_before
        self._devices = {asked.device: _DeviceTracker(asked) for asked in event.devices}

    def _handle_connected(self, event: Connected) -> None:
        self._dashboard = event.dashboard

    def _handle_batch_tuning_started(self, event: BatchTuningStarted) -> None:
        self._is_tuning = True

    def _handle_batch_size_chosen(self, event: BatchSizeChosen) -> None:
        self._batch_size = event.batch_size

    def _handle_chunk_started(self, event: ChunkStarted) -> None:
        self._is_tuning = False
        if self._first_chunk_at is None:
            self._first_chunk_at = event.at
            self._throughput.add(event.at, 0)
        self._get_device(event.device).record_start(event.at)

    def _handle_chunk_done(self, event: ChunkDone) -> None:
        n_rows = event.stop - event.start
        self._n_done += n_rows
        self._n_failed += event.n_failed
        self._throughput.add(event.at, n_rows)
        self._get_device(event.device).record_done(event, n_rows)

    def _handle_chunk_failed(self, event: ChunkFailed) -> None:
        self._n_retried += 1
        device = self._get_device(event.device)
        device.n_in_flight -= 1
        device.n_retried += 1

    def _handle_device_changed(self, event: DeviceChanged) -> None:
        self._get_device(event.device).state = event.state

    def _handle_run_ended(self, event: RunEnded) -> None:
        self._ended = event
        for device in self._devices.values():
            device.n_in_flight = 0


_HANDLERS: dict[type[Event], Callable[[StatusTracker, Any], None]] = {
    RunStarted: StatusTracker._handle_run_started,
    Connected: StatusTracker._handle_connected,
    BatchTuningStarted: StatusTracker._handle_batch_tuning_started,
    BatchSizeChosen: StatusTracker._handle_batch_size_chosen,
    ChunkStarted: StatusTracker._handle_chunk_started,
    ChunkDone: StatusTracker._handle_chunk_done,
    ChunkFailed: StatusTracker._handle_chunk_failed,
    DeviceChanged: StatusTracker._handle_device_changed,
    RunEnded: StatusTracker._handle_run_ended,
}


@dataclass
class _RollingThroughput:
    """Rows/s over the last ``THROUGHPUT_WINDOW_SECONDS``: a sum of rows at a few points of time."""

    n_rows: int = 0
    points: deque[tuple[float, int]] = field(default_factory=deque)

    def add(self, at: float, n_rows: int) -> None:
        if not self.points or at - self.points[-1][0] >= _STEP_SECONDS:
            self.points.append((at, self.n_rows))
        self.n_rows += n_rows
        while len(self.points) > 1 and at - self.points[1][0] >= THROUGHPUT_WINDOW_SECONDS:
            self.points.popleft()

    def compute_rows_per_second(self, now: float) -> float:
        if not self.points or now <= self.points[0][0]:
            return 0.0
        since, before = self.points[0]
        return (self.n_rows - before) / (now - since)


@dataclass
class _DeviceTracker:
    planned: PlannedDevice
    n_rows: int = 0
    n_failed: int = 0
    n_in_flight: int = 0
    n_retried: int = 0
    batch_size: int = 0
    label: str = ""
    state: str = ""
    throughput: _RollingThroughput = field(default_factory=_RollingThroughput)

    def record_start(self, at: float) -> None:
        if not self.throughput.points:
            self.throughput.add(at, 0)
        self.n_in_flight += 1

    def record_done(self, event: ChunkDone, n_rows: int) -> None:
        self.n_rows += n_rows
        self.n_failed += event.n_failed
        if not event.stats.is_abandoned:  # it has come back before
            self.n_in_flight -= 1
            self.batch_size = event.stats.batch_size
        self.label = event.stats.device_name or self.label
        self.throughput.add(event.at, n_rows)

    def get_status(self, now: float, n_rows_total: int) -> DeviceStatus:
        return DeviceStatus(
            device=self.planned.device,
            label=self.planned.label or self.label,
            kind=self.planned.kind,
            n_rows=self.n_rows,
            n_failed=self.n_failed,
            n_in_flight=self.n_in_flight,
            n_retried=self.n_retried,
            rows_per_second=self.throughput.compute_rows_per_second(now),
            asked_share=self.planned.share,
            done_share=self.n_rows / n_rows_total if n_rows_total else 0.0,
            batch_size=self.batch_size,
            state=self.state,
        )
