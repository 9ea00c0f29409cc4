"""The client's side: a listener that sends snapshots of its run to the scheduler of the client that computes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import getpass
import logging
import platform
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from distributed import Client

from daskinfer.diagnostics.dashboard.chunk_map import ChunkMap
from daskinfer.diagnostics.dashboard.plugin import HANDLER, DashboardPlugin
from daskinfer.diagnostics.dashboard.state import ChunkErrorRecord, Snapshot, limit_devices
from daskinfer.diagnostics.events import ChunkDone, ChunkFailed, ChunkStarted, Event, RunEnded, RunStarted
from daskinfer.diagnostics.status import StatusTracker

logger = logging.getLogger(__name__)

SEND_SECONDS = 0.5  # as often as the page is drawn
INITIAL_DELAY_SECONDS = 0.5  # arbitrary; the cost of two messages is less than a hundredth of it
RESPONSE_TIMEOUT_SECONDS = 60.0  # without a response until the scheduler is given up; arbitrary
MAX_ERRORS = 12  # in a snapshot, the latest; arbitrary
MAX_TEXT_CHARACTERS = 300  # of each, and of a model's name; arbitrary

_registered_clients: weakref.WeakSet[Client] = weakref.WeakSet()  # clients whose scheduler has the page


class StatusPublisher:
    """A listener that shows its run on the dashboard of the cluster that computes it.

    Note: the thread that waits for results passes it events, the client's loop makes snapshots; both hold a lock, for
    microseconds and for half a millisecond.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tracker = StatusTracker()
        self._chunk_map = ChunkMap((0, 0))
        self._device_numbers: dict[str, int] = {}  # in the order of Status.devices
        self._errors: deque[ChunkErrorRecord] = deque(maxlen=MAX_ERRORS)
        self._client: Client | None = None
        self._ended = asyncio.Event()
        self._succeeded = True

    def __call__(self, event: Event) -> None:
        self._tracker(event)
        if handle := _HANDLERS.get(type(event)):
            with self._lock:
                handle(self, event)
        if isinstance(event, RunEnded) and self._client is not None:
            self._client.loop.add_callback(self._ended.set)

    def attach_client(self, client: Client) -> None:
        """Show the run on the dashboard of this client's cluster, from now on."""
        if self._client is None:
            self._client = client
            client.loop.add_callback(self._publish, client)

    def make_snapshot(self, now: float) -> Snapshot:
        """Return a snapshot of the run ``now``, in seconds since 1970."""
        status = self._tracker.get_status(now)
        with self._lock:
            errors, cells = tuple(self._errors), self._chunk_map.get_cells()
        status = replace(
            status,
            devices=limit_devices(status.devices),
            model=status.model[:MAX_TEXT_CHARACTERS],
            error=status.error[:MAX_TEXT_CHARACTERS],
        )
        return Snapshot(status, cells, errors, _get_user(), "" if self._client is None else self._client.id)

    def _handle_run_started(self, event: RunStarted) -> None:
        self._chunk_map = ChunkMap(event.rows, event.done)
        self._device_numbers = {planned.device: number for number, planned in enumerate(event.devices)}

    def _handle_chunk_started(self, event: ChunkStarted) -> None:
        self._chunk_map.mark_started(event, self._get_device_number(event.device))

    def _handle_chunk_failed(self, event: ChunkFailed) -> None:
        self._chunk_map.mark_failed(event)
        self._record_error(event.at, event.start, event.stop, event.device, event.exception)

    def _handle_chunk_done(self, event: ChunkDone) -> None:
        self._chunk_map.mark_done(event, self._get_device_number(event.device))
        for failure in event.failures:
            self._record_error(event.at, failure.start, failure.stop, failure.device, failure.exception)

    def _handle_run_ended(self, event: RunEnded) -> None:
        self._chunk_map.mark_ended()
        self._succeeded = not event.error

    def _get_device_number(self, device: str) -> int:
        return self._device_numbers.setdefault(device, len(self._device_numbers))

    def _record_error(self, at: float, start: int, stop: int, device: str, exception: str) -> None:
        self._errors.append(ChunkErrorRecord(at, start, stop, device, exception[:MAX_TEXT_CHARACTERS]))

    async def _publish(self, client: Client) -> None:
        """Send snapshots to the scheduler until the run has ended."""
        try:
            if await self._wait_ended(INITIAL_DELAY_SECONDS) and self._succeeded:
                return
            if client not in _registered_clients:
                await client.register_plugin(DashboardPlugin())
            while True:
                is_last = self._ended.is_set()  # read before sending, so that the last snapshot has the end
                await self._send_snapshot(client)
                if is_last:
                    return
                await self._wait_ended(SEND_SECONDS)
        except (Exception, asyncio.CancelledError) as error:  # cancelled: the loop stops
            _registered_clients.discard(client)
            logger.debug("the dashboard no longer shows this run: %s: %s", type(error).__name__, error)

    async def _send_snapshot(self, client: Client) -> None:
        message = self.make_snapshot(time.time()).to_message()
        problem = await asyncio.wait_for(getattr(client.scheduler, HANDLER)(message=message), RESPONSE_TIMEOUT_SECONDS)
        if problem:
            raise _PageUnavailableError(problem)
        if client not in _registered_clients:
            _registered_clients.add(client)
            logger.info("runs are shown at %s", str(client.dashboard_link).replace("/status", "/daskinfer"))

    async def _wait_ended(self, timeout: float) -> bool:
        try:
            await asyncio.wait_for(self._ended.wait(), timeout)
        except TimeoutError:
            return False
        return True


@functools.cache
def _get_user() -> str:
    """Return user@host of this process, or the host alone if the user has no name."""
    user = ""
    with contextlib.suppress(Exception):  # without a name, as in containers, the error depends on the system
        user = f"{getpass.getuser()}@"
    return f"{user}{platform.node()}"[:MAX_TEXT_CHARACTERS]


class _PageUnavailableError(Exception):
    """The scheduler cannot show the page; the argument is the reason."""


_HANDLERS: dict[type[Event], Callable[[StatusPublisher, Any], None]] = {
    RunStarted: StatusPublisher._handle_run_started,
    ChunkStarted: StatusPublisher._handle_chunk_started,
    ChunkFailed: StatusPublisher._handle_chunk_failed,
    ChunkDone: StatusPublisher._handle_chunk_done,
    RunEnded: StatusPublisher._handle_run_ended,
}
