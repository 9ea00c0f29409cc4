"""What a network's answer looks like, found out on the client before any task runs and without reading any row.

A ladder, first match wins:

1. ``output=`` says it.
2. Weights above ``FAKE_TENSOR_MIN_NBYTES``, no pre- or postprocessing: fake tensors, which compute shapes only.
   Only where the input's dtypes are the network's own: fake tensors compute where real ones refuse to mix.
3. A run of two made-up rows (zeros) on a copy on the CPU, through the same code that runs the chunks.
4. An error that names ``output=``.

Fake tensors come before the run only for large networks: the first fake tensor of a process costs 1.1 s of imports, two
real rows of a small CNN 0.01 s (measured on 2 cores).

Two rows, not one, since a network that drops the rows' axis, or one exported for a single row, then shows itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch

from daskinfer.core.arrays import Array, tensor_to_numpy
from daskinfer.core.pytree import Ports, PyTreeSpec, call_with, flatten
from daskinfer.errors import ChunkError, InputError, ModelError, OptionError
from daskinfer.models.model import ModelLoader
from daskinfer.options import Options
from daskinfer.worker.loaded import LoadedModel
from daskinfer.worker.model_runner import ModelRunConfig, make_autocast_context, run_model

logger = logging.getLogger(__name__)

FAKE_TENSOR_MIN_NBYTES = 256 << 20  # of weights; arbitrary: some seconds of real work on a CPU
N_DUMMY_ROWS = 2


@dataclass(frozen=True)
class OutputSpec:
    """What every answer will look like: one empty array (0, *shape) per output, and the structure they stand in."""

    structure: PyTreeSpec
    outputs: tuple[Array, ...]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row of all outputs."""
        return sum(int(np.prod(o.shape[1:])) * o.dtype.itemsize for o in self.outputs)


def infer_output_spec(loader: ModelLoader, ports: Ports, empty_arrays: Sequence[Array], options: Options) -> OutputSpec:
    """Find out what the answer looks like.

    Parameters
    ----------
    recipe
        How to load the network.
    ports, rows
        The input's form, and one array per port whose ``shape[1:]`` and dtype are the input's (rows are not read).
    options
        How the network is run.

    Raises
    ------
    InputError
        Where the network does not take the input's dtype but would take its own.
    OptionError
        Where ``dtype=`` names a port that there is not, or a dtype that the network cannot be given.
    ModelError
        Where the answer is not arrays of one entry per row, or cannot be found out.
    """
    _check_ports(ports, options)
    if options.output is not None:
        logger.debug("the answer's shape is given by output=")
        return _parse_output_option(options.output)
    model = loader.load(torch.device("cpu"))
    try:
        return _infer_from_model(
            model,
            ports,
            empty_arrays,
            options,
            use_fake_tensors=_should_use_fake_tensors(loader, model, ports, empty_arrays, options),
        )
    finally:
        model.close()


def _parse_output_option(output: Any) -> OutputSpec:
    """What ``output=`` says, without its rows."""
    try:
        arrays, structure = flatten(output)
    except TypeError as error:
        raise ModelError(
            f"output= holds a {error}; it may hold arrays of any number of rows, in the structure of the model's answer. "
            "Pass something like np.empty((0, 10), 'float32')."
        ) from None
    if any(len(array.shape) == 0 for array in arrays) or not arrays:
        raise ModelError(
            "output= holds an array without axes, or none; its first axis is the rows'. "
            "Pass something like np.empty((0, 10), 'float32')."
        )
    return OutputSpec(structure, tuple(np.empty((0, *array.shape[1:]), _get_numpy_dtype(array.dtype)) for array in arrays))


def _get_numpy_dtype(dtype: Any) -> np.dtype[Any]:
    return tensor_to_numpy(torch.empty(0, dtype=dtype)).dtype if isinstance(dtype, torch.dtype) else np.dtype(dtype)


def _should_use_fake_tensors(
    loader: ModelLoader, model: LoadedModel, ports: Ports, empty_arrays: Sequence[Array], options: Options
) -> bool:
    net, plain = model.run, options.preprocess is None and options.postprocess is None
    if not plain or not isinstance(net, torch.nn.Module) or loader.nbytes <= FAKE_TENSOR_MIN_NBYTES:
        return False
    dtypes = [options.get_cast_dtype(name) or port.dtype.name for name, port in zip(ports.names, empty_arrays, strict=True)]
    indexed = any(isinstance(part, torch.nn.Embedding | torch.nn.EmbeddingBag) for part in net.modules())
    return {*dtypes} <= {*_get_model_dtypes(net), *(("int32", "int64") if indexed else ())}


def _get_model_dtypes(module: torch.nn.Module) -> list[str]:
    return sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()})


