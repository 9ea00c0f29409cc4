"""The bounded window: which tasks are in flight on which device, and what they bring back.

Neither the scheduler nor this process ever holds more than ``n_places`` tasks per device (decision 1: one large restricted
graph is never queued by the scheduler, and blames every waiting chunk for a worker that dies). Which chunks go where is the
dealer's to say. Placement is by the resource of each device on our own clusters, which comes back with a restarted worker,
else by address. Each kind of device has a key prefix of its own, since Dask estimates a task's duration by its prefix.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distributed import Client, Future
from distributed.scheduler import KilledWorker

from daskinfer.cluster.placement import workers_of
from daskinfer.cluster.restart import Replacer
from daskinfer.core.chunks import Chunk
from daskinfer.diagnostics.events import ChunkFailed, ChunkStarted, DeviceChanged, Listeners
from daskinfer.errors import ChunkError, ClusterError, DaskInferError, SchedulerLost
from daskinfer.execution.device_queue import Feed, Lane
from daskinfer.execution.results import Finished, InFlight, NeedsLostError, UnfetchedError, fetched
from daskinfer.execution.signals import StopNow
from daskinfer.scheduling.balancer import Dealer
from daskinfer.scheduling.retry import Book, ends_the_call, lost
from daskinfer.transport.row_sources import UnsentError
from daskinfer.worker.error_kinds import is_sticky

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 10.0  # for tasks of half a second each; arbitrary
PATIENCE_SECONDS = 5.0  # between looks whether all workers are still there; arbitrary
AWAY_PATIENCE_SECONDS = 0.5  # the same while one is awaited; arbitrary
LOOKS_PER_TIMEOUT = 4  # so that a chunk that hangs is noticed a quarter of its timeout late at most
NOTICE_SECONDS = 2.0  # that the scheduler may take to notice that a process has ended; 0.02 here
AWAY_SECONDS = 60.0  # that a worker may take to come back; arbitrary, 5 on an idle machine


@dataclass(frozen=True)
class Policy:
    """What is done about tasks that do not end well (``faults``).

    Parameters
    ----------
    retries, chunk_timeout
        As in ``Options``.
    replacer
        Ends workers that hang.
    give_up
        Called with a chunk that will not be tried again, the name of its device and why: what stands in for its answer, or
        the error is raised.
    back
        Called with the address of a worker in place of one that died, before it gets a task.
    tell
        Gets the events of tasks and devices.
    """

    retries: int
    chunk_timeout: float | None
    replacer: Replacer
    give_up: Callable[[Chunk, str, ChunkError], Finished]
    back: Callable[[str], None] = lambda address: None
    tell: Listeners = field(default_factory=Listeners)


class Window:
    """The tasks in flight of one call; a context manager that cancels what is left.

    Note: one thread uses it. Futures tell their end to a queue from a thread of Dask's.

    Parameters
    ----------
    client
        Who submits.
    work
        The function of a task: called on a worker with the order, a task and what Dask brings for it.
    order
        Gives what is the same for all tasks, itself or a future of it.
    lanes
        One per device.
    feed
        Makes a task of chunks, and names the futures that Dask has to bring.
    policy
        What is done about tasks that do not end well.
    settles
        Whether tasks in flight are waited for when the window is left early, for ``SETTLE_SECONDS`` at most: they write to
        files. A task that runs cannot be stopped.
    """

    def __init__(
        self,
        client: Client,
        work: Callable[..., Any],
        order: Callable[[], Any],
        lanes: Sequence[Lane],
        feed: Feed,
        policy: Policy,
        *,
        settles: bool = False,
    ) -> None:
        self._client, self._work, self._order, self._lanes, self._feed = client, work, order, lanes, feed
        self._policy, self._settles = policy, settles
        self._book = Book(policy.retries)
        self._ended: queue.SimpleQueue[tuple[Lane, Future]] = queue.SimpleQueue()
        self._name = uuid.uuid4().hex
        self._n_submitted = 0
        self._looked = time.monotonic()

    def __enter__(self) -> Window:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Cancel what is in flight; its slots are never used again."""
        left = [future for lane in self._lanes for future in lane.tasks]
        if left and self._client.status == "running":
            if self._settles and kind is not StopNow:
                _settled(left, SETTLE_SECONDS)
            self._client.cancel(left, force=True)

    def run(
        self, dealer: Dealer, before: Callable[[], int | None], draining: Callable[[], bool] = lambda: False
    ) -> Iterator[Finished]:
        """Keep every lane full, and give the chunks as they end, until the dealer deals no more.

        No chunk is begun that starts at or after row ``before()``; None: no limit. While ``draining()`` none is begun at
        all, and what is in flight ends.
        """

        def fill() -> bool:
            return self._fill(dealer, before(), draining=draining())

        while fill():
            if time.monotonic() - self._looked > self._patience:
                yield from self._look_around(dealer)
            try:
                lane, future = self._ended.get(timeout=self._wait_seconds)
            except queue.Empty:
                continue
            if future not in lane.tasks:
                continue  # it was taken back meanwhile
            if future.status in ("pending", "lost"):
                self._await(lane, future)  # its worker ended before its answer was asked for; now it is computed again
            else:
                yield from self._settle(lane, future, dealer, fill)

    @property
    def _patience(self) -> float:
        """Seconds between looks at what gives no answer."""
        timeout = self._policy.chunk_timeout
        awaited = any(lane.away_since is not None and not lane.gone for lane in self._lanes)
        patience = AWAY_PATIENCE_SECONDS if awaited else PATIENCE_SECONDS
        return patience if timeout is None else min(patience, timeout / LOOKS_PER_TIMEOUT)

    @property
    def _wait_seconds(self) -> float:
        due = self._book.wait_seconds
        return self._patience if due is None else min(self._patience, due)

    def _settle(self, lane: Lane, future: Future, dealer: Dealer, fill: Callable[[], bool]) -> Iterator[Finished]:
        """Use what a task brought back, or see to it that its chunks are run again."""
        task = lane.tasks[future]
        try:
            finished = fetched(future, task)
        except UnfetchedError:
            self._await(lane, future)
        except KilledWorker as error:
            del lane.tasks[future]  # its slot is not to be used again: its process may still be ending
            # Or the client keeps it, with all that its error's traceback names: this frame, the arena, and so itself.
            future.release()
            yield from self._died(lane, task, _address(error.last_worker), dealer)
        except NeedsLostError:
            del lane.tasks[future]
            yield from self._died(lane, task, lane.name, dealer)
        except Exception as error:
            del lane.tasks[future]
            if future.status == "error":  # its attempt has answered
                _free(task)
            future.release()
            if isinstance(error, DaskInferError):
                error.__traceback__ = None  # where in the worker and in Dask; its cause keeps its own
            yield from self._raised(lane, task, error, dealer)
        else:
            del lane.tasks[future]
            # Or it would be computed again where its worker ends before the answers are used: into a slot that is another's
            # by then.
            future.release()
            lane.quiet_since = time.monotonic()
            dealer.took(lane.device, task.chunks, sum(f.receipt.seconds + f.receipt.waited_seconds for f in finished))
            attempts = [self._book.settled(chunk) for chunk in task.chunks]
            fill()  # before the answers are used: no worker need wait for that
            yield from (replace(one, attempts=n) for one, n in zip(finished, attempts, strict=True))
            _free(task)

    def _raised(self, lane: Lane, task: InFlight, error: Exception, dealer: Dealer) -> Iterator[Finished]:
        if ends_the_call(error):
            raise error
        # Once per chunk: what is tried again mostly fails as before.
        level = logging.WARNING if self._book.is_new(task.chunks) else logging.DEBUG
        logger.log(level, "%s on %s: %s", task.rows, lane.name, error)
        self._tell_failed(lane, task, f"{type(error).__name__}: {error}")
        if len(task.chunks) > 1:  # one of them is at fault
            self._book.apart(task.chunks)
        elif not self._book.raised(task.chunks[0], error):
            assert isinstance(error, ChunkError)  # all else ends the call
            yield self._give_up(task.chunks[0], lane, error, dealer)
        # What comes from the process that was ended says nothing of the one after it.
        if is_sticky(error) and task.submitted > lane.replaced_at and not lane.gone:
            yield from self._replace(lane, lane.worker_of(_present(self._client)), dealer)

    def _died(self, lane: Lane, task: InFlight, worker: str, dealer: Dealer) -> Iterator[Finished]:
        logger.warning("the worker of %s ended with %s in flight; they are run again alone", lane.name, task.rows)
        self._tell_failed(lane, task, "its worker ended")
        for chunk in task.chunks:
            if not self._book.died(chunk, alone=task.alone):
                error = lost(chunk, worker, hung=task.hung, seconds=self._policy.chunk_timeout)
                yield self._give_up(chunk, lane, error, dealer)

    def _tell_failed(self, lane: Lane, task: InFlight, why: str) -> None:
        for chunk in task.chunks:
            self._policy.tell(ChunkFailed(self._policy.tell.run, time.time(), chunk.start, chunk.stop, lane.name, why))

    def _tell_changed(self, lane: Lane, state: str) -> None:
        self._policy.tell(DeviceChanged(self._policy.tell.run, time.time(), lane.name, state))

    def _give_up(self, chunk: Chunk, lane: Lane, error: ChunkError, dealer: Dealer) -> Finished:
        finished = self._policy.give_up(chunk, lane.name, error)
        dealer.dropped(chunk)
        return replace(finished, attempts=self._book.settled(chunk))

    def _fill(self, dealer: Dealer, before: int | None, *, draining: bool) -> bool:
        """Fill the lanes in turn, so that all begin as soon as can be; whether anything is in flight or waits for it."""
        while not draining and sum(self._submit_next(lane, dealer, before) for lane in self._lanes):
            pass
        waits = self._book.n_left > 0 or (dealer.n_rows_left > 0 and any(lane.nowhere for lane in self._lanes))
        return any(lane.tasks for lane in self._lanes) or (waits and not draining)

    def _submit_next(self, lane: Lane, dealer: Dealer, before: int | None) -> bool:
        if lane.full:
            return False
        if (chunk := self._book.due(alone=True)) and lane is self._emptiest():
            # What ended a worker runs with nothing beside it: the lane is emptied first.
            return not lane.tasks and self._submit(lane, (chunk,), alone=True)
        if chunk := self._book.due(alone=False):
            return self._submit(lane, (chunk,))
        for device in (lane.device, *(other.device for other in self._lanes if other.gone)):
            dealt = dealer.deal(device, before)
            if chunks := tuple(chunk for chunk in dealt if chunk.n_rows):
                return self._submit(lane, chunks)
            if dealt:
                return True
        return False

    def _emptiest(self) -> Lane:
        free = (lane for lane in self._lanes if not lane.full)
        return min(free, key=lambda lane: (lane.away_since is not None, len(lane.tasks)))

    def _submit(self, lane: Lane, chunks: tuple[Chunk, ...], *, alone: bool = False) -> bool:
        # Without a slot, those of lost tasks are never used again, the answer comes back by Dask's comms.
        slot = lane.arena.free.pop() if lane.arena is not None and lane.arena.free else None
        for chunk in chunks:
            self._book.begun(chunk)
        try:
            task, brought = self._feed(chunks, slot, lane.workers, reads=lane.reads)
        except UnsentError:
            self._book.apart(chunks)
            lane.away_since = time.monotonic()
            if slot is not None:
                slot.free()
            return False
        task = replace(task, alone=alone)
        key, order = f"infer-{lane.kind}-{self._name}-{self._n_submitted}", self._order()
        future = self._client.submit(self._work, order, task.sealed(), brought, key=key, pure=False, **lane.restriction)
        self._n_submitted += 1
        places = tuple(piece.places for piece in task.pieces)
        needs = [*brought, order] if isinstance(order, Future) else brought
        lane.tasks[future] = InFlight(chunks, slot, places, alone, time.monotonic(), tuple(needs))
        self._await(lane, future)
        tell, now = self._policy.tell, time.time()
        for chunk in chunks:
            tell(ChunkStarted(tell.run, now, chunk.start, chunk.stop, lane.name))
        return True

    def _await(self, lane: Lane, future: Future) -> None:
        future.add_done_callback(lambda future: self._ended.put((lane, future)))

    def _look_around(self, dealer: Dealer) -> Iterator[Finished]:
        """See which workers are there, and which of them take too long."""
        self._looked = now = time.monotonic()
        there = _present(self._client)
        for lane in self._lanes:
            address = lane.worker_of(there)
            if lane.gone:
                yield from self._take_back(lane, dealer)
            elif address is None:
                yield from self._wait_for(lane, now, dealer)
            else:
                yield from self._see_to(lane, address, now, dealer)

    def _see_to(self, lane: Lane, address: str, now: float, dealer: Dealer) -> Iterator[Finished]:
        """See to a device whose worker is there: does it answer?"""
        if lane.away_since is not None:
            lane.away_since, lane.quiet_since = None, now
        if lane.workers and address not in lane.workers:  # its nanny brought it back
            self._policy.back(address)
            lane.restriction = {"workers": [address]}
            yield from self._take_back(lane, dealer)
        if task := lane.hangs(self._policy.chunk_timeout, now):
            logger.warning("%s gives no answer within chunk_timeout on %s; its worker is replaced", task.rows, lane.name)
            task.hung = True
            yield from self._replace(lane, address, dealer)

    def _wait_for(self, lane: Lane, now: float, dealer: Dealer) -> Iterator[Finished]:
        """See to a device whose worker is away: is somebody about to bring it back?"""
        if lane.away_since is None:
            lane.away_since = now
        if lane.workers:  # it comes back under another address, and what waits for this one would do so for good
            yield from self._take_back(lane, dealer)
        comes_back = lane.nanny or not lane.workers
        if not comes_back or now - lane.away_since > AWAY_SECONDS:
            yield from self._go_on_without(lane, dealer)

    def _take_back(self, lane: Lane, dealer: Dealer) -> Iterator[Finished]:
        """Have all that a device has not answered yet run again."""
        tasks = {future: lane.tasks.pop(future) for future in lane.unanswered()}
        self._client.cancel(list(tasks), force=True)
        for task in tasks.values():
            yield from self._died(lane, task, lane.name, dealer)

    def _replace(self, lane: Lane, address: str | None, dealer: Dealer) -> Iterator[Finished]:
        """Have a device's worker replaced, or go on without it."""
        if self._policy.replacer.replace(lane.name, address):
            lane.replaced_at = time.monotonic()
            self._tell_changed(lane, "replaced")
            _until_gone(self._client, address)
        else:
            yield from self._go_on_without(lane, dealer)

    def _go_on_without(self, lane: Lane, dealer: Dealer) -> Iterator[Finished]:
        """Hand what a device has to the others."""
        lane.gone = True
        if all(other.gone for other in self._lanes):
            raise ClusterError(
                f"no worker is left of {', '.join(other.name for other in self._lanes)}, with rows still to compute; at "
                "least one has to be there, or to come back. Look into their logs, and repeat the call."
            )
        logger.warning("%s is gone; the others go on without it", lane.name)
        self._tell_changed(lane, "gone")
        dealer.leave(lane.device)
        yield from self._take_back(lane, dealer)


