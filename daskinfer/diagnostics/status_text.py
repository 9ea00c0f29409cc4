"""A run's status in words: the same in a terminal, a notebook, the log and on the dashboard's page."""

from __future__ import annotations

from daskinfer.core.formatting import format_seconds
from daskinfer.diagnostics.status import DeviceStatus, Status

DEVICE_HEADERS = ("device", "name", "rows", "rows/s", "micro-batch", "asked", "done", "in flight", "")


def format_device(device: DeviceStatus, status: Status) -> tuple[str, ...]:
    """A device's line under ``DEVICE_HEADERS``."""
    said = [device.state] if device.state else []
    return (
        device.device,
        device.label,
        f"{device.n_rows:,}",
        f"{_get_rows_per_second(device, status):,.0f}",
        f"{device.batch_size:,}" if device.batch_size else "",
        f"{device.asked_share:.0%}",
        f"{device.done_share:.0%}",
        f"{device.n_in_flight:,}",
        ", ".join([*said, *_format_problems(device)]),
    )


def _get_rows_per_second(device: DeviceStatus, status: Status) -> float:
    """Rows/s of late; once the run is over, those of all of it."""
    return device.n_rows / status.seconds if status.ended and status.seconds else device.rows_per_second


def _format_problems(status: DeviceStatus | Status) -> list[str]:
    said = [f"{status.n_failed:,} failed"] if status.n_failed else []
    return [*said, f"{status.n_retried:,} tried again"] if status.n_retried else said


def format_progress(status: Status) -> list[str]:
    """How far a run is, how fast, how long still, and what went wrong.

    Examples
    --------
    >>> format_progress(Status("a", "Net", 2000, 500, 3, 0, 10.0, 30.0, 50.0, 10, (), False, ""))
    ['25%', '500 of 2,000 rows', '50 rows/s', '0:30 left', '3 failed']
    """
    said = [
        f"{status.fraction_done:.0%}",
        f"{status.n_done:,} of {status.n_rows:,} rows",
        *_format_throughput(status),
        *_format_problems(status),
    ]
    return [*said, status.error] if status.error else said


def _format_throughput(status: Status) -> list[str]:
    if status.seconds is None:
        if status.ended:
            return ["nothing was computed"]
        return ["micro-batches are measured" if status.measures else "workers start"]
    if status.ended:
        ended = "ended" if status.error else "done"
        speed = sum(_get_rows_per_second(device, status) for device in status.devices)
        return [f"{ended} after {format_seconds(status.seconds)}", f"{speed:,.0f} rows/s"]
    left = [] if status.seconds_left is None else [f"{format_seconds(status.seconds_left)} left"]
    return [f"{status.rows_per_second:,.0f} rows/s", *left]


def format_status(status: Status) -> str:
    """All of it in one line.

    Examples
    --------
    >>> format_status(Status("a", "Net", 2000, 500, 3, 0, 10.0, 30.0, 50.0, 10, (), False, ""))
    'Net: 25%, 500 of 2,000 rows, 50 rows/s, 0:30 left, 3 failed'
    """
    working = [device for device in status.devices if device.n_rows]
    devices = [f"{d.device} {_get_rows_per_second(d, status):,.0f} rows/s {d.done_share:.0%}" for d in working]
    return f"{status.model}: {', '.join([*format_progress(status), *devices])}"
