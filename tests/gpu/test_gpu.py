from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client

import daskinfer as di
from daskinfer.cluster.worker_spec import resource_name
from daskinfer.diagnostics.events import ChunkDone, Event
from daskinfer.hardware.discovery import inspect_machine

N_ROWS = 1000
# Matrix products on a GPU may round to 10 bits of mantissa (TF32); these models add up 64 of them.
TF32 = {"rtol": 1e-2, "atol": 1e-2}
BF16 = {"rtol": 5e-2, "atol": 5e-2}


class Net(torch.nn.Module):
    """A small model whose output reveals a row in the wrong place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)  # type: ignore[no-any-return]


@pytest.fixture
def x() -> np.ndarray[Any, Any]:
    """(1000, 64) float32."""
    return np.random.default_rng(0).standard_normal((N_ROWS, 64)).astype("float32")


def compute_on_cpu(net: torch.nn.Module, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Compute the expected output in a plain torch loop."""
    with torch.inference_mode():
        return np.concatenate([net(torch.from_numpy(rows)).numpy() for rows in np.array_split(x, 7)])


def test_the_first_gpu_of_each_worker_is_the_one_it_is_pinned_to(gpu_client: Client) -> None:
    """Torch's device 0 in the worker of cuda:i is NVML's GPU i, whatever CUDA's own order is."""

    def read_uuid() -> str:
        import torch

        return str(torch.cuda.get_device_properties(0).uuid)

    gpus = [gpu for gpu in inspect_machine().gpus if gpu.uuid.startswith("GPU-")]
    futures = [gpu_client.submit(read_uuid, pure=False, resources={resource_name(gpu.name): 1}) for gpu in gpus]
    assert [f"GPU-{uuid}" for uuid in gpu_client.gather(futures)] == [gpu.uuid for gpu in gpus]


def test_a_cpu_worker_beside_gpus_sees_none(gpu_client: Client) -> None:
    """Otherwise it could take memory on the first GPU."""

    def count_gpus() -> int:
        import torch

        return torch.cuda.device_count()

    assert gpu_client.submit(count_gpus, resources={resource_name("cpu:0"): 1}).result() == 0


def test_predict_on_a_gpu_equals_a_loop_on_the_cpu(x: np.ndarray[Any, Any]) -> None:
    """Rows and order are the same, within the tolerance of the GPU's matrix products; CUDA is not initialised here."""
    net = Net()
    try:
        y, report = di.predict(net, x, devices="cuda", batch_size=64, return_report=True)
    finally:
        di.close()
    np.testing.assert_allclose(y, compute_on_cpu(net, x), **TF32)
    assert {d.device for d in report.devices if d.n_rows} <= {gpu.name for gpu in inspect_machine().gpus}
    assert not torch.cuda.is_initialized()


def test_gpu_and_cpu_share_rows_by_weight(gpu_client: Client, x: np.ndarray[Any, Any]) -> None:
    """The weight of a kind applies to each of its devices, and rows stay in order across kinds."""
    net = Net()
    y, report = di.predict(
        net, x, client=gpu_client, device_weights={"cuda": 3, "cpu": 1}, batch_size=10, return_report=True
    )
    np.testing.assert_allclose(y, compute_on_cpu(net, x), **TF32)
    rows = {d.device: d.n_rows for d in report.devices}
    n_gpus = len(rows) - 1
    assert rows["cpu:0"] == pytest.approx(N_ROWS / (3 * n_gpus + 1), abs=10)
    assert not torch.cuda.is_initialized()


class Greedy(torch.nn.Module):
    """A model that takes an eighth of the GPU's memory per row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            nbytes = torch.cuda.get_device_properties(x.device).total_memory // 8
            torch.empty(len(x) * nbytes, dtype=torch.uint8, device=x.device)
        return 2 * x


def test_a_batch_that_does_not_fit_is_computed_in_smaller_batches(gpu_client: Client, x: np.ndarray[Any, Any]) -> None:
    """After a real out-of-memory error the output is right, and each chunk's stats hold the batch size that fit."""
    weights, batch_sizes = {"cuda": 1, "cpu": 0}, []

    def record(event: Event) -> None:
        if isinstance(event, ChunkDone):
            batch_sizes.append(event.stats.batch_size)

    y = di.predict(Greedy(), x[:64], client=gpu_client, device_weights=weights, batch_size=32, progress=record)
    np.testing.assert_array_equal(y, 2 * x[:64])
    assert batch_sizes
    assert max(batch_sizes) < 8


def test_a_row_that_does_not_fit_alone_is_an_error(gpu_client: Client, x: np.ndarray[Any, Any]) -> None:
    """Halving the batch size stops at one row, and the worker survives."""

    class TooLarge(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.is_cuda:
                torch.empty(2 * torch.cuda.get_device_properties(x.device).total_memory, dtype=torch.uint8, device=x.device)
            return x

    weights = {"cuda": 1, "cpu": 0}
    with pytest.raises(di.DaskInferError, match="memory"):
        di.predict(TooLarge(), x[:8], client=gpu_client, device_weights=weights)
    np.testing.assert_array_equal(di.predict(np.abs, x, client=gpu_client, device_weights=weights), np.abs(x))


def test_autocast_and_bfloat16_return_float32(gpu_client: Client, x: np.ndarray[Any, Any]) -> None:
    """Lower precision inside, float32 outside, close to the full-precision output."""
    net, weights = Net(), {"cuda": 1, "cpu": 0}
    expected = compute_on_cpu(net, x)
    automatic = di.predict(net, x, client=gpu_client, device_weights=weights, autocast="bf16")
    cast = di.predict(Net().bfloat16(), x, client=gpu_client, device_weights=weights, dtype="bfloat16")
    for y in (automatic, cast):
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, expected, **BF16)


@pytest.mark.skipif(find_spec("cupy") is None, reason="CuPy is not installed")
def test_a_function_that_returns_cupy_gives_numpy(gpu_client: Client, x: np.ndarray[Any, Any]) -> None:
    """An output that a callable leaves on the GPU is copied to the host."""

    def double(rows: np.ndarray[Any, Any]) -> Any:
        import cupy

        return cupy.asarray(rows) * 2

    weights, output = {"cuda": 1, "cpu": 0}, np.empty((0, 64), "float32")
    y = di.predict(double, x, client=gpu_client, device_weights=weights, output=output)
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, 2 * x)


def test_a_model_that_the_caller_has_on_a_gpu_stays_there() -> None:
    """A copy travels and the caller's model does not change; in a new process, since this one never initialises CUDA."""
    import subprocess
    import sys

    code = (
        "import torch, numpy as np, daskinfer as di\n"
        "net = torch.nn.Linear(64, 8).cuda().train()\n"
        "x = np.ones((100, 64), 'float32')\n"
        "y = di.predict(net, x, devices='cuda')\n"
        "assert net.weight.is_cuda and net.training and net.weight.requires_grad\n"
        "print(float(abs(y - net(torch.from_numpy(x).cuda()).detach().cpu().numpy()).max()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert float(done.stdout) < TF32["atol"]
