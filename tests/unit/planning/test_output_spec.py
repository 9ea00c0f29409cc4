from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import daskinfer as di
from daskinfer.core.pytree import Ports, flatten
from daskinfer.errors import InputError, ModelError, OptionError
from daskinfer.models.loaded_model import LoadedModel
from daskinfer.models.model import as_model
from daskinfer.options import Options
from daskinfer.planning import output_spec
from daskinfer.planning.output_spec import OutputSpec, OutputSpecCache, infer_output_spec
from daskinfer.scheduling.throughput_history import MAX_RECORDS


class Unreadable:
    """Rows with a shape and a dtype that must not be read."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)

    def __array__(self, *_: object, **__: object) -> None:
        raise AssertionError("read")

    __getitem__ = __len__ = __array__


class Do(nn.Module):
    """A module that calls a function, and has a weight of a given dtype."""

    def __init__(self, function: Callable[..., Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(3, dtype=dtype))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def infer(model: Any, x: Any = ((5, 3), "float32"), **fields: Any) -> OutputSpec:
    """Infer the output for ``x``: a (shape, dtype), or a dict or list of them."""
    ports = Ports.from_input(
        tuple(x) if isinstance(x, list) else {} if x is None else x if isinstance(x, dict) else "single"
    )
    forms = list(x.values()) if isinstance(x, dict) else x if isinstance(x, list) else [x]
    return infer_output_spec(as_model(model).make_loader(), ports, [Unreadable(*form) for form in forms], Options(**fields))


def list_outputs(spec: OutputSpec) -> list[tuple[tuple[int, ...], str]]:
    """Return shape and dtype of each output."""
    return [(output.shape, output.dtype.name) for output in spec.outputs]


@pytest.fixture(params=["real", "fake"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Infer with both methods: rows of zeros, and fake tensors."""
    if request.param == "fake":
        monkeypatch.setattr(output_spec, "FAKE_TENSOR_MIN_NBYTES", 0)
    return str(request.param)


@pytest.fixture
def _fake_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if anything but fake tensors runs."""

    def refuse(*_: object) -> None:
        raise AssertionError("run for real")

    monkeypatch.setattr(output_spec, "FAKE_TENSOR_MIN_NBYTES", 0)
    monkeypatch.setattr(output_spec, "_infer_from_zeros", refuse)


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "complex64"])
def test_shape_and_dtype(dtype: str) -> None:
    """The output's shape and dtype are inferred without reading a row."""
    assert list_outputs(infer(nn.Flatten(), ((0, 2, 4), dtype))) == [((0, 8), dtype)]


@pytest.mark.usefixtures("method")
def test_structure() -> None:
    """The structure of the output is inferred too."""
    spec = infer(Do(lambda x: {"a": x.bfloat16(), "b": (x.sum(1), None)}))
    assert spec.structure.names == ("a", "b.0")
    assert list_outputs(spec) == [((0, 3), "float32"), ((0,), "float32")]
    assert spec.row_nbytes == 16
    assert spec.structure.rebuild(spec.outputs)["b"][1] is None


@pytest.mark.usefixtures("method")
def test_ports() -> None:
    """Ports are passed by name or by position."""
    assert list_outputs(infer(Do(lambda *, a, b: a * b[:, None]), {"b": ((9,), "int64"), "a": ((9, 3), "float32")})) == [
        ((0, 3), "float32")
    ]
    assert list_outputs(infer(Do(lambda a, b: b), [((9,), "int64"), ((9, 3), "float32")])) == [((0, 3), "float32")]


@pytest.mark.usefixtures("method")
def test_cast() -> None:
    """dtype= casts all ports, or those that it names, before the output is inferred."""
    two = Do(lambda a, b: (a, b))
    assert list_outputs(infer(nn.Identity(), ((5, 3), "uint8"), dtype="float64")) == [((0, 3), "float64")]
    assert list_outputs(infer(nn.Identity(), ((5, 3), "uint8"), dtype="bfloat16")) == [((0, 3), "float32")]
    forms = {"a": ((5,), "uint8"), "b": ((5,), "uint8")}
    assert list_outputs(infer(two, forms, dtype={"b": "float32"})) == [((0,), "uint8"), ((0,), "float32")]


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize(("autocast", "dtype"), [("fp16", "float16"), ("bf16", "float32"), (None, "float32")])
def test_autocast(autocast: str | None, dtype: str) -> None:
    """The dtype of the output is the one under autocast."""
    assert list_outputs(infer(nn.Linear(3, 2), autocast=autocast)) == [((0, 2), dtype)]


