"""What to change in an input if the model failed on rows of zeros: its dtype, or the order of its axes.

Every change is tried on the model before it is proposed, so the code in a message, typed in, works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

from daskinfer.core.arrays import Array
from daskinfer.core.pytree import Ports, call_with
from daskinfer.errors import DaskInferError, InputError
from daskinfer.models.loaded_model import LoadedModel
from daskinfer.options import Options
from daskinfer.planning.inputs import Form
from daskinfer.worker.model_runner import get_model_dtypes
from daskinfer.worker.tensors import to_numpy

# Layers whose input must have a certain size: the attribute that holds it, what it counts, and the axis, 1 or the last.
_SIZED_LAYERS: Mapping[type[nn.Module], tuple[str, str, int]] = {
    nn.Conv1d: ("in_channels", "channels", 1),
    nn.Conv2d: ("in_channels", "channels", 1),
    nn.Conv3d: ("in_channels", "channels", 1),
    nn.BatchNorm1d: ("num_features", "channels", 1),
    nn.BatchNorm2d: ("num_features", "channels", 1),
    nn.BatchNorm3d: ("num_features", "channels", 1),
    nn.GroupNorm: ("num_channels", "channels", 1),
    nn.Linear: ("in_features", "features", -1),
}


@dataclass(frozen=True)
class FailedTrial:
    """A model that failed on rows of zeros, and ``attempt``, which tries it again with other options.

    ``forms`` says what the user passed for each port; empty: arrays.
    """

    model: LoadedModel
    ports: Ports
    empty_arrays: Sequence[Array]
    options: Options
    forms: Sequence[Form]
    attempt: Callable[[Options], object]

    def works(self, options: Options) -> bool:
        """Return whether the model runs with these options."""
        try:
            self.attempt(options)
        except DaskInferError:
            return False
        return True

    def make_model_input(self) -> tuple[Ports, list[Any], list[Form]]:
        """Make the rows of zeros that the model gets, after ``preprocess``; with the form that each port has."""
        zeros = [np.zeros((2, *port.shape[1:]), port.dtype) for port in self.empty_arrays]
        if self.options.preprocess is None:
            return self.ports, zeros, [*self.forms] or ["array"] * len(zeros)
        value = call_with(self.options.preprocess, self.ports.join(zeros))
        ports = Ports.from_input(value)
        arrays = ports.split(value)
        return ports, list(map(to_numpy, arrays)), ["tensor" if isinstance(a, torch.Tensor) else "array" for a in arrays]


def check_dtypes(trial: FailedTrial) -> None:
    """Refuse an input whose dtype is at fault: the model runs if it is cast to the model's own.

    Raises
    ------
    InputError
        With the ``dtype=`` to pass.
    """
    if not isinstance(trial.model.run, nn.Module) or trial.options.dtype is not None:
        return
    ports, arrays, _ = trial.make_model_input()
    for model_dtype in get_model_dtypes(trial.model.run):
        for dtype in _iter_casts(model_dtype, ports, arrays):
            if not trial.works(replace(trial.options, dtype=dtype)):
                continue
            dtypes = [(name, str(array.dtype)) for name, array in zip(ports.names, arrays, strict=True)]
            if trial.options.preprocess is None:
                given = ", ".join(f"{name} is {dtype}" for name, dtype in dtypes)
                raise InputError(f"{given}, but the model is {model_dtype}. Pass dtype={dtype!r} (--dtype).")
            returned = ", ".join(f"{name} as {dtype}" if len(dtypes) > 1 else dtype for name, dtype in dtypes)
            raise InputError(
                f"preprocess returned {returned}, but the model is {model_dtype}. Return {model_dtype} from it, or pass "
                f"dtype={dtype!r} (--dtype)."
            )


def _iter_casts(model_dtype: str, ports: Ports, arrays: Sequence[Array]) -> Iterator[str | dict[str, str]]:
    """Yield values of ``dtype=`` that cast ports to the model's dtype: all ports first, then those of fewer dtypes.

    Complex ports are never cast, since they would lose their imaginary part.
    """
    port_dtypes = {name: port.dtype for name, port in zip(ports.names, arrays, strict=True)}
    castable = {dtype for dtype in port_dtypes.values() if dtype.kind != "c" and dtype.name != model_dtype}
    for n in range(len(castable), 0, -1):
        for dtypes in combinations(sorted(castable, key=str), n):
            names = [name for name, dtype in port_dtypes.items() if dtype in dtypes]
            yield model_dtype if len(names) == len(port_dtypes) else dict.fromkeys(names, model_dtype)


@dataclass(frozen=True)
class _Mismatch:
    """The first layer that got another size than it takes: the shape it got, and on which axis it takes how many."""

    shape: tuple[int, ...]
    axis: int
    wanted: int
    unit: str
    has_axis: bool  # False: the input has no axis of channels at all

    def describe(self, name: str) -> str:
        """Say what does not fit, of the input of this name."""
        found = f"axis {self.axis} of {name} is {self.shape[self.axis]}"
        wanted = f"{self.wanted} {self.unit if self.wanted > 1 else self.unit.removesuffix('s')}"
        return f"{found if self.has_axis else f'{name} has no axis of channels'}, the first layer takes {wanted}"


@dataclass(frozen=True)
class _Change:
    """A change of an array, as code on an array and on a tensor of that name, and as a function."""

    on_array: str
    on_tensor: str
    apply: Callable[[Array], Array]


def check_axes(trial: FailedTrial) -> None:
    """Refuse an input whose axes are at fault: the model runs if they are in another order.

    Raises
    ------
    InputError
        With the change to make.
    """
    mismatch = _find_mismatch(trial)
    if mismatch is None:
        return
    ports, arrays, forms = trial.make_model_input()
    for i, array in enumerate(arrays):
        for change in _iter_changes(mismatch) if array.shape == mismatch.shape else ():
            if _works_with(trial, change, ports, arrays, i):
                cure = _format_change(change, ports, i, forms[i], array.dtype)
                name = ports.names[i]
                if trial.options.preprocess is not None:
                    name, cure = f"{name} from preprocess", f"to return {cure}"
                raise InputError(f"{mismatch.describe(name)}: did you mean {cure}?")


def _find_mismatch(trial: FailedTrial) -> _Mismatch | None:
    """Run the model once more; return the first layer that gets another size than it takes, None if all get theirs."""
    if not isinstance(trial.model.run, nn.Module):
        return None
    found: list[_Mismatch] = []

    def check_size(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor) and (mismatch := _compare_sizes(layer, tuple(args[0].shape))):
            found.append(mismatch)

    with ExitStack() as hooks:
        for layer in trial.model.run.modules():
            if isinstance(layer, tuple(_SIZED_LAYERS)):
                hooks.callback(layer.register_forward_pre_hook(check_size).remove)
        trial.works(trial.options)
    return found[0] if found else None


def _compare_sizes(layer: nn.Module, shape: tuple[int, ...]) -> _Mismatch | None:
    attribute, unit, axis = next(size for kind, size in _SIZED_LAYERS.items() if isinstance(layer, kind))
    wanted, axis = int(getattr(layer, attribute)), axis % max(len(shape), 1)
    kernel = getattr(layer, "kernel_size", None)
    has_axis = kernel is None or len(shape) != 1 + len(kernel)  # torch takes such rows for the channels of one image
    if not wanted or axis >= len(shape) or (has_axis and shape[axis] == wanted):
        return None
    return _Mismatch(shape, axis, wanted, unit, has_axis)


def _iter_changes(mismatch: _Mismatch) -> Iterator[_Change]:
    """Yield changes that give the layer the size that it takes, the likeliest first."""
    shape, axis, wanted = mismatch.shape, mismatch.axis, mismatch.wanted
    if not mismatch.has_axis:
        if wanted == 1:
            yield _Change("{}[:, None]", "{}[:, None]", lambda a: a[:, None])
        return
    for other in range(len(shape) - 1, 0, -1):
        if shape[other] == wanted:
            order = [*range(len(shape))]
            order.insert(axis, order.pop(other))
            text = ", ".join(map(str, order))
            yield _Change(f"{{}}.transpose({text})", f"{{}}.permute({text})", partial(np.transpose, axes=order))
    if mismatch.unit == "features" and prod(shape[1:]) == wanted:
        code = "{0}.reshape(len({0}), -1)"
        yield _Change(code, code, lambda a: a.reshape(len(a), -1))


def _works_with(trial: FailedTrial, change: _Change, ports: Ports, arrays: Sequence[Array], i: int) -> bool:
    """Return whether the model runs if port ``i`` is changed, in its own dtype or cast to the model's."""

    def preprocess(*args: Any, **kwargs: Any) -> Any:
        value = trial.ports.join([*args, *kwargs.values()])
        value = value if trial.options.preprocess is None else call_with(trial.options.preprocess, value)
        changed = list(map(to_numpy, ports.split(value)))
        changed[i] = change.apply(changed[i])
        return ports.join(changed)

    options = replace(trial.options, preprocess=preprocess)
    if trial.works(options) or options.dtype is not None:
        return trial.works(options)
    casts = (cast for dtype in get_model_dtypes(trial.model.run) for cast in _iter_casts(dtype, ports, arrays))
    return any(trial.works(replace(options, dtype=cast)) for cast in casts)


