"""Infer what a model's output looks like, in the client, before any task runs and without reading a row.

The first step that applies decides:

1. ``output=`` states it.
2. Weights above ``FAKE_TENSOR_MIN_NBYTES``, and neither pre- nor postprocessing: fake tensors, which compute shapes only.
   Used only if the input's dtypes are the model's own, since fake tensors accept mixed dtypes that real ones reject.
3. A run on two rows of zeros, with a copy of the model on the CPU, through the same code that computes the chunks.
4. An error that names ``output=``.

Fake tensors come before the run only for large models: the first fake tensor of a process costs 1.1 s of imports, two real
rows of a small CNN 0.01 s (measured on 2 cores).

Two rows, not one: this exposes a model that drops the row axis, or one that was exported for a single row.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from daskinfer.core.arrays import Array
from daskinfer.core.chunks import BatchConfig
from daskinfer.core.pytree import Ports, PyTreeSpec, call_with, flatten
from daskinfer.errors import ChunkError, ModelError, OptionError
from daskinfer.models.loaded_model import LoadedModel
from daskinfer.models.loaders import ModelLoader
from daskinfer.options import Options
from daskinfer.planning.inputs import Form
from daskinfer.planning.trial_advice import FailedTrial, check_axes, check_dtypes
from daskinfer.scheduling.throughput_history import MAX_RECORDS
from daskinfer.worker.error_kinds import describe_error, get_step_note
from daskinfer.worker.model_runner import ModelRunConfig, get_model_dtypes, make_autocast_context, run_model
from daskinfer.worker.tensors import tensor_to_numpy

logger = logging.getLogger(__name__)

FAKE_TENSOR_MIN_NBYTES = 256 << 20  # of weights; arbitrary: a run of such a model takes some seconds on a CPU
N_DUMMY_ROWS = 2


@dataclass(frozen=True)
class OutputSpec:
    """What a model's output looks like: one empty array (0, *shape) per output, and the structure that holds them."""

    structure: PyTreeSpec
    outputs: tuple[Array, ...]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row of all outputs."""
        return sum(int(np.prod(o.shape[1:])) * o.dtype.itemsize for o in self.outputs)


class OutputSpecCache:
    """Keeps the output specs that were used last, by history key (``planning.job.make_history_key``).

    It holds as many as the throughput history has records. Note: threads share it. The lock guards the table and is not held
    while a spec is inferred, since that runs the model.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._specs: OrderedDict[Hashable, OutputSpec] = OrderedDict()

    def get_or_infer(self, key: Hashable, infer: Callable[[], OutputSpec]) -> OutputSpec:
        """Return the spec for ``key``; infer and keep it if it is not known yet.

        Examples
        --------
        >>> cache, spec = OutputSpecCache(), OutputSpec(flatten(np.empty((0, 2)))[1], (np.empty((0, 2)),))
        >>> [cache.get_or_infer("model", infer).row_nbytes for infer in (lambda: spec, lambda: 1 / 0)]
        [16, 16]
        """
        with self._lock:
            spec = self._specs.get(key)
        spec = spec or infer()
        with self._lock:
            self._specs[key] = spec
            self._specs.move_to_end(key)
            if len(self._specs) > MAX_RECORDS:
                self._specs.popitem(last=False)
        return spec

    def clear(self) -> None:
        """Forget all specs."""
        with self._lock:
            self._specs.clear()


output_specs = OutputSpecCache()


def infer_output_spec(
    loader: ModelLoader, ports: Ports, empty_arrays: Sequence[Array], options: Options, forms: Sequence[Form] = ()
) -> OutputSpec:
    """Infer what the model's output looks like.

    Parameters
    ----------
    loader
        Loads the model.
    ports, empty_arrays
        The input's form, and one array per port whose ``shape[1:]`` and dtype are the input's (rows are not read).
    options
        How the model is run.
    forms
        What the user passed for each port, for errors that say how to change it. Empty: arrays.

    Raises
    ------
    InputError
        If the model rejects the input's dtype but accepts its own, or takes the input with its axes in another order.
    OptionError
        If ``dtype=`` names a port that does not exist, or a dtype that cannot be passed to the model.
    ModelError
        If the output is not made of arrays with one entry per row, or cannot be inferred.
    """
    _check_ports(ports, options)
    if options.output is not None:
        logger.debug("output spec taken from output=")
        return _parse_output_option(options.output)
    model = loader.load(torch.device("cpu"))
    try:
        return _infer_from_model(
            model,
            ports,
            empty_arrays,
            options,
            forms,
            use_fake_tensors=_should_use_fake_tensors(loader, model, ports, empty_arrays, options),
        )
    finally:
        model.close()


def _parse_output_option(output: Any) -> OutputSpec:
    """Return the spec that ``output=`` states; its rows are dropped."""
    try:
        arrays, structure = flatten(output)
    except TypeError as error:
        raise ModelError(
            f"output= must hold arrays in the structure of the model's output, got a {error}. "
            "Pass for example output=np.empty((0, 10), 'float32')."
        ) from None
    if any(len(array.shape) == 0 for array in arrays) or not arrays:
        raise ModelError(
            "output= must hold at least one array, each with rows as its first axis. "
            "Pass for example output=np.empty((0, 10), 'float32')."
        )
    return OutputSpec(structure, tuple(np.empty((0, *array.shape[1:]), _get_numpy_dtype(array.dtype)) for array in arrays))


def _get_numpy_dtype(dtype: Any) -> np.dtype[Any]:
    return tensor_to_numpy(torch.empty(0, dtype=dtype)).dtype if isinstance(dtype, torch.dtype) else np.dtype(dtype)