@pytest.mark.usefixtures("_fake_only")
def test_fake_tensors() -> None:
    """A large module runs on fake tensors only, which compute nothing."""
    assert list_outputs(infer(nn.Linear(3, 2))) == [((0, 2), "float32")]


@pytest.mark.usefixtures("_fake_only")
def test_fake_tensors_as_indices() -> None:
    """Integers are allowed as fake tensors if the module has an embedding."""
    assert list_outputs(infer(nn.Embedding(9, 2), ((5,), "int64"))) == [((0, 2), "float32")]


@pytest.mark.usefixtures("_fake_only")
@pytest.mark.parametrize("dtype", ["float64", "int64", "uint8"])
def test_no_fake_for_other_dtypes(dtype: str) -> None:
    """Fake tensors accept mixed dtypes that real ones reject, so they are used only with the model's own dtypes."""
    with pytest.raises(AssertionError, match="run for real"):
        infer(nn.Linear(3, 2), ((5, 3), dtype))


@pytest.mark.usefixtures("_fake_only")
@pytest.mark.parametrize("function", [lambda x: x, np.sqrt])
def test_no_fake_for_functions(function: Callable[..., Any]) -> None:
    """A function runs for real, however large, since it takes no tensors."""
    with pytest.raises(AssertionError, match="run for real"):
        infer(function)


@pytest.mark.usefixtures("_fake_only")
@pytest.mark.parametrize("step", ["preprocess", "postprocess"])
def test_no_fake_with_steps(step: str) -> None:
    """With a pre- or postprocess, which takes ndarrays, the module runs for real."""
    with pytest.raises(AssertionError, match="run for real"):
        infer(nn.Linear(3, 2), **{step: np.negative})


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[: int(x.sum()) + 2],  # depends on the numbers
        lambda x: torch.from_numpy(x.numpy() + 1),
        lambda x: x.numpy() + 1,
    ],
)
def test_fake_tensors_fail(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """If fake tensors fail, two rows of zeros run instead, and a line is logged."""
    monkeypatch.setattr(output_spec, "FAKE_TENSOR_MIN_NBYTES", 0)
    with caplog.at_level(logging.DEBUG, "daskinfer.planning.output_spec"):
        assert list_outputs(infer(Do(function))) == [((0, 3), "float32")]
    assert "running the model on 2 rows of zeros instead" in caplog.text


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.sum(), r"returned y of shape \(\) for 2 rows"),
        (lambda x: x[:1], r"returned y of shape \(1, 3\) for 2 rows"),
        (lambda x: x.sum(0), r"returned y of shape \(3,\) for 2 rows"),
        (lambda x: x[x > 0], r"returned y of shape \(0,\) for 2 rows"),
        (lambda x: None, "returned no array"),
        (lambda x: "label", "returned a str"),
    ],
)
def test_bad_outputs(function: Callable[..., Any], message: str) -> None:
    """An output without one entry per row is refused before anything runs."""
    with pytest.raises(ModelError, match=message):
        infer(Do(function))


def test_functions() -> None:
    """A function of ndarrays runs on zeros."""
    assert list_outputs(infer(np.sqrt, ((5, 3), "int8"))) == [((0, 3), "float16")]


def test_steps() -> None:
    """Pre- and postprocess run too."""
    spec = infer(nn.Linear(3, 2), ((5, 6), "uint8"), preprocess=drop_columns, postprocess=find_largest)
    assert list_outputs(spec) == [((0,), "int64")]


def drop_columns(x: np.ndarray) -> np.ndarray:
    """Return every other column, as float32."""
    return x[:, ::2].astype("float32")


def find_largest(y: np.ndarray) -> np.ndarray:
    """Return the position of the largest entry of each row."""
    return y.argmax(1)


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (10**12, 3)])
def test_any_number_of_rows(shape: tuple[int, ...]) -> None:
    """The input may have no row, or more rows than fit into memory."""
    assert list_outputs(infer(nn.Linear(3, 2), (shape, "float32"))) == [((0, 2), "float32")]


