"""How a run stands: the sum of its events so far, as the bar, the log and the dashboard's page show it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from daskinfer.diagnostics.events import (
    Asked,
    ChunkDone,
    ChunkFailed,
    ChunkStarted,
    Connected,
    DeviceChanged,
    Event,
    MicroBatchChosen,
    MicroBatchesTried,
    RunEnded,
    RunStarted,
)

SPEED_SECONDS = 10.0  # over which rows/s are averaged, so that a device that slows down shows; arbitrary
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
    def share(self) -> float:
        """How much of the run is done, a fraction."""
        return self.n_done / self.n_rows if self.n_rows else 1.0


class Standing:
    """Sums a run's events up; :meth:`status` says how it stands.

    Note: one thread tells it events, any may ask; both hold a lock for microseconds.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started = RunStarted("", 0.0, "", (), (), (0, 0), (), 0, ())
        self._began: float | None = None
        self._ended: RunEnded | None = None
        self._batch_size = 0
        self._measures = False
        self._dashboard = ""
        self._devices: dict[str, _Device] = {}
        self._speed = _Speed()
        self._n_done = self._n_failed = self._n_retried = 0

    def __call__(self, event: Event) -> None:
        with self._lock:
            _SEE[type(event)](self, event)

    def status(self, now: float) -> Status:
        """How the run stands ``now``, in seconds since 1970."""
        with self._lock:
            now = self._ended.at if self._ended else now
            n_new = sum(device.n_rows for device in self._devices.values())
            speed = self._speed.at(now)
            n_left = self._started.n_rows - self._n_done
            return Status(
                run=self._started.run,
                model=self._started.model,
                n_rows=self._started.n_rows,
                n_done=self._n_done,
                n_failed=self._n_failed,
                n_retried=self._n_retried,
                seconds=None if self._began is None else now - self._began,
                seconds_left=n_left / speed if speed else None,
                rows_per_second=speed,
                batch_size=self._batch_size,
                devices=tuple(device.status(now, n_new) for device in self._devices.values()),
                ended=self._ended is not None,
                error=self._ended.error if self._ended else "",
                measures=self._measures,
                dashboard=self._dashboard,
            )

    def _device(self, name: str) -> _Device:
        if name not in self._devices:  # this process, where no device was named
            self._devices[name] = _Device(Asked(name, "", name.partition(":")[0], 0.0))
        return self._devices[name]

    def _run_started(self, event: RunStarted) -> None:
        self._started, self._batch_size, self._n_done = event, event.batch_size, event.n_rows_before
        self._devices = {asked.device: _Device(asked) for asked in event.devices}

    def _connected(self, event: Connected) -> None:
        self._dashboard = event.dashboard

    def _micro_batches_tried(self, event: MicroBatchesTried) -> None:
        self._measures = True

    def _micro_batch_chosen(self, event: MicroBatchChosen) -> None:
        self._batch_size = event.batch_size

    def _chunk_started(self, event: ChunkStarted) -> None:
        self._measures = False
        if self._began is None:
            self._began = event.at
            self._speed.count(event.at, 0)
        self._device(event.device).began(event.at)

    def _chunk_done(self, event: ChunkDone) -> None:
        n_rows = event.stop - event.start
        self._n_done += n_rows
        self._n_failed += event.n_failed
        self._speed.count(event.at, n_rows)
        self._device(event.device).done(event, n_rows)

    def _chunk_failed(self, event: ChunkFailed) -> None:
        self._n_retried += 1
        device = self._device(event.device)
        device.n_in_flight -= 1
        device.n_retried += 1

    def _device_changed(self, event: DeviceChanged) -> None:
        self._device(event.device).state = event.state

    def _run_ended(self, event: RunEnded) -> None:
        self._ended = event
        for device in self._devices.values():
            device.n_in_flight = 0


_SEE: dict[type[Event], Callable[[Standing, Any], None]] = {
    RunStarted: Standing._run_started,
    Connected: Standing._connected,
    MicroBatchesTried: Standing._micro_batches_tried,
    MicroBatchChosen: Standing._micro_batch_chosen,
    ChunkStarted: Standing._chunk_started,
    ChunkDone: Standing._chunk_done,
    ChunkFailed: Standing._chunk_failed,
    DeviceChanged: Standing._device_changed,
    RunEnded: Standing._run_ended,
}


@dataclass
class _Speed:
    """Rows/s over the last ``SPEED_SECONDS``: a sum of rows at a few points of time."""

    n_rows: int = 0
    points: deque[tuple[float, int]] = field(default_factory=deque)

    def count(self, at: float, n_rows: int) -> None:
        if not self.points or at - self.points[-1][0] >= _STEP_SECONDS:
            self.points.append((at, self.n_rows))
        self.n_rows += n_rows
        while len(self.points) > 1 and at - self.points[1][0] >= SPEED_SECONDS:
            self.points.popleft()

    def at(self, now: float) -> float:
        if not self.points or now <= self.points[0][0]:
            return 0.0
        since, before = self.points[0]
        return (self.n_rows - before) / (now - since)


@dataclass
class _Device:
    asked: Asked
    n_rows: int = 0
    n_failed: int = 0
    n_in_flight: int = 0
    n_retried: int = 0
    batch_size: int = 0
    label: str = ""
    state: str = ""
    speed: _Speed = field(default_factory=_Speed)

    def began(self, at: float) -> None:
        if not self.speed.points:
            self.speed.count(at, 0)
        self.n_in_flight += 1

    def done(self, event: ChunkDone, n_rows: int) -> None:
        self.n_rows += n_rows
        self.n_failed += event.n_failed
        if not event.receipt.given_up:  # it has come back before
            self.n_in_flight -= 1
            self.batch_size = event.receipt.batch_size
        self.label = event.receipt.device_name or self.label
        self.speed.count(event.at, n_rows)

    def status(self, now: float, n_all: int) -> DeviceStatus:
        return DeviceStatus(
            device=self.asked.device,
            label=self.asked.label or self.label,
            kind=self.asked.kind,
            n_rows=self.n_rows,
            n_failed=self.n_failed,
            n_in_flight=self.n_in_flight,
            n_retried=self.n_retried,
            rows_per_second=self.speed.at(now),
            asked_share=self.asked.share,
            done_share=self.n_rows / n_all if n_all else 0.0,
            batch_size=self.batch_size,
            state=self.state,
        )
