"""What a worker does with a task: read its rows, compute them, write or return the outputs.

A task is one chunk, or several small ones, since a task costs the scheduler 2 to 3 ms. A worker has several tasks at a
time, each in a thread of its own: while one reads, another computes (``device_thread``), and a third writes.

What is the same for all tasks of a call, the :class:`RunSpec`, is pickled once and unpickled once per worker.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import cloudpickle

from daskinfer.core.arrays import Array, RemoteArray
from daskinfer.core.chunks import Chunk, ChunkResult, ChunkStats, RowFailure
from daskinfer.errors import ChunkError, StorageError
from daskinfer.models.loaded_model import LoadedModel
from daskinfer.models.loaders import ModelLoader
from daskinfer.storage.formats import Target
from daskinfer.transport.row_sources import ChunkInput, Task, TaskResources
from daskinfer.transport.shared_memory import attach_pool, write_result_header
from daskinfer.worker import device_thread
from daskinfer.worker.current_device import WorkerDevice, current_device
from daskinfer.worker.loaded_models import model_cache
from daskinfer.worker.model_runner import ModelOutput, ModelRunConfig, RunSpec, run_model

T = TypeVar("T")

# Unpickling may import packages. With dask-cuda installed, Dask's own are imported by a loader that deadlocks the worker if
# one thread imports dask.array while another uses its unfinished module (seen in Python 3.11, 2 runs of 3).
_unpickle_lock = threading.Lock()


def run_task(serialized_spec: bytes, task: Task | bytes, dependency_results: Sequence[Any] = ()) -> list[ChunkResult] | None:
    """Run a task on this worker; None if all of its outputs are in shared memory or in files.

    Parameters
    ----------
    serialized_spec
        The call's :class:`RunSpec`, as :meth:`RunSpec.serialize` gives it.
    task
        The chunks, as :meth:`Task.serialize` gives them or as they are.
    dependency_results
        Results of other Dask tasks, which row sources refer to by position.
    """
    with _unpickle_lock:
        spec, task = deserialize_spec(serialized_spec), Task.deserialize(task) if isinstance(task, bytes) else task
    memory = attach_pool(task.pool_ref) if task.pool_ref else None
    results = [
        _process_chunk(chunk_input, spec, TaskResources(memory, dependency_results), alone=task.alone)
        for chunk_input in task.chunk_inputs
    ]
    if memory is None:
        return results
    fits = write_result_header(memory, task.header_offset, [replace(result, arrays=[]) for result in results])
    return None if fits and not any(result.arrays for result in results) else results


@functools.lru_cache(maxsize=4)
def deserialize_spec(serialized_spec: bytes) -> RunSpec:
    """Unpickle the spec of a call, once per worker."""
    spec: RunSpec = cloudpickle.loads(serialized_spec)
    return spec


def _process_chunk(chunk_input: ChunkInput, spec: RunSpec, resources: TaskResources, *, alone: bool) -> ChunkResult:
    """Read, compute and write one chunk; computing has its turn on the device's thread."""
    arrived_at, read_began, chunk = time.perf_counter(), time.time(), chunk_input.chunk
    rows = read_chunk(lambda _: [source.read_rows(resources) for source in chunk_input.row_sources], chunk)
    read_seconds = time.perf_counter() - arrived_at
    out = None
    if chunk_input.output_refs is not None and resources.shared_memory is not None:
        out = [ref.get_array(resources.shared_memory) for ref in chunk_input.output_refs]
    device = current_device()
    result, waited_seconds = device_thread.get_device_thread(device.worker).run(
        lambda: compute_chunk(rows, chunk, spec, device, out, alone=alone), arrived_at
    )
    timing = {"read_began": read_began, "read_seconds": read_seconds, "waited_seconds": waited_seconds}
    result = write_outputs(result, spec.targets, **timing)
    return result if out is None else replace(result, arrays=[])


def read_chunk(read_rows: Callable[[Chunk], T], chunk: Chunk) -> T:
    """Read the rows of a chunk; an error names the chunk."""
    try:
        return read_rows(chunk)
    except Exception as error:
        raise StorageError(
            f"chunk {chunk.index} (rows {chunk.start}:{chunk.stop}) cannot be read: {type(error).__name__}: {error}. Check "
            "the input there; on_error='skip' (--on-error) continues without these rows.",
            getattr(error, "errno", None) or 0,
        ) from error


