"""Executors compute the chunks of a call in this process (:class:`InlineExecutor`) or on workers (:class:`ClusterExecutor`).

Both take chunks from a balancer until it has none left, apply the same retry policy (``scheduling.retry``), and yield
results as they come. What they share of one call is its :class:`RunState`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from distributed import Client

from daskinfer.cluster.restart import WorkerRestarter
from daskinfer.core.chunks import BatchConfig, Chunk, ChunkResult, ChunkStats, RowFailure
from daskinfer.core.row_ranges import Ranges, subtract_ranges
from daskinfer.diagnostics.events import (
    BatchSizeChosen,
    BatchTuningStarted,
    ChunkDone,
    ChunkFailed,
    ChunkStarted,
    EventBus,
)
from daskinfer.errors import ChunkError
from daskinfer.execution.task_builder import SpecPublisher
from daskinfer.execution.tuning import ReadRows, apply_record_inline, tune, tune_inline
from daskinfer.execution.window import FailurePolicy, TaskWindow
from daskinfer.execution.worker_setup import PreparedWorkers, can_read_inputs_in_place, make_task_builder, prepare_workers
from daskinfer.planning.job import InferenceJob
from daskinfer.scheduling.balancer import DynamicBalancer, LoadBalancer, StaticBalancer
from daskinfer.scheduling.batching import MIN_BATCHES
from daskinfer.scheduling.retry import RetryQueue, is_fatal_error
from daskinfer.worker import bad_rows
from daskinfer.worker.current_device import WorkerDevice, current_device
from daskinfer.worker.error_kinds import classify_error
from daskinfer.worker.task import compute_chunk, read_chunk, run_task, write_outputs


class RunState:
    """What the executors of one call share.

    ``job`` is replaced when another batch size is chosen; ``client`` is the caller's, None if daskinfer starts the workers.
    ``started_at`` is when the first chunk was submitted, by ``time.perf_counter()``; None before. No chunk may start at or
    after row ``get_row_limit()`` yet; None: no limit. While ``draining``, no further chunk is started. ``missing`` are the
    rows to compute, as the call begins, ``n_failed`` those that failed so far, in earlier attempts too.

    Note: one thread uses it; only ``draining`` may be set by another thread or a signal handler.
    """

    def __init__(
        self,
        job: InferenceJob,
        client: Client | None = None,
        events: EventBus | None = None,
        get_row_limit: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.job, self.client, self.events = job, client, events or EventBus()
        self.get_row_limit = get_row_limit
        self.started_at: float | None = None
        self.draining = False
        self.missing: Ranges = list(subtract_ranges((0, job.n_rows), job.resume.done))
        self.n_failed = job.resume.n_failed

    @property
    def batch(self) -> BatchConfig:
        """The batch sizes and memory formats in use."""
        return self.job.run_config.batch

    def mark_started(self) -> None:
        """Record when the first chunk is submitted; does nothing at later calls."""
        self.started_at = self.started_at or time.perf_counter()

    def update_job(self, job: InferenceJob) -> None:
        """Continue with this job, and tell the listeners if its batch configuration is another."""
        changed = job.run_config != self.job.run_config
        self.job = job
        if changed:
            self.events(BatchSizeChosen(self.events.run, time.time(), self.batch))

    def give_up(self, chunk: Chunk, device: str, error: ChunkError) -> ChunkResult:
        """Return a result with filled rows for a chunk that is not retried; with ``on_error="raise"``, raise its error."""
        config = self.job.run_config
        if config.options.on_error == "raise":
            raise error
        arrays = [np.empty((chunk.n_rows, *empty.shape[1:]), empty.dtype) for empty in config.outputs or ()]
        bad_rows.fill_rows(arrays, slice(None), config.options.fill_value)
        stats = ChunkStats(chunk.start, chunk.stop, device, "", 0, 0.0, "")
        failure = RowFailure(chunk.start, chunk.stop, device, f"{type(error).__name__}: {error}")
        result = ChunkResult(chunk, arrays, stats, failures=(failure,))
        return self.store(result, read_began=time.time(), read_seconds=0.0)

    def store(self, result: ChunkResult, *, read_began: float, read_seconds: float) -> ChunkResult:
        """Write a result that was computed in this process to the targets, if any; return it with its timing."""
        timing = {"read_began": read_began, "read_seconds": read_seconds, "waited_seconds": read_seconds}
        return write_outputs(result, self.job.resume.targets, **timing)

    def emit_tuning_started(self) -> None:
        """Tell the listeners that batch sizes are being measured."""
        self.events(BatchTuningStarted(self.events.run, time.time()))

    def emit_started(self, chunk: Chunk, device: str) -> None:
        """Tell the listeners that a chunk was submitted."""
        self.events(ChunkStarted(self.events.run, time.time(), chunk.start, chunk.stop, device))

    def emit_failed(self, chunk: Chunk, device: str, reason: str) -> None:
        """Tell the listeners that an attempt at a chunk failed."""
        self.events(ChunkFailed(self.events.run, time.time(), chunk.start, chunk.stop, device, reason))

    def emit_done(self, result: ChunkResult) -> None:
        """Tell the listeners that a chunk is done."""
        chunk, stats = result.chunk, result.stats
        about = (stats.device, stats, result.failures, result.attempts)
        self.events(ChunkDone(self.events.run, time.time(), chunk.start, chunk.stop, *about))


def make_balancer(job: InferenceJob, weights: Sequence[float], *, outputs_only: bool = False) -> LoadBalancer:
    """Make the balancer, which decides what each device computes next.

    ``outputs_only``: tasks hold no rows of the input, so they may have more rows.
    """
    limits: dict[str, Any] = {"row_nbytes": job.row_nbytes, "chunk_nbytes": job.chunk_nbytes, "done": job.resume.done}
    if outputs_only:
        limits["row_nbytes"] = job.row_nbytes - job.inputs.row_nbytes
        limits["chunk_nbytes"] = min(job.chunk_nbytes, job.max_task_rows * job.row_nbytes)  # what a slot has room for
    if not job.balanced:
        return StaticBalancer(job.layout, n_devices=len(weights), whole_chunks=job.inputs.row_chunks is not None, **limits)
    if job.placement.is_inline:
        limits["share_per_task"] = 1.0  # alone, and one task at a time: neither others nor read-ahead need smaller ones
    return make_dynamic_balancer(job, weights, **limits)


def make_dynamic_balancer(job: InferenceJob, weights: Sequence[float], **limits: Any) -> DynamicBalancer:
    """Make a balancer by measured throughput, which starts from what earlier calls measured."""
    limits = limits or {"row_nbytes": job.row_nbytes, "chunk_nbytes": job.chunk_nbytes, "done": job.resume.done}
    if job.inputs.row_chunks is not None:
        balancer = DynamicBalancer.from_chunks(job.layout.row_chunks, weights, **limits)
    else:
        balancer = DynamicBalancer.from_grid(job.layout.n_rows, job.layout.cell_rows, weights, **limits)
    speeds = job.record.speeds
    for index, device in enumerate(job.placement.devices):
        if speed := speeds.get(device.name):
            balancer.seed_speed(index, speed)
    return balancer


def record_speeds(job: InferenceJob, balancer: LoadBalancer) -> None:
    """Remember the throughput of each device, for the next call with this model."""
    devices = zip(job.placement.devices, balancer.speeds, strict=False)  # this process may be one more, in "auto"
    job.record.speeds.update({device.name: speed for device, speed in devices if speed})


class InlineExecutor:
    """Computes tasks in this process, one after the other.

    Parameters
    ----------
    state
        What the executors of the call share.
    n_threads
        Number of torch's threads while it computes; None: unchanged.
    """

    def __init__(self, state: RunState, n_threads: int | None = None) -> None:
        self.n_threads = n_threads
        self._state = state
        self._retries = RetryQueue(state.job.run_config.options.retries)

    def run(self, balancer: LoadBalancer, device: int) -> Iterator[ChunkResult]:
        """Compute the tasks that the balancer has for a device, until it has none."""
        state, builder = self._state, make_task_builder(self._state.job, None)
        state.mark_started()
        worker_device, read_rows = current_device(), builder.read_rows
        state.update_job(apply_record_inline(state.job, worker_device))
        if speed := balancer.speeds[device]:  # measured by an earlier call: the first task may hold all rows
            self._tune(read_rows, worker_device, balancer.n_rows_left, speed)
        while not state.draining and (chunks := balancer.next_task(device)):
            if worker_device.n_threads != self.n_threads:
                worker_device = replace(worker_device, n_threads=self.n_threads)
            seconds = 0.0  # without the time that the caller spends on the outputs
            for chunk in chunks:
                if chunk.stop > chunk.start:
                    began = time.perf_counter()
                    result = self._compute(chunk, read_rows, worker_device)
                    seconds += time.perf_counter() - began
                    yield result
            balancer.record(device, chunks, seconds)
            self._tune(read_rows, worker_device, balancer.n_rows_left, balancer.speeds[device] or 1.0)

    def _tune(self, read_rows: ReadRows, worker_device: WorkerDevice, n_rows_left: int, speed: float) -> None:
        """Tune the batch size, unless it was tuned already or few rows are left."""
        state = self._state
        if state.job.tunable and n_rows_left > MIN_BATCHES * state.batch.batch_size:
            state.update_job(tune_inline(state.job, read_rows, worker_device, n_rows_left, speed))

    def _compute(self, chunk: Chunk, read_rows: ReadRows, worker_device: WorkerDevice) -> ChunkResult:
        """Compute one chunk, as often as the retry policy allows."""
        state, retries = self._state, self._retries
        while True:
            retries.on_start(chunk)
            state.emit_started(chunk, worker_device.device)
            read_began, since = time.time(), time.perf_counter()
            try:
                rows = read_chunk(read_rows, chunk)
                read_seconds = time.perf_counter() - since
                result = compute_chunk(rows, chunk, state.job.spec, worker_device)
                result = state.store(result, read_began=read_began, read_seconds=read_seconds)
            except ChunkError as error:
                state.emit_failed(chunk, worker_device.device, f"{type(error).__name__}: {error}")
                if is_fatal_error(error):
                    raise
                if not retries.on_error(chunk, classify_error(error)):
                    result = state.give_up(chunk, worker_device.device, error)
                    return replace(result, attempts=retries.on_done(chunk))
                time.sleep(retries.wait_seconds or 0.0)
            else:
                attempts = retries.on_done(chunk)
                return result if attempts == 1 else replace(result, attempts=attempts)


class ClusterExecutor:
    """Computes tasks on workers, through a bounded window per device."""

    def __init__(self, state: RunState) -> None:
        self._state = state

    def run(self, client: Client, balancer: LoadBalancer | None = None) -> Iterator[ChunkResult]:
        """Compute the tasks of the balancer; without one, tune the batch size first, and make a balancer for it.

        There are ``prefetch + 2`` tasks in flight per device: one computes, one writes, the others read ahead. If nothing is
        read ahead or written (rows that stay in this process's memory, outputs that come back), two are enough.
        """
        state = self._state
        state.events.attach_client(client)
        with prepare_workers(state.job, client) as workers:
            has_chunks = balancer is not None  # and with them a batch size
            state.update_job(tune(state.job, workers, state.emit_tuning_started, batch_size_fixed=has_chunks))
            balancer = balancer or self._make_balancer(workers)
            state.mark_started()
            publish = SpecPublisher(client, workers.serialize_spec(state.job))
            policy = self._make_policy(workers)
            writes_files = bool(state.job.resume.targets)
            queues, build_task = workers.device_queues, workers.builder.build_task
            with TaskWindow(client, run_task, publish, queues, build_task, policy, wait_on_exit=writes_files) as window:
                yield from window.run(balancer, state.get_row_limit, lambda: state.draining)
        record_speeds(state.job, balancer)

    def _make_balancer(self, workers: PreparedWorkers) -> LoadBalancer:
        job = self._state.job
        # If outputs are needed in order, tasks stay small: each waits for those before it.
        outputs_only = self._state.get_row_limit() is None and all(
            can_read_inputs_in_place(job, reads_process_memory=queue.reads_process_memory) for queue in workers.device_queues
        )
        return make_balancer(job, job.weights, outputs_only=outputs_only)

    def _make_policy(self, workers: PreparedWorkers) -> FailurePolicy:
        options, state = self._state.job.run_config.options, self._state
        restarter = WorkerRestarter(workers.client, workers.scratch_paths, allow_external=options.restart_workers)
        on_restart = workers.broadcast.send_to
        return FailurePolicy(options.retries, options.chunk_timeout, restarter, state.give_up, on_restart, state.events)
