"""A data path for chunks on an accelerator: one copy in, one copy out and one wait per chunk, all overlapped with compute.

The GPU check compares it with daskinfer's model runner. Rows are staged in pinned memory in their stored dtype and copied on
a stream of their own; the model reads micro-batches, cast and laid out on the device, from a buffer at a fixed address; its
outputs leave on a third stream. Three threads may share a pipeline: a reader (``stage``), the device's thread (``compute``)
and a writer (``finish``). Only the writer waits for the device, once per chunk.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from daskinfer.core.arrays import Array

DEPTH = 2  # chunks that may be staged at a time, and that may leave at a time
WAITS = ("refill", "overwrite", "early", "unfinished", "unwaited")  # the mistakes that the waits prevent


@dataclass
class StagingBuffer:
    """Memory for the rows or the outputs of one chunk, on both sides, and the events that order its use."""

    host: torch.Tensor  # pinned
    device: torch.Tensor
    copied: torch.Event  # the copy between the two has finished
    used: torch.Event  # the model has read the rows, or has written the outputs


@dataclass
class StagedChunk:
    """A chunk on its way through the pipeline."""

    n_rows: int
    rows: StagingBuffer
    outputs: StagingBuffer | None = None


class TransferPipeline:
    """The buffers and streams of one model on one device.

    Parameters
    ----------
    model
        Takes a batch (batch_size, *row) on the device and returns the outputs (batch_size, *output).
    device
        The accelerator.
    batch_size, chunk_rows
        Rows of a micro-batch, and at most of a chunk.
    row, output
        Arrays (1, *shape) with the shape and dtype of stored rows and of outputs.
    dtype
        What the model takes; None: the dtype of ``row``.
    memory_format
        Layout of the model's input.
    omitted_waits
        Those of ``WAITS`` to leave out, to test that each is needed.
    """

    def __init__(
        self,
        model: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
        batch_size: int,
        chunk_rows: int,
        row: Array,
        output: Array,
        *,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        omitted_waits: Collection[str] = (),
    ) -> None:
        self._model, self._device, self._batch_size = model, device, batch_size
        self._omitted_waits = omitted_waits
        self._compute_stream = torch.accelerator.current_stream(device)  # the only one that models know
        self._input_stream, self._output_stream = torch.Stream(device), torch.Stream(device)
        stored = torch.from_numpy(row)
        batch = torch.zeros((batch_size, *row.shape[1:]), dtype=dtype or stored.dtype, device=device)
        self._batch = batch.to(memory_format=memory_format)
        self._row_buffers = self._make_buffers((chunk_rows, *row.shape[1:]), stored.dtype)
        self._output_buffers = self._make_buffers((chunk_rows, *output.shape[1:]), torch.from_numpy(output).dtype)

    def _make_buffers(self, shape: Sequence[int], dtype: torch.dtype) -> queue.Queue[StagingBuffer]:
        buffers: queue.Queue[StagingBuffer] = queue.Queue()
        for _ in range(DEPTH):
            host = torch.empty(shape, dtype=dtype, pin_memory=True)
            device = torch.empty(shape, dtype=dtype, device=self._device)
            buffers.put(StagingBuffer(host, device, torch.Event(self._device), torch.Event(self._device)))
        return buffers

    def stage(self, rows: Array) -> StagedChunk:
        """Copy rows to pinned memory and submit their copy to the device."""
        buffer, n_rows = self._row_buffers.get(), len(rows)
        if "refill" not in self._omitted_waits:
            buffer.copied.synchronize()  # the earlier rows have left the pinned memory, usually long ago
        buffer.host[:n_rows].numpy()[...] = rows
        with self._input_stream:
            self._wait("overwrite", self._input_stream, buffer.used)  # the model has read the earlier rows
            buffer.device[:n_rows].copy_(buffer.host[:n_rows], non_blocking=True)
            buffer.copied.record(self._input_stream)
        return StagedChunk(n_rows, buffer)

    def compute(self, chunk: StagedChunk) -> StagedChunk:
        """Submit the model's work on a chunk and the copy of its outputs; wait for nothing."""
        rows, outputs = chunk.rows, self._output_buffers.get()
        self._wait("early", self._compute_stream, rows.copied)  # the writer has waited for the earlier outputs
        with torch.inference_mode():
            for begin in range(0, chunk.n_rows, self._batch_size):
                end = min(begin + self._batch_size, chunk.n_rows)
                self._compute_batch(rows.device[begin:end], outputs.device[begin:end])
        rows.used.record(self._compute_stream)
        outputs.used.record(self._compute_stream)
        self._row_buffers.put(rows)
        with self._output_stream:
            self._wait("unfinished", self._output_stream, outputs.used)
            outputs.host[: chunk.n_rows].copy_(outputs.device[: chunk.n_rows], non_blocking=True)
            outputs.copied.record(self._output_stream)
        return StagedChunk(chunk.n_rows, rows, outputs)

    def _compute_batch(self, rows: torch.Tensor, outputs: torch.Tensor) -> None:
        batch, n_rows = self._batch, len(rows)
        if n_rows < self._batch_size:
            batch = torch.zeros_like(self._batch)  # the rest is padding
        batch[:n_rows].copy_(rows, non_blocking=True)  # also casts and changes the layout, on the device
        outputs.copy_(self._model(batch)[:n_rows], non_blocking=True)

    def finish(self, chunk: StagedChunk, result: Array) -> None:
        """Wait for a chunk's outputs and copy them to ``result``."""
        assert chunk.outputs is not None
        if "unwaited" not in self._omitted_waits:
            chunk.outputs.copied.synchronize()
        result[...] = chunk.outputs.host[: chunk.n_rows].numpy()
        self._output_buffers.put(chunk.outputs)

    def _wait(self, name: str, stream: torch.Stream, event: torch.Event) -> None:
        if name not in self._omitted_waits:
            stream.wait_event(event)

    def run(self, rows: Array, result: Array, chunk_rows: int) -> None:
        """Run all rows in one thread, in the order of three: chunk k+1 is staged while k computes and k-1 is finished."""
        slices = [slice(begin, min(begin + chunk_rows, len(rows))) for begin in range(0, len(rows), chunk_rows)]
        computed: StagedChunk | None = None
        staged = self.stage(rows[slices[0]])
        for k in range(len(slices)):
            current = self.compute(staged)
            if k + 1 < len(slices):
                staged = self.stage(rows[slices[k + 1]])
            if computed is not None:
                self.finish(computed, result[slices[k - 1]])
            computed = current
        assert computed is not None
        self.finish(computed, result[slices[-1]])
