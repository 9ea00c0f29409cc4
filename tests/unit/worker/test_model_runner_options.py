"""Options that change what the model gets and returns: dtype, autocast, preprocess, postprocess."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from daskinfer.errors import ChunkError, ModelError, OptionError
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


@pytest.mark.parametrize(
    ("model", "dtype", "message"),
    [
        (Recorder(), "flot32", "torch has no dtype 'flot32'"),
        (Recorder(), "bflot16", "torch has no dtype 'bflot16'"),
        (Recorder(), "longdouble", "torch has no dtype 'longdouble'"),
        (Recorder(), "nn", "torch has no dtype 'nn'"),
        (Recorder(), "S3", "torch has no dtype 'S3'"),
        (np.negative, "bfloat16", "NumPy has no numeric dtype 'bfloat16', and a model that is no module gets ndarrays"),
        (np.negative, "flot32", "NumPy has no numeric dtype 'flot32'"),
        (np.negative, "object", "NumPy has no numeric dtype 'object'"),
    ],
)
def test_an_unknown_dtype(model: Any, dtype: str, message: str) -> None:
    """A dtype that the model cannot get is refused with one whose name is alike, and which works."""
    with pytest.raises(OptionError, match=rf"{message}.*; did you mean '\w+' for x \(--dtype\)\?$") as refused:
        run(model, X, dtype=dtype)
    (meant,) = re.findall(r"did you mean '(\w+)'", str(refused.value))
    assert meant == {"bflot16": "bfloat16", "longdouble": meant, "bfloat16": "float16"}.get(dtype, "float32")
    run(model, X, dtype=meant)


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


@pytest.mark.parametrize("step", ["preprocess", "postprocess"])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda a: a.float(),
            r"{step} raised AttributeError: 'numpy\.ndarray' object has no attribute 'float'; it is given ndarrays: "
            r"torch\.from_numpy\(a\) makes a tensor\.",
        ),
        (lambda a: torch.relu(a), r"{step} raised TypeError: .*must be Tensor, not numpy\.ndarray; it is given ndarrays"),
        (lambda a: a.no_such, r"{step} raised AttributeError: [^;]*no attribute 'no_such'\. For the traceback"),
        (lambda a: 1 / 0, r"{step} raised ZeroDivisionError: division by zero\. For the traceback"),
    ],
)
def test_a_step_that_raises_is_named(step: str, function: Callable[..., Any], message: str) -> None:
    """An error of preprocess or postprocess is told as its own, and keeps its type; a tensor's methods name the cure."""
    with pytest.raises(ChunkError, match=rf"^rows 0:1 on cpu failed: {message.format(step=step)}") as failed:
        run(nn.Identity(), X, **{step: function})
    assert isinstance(failed.value.__cause__, AttributeError | TypeError | ZeroDivisionError)


def test_the_cure_of_a_step_works() -> None:
    """What a step is told to call makes a tensor, of which it may return anything."""
    output = result(nn.Identity(), X, preprocess=lambda a: torch.from_numpy(a).double(), postprocess=lambda y: y.sum(1))
    np.testing.assert_array_equal(output, X.astype("f8").sum(1), strict=True)


def test_rows_that_a_step_fails_on_are_skipped() -> None:
    """With on_error="skip", the reason of a row says which step failed on it."""

    def refuse_three(x: np.ndarray) -> np.ndarray:
        if (x[:, 0] == X[3, 0]).any():
            raise ValueError("three")
        return x

    output = run(nn.Identity(), X, preprocess=refuse_three, on_error="skip", retries=0)
    assert output.failed_rows == {3: "preprocess raised ValueError: three"}


def test_a_model_that_fails_is_not_a_step() -> None:
    """An error of the model is told as the model's; that preprocess returned another dtype than its own is added."""
    with pytest.raises(ChunkError, match=r"failed: RuntimeError: broken\. For the traceback"):
        run(Do(fail), X, preprocess=np.negative)
    message = r"failed: RuntimeError: .*; preprocess returned float64, but the model is float32\. For the traceback"
    with pytest.raises(ChunkError, match=message):
        run(nn.Linear(3, 2), X, preprocess=lambda x: x.astype("f8"))


def fail(x: torch.Tensor) -> torch.Tensor:
    """Raise an error."""
    raise RuntimeError("broken")


def test_preprocess_of_text() -> None:
    """A module gets numbers only; a function may get anything that preprocess returns."""
    words = np.array(["a", "bc", "", "d"])
    with pytest.raises(ModelError, match=r"preprocess returned x of dtype <U2; a module takes numbers"):
        run(nn.Identity(), X, preprocess=lambda x: words[: len(x)])
    lengths = result(lambda words: np.char.str_len(words), X[:4], preprocess=lambda x: words[: len(x)])
    np.testing.assert_array_equal(lengths, [1, 2, 0, 1])


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
