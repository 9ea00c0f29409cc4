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

On workers there are ``prefetch + 2`` tasks in flight per device: one computes, one writes, the others read ahead. There are
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
from daskinfer.cluster.process_cluster import default_cluster
from daskinfer.cluster.restart import WorkerRestarter
from daskinfer.core.chunks import Chunk, ChunkStats, RowFailure
from daskinfer.core.row_ranges import Ranges, subtract_ranges
from daskinfer.diagnostics.events import BatchSizeChosen, BatchTuningStarted, ChunkDone, ChunkFailed, ChunkStarted, EventBus
from daskinfer.errors import ChunkError, TooManyFailures
from daskinfer.execution.results import ChunkResult
from daskinfer.execution.task_builder import ContextPublisher, TaskBuilder
from daskinfer.execution.tuning import apply_memory_format_inline, benchmark_devices, benchmark_inline, tune, tune_inline
from daskinfer.execution.window import FailurePolicy, TaskWindow
from daskinfer.execution.worker_setup import (
    can_read_inputs_in_place,
    device_ids,
    make_balancer,
    make_task_builder,
    make_task_context,
    open_client,
    prepare_workers,
)
from daskinfer.planning.job import InferenceJob
from daskinfer.scheduling.balancer import LoadBalancer
from daskinfer.scheduling.batching import MIN_BATCHES
from daskinfer.scheduling.retry import RetryQueue, is_fatal_error
from daskinfer.scheduling.throughput_history import PerformanceRecord, history
from daskinfer.storage.formats import Target
from daskinfer.worker import bad_rows
from daskinfer.worker.current_device import WorkerDevice, current_device
from daskinfer.worker.task import ComputedChunk, compute_chunk, read_chunk, run_task, write_outputs

logger = logging.getLogger(__name__)

CLUSTER_START_SECONDS = 4.0  # until two workers that import torch are there, on 2 cores (measured: 3.6 to 4.3)
WARMUP_CHUNKS = 3  # of this process, until its speed tells anything: the first finds its memory and its kernels; arbitrary
MAX_CALLER_SHARE = (
    0.5  # of the time may be the caller's, copies of the answers above all, where speeds are compared; arbitrary
)
MIN_COMPARE_SECONDS = 0.5  # that workers compute before they are compared with this process; arbitrary
MIN_WORKER_SPEED_RATIO = 0.9  # of this process's speed: workers that are slower stop; arbitrary, a tenth is noise


