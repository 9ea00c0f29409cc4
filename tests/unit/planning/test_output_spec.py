from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import daskinfer as di
from daskinfer.core.pytree import Ports, flatten
from daskinfer.errors import InputError, ModelError, OptionError
from daskinfer.models.model import as_model
from daskinfer.options import Options
from daskinfer.planning import output_spec
from daskinfer.planning.output_spec import OutputSpec, infer_output_spec
from daskinfer.worker.loaded import LoadedModel


class Unreadable:
    """Rows that have a shape and a dtype, and that nobody may read."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)

    def __array__(self, *_: object, **__: object) -> None:
        raise AssertionError("read")

    __getitem__ = __len__ = __array__


class Do(nn.Module):
    """A module of one function, with a weight of a dtype."""

    def __init__(self, function: Callable[..., Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(3, dtype=dtype))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def ask(model: Any, x: Any = ((5, 3), "float32"), **fields: Any) -> OutputSpec:
    """What the model will answer to ``x``: (shape, dtype), or a dict or list of them."""
    ports = Ports.from_input(
        tuple(x) if isinstance(x, list) else {} if x is None else x if isinstance(x, dict) else "single"
    )
    forms = list(x.values()) if isinstance(x, dict) else x if isinstance(x, list) else [x]
    return infer_output_spec(as_model(model).make_loader(), ports, [Unreadable(*form) for form in forms], Options(**fields))


def looks(promised: OutputSpec) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of each output."""
    return [(output.shape, output.dtype.name) for output in promised.outputs]


@pytest.fixture(params=["real", "fake"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of trying a module: made-up rows, and fake tensors."""
    if request.param == "fake":
        monkeypatch.setattr(output_spec, "FAKE_TENSOR_MIN_NBYTES", 0)
    return str(request.param)


@pytest.fixture
def _fake_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing run but fake tensors."""

    def refuse(*_: object) -> None:
        raise AssertionError("run for real")

    monkeypatch.setattr(output_spec, "FAKE_TENSOR_MIN_NBYTES", 0)
    monkeypatch.setattr(output_spec, "_infer_from_zeros", refuse)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "complex64"])
def test_shape_and_dtype(dtype: str) -> None:
    """The answer's shape and dtype are found out without reading a row."""
    assert looks(ask(nn.Flatten(), ((0, 2, 4), dtype))) == [((0, 8), dtype)]


@pytest.mark.usefixtures("way")
def test_structure() -> None:
    """The structure of the answer is found out too."""
    promised = ask(Do(lambda x: {"a": x.bfloat16(), "b": (x.sum(1), None)}))
    assert promised.structure.names == ("a", "b.0")
    assert looks(promised) == [((0, 3), "float32"), ((0,), "float32")]
    assert promised.row_nbytes == 16
    assert promised.structure.rebuild(promised.outputs)["b"][1] is None


@pytest.mark.usefixtures("way")
def test_ports() -> None:
    """Ports are given by name or by position."""
    assert looks(ask(Do(lambda *, a, b: a * b[:, None]), {"b": ((9,), "int64"), "a": ((9, 3), "float32")})) == [
        ((0, 3), "float32")
    ]
    assert looks(ask(Do(lambda a, b: b), [((9,), "int64"), ((9, 3), "float32")])) == [((0, 3), "float32")]


@pytest.mark.usefixtures("way")
def test_cast() -> None:
    """What dtype= casts to counts, of all ports or of those that it names."""
    two = Do(lambda a, b: (a, b))
    assert looks(ask(nn.Identity(), ((5, 3), "uint8"), dtype="float64")) == [((0, 3), "float64")]
    assert looks(ask(nn.Identity(), ((5, 3), "uint8"), dtype="bfloat16")) == [((0, 3), "float32")]
    forms = {"a": ((5,), "uint8"), "b": ((5,), "uint8")}
    assert looks(ask(two, forms, dtype={"b": "float32"})) == [((0,), "uint8"), ((0,), "float32")]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("autocast", "dtype"), [("fp16", "float16"), ("bf16", "float32"), (None, "float32")])
def test_autocast(autocast: str | None, dtype: str) -> None:
    """What autocast makes of the answer's dtype counts."""
    assert looks(ask(nn.Linear(3, 2), autocast=autocast)) == [((0, 2), dtype)]


@pytest.mark.usefixtures("_fake_only")
def test_fake_tensors() -> None:
    """A large module is tried with fake tensors only, which compute nothing."""
    assert looks(ask(nn.Linear(3, 2))) == [((0, 2), "float32")]


@pytest.mark.usefixtures("_fake_only")
def test_fake_tensors_as_indices() -> None:
    """Integers are believed where they may be indices."""
    assert looks(ask(nn.Embedding(9, 2), ((5,), "int64"))) == [((0, 2), "float32")]


