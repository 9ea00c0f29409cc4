"""Computes the chunks of a call: in this process, on workers, or in the one until the others are there.

Where rows are computed, first match wins; each exit is one DEBUG line:

1. No rows: nowhere.
2. ``devices="inline"``: in this process.
3. A client, named devices, a GPU, or ``chunk_timeout``, which replaces workers: on the workers.
4. ``devices="auto"`` and CPUs only. Both ways were measured for this network in this process: the one that ends sooner,
   workers that have to be started first counted with it.
5. Its cluster is running: on the workers, unless these turn out slower than this process was.
6. The first rows are computed in this process, with all of torch's threads. What is left would end before workers could
   start: all of it there.
7. Workers are started beside it, and take over once they are there; whoever turns out slower stops.

So a short job costs what a plain loop costs, and a long one gets the workers. Answers computed with other numbers of
threads agree within rounding; who needs the same bytes names the devices.

On workers there are ``readers + 2`` tasks in flight per device: one computes, one writes, the others read ahead. There are
two where nothing is read ahead or written, and tasks are cut by speed: of rows that stay in this process's memory, whose
answers come back. What is done about tasks that do not end well stands in a table in ``faults``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from distributed import Client

from daskinfer.cluster.placement import Placement
from daskinfer.cluster.process_cluster import kept
from daskinfer.cluster.restart import Replacer
from daskinfer.core.chunks import Chunk, Failure, Receipt
from daskinfer.core.row_ranges import Ranges, left_over
from daskinfer.diagnostics.events import ChunkDone, ChunkFailed, ChunkStarted, Listeners, MicroBatchChosen, MicroBatchesTried
from daskinfer.errors import ChunkError, TooManyFailures
from daskinfer.execution.results import Finished
from daskinfer.execution.task_builder import Errand, Feeder
from daskinfer.execution.tuning import formatted_here, measure_here, measured, tuned, tuned_here
from daskinfer.execution.window import Policy, Window
from daskinfer.execution.worker_setup import asked, dealer_of, feeder_of, in_place, opened, order_of, ready
from daskinfer.planning.job import Call
from daskinfer.scheduling.balancer import Dealer
from daskinfer.scheduling.batching import MIN_BATCHES
from daskinfer.scheduling.retry import Book, ends_the_call
from daskinfer.scheduling.throughput_history import Known, memory
from daskinfer.storage.formats import Target
from daskinfer.worker import bad_rows
from daskinfer.worker.current_device import Seat, seat
from daskinfer.worker.task import Block, compute, read, run_task, store

logger = logging.getLogger(__name__)

START_SECONDS = 4.0  # until two workers that import torch are there, on 2 cores (measured: 3.6 to 4.3)
WARM_CHUNKS = 3  # of this process, until its speed tells anything: the first finds its memory and its kernels; arbitrary
MAX_THEIRS = 0.5  # of the time may be the caller's, copies of the answers above all, where speeds are compared; arbitrary
TRIAL_SECONDS = 0.5  # that workers compute before they are compared with this process; arbitrary
SLOWER = 0.9  # of this process's speed: workers that are slower stop; arbitrary, a tenth is noise


class Run:
    """One call on its way: iterate over its chunks as they end, in no particular order.

    Closing the iterator cancels what has not ended. ``began`` is when the first chunk was on its way, by
    ``time.perf_counter()``; None before. ``tell`` gets the events of chunks and devices. ``before()`` is the row at which no
    chunk may start yet; None: no limit. Once ``draining`` is True, which another thread or a signal may set, no chunk is
    begun any more.

    Raises
    ------
    ChunkError, ModelError
        While iterating: what the first chunk that fails raised; the others are cancelled.
    ClusterError
        While iterating: where a worker cannot do the work, or is gone.
    """

    def __init__(self, call: Call, tell: Listeners | None = None, before: Callable[[], int | None] = lambda: None) -> None:
        self._call, self._before, self.tell = call, before, tell or Listeners()
        self._n_threads: int | None = None  # torch's in this process; None: as they are
        self._n_failed = call.n_failed  # rows
        self.began: float | None = None
        self.draining = False

    @property
    def missing(self) -> Ranges:
        """Rows to compute."""
        return list(left_over((0, self._call.layout.n_rows), self._call.done))

    @property
    def micro_batches(self) -> Mapping[str, Any]:
        """The micro-batches that were chosen, as a manifest's header and the event have them."""
        job = self._call.job
        return {"batch_size": job.batch_size, "by_kind": dict(job.by_kind), "channels_last": job.channels_last}

    def __iter__(self) -> Generator[Finished, None, None]:
        call = self._call
        self._refuse_more_failures(())
        n_missing = sum(stop - start for start, stop in self.missing)
        known = memory.of(call.key) if n_missing else Known()
        for finished in self._finished():
            self._refuse_more_failures(finished.failures)
            n_missing -= finished.chunk.n_rows
            known.n_rows += finished.chunk.n_rows
            self._tell_done(finished)
            yield finished
        if n_missing > 0 and not self.draining:  # better no answer than one with holes
            raise ChunkError(f"{n_missing:,} rows were not computed, and nobody said why; this is a fault of daskinfer's.")
        self.draining = self.draining and n_missing > 0  # who was to be interrupted has ended

    def _refuse_more_failures(self, new: Sequence[Failure]) -> None:
        """Count rows that failed, and end the call where they are more than are allowed, earlier attempts' among them."""
        options = self._call.job.options
        self._n_failed += sum(failure.stop - failure.start for failure in new)
        if self._n_failed > (allowed := options.failures_allowed(self._call.part_rows)):
            last = f" The last: {new[-1].exception}." if new else ""
            raise TooManyFailures(
                f"{self._n_failed:,} rows failed; max_failed_rows={options.max_failed_rows!r} allows {allowed:,}.{last} "
                "Mend the rows, or allow more (--max-failed-rows)."
            )

    def _tell_done(self, done: Finished) -> None:
        chunk, receipt = done.chunk, done.receipt
        about = (receipt.device, receipt, done.failures, done.attempts)
        self.tell(ChunkDone(self.tell.run, time.time(), chunk.start, chunk.stop, *about))

    def _finished(self) -> Iterator[Finished]:
        call = self._call
        if call.layout.n_rows == 0:
            logger.debug("rule 1: no rows")
            return
        if call.placement.inline:
            logger.debug("rule 2: in this process")
            yield from self._inline(dealer_of(call, call.weights), 0, feeder_of(call, None))
        elif not call.placement.automatic or not call.balanced or call.job.options.chunk_timeout is not None:
            logger.debug("rule 3: on the workers")
            with opened(call.placement) as client:
                yield from self._on_workers(client)
        else:
            yield from _Automatic(self, call).run()

    def _inline(self, dealer: Dealer, device: int, feeder: Feeder) -> Iterator[Finished]:
        """In this process, task by task, until the dealer deals no more."""
        self.began = self.began or time.perf_counter()
        self._choose(formatted_here(self._call, seat()))
        while not self.draining and (chunks := dealer.deal(device)):
            call, here = self._call, replace(seat(), n_threads=self._n_threads)
            seconds = 0.0  # without what the caller does with the answers
            for chunk in chunks:
                if chunk.n_rows:
                    began = time.perf_counter()
                    finished = self._computed_here(chunk, feeder, here)
                    seconds += time.perf_counter() - began
                    yield finished
            dealer.took(device, chunks, seconds)
            if call.tunable and dealer.n_rows_left > MIN_BATCHES * call.job.batch_size:
                self._choose(tuned_here(call, feeder.rows, here, dealer.n_rows_left, dealer.speeds[device] or 1.0))

    def _tell_tried(self) -> None:
        self.tell(MicroBatchesTried(self.tell.run, time.time()))

    def _choose(self, call: Call) -> None:
        """Go on with the micro-batches of this call."""
        if call.job != self._call.job:
            self._call = call
            self.tell(MicroBatchChosen(self.tell.run, time.time(), **self.micro_batches))
        self._call = call

    def _computed_here(self, chunk: Chunk, feeder: Feeder, here: Seat) -> Finished:
        """One chunk in this process, as often as it takes."""
        call = self._call
        book = Book(call.job.options.retries)
        while True:
            book.begun(chunk)
            read_began = time.time()
            self.tell(ChunkStarted(self.tell.run, read_began, chunk.start, chunk.stop, here.device))
            try:
                since = time.perf_counter()
                rows = read(lambda: feeder.rows(chunk), chunk)
                read_seconds = time.perf_counter() - since
                block = compute(rows, chunk.start, chunk.stop, call.recipe, call.job, here)
                return _stored(chunk, block, call.targets, read_began, read_seconds)
            except ChunkError as error:
                why = f"{type(error).__name__}: {error}"
                self.tell(ChunkFailed(self.tell.run, time.time(), chunk.start, chunk.stop, here.device, why))
                if ends_the_call(error):
                    raise
                if not book.raised(chunk, error):
                    return self._give_up(chunk, here.device, error)
                time.sleep(book.wait_seconds or 0.0)

    def _give_up(self, chunk: Chunk, device: str, error: ChunkError) -> Finished:
        """What stands in for the answer of a chunk that will not be tried again."""
        call = self._call
        if call.job.options.on_error == "raise":
            raise error
        arrays = [np.empty((chunk.n_rows, *look.shape[1:]), look.dtype) for look in call.job.outputs or ()]
        bad_rows.fill(arrays, slice(None), call.job.options.fill_value)
        receipt = Receipt(chunk.start, chunk.stop, device, "", 0, 0.0, "")
        failure = Failure(chunk.start, chunk.stop, device, f"{type(error).__name__}: {error}")
        return _stored(chunk, Block(arrays, receipt, failures=(failure,)), call.targets, time.time(), 0.0)

    def _policy(self, client: Client, folders: Mapping[str, str], back: Callable[[str], None]) -> Policy:
        options = self._call.job.options
        replacer = Replacer(client, folders, allowed=options.restart_workers)
        return Policy(options.retries, options.chunk_timeout, replacer, self._give_up, back, self.tell)

    def _on_workers(self, client: Client, dealer: Dealer | None = None) -> Iterator[Finished]:
        """On the workers; without a dealer, the micro-batch may still be chosen, and then the chunks."""
        self.tell.connected(client)
        with ready(self._call, client) as (lanes, feeder, shipment, folders):
            order, settled = order_of(self._call, shipment.recipe), dealer is not None
            self._choose(tuned(self._call, client, order, lanes, feeder.task, self._tell_tried, settled=settled))
            # Not where answers are wanted in order: they wait for those before them.
            only = self._before() is None and all(in_place(self._call, reads=lane.reads) for lane in lanes)
            dealer = dealer or dealer_of(self._call, self._call.weights, answers_only=only)
            self.began = self.began or time.perf_counter()
            errand = Errand(client, order_of(self._call, shipment.recipe))
            settles = bool(self._call.targets)
            policy = self._policy(client, folders, shipment.to)
            with Window(client, run_task, errand, lanes, feeder.task, policy, settles=settles) as window:
                yield from window.run(dealer, self._before, lambda: self.draining)
        known = memory.of(self._call.key).speeds
        known |= {d.name: speed for d, speed in zip(self._call.placement.devices, dealer.speeds, strict=False) if speed}


