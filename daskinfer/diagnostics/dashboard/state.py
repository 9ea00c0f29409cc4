"""The last runs as a scheduler knows them: what their clients told of them, boundedly much.

A client does not pass its events on: it sums them up and tells how the run stands, which is some kilobytes whatever the run,
and complete: one message that is lost, or a scheduler that was met late, leaves no hole. What the scheduler adds is the
course of the speeds over time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from daskinfer.diagnostics.dashboard.chunk_map import CellStates
from daskinfer.diagnostics.status import DeviceStatus, Status

MAX_RUNS = 12  # that are kept, the latest; arbitrary
MAX_DEVICES = 24  # that are told apart, as colours are; arbitrary
MAX_POINTS = 400  # of time; half as many once there are more
STEP_SECONDS = 0.5  # between two of them, at first
OTHERS = "others"


@dataclass(frozen=True, slots=True)
class ChunkErrorRecord:
    """Rows ``start:stop`` that came back without an answer, and why; ``at`` in seconds since 1970 by the client's clock."""

    at: float
    start: int
    stop: int
    device: str
    exception: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How a run stands: all that the page shows of it at one moment, ``MAX_DEVICES`` devices at most.

    ``user`` is the user and host that computes, ``client`` the id of its client.
    """

    status: Status
    cells: CellStates
    errors: tuple[ChunkErrorRecord, ...]
    user: str = ""
    client: str = ""

    def to_message(self) -> dict[str, Any]:
        """The same in plain values, for one message."""
        return asdict(self)

    @staticmethod
    def from_message(message: Mapping[str, Any]) -> Snapshot:
        """What a message says.

        Raises
        ------
        TypeError, KeyError
            Where another version of daskinfer wrote it.
        """
        devices = tuple(DeviceStatus(**device) for device in message["status"]["devices"])
        status = Status(**{**message["status"], "devices": devices})
        troubles = tuple(ChunkErrorRecord(**trouble) for trouble in message["troubles"])
        return Snapshot(status, CellStates(**message["cells"]), troubles, message["who"], message["client"])


@dataclass
class ThroughputHistory:
    """Rows/s over time, by device in the order in which they came; halved when it grows too long."""

    points: list[tuple[float, tuple[float, ...]]] = field(default_factory=list)
    step: float = STEP_SECONDS

    def add(self, seconds: float, speeds: tuple[float, ...]) -> None:
        """One more point; of each step the last one stays."""
        points = self.points
        if points and points[-1][0] // self.step == seconds // self.step:
            points.pop()
        points.append((seconds, speeds))
        if len(points) > MAX_POINTS:
            self.step *= 2
            self.points = list({point[0] // self.step: point for point in points}.values())


@dataclass
class RunView:
    """A run that is shown: its latest snapshot, its course, and when it was first and last heard of by this clock.

    ``lost``: its client is gone.
    """

    snapshot: Snapshot
    first_seen: float
    last_seen: float
    n_updates: int = 0
    lost: bool = False
    throughput: ThroughputHistory = field(default_factory=ThroughputHistory)


class RunRegistry:
    """Keeps the last runs; all clients of a scheduler tell the same one.

    Note: only for the scheduler's loop.
    """

    def __init__(self) -> None:
        self._runs: dict[str, RunView] = {}

    def update(self, message: Mapping[str, Any]) -> None:
        """What a client tells of a run."""
        snapshot, now = Snapshot.from_message(message), time.time()
        status = snapshot.status
        # Those heard of last come last: a run that goes on is never the one that has to leave.
        shown = self._runs.pop(status.run) if status.run in self._runs else RunView(snapshot, now, now)
        self._runs[status.run] = shown
        shown.snapshot, shown.last_seen, shown.n_updates, shown.lost = snapshot, now, shown.n_updates + 1, False
        if status.seconds is not None and status.seconds >= STEP_SECONDS:  # before, one chunk makes any speed
            shown.throughput.add(status.seconds, tuple(device.rows_per_second for device in status.devices))
        while len(self._runs) > MAX_RUNS:
            del self._runs[next(iter(self._runs))]

    def mark_lost(self, client: str) -> None:
        """A client is gone, and with it the runs of it that have not ended."""
        for shown in self._runs.values():
            if shown.snapshot.client == client:
                shown.lost = not shown.snapshot.status.ended

    @property
    def runs(self) -> list[RunView]:
        """All that are kept, the one that began last first."""
        return sorted(self._runs.values(), key=lambda shown: shown.first_seen, reverse=True)


def limit_devices(devices: Sequence[DeviceStatus]) -> tuple[DeviceStatus, ...]:
    """At most ``MAX_DEVICES`` devices: the first ones, and what the others do together."""
    if len(devices) <= MAX_DEVICES:
        return tuple(devices)
    kept, others = devices[: MAX_DEVICES - 1], devices[MAX_DEVICES - 1 :]
    together = DeviceStatus(
        device=OTHERS,
        label=f"{len(others)} devices",
        kind="",
        n_rows=sum(device.n_rows for device in others),
        n_failed=sum(device.n_failed for device in others),
        n_in_flight=sum(device.n_in_flight for device in others),
        n_retried=sum(device.n_retried for device in others),
        rows_per_second=sum(device.rows_per_second for device in others),
        asked_share=sum(device.asked_share for device in others),
        done_share=sum(device.done_share for device in others),
        batch_size=max(device.batch_size for device in others),
        state="",
    )
    return (*kept, together)