def write_outputs(
    result: ChunkResult, targets: Sequence[Target], *, read_began: float, read_seconds: float, waited_seconds: float
) -> ChunkResult:
    """Write the outputs to their targets, if there are any; return the result with the stored parts and its timing."""
    began, chunk = time.perf_counter(), result.chunk
    parts, arrays = result.parts, result.arrays
    if targets:
        try:
            parts = tuple(target.write(chunk.start, rows) for target, rows in zip(targets, arrays, strict=True))
        except Exception as error:
            raise StorageError(
                f"chunk {chunk.index} (rows {chunk.start}:{chunk.stop}) cannot be written: {type(error).__name__}: {error}. "
                "Check the output's disk.",
                getattr(error, "errno", None) or 0,
            ) from error
        arrays = []
    stats = result.stats.with_timing(
        read_began=read_began,
        ended=time.time(),
        read_seconds=read_seconds,
        write_seconds=time.perf_counter() - began if targets else 0.0,
        waited_seconds=waited_seconds,
    )
    return replace(result, arrays=arrays, parts=parts, stats=stats)


def compute_chunk(
    rows: Sequence[Array | RemoteArray],
    chunk: Chunk,
    spec: RunSpec,
    worker_device: WorkerDevice,
    out: Sequence[Array] | None = None,
    *,
    alone: bool = True,
) -> ChunkResult:
    """Compute one chunk in this thread: what every way of computing calls in the end.

    Parameters
    ----------
    rows
        The rows of each port, (n, ...).
    chunk
        Which rows of the whole input they are.
    spec
        The model, and how it is run.
    worker_device
        The device that computes.
    out
        Where the outputs go, as for ``run_model``. None: into new arrays.
    alone
        Whether nothing else is in flight on the device, as for ``run_model``.
    """
    config = spec.run_config
    if not chunk.n_rows:
        assert config.outputs is not None  # inferred before any chunk is computed
        stats = ChunkStats(chunk.start, chunk.stop, worker_device.device, worker_device.device_name, 0, 0.0, "")
        return ChunkResult(chunk, [output.copy() for output in config.outputs], stats)
    _check_dask_row_counts(config, rows, chunk)
    with worker_device.limit_threads():
        n_loads, since = model_cache.n_loads, time.perf_counter()
        model = get_model(spec.loader, worker_device)
        load_seconds = time.perf_counter() - since if model_cache.n_loads > n_loads else 0.0
        began = time.time()
        output = run_model(model, rows, chunk.start, config, out, alone=alone)
    stats = _make_chunk_stats(chunk, worker_device, output, began, load_seconds)
    return ChunkResult(chunk, output.arrays, stats, failures=_make_row_failures(chunk, worker_device, output))


def get_model(loader: ModelLoader, worker_device: WorkerDevice) -> LoadedModel:
    """Return the model on this worker's device; loaded once per process."""
    return model_cache.get((loader.key, str(worker_device.torch_device)), lambda: loader.load(worker_device.torch_device))


def _make_row_failures(chunk: Chunk, worker_device: WorkerDevice, output: ModelOutput) -> tuple[RowFailure, ...]:
    rows = ((chunk.start + row, reason) for row, reason in sorted(output.failed_rows.items()))
    return tuple(RowFailure(row, row + 1, worker_device.device, reason) for row, reason in rows)


def _make_chunk_stats(
    chunk: Chunk, worker_device: WorkerDevice, output: ModelOutput, began: float, load_seconds: float
) -> ChunkStats:
    return ChunkStats(
        chunk.start,
        chunk.stop,
        worker_device.device,
        worker_device.device_name,
        output.batch_size,
        output.seconds,
        worker_device.worker,
        began=began,
        peak_nbytes=worker_device.peak_nbytes(),
        channels_last=output.channels_last,
        load_seconds=load_seconds,
        first_call_seconds=output.first_call_seconds,
    )


def _check_dask_row_counts(config: ModelRunConfig, rows: Sequence[Array | RemoteArray], chunk: Chunk) -> None:
    for name, port in zip(config.ports.names, rows, strict=True):
        if len(port) != chunk.n_rows:
            raise ChunkError(
                f"rows {chunk.start}:{chunk.stop}: the dask array of {name} computed {len(port)} rows, not as many as its "
                "chunks say. Correct its chunks, or call .compute_chunk_sizes() on it."
            )
