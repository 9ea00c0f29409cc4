"""predict, run and plan through the public names, on real workers, compared with a plain torch loop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
import pytest
import torch
import zarr
from distributed import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import daskinfer as di
from daskinfer.cluster.placement import fetch_workers
from daskinfer.scheduling import chunking
from tests.conftest import wait_until

N_FEATURES = 5
SETTINGS = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def make_mlp(seed: int, n_out: int = 3, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Make a small random model of (n, 5) -> (n, n_out)."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(N_FEATURES, 8), torch.nn.Tanh(), torch.nn.Linear(8, n_out)).to(dtype)


def make_cnn(seed: int) -> torch.nn.Module:
    """Make a small random model of (n, 2, 6, 6) -> (n, 4)."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(48, 4))


def make_rows(n: int, *shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Make random float32 rows."""
    return np.random.default_rng(seed).normal(size=(n, *(shape or (N_FEATURES,)))).astype(np.float32)


def run_plainly(model: torch.nn.Module, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Run the model in plain torch on the whole array."""
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(x)).numpy()


class Pair(NamedTuple):
    low: Any
    high: Any


def count_loads() -> int:
    """Return how many models this process has loaded so far."""
    from daskinfer.worker.loaded_models import model_cache

    return model_cache.n_loads


class LoggingModel:
    """A model with a load method that writes a line for every load."""

    def __init__(self, log: str) -> None:
        self.log = log

    def load(self, device: str) -> None:
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()} {device}\n")

    def __call__(self, batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return batch.sum(axis=1)


@pytest.fixture
def own_client() -> Iterator[Client]:
    """A client of a cluster of this test, which may kill its workers."""
    with di.LocalDeviceCluster("cpu*2") as cluster, Client(cluster, set_as_default=False) as client:
        yield client


@SETTINGS
@given(
    seed=st.integers(0, 99),
    n=st.integers(0, 200),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    batch_size=st.one_of(st.just("auto"), st.integers(1, 64)),
    weights=st.one_of(st.sampled_from(["auto", "even"]), st.lists(st.floats(0.01, 9.0), min_size=2, max_size=2)),
)
def test_equals_a_plain_loop(
    two_cpus: list[str], seed: int, n: int, dtype: torch.dtype, batch_size: Any, weights: Any
) -> None:
    """For any model, length, dtype, batch size and weights, predict equals the model on the whole array."""
    model, x = make_mlp(seed, dtype=dtype), make_rows(n, seed=seed).astype(str(dtype).removeprefix("torch."))
    y = di.predict(model, x, devices=two_cpus, batch_size=batch_size, device_weights=weights)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y, run_plainly(model, x), rtol=1e-5, atol=1e-6)


@SETTINGS
@given(seed=st.integers(0, 99), n=st.integers(1, 60), batch_size=st.integers(1, 40))
def test_equals_a_plain_loop_over_images(two_cpus: list[str], seed: int, n: int, batch_size: int) -> None:
    """The same holds for a model of images."""
    model, x = make_cnn(seed), make_rows(n, 2, 6, 6, seed=seed)
    np.testing.assert_allclose(
        di.predict(model, x, devices=two_cpus, batch_size=batch_size), run_plainly(model, x), rtol=1e-5, atol=1e-5
    )


