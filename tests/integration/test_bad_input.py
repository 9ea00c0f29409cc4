"""What cannot work is refused before anything starts; the autouse fixture sees that nothing did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch

import daskinfer as di
from daskinfer.cluster import placement
from daskinfer.errors import PlanError
from daskinfer.hardware.discovery import Device, Machine

X = np.ones((20, 5), np.float32)
NET = torch.nn.Linear(5, 2)
TWO_GPUS = Machine(
    gpus=tuple(Device(f"cuda:{i}", "cuda", i, uuid=f"GPU-{i}", label="L4") for i in range(2)),
    n_cores=4,
    memory_nbytes=8 << 30,
    driver="580.65",
    driver_cuda=(13, 0),
)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, as NVML would report it."""
    monkeypatch.setattr(placement, "machine", lambda: TWO_GPUS)


def test_unknown_device() -> None:
    """A word outside the device language is named, with what is allowed."""
    with pytest.raises(di.DaskInferError, match=r"tpu.*allowed"):
        di.predict(NET, X, devices="tpu")


def test_the_same_gpu_twice(gpus: None) -> None:
    """A GPU cannot have two workers."""
    with pytest.raises(di.DaskInferError, match="cuda:1"):
        di.plan(NET, X, devices=["cuda:1", "GPU-1"])


def test_gpus_that_a_cpu_build_of_torch_cannot_drive(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With GPUs there and a CPU build of torch, "auto" is an error that names the cure, never a silent CPU."""
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(di.DaskInferError, match=r"cuda:0.*cuda13"):
        di.plan(NET, X)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1, 2, 3], "3 entries for 2 devices"),
        ([1, -1], "weight of cpu:1 is -1"),
        ([1, float("nan")], "weight of cpu:1 is nan"),
        ([0, 0], "all 0"),
        ({"cuda": 1, "cpu": 1}, "'cuda' that matches no device"),
    ],
)
def test_weights(weights: Any, said: str) -> None:
    """Weights that fit no device, or say nothing, are refused."""
    with pytest.raises(di.DaskInferError, match=said):
        di.predict(NET, X, devices="cpu*2", device_weights=weights)


@pytest.mark.parametrize("size", [0, -3, 2.5, "many", True])
def test_batch_size(size: Any) -> None:
    """A micro-batch has a whole number of rows."""
    with pytest.raises(di.DaskInferError, match="batch_size is"):
        di.predict(NET, X, batch_size=size)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        ({"a": X, "b": X[:7]}, "a has 20 rows, b has 7 rows"),
        (np.float32(3), "0-d"),
        (np.array(["a", "b"]), "holds <U1; numbers are needed"),
        (np.array([None, 1]), "holds object; numbers are needed"),
        ([[1.0], [1.0, 2.0]], "cannot be read as an array"),
        ({}, "no ports"),
        (da.ones((9, 5), chunks=3)[da.ones(9, chunks=3) > 0], "unknown chunks"),
        ("x.csv", "ends in '.csv'; it may end in .npy or .zarr"),
        ("nowhere.npy", "does not exist"),
        (X.astype(np.float64), "x is float64, the net is float32: pass dtype='float32'"),
        (np.ones((4, 5), np.uint8), "x is uint8, the net is float32: pass dtype='float32'"),
        (np.ones((4, 6), np.float32), "failed on 2 made-up rows"),
    ],
)
def test_inputs(x: Any, said: str) -> None:
    """Inputs that are no arrays of numbers with rows, or that the network cannot take, are refused."""
    with pytest.raises(di.DaskInferError, match=said):
        di.predict(NET, x)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda x: x[:1], r"the model returned y of shape \(1, 5\) for 2 rows"),
        (lambda x: x.sum(), r"the model returned y of shape \(\) for 2 rows"),
        (lambda x: "cat", "returned a str"),
        (lambda x: None, "returned no array"),
        (7, "is a int, which cannot be called"),
        ("nowhere.nets:make", "cannot be imported"),
        ("os:no_such_factory", "cannot be imported"),
        ("net.onnx", "neither a file ending in"),
        ("missing.pt2", "does not exist"),
        (di.Model("w.safetensors"), "a factory has to make the network"),
    ],
)
def test_models(model: Any, said: str) -> None:
    """Models that cannot be found or called, or whose answers are no rows, are refused."""
    with pytest.raises(di.DaskInferError, match=said):
        di.predict(model, X)


@pytest.mark.parametrize("fields", [{"autocast": "fp8"}, {"preprocess": 3}, {"dtype": 4}, {"pad": "yes"}, {"output": 3}])
def test_options(fields: Any) -> None:
    """An option outside what is allowed is refused with its name."""
    with pytest.raises(di.DaskInferError, match=next(iter(fields))):
        di.predict(NET, X, **fields)


def test_unknown_option() -> None:
    """A misspelt keyword is a TypeError, as in any function."""
    with pytest.raises(TypeError, match="autocats"):
        di.predict(NET, X, autocats="bf16")


def test_output_exists(in_folder: Path) -> None:
    """Nothing is ever overwritten."""
    np.save("x.npy", X)
    np.save("y.npy", X)
    with pytest.raises(FileExistsError, match=r"y\.npy' exists already"):
        di.run(NET, "x.npy", "y.npy")


def test_output_inside_the_input(in_folder: Path) -> None:
    """An input store is never written to."""
    Path("x.zarr").mkdir()
    with pytest.raises(di.DaskInferError, match="lies inside the input"):
        di.run(NET, "x.zarr", "x.zarr/y.zarr")


@pytest.mark.parametrize(
    ("target", "said"),
    [("y.csv", "ends in '.csv'"), ("no/y.npy", "folder"), ({"logits": "y.npy"}, "outputs named are logits")],
)
def test_targets(in_folder: Path, target: Any, said: str) -> None:
    """Outputs that cannot be created, or that the network does not have, are refused."""
    np.save("x.npy", X)
    with pytest.raises(di.DaskInferError, match=said):
        di.run(NET, "x.npy", target)


def test_one_path_for_two_outputs(in_folder: Path) -> None:
    """A network with several outputs needs a path for each."""
    np.save("x.npy", X)
    with pytest.raises(di.DaskInferError, match="2 outputs \\(a, b\\)"):
        di.run(lambda x: {"a": x, "b": x}, "x.npy", "y.npy")


def test_all_reasons_at_once(in_folder: Path) -> None:
    """A plan lists everything that has to change."""
    with pytest.raises(PlanError, match="for 5 reasons") as refused:
        di.plan("nowhere:make", "x.npy", target="y.csv", devices="tpu", batch_size=0)
    assert len(refused.value.reasons) == 5


def test_what_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that cannot fit is refused with the batch size that would."""
    monkeypatch.setattr(placement, "machine", lambda: Machine(n_cores=1, memory_nbytes=1 << 20))
    wide = np.broadcast_to(np.float32(0), (64, 4, 1 << 14))
    with pytest.raises(di.DaskInferError, match=r"needs .* on cpu:0 at batch_size=64; .* is free\. Use batch_size="):
        di.plan(np.negative, wide, devices="cpu", batch_size=64)
