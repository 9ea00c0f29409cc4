"""Tells the scheduler of the client that computes how a run stands."""

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
RESPONSE_TIMEOUT_SECONDS = 60.0  # that a scheduler may take to answer before it is left alone; arbitrary
MAX_ERRORS = 12  # that are told, the latest; arbitrary
MAX_TEXT_CHARACTERS = 300  # of each, and of a network's name; arbitrary

_registered_clients: weakref.WeakSet[Client] = weakref.WeakSet()  # clients whose scheduler has the page


class StatusPublisher:
    """A listener that has a run shown on the dashboard of the cluster that computes it.

    Note: the thread that waits for the answers tells it events, the client's loop asks how the run stands; both hold a lock,
    for microseconds and for half a millisecond.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tracker = StatusTracker()
        self._chunk_map = ChunkMap((0, 0))
        self._device_numbers: dict[str, int] = {}  # of devices, in the order in which Standing has them
        self._errors: deque[ChunkErrorRecord] = deque(maxlen=MAX_ERRORS)
        self._client: Client | None = None
        self._ended = asyncio.Event()
        self._succeeded = True

    def __call__(self, event: Event) -> None:
        self._tracker(event)
        if see := _HANDLERS.get(type(event)):
            with self._lock:
                see(self, event)
        if isinstance(event, RunEnded) and self._client is not None:
            self._client.loop.add_callback(self._ended.set)

    def attach_client(self, client: Client) -> None:
        """The run is computed by this client's cluster: show it there, from now on."""
        if self._client is None:
            self._client = client
            client.loop.add_callback(self._publish, client)

    def make_snapshot(self, now: float) -> Snapshot:
        """How the run stands ``now``, in seconds since 1970."""
        status = self._tracker.get_status(now)
        with self._lock:
            told = tuple(self._errors)
            cells = self._chunk_map.get_cells()
        model, error = status.model[:MAX_TEXT_CHARACTERS], status.error[:MAX_TEXT_CHARACTERS]
        client = "" if self._client is None else self._client.id
        return Snapshot(
            replace(status, devices=limit_devices(status.devices), model=model, error=error),
            cells,
            told,
            _get_user(),
            client,
        )

    def _handle_run_started(self, event: RunStarted) -> None:
        self._chunk_map = ChunkMap(event.rows, event.done)
        self._device_numbers = {asked.device: number for number, asked in enumerate(event.devices)}

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
        """Tell the scheduler how the run stands, until it has ended."""
        try:
            if await self._wait_ended(INITIAL_DELAY_SECONDS) and self._succeeded:
                return
            if client not in _registered_clients:
                await client.register_plugin(DashboardPlugin())
            while True:
                over = self._ended.is_set()  # asked first: what is told after it is the end
                await self._send_snapshot(client)
                if over:
                    return
                await self._wait_ended(SEND_SECONDS)
        except (Exception, asyncio.CancelledError) as error:  # cancelled: the loop ends
            _registered_clients.discard(client)
            logger.debug("the dashboard shows this run no more: %s: %s", type(error).__name__, error)

    async def _send_snapshot(self, client: Client) -> None:
        message = self.make_snapshot(time.time()).to_message()
        why = await asyncio.wait_for(getattr(client.scheduler, HANDLER)(message=message), RESPONSE_TIMEOUT_SECONDS)
        if why:
            raise _PageUnavailableError(why)
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
    """The user and the host of this process, as far as they have names."""
    user = ""
    with contextlib.suppress(Exception):  # a number without a name, as in containers, raises what the system pleases
        user = f"{getpass.getuser()}@"
    return f"{user}{platform.node()}"[:MAX_TEXT_CHARACTERS]


class _PageUnavailableError(Exception):
    """The scheduler has no page; its argument says why."""


_HANDLERS: dict[type[Event], Callable[[StatusPublisher, Any], None]] = {
    RunStarted: StatusPublisher._handle_run_started,
    ChunkStarted: StatusPublisher._handle_chunk_started,
    ChunkFailed: StatusPublisher._handle_chunk_failed,
    ChunkDone: StatusPublisher._handle_chunk_done,
    RunEnded: StatusPublisher._handle_run_ended,
}
