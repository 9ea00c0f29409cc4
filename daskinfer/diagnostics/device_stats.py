"""Add up what each device of a run does, event by event: one accumulator for the report, the status and the dashboard.

A new column is one field of :class:`DeviceReport` or :class:`DeviceStatus`, with the rule by which values of a device become
one, and one line in the table that shows it. A field of the report that is named like one of ``ChunkStats`` is added up from
the chunks without further code; any other field is an attribute of :class:`DeviceStats`, which counts events.
"""

from __future__ import annotations

import functools
import operator
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from daskinfer.diagnostics.events import (
    ChunkDone,
    ChunkFailed,
    ChunkStarted,
    DeviceChanged,
    Event,
    PlannedDevice,
    RunEnded,
    RunStarted,
)

THROUGHPUT_WINDOW_SECONDS = 10.0  # over which rows/s are averaged, so that a device that slows down shows; arbitrary
_STEP_SECONDS = 0.5  # between two points of that average; arbitrary


def _min_known(first: Any, second: Any) -> Any:
    """Return the smaller of two numbers of which 0 means "unknown"."""
    return min(first or second, second or first)


def _add_known(first: Any, second: Any) -> Any:
    """Return the sum of two numbers of which None means "unknown"."""
    return None if first is None and second is None else (first or 0.0) + (second or 0.0)


# How two values become one: of two chunks of a device, or of two devices that are shown as one.
SUM, MAX, MIN = ({"combine": combine} for combine in (operator.add, max, _min_known))

INLINE = "inline"  # what events and programs call this process as a device


def format_device(device: str, n_cores: int) -> str:
    """Format a device's name for people.

    Examples
    --------
    >>> format_device("cuda:0", 4), format_device("inline", 4), format_device("inline", 0)
    ('cuda:0', 'this process (all 4 cores)', 'this process')
    """
    if device != INLINE:
        return device
    return "this process" + (f" (all {n_cores} cores)" if n_cores > 1 else "")


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """One device's part in a run: shares are fractions of all rows, ``seconds`` the time spent in the model.

    ``asked_share`` is what the caller requested, None if nothing; ``measured_share`` is the device's fraction of the
    throughput of all devices, ``done_share`` what it did. ``read_seconds`` and ``write_seconds`` are sums over its chunks,
    and overlap with the model's; ``waited_seconds`` is how long the device was idle until a chunk was read, ``load_seconds``
    until the model was loaded; ``first_call_seconds`` of ``seconds`` went into the model's first micro-batch. ``batch_size``
    is the smallest micro-batch used (rows; 0 if nothing was done), ``peak_nbytes`` the most memory held: by the model on a
    GPU, else by the process. ``n_retried`` counts failed attempts; ``began`` and ``ended`` are when reading its first chunk
    began and its last chunk was done, in seconds since 1970.
    """

    device: str
    device_name: str
    n_chunks: int
    n_rows: int
    seconds: float = field(default=0.0, metadata=SUM)
    asked_share: float | None = None
    done_share: float = 0.0
    measured_share: float = 0.0
    read_seconds: float = field(default=0.0, metadata=SUM)
    write_seconds: float = field(default=0.0, metadata=SUM)
    waited_seconds: float = field(default=0.0, metadata=SUM)
    batch_size: int = field(default=0, metadata=MIN)  # a chunk that was given up has none
    peak_nbytes: int = field(default=0, metadata=MAX)
    n_retried: int = 0
    began: float = field(default=0.0, metadata=MIN | {"source": "read_began"})
    ended: float = field(default=0.0, metadata=MAX)
    load_seconds: float = field(default=0.0, metadata=SUM)
    first_call_seconds: float = field(default=0.0, metadata=SUM)
    n_cores: int = 0

    @property
    def title(self) -> str:
        """What people call the device."""
        return format_device(self.device, self.n_cores)

    @property
    def is_used(self) -> bool:
        """Whether it got any chunk."""
        return bool(self.n_chunks or self.n_retried)

    @property
    def warm_up_seconds(self) -> float:
        """How much longer the model's first micro-batch took than the others; 0.0 if there was no other."""
        n_others = self.n_rows / self.batch_size - 1 if self.batch_size else 0
        if not self.first_call_seconds or n_others < 1:
            return 0.0
        return max(0.0, self.first_call_seconds - (self.seconds - self.first_call_seconds) / n_others)

    @property
    def rows_per_second(self) -> float:
        """Rows divided by the seconds spent in the model; 0.0 if nothing was done."""
        return self.n_rows / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """One device at one moment: rows done and failed, chunks in flight, recent rows/s, and shares of all rows, fractions.

    ``asked_share`` is None if no shares were requested. ``batch_size`` is that of its last chunk (rows; 0 before it),
    ``state`` "" or that of :class:`DeviceChanged`. ``seconds`` and those after it are as in :class:`DeviceReport`. The rule
    of a field tells how several devices are shown as one.
    """

    device: str
    label: str
    kind: str
    n_rows: int = field(metadata=SUM)
    n_failed: int = field(metadata=SUM)
    n_in_flight: int = field(metadata=SUM)
    n_retried: int = field(metadata=SUM)
    rows_per_second: float = field(metadata=SUM)
    asked_share: float | None = field(metadata={"combine": _add_known})
    done_share: float = field(metadata=SUM)
    batch_size: int = field(metadata=MAX)
    state: str
    seconds: float = field(default=0.0, metadata=SUM)
    waited_seconds: float = field(default=0.0, metadata=SUM)
    load_seconds: float = field(default=0.0, metadata=SUM)
    write_seconds: float = field(default=0.0, metadata=SUM)
    n_cores: int = 0

    @property
    def title(self) -> str:
        """What people call the device."""
        return format_device(self.device, self.n_cores)

    @property
    def is_used(self) -> bool:
        """Whether it got any chunk."""
        return bool(self.n_rows or self.n_in_flight or self.n_retried or self.state)


