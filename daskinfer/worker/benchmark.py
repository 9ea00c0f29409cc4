"""Micro-batches that are run to be timed: the first rows of the input, again and again, in either memory format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from daskinfer.core.arrays import Array, Elsewhere
from daskinfer.worker.batch_buffers import CHANNELS_LAST
from daskinfer.worker.loaded import LoadedModel
from daskinfer.worker.model_runner import Answer, Job, run_chunk

# Of the largest value, between answers in two memory formats: their last bits differ, a network that reads the memory past
# torch gives another answer altogether. Arbitrary, far from both.
AGREE, AGREE_IN_HALF = 1e-3, 0.05
_HALF = (torch.float16, torch.bfloat16)


class Trial:
    """A network and the rows, (n, ...) per port, that it is timed on; they begin with the input's first."""

    def __init__(self, model: LoadedModel, rows: Sequence[Array | Elsewhere], job: Job) -> None:
        self._model, self._rows, self._job = model, rows, replace(job, by_kind={}, channels_last=())
        self._answer: list[Array] = []  # in torch's own format
        self._weights = list(model.run.parameters()) if isinstance(model.run, torch.nn.Module) else []

    @property
    def may_be_channels_last(self) -> bool:
        """Whether the other memory format may be faster: a network with convolutions that gets images or volumes.

        What is compiled for the strides that it sees would be compiled again, which takes seconds.
        """
        options = self._job.options
        return (
            options.memory_format == "auto"
            and not self._model.compiled
            and (options.preprocess is not None or any(len(port.shape) in CHANNELS_LAST for port in self._rows))
            and any(weights.ndim in CHANNELS_LAST for weights in self._weights)
        )

    def run(self, size: int) -> tuple[int, float]:
        """Run one micro-batch of so many rows: how many memory held, and in how many seconds."""
        answer = self._run(size, self._job)
        self._answer = answer.arrays
        return answer.batch_size, answer.seconds

    def run_channels_last(self, size: int) -> tuple[int, float]:
        """The same in that memory format; 0 rows where the network fails in it, or answers otherwise than in torch's own."""
        answer = self._run(size, replace(self._job, channels_last=(self._model.device.type,)))
        agrees = answer.channels_last and all(map(self._agrees, answer.arrays, self._answer))
        return answer.batch_size if agrees else 0, answer.seconds

    def _run(self, size: int, job: Job) -> Answer:
        return run_chunk(self._model, [port[:size] for port in self._rows], 0, replace(job, batch_size=size))

    def _agrees(self, array: Array, expected: Array) -> bool:
        """Whether the rows that both answers have say the same."""
        n_rows = min(len(array), len(expected))
        array, expected = array[:n_rows], expected[:n_rows]
        if array.dtype.kind not in "fc":
            return np.array_equal(array, expected)
        largest = np.abs(expected, where=np.isfinite(expected), out=np.zeros(expected.shape)).max(initial=0.0)
        is_half = self._job.options.autocast or any(weights.dtype in _HALF for weights in self._weights)
        within = (AGREE_IN_HALF if is_half else AGREE) * largest
        return np.allclose(array, expected, rtol=0.0, atol=within, equal_nan=True)
