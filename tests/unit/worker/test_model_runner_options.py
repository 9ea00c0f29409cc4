from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from daskinfer.errors import ModelError, OptionError
from tests.unit.worker.test_model_runner import PROMISED, Do, Recorder, X, result, run


def test_dtype() -> None:
    """The rows are cast on their way."""
    np.testing.assert_array_equal(result(nn.Identity(), X, dtype="float64"), X.astype("float64"), strict=True)


def test_dtype_bfloat16() -> None:
    """torch casts to what NumPy lacks."""
    net = Recorder()
    run(net, X, dtype="bfloat16")
    assert {x.dtype for x in net.seen} == {torch.bfloat16}


def test_dtype_by_torch_names() -> None:
    """A name that means one dtype to torch and another to NumPy is torch's for modules."""
    assert result(nn.Identity(), X.astype("float64"), dtype="float").dtype == "float32"
    assert result(lambda x: x, X, dtype="float").dtype == "float64"


def test_dtype_per_port() -> None:
    """A mapping casts the ports that it names."""
    x = {"a": X, "b": X}
    mirrored = result(Do(lambda a, b: (a, b)), x, dtype={"b": "float16"})
    assert [y.dtype for y in mirrored] == ["float32", "float16"]


def test_dtype_by_name_whatever_the_order() -> None:
    """A preprocess may name its ports in another order each time; each is cast as its own name says."""
    ports = iter((("a", "b"), ("b", "a"), ("a", "b")))
    net = Do(lambda a, b: (a, b))
    first, second = result(net, X, preprocess=lambda x: dict.fromkeys(next(ports), x), dtype={"b": "float64"})
    assert (first.dtype, second.dtype) == ("float32", "float64")


@pytest.mark.parametrize("dtype", ["flot32", "longdouble", "nn", "S3"])
def test_dtype_unknown_to_torch(dtype: str) -> None:
    """A dtype that torch has not is refused by name."""
    with pytest.raises(OptionError, match=f"dtype of x is '{dtype}', which torch has not"):
        run(Recorder(), X, dtype=dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "flot32", "object"])
def test_dtype_unknown_to_numpy(dtype: str) -> None:
    """A dtype that NumPy has not is refused for what gets ndarrays."""
    with pytest.raises(OptionError, match=f"dtype of x is '{dtype}'; a model that is no nn.Module gets ndarrays"):
        run(lambda x: x, X, dtype=dtype)


def test_autocast() -> None:
    """Under autocast the network computes in that precision; the answer has the planned dtype."""
    net = nn.Linear(3, 2)
    with torch.autocast("cpu", torch.float16), torch.inference_mode():
        expected = net(torch.from_numpy(X)).float()
    planned = (np.empty((0, 2), "float32"),)
    np.testing.assert_allclose(result(net, X, autocast="fp16", outputs=planned), expected, rtol=1e-2, atol=1e-2)
    assert result(net, X, autocast="fp16").dtype == "float16"
    assert result(net, X, autocast="bf16").dtype == "float32"


def test_autocast_keeps_promises() -> None:
    """Autocast excuses no other answer than the planned one."""
    with pytest.raises(ModelError, match="was planned"):
        run(nn.Linear(3, 2), X, autocast="bf16", outputs=(np.empty((0, 2), "int64"),))
    with pytest.raises(ModelError, match="was planned"):
        run(nn.Linear(3, 2), X, autocast="bf16", outputs=PROMISED.values())


def test_preprocess() -> None:
    """A preprocess gets each micro-batch's rows, without padding, and may change their shape and dtype."""
    lengths = []

    def flip(x: np.ndarray) -> np.ndarray:
        lengths.append(len(x))
        return x[:, ::-1].astype("float64")

    np.testing.assert_array_equal(result(nn.Identity(), X, preprocess=flip), X[:, ::-1].astype("float64"), strict=True)
    assert lengths == [4, 4, 2]


def test_preprocess_makes_ports() -> None:
    """A preprocess may make ports: a dict names them, also for dtype=, and tensors are arrays."""
    net = Do(lambda a, b: (a, b))
    answer = result(net, X, preprocess=lambda x: {"a": torch.from_numpy(x).requires_grad_(), "b": x}, dtype={"b": "float64"})
    assert [y.dtype for y in answer] == ["float32", "float64"]


def test_preprocess_takes_ports() -> None:
    """A preprocess gets the ports as the network would."""
    add = lambda a, b: a + b  # noqa: E731  # the shortest network of two ports
    np.testing.assert_array_equal(result(nn.Identity(), {"b": X, "a": X}, preprocess=add), X + X)


@pytest.mark.parametrize(
    ("preprocess", "said"),
    [
        (lambda x: x[:-1], r"preprocess returned x of shape \(3, 3\) for 4 rows"),
        (lambda x: (x, x.sum()), r"preprocess returned x\[1\] of shape \(\) for 4 rows"),
        (lambda x: None, r"preprocess returned x of shape \(\) for 4 rows"),
        (lambda x: {}, "preprocess returned no array"),
    ],
)
def test_preprocess_bad(preprocess: Callable[..., Any], said: str) -> None:
    """A preprocess that does not give one entry per row is refused."""
    with pytest.raises(ModelError, match=said):
        run(Recorder(), X, preprocess=preprocess)


def test_postprocess() -> None:
    """A postprocess gets the answer in its structure, as arrays without padding; what it returns is the answer."""
    best = result(Do(lambda x: {"y": x}), X, start=3, postprocess=lambda answer: answer["y"].argmax(1))
    np.testing.assert_array_equal(best, X.argmax(1))


def test_postprocess_in_place() -> None:
    """A postprocess may work in place."""
    np.testing.assert_array_equal(result(nn.Identity(), X, postprocess=lambda y: np.multiply(y, 2, out=y)), 2 * X)


@pytest.mark.parametrize(
    ("postprocess", "said"),
    [
        (lambda y: y.mean(), r"postprocess returned y of shape \(\) for 4 rows"),
        (lambda y: "label", "postprocess returned a str"),
        (lambda y: (), "postprocess returned no array"),
    ],
)
def test_postprocess_bad(postprocess: Callable[..., Any], said: str) -> None:
    """A postprocess that does not give one entry per row is refused."""
    with pytest.raises(ModelError, match=said):
        run(Recorder(), X, postprocess=postprocess)