def _should_use_fake_tensors(
    loader: ModelLoader, model: LoadedModel, ports: Ports, empty_arrays: Sequence[Array], options: Options
) -> bool:
    module, has_steps = model.run, options.preprocess is not None or options.postprocess is not None
    if has_steps or not isinstance(module, torch.nn.Module) or loader.nbytes <= FAKE_TENSOR_MIN_NBYTES:
        return False
    dtypes = [options.get_cast_dtype(name) or port.dtype.name for name, port in zip(ports.names, empty_arrays, strict=True)]
    has_embedding = any(isinstance(layer, torch.nn.Embedding | torch.nn.EmbeddingBag) for layer in module.modules())
    return {*dtypes} <= {*get_model_dtypes(module), *(("int32", "int64") if has_embedding else ())}


def _infer_from_model(
    model: LoadedModel,
    ports: Ports,
    empty_arrays: Sequence[Array],
    options: Options,
    forms: Sequence[Form],
    *,
    use_fake_tensors: bool,
) -> OutputSpec:
    if use_fake_tensors:
        try:
            return _infer_from_fake_tensors(model, ports, empty_arrays, options)
        except Exception as error:
            logger.debug("fake tensors failed (%s); running the model on %d rows of zeros instead", error, N_DUMMY_ROWS)
    try:
        return _infer_from_zeros(model, ports, empty_arrays, options)
    except ChunkError as error:
        cause = error.__cause__ or error  # what the model, or a function around it, raised
    if not get_step_note(cause)[0]:
        attempt = partial(_infer_from_zeros, model, ports, empty_arrays)
        trial = FailedTrial(model, ports, empty_arrays, options, forms, attempt)
        check_dtypes(trial)
        check_axes(trial)
    raise _make_trial_error(cause, ports, empty_arrays) from cause


def _make_trial_error(error: BaseException, ports: Ports, empty_arrays: Sequence[Array]) -> ModelError:
    """Make the error for a failed trial: it names the step that failed, and what to pass if real rows would not."""
    specs = [f"{n}: {(N_DUMMY_ROWS, *a.shape[1:])} {a.dtype}" for n, a in zip(ports.names, empty_arrays, strict=True)]
    subject, advice = get_step_note(error)
    rows = f"{N_DUMMY_ROWS} rows of zeros ({', '.join(specs)})"
    if subject and advice:
        return ModelError(f"{describe_error(error)}. It was tried on {rows}.")
    failure = f"the model failed on {rows}, from which its output is inferred: {error!r}{advice}"
    if subject:
        failure = f"{describe_error(error)}, on {rows}"
    return ModelError(f"{failure}. If it works on real rows, pass output=np.empty((0, …), dtype).")


def _infer_from_zeros(model: LoadedModel, ports: Ports, empty_arrays: Sequence[Array], options: Options) -> OutputSpec:
    dummy_rows = [np.zeros((N_DUMMY_ROWS, *port.shape[1:]), port.dtype) for port in empty_arrays]
    options = replace(options, on_error="raise", nan_is_failure=False)  # the failure options are for the user's rows
    try:
        output = run_model(model, dummy_rows, 0, ModelRunConfig(ports, BatchConfig(N_DUMMY_ROWS), options))
    except (ModelError, OptionError) as error:
        raise error.__cause__ or error from None  # without the rows and the device, which are not the caller's
    return OutputSpec(output.structure, tuple(array[:0] for array in output.arrays))


def _infer_from_fake_tensors(
    model: LoadedModel, ports: Ports, empty_arrays: Sequence[Array], options: Options
) -> OutputSpec:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(), make_autocast_context(options, "cpu"):
        tensors = [
            torch.empty(
                (N_DUMMY_ROWS, *port.shape[1:]), dtype=_get_torch_dtype(options.get_cast_dtype(name) or port.dtype.name)
            )
            for name, port in zip(ports.names, empty_arrays, strict=True)
        ]
        arrays, structure = flatten(call_with(model.run, ports.join(tensors)))
    if not arrays or any(len(array.shape) == 0 or array.shape[0] != N_DUMMY_ROWS for array in arrays):
        raise ValueError("output does not have one entry per row")  # the run on real tensors then raises the full message
    return OutputSpec(structure, tuple(np.empty((0, *map(int, a.shape[1:])), _get_numpy_dtype(a.dtype)) for a in arrays))


def _get_torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _check_ports(ports: Ports, options: Options) -> None:
    if not isinstance(options.dtype, Mapping) or options.preprocess is not None:  # preprocess may return other ports
        return
    if unknown := [name for name in options.dtype if name not in ports.names]:
        raise OptionError(
            f"dtype names unknown port {', '.join(map(repr, unknown))}; the input has {', '.join(map(repr, ports.names))}"
        )


def check_fill_value(options: Options, output_spec: OutputSpec) -> None:
    """Check that every output can hold the fill value, if failed rows are skipped.

    Raises
    ------
    OptionError
        If an output's dtype cannot hold it.
    """
    if options.on_error == "raise":
        return
    for name, output in zip(output_spec.structure.names, output_spec.outputs, strict=True):
        if not _can_hold(output.dtype, options.fill_value):
            value = "NaN" if options.fill_value is None else repr(options.fill_value)
            raise OptionError(
                f"fill_value must fit the dtype {output.dtype} of output {name}, got {value}. "
                "Pass for example fill_value=0 (--fill-value 0)."
            )


def _can_hold(dtype: np.dtype[Any], value: float | None) -> bool:
    if dtype.kind in "fc":
        return True
    if value is None or not np.isfinite(value):
        return False
    if dtype.kind == "b":
        return value in (0, 1)
    return value == int(value) and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max