def _infer_from_model(
    model: LoadedModel, ports: Ports, empty_arrays: Sequence[Array], options: Options, *, use_fake_tensors: bool
) -> OutputSpec:
    if use_fake_tensors:
        try:
            return _infer_from_fake_tensors(model, ports, empty_arrays, options)
        except Exception as error:
            logger.debug("fake tensors do not do for this network (%s); two rows are run", error)
    try:
        return _infer_from_zeros(model, ports, empty_arrays, options)
    except ChunkError as error:
        _check_input_dtype(model, ports, empty_arrays, options)
        made_up = ", ".join(
            f"{n}: {(N_DUMMY_ROWS, *r.shape[1:])} {r.dtype}" for n, r in zip(ports.names, empty_arrays, strict=True)
        )
        raise ModelError(
            f"the model failed on {N_DUMMY_ROWS} made-up rows of zeros ({made_up}): {error.__cause__!r}; what its answer looks "
            "like has to be known before it runs. If it is right with your rows, pass output=np.empty((0, …), dtype)."
        ) from error.__cause__


def _infer_from_zeros(model: LoadedModel, ports: Ports, empty_arrays: Sequence[Array], options: Options) -> OutputSpec:
    made_up = [np.zeros((N_DUMMY_ROWS, *port.shape[1:]), port.dtype) for port in empty_arrays]
    options = replace(options, on_error="raise", nan_is_failure=False)  # made-up rows are nobody's
    answer = run_model(model, made_up, 0, ModelRunConfig(ports, N_DUMMY_ROWS, options))
    return OutputSpec(answer.structure, tuple(array[:0] for array in answer.arrays))


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
        raise ValueError("its answer has not one entry per row")  # the real run then says it in full
    return OutputSpec(structure, tuple(np.empty((0, *map(int, a.shape[1:])), _get_numpy_dtype(a.dtype)) for a in arrays))


def _get_torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _check_ports(ports: Ports, options: Options) -> None:
    if not isinstance(options.dtype, Mapping) or options.preprocess is not None:  # preprocess may make ports of its own
        return
    if unknown := [name for name in options.dtype if name not in ports.names]:
        raise OptionError(
            f"dtype names the port {', '.join(map(repr, unknown))}; the input's are {', '.join(map(repr, ports.names))}. "
            "Name one of these."
        )


def _check_input_dtype(model: LoadedModel, ports: Ports, empty_arrays: Sequence[Array], options: Options) -> None:
    """Where the network runs once the input has its own dtype, say that this is what to change."""
    if not isinstance(model.run, torch.nn.Module) or options.dtype is not None:
        return
    for own in _get_model_dtypes(model.run):
        for dtype in _iter_casts(own, ports, empty_arrays):
            try:
                _infer_from_zeros(model, ports, empty_arrays, replace(options, dtype=dtype))
            except ChunkError:
                continue
            given = ", ".join(f"{name} is {port.dtype}" for name, port in zip(ports.names, empty_arrays, strict=True))
            raise InputError(f"{given}, the net is {own}: pass dtype={dtype!r} (--dtype)") from None


def _iter_casts(model_dtype: str, ports: Ports, empty_arrays: Sequence[Array]) -> Iterator[str | dict[str, str]]:
    """Ways to cast the input to ``own``: all ports, then those of fewer and fewer dtypes; a complex one would lose half."""
    given = {name: port.dtype for name, port in zip(ports.names, empty_arrays, strict=True)}
    castable = {dtype for dtype in given.values() if dtype.kind != "c" and dtype.name != model_dtype}
    for n in range(len(castable), 0, -1):
        for dtypes in combinations(sorted(castable, key=str), n):
            names = [name for name, dtype in given.items() if dtype in dtypes]
            yield model_dtype if len(names) == len(given) else dict.fromkeys(names, model_dtype)


def check_fill_value(options: Options, output_spec: OutputSpec) -> None:
    """See that every output can hold what stands where rows failed.

    Raises
    ------
    OptionError
        Where one cannot, and rows that fail are to be skipped.
    """
    if options.on_error == "raise":
        return
    for name, output in zip(output_spec.structure.names, output_spec.outputs, strict=True):
        if not _can_hold(output.dtype, options.fill_value):
            value = "NaN" if options.fill_value is None else repr(options.fill_value)
            raise OptionError(
                f"the output {name} is {output.dtype}, which cannot hold {value} where rows fail; fill_value has to be one "
                "of its numbers. Pass fill_value=0 (--fill-value), for example."
            )


def _can_hold(dtype: np.dtype[Any], value: float | None) -> bool:
    if dtype.kind in "fc":
        return True
    if value is None or not np.isfinite(value):
        return False
    if dtype.kind == "b":
        return value in (0, 1)
    return value == int(value) and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max
