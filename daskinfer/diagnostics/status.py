"""The status of a run while it goes on, as a record and as text that terminals, notebooks, logs and the dashboard share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from daskinfer.core.chunks import BatchConfig
from daskinfer.core.formatting import format_seconds
from daskinfer.diagnostics.device_stats import INLINE, DeviceStatus, DeviceTable, RollingThroughput, select_shown
from daskinfer.diagnostics.events import (
    BatchSizeChosen,
    BatchTuningStarted,
    ChunkDone,
    ChunkStarted,
    Connected,
    Event,
    RunEnded,
    RunStarted,
)

MIN_QUIET_SECONDS = 10.0  # without a result until it is said what is waited for; arbitrary
MAX_LISTED_DEVICES = 4  # that are waited for; arbitrary
USUAL_GAPS = 2.0  # how many times the longest time between two results so far that has to be; arbitrary


@dataclass(frozen=True, slots=True)
class Status:
    """A run at one moment.

    ``n_done`` are rows that need no more work, including those of earlier calls and those that failed. ``seconds`` counts
    from the first chunk sent; None before. ``seconds_left`` is what remains at the recent throughput; None if unknown.
    ``measures``: the batch size is being tuned, before the first chunk. ``quiet_seconds`` is for how long no chunk was done,
    if that is longer than usual, else 0.0. ``dashboard`` is the URL of the page that shows the
    run; empty if there is none.
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
    quiet_seconds: float = 0.0

    @property
    def fraction_done(self) -> float:
        """How much of the run is done, a fraction."""
        return self.n_done / self.n_rows if self.n_rows else 1.0


class StatusTracker:
    """Adds up a run's events; :meth:`get_status` returns how it stands.

    Note: one thread passes it events, any may ask for the status; both hold a lock for microseconds.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started = RunStarted("", 0.0, "", (), (), (0, 0), (), BatchConfig(0), ())
        self._first_chunk_at: float | None = None
        self._ended: RunEnded | None = None
        self._batch_size = 0
        self._is_tuning = False
        self._dashboard = ""
        self._last_done_at, self._longest_gap = 0.0, 0.0
        self._devices = DeviceTable()
        self._throughput = RollingThroughput()

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._devices(event)
            if handle := _HANDLERS.get(type(event)):
                handle(self, event)

    def get_status(self, now: float) -> Status:
        """Return how the run stands ``now``, in seconds since 1970."""
        with self._lock:
            now = self._ended.at if self._ended else now
            devices = self._devices.make_statuses(now)
            n_done = self._started.n_rows_before + sum(device.n_rows for device in devices)
            throughput = self._throughput.compute_rows_per_second(now)
            return Status(
                run=self._started.run,
                model=self._started.model,
                n_rows=self._started.n_rows,
                n_done=n_done,
                n_failed=sum(device.n_failed for device in devices),
                n_retried=sum(device.n_retried for device in devices),
                seconds=None if self._first_chunk_at is None else now - self._first_chunk_at,
                seconds_left=(self._started.n_rows - n_done) / throughput if throughput else None,
                rows_per_second=throughput,
                batch_size=self._batch_size,
                devices=devices,
                ended=self._ended is not None,
                error=self._ended.error if self._ended else "",
                measures=self._is_tuning,
                dashboard=self._dashboard,
                quiet_seconds=self._measure_quiet_seconds(now),
            )

    def _measure_quiet_seconds(self, now: float) -> float:
        """Return for how long no chunk was done, if that is unusual: chunks may take minutes each."""
        quiet = now - self._last_done_at
        is_unusual = quiet > max(MIN_QUIET_SECONDS, USUAL_GAPS * self._longest_gap)
        return quiet if self._last_done_at and self._ended is None and is_unusual else 0.0

    def _handle_run_started(self, event: RunStarted) -> None:
        self._started, self._batch_size = event, event.batch.batch_size

    def _handle_connected(self, event: Connected) -> None:
        self._dashboard = event.dashboard

    def _handle_batch_tuning_started(self, event: BatchTuningStarted) -> None:
        self._is_tuning = True

    def _handle_batch_size_chosen(self, event: BatchSizeChosen) -> None:
        self._batch_size = event.batch.batch_size

    def _handle_chunk_started(self, event: ChunkStarted) -> None:
        self._is_tuning = False
        if self._first_chunk_at is None:
            self._first_chunk_at = self._last_done_at = event.at
        self._throughput.start(event.at)

    def _handle_chunk_done(self, event: ChunkDone) -> None:
        self._throughput.add(event.at, event.stop - event.start)
        self._longest_gap = max(self._longest_gap, event.at - self._last_done_at)
        self._last_done_at = event.at

    def _handle_run_ended(self, event: RunEnded) -> None:
        self._ended = event


_HANDLERS: dict[type[Event], Callable[[StatusTracker, Any], None]] = {
    RunStarted: StatusTracker._handle_run_started,
    Connected: StatusTracker._handle_connected,
    BatchTuningStarted: StatusTracker._handle_batch_tuning_started,
    BatchSizeChosen: StatusTracker._handle_batch_size_chosen,
    ChunkStarted: StatusTracker._handle_chunk_started,
    ChunkDone: StatusTracker._handle_chunk_done,
    RunEnded: StatusTracker._handle_run_ended,
}


_STATE_LABELS = {
    "restarting": "restarting",
    "replaced": "worker restarted",
    "gone": "lost",
}  # DeviceStatus.state, as people read it

_DEVICE_COLUMNS: Mapping[str, Callable[[DeviceStatus, Status], str]] = {
    "device": lambda device, status: device.title,
    "name": lambda device, status: device.label,
    "rows": lambda device, status: f"{device.n_rows:,}",
    "rows/s": lambda device, status: f"{_get_rows_per_second(device, status):,.0f}",
    "batch size": lambda device, status: f"{device.batch_size:,}" if device.batch_size else "",
    "requested": lambda device, status: "" if device.asked_share is None else f"{device.asked_share:.0%}",
    "done": lambda device, status: f"{device.done_share:.0%}",
    "in flight": lambda device, status: f"{device.n_in_flight:,}",
    "": lambda device, status: ", ".join([*_format_state(device), *_format_problems(device)]),
}


def format_devices(status: Status) -> tuple[list[str], list[list[str]]]:
    """Format the headers of the devices' table, and a line per device; a share was requested only if a caller did."""
    devices = select_shown(status.devices)
    hidden = {"requested"} if all(device.asked_share is None for device in devices) else set()
    columns = {header: format_cell for header, format_cell in _DEVICE_COLUMNS.items() if header not in hidden}
    return list(columns), [[format_cell(device, status) for format_cell in columns.values()] for device in devices]


