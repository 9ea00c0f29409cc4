"""A run's status in words: the same in a terminal, a notebook, the log and on the dashboard's page."""

from __future__ import annotations

from daskinfer.core.formatting import format_seconds
from daskinfer.diagnostics.status import DeviceStatus, Status

HEADERS = ("device", "name", "rows", "rows/s", "micro-batch", "asked", "done", "in flight", "")


def cells(device: DeviceStatus, status: Status) -> tuple[str, ...]:
    """A device's line under ``HEADERS``."""
    said = [device.state] if device.state else []
    return (
        device.device,
        device.label,
        f"{device.n_rows:,}",
        f"{_speed(device, status):,.0f}",
        f"{device.batch_size:,}" if device.batch_size else "",
        f"{device.asked_share:.0%}",
        f"{device.done_share:.0%}",
        f"{device.n_in_flight:,}",
        ", ".join([*said, *_mishaps(device)]),
    )


def _speed(device: DeviceStatus, status: Status) -> float:
    """Rows/s of late; once the run is over, those of all of it."""
    return device.n_rows / status.seconds if status.ended and status.seconds else device.rows_per_second


def _mishaps(of: DeviceStatus | Status) -> list[str]:
    said = [f"{of.n_failed:,} failed"] if of.n_failed else []
    return [*said, f"{of.n_retried:,} tried again"] if of.n_retried else said


def words(status: Status) -> list[str]:
    """How far a run is, how fast, how long still, and what went wrong.

    Examples
    --------
    >>> words(Status("a", "Net", 2000, 500, 3, 0, 10.0, 30.0, 50.0, 10, (), False, ""))
    ['25%', '500 of 2,000 rows', '50 rows/s', '0:30 left', '3 failed']
    """
    said = [f"{status.share:.0%}", f"{status.n_done:,} of {status.n_rows:,} rows", *_pace(status), *_mishaps(status)]
    return [*said, status.error] if status.error else said


def _pace(status: Status) -> list[str]:
    if status.seconds is None:
        if status.ended:
            return ["nothing was computed"]
        return ["micro-batches are measured" if status.measures else "workers start"]
    if status.ended:
        ended = "ended" if status.error else "done"
        speed = sum(_speed(device, status) for device in status.devices)
        return [f"{ended} after {format_seconds(status.seconds)}", f"{speed:,.0f} rows/s"]
    left = [] if status.seconds_left is None else [f"{format_seconds(status.seconds_left)} left"]
    return [f"{status.rows_per_second:,.0f} rows/s", *left]


def sentence(status: Status) -> str:
    """All of it in one line.

    Examples
    --------
    >>> sentence(Status("a", "Net", 2000, 500, 3, 0, 10.0, 30.0, 50.0, 10, (), False, ""))
    'Net: 25%, 500 of 2,000 rows, 50 rows/s, 0:30 left, 3 failed'
    """
    working = [device for device in status.devices if device.n_rows]
    devices = [f"{d.device} {_speed(d, status):,.0f} rows/s {d.done_share:.0%}" for d in working]
    return f"{status.model}: {', '.join([*words(status), *devices])}"