def _free(task: InFlight) -> None:
    if task.slot is not None:
        task.slot.free()


def _until_gone(client: Client, address: str | None) -> None:
    """Wait until the scheduler has noticed that a worker ended: a task that it still sent there would be blamed for it."""
    deadline = time.monotonic() + NOTICE_SECONDS
    while address in _present(client) and time.monotonic() < deadline:
        time.sleep(NOTICE_SECONDS / 100)


def _present(client: Client) -> dict[str, dict[str, Any]]:
    """The workers that the scheduler has."""
    if client.status == "running":
        with contextlib.suppress(OSError, TimeoutError, RuntimeError):
            return workers_of(client)
    raise SchedulerLost(
        f"the scheduler of the client is lost (the client is {client.status}); it has to run until the call ends. Start the "
        "cluster again, and repeat the call."
    )


def _address(worker: Any) -> str:
    """Of a worker as Dask's error has it: its record, or nothing."""
    return str(getattr(worker, "address", "")) or "(unknown)"


def _settled(futures: Sequence[Future], seconds: float) -> None:
    """Wait until tasks have ended, however they do."""
    deadline = time.monotonic() + seconds
    for future in futures:
        with contextlib.suppress(Exception):
            future.exception(timeout=max(0.0, deadline - time.monotonic()))
