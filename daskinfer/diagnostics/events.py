"""What a run says while it goes on: small frozen records, told to whoever listens, one after the other.

They are the one source of everything that is shown: the bar in a terminal, the log's lines, the page on Dask's dashboard,
the report, and the function that a user passes as ``progress=``. All are told in the thread that waits for the answers;
what a worker knows (seconds, memory, micro-batch) comes with the receipt in :class:`ChunkDone`.

Their order: ``RunStarted``; then, in any order, ``Connected``, ``BatchTuningStarted``, ``BatchSizeChosen``,
``ChunkStarted``, ``ChunkFailed``, ``ChunkDone`` and ``DeviceChanged``; ``RunEnded`` last, whatever ended the run. A chunk
that is tried again starts again.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from daskinfer.core.chunks import ChunkStats, RowFailure
from daskinfer.core.row_ranges import Range

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """Anything that is told: ``run`` names the run, ``at`` is when, in seconds since 1970 by this process's clock."""

    run: str
    at: float


@dataclass(frozen=True, slots=True)
class PlannedDevice:
    """A device of a run: its name, what it is, its kind ("cuda", "cpu"), and its planned share of the rows, a fraction."""

    device: str
    label: str
    kind: str
    share: float


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """A run begins: workers may still have to start.

    ``rows`` (start, stop) is the run's part of the input, all of it or its shard; ``done`` are the ranges of these that
    earlier calls computed, in order. ``model``, ``inputs`` and ``outputs`` say in words what is computed. ``by_kind`` and
    ``channels_last`` are what an earlier call chose, as in :class:`BatchSizeChosen`.
    """

    model: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rows: Range
    done: tuple[Range, ...]
    batch_size: int
    devices: tuple[PlannedDevice, ...]
    by_kind: Mapping[str, int] = field(default_factory=dict)
    channels_last: tuple[str, ...] = ()

    @property
    def n_rows(self) -> int:
        """Rows of the run's part."""
        return self.rows[1] - self.rows[0]

    @property
    def n_rows_before(self) -> int:
        """Of these, the rows that earlier calls computed."""
        return sum(stop - start for start, stop in self.done)


@dataclass(frozen=True, slots=True)
class Connected(Event):
    """Workers of a cluster compute; ``dashboard`` is the URL of the page that shows the run there.

    Empty where the cluster has none. Dask also names the port of a scheduler that was started without a dashboard to clients
    that know its address only.
    """

    dashboard: str


@dataclass(frozen=True, slots=True)
class BatchTuningStarted(Event):
    """Devices try micro-batches of several sizes on the first rows, which takes a while; no row is done by that."""


@dataclass(frozen=True, slots=True)
class BatchSizeChosen(Event):
    """Rows of a micro-batch, as measured, by kind of device too; and on which kinds images lie in channels_last."""

    batch_size: int
    by_kind: Mapping[str, int]
    channels_last: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChunkStarted(Event):
    """Rows ``start:stop`` are on their way to a device."""

    start: int
    stop: int
    device: str


@dataclass(frozen=True, slots=True)
class ChunkDone(Event):
    """Rows ``start:stop`` have their answer, but for those that failed; ``attempts`` says how often they were tried."""

    start: int
    stop: int
    device: str
    stats: ChunkStats
    failures: tuple[RowFailure, ...]
    attempts: int

    @property
    def n_failed(self) -> int:
        """Rows without an answer."""
        return sum(failure.stop - failure.start for failure in self.failures)


@dataclass(frozen=True, slots=True)
class ChunkFailed(Event):
    """Rows ``start:stop`` came back without an answer, or their worker ended; they are tried again, or given up."""

    start: int
    stop: int
    device: str
    exception: str


@dataclass(frozen=True, slots=True)
class DeviceChanged(Event):
    """A device's worker was "replaced", or the device is "gone" and the others go on without it."""

    device: str
    state: str


@dataclass(frozen=True, slots=True)
class RunEnded(Event):
    """A run is over: all is done where ``error`` is empty, else it says what ended it."""

    error: str


Listener = Callable[[Event], Any]


class EventBus:
    """Who is told of a run's events.

    A listener that raises is warned of, and told nothing more: what is shown never ends what is computed. One that has a
    method ``connected(client)`` gets the client that computes, once there is one.
    """

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        self.run = uuid.uuid4().hex[:8]
        self._listeners = list(listeners)

    def __call__(self, event: Event) -> None:
        for listener in self._listeners[:]:
            self._notify(listener, listener, event)

    def add(self, listener: Listener) -> None:
        """One more, from now on."""
        self._listeners.append(listener)

    def attach_client(self, client: Any) -> None:
        """Tell those who want to know which client computes, and all of them where its dashboard is."""
        for listener in self._listeners[:]:
            if connected := getattr(listener, "attach_client", None):
                self._notify(listener, connected, client)
        self(Connected(self.run, time.time(), _get_dashboard_url(client)))

    def _notify(self, listener: Listener, callback: Callable[[Any], Any], payload: Any) -> None:
        try:
            callback(payload)
        except Exception as error:
            self._listeners.remove(listener)
            logger.warning("progress is shown no more by %r: %s: %s", listener, type(error).__name__, error)


def _get_dashboard_url(client: Any) -> str:
    try:
        return str(client.dashboard_link or "").replace("/status", "/daskinfer")
    except Exception as error:  # a KeyError where the scheduler has none
        logger.debug("no dashboard: %s: %s", type(error).__name__, error)
        return ""