Record = TypeVar("Record", DeviceReport, DeviceStatus)


def select_shown(devices: Sequence[Record]) -> list[Record]:
    """Select the devices that a table lists: not workers that were never used because this process was faster.

    A device of which a share was requested is always listed.
    """
    runs_inline = any(device.device == INLINE and device.is_used for device in devices)
    return [device for device in devices if device.is_used or device.asked_share is not None or not runs_inline]


@dataclass
class RollingThroughput:
    """Rows/s over the last ``THROUGHPUT_WINDOW_SECONDS``: a running sum of rows, sampled at a few points of time."""

    n_rows: int = 0
    points: deque[tuple[float, int]] = field(default_factory=deque)

    def start(self, at: float) -> None:
        """Begin to measure ``at`` this time, unless begun before."""
        if not self.points:
            self.add(at, 0)

    def add(self, at: float, n_rows: int) -> None:
        """Count rows that were done ``at`` this time, in seconds since 1970."""
        if not self.points or at - self.points[-1][0] >= _STEP_SECONDS:
            self.points.append((at, self.n_rows))
        self.n_rows += n_rows
        while len(self.points) > 1 and at - self.points[1][0] >= THROUGHPUT_WINDOW_SECONDS:
            self.points.popleft()

    def compute_rows_per_second(self, now: float) -> float:
        """Return the average up to ``now``; 0.0 before the start."""
        if not self.points or now <= self.points[0][0]:
            return 0.0
        since, n_rows_before = self.points[0]
        return (self.n_rows - n_rows_before) / (now - since)


