"""The bounded window: which tasks are in flight on which device, and what they bring back.

Neither the scheduler nor this process ever holds more than ``n_places`` tasks per device (decision 1: one large restricted
graph is never queued by the scheduler, and blames every waiting chunk for a worker that dies). Which chunks go where is the
dealer's to say. Placement is by the resource of each device on our own clusters, which comes back with a restarted worker,
else by address. Each kind of device has a key prefix of its own, since Dask estimates a task's duration by its prefix.
"""

from __future__ import annotations

import contextlib
import queue
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distributed import Client, Future
from distributed.scheduler import KilledWorker

from daskinfer.arrays import Array
from daskinfer.dealer import Dealer
from daskinfer.errors import ChunkError, ClusterError
from daskinfer.lane import Feed, InFlight, Lane
from daskinfer.placement import workers_of
from daskinfer.records import Chunk, Receipt

SETTLE_SECONDS = 10.0  # for tasks of half a second each; arbitrary
PATIENCE_SECONDS = 5.0  # without an answer, until it is looked whether all workers are still there; arbitrary


@dataclass(frozen=True)
class Finished:
    """A chunk with its answer, (n, *shape) per output, none where it went into files; valid until the next is asked for."""

    chunk: Chunk
    arrays: Sequence[Array]
    receipt: Receipt


class Window:
    """The tasks in flight of one call; a context manager that cancels what is left.

    Note: one thread uses it. Futures tell their end to a queue from a thread of Dask's.

    Parameters
    ----------
    client
        Who submits.
    work
        The function of a task: called on a worker with ``order``, a task and what Dask brings for it.
    order
        What is the same for all tasks.
    lanes
        One per device.
    feed
        Makes a task of chunks, rows in memory put into the slot, and names the futures that Dask has to bring.
    settles
        Whether tasks in flight are waited for when the window is left early, for ``SETTLE_SECONDS`` at most: they write to
        files, which are removed next. A task that runs cannot be stopped.
    """

    def __init__(
        self,
        client: Client,
        work: Callable[..., Any],
        order: Any,
        lanes: Sequence[Lane],
        feed: Feed,
        *,
        settles: bool = False,
    ) -> None:
        self._client, self._work, self._order, self._lanes, self._feed = client, work, order, lanes, feed
        self._settles = settles
        self._ended: queue.SimpleQueue[tuple[Lane, Future]] = queue.SimpleQueue()
        self._name = uuid.uuid4().hex
        self._n_submitted = 0

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel what is in flight; its slots are never used again."""
        left = [future for lane in self._lanes for future in lane.tasks]
        if left and self._client.status == "running":
            if self._settles:
                _wait_for(left, SETTLE_SECONDS)
            self._client.cancel(left, force=True)

    def run(self, dealer: Dealer, before: Callable[[], int | None]) -> Iterator[Finished]:
        """Keep every lane full, and give the chunks as they end, until the dealer deals no more.

        No chunk is begun that starts at or after row ``before()``; None: no limit.
        """
        while self._fill(dealer, before()):
            lane, future = self._next()
            task = lane.tasks.pop(future)
            try:
                finished = _finished(task, _result(future, task))
            except BaseException:
                lane.tasks[future] = task  # its slot is not to be used again
                raise
            dealer.took(lane.device, task.chunks, sum(f.receipt.seconds + f.receipt.waited_seconds for f in finished))
            self._fill(dealer, before())  # before the answers are used: no worker need wait for that
            yield from finished
            if task.slot is not None:
                task.slot.free()

    def _fill(self, dealer: Dealer, before: int | None) -> bool:
        """Fill the lanes in turn, so that all begin as soon as can be; whether anything is in flight."""
        while sum(self._submit_next(lane, dealer, before) for lane in self._lanes):
            pass
        return any(lane.tasks for lane in self._lanes)

    def _submit_next(self, lane: Lane, dealer: Dealer, before: int | None) -> bool:
        if lane.full:
            return False
        dealt = dealer.deal(lane.device, before)
        if chunks := tuple(chunk for chunk in dealt if chunk.n_rows):
            self._submit(lane, chunks)
        return bool(dealt)

    def _submit(self, lane: Lane, chunks: tuple[Chunk, ...]) -> None:
        slot = lane.arena.free.pop() if lane.arena is not None else None
        task, brought = self._feed(chunks, slot, lane.workers)
        key = f"infer-{lane.kind}-{self._name}-{self._n_submitted}"
        future = self._client.submit(
            self._work, self._order, task.sealed(), brought, key=key, pure=False, **lane.restriction
        )
        self._n_submitted += 1
        lane.tasks[future] = InFlight(chunks, slot, tuple(piece.places for piece in task.pieces))
        future.add_done_callback(lambda future: self._ended.put((lane, future)))

    def _next(self) -> tuple[Lane, Future]:
        while True:
            try:
                return self._ended.get(timeout=PATIENCE_SECONDS)
            except queue.Empty:
                self._look_for_lost_workers()

    def _look_for_lost_workers(self) -> None:
        if self._client.status != "running":
            raise ClusterError(
                f"the client is {self._client.status}; it has to run until the call ends. Start the cluster again, and "
                "repeat the call."
            )
        there = workers_of(self._client)
        waiting = [address for lane in self._lanes if lane.tasks for address in lane.workers]
        if gone := [address for address in waiting if address not in there]:
            raise ClusterError(
                f"the worker {', '.join(gone)} is gone, with rows that it was computing; a worker has to outlive its "
                "chunks. Look into its log, and repeat the call with the workers that are left."
            )


def _finished(task: InFlight, blocks: Sequence[Any] | None) -> list[Finished]:
    """The chunks of a task with their answers, wherever these are."""
    receipts = task.slot.note() if task.slot is not None else [block.receipt for block in blocks or ()]
    found = []
    for i, (chunk, receipt) in enumerate(zip(task.chunks, receipts, strict=True)):
        places = task.places[i]
        if places is not None and task.slot is not None:
            arrays = [place.array(task.slot.arena.memory) for place in places]
        else:
            arrays = blocks[i].arrays if blocks else []
        found.append(Finished(chunk, arrays, receipt))
    return found


def _result(future: Future, task: InFlight) -> Sequence[Any] | None:
    """What came back; nothing is fetched where all of the answer is in shared memory."""
    if future.status == "finished" and task.slot is not None and None not in task.places:
        return None
    if future.status == "cancelled":
        raise ClusterError(
            f"the task of {task.rows} was cancelled, and not by this call: the scheduler was lost, or somebody did. "
            "Look whether the scheduler still runs, and repeat the call."
        )
    try:
        blocks: Sequence[Any] | None = future.result()
    except KilledWorker as error:
        raise ChunkError(
            f"chunk {task.chunks[0].index} ({task.rows}) ended its worker {_address(error.last_worker)}; a worker has to "
            "outlive its chunks. Look for an out-of-memory kill or a crash of the network, and use a smaller batch_size or "
            "leave the rows out."
        ) from error
    return blocks


def _address(worker: Any) -> str:
    """Of a worker as Dask's error has it: its record, or nothing."""
    return str(getattr(worker, "address", "")) or "(unknown)"


def _wait_for(futures: Sequence[Future], seconds: float) -> None:
    """Wait until tasks have ended, however they do."""
    deadline = time.monotonic() + seconds
    for future in futures:
        with contextlib.suppress(Exception):
            future.exception(timeout=max(0.0, deadline - time.monotonic()))