def test_rows_keep_their_order(two_cpus: list[str]) -> None:
    """Row i of the output belongs to row i of the input, whichever device computed it."""
    x = np.arange(10_000, dtype=np.float32)
    y, report = di.predict(lambda rows: rows * 2, x, devices=two_cpus, batch_size=7, return_report=True)
    assert (y == x * 2).all()
    assert [d.n_rows > 0 for d in report.devices] == [True, True]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.tolist(),
        list,
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, axis=0)[::2],
        lambda x: da.from_array(x, chunks=(30, 2)),
        lambda x: da.from_array(x, chunks=((0, 50, 50), 5)),
    ],
    ids=["array", "numbers", "arrays", "fortran", "strided", "dask", "dask-empty-chunk"],
)
def test_array_like_inputs(two_cpus: list[str], make: Any) -> None:
    """Every array-like form of the same rows returns the same ndarray."""
    model, x = make_mlp(3), make_rows(100)
    y = di.predict(model, make(x), devices=two_cpus)
    assert type(y) is np.ndarray
    np.testing.assert_allclose(y, run_plainly(model, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_paths_as_input(two_cpus: list[str], tmp_path: Path, suffix: str) -> None:
    """A path, as str or Path, is read by the workers."""
    model, x, path = make_mlp(3), make_rows(100), tmp_path / f"x{suffix}"
    np.save(path, x) if suffix == ".npy" else zarr.save_array(path, x)
    assert (di.predict(model, path, devices=two_cpus) == di.predict(model, str(path), devices=two_cpus)).all()


def test_memmap_as_input(two_cpus: list[str], tmp_path: Path) -> None:
    """A memmap is read in chunks, and the output is an ndarray."""
    model, x = make_mlp(3), make_rows(100)
    np.save(tmp_path / "x.npy", x)
    y = di.predict(model, np.load(tmp_path / "x.npy", mmap_mode="r"), devices=two_cpus)
    np.testing.assert_allclose(y, run_plainly(model, x), rtol=1e-5, atol=1e-6)


def test_tensor_in_tensor_out(two_cpus: list[str]) -> None:
    """A tensor returns a tensor, even if it requires gradients, and is not changed."""
    model, x = make_mlp(3), torch.from_numpy(make_rows(50)).requires_grad_()
    y = di.predict(model, x, devices=two_cpus)
    assert isinstance(y, torch.Tensor)
    assert torch.allclose(y, model(x), atol=1e-6)
    assert x.requires_grad


def test_bfloat16_tensor_and_model(two_cpus: list[str]) -> None:
    """A bfloat16 tensor reaches a bfloat16 model unchanged, and the output is float32."""
    model, x = make_mlp(3, dtype=torch.bfloat16), torch.from_numpy(make_rows(50)).to(torch.bfloat16)
    y = di.predict(model, x, devices=two_cpus)
    assert y.dtype == torch.float32
    assert torch.allclose(y, model(x).float(), atol=0.05)


class TwoPorts(torch.nn.Module):
    def forward(self, image: torch.Tensor, meta: torch.Tensor) -> dict[str, Any]:
        return {"sum": image.sum(dim=(1, 2)) + meta, "pair": Pair(meta - 1, (meta * 2, None))}


@pytest.mark.parametrize("named", [True, False])
def test_ports_in_and_structures_out(two_cpus: list[str], named: bool) -> None:
    """Ports reach the model by name or position, and its nested output keeps its structure."""
    image, meta = make_rows(40, 3, 4), make_rows(40)[:, 0].copy()
    ports = {"image": image, "meta": meta} if named else (image, meta)
    y = di.predict(TwoPorts(), ports, devices=two_cpus)
    np.testing.assert_allclose(y["sum"], image.sum(axis=(1, 2)) + meta, rtol=1e-5, atol=1e-5)
    assert isinstance(y["pair"], Pair)
    assert y["pair"].high[1] is None
    np.testing.assert_allclose(y["pair"].high[0], meta * 2)


def test_inline_equals_workers(two_cpus: list[str]) -> None:
    """devices='inline' returns the same output without any worker."""
    model, x = make_mlp(4), make_rows(100)
    y, report = di.predict(model, x, devices="inline", return_report=True)
    np.testing.assert_allclose(y, di.predict(model, x, devices=two_cpus), rtol=1e-5, atol=1e-6)
    assert [d.device for d in report.devices] == ["inline"]


def test_no_rows(two_cpus: list[str]) -> None:
    """An input without rows returns an output without rows, of the right shape and dtype."""
    y, report = di.predict(make_mlp(4), make_rows(0), devices=two_cpus, return_report=True)
    assert (y.shape, y.dtype, report.rows) == ((0, 3), np.float32, 0)


def test_explicit_weights_are_honoured(two_cpus: list[str]) -> None:
    """The report shows the requested and the actual shares, and they agree."""
    _, report = di.predict(
        make_mlp(4), make_rows(4000), devices=two_cpus, device_weights=[3, 1], batch_size=10, return_report=True
    )
    assert [d.n_rows for d in report.devices] == [3000, 1000]
    assert [(d.asked_share, d.done_share) for d in report.devices] == [(0.75, 0.75), (0.25, 0.25)]
    assert report.rows == 4000
    assert report.batch_size == 10


def test_weight_zero_leaves_a_device_out(two_cpus: list[str]) -> None:
    """A device of weight 0 computes nothing."""
    _, report = di.predict(
        make_mlp(4), make_rows(100), devices=two_cpus, device_weights={"cpu:0": 0, "cpu": 1}, return_report=True
    )
    assert [d.n_rows for d in report.devices] == [0, 100]


def test_one_load_per_worker_and_one_more_after_a_kill(own_client: Client, tmp_path: Path) -> None:
    """A model is loaded once per worker over many calls; only a worker killed between calls loads it again."""
    log = tmp_path / "loads"
    log.touch()

    def loads() -> int:
        return len(log.read_text().splitlines())

    model, x = LoggingModel(str(log)), make_rows(200)
    for _ in range(3):
        y = di.predict(model, x, client=own_client, device_weights="even")
    assert loads() == 1 + 2  # the first call also infers the output once in the client
    np.testing.assert_allclose(y, x.sum(axis=1), rtol=1e-5, atol=1e-6)
    before = set(fetch_workers(own_client))
    os.kill(next(iter(own_client.run(os.getpid).values())), signal.SIGKILL)
    wait_until(lambda: len(set(fetch_workers(own_client)) - before) == 1, 60)
    wait_until(lambda: len(fetch_workers(own_client)) == 2, 60)
    di.predict(model, x, client=own_client, device_weights="even")
    assert loads() == 1 + 3


def test_module_is_loaded_once_and_never_changed(cluster_client: Client) -> None:
    """A module in memory is loaded once per worker over many calls, and the caller's stays in training mode."""
    model, x = make_mlp(11).train(), make_rows(100)
    before = cluster_client.run(count_loads)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        di.predict(model, x, client=cluster_client, device_weights="even")
    after = cluster_client.run(count_loads)
    assert [after[worker] - before[worker] for worker in after] == [1, 1]
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_changed_weights_are_another_model(cluster_client: Client) -> None:
    """After a training step, the outputs come from the new weights, not from those loaded before."""
    model, x = make_mlp(12), make_rows(100)
    first = di.predict(model, x, client=cluster_client)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    second = di.predict(model, x, client=cluster_client)
    np.testing.assert_allclose(second, run_plainly(model, x), rtol=1e-5, atol=1e-6)
    assert not np.allclose(first, second)


@pytest.mark.parametrize(("source", "target"), [(".npy", ".zarr"), (".zarr", ".npy")])
def test_run_from_storage_to_storage(two_cpus: list[str], tmp_path: Path, source: str, target: str) -> None:
    """run reads and writes in the workers, and leaves only the finished output and its manifest."""
    model, x, read, write = make_mlp(5), make_rows(500), tmp_path / f"x{source}", tmp_path / f"y{target}"
    np.save(read, x) if source == ".npy" else zarr.save_array(read, x)
    report = di.run(model, read, write, devices=two_cpus, device_weights=[1, 3])
    y = np.load(write) if target == ".npy" else zarr.open_array(write, mode="r")[:]
    np.testing.assert_allclose(y, run_plainly(model, x), rtol=1e-5, atol=1e-6)
    assert report.rows == 500
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([read.name, write.name, f"{write.name}.daskinfer"])


def test_run_of_a_dask_array_writes_whole_chunks_of_the_store(two_cpus: list[str], tmp_path: Path) -> None:
    """A dask array with any chunks is cut at the store's chunks, so that no two workers write to the same one."""
    x = make_rows(400)
    lazy = da.from_array(x, chunks=((3, 50, 7, 140, 200), 5))
    keywords = {"devices": two_cpus, "batch_size": 16}
    di.run(np.negative, lazy, tmp_path / "y.zarr", **keywords)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "y.zarr", mode="r")[:], -x)
    planned = di.plan(np.negative, lazy, target=tmp_path / "z.zarr", **keywords)
    assert all(chunk.start % planned.layout.cell_rows == 0 for chunk in planned.layout.chunks)