class DeviceStats:
    """Adds up one device's events: rows (``n_done`` with, ``n_rows`` without those that failed), chunks, seconds, memory.

    Note: not locked.
    """

    def __init__(self, planned: PlannedDevice, n_cores: int = 0) -> None:
        self.n_cores = n_cores
        self.device, self.kind, self.asked_share = planned.device, planned.kind, planned.share
        self.planned_label = planned.label
        self.device_name = self.state = ""
        self.n_chunks = self.n_done = self.n_failed = self.n_in_flight = self.n_retried = self.last_batch_size = 0
        self.throughput = RollingThroughput()
        self.totals = {name: default for name, (default, _, _) in _TOTALS.items()}

    def add(self, event: Event) -> None:
        """Count one event of this device."""
        _HANDLERS[type(event)](self, event)

    @property
    def n_rows(self) -> int:
        """Rows that have a result."""
        return self.n_done - self.n_failed

    def make_report(self) -> DeviceReport:
        """Return what the device did, without the shares that depend on the other devices."""
        return self._make_record(DeviceReport, {**self.totals, "done_share": 0.0, "measured_share": 0.0})

    def make_status(self, now: float, n_done_total: int) -> DeviceStatus:
        """Return how the device stands ``now``, when all devices have done ``n_done_total`` rows."""
        computed = {
            "label": self.planned_label or self.device_name,
            "n_rows": self.n_done,
            "rows_per_second": self.throughput.compute_rows_per_second(now),
            "done_share": _divide(self.n_done, n_done_total),
            "batch_size": self.last_batch_size,
        }
        return self._make_record(DeviceStatus, {**self.totals, **computed})

    def _make_record(self, record: type[Record], computed: dict[str, Any]) -> Record:
        """Fill in a record by its fields' names, from ``computed`` or else from this object's attributes."""
        names = [one.name for one in fields(record)]
        return record(**{name: computed[name] if name in computed else getattr(self, name) for name in names})

    def _handle_chunk_started(self, event: ChunkStarted) -> None:
        self.throughput.start(event.at)
        self.n_in_flight += 1

    def _handle_chunk_done(self, event: ChunkDone) -> None:
        stats, n_rows = event.stats, event.stop - event.start
        self.n_chunks += 1
        self.n_done += n_rows
        self.n_failed += event.n_failed
        if not stats.is_abandoned:  # it came back before, as ChunkFailed
            self.n_in_flight -= 1
            self.last_batch_size = stats.batch_size
        self.device_name = stats.device_name or self.device_name
        self.throughput.add(event.at, n_rows)
        for name, (_, combine, source) in _TOTALS.items():
            self.totals[name] = combine(self.totals[name], getattr(stats, source))

    def _handle_chunk_failed(self, event: ChunkFailed) -> None:
        self.n_in_flight -= 1
        self.n_retried += 1

    def _handle_device_changed(self, event: DeviceChanged) -> None:
        self.state = event.state

    def end(self) -> None:
        """The run has ended, and with it whatever was in flight."""
        self.n_in_flight = 0


_HANDLERS: dict[type[Event], Callable[[DeviceStats, Any], None]] = {
    ChunkStarted: DeviceStats._handle_chunk_started,
    ChunkDone: DeviceStats._handle_chunk_done,
    ChunkFailed: DeviceStats._handle_chunk_failed,
    DeviceChanged: DeviceStats._handle_device_changed,
}
# Of each total over a device's chunks: its first value, how two become one, and which field of ChunkStats it adds up.
_TOTALS: dict[str, tuple[Any, Callable[[Any, Any], Any], str]] = {
    one.name: (one.default, one.metadata["combine"], one.metadata.get("source", one.name))
    for one in fields(DeviceReport)
    if one.metadata
}


class DeviceTable:
    """All devices of a run in the plan's order; others join at the end when an event first names them.

    Note: not locked.
    """

    def __init__(self) -> None:
        self._devices: dict[str, DeviceStats] = {}
        self._n_cores = 0

    def __call__(self, event: Event) -> None:
        """Pass an event on to the device that it is about; other events change nothing."""
        if isinstance(event, RunStarted):
            self._n_cores = event.n_cores
            self._devices = {planned.device: DeviceStats(planned, event.n_cores) for planned in event.devices}
        elif isinstance(event, RunEnded):
            for device in self._devices.values():
                device.end()
        elif isinstance(event, ChunkStarted | ChunkDone | ChunkFailed | DeviceChanged):
            self._get_device(event.device).add(event)

    def make_reports(self) -> tuple[DeviceReport, ...]:
        """Return what each device did."""
        reports = [device.make_report() for device in self._devices.values()]
        n_rows = sum(report.n_rows for report in reports)
        throughput = sum(report.rows_per_second for report in reports)
        return tuple(
            replace(
                report,
                done_share=_divide(report.n_rows, n_rows),
                measured_share=_divide(report.rows_per_second, throughput),
            )
            for report in reports
        )

    def make_statuses(self, now: float) -> tuple[DeviceStatus, ...]:
        """Return how each device stands ``now``, in seconds since 1970."""
        n_done = sum(device.n_done for device in self._devices.values())
        return tuple(device.make_status(now, n_done) for device in self._devices.values())

    def _get_device(self, name: str) -> DeviceStats:
        if name not in self._devices:  # this process, if no device was named
            planned = PlannedDevice(name, "", name.partition(":")[0], None)
            self._devices[name] = DeviceStats(planned, self._n_cores)
        return self._devices[name]


def merge_devices(devices: Sequence[DeviceStatus], name: str) -> DeviceStatus:
    """Show several devices as one, called ``name``."""
    merged = {
        one.name: functools.reduce(one.metadata["combine"], [getattr(device, one.name) for device in devices])
        for one in fields(DeviceStatus)
        if one.metadata
    }
    return DeviceStatus(device=name, label=f"{len(devices)} devices", kind="", state="", **merged)


def _divide(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
