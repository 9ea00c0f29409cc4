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
from daskinfer.diagnostics.dashboard.plugin import HANDLER, Page
from daskinfer.diagnostics.dashboard.state import Snapshot, Trouble, folded
from daskinfer.diagnostics.events import ChunkDone, ChunkFailed, ChunkStarted, Event, RunEnded, RunStarted
from daskinfer.diagnostics.status import Standing

logger = logging.getLogger(__name__)

SEND_SECONDS = 0.5  # as often as the page is drawn
PATIENCE_SECONDS = 0.5  # arbitrary; the cost of two messages is less than a hundredth of it
ANSWER_SECONDS = 60.0  # that a scheduler may take to answer before it is left alone; arbitrary
MAX_TROUBLES = 12  # that are told, the latest; arbitrary
MAX_CHARACTERS = 300  # of each, and of a network's name; arbitrary

_showing: weakref.WeakSet[Client] = weakref.WeakSet()  # clients whose scheduler has the page


class Sender:
    """A listener that has a run shown on the dashboard of the cluster that computes it.

    Note: the thread that waits for the answers tells it events, the client's loop asks how the run stands; both hold a lock,
    for microseconds and for half a millisecond.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._standing = Standing()
        self._map = ChunkMap((0, 0))
        self._numbers: dict[str, int] = {}  # of devices, in the order in which Standing has them
        self._troubles: deque[Trouble] = deque(maxlen=MAX_TROUBLES)
        self._client: Client | None = None
        self._over = asyncio.Event()
        self._well = True

    def __call__(self, event: Event) -> None:
        self._standing(event)
        if see := _SEE.get(type(event)):
            with self._lock:
                see(self, event)
        if isinstance(event, RunEnded) and self._client is not None:
            self._client.loop.add_callback(self._over.set)

    def connected(self, client: Client) -> None:
        """The run is computed by this client's cluster: show it there, from now on."""
        if self._client is None:
            self._client = client
            client.loop.add_callback(self._tell, client)

    def snapshot(self, now: float) -> Snapshot:
        """How the run stands ``now``, in seconds since 1970."""
        status = self._standing.status(now)
        with self._lock:
            told = tuple(self._troubles)
            cells = self._map.cells()
        model, error = status.model[:MAX_CHARACTERS], status.error[:MAX_CHARACTERS]
        client = "" if self._client is None else self._client.id
        return Snapshot(
            replace(status, devices=folded(status.devices), model=model, error=error), cells, told, _who(), client
        )

    def _run_started(self, event: RunStarted) -> None:
        self._map = ChunkMap(event.rows, event.done)
        self._numbers = {asked.device: number for number, asked in enumerate(event.devices)}

    def _chunk_started(self, event: ChunkStarted) -> None:
        self._map.began(event, self._number(event.device))

    def _chunk_failed(self, event: ChunkFailed) -> None:
        self._map.came_back(event)
        self._note(event.at, event.start, event.stop, event.device, event.exception)

    def _chunk_done(self, event: ChunkDone) -> None:
        self._map.done(event, self._number(event.device))
        for failure in event.failures:
            self._note(event.at, failure.start, failure.stop, failure.device, failure.exception)

    def _run_ended(self, event: RunEnded) -> None:
        self._map.ended()
        self._well = not event.error

    def _number(self, device: str) -> int:
        return self._numbers.setdefault(device, len(self._numbers))

    def _note(self, at: float, start: int, stop: int, device: str, exception: str) -> None:
        self._troubles.append(Trouble(at, start, stop, device, exception[:MAX_CHARACTERS]))

    async def _tell(self, client: Client) -> None:
        """Tell the scheduler how the run stands, until it has ended."""
        try:
            if await self._over_within(PATIENCE_SECONDS) and self._well:
                return
            if client not in _showing:
                await client.register_plugin(Page())
            while True:
                over = self._over.is_set()  # asked first: what is told after it is the end
                await self._tell_once(client)
                if over:
                    return
                await self._over_within(SEND_SECONDS)
        except (Exception, asyncio.CancelledError) as error:  # cancelled: the loop ends
            _showing.discard(client)
            logger.debug("the dashboard shows this run no more: %s: %s", type(error).__name__, error)

    async def _tell_once(self, client: Client) -> None:
        message = self.snapshot(time.time()).message()
        why = await asyncio.wait_for(getattr(client.scheduler, HANDLER)(message=message), ANSWER_SECONDS)
        if why:
            raise _NotShownError(why)
        if client not in _showing:
            _showing.add(client)
            logger.info("runs are shown at %s", str(client.dashboard_link).replace("/status", "/daskinfer"))

    async def _over_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._over.wait(), seconds)
        except TimeoutError:
            return False
        return True


@functools.cache
def _who() -> str:
    """The user and the host of this process, as far as they have names."""
    user = ""
    with contextlib.suppress(Exception):  # a number without a name, as in containers, raises what the system pleases
        user = f"{getpass.getuser()}@"
    return f"{user}{platform.node()}"[:MAX_CHARACTERS]


class _NotShownError(Exception):
    """The scheduler has no page; its argument says why."""


_SEE: dict[type[Event], Callable[[Sender, Any], None]] = {
    RunStarted: Sender._run_started,
    ChunkStarted: Sender._chunk_started,
    ChunkFailed: Sender._chunk_failed,
    ChunkDone: Sender._chunk_done,
    RunEnded: Sender._run_ended,
}
