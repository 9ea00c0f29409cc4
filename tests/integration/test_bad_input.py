"""What cannot work is refused before anything starts; an autouse fixture checks that nothing did."""

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
MODEL = torch.nn.Linear(5, 2)
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
    monkeypatch.setattr(placement, "inspect_machine", lambda: TWO_GPUS)


def test_unknown_device() -> None:
    """An unknown device is named, with the allowed ones."""
    with pytest.raises(di.DaskInferError, match=r"tpu.*allowed"):
        di.predict(MODEL, X, devices="tpu")


def test_the_same_gpu_twice(gpus: None) -> None:
    """A GPU cannot have two workers."""
    with pytest.raises(di.DaskInferError, match="cuda:1"):
        di.plan(MODEL, X, devices=["cuda:1", "GPU-1"])


def test_gpus_that_a_cpu_build_of_torch_cannot_drive(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With GPUs and a CPU build of torch, "auto" is an error that names the cure, never a silent fallback to the CPU."""
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(di.DaskInferError, match=r"cuda:0.*cuda13"):
        di.plan(MODEL, X)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2, 3], "3 entries for 2 devices"),
        ([1, -1], "weight of cpu:1 must be finite and >= 0, got -1"),
        ([1, float("nan")], "weight of cpu:1 must be finite and >= 0, got nan"),
        ([0, 0], "all 0"),
        ({"cuda": 1, "cpu": 1}, "'cuda' that matches none of the devices"),
    ],
)
def test_weights(weights: Any, message: str) -> None:
    """Weights that match no device, or are all 0, are refused."""
    with pytest.raises(di.DaskInferError, match=message):
        di.predict(MODEL, X, devices="cpu*2", device_weights=weights)


@pytest.mark.parametrize("size", [0, -3, 2.5, "many", True])
def test_batch_size(size: Any) -> None:
    """A batch size is a positive integer or "auto"."""
    with pytest.raises(di.DaskInferError, match="batch_size must be 'auto' or an integer >= 1"):
        di.predict(MODEL, X, batch_size=size)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ({"a": X, "b": X[:7]}, "a has 20 rows, b has 7 rows"),
        (np.float32(3), "0-d"),
        (np.array(["a", "b"]), "x holds text, such as 'a'"),
        (np.array([None, 1]), "x must hold numbers .*, got dtype object"),
        ([[1.0], [1.0, 2.0]], "x holds rows of unlike length, 1 to 2"),
        ({}, "no ports"),
        (da.ones((9, 5), chunks=3)[da.ones(9, chunks=3) > 0], "unknown chunk sizes"),
        ("x.csv", "must end in .npy or .zarr, got '.csv'"),
        ("nowhere.npy", "does not exist"),
        (X.astype(np.float64), "x is float64, but the model is float32. Pass dtype='float32'"),
        (np.ones((4, 5), np.uint8), "x is uint8, but the model is float32. Pass dtype='float32'"),
        (np.ones((4, 6), np.float32), "failed on 2 rows of zeros"),
    ],
)
def test_inputs(x: Any, message: str) -> None:
    """Inputs that are no arrays of numbers with rows, or that the model rejects, are refused."""
    with pytest.raises(di.DaskInferError, match=message):
        di.predict(MODEL, x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: x[:1], r"the model returned y of shape \(1, 5\) for 2 rows"),
        (lambda x: x.sum(), r"the model returned y of shape \(\) for 2 rows"),
        (lambda x: "cat", "returned a str"),
        (lambda x: None, "returned no array"),
        (7, "model must be .*, got int"),
        ("nowhere.nets:make", "cannot import factory"),
        ("os:no_such_factory", "cannot import factory"),
        ("net.onnx", "model must be a file ending in .*, got 'net.onnx'"),
        ("missing.pt2", "does not exist"),
        (di.Model("w.safetensors"), "holds only weights, and needs a factory"),
    ],
)
def test_models(model: Any, message: str) -> None:
    """Models that cannot be found or called, or whose outputs are not one entry per row, are refused."""
    with pytest.raises(di.DaskInferError, match=message):
        di.predict(model, X)


@pytest.mark.parametrize("fields", [{"autocast": "fp8"}, {"preprocess": 3}, {"dtype": 4}, {"pad": "yes"}, {"output": 3}])
def test_options(fields: Any) -> None:
    """An option outside its allowed values is refused by name."""
    with pytest.raises(di.DaskInferError, match=next(iter(fields))):
        di.predict(MODEL, X, **fields)


def test_unknown_option() -> None:
    """A misspelt keyword is a TypeError, as in any function."""
    with pytest.raises(TypeError, match="autocats"):
        di.predict(MODEL, X, autocats="bf16")


def test_output_exists(in_folder: Path) -> None:
    """A file that is no output of a run is never overwritten."""
    np.save("x.npy", X)
    np.save("y.npy", X)
    with pytest.raises(FileExistsError, match=r"y\.npy' already exists"):
        di.run(MODEL, "x.npy", "y.npy")


def test_output_inside_the_input(in_folder: Path) -> None:
    """An output path inside the input store is refused."""
    Path("x.zarr").mkdir()
    with pytest.raises(di.DaskInferError, match="is inside the input"):
        di.run(MODEL, "x.zarr", "x.zarr/y.zarr")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("y.csv", "got '.csv'"),
        ("no/y.npy", "folder"),
        ({"logits": "y.npy"}, r"one path for each output of the model \(y\), got paths for logits"),
    ],
)
def test_targets(in_folder: Path, target: Any, message: str) -> None:
    """Outputs that cannot be created, or that the model does not have, are refused."""
    np.save("x.npy", X)
    with pytest.raises(di.DaskInferError, match=message):
        di.run(MODEL, "x.npy", target)


def test_one_path_for_two_outputs(in_folder: Path) -> None:
    """A model with several outputs needs a path for each."""
    np.save("x.npy", X)
    with pytest.raises(
        di.DaskInferError, match=r"the model has 2 outputs \(a, b\), got one path\. Pass a path for each: \{'a': …, 'b': …\}"
    ):
        di.run(lambda x: {"a": x, "b": x}, "x.npy", "y.npy")


def test_all_problems_at_once(in_folder: Path) -> None:
    """A plan lists everything that must change."""
    with pytest.raises(PlanError, match="invalid plan, 5 problems:") as refused:
        di.plan("nowhere:make", "x.npy", target="y.csv", devices="tpu", batch_size=0)
    assert len(refused.value.reasons) == 5


def test_what_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that does not fit is refused with the batch size that would fit."""
    monkeypatch.setattr(placement, "inspect_machine", lambda: Machine(n_cores=1, memory_nbytes=1 << 20))
    wide = np.broadcast_to(np.float32(0), (64, 4, 1 << 14))
    with pytest.raises(di.DaskInferError, match=r"needs .* on cpu:0 at batch_size=64; .* is free\. Use batch_size="):
        di.plan(np.negative, wide, devices="cpu", batch_size=64)
