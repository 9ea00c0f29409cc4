"""One chunk through one model: the grid, the caller's data, ports, outputs, and errors."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from daskinfer.core.chunks import BatchConfig
from daskinfer.core.pytree import Ports
from daskinfer.errors import ChunkError, ModelError, PlanError
from daskinfer.models.loaded_model import LoadedModel
from daskinfer.options import Options
from daskinfer.worker.model_runner import ModelOutput, ModelRunConfig, run_model

CPU = torch.device("cpu")
X = np.random.default_rng(0).normal(size=(10, 3)).astype("float32")


def load(module: Any) -> LoadedModel:
    """Load the module itself, not a copy, so that a test sees what it got."""
    return LoadedModel.from_model(module, CPU)


def run(model: Any, x: Any, *, batch_size: int = 4, start: int = 0, outputs: Any = None, **fields: Any) -> ModelOutput:
    """Run one chunk through a model."""
    model = model if isinstance(model, LoadedModel) else load(model)
    ports = Ports.from_input(x)
    return run_model(
        model, ports.split(x), start, ModelRunConfig(ports, BatchConfig(batch_size), Options(**fields), outputs)
    )


def result(model: Any, x: Any, **keywords: Any) -> Any:
    """Do the same, and return the output in the model's structure."""
    output = run(model, x, **keywords)
    return output.structure.rebuild(output.arrays)


class Recorder(nn.Module):
    """A model that keeps a copy of every batch, and returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.clone())
        return x


class Do(nn.Module):
    """A module of one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


# The grid


@given(n=st.integers(1, 20), start=st.integers(0, 20), batch_size=st.integers(1, 9), pad=st.booleans())
@settings(deadline=None)
def test_grid(n: int, start: int, batch_size: int, pad: bool) -> None:
    """Each row is seen once, at the position that follows from its index in the whole input; the rest is zeros."""
    net, rows = Recorder(), np.arange(start + 1, start + 1 + n, dtype="float32")
    np.testing.assert_array_equal(result(net, rows, start=start, batch_size=batch_size, pad=pad), rows)
    for seen in net.seen:
        places, numbers = np.flatnonzero(seen), seen[seen > 0].numpy().astype(int) - 1
        assert len({*(numbers // batch_size)}) == 1
        assert len(seen) == (batch_size if pad else len(numbers))
        assert not pad or places.tolist() == (numbers % batch_size).tolist()


def test_padding_is_zeroed_each_time() -> None:
    """What a model wrote into its input does not come back as padding."""
    net = Recorder()
    result(nn.Sequential(net, Do(lambda x: x.add_(1))), X, start=1)
    assert not net.seen[-1][3:].any()


@pytest.mark.parametrize("batch_size", [1, 10, 11, 1000])
def test_batch_size_at_the_edges(batch_size: int) -> None:
    """The batch size may be one row, all rows, or more than there are."""
    np.testing.assert_array_equal(result(Recorder(), X, batch_size=batch_size), X)


def test_one_row() -> None:
    """A chunk may be one row."""
    assert run(Recorder(), X[:1]).arrays[0].shape == (1, 3)


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """Draw a small model and the shape of its rows."""
    torch.manual_seed(draw(st.integers(0, 99)))
    width, hidden = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["linear", "mlp", "conv"]))
    if kind == "conv":
        layers = [nn.Conv2d(width, hidden, 3, padding=1), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(hidden * 20, 3)), (width, 4, 5)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, 3)), (width,)
    return nn.Linear(width, hidden), (width,)


@given(net_and_shape=models(), n=st.integers(1, 30), batch_size=st.integers(1, 9), data=st.data())
@settings(max_examples=60, deadline=None)
def test_same_bytes(net_and_shape: Any, n: int, batch_size: int, data: st.DataObject) -> None:
    """With one batch size the bytes do not depend on the cuts, and agree with one plain torch loop."""
    net, shape = net_and_shape
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
    x = np.random.default_rng(n).normal(size=(n, *shape)).astype("float32")
    whole = run(net, x, batch_size=batch_size).arrays[0]
    edges = [0, *cuts, n]
    parts = [run(net, x[a:b], start=a, batch_size=batch_size).arrays[0] for a, b in itertools.pairwise(edges)]
    assert whole.tobytes() == np.concatenate(parts).tobytes()
    with torch.no_grad():
        plain = torch.cat([net(row[None].clone()) for row in torch.from_numpy(x)]).numpy()
    np.testing.assert_allclose(whole, plain, rtol=1e-4, atol=1e-5)


# The caller's data


def test_in_place_model() -> None:
    """A model that overwrites its input does not change the caller's rows."""
    x = X.copy()
    result(Do(lambda x: x.mul_(0)), x)
    np.testing.assert_array_equal(x, X)


