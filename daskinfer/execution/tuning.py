"""Measuring before a run: which micro-batch pays on each kind of device, and how fast each device is.

A measurement is a task like any other, on the first rows of the input; what was found is remembered for this process
(``pace``), so that a network is measured once.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from typing import Any

from distributed import Client, Future
from distributed.scheduler import KilledWorker

from daskinfer.cluster.placement import fetch_workers
from daskinfer.core.arrays import Array, RemoteArray
from daskinfer.core.chunks import Chunk
from daskinfer.errors import ChunkError
from daskinfer.execution.device_queue import DeviceQueue, TaskFactory
from daskinfer.planning.job import InferenceJob
from daskinfer.scheduling.autotune import MIN_TUNING_SECONDS, BatchSizeChoice
from daskinfer.scheduling.throughput_history import PerformanceRecord, history
from daskinfer.transport.row_sources import RowTransferError
from daskinfer.worker.current_device import WorkerDevice
from daskinfer.worker.task import measure_channels_last, measure_batch_sizes, read_chunk, run_benchmark_task

logger = logging.getLogger(__name__)

MIN_FORMAT_TRIAL_BATCHES = 24  # left, from which on three are spent to see whether the other memory format pays; arbitrary
BENCHMARK_CHECK_SECONDS = 1.0  # between looks whether a worker that measures is still there; arbitrary

ReadRows = Callable[[Chunk], Sequence[Array | RemoteArray]]


def tune(
    job: InferenceJob,
    client: Client,
    context: Any,
    device_queues: Sequence[DeviceQueue],
    build_task: TaskFactory,
    on_start: Callable[[], None],
    *,
    batch_size_fixed: bool = False,
) -> InferenceJob:
    """The call with the micro-batch of each kind of device: known, or what the first device of its kind measures.

    The others of this host measure beside it, as they will compute beside it: cores share their caches (on one core a
    CNN was faster with 256 images than with 64, on both at once slower).

    As it is where the micro-batch was given, where there is not enough to do, or where measuring fails: what to do about a
    worker that ends or rows that fail is the window's to say. ``begin()`` is called where measuring begins. ``settled``:
    some rows are done, and only the memory format may still be another.
    """
    known, by_kind = history.get_or_create(job.history_key), {lane.kind: lane for lane in reversed(device_queues)}
    if not job.has_tuning_candidates or (batch_size_fixed and not job.has_images):
        return job
    if batch_size_fixed and "inline" in known.channels_last:
        known.channels_last.setdefault("cpu", known.channels_last["inline"])
    tried = (job.run_config.batch_size,) if batch_size_fixed else job.batch_size_candidates
    asked = [
        lane
        for kind, lane in by_kind.items()
        if kind not in (known.channels_last if batch_size_fixed else known.batch_sizes)
    ]
    if asked and not _is_short(job, known):
        on_start()
        n_rows = (known.n_rows + job.layout.n_rows) // len(device_queues)
        try:
            found = benchmark_devices(
                job, client, context, _select_benchmark_queues(asked, device_queues), build_task, tried, n_rows
            )
        except (ChunkError, KilledWorker, RowTransferError, _BenchmarkError) as error:
            logger.warning("the micro-batch stays as it is, since measuring failed: %s", error)
            return job
        for lane in asked:
            best = found[lane.device]
            known.record_choice(lane.kind, best._replace(is_short_run=best.is_short_run or batch_size_fixed))
    job = job.with_channels_last(known.get_channels_last_kinds(by_kind))
    if batch_size_fixed or not by_kind.keys() <= known.batch_sizes.keys():
        return job  # measured again where there is more to do
    return job.with_batch_sizes({kind: _clamp_batch_size(known.batch_sizes[kind], tried) for kind in by_kind})


def _select_benchmark_queues(untuned: Sequence[DeviceQueue], device_queues: Sequence[DeviceQueue]) -> list[DeviceQueue]:
    """These, and those of their kinds that share this host."""
    kinds = {lane.kind: lane.device for lane in untuned}
    return [*untuned, *(n for n in device_queues if n.pool is not None and kinds.get(n.kind, n.device) != n.device)]


def _is_short(job: InferenceJob, record: PerformanceRecord) -> bool:
    """Whether the speeds of an earlier run say that this one, and all before it, are not enough to do."""
    devices = zip(job.placement.devices, job.weights, strict=True)
    speeds = [record.speeds.get(device.name, 0.0) for device, weight in devices if weight]
    return all(speeds) and (record.n_rows + job.layout.n_rows) / sum(speeds) < MIN_TUNING_SECONDS


def tune_inline(
    job: InferenceJob, read_rows: ReadRows, worker_device: WorkerDevice, n_rows_left: int, speed: float
) -> InferenceJob:
    """The same in this process, once its first rows have shown, at ``speed`` rows/s, that there is enough to do.

    Where there is too little for that, one micro-batch tells whether the other memory format pays.
    """
    known = history.get_or_create(job.history_key)
    try:
        if "inline" not in known.batch_sizes:
            _record_inline_benchmark(job, known, read_rows, worker_device, n_rows_left, speed)
    except ChunkError as error:  # what to do about it is said where the rows are computed
        logger.warning("the micro-batch stays as it is, since measuring failed: %s", error)
        return replace(job, tunable=False)
    job = apply_memory_format_inline(job, worker_device)
    if size := known.batch_sizes.get("inline"):
        return replace(
            job, run_config=replace(job.run_config, batch_size=_clamp_batch_size(size, job.batch_size_candidates)), tunable=False
        )
    return job


def _record_inline_benchmark(
    job: InferenceJob,
    record: PerformanceRecord,
    read_rows: ReadRows,
    worker_device: WorkerDevice,
    n_rows_left: int,
    speed: float,
) -> None:
    n_rows = record.n_rows + n_rows_left
    if n_rows >= MIN_TUNING_SECONDS * speed:
        record.record_choice("inline", benchmark_inline(job, read_rows, worker_device, job.batch_size_candidates, n_rows))
    elif (
        job.has_images
        and "inline" not in record.channels_last
        and n_rows_left >= MIN_FORMAT_TRIAL_BATCHES * job.run_config.batch_size
    ):
        first = _make_benchmark_chunk(job, job.run_config.batch_size)
        there = read_chunk(lambda: read_rows(first), first)
        record.channels_last["inline"] = measure_channels_last(there, job.loader, job.run_config, worker_device)


def apply_memory_format_inline(job: InferenceJob, worker_device: WorkerDevice) -> InferenceJob:
    """The call with images in channels_last, or not, as was found to pay in this process so far."""
    if not job.tunable:
        return job
    pays = history.get_or_create(job.history_key).channels_last.get("inline")
    return job.with_channels_last([worker_device.torch_device.type] if pays else [])


def benchmark_devices(
    job: InferenceJob,
    client: Client,
    context: Any,
    device_queues: Sequence[DeviceQueue],
    build_task: TaskFactory,
    batch_sizes: Sequence[int],
    n_rows: int,
    *,
    sustained: bool = False,
) -> dict[int, BatchSizeChoice]:
    """By device, which of these micro-batches pays there for so many rows, and its rows/s; on all lanes at once.

    ``usual``: with its usual speed, not that of the fastest.
    """
    chunk, slots, futures = _make_benchmark_chunk(job, batch_sizes[-1]), [], {}
    until = time.monotonic() + (job.run_config.options.chunk_timeout or inf) * len(batch_sizes)
    for lane in device_queues:
        slot = lane.pool.free_slots.pop() if lane.pool is not None and lane.pool.free_slots else None
        task, brought = build_task([chunk], slot, lane.workers, reads_process_memory=lane.reads_process_memory)
        key = f"measure-{lane.kind}-{uuid.uuid4().hex}"
        futures[lane.device] = client.submit(
            run_benchmark_task,
            context,
            task,
            brought,
            batch_sizes,
            n_rows,
            usual=sustained,
            key=key,
            pure=False,
            **lane.restriction,
        )
        slots.append(slot)
    try:
        found = {lane.device: _wait_for_benchmark(futures[lane.device], lane, client, until) for lane in device_queues}
    except BaseException:
        client.cancel(list(futures.values()), force=True)
        raise
    for slot in slots:
        if slot is not None:
            slot.release()
    return found


def _wait_for_benchmark(future: Future, device_queue: DeviceQueue, client: Client, deadline: float) -> BatchSizeChoice:
    while True:
        try:
            found: BatchSizeChoice = future.result(timeout=BENCHMARK_CHECK_SECONDS)
            return found
        except TimeoutError:
            if future.status == "error":  # the network's own
                raise
            if device_queue.find_worker(fetch_workers(client)) is None or time.monotonic() > deadline:
                raise _BenchmarkError(f"{device_queue.name} gives no answer") from None


class _BenchmarkError(Exception):
    """A device did not say how fast it is."""


def benchmark_inline(
    job: InferenceJob,
    read_rows: ReadRows,
    worker_device: WorkerDevice,
    batch_sizes: Sequence[int],
    n_rows: int,
    *,
    sustained: bool = False,
) -> BatchSizeChoice:
    """The same in this process."""
    first = _make_benchmark_chunk(job, batch_sizes[-1])
    return measure_batch_sizes(
        read_chunk(lambda: read_rows(first), first),
        job.loader,
        job.run_config,
        worker_device,
        batch_sizes,
        n_rows,
        sustained=sustained,
    )


def _clamp_batch_size(max_size: int, batch_sizes: Sequence[int]) -> int:
    """Of the sizes that this call may have, the largest up to what paid before; sizes of one call divide one another."""
    return max((size for size in batch_sizes if size <= max_size), default=batch_sizes[0])


def _make_benchmark_chunk(job: InferenceJob, max_rows: int) -> Chunk:
    """Rows from 0 on to measure with; of dask arrays the first chunk that has rows."""
    if job.inputs.row_chunks is not None:
        return next(chunk for chunk in job.layout.chunks if chunk.n_rows)
    return Chunk(0, 0, min(job.layout.n_rows, max_rows), 0)
