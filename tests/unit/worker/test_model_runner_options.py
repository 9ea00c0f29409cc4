"""Options that change what the model gets and returns: dtype, autocast, preprocess, postprocess."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from daskinfer.errors import ModelError, OptionError
from tests.unit.worker.test_model_runner import WRONG_PLANS, Do, Recorder, X, result, run


def test_dtype() -> None:
    """Rows are cast on their way to the model."""
    np.testing.assert_array_equal(result(nn.Identity(), X, dtype="float64"), X.astype("float64"), strict=True)


def test_dtype_bfloat16() -> None:
    """torch casts to dtypes that NumPy lacks."""
    net = Recorder()
    run(net, X, dtype="bfloat16")
    assert {x.dtype for x in net.seen} == {torch.bfloat16}


def test_dtype_by_torch_names() -> None:
    """A name that means one dtype to torch and another to NumPy has torch's meaning for modules."""
    assert result(nn.Identity(), X.astype("float64"), dtype="float").dtype == "float32"
    assert result(lambda x: x, X, dtype="float").dtype == "float64"


def test_dtype_per_port() -> None:
    """A mapping casts the ports that it names."""
    x = {"a": X, "b": X}
    mirrored = result(Do(lambda a, b: (a, b)), x, dtype={"b": "float16"})
    assert [y.dtype for y in mirrored] == ["float32", "float16"]


def test_dtype_by_name_whatever_the_order() -> None:
    """A preprocess may return its ports in another order each time; each is cast as its name says."""
    ports = iter((("a", "b"), ("b", "a"), ("a", "b")))
    net = Do(lambda a, b: (a, b))
    first, second = result(net, X, preprocess=lambda x: dict.fromkeys(next(ports), x), dtype={"b": "float64"})
    assert (first.dtype, second.dtype) == ("float32", "float64")


@pytest.mark.parametrize("dtype", ["flot32", "longdouble", "nn", "S3"])
def test_dtype_unknown_to_torch(dtype: str) -> None:
    """A dtype that torch lacks is refused by name."""
    message = rf"dtype of x \(--dtype\) must be the name of a torch dtype such as 'float32', got '{dtype}'"
    with pytest.raises(OptionError, match=message):
        run(Recorder(), X, dtype=dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "flot32", "object"])
def test_dtype_unknown_to_numpy(dtype: str) -> None:
    """A dtype that NumPy lacks is refused for models that get ndarrays."""
    message = rf"dtype of x \(--dtype\) must be the name of a numeric NumPy dtype .* got '{dtype}'"
    with pytest.raises(OptionError, match=message):
        run(lambda x: x, X, dtype=dtype)


def test_autocast() -> None:
    """Under autocast the model computes in that precision; the output has the planned dtype."""
    net = nn.Linear(3, 2)
    with torch.autocast("cpu", torch.float16), torch.inference_mode():
        expected = net(torch.from_numpy(X)).float()
    planned = (np.empty((0, 2), "float32"),)
    np.testing.assert_allclose(result(net, X, autocast="fp16", outputs=planned), expected, rtol=1e-2, atol=1e-2)
    assert result(net, X, autocast="fp16").dtype == "float16"
    assert result(net, X, autocast="bf16").dtype == "float32"


def test_autocast_keeps_to_the_plan() -> None:
    """Autocast changes the precision of the planned output, and nothing else about it."""
    with pytest.raises(ModelError, match="was planned"):
        run(nn.Linear(3, 2), X, autocast="bf16", outputs=(np.empty((0, 2), "int64"),))
    with pytest.raises(ModelError, match="was planned"):
        run(nn.Linear(3, 2), X, autocast="bf16", outputs=WRONG_PLANS.values())


def test_preprocess() -> None:
    """A preprocess gets each micro-batch's rows, without padding, and may change their shape and dtype."""
    lengths = []

    def flip(x: np.ndarray) -> np.ndarray:
        lengths.append(len(x))
        return x[:, ::-1].astype("float64")

    np.testing.assert_array_equal(result(nn.Identity(), X, preprocess=flip), X[:, ::-1].astype("float64"), strict=True)
    assert lengths == [4, 4, 2]


def test_preprocess_makes_ports() -> None:
    """A preprocess may return ports: a dict names them, also for dtype=, and tensors count as arrays."""
    net = Do(lambda a, b: (a, b))
    output = result(net, X, preprocess=lambda x: {"a": torch.from_numpy(x).requires_grad_(), "b": x}, dtype={"b": "float64"})
    assert [y.dtype for y in output] == ["float32", "float64"]


def test_preprocess_takes_ports() -> None:
    """A preprocess gets the ports as the model would."""
    add = lambda a, b: a + b  # noqa: E731  # the shortest model of two ports
    np.testing.assert_array_equal(result(nn.Identity(), {"b": X, "a": X}, preprocess=add), X + X)


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        (lambda x: x[:-1], r"preprocess returned x of shape \(3, 3\) for 4 rows"),
        (lambda x: (x, x.sum()), r"preprocess returned x\[1\] of shape \(\) for 4 rows"),
        (lambda x: None, r"preprocess returned x of shape \(\) for 4 rows"),
        (lambda x: {}, "preprocess returned no array"),
    ],
)
def test_preprocess_bad(preprocess: Callable[..., Any], message: str) -> None:
    """A preprocess that does not return one entry per row is refused."""
    with pytest.raises(ModelError, match=message):
        run(Recorder(), X, preprocess=preprocess)


def test_postprocess() -> None:
    """A postprocess gets the output in its structure, as arrays without padding, and returns the final output."""
    best = result(Do(lambda x: {"y": x}), X, start=3, postprocess=lambda output: output["y"].argmax(1))
    np.testing.assert_array_equal(best, X.argmax(1))


def test_postprocess_in_place() -> None:
    """A postprocess may work in place."""
    np.testing.assert_array_equal(result(nn.Identity(), X, postprocess=lambda y: np.multiply(y, 2, out=y)), 2 * X)


@pytest.mark.parametrize(
    ("postprocess", "message"),
    [
        (lambda y: y.mean(), r"postprocess returned y of shape \(\) for 4 rows"),
        (lambda y: "label", "postprocess returned a str"),
        (lambda y: (), "postprocess returned no array"),
    ],
)
def test_postprocess_bad(postprocess: Callable[..., Any], message: str) -> None:
    """A postprocess that does not return one entry per row is refused."""
    with pytest.raises(ModelError, match=message):
        run(Recorder(), X, postprocess=postprocess)