def _get_rows_per_second(device: DeviceStatus, status: Status) -> float:
    """Return the recent rows/s; once the run has ended, those of all of it."""
    return device.n_rows / status.seconds if status.ended and status.seconds else device.rows_per_second


def _format_state(device: DeviceStatus) -> list[str]:
    return [_STATE_LABELS.get(device.state, device.state)] if device.state else []


def _format_problems(status: DeviceStatus | Status) -> list[str]:
    counts = {"failed": status.n_failed, "retried": status.n_retried}
    return [f"{count:,} {what}" for what, count in counts.items() if count]


def format_progress(status: Status) -> list[str]:
    """Format how far a run is, how fast, how long it still takes, and what went wrong.

    Examples
    --------
    >>> format_progress(Status("a", "Net", 2000, 500, 3, 0, 10.0, 30.0, 50.0, 10, (), False, ""))
    ['25%', '500 of 2,000 rows', '50 rows/s', '0:30 left', '3 failed']
    """
    done = [f"{status.fraction_done:.0%}", f"{status.n_done:,} of {status.n_rows:,} rows"]
    parts = [
        *(done if _has_begun(status) else []),
        *_format_throughput(status),
        *_format_problems(status),
        *_format_absent(status),
        *_format_stall(status),
    ]
    return [*parts, status.error] if status.error else parts


def _has_begun(status: Status) -> bool:
    return status.seconds is not None or status.ended or status.n_done > 0


def _format_throughput(status: Status) -> list[str]:
    if status.seconds is None:
        if status.ended:
            return ["nothing computed"]
        has_workers = any(device.kind != INLINE for device in status.devices)
        return ["tuning batch size" if status.measures else "starting workers" if has_workers else "starting"]
    if status.ended:
        outcome = "stopped" if status.error else "done"
        throughput = sum(_get_rows_per_second(device, status) for device in status.devices)
        return [f"{outcome} after {format_seconds(status.seconds)}", f"{throughput:,.0f} rows/s"]
    left = [] if status.seconds_left is None else [f"{format_seconds(status.seconds_left)} left"]
    return [f"{status.rows_per_second:,.0f} rows/s", *left]


def _format_absent(status: Status) -> list[str]:
    """Name the devices whose worker is away."""
    names = [device.title for device in status.devices if device.state == "restarting"] if not status.ended else []
    return [f"{_list_some(names)} restarting"] if names else []


def _list_some(texts: list[str]) -> str:
    more = [f"{len(texts) - MAX_LISTED_DEVICES:,} more"] if len(texts) > MAX_LISTED_DEVICES else []
    return " and ".join([*texts[:MAX_LISTED_DEVICES], *more])


def _format_stall(status: Status) -> list[str]:
    """Say what is waited for if nothing has moved for unusually long."""
    if not status.quiet_seconds:
        return []
    waits = [
        f"{device.title} ({', '.join([*_format_state(device), f'{device.n_in_flight:,} in flight'])})"
        for device in status.devices
        if device.n_in_flight or device.state == "restarting"
    ]
    return [f"no result for {format_seconds(status.quiet_seconds)}: waiting for {_list_some(waits) or 'a worker'}"]


def format_status(status: Status) -> str:
    """Format all of it in one line.

    Examples
    --------
    >>> format_status(Status("a", "Net", 2000, 500, 3, 0, 10.0, 30.0, 50.0, 10, (), False, ""))
    'Net: 25%, 500 of 2,000 rows, 50 rows/s, 0:30 left, 3 failed'
    """
    working = [device for device in status.devices if device.n_rows]
    devices = [f"{d.title} {_get_rows_per_second(d, status):,.0f} rows/s {d.done_share:.0%}" for d in working]
    return f"{status.model}: {', '.join([*format_progress(status), *devices])}"
