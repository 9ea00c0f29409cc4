"""What the driver hands to a worker, and what the worker does with it: read, compute, write.

A task is one chunk, or several small ones, since a task costs the scheduler 2 to 3 ms. Several tasks are on a worker at a
time, each in a thread of its own: while one reads, another computes (``device_thread``), and a third writes.

What is the same for all tasks of a call, the :class:`TaskContext`, is pickled once and unpickled once per worker.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import cloudpickle

from daskinfer.core.arrays import Array, RemoteArray
from daskinfer.core.chunks import Chunk, ChunkStats, RowFailure, StoredPart
from daskinfer.errors import ChunkError, StorageError
from daskinfer.models.model import ModelLoader
from daskinfer.models.serialization import ByValueFunction
from daskinfer.scheduling.autotune import BatchSizeChoice, is_channels_last_faster, sustained_throughput, tune_batch_size
from daskinfer.storage.formats import Target
from daskinfer.transport.row_sources import ChunkInput, Task, TaskResources
from daskinfer.transport.shared_memory import attach_pool, write_result_header
from daskinfer.worker import device_thread
from daskinfer.worker.benchmark import ModelBenchmark
from daskinfer.worker.current_device import WorkerDevice, current_device
from daskinfer.worker.loaded import LoadedModel
from daskinfer.worker.loaded_models import model_cache
from daskinfer.worker.model_runner import ModelOutput, ModelRunConfig, run_model

T = TypeVar("T")

# What is unpickled may import packages. With dask-cuda installed Dask's own are imported by a loader that stops the whole
# worker where one thread imports dask.array and another uses what there is of it (seen in Python 3.11, 2 runs of 3).
_unpickle_lock = threading.Lock()


@dataclass(frozen=True)
class ComputedChunk:
    """A chunk's outputs, each (n, *shape); ``stats`` is None for a chunk without rows.

    ``written`` is what was written of each target, ``failures`` the rows without an answer, in order.
    """

    arrays: list[Array]
    stats: ChunkStats | None
    written: tuple[tuple[StoredPart, ...], ...] = ()
    failures: tuple[RowFailure, ...] = ()


@dataclass(frozen=True)
class TaskContext:
    """What is the same for every task of a call; ``targets`` is empty where the answers come back."""

    loader: ModelLoader
    run_config: ModelRunConfig
    targets: tuple[Target, ...] = ()

    def serialize(self) -> bytes:
        """As it travels."""
        return bytes(cloudpickle.dumps(replace(self, run_config=make_portable(self.run_config))))


def make_portable(run_config: ModelRunConfig) -> ModelRunConfig:
    """A job whose functions reach workers that cannot import them, and without the rows that ``output=`` may have."""
    before, after = run_config.options.preprocess, run_config.options.postprocess
    options = replace(
        run_config.options,
        preprocess=before and ByValueFunction(before),
        postprocess=after and ByValueFunction(after),
        output=None,
    )
    return replace(run_config, options=options)


def run_task(
    serialized_context: bytes, task: Task | bytes, dependency_results: Sequence[Any] = ()
) -> list[ComputedChunk] | None:
    """Do a task on this worker; None where all of the answer is in shared memory or in files.

    Parameters
    ----------
    sealed
        The call's :class:`TaskContext`, as :meth:`TaskContext.serialize` gives it.
    task
        The chunks, as :meth:`Task.serialize` gives them or as they are.
    brought
        Results of other Dask tasks that parts ask for by position.
    """
    with _unpickle_lock:
        order, task = _deserialize_context(serialized_context), Task.deserialize(task) if isinstance(task, bytes) else task
    order = replace(order, run_config=replace(order.run_config, alone=task.alone))
    memory = attach_pool(task.pool_ref) if task.pool_ref else None
    blocks = [_process_chunk(piece, order, TaskResources(memory, dependency_results)) for piece in task.chunk_inputs]
    if memory is None:
        return blocks
    fits = write_result_header(memory, task.header_offset, [replace(block, arrays=[]) for block in blocks])
    return None if fits and not any(block.arrays for block in blocks) else blocks


def run_benchmark_task(
    serialized_context: bytes,
    task: Task,
    dependency_results: Sequence[Any],
    candidates: Sequence[int],
    n_rows: int,
    *,
    sustained: bool = False,
) -> BatchSizeChoice:
    """Which micro-batch pays on this worker, as ``ladder.best`` finds it on the first chunk of a task."""
    order, (piece, *_), here = _deserialize_context(serialized_context), task.chunk_inputs, current_device()
    within = TaskResources(attach_pool(task.pool_ref) if task.pool_ref else None, dependency_results)
    rows = read_chunk(lambda: [part.read_rows(within) for part in piece.row_sources], piece.chunk)
    measured, _ = device_thread.get_device_thread(here.worker).run(
        lambda: measure_batch_sizes(rows, order.loader, order.run_config, here, candidates, n_rows, sustained=sustained),
        time.perf_counter(),
    )
    return measured


def measure_batch_sizes(
    rows: Sequence[Array | RemoteArray],
    loader: ModelLoader,
    run_config: ModelRunConfig,
    worker_device: WorkerDevice,
    candidates: Sequence[int],
    n_rows: int,
    *,
    sustained: bool = False,
) -> BatchSizeChoice:
    """Which micro-batch pays, in this thread, of those that there are rows for, and its rows/s.

    ``rows`` begin with the input's first. ``usual``: its speed is the usual one, for whoever wants to know what to expect.
    """
    trial = ModelBenchmark(_get_model(loader, worker_device), rows, run_config)
    with worker_device.limit_threads():
        first = run_config.batch_size
        there = [size for size in candidates if size <= max(first, len(rows[0]))]
        channels_last = trial.run_channels_last if trial.can_use_channels_last else None
        found = tune_batch_size(trial.run, there, n_rows, channels_last, initial=first)
        if not sustained:
            return found
        return found._replace(
            speed=sustained_throughput(trial.run_channels_last if found.channels_last else trial.run, found.batch_size)
        )


def measure_channels_last(
    rows: Sequence[Array | RemoteArray], loader: ModelLoader, run_config: ModelRunConfig, worker_device: WorkerDevice
) -> bool:
    """Whether that memory format pays in this thread, as one micro-batch says."""
    trial = ModelBenchmark(_get_model(loader, worker_device), rows, run_config)
    with worker_device.limit_threads():
        return trial.can_use_channels_last and is_channels_last_faster(
            trial.run, trial.run_channels_last, run_config.batch_size
        )


@functools.lru_cache(maxsize=4)
def _deserialize_context(serialized_context: bytes) -> TaskContext:
    order: TaskContext = cloudpickle.loads(serialized_context)
    return order


def _process_chunk(chunk_input: ChunkInput, context: TaskContext, resources: TaskResources) -> ComputedChunk:
    there_since, read_began, chunk = time.perf_counter(), time.time(), chunk_input.chunk
    rows = read_chunk(lambda: [part.read_rows(resources) for part in chunk_input.row_sources], chunk)
    read_seconds = time.perf_counter() - there_since
    out = None
    if chunk_input.output_refs is not None and resources.shared_memory is not None:
        out = [place.get_array(resources.shared_memory) for place in chunk_input.output_refs]
    here = current_device()
    block, waited_seconds = device_thread.get_device_thread(here.worker).run(
        lambda: compute_chunk(rows, chunk.start, chunk.stop, context.loader, context.run_config, here, out), there_since
    )
    block, write_seconds = write_outputs(block, chunk, context.targets)
    receipt = block.stats and block.stats.with_timing(
        read_began=read_began,
        ended=time.time(),
        read_seconds=read_seconds,
        write_seconds=write_seconds,
        waited_seconds=waited_seconds,
    )
    return replace(block, arrays=[] if out is not None else block.arrays, stats=receipt)


def read_chunk(read_rows: Callable[[], T], chunk: Chunk) -> T:
    """The rows of a chunk; what goes wrong with them is said of the chunk."""
    try:
        return read_rows()
    except Exception as error:
        raise StorageError(
            f"chunk {chunk.index} (rows {chunk.start}:{chunk.stop}) cannot be read: {type(error).__name__}: {error}. Look "
            "at the input there; on_error='skip' (--on-error) goes on without these rows.",
            getattr(error, "errno", None) or 0,
        ) from error


def write_outputs(computed: ComputedChunk, chunk: Chunk, targets: Sequence[Target]) -> tuple[ComputedChunk, float]:
    """Write each output to its target: the block with what was written instead of its arrays, and the seconds it took."""
    if not targets:
        return computed, 0.0
    began = time.perf_counter()
    try:
        written = tuple(target.write(chunk.start, rows) for target, rows in zip(targets, computed.arrays, strict=True))
    except Exception as error:
        raise StorageError(
            f"chunk {chunk.index} (rows {chunk.start}:{chunk.stop}) cannot be written: {type(error).__name__}: {error}. "
            "Look at the output's disk.",
            getattr(error, "errno", None) or 0,
        ) from error
    return replace(computed, arrays=[], written=written), time.perf_counter() - began


def compute_chunk(
    rows: Sequence[Array | RemoteArray],
    start: int,
    stop: int,
    loader: ModelLoader,
    run_config: ModelRunConfig,
    worker_device: WorkerDevice,
    out: Sequence[Array] | None = None,
) -> ComputedChunk:
    """Compute one chunk in this thread: what every way of computing calls in the end.

    Parameters
    ----------
    rows
        The rows of each port, (n, ...).
    start, stop
        The rows of the whole input that they are.
    recipe, job
        The network and how it is run.
    here
        The device.
    out
        Where the answer goes, as for ``run_model``. None: into new arrays.
    """
    if start == stop:
        assert run_config.outputs is not None  # found out before any chunk is computed
        return ComputedChunk([output.copy() for output in run_config.outputs], None)
    _check_dask_row_counts(run_config, rows, start, stop)
    with worker_device.limit_threads():
        model = _get_model(loader, worker_device)
        began = time.time()
        answer = run_model(model, rows, start, run_config, out)
    return ComputedChunk(
        answer.arrays,
        _make_chunk_stats(start, stop, worker_device, answer, began),
        failures=_make_row_failures(start, worker_device, answer),
    )


def _make_row_failures(start: int, worker_device: WorkerDevice, output: ModelOutput) -> tuple[RowFailure, ...]:
    return tuple(
        RowFailure(start + row, start + row + 1, worker_device.device, why)
        for row, why in sorted(output.failed_rows.items())
    )


def _get_model(loader: ModelLoader, worker_device: WorkerDevice) -> LoadedModel:
    return model_cache.get((loader.key, str(worker_device.torch_device)), lambda: loader.load(worker_device.torch_device))


def _make_chunk_stats(start: int, stop: int, worker_device: WorkerDevice, output: ModelOutput, began: float) -> ChunkStats:
    return ChunkStats(
        start,
        stop,
        worker_device.device,
        worker_device.device_name,
        output.batch_size,
        output.seconds,
        worker_device.worker,
        began=began,
        peak_nbytes=worker_device.peak_nbytes(),
        channels_last=output.channels_last,
    )


def _check_dask_row_counts(run_config: ModelRunConfig, rows: Sequence[Array | RemoteArray], start: int, stop: int) -> None:
    for name, port in zip(run_config.ports.names, rows, strict=True):
        if len(port) != stop - start:
            raise ChunkError(
                f"rows {start}:{stop}: the dask array of {name} computed {len(port)} rows there; its chunks "
                "have to say what they hold. Mend them, or call .compute_chunk_sizes() on it."
            )
