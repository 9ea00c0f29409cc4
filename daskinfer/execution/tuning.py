"""Tuning at the start of a call: the fastest batch size for each kind of device, and the throughput of each device.

A benchmark is a task like any other, on the first rows of the input. The process remembers its result
(``scheduling.throughput_history``), so a model is measured once.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf

from distributed import Client, Future
from distributed.scheduler import KilledWorker

from daskinfer.cluster.placement import fetch_workers
from daskinfer.core.arrays import Array, RemoteArray
from daskinfer.core.chunks import Chunk
from daskinfer.errors import ChunkError
from daskinfer.execution.device_queue import DeviceQueue
from daskinfer.execution.worker_setup import PreparedWorkers
from daskinfer.planning.job import InferenceJob
from daskinfer.scheduling.autotune import MIN_TUNING_SECONDS, BatchSizeChoice
from daskinfer.scheduling.throughput_history import PerformanceRecord
from daskinfer.transport.row_sources import RowTransferError
from daskinfer.worker.benchmark import measure_batch_sizes, measure_channels_last, run_benchmark_task
from daskinfer.worker.current_device import WorkerDevice
from daskinfer.worker.task import read_chunk

logger = logging.getLogger(__name__)

MIN_FORMAT_TRIAL_BATCHES = 24  # must be left for three to be spent on measuring the other memory format; arbitrary
BENCHMARK_CHECK_SECONDS = 1.0  # between checks that a measuring worker is still alive; arbitrary

ReadRows = Callable[[Chunk], Sequence[Array | RemoteArray]]


def tune(
    job: InferenceJob, workers: PreparedWorkers, on_start: Callable[[], None], *, batch_size_fixed: bool = False
) -> InferenceJob:
    """Return the job with a batch size per kind of device: a known one, or what the first device of its kind measures.

    The other devices of this host measure at the same time, because they will compute at the same time and cores share
    caches: a CNN was faster with 256 images than with 64 on one core, and slower on both at once.

    The job is returned unchanged if the batch size was given, if there is too little to compute, or if measuring fails:
    workers that die and rows that fail are handled by the window. ``on_start()`` is called when measuring begins.
    ``batch_size_fixed``: some rows are done, and only the memory format may still change.
    """
    if not job.has_tuning_candidates or (batch_size_fixed and not job.has_images):
        return job
    record = job.record
    by_kind = {queue.kind: queue for queue in reversed(workers.device_queues)}
    if batch_size_fixed and "inline" in record.channels_last:
        record.channels_last.setdefault("cpu", record.channels_last["inline"])
    known = record.channels_last if batch_size_fixed else record.batch_sizes
    candidates = (job.run_config.batch.batch_size,) if batch_size_fixed else job.batch_size_candidates
    untuned = [queue for kind, queue in by_kind.items() if kind not in known]
    if untuned and not _is_short(job, record):
        on_start()
        try:
            _record_benchmarks(job, workers, untuned, candidates, record, is_short_run=batch_size_fixed)
        except (ChunkError, KilledWorker, RowTransferError, _BenchmarkError) as error:
            _warn_of_failed_tuning(job, error)
            return job
    job = job.with_channels_last(record.get_channels_last_kinds(by_kind))
    if batch_size_fixed or not by_kind.keys() <= record.batch_sizes.keys():
        return job  # measured by a later call with more to compute
    return job.with_batch_sizes({kind: _clamp_batch_size(record.batch_sizes[kind], candidates) for kind in by_kind})


def _record_benchmarks(
    job: InferenceJob,
    workers: PreparedWorkers,
    untuned: Sequence[DeviceQueue],
    candidates: Sequence[int],
    record: PerformanceRecord,
    *,
    is_short_run: bool,
) -> None:
    n_rows = (record.n_rows + job.n_rows) // len(workers.device_queues)
    queues = _select_benchmark_queues(untuned, workers.device_queues)
    choices = benchmark_devices(job, workers, queues, candidates, n_rows)
    for queue in untuned:
        choice = choices[queue.device]
        record.record_choice(queue.kind, choice._replace(is_short_run=choice.is_short_run or is_short_run))


def _warn_of_failed_tuning(job: InferenceJob, error: Exception) -> None:
    logger.warning("batch-size tuning failed; keeping batch_size=%d: %s", job.run_config.batch.batch_size, error)


def _select_benchmark_queues(untuned: Sequence[DeviceQueue], device_queues: Sequence[DeviceQueue]) -> list[DeviceQueue]:
    """Return these queues, and those of the same kinds whose workers are on this host."""
    kinds = {queue.kind: queue.device for queue in untuned}
    return [*untuned, *(q for q in device_queues if q.pool is not None and kinds.get(q.kind, q.device) != q.device)]


def _is_short(job: InferenceJob, record: PerformanceRecord) -> bool:
    """Return whether this call and those before it are too short to tune, judged by the throughput of an earlier call."""
    devices = zip(job.placement.devices, job.weights, strict=True)
    speeds = [record.speeds.get(device.name, 0.0) for device, weight in devices if weight]
    return all(speeds) and (record.n_rows + job.n_rows) / sum(speeds) < MIN_TUNING_SECONDS


def tune_inline(
    job: InferenceJob, read_rows: ReadRows, worker_device: WorkerDevice, n_rows_left: int, speed: float
) -> InferenceJob:
    """Tune in this process, if its first rows, at ``speed`` rows/s, show that there is enough to compute.

    If there is too little for that, one batch shows whether the other memory format is faster.
    """
    record = job.record
    try:
        if "inline" not in record.batch_sizes:
            _record_inline_benchmark(job, record, read_rows, worker_device, n_rows_left, speed)
    except ChunkError as error:  # the error is raised again, and handled, when the rows are computed
        _warn_of_failed_tuning(job, error)
        return replace(job, tunable=False)
    return apply_record_inline(job, worker_device)


def _record_inline_benchmark(
    job: InferenceJob,
    record: PerformanceRecord,
    read_rows: ReadRows,
    worker_device: WorkerDevice,
    n_rows_left: int,
    speed: float,
) -> None:
    n_rows, batch_size = record.n_rows + n_rows_left, job.run_config.batch.batch_size
    if n_rows >= MIN_TUNING_SECONDS * speed:
        record.record_choice("inline", benchmark_inline(job, read_rows, worker_device, job.batch_size_candidates, n_rows))
        return
    is_untried = job.has_images and "inline" not in record.channels_last
    if is_untried and n_rows_left >= MIN_FORMAT_TRIAL_BATCHES * batch_size:
        chunk = _make_benchmark_chunk(job, batch_size)
        rows = read_chunk(read_rows, chunk)
        record.channels_last["inline"] = measure_channels_last(rows, job.spec, worker_device)


def apply_record_inline(job: InferenceJob, worker_device: WorkerDevice) -> InferenceJob:
    """Return the job with the batch size and the memory format of images that were fastest in this process, if known."""
    if not job.tunable:
        return job
    record, batch = job.record, job.run_config.batch
    kinds = (worker_device.torch_device.type,) if record.channels_last.get("inline") else ()
    if size := record.batch_sizes.get("inline"):
        size = _clamp_batch_size(size, job.batch_size_candidates)
        return replace(job.with_batch_config(replace(batch, batch_size=size, channels_last=kinds)), tunable=False)
    return job if kinds == batch.channels_last else job.with_channels_last(kinds)


def benchmark_devices(
    job: InferenceJob,
    workers: PreparedWorkers,
    device_queues: Sequence[DeviceQueue],
    candidates: Sequence[int],
    n_rows: int,
    *,
    sustained: bool = False,
) -> dict[int, BatchSizeChoice]:
    """Measure on all these devices at once the fastest batch size for so many rows, and its rows/s; return both by device.

    ``sustained``: return the throughput over a longer time, not that of the fastest batches.
    """
    chunk, slots, futures = _make_benchmark_chunk(job, candidates[-1]), [], {}
    deadline = time.monotonic() + (job.run_config.options.chunk_timeout or inf) * len(candidates)
    client, spec = workers.client, workers.serialize_spec(job)
    for queue in device_queues:
        slot = queue.pool.free_slots.pop() if queue.pool is not None and queue.pool.free_slots else None
        reads = queue.reads_process_memory
        task, needs = workers.builder.build_task([chunk], slot, queue.workers, reads_process_memory=reads)
        arguments = (spec, task, needs, candidates, n_rows)
        key = f"measure-{queue.kind}-{uuid.uuid4().hex}"
        futures[queue.device] = client.submit(
            run_benchmark_task, *arguments, sustained=sustained, key=key, pure=False, **queue.restriction
        )
        slots.append(slot)
    try:
        choices = {q.device: _wait_for_benchmark(futures[q.device], q, client, deadline) for q in device_queues}
    except BaseException:
        client.cancel(list(futures.values()), force=True)
        raise
    for slot in slots:
        if slot is not None:
            slot.release()
    return choices


def _wait_for_benchmark(future: Future, device_queue: DeviceQueue, client: Client, deadline: float) -> BatchSizeChoice:
    while True:
        try:
            choice: BatchSizeChoice = future.result(timeout=BENCHMARK_CHECK_SECONDS)
            return choice
        except TimeoutError:
            if future.status == "error":  # raised by the model
                raise
            if device_queue.find_worker(fetch_workers(client)) is None or time.monotonic() > deadline:
                raise _BenchmarkError(f"{device_queue.name} does not respond") from None


class _BenchmarkError(Exception):
    """The benchmark of a device returned no result."""


def benchmark_inline(
    job: InferenceJob,
    read_rows: ReadRows,
    worker_device: WorkerDevice,
    candidates: Sequence[int],
    n_rows: int,
    *,
    sustained: bool = False,
) -> BatchSizeChoice:
    """Measure in this process the fastest batch size for so many rows, and its rows/s."""
    chunk = _make_benchmark_chunk(job, candidates[-1])
    rows = read_chunk(read_rows, chunk)
    return measure_batch_sizes(rows, job.spec, worker_device, candidates, n_rows, sustained=sustained)


def _clamp_batch_size(max_size: int, candidates: Sequence[int]) -> int:
    """Return the largest of this call's candidates up to ``max_size``; the candidates of a call divide each other."""
    return max((size for size in candidates if size <= max_size), default=candidates[0])


def _make_benchmark_chunk(job: InferenceJob, max_rows: int) -> Chunk:
    """Make the chunk to measure with: rows from 0 on, or a dask array's first chunk that has rows."""
    if job.inputs.row_chunks is not None:
        return next(chunk for chunk in job.layout.chunks if chunk.n_rows)
    return Chunk(0, 0, min(job.n_rows, max_rows))