def test_run_of_several_outputs(two_cpus: list[str], tmp_path: Path) -> None:
    """Each output of a model gets a path by its name."""
    np.save(tmp_path / "x.npy", make_rows(50))
    outputs = {"low": tmp_path / "low.npy", "high": tmp_path / "high.zarr"}
    di.run(split_signs, tmp_path / "x.npy", outputs, devices=two_cpus)
    np.testing.assert_array_equal(np.load(outputs["low"]) * -1, zarr.open_array(outputs["high"], mode="r")[:])


def split_signs(x: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return two outputs by name."""
    return {"low": -x, "high": x}


def test_run_that_fails(two_cpus: list[str], tmp_path: Path) -> None:
    """If a chunk fails, the error names its rows and device, and no file has the output's name."""
    x = make_rows(100)
    x[70] = np.inf
    np.save(tmp_path / "x.npy", x)

    def picky(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if np.isinf(batch).any():
            raise ArithmeticError("infinite")
        return batch

    with pytest.raises(di.DaskInferError, match=r"rows \d+:\d+ on cpu failed: ArithmeticError: infinite"):
        di.run(picky, tmp_path / "x.npy", tmp_path / "y.zarr", devices=two_cpus)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npy", "y.zarr.daskinfer", "y.zarr.partial"]


def test_a_chunk_that_kills_its_worker_is_named(own_client: Client) -> None:
    """A model that kills its process ends the call with an error that names the rows, instead of a hang."""

    def deadly(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if batch.max() > 90:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    with pytest.raises(di.DaskInferError, match=r"chunk \d+ \(rows \d+:\d+\) ended its worker"):
        di.predict(deadly, np.arange(100.0), client=own_client)


def test_plan_shows_and_starts_nothing() -> None:
    """A plan is a table of devices, and neither starts nor needs a worker."""
    plan = di.plan(make_mlp(6), make_rows(1000), devices="cpu*3", device_weights=[1, 1, 2])
    assert [d.n_rows for d in plan.devices] == [248, 248, 504]
    assert "cpu:2" in str(plan)
    assert "<table>" in plan._repr_html_()


def test_a_write_unit_is_no_larger_than_a_task(tmp_path: Path) -> None:
    """However small the output, a store's chunk has no more rows than a task may hold, since one task computes it."""
    wide = np.broadcast_to(np.float32(0), (600_000, 1000))
    plan = di.plan(lambda x: x[:, 0], wide, target=tmp_path / "y.zarr", devices="cpu")
    assert plan.layout.cell_rows * 4004 <= chunking.CHUNK_NBYTES


def test_plan_of_a_run_counts_in_write_units(tmp_path: Path) -> None:
    """With a target, the plan's chunks are whole chunks of the store."""
    plan = di.plan(make_mlp(6), make_rows(10_000), target=tmp_path / "y.zarr", devices="cpu*2")
    assert all(chunk.start % plan.layout.cell_rows == 0 for chunk in plan.layout.chunks)
    assert not list(tmp_path.iterdir())


def test_plan_with_a_probe_shows_speeds_and_the_time(two_cpus: list[str], tmp_path: Path) -> None:
    """A probe measures every device on real rows; its throughput gives the weights of the next plan, to storage too."""
    model, x = make_mlp(7001), make_rows(1000)  # a model that no other test has measured
    assert di.plan(model, x, devices=two_cpus).seconds is None
    probed = di.plan(model, x, devices=two_cpus, probe=True)
    assert all(device.rows_per_second > 0 for device in probed.devices)
    assert probed.seconds == pytest.approx(1000 / sum(device.rows_per_second for device in probed.devices))
    assert not probed.weights_assumed
    assert di.plan(model, x, target=tmp_path / "y.npy", devices=two_cpus).seconds == probed.seconds
    assert di.plan(model, x[:0], devices=two_cpus, probe=True).n_rows == 0


def test_options_as_record_and_as_keywords(two_cpus: list[str]) -> None:
    """A keyword wins over the same field of an Options record."""
    x = make_rows(20)
    base_options = di.Options(preprocess=lambda rows: rows + 1, postprocess=lambda y: y * 10)
    y = di.predict(np.negative, x, devices=two_cpus, options=base_options, postprocess=lambda y: y * 2)
    np.testing.assert_allclose(y, -2 * (x + 1), rtol=1e-6)


def test_the_callers_array_never_changes(two_cpus: list[str]) -> None:
    """A model that writes into its input leaves the caller's rows unchanged, inline too."""
    x = make_rows(30) - 1
    x.setflags(write=False)
    before = x.copy()
    for devices in (two_cpus, "inline"):
        y = di.predict(torch.nn.ReLU(inplace=True), x, devices=devices)
        assert (y == np.maximum(before, 0)).all()
    assert (x == before).all()
