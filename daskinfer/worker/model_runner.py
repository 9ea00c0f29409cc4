"""One chunk through one model: micro-batches, transfers, precision, and what to do when memory runs out.

Micro-batches lie on a grid that starts at row 0 of the whole input, whatever the chunk (decision 3). A row keeps its place
inside its micro-batch, and what the chunk does not hold of it is zeros, so the network sees every row at the same place of
a tensor of the same shape however the input is cut. The last bits of an answer depend on both.

What is done per micro-batch beside the network is kept short: its code is not in the processor's caches any more, after the
arrays that went through them, and takes four to ten times as long as alone (measured). So whole micro-batches of a model
that gives one array go through a loop of their own, :meth:`_ChunkRun._run_fast_path`.

Out of memory, the micro-batch is halved, the tensors of the failed attempt are let go, and the same rows are run again; a
model remembers what it could hold of rows of this shape. Answers then agree within rounding, and the receipt says which
size was used.

A network of convolutions is often faster where its input lies in torch's memory format "channels last" (measured on CPUs,
one thread: 0.38 of the time for a convolution, ReLU and pooling, 0.7 to 0.9 for residual networks; but 1.8 for one of 1x1
convolutions only). So it is measured like the micro-batch (``ladder``), on real rows, whose answers have to agree. Only the
input is laid out so: the weights stay as they are, shared. Where an attempt fails in the measured format, the chunk is run
again in torch's own, which is the one that the caller's network was written for (``view`` refuses the other).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from daskinfer.core.arrays import Array, RemoteArray, UnreadableError, to_numpy
from daskinfer.core.pytree import LEAF_SPEC, Ports, PyTreeSpec, call_with
from daskinfer.errors import ModelError, OptionError
from daskinfer.options import Options
from daskinfer.worker import bad_rows
from daskinfer.worker.batch_buffers import BatchBuffers
from daskinfer.worker.error_kinds import BadRowsError, annotate_errors, is_out_of_memory, is_sticky
from daskinfer.worker.loaded import LoadedModel
from daskinfer.worker.output_checks import (
    check_output_spec,
    check_row_counts,
    describe_row_specs,
    flatten_output,
    has_different_rows,
)

logger = logging.getLogger(__name__)

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PLAIN_ARRAY_TYPES = (torch.Tensor, np.ndarray)  # and no class derived from them, which may do more when it is looked at


@dataclass(frozen=True)
class ModelRunConfig:
    """What is the same for every chunk: the ports, the micro-batch, the options and what the answer looks like.

    ``batch_size`` is the rows of a micro-batch; ``by_kind`` holds those of kinds of device ("cuda", "cpu") that take
    another, each a divisor of it. ``outputs`` holds one empty array (0, *shape) per output; None while that is being found
    out. ``channels_last`` holds the kinds of device on which that memory format was measured to pay. ``alone``: nothing
    else is on its way on the device, so that memory that is short is a row's own fault.
    """

    ports: Ports
    batch_size: int
    options: Options = field(default_factory=Options)
    outputs: tuple[Array, ...] | None = None
    by_kind: Mapping[str, int] = field(default_factory=dict)
    channels_last: tuple[str, ...] = ()
    alone: bool = True

    def get_batch_size(self, kind: str) -> int:
        """Rows of a micro-batch on a kind of device."""
        return self.by_kind.get(kind, self.batch_size)


@dataclass(frozen=True)
class ModelOutput:
    """A chunk's outputs, each (n, *shape), in the order of ``structure``, and the smallest micro-batch that was used.

    ``channels_last``: images lay in that memory format. ``failed_rows`` are rows of the chunk that have the fill value instead of
    an answer, and why.
    """

    arrays: list[Array]
    structure: PyTreeSpec
    batch_size: int
    seconds: float
    channels_last: bool = False
    failed_rows: Mapping[int, str] = field(default_factory=dict)


def run_model(
    model: LoadedModel,
    rows: Sequence[Array | RemoteArray],
    start: int,
    run_config: ModelRunConfig,
    out: Sequence[Array] | None = None,
) -> ModelOutput:
    """Run the network over one chunk.

    Parameters
    ----------
    model
        The loaded network; its lock is held meanwhile.
    rows
        One array per port, (n, ...) each, n >= 1.
    start
        Row of the whole input that the chunk begins with.
    job
        What is the same for every chunk.
    out
        Where the answer goes: one array (n, *shape) per promised output of the job. None: into new arrays.

    Raises
    ------
    ModelError
        Where an answer is not arrays with as many rows as went in.
    OptionError
        Where the network cannot be given the dtype that was asked for.
    ChunkError
        Where the network fails, or a single row does not fit into memory, and failing rows are not to be skipped.
    """
    with model.lock, annotate_errors(model.device, start, start + len(rows[0])):
        rows = [port if isinstance(port, RemoteArray) else to_numpy(port) for port in rows]
        began = time.perf_counter()
        shapes = tuple(port.shape[1:] for port in rows)
        planned = run_config.get_batch_size(model.device.type)
        batch_size = min(planned, model.max_batch_sizes.get(shapes, planned))
        tentative = model.device.type in run_config.channels_last and shapes not in model.contiguous_only_shapes
        has_failed = False  # in that format
        while True:
            try:
                attempt = _ChunkRun(model, rows, start, batch_size, run_config, out, tentative=tentative)
                arrays, structure = attempt.run()
                break
            except Exception as error:
                is_short = is_out_of_memory(error) and batch_size > 1
                if not is_short and (not tentative or is_sticky(error)):
                    raise
            # Out of the except block: while it runs, the traceback keeps the failed attempt's tensors alive.
            if is_short:
                batch_size = model.max_batch_sizes[shapes] = _halve_batch_size(model, batch_size)
            else:
                tentative, has_failed = False, True
        if has_failed and not attempt.failed_rows:  # the format was at fault, not a row
            logger.info("%s: the network fails in channels_last; going on in torch's own memory format", model.device)
            model.contiguous_only_shapes.add(shapes)
        seconds = time.perf_counter() - began
        return ModelOutput(arrays, structure, batch_size, seconds, attempt.channels_last, attempt.failed_rows)


def _halve_batch_size(model: LoadedModel, batch_size: int) -> int:
    smaller = batch_size // 2
    logger.warning("%s: out of memory at micro-batch %d; going on with %d", model.device, batch_size, smaller)
    gc.collect()  # a network that catches the error itself leaves its tensors in a cycle of frames
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # pragma: no cover - needs a GPU
    return smaller


class _ChunkRun:
    """One attempt at a chunk with one micro-batch size, and in one memory format.

    ``tentative``: in channels_last, as measured; whatever fails is to be tried without before a row is at fault.
    """

    def __init__(
        self,
        model: LoadedModel,
        rows: Sequence[Array | RemoteArray],
        start: int,
        batch_size: int,
        run_config: ModelRunConfig,
        out: Sequence[Array] | None,
        *,
        tentative: bool,
    ) -> None:
        self.model, self.rows, self.start, self.batch_size, self.run_config = model, rows, start, batch_size, run_config
        self.out = out
        self.n_rows = len(rows[0])
        self.results: list[Array] = []
        self.structure: PyTreeSpec | None = None
        self.failed_rows: dict[int, str] = {}
        self._tentative = tentative
        self.channels_last = model.takes_tensors and (tentative or run_config.options.memory_format == "channels_last")
        self._buffers = BatchBuffers(model, run_config.options.get_cast_dtype, channels_last=self.channels_last)
        self._next_row = 0  # the first row that is not done

    def run(self) -> tuple[list[Array], PyTreeSpec]:
        while self._next_row < self.n_rows:
            try:
                if self._can_use_fast_path():
                    self._run_fast_path()
                else:
                    self._compute_rows(self._next_row, self._cell_end())
            except Exception as error:
                if self._tentative or self._is_fatal(error):
                    raise
                self._handle_failure(self._next_row, self._cell_end(), error)
            self._next_row = self._cell_end()
        if self.structure is None:  # not one row has an answer
            self._allocate_results(self.run_config.outputs or ())
        if self.failed_rows:
            bad_rows.fill_rows(self.results, list(self.failed_rows), self.run_config.options.fill_value)
        return self.results, self.structure or PyTreeSpec("none")

    def _compute_rows(self, begin: int, end: int, exclude: Collection[int] = ()) -> None:
        good = np.setdiff1d(np.arange(begin, end), list(exclude)) if exclude else None
        arrays, structure = self._compute_micro_batch(begin, end, good)
        arrays = self._cast_to_output_spec(arrays)
        bad = bad_rows.find_nan_rows(arrays) if self.run_config.options.nan_is_failure else []
        if bad and self.run_config.options.on_error == "raise":
            raise ValueError("the answer holds a NaN")
        self._store_output(arrays, structure, begin, end, good)
        if self.failed_rows:  # by an earlier attempt
            for row in range(begin, end) if good is None else good.tolist():
                self.failed_rows.pop(row, None)
        for row in bad:
            self.failed_rows[begin + row if good is None else int(good[row])] = "the answer holds a NaN"

    def _handle_failure(self, begin: int, end: int, error: Exception) -> None:
        """Say which rows are at fault, or go on without them."""
        options = self.run_config.options
        if options.on_error == "raise":
            raise BadRowsError(*bad_rows.find_first_failing_range(self._compute_rows, begin, end, self._is_fatal)) from error
        self.failed_rows |= bad_rows.isolate_bad_rows(
            self._compute_rows, self._probe_rows, begin, end, error, options.retries, self._is_fatal
        )

    def _probe_rows(self, begin: int, end: int) -> None:
        """Run rows for nothing but to see whether they fail: nothing is filled up, no answer is kept.

        What a network answers to other numbers of rows than a micro-batch's is no fault of these: squeezed, for example.
        """
        try:
            self._compute_micro_batch(begin, end, padded=self.model.compiled)
        except (ModelError, OptionError) as error:
            raise bad_rows.ProbeOutputError from error

    def _is_fatal(self, error: Exception) -> bool:
        """Whether no row is at fault: the answer is none, memory is short, or the device is broken."""
        out_of_memory = is_out_of_memory(error) and (self.batch_size > 1 or not self.run_config.alone)
        return out_of_memory or isinstance(error, ModelError | OptionError | UnreadableError) or is_sticky(error)

    def _cell_end(self) -> int:
        """Where the cell of the global grid ends that the next row of the chunk lies in, or the chunk."""
        return min(self.n_rows, self._next_row + self.batch_size - (self.start + self._next_row) % self.batch_size)

    def _compute_micro_batch(
        self, begin: int, end: int, good_rows: Array | None = None, *, padded: bool = True
    ) -> tuple[list[Array], PyTreeSpec]:
        """The answer to rows begin:end, or to ``good`` ones of these, which keep their places among zeros."""
        job, ports, arrays = self.run_config, self.run_config.ports, [port[begin:end] for port in self.rows]
        if good_rows is not None:
            arrays = [np.asarray(array)[good_rows - begin] for array in arrays]
        n_rows = len(arrays[0])
        if (preprocess := job.options.preprocess) is not None:
            # Copies: a function that works in place would write into the caller's array.
            ports, arrays = _apply_preprocess(preprocess, ports.join([np.array(array) for array in arrays]))
            check_row_counts(ports.names, arrays, n_rows, "preprocess")
        size = n_rows
        places: slice | Array = slice(0, n_rows)
        if job.options.pad and padded:
            size, offset = self.batch_size, (self.start + begin) % self.batch_size
            places = slice(offset, offset + n_rows) if good_rows is None else good_rows - begin + offset
        batch = [
            self._buffers.make_batch(name, array, size, places) for name, array in zip(ports.names, arrays, strict=True)
        ]
        answer, structure = self._convert_output(self._call_model(ports.join(batch)), size)
        trimmed = [array[places] for array in answer]
        if job.options.postprocess is None:
            return trimmed, structure
        answer, structure = flatten_output(job.options.postprocess(structure.rebuild(trimmed)), "postprocess")
        check_row_counts(structure, answer, n_rows, "postprocess")
        return [to_numpy(array) for array in answer], structure

    def _can_use_fast_path(self) -> bool:
        """Whether the next rows are a whole micro-batch of a model that gives one array, with nothing done beside it."""
        options = self.run_config.options
        return (
            self.structure == LEAF_SPEC
            and options.preprocess is options.postprocess is None
            and not options.nan_is_failure
            and self._cell_end() - self._next_row == self.batch_size
        )

    def _run_fast_path(self) -> None:
        """Whole micro-batches from here on, as :meth:`_compute_rows` does one, but what stays the same is done once."""
        ports, size = self.run_config.ports, self.batch_size
        batch = self._buffers.make_batch_reader(ports.names, self.rows, size)
        with self._inference_context():
            for begin in range(self._next_row, self.n_rows - size + 1, size):
                self._next_row = begin
                self._store_whole_batch(call_with(self.model.run, ports.join(batch(begin))))

    def _store_whole_batch(self, output: Any) -> None:
        """Keep the answer to a whole micro-batch; in a method of its own, so that none lives while the next is computed."""
        begin, size, (result,) = self._next_row, self.batch_size, self.results
        looks_alike = type(output) in _PLAIN_ARRAY_TYPES and output.shape == (size, *result.shape[1:])
        if looks_alike and (array := to_numpy(output)).dtype == result.dtype:
            result[begin : begin + size] = array
        else:  # as autocast gives it on this device, or not as before, which is said there
            arrays, structure = self._convert_output(flatten_output(output, "the model"), size)
            self._store_output(self._cast_to_output_spec(arrays), structure, begin, begin + size, None)

    def _call_model(self, batch: Any) -> tuple[list[Any], PyTreeSpec]:
        with self._inference_context():
            return flatten_output(call_with(self.model.run, batch), "the model")

    @contextlib.contextmanager
    def _inference_context(self) -> Iterator[None]:
        """What networks run in; functions on ndarrays run as they are."""
        if not self.model.takes_tensors:
            yield
            return
        with torch.inference_mode(), make_autocast_context(self.run_config.options, self.model.device.type):
            yield

    def _convert_output(self, flat_output: tuple[list[Any], PyTreeSpec], size: int) -> tuple[list[Array], PyTreeSpec]:
        """The answer to ``size`` rows as ndarrays, after a look whether it is one."""
        answer, structure = flat_output
        check_row_counts(structure, answer, size, "the model")
        return [to_numpy(array) for array in answer], structure

    def _cast_to_output_spec(self, arrays: list[Array]) -> list[Array]:
        """Under autocast the float dtype of an answer differs from device to device: the plan's is the one that counts."""
        promised = self.run_config.outputs
        if self.run_config.options.autocast is None or promised is None or len(promised) != len(arrays):
            return arrays
        return [
            a.astype(p.dtype, copy=False) if a.dtype.kind == p.dtype.kind == "f" else a
            for a, p in zip(arrays, promised, strict=True)
        ]

    def _store_output(
        self, arrays: list[Array], structure: PyTreeSpec, begin: int, end: int, good_rows: Array | None
    ) -> None:
        """Copy a micro-batch's answer into the chunk's: it may lie in the buffer that the next one overwrites."""
        if self.structure is None:
            self.structure = structure
            looks = [np.empty((0, *array.shape[1:]), array.dtype) for array in arrays]
            check_output_spec(structure, looks, self.run_config.options.output, self.run_config.outputs)
            self._allocate_results(looks)
        if structure != self.structure or any(map(has_different_rows, arrays, self.results)):
            raise ModelError(
                f"rows {self.start + begin}:{self.start + end} gave {describe_row_specs(arrays)} ({', '.join(structure.names)}) and "
                f"earlier rows {describe_row_specs(self.results)} ({', '.join(self.structure.names)}); every row's answer has to look "
                "alike. Pad or reduce it in postprocess."
            )
        for result, array in zip(self.results, arrays, strict=True):
            result[slice(begin, end) if good_rows is None else good_rows] = array

    def _allocate_results(self, templates: Sequence[Array]) -> None:
        self.results = list(self.out or (np.empty((self.n_rows, *look.shape[1:]), look.dtype) for look in templates))


def _apply_preprocess(preprocess: Callable[..., Any], value: Any) -> tuple[Ports, list[Any]]:
    value = call_with(preprocess, value)
    ports = Ports.from_input(value)
    if not ports.names:
        raise ModelError("preprocess returned no array; one with an entry per row is needed. Return what the net takes.")
    return ports, [to_numpy(array) for array in ports.split(value)]


def make_autocast_context(options: Options, device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The autocast that ``options`` ask for, as a context."""
    if options.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=_AUTOCAST_DTYPES[options.autocast])