class _Automatic:
    """Rules 4 to 7: this process is one more device of the dealer, the last; either it or the workers have a weight."""

    def __init__(self, run: Run, call: Call) -> None:
        self._run, self._call = run, call
        self._here = len(call.weights)
        self._dealer = dealer_of(call, [*call.weights, 0.0])
        self._known: Known = memory.of(call.key)

    def run(self) -> Iterator[Finished]:
        speeds, n_rows = self._known.speeds, self._call.layout.n_rows
        there = kept.has(asked(self._call.placement))
        if {"inline", "workers"} <= speeds.keys():
            logger.debug("rule 4: measured before, %s", speeds)
            sooner = n_rows / speeds["workers"] + (0.0 if there else START_SECONDS) < n_rows / speeds["inline"]
            yield from self._on_workers() if sooner else self._inline()
        elif there:
            logger.debug("rule 5: the workers are there")
            yield from self._on_workers()
        else:
            yield from self._until_workers_are_there()

    def _until_workers_are_there(self) -> Iterator[Finished]:
        starting: _Starting | None = None
        for n_chunks, finished in enumerate(self._inline()):
            yield finished
            speed = self._dealer.speeds[self._here]
            if starting is None and speed and n_chunks >= WARM_CHUNKS and self._dealer.n_rows_left / speed > START_SECONDS:
                logger.debug("rule 7: %d rows are left at %.0f rows/s, workers start", self._dealer.n_rows_left, speed)
                self._note("inline", speed)
                starting = _Starting(self._call.placement)
                # Threads that wait for one another stand still while others have their cores.
                self._run._n_threads = max(1, torch.get_num_threads() // 2)
            if starting is not None and starting.ready:
                self._dealer.weigh(self._here, 0.0)  # its last task is ended first
        self._run._n_threads = None
        if self._run.draining:
            return
        if starting is None:
            logger.debug("rule 6: all of it in this process")
            self._note("inline", self._dealer.speeds[self._here])
        if self._dealer.n_rows_left:
            yield from self._on_workers()

    def _inline(self) -> Iterator[Finished]:
        for device in range(self._here):
            self._dealer.weigh(device, 0.0)
        self._dealer.weigh(self._here, 1.0)
        if speed := self._known.speeds.get("inline"):
            self._dealer.expect(self._here, speed)
        yield from self._run._inline(self._dealer, self._here, feeder_of(self._call, None))

    def _on_workers(self) -> Iterator[Finished]:
        """On the workers, until they are seen to be slower than this process."""
        here = self._known.speeds.get("inline", 0.0)
        for device, weight in enumerate(self._call.weights):
            self._dealer.weigh(device, weight)
        self._dealer.weigh(self._here, 0.0)
        began, n_done, theirs = None, 0, 0.0  # seconds of the caller's, who uses the answers meanwhile
        with opened(self._call.placement) as client:
            for finished in self._run._on_workers(client, self._dealer):
                began = began or time.perf_counter()
                given = time.perf_counter()
                yield finished
                n_done += finished.chunk.n_rows
                seconds = time.perf_counter() - began
                theirs += time.perf_counter() - given
                # Workers that wait for the caller tell nothing of how fast they are.
                if theirs < MAX_THEIRS * seconds and seconds > TRIAL_SECONDS and n_done / seconds < SLOWER * here:
                    logger.debug("the workers do %.0f rows/s, this process %.0f: it goes on", n_done / seconds, here)
                    for device in range(self._here):
                        self._dealer.weigh(device, 0.0)
            if began is not None and theirs < MAX_THEIRS * (time.perf_counter() - began):
                self._note("workers", n_done / max(1e-6, time.perf_counter() - began))
        yield from self._inline() if self._dealer.n_rows_left and not self._run.draining else ()

    def _note(self, layout: str, speed: float | None) -> None:
        if speed:
            self._known.speeds[layout] = speed


class _Starting:
    """A cluster that starts in a thread of its own and is kept; one that does not start is warned of, and missed."""

    def __init__(self, placement: Placement) -> None:
        self.ready = False
        self._placement = placement
        threading.Thread(target=self._start, name="daskinfer-start", daemon=True).start()

    def _start(self) -> None:
        try:
            with opened(self._placement):
                self.ready = True
        except Exception as error:
            logger.warning("the workers did not start, this process goes on alone: %s", error)


def speeds(call: Call) -> dict[str, float]:
    """Rows/s of each device on the first rows, all devices at once; workers are started for it where there are none.

    Remembered, so that the next call begins with them.
    """
    sizes, n_rows = call.tried_sizes, call.layout.n_rows if call.has_choice else 0  # rows that are worth a choice
    if call.placement.inline:
        speed = measure_here(call, feeder_of(call, None).rows, seat(), sizes, n_rows, usual=True).speed
        found = {call.placement.devices[0].name: speed}
    else:
        with opened(call.placement) as client, ready(call, client) as (lanes, feeder, shipment, _):
            order = order_of(call, shipment.recipe)
            by_lane = measured(call, client, order, lanes, feeder.task, sizes, n_rows // len(lanes), usual=True)
            found = {call.placement.devices[i].name: best.speed for i, best in by_lane.items()}
    memory.of(call.key).speeds.update(found)
    return found


def _stored(chunk: Chunk, block: Block, targets: Sequence[Target], read_began: float, read_seconds: float) -> Finished:
    block, write_seconds = store(block, chunk, targets)
    assert block.receipt is not None  # a chunk with rows
    receipt = block.receipt.timed(
        read_began=read_began,
        ended=time.time(),
        read_seconds=read_seconds,
        write_seconds=write_seconds,
        waited_seconds=read_seconds,
    )
    return Finished(chunk, block.arrays, receipt, block.written, block.failures)
