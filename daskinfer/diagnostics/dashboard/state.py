"""The latest runs as a scheduler knows them, in bounded memory: the snapshots that their clients sent.

A client does not forward its events: it adds them up and sends a snapshot, which is some kilobytes for any run, and
complete: a lost message, or a scheduler that is reached late, leaves no gap. The scheduler adds the throughput over time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from daskinfer.diagnostics.dashboard.chunk_map import CellStates
from daskinfer.diagnostics.device_stats import DeviceStatus, merge_devices
from daskinfer.diagnostics.status import Status

MAX_RUNS = 12  # kept, the latest; arbitrary
MAX_DEVICES = 24  # told apart, like their colours; arbitrary
MAX_POINTS = 400  # of time; halved once there are more
STEP_SECONDS = 0.5  # between two of them, initially
OTHERS = "others"


@dataclass(frozen=True, slots=True)
class ChunkErrorRecord:
    """A failed attempt at rows ``start:stop``, and its error; ``at`` in seconds since 1970 by the client's clock."""

    at: float
    start: int
    stop: int
    device: str
    exception: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that the page shows of a run at one moment, with ``MAX_DEVICES`` devices at most.

    ``user`` is the user and host that started it, ``client`` the id of its client.
    """

    status: Status
    cells: CellStates
    errors: tuple[ChunkErrorRecord, ...]
    user: str = ""
    client: str = ""

    def to_message(self) -> dict[str, Any]:
        """Convert it to plain values, for one message."""
        return asdict(self)

    @staticmethod
    def from_message(message: Mapping[str, Any]) -> Snapshot:
        """Read a message.

        Raises
        ------
        TypeError, KeyError
            If another version of daskinfer wrote it.
        """
        devices = tuple(DeviceStatus(**device) for device in message["status"]["devices"])
        status = Status(**{**message["status"], "devices": devices})
        errors = tuple(ChunkErrorRecord(**error) for error in message["errors"])
        return Snapshot(status, CellStates(**message["cells"]), errors, message["user"], message["client"])


@dataclass
class ThroughputHistory:
    """Rows/s over time, by device in the order of their arrival; thinned out when it grows too long."""

    points: list[tuple[float, tuple[float, ...]]] = field(default_factory=list)
    step: float = STEP_SECONDS

    def add(self, seconds: float, speeds: tuple[float, ...]) -> None:
        """Add a point; of each step only the last is kept."""
        points = self.points
        if points and points[-1][0] // self.step == seconds // self.step:
            points.pop()
        points.append((seconds, speeds))
        if len(points) > MAX_POINTS:
            self.step *= 2
            self.points = list({point[0] // self.step: point for point in points}.values())


@dataclass
class RunView:
    """A run that is shown: its latest snapshot, its throughput, and when its first and last snapshot arrived by this clock.

    ``lost``: its client disconnected before the run ended.
    """

    snapshot: Snapshot
    first_seen: float
    last_seen: float
    n_updates: int = 0
    lost: bool = False
    throughput: ThroughputHistory = field(default_factory=ThroughputHistory)


class RunRegistry:
    """Keeps the latest runs; all clients of a scheduler send to the same one.

    Note: only used on the scheduler's loop.
    """

    def __init__(self) -> None:
        self._runs: dict[str, RunView] = {}

    def update(self, message: Mapping[str, Any]) -> None:
        """Take a client's snapshot of a run."""
        snapshot, now = Snapshot.from_message(message), time.time()
        status = snapshot.status
        # Those updated last come last: a run that is still running is never the one to be dropped.
        run = self._runs.pop(status.run) if status.run in self._runs else RunView(snapshot, now, now)
        self._runs[status.run] = run
        run.snapshot, run.last_seen, run.n_updates, run.lost = snapshot, now, run.n_updates + 1, False
        if status.seconds is not None and status.seconds >= STEP_SECONDS:  # before that, one chunk gives any throughput
            run.throughput.add(status.seconds, tuple(device.rows_per_second for device in status.devices))
        while len(self._runs) > MAX_RUNS:
            del self._runs[next(iter(self._runs))]

    def mark_lost(self, client: str) -> None:
        """Mark the runs of a client that disconnected, except those that have ended."""
        for run in self._runs.values():
            if run.snapshot.client == client:
                run.lost = not run.snapshot.status.ended

    @property
    def runs(self) -> list[RunView]:
        """All runs that are kept, the latest first."""
        return sorted(self._runs.values(), key=lambda run: run.first_seen, reverse=True)


def limit_devices(devices: Sequence[DeviceStatus]) -> tuple[DeviceStatus, ...]:
    """Limit devices to ``MAX_DEVICES``: the first ones, and all others as one."""
    if len(devices) <= MAX_DEVICES:
        return tuple(devices)
    return (*devices[: MAX_DEVICES - 1], merge_devices(devices[MAX_DEVICES - 1 :], OTHERS))
