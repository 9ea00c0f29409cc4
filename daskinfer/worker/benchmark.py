"""Measuring the model on this worker: which batch size and memory format are fastest, on the first rows of the input."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from daskinfer.core.arrays import Array, RemoteArray
from daskinfer.core.chunks import BatchConfig
from daskinfer.models.loaded_model import LoadedModel
from daskinfer.scheduling.autotune import BatchSizeChoice, is_channels_last_faster, sustained_throughput, tune_batch_size
from daskinfer.transport.row_sources import Task, TaskResources
from daskinfer.transport.shared_memory import attach_pool
from daskinfer.worker import device_thread
from daskinfer.worker.batch_buffers import CHANNELS_LAST_FORMATS
from daskinfer.worker.current_device import WorkerDevice, current_device
from daskinfer.worker.model_runner import ModelOutput, ModelRunConfig, RunSpec, run_model
from daskinfer.worker.task import deserialize_spec, get_model, read_chunk

# Tolerated difference between outputs in two memory formats, as a share of the largest value. Their last bits differ, while
# a model that reads memory behind torch's back gives a different output altogether. Arbitrary, far from both.
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.05
_HALF_DTYPES = (torch.float16, torch.bfloat16)


class ModelBenchmark:
    """A model and the rows, (n, ...) per port, that it is timed on; they begin with the first row of the input."""

    def __init__(self, model: LoadedModel, rows: Sequence[Array | RemoteArray], run_config: ModelRunConfig) -> None:
        self._model, self._rows = model, rows
        self._run_config = replace(run_config, batch=BatchConfig(run_config.batch.batch_size))
        self._reference_outputs: list[Array] = []  # in torch's default format
        self._parameters = list(model.run.parameters()) if isinstance(model.run, torch.nn.Module) else []

    @property
    def can_use_channels_last(self) -> bool:
        """Whether channels_last may be faster: for a convolutional model that gets images or volumes.

        A model that is compiled for the strides that it sees would be compiled again, which takes seconds.
        """
        options = self._run_config.options
        return (
            options.memory_format == "auto"
            and not self._model.compiled
            and (options.preprocess is not None or any(len(port.shape) in CHANNELS_LAST_FORMATS for port in self._rows))
            and any(weights.ndim in CHANNELS_LAST_FORMATS for weights in self._parameters)
        )

    def run(self, size: int) -> tuple[int, float]:
        """Run one micro-batch of so many rows; return how many fitted into memory, and the seconds it took."""
        output = self._run_batch(size, self._run_config)
        self._reference_outputs = output.arrays
        return output.batch_size, output.seconds

    def run_channels_last(self, size: int) -> tuple[int, float]:
        """Do the same in channels_last; return 0 rows if the model fails in it or its output differs from :meth:`run`'s."""
        output = self._run_batch(size, _with_batch(self._run_config, channels_last=(self._model.device.type,)))
        agrees = output.channels_last and all(map(self._is_close, output.arrays, self._reference_outputs))
        return output.batch_size if agrees else 0, output.seconds

    def _run_batch(self, size: int, run_config: ModelRunConfig) -> ModelOutput:
        return run_model(self._model, [port[:size] for port in self._rows], 0, _with_batch(run_config, batch_size=size))

    def _is_close(self, array: Array, expected: Array) -> bool:
        """Return whether the rows that both outputs have agree within the tolerance."""
        n_rows = min(len(array), len(expected))
        array, expected = array[:n_rows], expected[:n_rows]
        if array.dtype.kind not in "fc":
            return np.array_equal(array, expected)
        largest = np.abs(expected, where=np.isfinite(expected), out=np.zeros(expected.shape)).max(initial=0.0)
        is_half = self._run_config.options.autocast or any(weights.dtype in _HALF_DTYPES for weights in self._parameters)
        tolerance = (HALF_TOLERANCE if is_half else TOLERANCE) * largest
        return np.allclose(array, expected, rtol=0.0, atol=tolerance, equal_nan=True)


def _with_batch(run_config: ModelRunConfig, **fields: Any) -> ModelRunConfig:
    return replace(run_config, batch=replace(run_config.batch, **fields))


def run_benchmark_task(
    serialized_spec: bytes,
    task: Task,
    dependency_results: Sequence[Any],
    candidates: Sequence[int],
    n_rows: int,
    *,
    sustained: bool = False,
) -> BatchSizeChoice:
    """Return the batch size that ``autotune.tune_batch_size`` chooses on this worker, on the first chunk of a task."""
    spec, (first, *_), device = deserialize_spec(serialized_spec), task.chunk_inputs, current_device()
    resources = TaskResources(attach_pool(task.pool_ref) if task.pool_ref else None, dependency_results)
    rows = read_chunk(lambda _: [source.read_rows(resources) for source in first.row_sources], first.chunk)
    choice, _ = device_thread.get_device_thread(device.worker).run(
        lambda: measure_batch_sizes(rows, spec, device, candidates, n_rows, sustained=sustained),
        time.perf_counter(),
    )
    return choice


def measure_batch_sizes(
    rows: Sequence[Array | RemoteArray],
    spec: RunSpec,
    worker_device: WorkerDevice,
    candidates: Sequence[int],
    n_rows: int,
    *,
    sustained: bool = False,
) -> BatchSizeChoice:
    """Return the batch size to use for ``n_rows`` rows, and its rows/s, of the candidates that ``rows`` can fill.

    The model runs in this thread. ``rows`` begin with the first row of the input. ``sustained``: the speed is what a run can
    expect, not that of the fastest micro-batch.
    """
    benchmark = ModelBenchmark(get_model(spec.loader, worker_device), rows, spec.run_config)
    with worker_device.limit_threads():
        initial = spec.run_config.batch.batch_size
        fitting = [size for size in candidates if size <= max(initial, len(rows[0]))]
        run_channels_last = benchmark.run_channels_last if benchmark.can_use_channels_last else None
        choice = tune_batch_size(benchmark.run, fitting, n_rows, run_channels_last, initial=initial)
        if not sustained:
            return choice
        run = benchmark.run_channels_last if choice.channels_last else benchmark.run
        return choice._replace(speed=sustained_throughput(run, choice.batch_size))


def measure_channels_last(rows: Sequence[Array | RemoteArray], spec: RunSpec, worker_device: WorkerDevice) -> bool:
    """Return whether channels_last is faster, by about one micro-batch in each memory format, in this thread."""
    benchmark = ModelBenchmark(get_model(spec.loader, worker_device), rows, spec.run_config)
    with worker_device.limit_threads():
        return benchmark.can_use_channels_last and is_channels_last_faster(
            benchmark.run, benchmark.run_channels_last, spec.run_config.batch.batch_size
        )
