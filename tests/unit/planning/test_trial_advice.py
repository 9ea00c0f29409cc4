"""If an input's axes or dtype are at fault, the error says what to type, and that works."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from torch import nn

import daskinfer as di
from daskinfer.errors import ChunkError, InputError, ModelError

IMAGES = np.random.default_rng(0).random((6, 9, 8, 3), np.float32)  # channels last
META = np.arange(6, dtype=np.float32)
FOR_THE_COMMAND = r" \(for the command, a factory whose model does so\)"
CURE = r"axis (\d) of (\S+) is (\d+), the first layer takes (\d+) \w+: did you mean (.*)\?$"


class Classifier(nn.Module):
    """Channels-first images, and perhaps a number for each, to scores."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7 * 6, 2))

    def forward(self, image: torch.Tensor, meta: torch.Tensor | float = 0.0) -> torch.Tensor:
        return self.layers(image) + torch.as_tensor(meta).reshape(-1, 1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A model of images."""
    torch.manual_seed(0)
    return Classifier()


def predict(*args: Any, **fields: Any) -> Any:
    """Predict in this process."""
    return di.predict(*args, devices="inline", **fields)


def get_cure(model: Any, x: Any, message: str = CURE, **fields: Any) -> str:
    """Return the code that the error shows."""
    with pytest.raises(InputError, match=message) as refused:
        predict(model, x, **fields)
    found = re.search(message, str(refused.value))
    assert found is not None
    return found.groups()[-1]


def compute(model: nn.Module, images: np.ndarray, meta: Any = 0.0) -> np.ndarray:
    """Return what plain torch computes of channels-last images."""
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.as_tensor(meta)).numpy()


FORMS = {
    "array": lambda: IMAGES,
    "tensor": lambda: torch.from_numpy(IMAGES),
    "list": IMAGES.tolist,
    "dask": lambda: da.from_array(IMAGES, chunks=(2, 9, 8, 3)),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_with_channels_last(model: nn.Module, form: str) -> None:
    """Images with their channels on the last axis are refused, and the code in the message moves them."""
    x = FORMS[form]()
    code = get_cure(model, x, r"^axis 1 of x is 9, the first layer takes 3 channels: did you mean ()(.*)\?$")
    np.testing.assert_allclose(predict(model, eval(code, {"x": x, "np": np})), compute(model, IMAGES), atol=1e-6)


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_images_in_files(model: nn.Module, in_folder: Path, suffix: str) -> None:
    """For rows that are in a file, the change is a preprocess."""
    da.to_zarr(da.from_array(IMAGES), "x.zarr") if suffix == ".zarr" else np.save("x.npy", IMAGES)
    keyword, code = get_cure(model, f"x{suffix}", rf"^axis 1 of x is 9, .*did you mean (.*){FOR_THE_COMMAND}\?$").split(
        "=", 1
    )
    assert di.run(model, f"x{suffix}", "y.npy", devices="inline", **{keyword: eval(code)}).rows == 6
    np.testing.assert_allclose(np.load("y.npy"), compute(model, IMAGES), atol=1e-6)


@pytest.mark.parametrize("kind", [dict, tuple])
def test_one_port_of_several(model: nn.Module, in_folder: Path, kind: type) -> None:
    """The message names the port whose axes are at fault, and its code changes that port alone, in memory or in a file."""
    np.save("x.npy", IMAGES)
    ports: Any = {"image": IMAGES, "meta": META} if kind is dict else (IMAGES, META)
    name, first = ("image", "image") if kind is dict else (r"x\[0\]", 0)
    code = get_cure(model, ports, rf"^axis 1 of ({name}) is 9, .*did you mean (.*)\?$")
    changed = eval(code, ports if kind is dict else {"x": ports})
    assert changed.shape == (6, 3, 9, 8)
    in_file: Any = {"image": "x.npy", "meta": META} if kind is dict else ("x.npy", META)
    message = rf"^axis 1 of ({name}) is 9, .*did you mean (.*){FOR_THE_COMMAND}\?$"
    keyword, code = get_cure(model, in_file, message).split("=", 1)
    np.testing.assert_allclose(predict(model, in_file, **{keyword: eval(code)}), compute(model, IMAGES, META), atol=1e-6)
    assert in_file[first] == "x.npy"


def test_bytes_with_channels_last(model: nn.Module) -> None:
    """If the dtype is at fault as well, the axes are named first and the dtype then; both cures together work."""
    x = (IMAGES * 255).astype(np.uint8)
    moved = eval(get_cure(model, x), {"x": x})
    with pytest.raises(InputError, match=r"^x is uint8, but the model is float32\. Pass dtype='float32'"):
        predict(model, moved)
    assert predict(model, moved, dtype=torch.float32).shape == (6, 2)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_preprocess_returns_channels_last(model: nn.Module, as_tensor: bool) -> None:
    """If preprocess returns images with channels last, the message says what to return, of an array or a tensor."""
    x = (IMAGES * 255).astype(np.uint8)

    def scale(a: np.ndarray) -> Any:
        return torch.from_numpy(a) / 255 if as_tensor else a / np.float32(255)

    pattern = r"^axis 1 of (x) from preprocess is 9, the first layer takes 3 channels: did you mean to return (.*)\?$"
    code = get_cure(model, x, pattern, preprocess=scale)
    moved = predict(model, x, preprocess=lambda a: eval(code, {"x": scale(a)}))
    np.testing.assert_allclose(moved, compute(model, x / np.float32(255)), atol=1e-5)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "Conv1d": (lambda: nn.Conv1d(5, 2, 3), (20, 5), "axis 1 of x is 20, the first layer takes 5 channels"),
    "Conv3d": (lambda: nn.Conv3d(2, 2, 3), (9, 8, 7, 2), "axis 1 of x is 9, the first layer takes 2 channels"),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(5), (20, 5), "axis 1 of x is 20, the first layer takes 5 channels"),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(5), (9, 8, 5), "axis 1 of x is 9, the first layer takes 5 channels"),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (9, 4), "axis 1 of x is 9, the first layer takes 4 channels"),
    "Linear": (lambda: nn.Linear(5, 2), (5, 20), "axis 2 of x is 20, the first layer takes 5 features"),
    "flat images": (lambda: nn.Linear(56, 2), (1, 8, 7), "axis 3 of x is 7, the first layer takes 56 features"),
    "no channels": (lambda: nn.Conv2d(1, 2, 3), (9, 8), "x has no axis of channels, the first layer takes 1 channel"),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer: str) -> None:
    """Every kind of layer that takes a certain size is recognised, on the axis on which it takes it."""
    make, shape, message = LAYERS[layer]
    x, net = np.ones((6, *shape), np.float32), make()
    code = get_cure(net, x, rf"^({re.escape(message)}): did you mean (.*)\?$")
    with torch.inference_mode():
        expected = net.eval()(torch.from_numpy(np.ascontiguousarray(eval(code, {"x": x}))))
    np.testing.assert_allclose(predict(net, eval(code, {"x": x})), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(3, 4, 3), (9, 8, 4)),  # no axis has the size
        (lambda: nn.Linear(5, 2), (6,)),
        (lambda: nn.Conv2d(3, 4, 3), (9, 8)),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(7, 2)), (3, 9, 8)),  # not the first layer
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(7, 2)), (9, 8, 3)),  # moving it is not enough
    ],
)
def test_nothing_is_proposed_that_does_not_work(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """If no order of axes makes the model run, its own error is shown."""
    with pytest.raises(ModelError, match=r"^the model failed on 2 rows of zeros .*RuntimeError"):
        predict(make(), np.ones((6, *shape), np.float32))


@pytest.mark.parametrize(
    ("step", "function", "message"),
    [
        (
            "preprocess",
            lambda a: a.float() / 255,
            r"AttributeError: .* it is given ndarrays: torch\.from_numpy\(a\)",
        ),
        (
            "postprocess",
            lambda a: a.softmax(1),
            r"AttributeError: .* it is given ndarrays: torch\.from_num",
        ),
        (
            "preprocess",
            lambda a: 1 / 0,
            r"ZeroDivisionError: division by zero, on 2 rows of zeros .* output=",
        ),
    ],
)
def test_a_step_that_fails_in_the_trial(model: nn.Module, step: str, function: Any, message: str) -> None:
    """In the trial too, an error of preprocess or postprocess is told as its own, and its frames are the cause's."""
    x = np.ones((6, 3, 9, 8), np.float32)
    with pytest.raises(ModelError, match=f"^{step} raised {message}") as failed:
        predict(model, x, **{step: function})
    assert isinstance(failed.value.__cause__, AttributeError | ZeroDivisionError)


def test_preprocess_returns_another_dtype(model: nn.Module) -> None:
    """A dtype that preprocess made is told as its own, and both cures work."""
    x = np.ones((6, 3, 9, 8), np.uint8)
    message = r"^preprocess returned float64, but the model is float32\. Return float32 from it, or pass dtype='float32'"
    with pytest.raises(InputError, match=message):
        predict(model, x, preprocess=lambda a: a / 255)
    returned = predict(model, x, preprocess=lambda a: (a / 255).astype("float32"))
    np.testing.assert_allclose(predict(model, x, preprocess=lambda a: a / 255, dtype="float32"), returned, atol=1e-6)


def test_one_port_of_preprocess_has_another_dtype(model: nn.Module) -> None:
    """Of several ports, each is named with its dtype, and the cast names the one at fault."""
    x = np.ones((6, 3, 9, 8), np.uint8)
    message = r"preprocess returned image as float64, meta as float32, .* pass dtype=\{'image': 'float32'\}"
    with pytest.raises(InputError, match=message):
        predict(model, x, preprocess=lambda a: {"image": a / 255, "meta": a[:, 0, 0, 0].astype("f4")})


def test_the_rows_of_the_trial_are_not_named() -> None:
    """What is refused in the trial names no rows and no device: they are not the caller's."""
    with pytest.raises(ModelError, match=r"^the model returned y of shape \(\) for 2 rows"):
        predict(lambda x: x.sum(), META)


@pytest.mark.parametrize("step", ["preprocess", "postprocess"])
def test_a_step_that_fails_on_a_worker(two_cpus: list[str], step: str) -> None:
    """An error of a step on a worker is told as its own, with the cure."""
    message = (
        rf"failed: {step} raised AttributeError: .*'float'; it is given ndarrays: torch\.from_numpy\(a\) makes a tensor"
    )
    with pytest.raises(ChunkError, match=message):
        di.predict(np.negative, META, devices=two_cpus, output=np.empty(0, "f4"), **{step: lambda a: a.float()})