class Run:
    """One call on its way: iterate over its chunks as they end, in no particular order.

    Closing the iterator cancels what has not ended. ``started_at`` is when the first chunk was on its way, by
    ``time.perf_counter()``; None before. ``events`` gets the events of chunks and devices. ``before()`` is the row at which no
    chunk may start yet; None: no limit. Once ``draining`` is True, which another thread or a signal may set, no chunk is
    begun any more.

    Raises
    ------
    ChunkError, ModelError
        While iterating: what the first chunk that fails raised; the others are cancelled.
    ClusterError
        While iterating: where a worker cannot do the work, or is gone.
    """

    def __init__(
        self, job: InferenceJob, events: EventBus | None = None, get_row_limit: Callable[[], int | None] = lambda: None
    ) -> None:
        self._job, self._get_row_limit, self.events = job, get_row_limit, events or EventBus()
        self._n_threads: int | None = None  # torch's in this process; None: as they are
        self._n_failed = job.n_failed  # rows
        self.started_at: float | None = None
        self.draining = False

    @property
    def missing(self) -> Ranges:
        """Rows to compute."""
        return list(subtract_ranges((0, self._job.layout.n_rows), self._job.done))

    @property
    def batch_config(self) -> Mapping[str, Any]:
        """The micro-batches that were chosen, as a manifest's header and the event have them."""
        job = self._job.run_config
        return {"batch_size": job.batch_size, "by_kind": dict(job.by_kind), "channels_last": job.channels_last}

    def __iter__(self) -> Generator[ChunkResult, None, None]:
        call = self._job
        self._check_failed_rows(())
        n_missing = sum(stop - start for start, stop in self.missing)
        known = history.get_or_create(call.history_key) if n_missing else PerformanceRecord()
        for finished in self._iter_results():
            self._check_failed_rows(finished.failures)
            n_missing -= finished.chunk.n_rows
            known.n_rows += finished.chunk.n_rows
            self._emit_chunk_done(finished)
            yield finished
        if n_missing > 0 and not self.draining:  # better no answer than one with holes
            raise ChunkError(f"{n_missing:,} rows were not computed, and nobody said why; this is a fault of daskinfer's.")
        self.draining = self.draining and n_missing > 0  # who was to be interrupted has ended

    def _check_failed_rows(self, failures: Sequence[RowFailure]) -> None:
        """Count rows that failed, and end the call where they are more than are allowed, earlier attempts' among them."""
        options = self._job.run_config.options
        self._n_failed += sum(failure.stop - failure.start for failure in failures)
        if self._n_failed > (allowed := options.compute_max_failed_rows(self._job.part_rows)):
            last = f" The last: {failures[-1].exception}." if failures else ""
            raise TooManyFailures(
                f"{self._n_failed:,} rows failed; max_failed_rows={options.max_failed_rows!r} allows {allowed:,}.{last} "
                "Mend the rows, or allow more (--max-failed-rows)."
            )

    def _emit_chunk_done(self, result: ChunkResult) -> None:
        chunk, receipt = result.chunk, result.stats
        about = (receipt.device, receipt, result.failures, result.attempts)
        self.events(ChunkDone(self.events.run, time.time(), chunk.start, chunk.stop, *about))

    def _iter_results(self) -> Iterator[ChunkResult]:
        call = self._job
        if call.layout.n_rows == 0:
            logger.debug("rule 1: no rows")
            return
        if call.placement.is_inline:
            logger.debug("rule 2: in this process")
            yield from self._run_inline(make_balancer(call, call.weights), 0, make_task_builder(call, None))
        elif (
            not call.placement.can_choose_executor or not call.balanced or call.run_config.options.chunk_timeout is not None
        ):
            logger.debug("rule 3: on the workers")
            with open_client(call.placement) as client:
                yield from self._run_on_workers(client)
        else:
            yield from _AutoExecutor(self, call).run()

    def _run_inline(self, balancer: LoadBalancer, device: int, builder: TaskBuilder) -> Iterator[ChunkResult]:
        """In this process, task by task, until the dealer deals no more."""
        self.started_at = self.started_at or time.perf_counter()
        self._apply_batch_config(apply_memory_format_inline(self._job, current_device()))
        while not self.draining and (chunks := balancer.next_task(device)):
            call, here = self._job, replace(current_device(), n_threads=self._n_threads)
            seconds = 0.0  # without what the caller does with the answers
            for chunk in chunks:
                if chunk.n_rows:
                    began = time.perf_counter()
                    finished = self._compute_inline(chunk, builder, here)
                    seconds += time.perf_counter() - began
                    yield finished
            balancer.record(device, chunks, seconds)
            if call.tunable and balancer.n_rows_left > MIN_BATCHES * call.run_config.batch_size:
                self._apply_batch_config(
                    tune_inline(call, builder.read_rows, here, balancer.n_rows_left, balancer.speeds[device] or 1.0)
                )

    def _emit_tuning_started(self) -> None:
        self.events(BatchTuningStarted(self.events.run, time.time()))

    def _apply_batch_config(self, job: InferenceJob) -> None:
        """Go on with the micro-batches of this call."""
        if job.run_config != self._job.run_config:
            self._job = job
            self.events(BatchSizeChosen(self.events.run, time.time(), **self.batch_config))
        self._job = job

    def _compute_inline(self, chunk: Chunk, builder: TaskBuilder, worker_device: WorkerDevice) -> ChunkResult:
        """One chunk in this process, as often as it takes."""
        call = self._job
        book = RetryQueue(call.run_config.options.retries)
        while True:
            book.on_start(chunk)
            read_began = time.time()
            self.events(ChunkStarted(self.events.run, read_began, chunk.start, chunk.stop, worker_device.device))
            try:
                since = time.perf_counter()
                rows = read_chunk(lambda: builder.read_rows(chunk), chunk)
                read_seconds = time.perf_counter() - since
                block = compute_chunk(rows, chunk.start, chunk.stop, call.loader, call.run_config, worker_device)
                return _store_result(chunk, block, call.targets, read_began, read_seconds)
            except ChunkError as error:
                why = f"{type(error).__name__}: {error}"
                self.events(ChunkFailed(self.events.run, time.time(), chunk.start, chunk.stop, worker_device.device, why))
                if is_fatal_error(error):
                    raise
                if not book.on_error(chunk, error):
                    return self._give_up(chunk, worker_device.device, error)
                time.sleep(book.wait_seconds or 0.0)

    def _give_up(self, chunk: Chunk, device: str, error: ChunkError) -> ChunkResult:
        """What stands in for the answer of a chunk that will not be tried again."""
        call = self._job
        if call.run_config.options.on_error == "raise":
            raise error
        arrays = [np.empty((chunk.n_rows, *look.shape[1:]), look.dtype) for look in call.run_config.outputs or ()]
        bad_rows.fill_rows(arrays, slice(None), call.run_config.options.fill_value)
        receipt = ChunkStats(chunk.start, chunk.stop, device, "", 0, 0.0, "")
        failure = RowFailure(chunk.start, chunk.stop, device, f"{type(error).__name__}: {error}")
        return _store_result(chunk, ComputedChunk(arrays, receipt, failures=(failure,)), call.targets, time.time(), 0.0)

    def _make_policy(
        self, client: Client, folders: Mapping[str, str], on_worker_restart: Callable[[str], None]
    ) -> FailurePolicy:
        options = self._job.run_config.options
        replacer = WorkerRestarter(client, folders, allow_external=options.restart_workers)
        return FailurePolicy(options.retries, options.chunk_timeout, replacer, self._give_up, on_worker_restart, self.events)

    def _run_on_workers(self, client: Client, balancer: LoadBalancer | None = None) -> Iterator[ChunkResult]:
        """On the workers; without a dealer, the micro-batch may still be chosen, and then the chunks."""
        self.events.attach_client(client)
        with prepare_workers(self._job, client) as (lanes, feeder, shipment, folders):
            order, settled = make_task_context(self._job, shipment.loader), balancer is not None
            self._apply_batch_config(
                tune(self._job, client, order, lanes, feeder.build_task, self._emit_tuning_started, batch_size_fixed=settled)
            )
            # Not where answers are wanted in order: they wait for those before them.
            only = self._get_row_limit() is None and all(
                can_read_inputs_in_place(self._job, reads_process_memory=lane.reads_process_memory) for lane in lanes
            )
            balancer = balancer or make_balancer(self._job, self._job.weights, outputs_only=only)
            self.started_at = self.started_at or time.perf_counter()
            errand = ContextPublisher(client, make_task_context(self._job, shipment.loader))
            settles = bool(self._job.targets)
            policy = self._make_policy(client, folders, shipment.send_to)
            with TaskWindow(client, run_task, errand, lanes, feeder.build_task, policy, wait_on_exit=settles) as window:
                yield from window.run(balancer, self._get_row_limit, lambda: self.draining)
        known = history.get_or_create(self._job.history_key).speeds
        known |= {d.name: speed for d, speed in zip(self._job.placement.devices, balancer.speeds, strict=False) if speed}