def test_the_model_is_a_copy(tmp_path: Any) -> None:
    """A copy of the model runs: the caller's model is never called, and the copy is closed."""

    class Service:
        calls = 0

        def __call__(self, x: np.ndarray) -> np.ndarray:
            self.calls += 1
            return x

        def close(self) -> None:
            (tmp_path / "closed").write_text(str(self.calls))

    service = Service()
    infer(service)
    assert (service.calls, (tmp_path / "closed").read_text()) == (0, "1")


# output=


def test_output() -> None:
    """output= is used as it is, without its rows and without loading the model."""
    spec = infer("os:abort", output={"a": np.ones((7, 2), "f8"), "b": torch.ones(1, 3, dtype=torch.bfloat16)})
    assert list_outputs(spec) == [((0, 2), "float64"), ((0, 3), "float32")]
    assert list(spec.structure.rebuild(spec.outputs)) == ["a", "b"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("float32", "output= must hold arrays .*, got a str"),
        ({"a": [1, 2]}, r"output= must hold arrays .*, got a int at 'a\.0'"),
        (np.float32(1), "output= must hold at least one array, each with rows"),
        ((), "output= must hold at least one array, each with rows"),
    ],
)
def test_output_bad(output: Any, message: str) -> None:
    """An output= that is not arrays is refused."""
    with pytest.raises(ModelError, match=message):
        infer(nn.Identity(), output=output)


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize("function", [lambda x: 1 / 0, lambda x: x[1 // int(x.sum())]])
def test_cannot_take_zeros(function: Callable[..., Any]) -> None:
    """A model that fails on zeros raises an error with the reason, which names output=."""
    with pytest.raises(ModelError, match=r"failed on 2 rows of zeros \(x: \(2, 3\) float32\), .* pass output=np\.empty"):
        infer(Do(function))


# dtypes


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize("model_dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "uint8", "int64", "bool"])
def test_dtype_refused(dtype: str, model_dtype: str) -> None:
    """An input that the model would accept in its own dtype is refused, and the message says what to pass."""
    if dtype == model_dtype:
        return
    message = f"x is {dtype}, but the model is {model_dtype}. Pass dtype='{model_dtype}' (--dtype)."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        infer(nn.Linear(3, 2).to(getattr(torch, model_dtype)), ((5, 3), dtype))


def embed(image: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Apply a function that needs a float32 and an int64."""
    return nn.functional.linear(image, torch.ones(2, 3)) + nn.functional.embedding(number, torch.ones(4, 2))


def test_dtype_refused_per_port() -> None:
    """If a port must keep its dtype, the message names the others only."""
    forms = {"image": ((5, 3), "uint8"), "number": ((5,), "int64")}
    with pytest.raises(InputError, match=r"Pass dtype=\{'image': 'float32'\} \(--dtype\)\.$"):
        infer(Do(embed), forms)
    assert list_outputs(infer(Do(embed), forms, dtype={"image": "float32"})) == [((0, 2), "float32")]


def test_dtype_of_complex_input() -> None:
    """No message proposes to cast complex numbers to real ones."""
    with pytest.raises(ModelError, match="pass output="):
        infer(nn.Linear(3, 2), ((5, 3), "complex64"))


@pytest.mark.parametrize("model", [Do(lambda x: x.no_such, torch.float16), Do(lambda x: 1 / 0), np.linalg.inv])
def test_dtype_is_not_to_blame(model: Any) -> None:
    """A model that fails in its own dtype too fails for another reason."""
    with pytest.raises(ModelError, match="the model failed on 2 rows of zeros"):
        infer(model, ((5, 3), "float64"))


def test_dtype_given_is_not_second_guessed() -> None:
    """If the caller chose a dtype, the model's own error is shown."""
    with pytest.raises(ModelError, match="must have the same dtype"):
        infer(nn.Linear(3, 2), dtype="float64")


def test_dtype_of_unknown_port() -> None:
    """A dtype for a port that does not exist is refused, even if output= is set."""
    with pytest.raises(OptionError, match="dtype names unknown port 'imag'; the input has 'image', 'meta'"):
        infer(
            nn.Identity(), {"image": ((2,), "f4"), "meta": ((2,), "f4")}, dtype={"imag": "float32"}, output=np.empty((0, 1))
        )


def test_dtype_of_preprocessed_port() -> None:
    """With a preprocess, dtype names the ports that it returns."""
    spec = infer(Do(lambda a: a), dtype={"a": "float64"}, preprocess=lambda x: {"a": x})
    assert list_outputs(spec) == [((0, 3), "float64")]


def test_dtype_unknown() -> None:
    """A dtype that does not exist is refused before anything runs."""
    with pytest.raises(OptionError, match=r"^torch has no dtype 'flot32'; did you mean 'float32' for x"):
        infer(nn.Linear(3, 2), dtype="flot32")


def test_refused_by_the_public_functions() -> None:
    """predict, plan and map_blocks raise the same error."""
    for function in (di.plan, di.predict, di.map_blocks):
        with pytest.raises(di.DaskInferError, match=r"x is float64, but the model is float32\. Pass dtype='float32'"):
            function(nn.Linear(3, 2), np.ones((4, 3)), **({} if function is di.map_blocks else {"devices": "inline"}))


def test_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many dtypes are tried, the model is loaded once."""
    loads = []
    from_model = LoadedModel.from_model
    monkeypatch.setattr(LoadedModel, "from_model", lambda *args: loads.append(1) or from_model(*args))
    with pytest.raises(InputError, match="Pass dtype"):
        infer(nn.Linear(3, 2), ((5, 3), "float64"))
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("dtype", "value", "holds"),
    [
        ("f2", None, True),
        ("c8", -1.5, True),
        ("i4", None, False),
        ("i4", -1, True),
        ("i4", 2**31, False),
        ("u1", -1, False),
        ("u1", 255.0, True),
        ("i8", 0.5, False),
        ("i8", float("inf"), False),
        ("?", None, False),
        ("?", 1, True),
        ("?", 2, False),
    ],
)
def test_fill_values_that_an_output_holds(dtype: str, value: float | None, holds: bool) -> None:
    """A fill value that an output cannot hold is refused, unless failed rows end the call."""
    outputs = (np.empty(0), np.empty((0, 3), dtype))
    spec = output_spec.OutputSpec(flatten({"a": outputs[0], "b": outputs[1]})[1], outputs)
    output_spec.check_fill_value(Options(fill_value=value), spec)
    options = Options(fill_value=value, on_error="skip")
    if holds:
        output_spec.check_fill_value(options, spec)
        return
    with pytest.raises(
        OptionError, match=f"fill_value must fit the dtype {outputs[1].dtype} of output b, got .*fill_value=0"
    ):
        output_spec.check_fill_value(options, spec)


def make_spec(n_columns: int) -> OutputSpec:
    """Make a spec of one output with this many columns."""
    empty = np.empty((0, n_columns))
    return OutputSpec(flatten(empty)[1], (empty,))


def never() -> OutputSpec:
    """Fail if a spec is inferred."""
    raise AssertionError("inferred again")


def test_a_spec_is_inferred_once_per_key() -> None:
    """A known key returns the same spec without inferring it; other keys, and all after ``clear``, infer their own."""
    cache = OutputSpecCache()
    first = cache.get_or_infer("a", lambda: make_spec(1))
    assert cache.get_or_infer("b", lambda: make_spec(2)).row_nbytes == 16
    assert cache.get_or_infer("a", never) is first
    cache.clear()
    with pytest.raises(AssertionError, match="inferred again"):
        cache.get_or_infer("a", never)


def test_a_spec_that_could_not_be_inferred_is_not_kept() -> None:
    """An error while inferring leaves nothing behind: the next call infers again."""
    cache = OutputSpecCache()
    with pytest.raises(AssertionError, match="inferred again"):
        cache.get_or_infer("a", never)
    assert cache.get_or_infer("a", lambda: make_spec(1)).row_nbytes == 8


def test_specs_used_last_are_kept() -> None:
    """The cache is as large as the history: beyond that, the spec that was used longest ago goes."""
    cache = OutputSpecCache()
    for number in range(MAX_RECORDS):
        cache.get_or_infer(number, lambda: make_spec(1))
    cache.get_or_infer(0, never)
    cache.get_or_infer("new", lambda: make_spec(1))
    cache.get_or_infer(0, never)
    with pytest.raises(AssertionError, match="inferred again"):
        cache.get_or_infer(1, never)