def test_in_place_callable() -> None:
    """A function that overwrites its input does not change the caller's rows, and its output is kept."""

    def double(x: np.ndarray) -> np.ndarray:
        x *= 2
        return x

    x = X.copy()
    np.testing.assert_array_equal(result(double, x), 2 * X)
    np.testing.assert_array_equal(x, X)


def test_in_place_preprocess() -> None:
    """A preprocess that works in place does not change the caller's rows, and works on read-only ones."""

    def halve(x: np.ndarray) -> np.ndarray:
        x /= 2
        return x

    x = X.copy()
    x.flags.writeable = False
    np.testing.assert_array_equal(result(Recorder(), x, preprocess=halve), X / 2)
    np.testing.assert_array_equal(x, X)


def test_read_only_input() -> None:
    """A read-only array may go through a model that works in place."""
    x = np.broadcast_to(X[:1], (10, 3))
    np.testing.assert_array_equal(result(Do(lambda x: x.add_(1)), x), x + 1)


@pytest.mark.parametrize("view", [lambda x: x[:, :1], lambda x: x.T.T, lambda x: x[:, None].expand(-1, 2, -1), lambda x: x])
def test_views_of_the_input(view: Callable[[Any], Any]) -> None:
    """An output that is a view of the model's input outlives the next micro-batch."""
    np.testing.assert_array_equal(result(Do(view), X, batch_size=3), view(torch.from_numpy(X)).numpy())


# Ports


def test_named_ports() -> None:
    """A dict is passed by keyword."""
    net = Do(lambda *, image, meta: image.sum((1, 2)) + meta)
    x = {"meta": X[:, 0], "image": np.ones((10, 2, 2), "float32")}
    np.testing.assert_allclose(result(net, x), X[:, 0] + 4, rtol=1e-6)


def test_positional_ports() -> None:
    """A tuple is passed by position."""
    np.testing.assert_array_equal(result(Do(lambda a, b: a - b), (X, X)), X - X)


def test_callable_gets_arrays() -> None:
    """A model that is no module gets ndarrays."""
    assert result(lambda x: np.full(len(x), type(x) is np.ndarray), X).all()


def test_rows_of_any_kind() -> None:
    """A chunk may be tensors, too."""
    np.testing.assert_array_equal(result(Recorder(), torch.from_numpy(X)), X)


# Outputs


class Pair(NamedTuple):
    mean: Any
    std: Any


@dataclasses.dataclass
class Output:
    logits: Any
    hidden: Any = None


STRUCTURES = {
    "tuple": lambda x: (x, x + 1),
    "list": lambda x: [x, x + 1],
    "dict": lambda x: {"a": x, "b": {"c": x + 1}},
    "namedtuple": lambda x: Pair(x, x + 1),
    "dataclass": lambda x: Output(x, (x + 1, None)),
    "tensor": lambda x: x,
}


@pytest.mark.parametrize("form", STRUCTURES)
def test_structures(form: str) -> None:
    """Whatever structure a model returns comes back as the same structure of arrays."""
    mirrored, expected = result(Do(STRUCTURES[form]), X), STRUCTURES[form](X)
    assert type(mirrored) is type(expected)
    assert repr(mirrored) == repr(expected)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float32", "float64", "complex64", "uint16"])
@pytest.mark.parametrize("model", [nn.Identity(), lambda x: x])
def test_dtypes(model: Any, dtype: str) -> None:
    """Numbers of every kind go through unchanged."""
    np.testing.assert_array_equal(result(model, (X * 9).astype(dtype)), (X * 9).astype(dtype), strict=True)


def test_big_endian() -> None:
    """Numbers in the other byte order are converted for the model."""
    np.testing.assert_array_equal(result(Recorder(), X.astype(">f4")), X, strict=True)


def test_bfloat16() -> None:
    """bfloat16, which NumPy lacks, comes back as float32."""
    x = result(Do(lambda x: x.bfloat16()), X)
    np.testing.assert_array_equal(x, torch.from_numpy(X).bfloat16().float().numpy(), strict=True)


def test_unsupported_dtype() -> None:
    """A dtype that torch lacks is an error that names it."""
    with pytest.raises(ChunkError, match=r"rows 0:10 on cpu failed: TypeError: .*float128|longdouble"):
        run(Recorder(), X.astype(np.longdouble))


UNUSABLE_OUTPUTS = {
    "no rows": (lambda x: x.sum(), r"the model returned y of shape \(\) for 4 rows"),
    "one row too few": (lambda x: x[1:], r"the model returned y of shape \(3, 3\) for 4 rows"),
    "summed over rows": (lambda x: {"a": x, "b": x.sum(0)}, r"the model returned b of shape \(3,\) for 4 rows"),
    "nothing": (lambda x: None, "the model returned no array"),
    "an empty dict": (lambda x: {}, "the model returned no array"),
    "a word": (lambda x: {"a": [x, "b"]}, r"the model returned a str at 'a\.1'"),
    "a number": (lambda x: 1.0, "the model returned a float; it must return tensors or ndarrays with one entry per row"),
}