class _AutoExecutor:
    """Rules 4 to 7: this process is one more device of the dealer, the last; either it or the workers have a weight."""

    def __init__(self, run: Run, job: InferenceJob) -> None:
        self._run, self._job = run, job
        self._inline_device = len(job.weights)
        self._balancer = make_balancer(job, [*job.weights, 0.0])
        self._record: PerformanceRecord = history.get_or_create(job.history_key)

    def run(self) -> Iterator[ChunkResult]:
        speeds, n_rows = self._record.speeds, self._job.layout.n_rows
        there = default_cluster.is_running(device_ids(self._job.placement))
        if {"inline", "workers"} <= speeds.keys():
            logger.debug("rule 4: measured before, %s", speeds)
            sooner = n_rows / speeds["workers"] + (0.0 if there else CLUSTER_START_SECONDS) < n_rows / speeds["inline"]
            yield from self._run_on_workers() if sooner else self._run_inline()
        elif there:
            logger.debug("rule 5: the workers are there")
            yield from self._run_on_workers()
        else:
            yield from self._run_until_workers_start()

    def _run_until_workers_start(self) -> Iterator[ChunkResult]:
        starting: _BackgroundClusterStart | None = None
        for n_chunks, finished in enumerate(self._run_inline()):
            yield finished
            speed = self._balancer.speeds[self._inline_device]
            if (
                starting is None
                and speed
                and n_chunks >= WARMUP_CHUNKS
                and self._balancer.n_rows_left / speed > CLUSTER_START_SECONDS
            ):
                logger.debug("rule 7: %d rows are left at %.0f rows/s, workers start", self._balancer.n_rows_left, speed)
                self._record_speed("inline", speed)
                starting = _BackgroundClusterStart(self._job.placement)
                # Threads that wait for one another stand still while others have their cores.
                self._run._n_threads = max(1, torch.get_num_threads() // 2)
            if starting is not None and starting.is_ready:
                self._balancer.set_weight(self._inline_device, 0.0)  # its last task is ended first
        self._run._n_threads = None
        if self._run.draining:
            return
        if starting is None:
            logger.debug("rule 6: all of it in this process")
            self._record_speed("inline", self._balancer.speeds[self._inline_device])
        if self._balancer.n_rows_left:
            yield from self._run_on_workers()

    def _run_inline(self) -> Iterator[ChunkResult]:
        for device in range(self._inline_device):
            self._balancer.set_weight(device, 0.0)
        self._balancer.set_weight(self._inline_device, 1.0)
        if speed := self._record.speeds.get("inline"):
            self._balancer.seed_speed(self._inline_device, speed)
        yield from self._run._run_inline(self._balancer, self._inline_device, make_task_builder(self._job, None))

    def _run_on_workers(self) -> Iterator[ChunkResult]:
        """On the workers, until they are seen to be slower than this process."""
        here = self._record.speeds.get("inline", 0.0)
        for device, weight in enumerate(self._job.weights):
            self._balancer.set_weight(device, weight)
        self._balancer.set_weight(self._inline_device, 0.0)
        began, n_done, theirs = None, 0, 0.0  # seconds of the caller's, who uses the answers meanwhile
        with open_client(self._job.placement) as client:
            for finished in self._run._run_on_workers(client, self._balancer):
                began = began or time.perf_counter()
                given = time.perf_counter()
                yield finished
                n_done += finished.chunk.n_rows
                seconds = time.perf_counter() - began
                theirs += time.perf_counter() - given
                # Workers that wait for the caller tell nothing of how fast they are.
                if (
                    theirs < MAX_CALLER_SHARE * seconds
                    and seconds > MIN_COMPARE_SECONDS
                    and n_done / seconds < MIN_WORKER_SPEED_RATIO * here
                ):
                    logger.debug("the workers do %.0f rows/s, this process %.0f: it goes on", n_done / seconds, here)
                    for device in range(self._inline_device):
                        self._balancer.set_weight(device, 0.0)
            if began is not None and theirs < MAX_CALLER_SHARE * (time.perf_counter() - began):
                self._record_speed("workers", n_done / max(1e-6, time.perf_counter() - began))
        yield from self._run_inline() if self._balancer.n_rows_left and not self._run.draining else ()

    def _record_speed(self, executor: str, speed: float | None) -> None:
        if speed:
            self._record.speeds[executor] = speed


class _BackgroundClusterStart:
    """A cluster that starts in a thread of its own and is kept; one that does not start is warned of, and missed."""

    def __init__(self, placement: Placement) -> None:
        self.is_ready = False
        self._placement = placement
        threading.Thread(target=self._start, name="daskinfer-start", daemon=True).start()

    def _start(self) -> None:
        try:
            with open_client(self._placement):
                self.is_ready = True
        except Exception as error:
            logger.warning("the workers did not start, this process goes on alone: %s", error)


def measure_throughput(job: InferenceJob) -> dict[str, float]:
    """Rows/s of each device on the first rows, all devices at once; workers are started for it where there are none.

    Remembered, so that the next call begins with them.
    """
    sizes, n_rows = (
        job.batch_size_candidates,
        job.layout.n_rows if job.has_tuning_candidates else 0,
    )  # rows that are worth a choice
    if job.placement.is_inline:
        speed = benchmark_inline(
            job, make_task_builder(job, None).read_rows, current_device(), sizes, n_rows, sustained=True
        ).speed
        found = {job.placement.devices[0].name: speed}
    else:
        with open_client(job.placement) as client, prepare_workers(job, client) as (lanes, feeder, shipment, _):
            order = make_task_context(job, shipment.loader)
            by_lane = benchmark_devices(
                job, client, order, lanes, feeder.build_task, sizes, n_rows // len(lanes), sustained=True
            )
            found = {job.placement.devices[i].name: best.speed for i, best in by_lane.items()}
    history.get_or_create(job.history_key).speeds.update(found)
    return found


def _store_result(
    chunk: Chunk, result: ComputedChunk, targets: Sequence[Target], read_began: float, read_seconds: float
) -> ChunkResult:
    result, write_seconds = write_outputs(result, chunk, targets)
    assert result.stats is not None  # a chunk with rows
    receipt = result.stats.with_timing(
        read_began=read_began,
        ended=time.time(),
        read_seconds=read_seconds,
        write_seconds=write_seconds,
        waited_seconds=read_seconds,
    )
    return ChunkResult(chunk, result.arrays, receipt, result.written, result.failures)
