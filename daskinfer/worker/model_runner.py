"""Running the model on one chunk: micro-batches, transfers, precision, and what to do if memory runs out.

Micro-batches form a grid that starts at row 0 of the whole input, whatever the chunk: the last bits of an output depend on
a row's position in the tensor and on the tensor's shape (see the docstring of ``daskinfer.scheduling``). A row keeps its
position inside its micro-batch, and rows of the micro-batch that the chunk does not hold are zeros, so the model sees the
same tensor shape and every row in the same place however the input is cut.

Python code between calls of the model is kept short: the arrays of a micro-batch have pushed it out of the processor's
caches, so it takes four to ten times as long as on its own (measured). So full micro-batches of a model that returns one
array have a loop of their own, :meth:`_ChunkRun._run_fast_path`.

If memory runs out, the batch size is halved, the tensors of the failed attempt are freed, and the same rows run again; the
model remembers the size that fitted for rows of this shape. The outputs then agree within rounding, and the chunk's
statistics hold the size that was used.

A convolutional model is often faster if its input is in torch's memory format "channels last" (measured on CPUs, one
thread: 0.38 of the time for a convolution, ReLU and pooling, 0.7 to 0.9 for residual networks; but 1.8 for one of 1x1
convolutions only). So the format is measured like the batch size (``autotune``), on real rows, and only used if the outputs
agree. Only the input is converted: the weights stay as they are, shared between processes. If an attempt fails in the
measured format, the chunk runs again in torch's default format, for which the caller's model was written (``view`` rejects
the other).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cloudpickle
import numpy as np
import torch

from daskinfer.core.arrays import Array, RemoteArray, UnreadableError
from daskinfer.core.chunks import BatchConfig
from daskinfer.core.pytree import LEAF_SPEC, Ports, PyTreeSpec, call_with
from daskinfer.errors import ModelError, OptionError
from daskinfer.models.loaded_model import LoadedModel
from daskinfer.models.loaders import ModelLoader
from daskinfer.models.serialization import ByValueFunction
from daskinfer.options import Options
from daskinfer.storage.formats import Target
from daskinfer.worker import bad_rows
from daskinfer.worker.backends import get_backend
from daskinfer.worker.batch_buffers import BatchBuffers
from daskinfer.worker.error_kinds import (
    BadRowsError,
    annotate_errors,
    blame_step,
    is_out_of_memory,
    is_sticky,
    note_preprocessed_dtypes,
)
from daskinfer.worker.output_checks import (
    check_output_spec,
    check_preprocessed_dtypes,
    check_row_counts,
    describe_row_specs,
    flatten_output,
    has_different_rows,
)
from daskinfer.worker.tensors import to_numpy

logger = logging.getLogger(__name__)

_NAN_MESSAGE = "the output contains NaN"
_AUTOCAST_DTYPES: Mapping[Any, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PLAIN_ARRAY_TYPES = (torch.Tensor, np.ndarray)  # but no subclass: its attributes may have side effects


@dataclass(frozen=True)
class ModelRunConfig:
    """What is the same for every chunk: the ports, the batch size, the options and the output spec.

    ``outputs`` holds one empty array (0, *shape) per output; None while the output spec is being inferred.
    """

    ports: Ports
    batch: BatchConfig
    options: Options = field(default_factory=Options)
    outputs: tuple[Array, ...] | None = None


@dataclass(frozen=True)
class RunSpec:
    """What is the same for every task of a call, and all of the call that travels.

    ``targets`` is empty if the outputs come back. It holds no client, graph or array of the caller's.
    """

    loader: ModelLoader
    run_config: ModelRunConfig
    targets: tuple[Target, ...] = ()

    def serialize(self) -> bytes:
        """Return the bytes that travel."""
        return bytes(cloudpickle.dumps(replace(self, run_config=make_portable(self.run_config))))


def make_portable(run_config: ModelRunConfig) -> ModelRunConfig:
    """Return the config with functions that reach workers which cannot import them, and without the rows of ``output=``."""
    before, after = run_config.options.preprocess, run_config.options.postprocess
    options = replace(
        run_config.options,
        preprocess=before and ByValueFunction(before),
        postprocess=after and ByValueFunction(after),
        output=None,
    )
    return replace(run_config, options=options)


@dataclass(frozen=True)
class ModelOutput:
    """A chunk's outputs, each (n, *shape), in the order of ``structure``, and the smallest batch size that was used.

    ``channels_last`` says whether images were in that memory format. ``failed_rows`` holds why a row of the chunk failed, by
    row; these rows hold the fill value. ``first_call_seconds`` of the time went into the model's first micro-batch in this
    process; 0 if it was not among these.
    """

    arrays: list[Array]
    structure: PyTreeSpec
    batch_size: int
    seconds: float
    channels_last: bool = False
    failed_rows: Mapping[int, str] = field(default_factory=dict)
    first_call_seconds: float = 0.0


def run_model(
    model: LoadedModel,
    rows: Sequence[Array | RemoteArray],
    start: int,
    run_config: ModelRunConfig,
    out: Sequence[Array] | None = None,
    *,
    alone: bool = True,
) -> ModelOutput:
    """Run the model on one chunk.

    Parameters
    ----------
    model
        The loaded model; its lock is held meanwhile.
    rows
        One array per port, (n, ...) each, n >= 1.
    start
        The chunk's first row, counted in the whole input.
    run_config
        What is the same for every chunk.
    out
        Where the output goes: one array (n, *shape) per output of the config. None: into new arrays.
    alone
        Whether nothing else is in flight on the device: if a single row then runs out of memory, the row itself is at fault.

    Raises
    ------
    ModelError
        If the output is not arrays with as many rows as the input.
    OptionError
        If the model cannot get the dtype of ``options.dtype``.
    ChunkError
        If the model fails or a single row does not fit into memory, and failing rows are not skipped.
    """
    with model.lock, annotate_errors(model.device, start, start + len(rows[0])):
        rows = [port if isinstance(port, RemoteArray) else to_numpy(port) for port in rows]
        began = time.perf_counter()
        shapes = tuple(port.shape[1:] for port in rows)
        planned_size = run_config.batch.get_batch_size(model.device.type)
        batch_size = min(planned_size, model.max_batch_sizes.get(shapes, planned_size))
        tentative = model.device.type in run_config.batch.channels_last and shapes not in model.contiguous_only_shapes
        format_failed = False
        while True:
            try:
                attempt = _ChunkRun(model, rows, start, batch_size, run_config, out, alone=alone, tentative=tentative)
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
                tentative, format_failed = False, True
        if format_failed and not attempt.failed_rows:  # the format was at fault, not a row
            logger.info("%s: the model fails in channels_last; continuing in torch's default memory format", model.device)
            model.contiguous_only_shapes.add(shapes)
        seconds = time.perf_counter() - began
        first_call = attempt.first_call_seconds
        return ModelOutput(arrays, structure, batch_size, seconds, attempt.channels_last, attempt.failed_rows, first_call)


def _halve_batch_size(model: LoadedModel, batch_size: int) -> int:
    """Return half of a batch size that did not fit into memory, after freeing what the attempt left."""
    smaller = batch_size // 2
    logger.warning("%s: out of memory at batch_size=%d; continuing with %d", model.device, batch_size, smaller)
    gc.collect()  # a model that catches the error itself leaves its tensors in a reference cycle of frames
    get_backend(model.device).empty_cache()
    return smaller


class _ChunkRun:
    """One attempt at a chunk, with one batch size and in one memory format.

    ``tentative``: in channels_last because it was measured to be faster; if this attempt fails, the chunk runs again in
    torch's default format before any row is blamed.
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
        alone: bool,
        tentative: bool,
    ) -> None:
        self.model, self.rows, self.start, self.batch_size, self.run_config = model, rows, start, batch_size, run_config
        self.out = out
        self.n_rows = len(rows[0])
        self.results: list[Array] = []
        self.structure: PyTreeSpec | None = None
        self.failed_rows: dict[int, str] = {}
        self.first_call_seconds = 0.0
        self._alone, self._tentative = alone, tentative
        self.channels_last = model.takes_tensors and (tentative or run_config.options.memory_format == "channels_last")
        self._buffers = BatchBuffers(model, run_config.options.get_cast_dtype, channels_last=self.channels_last)
        self._next_row = 0  # the first row that is not computed yet

    def run(self) -> tuple[list[Array], PyTreeSpec]:
        """Compute all micro-batches; return the chunk's outputs and their structure."""
        began = time.perf_counter()
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
            if not self.model.is_warm:
                self.model.is_warm, self.first_call_seconds = True, time.perf_counter() - began
            self._next_row = self._cell_end()
        if self.structure is None:  # every row failed
            self._allocate_results(self.run_config.outputs or ())
        if self.failed_rows:
            bad_rows.fill_rows(self.results, list(self.failed_rows), self.run_config.options.fill_value)
        return self.results, self.structure or PyTreeSpec("none")

    def _compute_rows(self, begin: int, end: int, exclude: Collection[int] = ()) -> None:
        """Compute rows begin:end of one micro-batch without those in ``exclude``, and store their output."""
        good = np.setdiff1d(np.arange(begin, end), list(exclude)) if exclude else None
        arrays, structure = self._compute_micro_batch(begin, end, good)
        arrays = self._cast_to_output_spec(arrays)
        bad = bad_rows.find_nan_rows(arrays) if self.run_config.options.nan_is_failure else []
        if bad and self.run_config.options.on_error == "raise":
            raise ValueError(_NAN_MESSAGE)
        self._store_output(arrays, structure, begin, end, good)
        if self.failed_rows:  # by an earlier attempt
            for row in range(begin, end) if good is None else good.tolist():
                self.failed_rows.pop(row, None)
        for row in bad:
            self.failed_rows[begin + row if good is None else int(good[row])] = _NAN_MESSAGE

    def _handle_failure(self, begin: int, end: int, error: Exception) -> None:
        """Raise an error that names the rows at fault, or skip them and continue."""
        options = self.run_config.options
        if options.on_error == "raise":
            raise BadRowsError(*bad_rows.find_first_failing_range(self._compute_rows, begin, end, self._is_fatal)) from error
        self.failed_rows |= bad_rows.isolate_bad_rows(
            self._compute_rows, self._probe_rows, begin, end, error, options.retries, self._is_fatal
        )

    def _probe_rows(self, begin: int, end: int) -> None:
        """Run rows only to see whether they fail: without padding, and without keeping the output.

        If the output has a wrong shape because there are fewer rows than in a micro-batch (a model that squeezes, for
        example), that is not the rows' fault.
        """
        try:
            self._compute_micro_batch(begin, end, padded=self.model.compiled)
        except (ModelError, OptionError) as error:
            raise bad_rows.ProbeOutputError from error

    def _is_fatal(self, error: Exception) -> bool:
        """Return whether no row is at fault: the output is unusable, memory ran out, or the device is broken."""
        out_of_memory = is_out_of_memory(error) and (self.batch_size > 1 or not self._alone)
        return out_of_memory or isinstance(error, ModelError | OptionError | UnreadableError) or is_sticky(error)

    def _cell_end(self) -> int:
        """Return where the next row's micro-batch in the global grid ends, or the chunk if that is earlier."""
        return min(self.n_rows, self._next_row + self.batch_size - (self.start + self._next_row) % self.batch_size)

    def _compute_micro_batch(
        self, begin: int, end: int, good_rows: Array | None = None, *, padded: bool = True
    ) -> tuple[list[Array], PyTreeSpec]:
        """Return the outputs of rows begin:end, or of ``good_rows`` among them, which keep their positions among zeros."""
        options, ports, arrays = self.run_config.options, self.run_config.ports, [port[begin:end] for port in self.rows]
        if good_rows is not None:
            arrays = [np.asarray(array)[good_rows - begin] for array in arrays]
        n_rows = len(arrays[0])
        if (preprocess := options.preprocess) is not None:
            # Copies, since a function that works in place would write into the caller's array.
            ports, arrays = _apply_preprocess(preprocess, ports.join([np.array(array) for array in arrays]))
            check_row_counts(ports.names, arrays, n_rows, "preprocess")
            if self.model.takes_tensors:
                check_preprocessed_dtypes(ports.names, arrays)
        size = n_rows
        positions: slice | Array = slice(0, n_rows)
        if options.pad and padded:
            size, offset = self.batch_size, (self.start + begin) % self.batch_size
            positions = slice(offset, offset + n_rows) if good_rows is None else good_rows - begin + offset
        batch = [
            self._buffers.make_batch(name, array, size, positions) for name, array in zip(ports.names, arrays, strict=True)
        ]
        with self._note_dtypes(ports.names, arrays):
            flat_output = self._call_model(ports.join(batch))
        outputs, structure = self._convert_output(flat_output, size)
        trimmed = [array[positions] for array in outputs]
        if options.postprocess is None:
            return trimmed, structure
        with blame_step("postprocess"):
            output = options.postprocess(structure.rebuild(trimmed))
        outputs, structure = flatten_output(output, "postprocess")
        check_row_counts(structure, outputs, n_rows, "postprocess")
        return [to_numpy(array) for array in outputs], structure

    def _can_use_fast_path(self) -> bool:
        """Return whether the next rows are a full micro-batch of a model that returns one array, with no work around it."""
        options = self.run_config.options
        return (
            self.structure == LEAF_SPEC
            and options.preprocess is options.postprocess is None
            and not options.nan_is_failure
            and self._cell_end() - self._next_row == self.batch_size
        )

    def _run_fast_path(self) -> None:
        """Compute the full micro-batches from here on like :meth:`_compute_rows`, but with the repeated work done once."""
        ports, size = self.run_config.ports, self.batch_size
        read_batch = self._buffers.make_batch_reader(ports.names, self.rows, size)
        with self._inference_context():
            for begin in range(self._next_row, self.n_rows - size + 1, size):
                self._next_row = begin
                self._store_whole_batch(call_with(self.model.run, ports.join(read_batch(begin))))

    def _store_whole_batch(self, output: Any) -> None:
        """Store the output of a full micro-batch; a method of its own, so that it is freed before the next is computed."""
        begin, size, (result,) = self._next_row, self.batch_size, self.results
        is_expected = type(output) in _PLAIN_ARRAY_TYPES and output.shape == (size, *result.shape[1:])
        if is_expected and (array := to_numpy(output)).dtype == result.dtype:
            result[begin : begin + size] = array
        else:  # another float dtype under autocast, or another output than before, which raises there
            arrays, structure = self._convert_output(flatten_output(output, "the model"), size)
            self._store_output(self._cast_to_output_spec(arrays), structure, begin, begin + size, None)

    @contextlib.contextmanager
    def _note_dtypes(self, names: Sequence[str], arrays: Sequence[Any]) -> Iterator[None]:
        """Note on the model's error if ``preprocess`` returned floats of another dtype than the model's."""
        options = self.run_config.options
        try:
            yield
        except Exception as error:
            if options.preprocess is not None:
                given = zip(names, arrays, strict=True)
                dtypes = [options.get_cast_dtype(name) or array.dtype.name for name, array in given]
                note_preprocessed_dtypes(error, dtypes, get_model_dtypes(self.model.run))
            raise

    def _call_model(self, batch: Any) -> tuple[list[Any], PyTreeSpec]:
        with self._inference_context():
            return flatten_output(call_with(self.model.run, batch), "the model")

    @contextlib.contextmanager
    def _inference_context(self) -> Iterator[None]:
        """Enter what models run in; functions on ndarrays run as they are."""
        if not self.model.takes_tensors:
            yield
            return
        with torch.inference_mode(), make_autocast_context(self.run_config.options, self.model.device.type):
            yield

    def _convert_output(self, flat_output: tuple[list[Any], PyTreeSpec], size: int) -> tuple[list[Array], PyTreeSpec]:
        """Return the model's output for ``size`` rows as ndarrays, after checking their row counts."""
        outputs, structure = flat_output
        check_row_counts(structure, outputs, size, "the model")
        return [to_numpy(array) for array in outputs], structure

    def _cast_to_output_spec(self, arrays: list[Array]) -> list[Array]:
        """Cast to the planned float dtypes: under autocast the dtype of an output differs from device to device."""
        planned = self.run_config.outputs
        if self.run_config.options.autocast is None or planned is None or len(planned) != len(arrays):
            return arrays
        return [
            a.astype(p.dtype, copy=False) if a.dtype.kind == p.dtype.kind == "f" else a
            for a, p in zip(arrays, planned, strict=True)
        ]

    def _store_output(
        self, arrays: list[Array], structure: PyTreeSpec, begin: int, end: int, good_rows: Array | None
    ) -> None:
        """Copy a micro-batch's output into the chunk's: it may be a view of the buffer that the next one overwrites."""
        if self.structure is None:
            self.structure = structure
            templates = [np.empty((0, *array.shape[1:]), array.dtype) for array in arrays]
            check_output_spec(structure, templates, self.run_config.options.output, self.run_config.outputs)
            self._allocate_results(templates)
        if structure != self.structure or any(map(has_different_rows, arrays, self.results)):
            raise ModelError(
                f"rows {self.start + begin}:{self.start + end} returned {describe_row_specs(arrays)} "
                f"({', '.join(structure.names)}), earlier rows {describe_row_specs(self.results)} "
                f"({', '.join(self.structure.names)}). All rows must return the same shape and dtype; pad or reduce them in "
                "postprocess."
            )
        for result, array in zip(self.results, arrays, strict=True):
            result[slice(begin, end) if good_rows is None else good_rows] = array

    def _allocate_results(self, templates: Sequence[Array]) -> None:
        self.results = list(self.out or (np.empty((self.n_rows, *one.shape[1:]), one.dtype) for one in templates))


def _apply_preprocess(preprocess: Callable[..., Any], value: Any) -> tuple[Ports, list[Any]]:
    """Call ``preprocess`` on a micro-batch; return the ports and arrays that the model gets."""
    with blame_step("preprocess"):
        value = call_with(preprocess, value)
        ports = Ports.from_input(value)
        arrays = [to_numpy(array) for array in ports.split(value)]
    if not ports.names:
        raise ModelError("preprocess returned no array; it must return what the model takes, with one entry per row.")
    return ports, arrays


def get_model_dtypes(model: Any) -> list[str]:
    """Return the names of the float dtypes of a module's parameters, sorted; none for anything else."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    return sorted({str(p.dtype).removeprefix("torch.") for p in parameters if p.is_floating_point()})


def make_autocast_context(options: Options, device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast context of ``options``; one that does nothing if they have none."""
    if options.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=_AUTOCAST_DTYPES[options.autocast])