@pytest.mark.parametrize("module", [True, False])
@pytest.mark.parametrize("form", UNUSABLE_OUTPUTS)
def test_unusable_outputs(form: str, module: bool) -> None:
    """An output without one entry per row is refused, with the rows and the device."""
    function, message = UNUSABLE_OUTPUTS[form]
    with pytest.raises(ModelError, match=f"rows 20:30 on cpu: {message}"):
        run(Do(function) if module else function, X, start=20)


class Changing:
    """A model whose output changes from call to call; the last function stays."""

    def __init__(self, *functions: Callable[[Any], Any]) -> None:
        self.functions = itertools.chain(functions, itertools.repeat(functions[-1]))

    def __call__(self, x: Any) -> Any:
        return next(self.functions)(x)


@pytest.mark.parametrize(
    "then",
    [
        lambda x: x[:, :2],
        lambda x: x.astype("float64"),
        lambda x: (x,),
        lambda x: x[:, None],
    ],
)
def test_changing_outputs(then: Callable[[Any], Any]) -> None:
    """An output of another shape, dtype or structure than the one before is refused."""
    with pytest.raises(ModelError, match=r"rows 4:8 returned .*, earlier rows"):
        run(Changing(lambda x: x, then), X)


def test_changing_names() -> None:
    """Output names in another order than before are refused, since the outputs would be swapped."""
    with pytest.raises(ModelError, match=r"rows 4:8 returned .* \(b, a\), earlier rows .* \(a, b\)"):
        run(Changing(lambda x: {"a": x, "b": x}, lambda x: {"b": x, "a": x}), X)


WRONG_PLANS = {
    "shape": np.empty((0, 2), "float32"),
    "dtype": np.empty((0, 3), "float64"),
}


@pytest.mark.parametrize("what", WRONG_PLANS)
def test_planned_output(what: str) -> None:
    """An output that is not the planned one is refused."""
    with pytest.raises(ModelError, match=r"the model returned \(3,\) float32 per row, .* was planned"):
        run(Recorder(), X, outputs=(WRONG_PLANS[what],))


@pytest.mark.parametrize("output", [{"b": X, "a": X}, (X, X), X])
def test_output_in_another_order(output: Any) -> None:
    """If output= names the outputs in another order than the model, they would be swapped: refused."""
    with pytest.raises(ModelError, match="the model returned a, b, output= has"):
        run(Do(lambda x: {"a": x, "b": x}), X, output=output)


def test_output_as_it_is() -> None:
    """With output= in the structure of the model's output, the run succeeds."""
    assert list(result(Do(lambda x: {"a": x, "b": x}), X, output={"a": X, "b": X[:0]})) == ["a", "b"]


# Errors


def test_failing_model() -> None:
    """A model that fails is an error with the rows, the device and the cause."""
    with pytest.raises(ChunkError, match=r"rows 5:6 on cpu failed: ZeroDivisionError: .* x\[5:6\], devices='inline'"):
        run(Do(lambda x: 1 / 0), X, start=5)


def test_own_errors_raised_by_the_model() -> None:
    """An error class of this package that the model raises counts as the model's failure."""

    def refuse(x: Any) -> Any:
        raise PlanError(["no", "never"])

    with pytest.raises(ChunkError, match=r"PlanError: invalid plan, 2 problems"):
        run(refuse, X)


def test_interrupt_passes() -> None:
    """An interrupt is not taken for a failure, and releases the model's lock."""

    def interrupt(x: Any) -> Any:
        raise KeyboardInterrupt

    model = load(interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run(model, X)
    assert not model.lock.locked()


def test_seconds() -> None:
    """An output says how long it took."""
    assert 0 < run(Recorder(), X).seconds < 60


def test_no_gradients() -> None:
    """Models run without gradients, in evaluation mode."""

    def state(x: torch.Tensor) -> torch.Tensor:
        return torch.full((len(x),), torch.is_inference_mode_enabled() and not net.training)

    net = Do(state)
    assert result(net, X).all()


def test_pad_false_sees_rows_only() -> None:
    """With pad=False a model whose rows depend on each other sees the rows of a micro-batch, and no padding."""
    means: Sequence[float] = result(Do(lambda x: x.mean(0).expand(len(x), -1)), X, pad=False, start=2)
    np.testing.assert_allclose(
        means, np.concatenate([np.tile(X[a:b].mean(0), (b - a, 1)) for a, b in [(0, 2), (2, 6), (6, 10)]]), rtol=1e-5
    )