def _format_change(change: _Change, ports: Ports, i: int, form: Form, dtype: np.dtype[Any]) -> str:
    """Return the code of a change: an expression, or for rows that are in a file the ``preprocess=`` to pass.

    The command has no flag for a function, but its factory may return any model.
    """
    name = ports.names[i]
    if form == "tensor":
        return change.on_tensor.format(name)
    if form != "path":
        return change.on_array.format(name if form == "array" else f'np.asarray({name}, "{dtype}")')
    return f"preprocess={_format_preprocess(change.on_array, ports, i)} (for the command, a factory whose model does so)"


def _format_preprocess(code: str, ports: Ports, i: int) -> str:
    """Return a function that changes port ``i`` and leaves the others as they are."""
    if ports.kind == "single":
        return f"lambda a: {code.format('a')}"
    arguments = list(ports.names) if ports.kind == "named" else [f"a{k}" for k in range(len(ports.names))]
    changed = [code.format(a) if k == i else a for k, a in enumerate(arguments)]
    returned = f"({', '.join(changed)})" if len(changed) > 1 else f"({changed[0]},)"
    if ports.kind == "named":
        returned = f"dict({', '.join(f'{n}={one}' for n, one in zip(arguments, changed, strict=True))})"
    return f"lambda {', '.join(arguments)}: {returned}"
