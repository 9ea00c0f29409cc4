"""Micro-batches that are run to be timed: the first rows of the input, again and again, in either memory format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from daskinfer.core.arrays import Array, RemoteArray
from daskinfer.worker.batch_buffers import CHANNELS_LAST_FORMATS
from daskinfer.worker.loaded import LoadedModel
from daskinfer.worker.model_runner import ModelOutput, ModelRunConfig, run_model

# Of the largest value, between answers in two memory formats: their last bits differ, a network that reads the memory past
# torch gives another answer altogether. Arbitrary, far from both.
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.05
_HALF_DTYPES = (torch.float16, torch.bfloat16)


class ModelBenchmark:
    """A network and the rows, (n, ...) per port, that it is timed on; they begin with the input's first."""

    def __init__(self, model: LoadedModel, rows: Sequence[Array | RemoteArray], run_config: ModelRunConfig) -> None:
        self._model, self._rows, self._run_config = model, rows, replace(run_config, by_kind={}, channels_last=())
        self._reference_outputs: list[Array] = []  # in torch's own format
        self._parameters = list(model.run.parameters()) if isinstance(model.run, torch.nn.Module) else []

    @property
    def can_use_channels_last(self) -> bool:
        """Whether the other memory format may be faster: a network with convolutions that gets images or volumes.

        What is compiled for the strides that it sees would be compiled again, which takes seconds.
        """
        options = self._run_config.options
        return (
            options.memory_format == "auto"
            and not self._model.compiled
            and (options.preprocess is not None or any(len(port.shape) in CHANNELS_LAST_FORMATS for port in self._rows))
            and any(weights.ndim in CHANNELS_LAST_FORMATS for weights in self._parameters)
        )

    def run(self, size: int) -> tuple[int, float]:
        """Run one micro-batch of so many rows: how many memory held, and in how many seconds."""
        answer = self._run_batch(size, self._run_config)
        self._reference_outputs = answer.arrays
        return answer.batch_size, answer.seconds

    def run_channels_last(self, size: int) -> tuple[int, float]:
        """The same in that memory format; 0 rows where the network fails in it, or answers otherwise than in torch's own."""
        answer = self._run_batch(size, replace(self._run_config, channels_last=(self._model.device.type,)))
        agrees = answer.channels_last and all(map(self._is_close, answer.arrays, self._reference_outputs))
        return answer.batch_size if agrees else 0, answer.seconds

    def _run_batch(self, size: int, run_config: ModelRunConfig) -> ModelOutput:
        return run_model(self._model, [port[:size] for port in self._rows], 0, replace(run_config, batch_size=size))

    def _is_close(self, array: Array, expected: Array) -> bool:
        """Whether the rows that both answers have say the same."""
        n_rows = min(len(array), len(expected))
        array, expected = array[:n_rows], expected[:n_rows]
        if array.dtype.kind not in "fc":
            return np.array_equal(array, expected)
        largest = np.abs(expected, where=np.isfinite(expected), out=np.zeros(expected.shape)).max(initial=0.0)
        is_half = self._run_config.options.autocast or any(weights.dtype in _HALF_DTYPES for weights in self._parameters)
        within = (HALF_TOLERANCE if is_half else TOLERANCE) * largest
        return np.allclose(array, expected, rtol=0.0, atol=within, equal_nan=True)
