"""The events of a run while it goes on: small frozen records, passed to the run's listeners one after the other.

They are the only source of everything that is shown: the bar in a terminal, the log's lines, the page on Dask's dashboard,
the report, and the function that a user passes as ``progress=``. All are sent by the thread that waits for results;
what a worker measures (seconds, memory, batch size) arrives with the stats of :class:`ChunkDone`.

Their order: ``RunStarted``; then, in any order, ``Connected``, ``BatchTuningStarted``, ``BatchSizeChosen``,
``ChunkStarted``, ``ChunkFailed``, ``ChunkDone`` and ``DeviceChanged``; ``RunEnded`` last, however the run ended. A chunk
that is retried starts again.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from daskinfer.core.chunks import BatchConfig, ChunkStats, RowFailure
from daskinfer.core.row_ranges import Range

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events: ``run`` names the run, ``at`` is the time in seconds since 1970, by this process's clock."""

    run: str
    at: float


@dataclass(frozen=True, slots=True)
class PlannedDevice:
    """A device of a run: its name, its model, its kind ("cuda", "cpu"), and the share of the rows that was requested of it.

    ``share`` is a fraction; None if no shares were requested.
    """

    device: str
    label: str
    kind: str
    share: float | None


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """A run begins; its workers may not have started yet.

    ``rows`` (start, stop) is the run's part of the input, all of it or its shard; ``done`` are the ranges of it that
    earlier calls computed, in order. ``model``, ``inputs`` and ``outputs`` describe what is computed. ``batch`` is what the
    plan or an earlier call chose. ``n_cores`` are the cores that this process may use; 0 if unknown.
    """

    model: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rows: Range
    done: tuple[Range, ...]
    batch: BatchConfig
    devices: tuple[PlannedDevice, ...]
    n_cores: int = 0

    @property
    def n_rows(self) -> int:
        """Number of rows of the run's part."""
        return self.rows[1] - self.rows[0]

    @property
    def n_rows_before(self) -> int:
        """Number of those rows that earlier calls computed."""
        return sum(stop - start for start, stop in self.done)


@dataclass(frozen=True, slots=True)
class Connected(Event):
    """A cluster computes the run; ``dashboard`` is the URL of the page that shows the run there.

    Empty if the cluster has none; but a client that knows only the scheduler's address gets a URL from Dask even if the
    scheduler was started without a dashboard.
    """

    dashboard: str


@dataclass(frozen=True, slots=True)
class BatchTuningStarted(Event):
    """Devices try several batch sizes on the first rows, which takes a while and completes no row."""


@dataclass(frozen=True, slots=True)
class BatchSizeChosen(Event):
    """The tuned batch sizes, overall and by kind of device; and the kinds on which images are channels_last."""

    batch: BatchConfig


@dataclass(frozen=True, slots=True)
class ChunkStarted(Event):
    """Rows ``start:stop`` were sent to a device."""

    start: int
    stop: int
    device: str


@dataclass(frozen=True, slots=True)
class ChunkDone(Event):
    """Rows ``start:stop`` have their result, except for those that failed, after this many ``attempts``."""

    start: int
    stop: int
    device: str
    stats: ChunkStats
    failures: tuple[RowFailure, ...]
    attempts: int

    @property
    def n_failed(self) -> int:
        """Number of rows that failed."""
        return sum(failure.stop - failure.start for failure in self.failures)


@dataclass(frozen=True, slots=True)
class ChunkFailed(Event):
    """An attempt at rows ``start:stop`` failed, or their worker died; they are retried, or given up."""

    start: int
    stop: int
    device: str
    exception: str


@dataclass(frozen=True, slots=True)
class DeviceChanged(Event):
    """What became of a device's worker.

    It is away and expected back (state "restarting"), it was restarted ("replaced"), or the device is lost ("gone") and the
    others continue.
    """

    device: str
    state: str


@dataclass(frozen=True, slots=True)
class RunEnded(Event):
    """The run is over: complete if ``error`` is empty, else ``error`` is what ended it."""

    error: str


Listener = Callable[[Event], Any]


class EventBus:
    """Passes a run's events on to its listeners.

    A listener that raises is disabled with a warning: a broken display never stops the computation. One that has a
    method ``attach_client(client)`` gets the client that computes, once there is one.
    """

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        self.run = uuid.uuid4().hex[:8]
        self._listeners = list(listeners)

    def __call__(self, event: Event) -> None:
        for listener in self._listeners[:]:
            self._notify(listener, listener, event)

    def add(self, listener: Listener) -> None:
        """Add a listener, for all events from now on."""
        self._listeners.append(listener)

    def attach_client(self, client: Any) -> None:
        """Pass the client that computes to the listeners that take it, and the URL of its dashboard to all."""
        for listener in self._listeners[:]:
            if attach := getattr(listener, "attach_client", None):
                self._notify(listener, attach, client)
        self(Connected(self.run, time.time(), _get_dashboard_url(client)))

    def _notify(self, listener: Listener, callback: Callable[[Any], Any], payload: Any) -> None:
        try:
            callback(payload)
        except Exception as error:
            self._listeners.remove(listener)
            name = getattr(listener, "__name__", None) or repr(listener)
            logger.warning("progress callback %s raised %s and was disabled: %s", name, type(error).__name__, error)


def _get_dashboard_url(client: Any) -> str:
    try:
        return str(client.dashboard_link or "").replace("/status", "/daskinfer")
    except Exception as error:  # a KeyError if the scheduler has none
        logger.debug("no dashboard: %s: %s", type(error).__name__, error)
        return ""