@pytest.mark.usefixtures("_fake_only")
@pytest.mark.parametrize("dtype", ["float64", "int64", "uint8"])
def test_no_fake_for_other_dtypes(dtype: str) -> None:
    """Fake products mix dtypes that real ones refuse, so only the network's own are believed."""
    with pytest.raises(AssertionError, match="run for real"):
        ask(nn.Linear(3, 2), ((5, 3), dtype))


@pytest.mark.usefixtures("_fake_only")
@pytest.mark.parametrize("function", [lambda x: x, np.sqrt])
def test_no_fake_for_functions(function: Callable[..., Any]) -> None:
    """What takes no tensors is run for real, however large."""
    with pytest.raises(AssertionError, match="run for real"):
        ask(function)


@pytest.mark.usefixtures("_fake_only")
@pytest.mark.parametrize("step", ["preprocess", "postprocess"])
def test_no_fake_with_steps(step: str) -> None:
    """A pre- or postprocess takes ndarrays, so the module is run for real."""
    with pytest.raises(AssertionError, match="run for real"):
        ask(nn.Linear(3, 2), **{step: np.negative})


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[: int(x.sum()) + 2],  # depends on the numbers
        lambda x: torch.from_numpy(x.numpy() + 1),
        lambda x: x.numpy() + 1,
    ],
)
def test_fake_does_not_do(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Where fake tensors fail, two rows are run, and a line says so."""
    monkeypatch.setattr(output_spec, "FAKE_TENSOR_MIN_NBYTES", 0)
    with caplog.at_level(logging.DEBUG, "daskinfer.planning.output_spec"):
        assert looks(ask(Do(function))) == [((0, 3), "float32")]
    assert "two rows are run" in caplog.text


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: x.sum(), r"returned y of shape \(\) for 2 rows"),
        (lambda x: x[:1], r"returned y of shape \(1, 3\) for 2 rows"),
        (lambda x: x.sum(0), r"returned y of shape \(3,\) for 2 rows"),
        (lambda x: x[x > 0], r"returned y of shape \(0,\) for 2 rows"),
        (lambda x: None, "returned no array"),
        (lambda x: "label", "returned a str"),
    ],
)
def test_bad_answers(function: Callable[..., Any], said: str) -> None:
    """An answer that is not one entry per row is refused before anything runs."""
    with pytest.raises(ModelError, match=said):
        ask(Do(function))


def test_functions() -> None:
    """A function of ndarrays is tried on zeros."""
    assert looks(ask(np.sqrt, ((5, 3), "int8"))) == [((0, 3), "float16")]


def test_steps() -> None:
    """Pre- and postprocess are part of what is tried."""
    promised = ask(nn.Linear(3, 2), ((5, 6), "uint8"), preprocess=halved, postprocess=best)
    assert looks(promised) == [((0,), "int64")]


def halved(x: np.ndarray) -> np.ndarray:
    """Every other column, as float32."""
    return x[:, ::2].astype("float32")


def best(y: np.ndarray) -> np.ndarray:
    """The largest entry of each row."""
    return y.argmax(1)


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (10**12, 3)])
def test_any_number_of_rows(shape: tuple[int, ...]) -> None:
    """The input may have no row, or more than there is memory for."""
    assert looks(ask(nn.Linear(3, 2), (shape, "float32"))) == [((0, 2), "float32")]


def test_the_model_is_a_copy(tmp_path: Any) -> None:
    """The network that is tried is a copy: the caller's sees nothing of it, and the copy is closed."""

    class Service:
        calls = 0

        def __call__(self, x: np.ndarray) -> np.ndarray:
            self.calls += 1
            return x

        def close(self) -> None:
            (tmp_path / "closed").write_text(str(self.calls))

    service = Service()
    ask(service)
    assert (service.calls, (tmp_path / "closed").read_text()) == (0, "1")


# output=


def test_output() -> None:
    """output= is believed, without its rows and without loading the model."""
    promised = ask("os:abort", output={"a": np.ones((7, 2), "f8"), "b": torch.ones(1, 3, dtype=torch.bfloat16)})
    assert looks(promised) == [((0, 2), "float64"), ((0, 3), "float32")]
    assert list(promised.structure.rebuild(promised.outputs)) == ["a", "b"]


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("float32", "output= holds a str"),
        ({"a": [1, 2]}, "output= holds a int at 'a.0'"),
        (np.float32(1), "output= holds an array without axes, or none"),
        ((), "output= holds an array without axes, or none"),
    ],
)
def test_output_bad(output: Any, said: str) -> None:
    """An output= that is not arrays is refused."""
    with pytest.raises(ModelError, match=said):
        ask(nn.Identity(), output=output)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("function", [lambda x: 1 / 0, lambda x: x[1 // int(x.sum())]])
def test_cannot_take_zeros(function: Callable[..., Any]) -> None:
    """A network that fails on zeros is an error that shows why and names output=."""
    with pytest.raises(ModelError, match=r"2 made-up rows of zeros \(x: \(2, 3\) float32\): .* pass output=np\.empty"):
        ask(Do(function))


# dtypes


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("own", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("given", ["float64", "float32", "uint8", "int64", "bool"])
def test_dtype_refused(given: str, own: str) -> None:
    """An input that the network would take in its own dtype is refused, with what to pass."""
    if given == own:
        return
    with pytest.raises(InputError, match=f"^x is {given}, the net is {own}: pass dtype='{own}' \\(--dtype\\)$"):
        ask(nn.Linear(3, 2).to(getattr(torch, own)), ((5, 3), given))


def embed(image: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Needs a float32 and an int64."""
    return nn.functional.linear(image, torch.ones(2, 3)) + nn.functional.embedding(number, torch.ones(4, 2))


def test_dtype_refused_per_port() -> None:
    """Where a port has to stay as it is, the others are named."""
    forms = {"image": ((5, 3), "uint8"), "number": ((5,), "int64")}
    with pytest.raises(InputError, match=r"pass dtype=\{'image': 'float32'\} \(--dtype\)$"):
        ask(Do(embed), forms)
    assert looks(ask(Do(embed), forms, dtype={"image": "float32"})) == [((0, 2), "float32")]


def test_dtype_of_complex_input() -> None:
    """Nobody is told to cast complex numbers to real ones."""
    with pytest.raises(ModelError, match="pass output="):
        ask(nn.Linear(3, 2), ((5, 3), "complex64"))


@pytest.mark.parametrize("model", [Do(lambda x: x.no_such, torch.float16), Do(lambda x: 1 / 0), np.linalg.inv])
def test_dtype_is_not_to_blame(model: Any) -> None:
    """A network that fails in its own dtype too fails for another reason."""
    with pytest.raises(ModelError, match="the model failed on 2 made-up rows"):
        ask(model, ((5, 3), "float64"))


def test_dtype_given_is_not_second_guessed() -> None:
    """Where the caller chose a dtype, the network's own error is shown."""
    with pytest.raises(ModelError, match="must have the same dtype"):
        ask(nn.Linear(3, 2), dtype="float64")


def test_dtype_of_unknown_port() -> None:
    """A dtype for a port that there is not is refused, also where output= is given."""
    with pytest.raises(OptionError, match="dtype names the port 'imag'; the input's are 'image', 'meta'"):
        ask(nn.Identity(), {"image": ((2,), "f4"), "meta": ((2,), "f4")}, dtype={"imag": "float32"}, output=np.empty((0, 1)))


def test_dtype_of_preprocessed_port() -> None:
    """With a preprocess the ports that dtype names are those that it makes."""
    promised = ask(Do(lambda a: a), dtype={"a": "float64"}, preprocess=lambda x: {"a": x})
    assert looks(promised) == [((0, 3), "float64")]


def test_dtype_unknown() -> None:
    """A dtype that there is not is refused before anything runs."""
    with pytest.raises(OptionError, match="'flot32', which torch has not"):
        ask(nn.Linear(3, 2), dtype="flot32")


def test_refused_by_the_public_functions() -> None:
    """predict, plan and map_blocks say the same."""
    for function in (di.plan, di.predict, di.map_blocks):
        with pytest.raises(di.DaskInferError, match="x is float64, the net is float32: pass dtype='float32'"):
            function(nn.Linear(3, 2), np.ones((4, 3)), **({} if function is di.map_blocks else {"devices": "inline"}))


def test_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many dtypes are tried, the network is loaded once."""
    loads = []
    of = LoadedModel.from_model
    monkeypatch.setattr(LoadedModel, "from_model", lambda *args: loads.append(1) or of(*args))
    with pytest.raises(InputError, match="pass dtype"):
        ask(nn.Linear(3, 2), ((5, 3), "float64"))
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
    """A fill value that an output cannot hold is refused by the output's name, unless no row may fail."""
    outputs = (np.empty(0), np.empty((0, 3), dtype))
    wanted = output_spec.OutputSpec(flatten({"a": outputs[0], "b": outputs[1]})[1], outputs)
    output_spec.check_fill_value(Options(fill_value=value), wanted)
    options = Options(fill_value=value, on_error="skip")
    if holds:
        output_spec.check_fill_value(options, wanted)
        return
    with pytest.raises(OptionError, match=f"the output b is {outputs[1].dtype}, which cannot hold .* fill_value=0"):
        output_spec.check_fill_value(options, wanted)
