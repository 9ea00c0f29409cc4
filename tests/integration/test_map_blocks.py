from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
import zarr
from distributed import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import daskinfer as di
from daskinfer.errors import ChunkError, InputError, ModelError, OptionError, PlanError

X = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")


@pytest.fixture(scope="module", autouse=True)
def _zarr_thread(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Start the thread that zarr keeps for the whole process, before a test counts threads."""
    zarr.create_array(tmp_path_factory.mktemp("zarr") / "x", shape=(1,), dtype="f4")[:] = 1


@pytest.fixture
def _nothing_computes() -> Any:
    """Fail where dask computes anything."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    with dask.config.set(scheduler=refuse):
        yield


class Unreadable:
    """A source whose rows nobody may read."""

    shape, dtype, ndim = (20, 3), np.dtype("float32"), 2

    def __getitem__(self, index: object) -> None:
        raise AssertionError("read")


def plain(net: nn.Module, x: np.ndarray) -> np.ndarray:
    """One plain torch loop, row by row."""
    with torch.no_grad():
        return torch.cat([net(row[None].clone()) for row in torch.from_numpy(x)]).numpy()


def dense(seed: int = 0) -> nn.Module:
    """A small network whose weights a seed tells."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)).eval()


def calm(lazy: Any, *more: Any) -> Any:
    """Compute in this thread."""
    return dask.compute(lazy, *more, scheduler="synchronous") if more else lazy.compute(scheduler="synchronous")


# Lazy


@pytest.mark.usefixtures("_nothing_computes")
@pytest.mark.parametrize("chunks", [(5, 3), (7, 1), (20, 3)])
def test_lazy_dask_array(chunks: tuple[int, int]) -> None:
    """A dask array is neither computed nor read for the lazy answer."""
    lazy = di.map_blocks(dense(), da.from_array(Unreadable(), chunks=chunks))
    assert (lazy.shape, lazy.dtype, lazy.chunks[0]) == ((20, 2), "float32", da.ones(20, chunks=chunks[0]).chunks[0])


@pytest.mark.usefixtures("_nothing_computes")
def test_lazy_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row of a file is read."""
    np.save(tmp_path / "x.npy", X)
    monkeypatch.setattr("daskinfer.storage.formats.npy.Source.__getitem__", Unreadable.__getitem__)
    assert di.map_blocks(dense(), tmp_path / "x.npy").shape == (20, 2)


@pytest.mark.usefixtures("_nothing_computes")
def test_lazy_steps_on_top() -> None:
    """What dask does with the answer stays lazy."""
    lazy = di.map_blocks(dense(), da.from_array(Unreadable(), chunks=(5, 3)))
    assert da.concatenate([lazy[3:].mean(axis=0), lazy.rechunk((3, 1))[0] + 1]).shape == (4,)


# Right for any chunking


@given(data=st.data(), n=st.integers(0, 20), batch_size=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_any_chunking(data: st.DataObject, n: int, batch_size: int) -> None:
    """Whatever the chunks, empty ones and cuts of later axes too, the bytes are those of one chunk."""
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    rows = tuple(np.diff([0, *cuts, n]).tolist())
    x = da.from_array(X[:n], chunks=(rows, data.draw(st.sampled_from([(3,), (1, 2), (1, 1, 1)]))))
    lazy = di.map_blocks(dense(), x, batch_size=batch_size)
    assert lazy.chunks[0] == rows
    whole = di.map_blocks(dense(), da.from_array(X[:n], chunks=(n or 1, 3)), batch_size=batch_size)
    assert calm(lazy).tobytes() == calm(whole).tobytes()
    if n:
        np.testing.assert_allclose(calm(lazy), plain(dense(), X[:n]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (0,), (4, 0), (4, 0, 2), (1, 3)])
@pytest.mark.parametrize("make", [np.ones, da.ones])
def test_shapes_without_numbers(make: Callable[..., Any], shape: tuple[int, ...]) -> None:
    """An input without rows, or with an axis of no length, has an answer like it."""
    assert calm(di.map_blocks(np.negative, make(shape))).shape == shape


def test_rows_look_across_later_chunks() -> None:
    """A row is whole for the network though its axes are cut."""
    x = np.arange(2 * 4 * 6, dtype="float32").reshape(2, 4, 6)
    lazy = di.map_blocks(lambda x: x.sum((1, 2)), da.from_array(x, chunks=(1, 3, 2)))
    np.testing.assert_array_equal(calm(lazy), x.sum((1, 2)))


@pytest.mark.parametrize("later", [(), (2,), (2, 3), (1, 2, 3)])
def test_outputs_of_any_ndim(later: tuple[int, ...]) -> None:
    """An answer may have fewer axes than the input, or more."""
    expected = X.reshape(20, -1)[:, 0][(..., *[None] * len(later))] * np.ones(later, "float32")
    lazy = di.map_blocks(lambda x: x[:, 0][(..., *[None] * len(later))] * np.ones(later, "float32"), X, batch_size=3)
    np.testing.assert_array_equal(calm(lazy), expected, strict=True)


def test_bytes_are_the_same_again() -> None:
    """Computing twice, in one thread or in several, gives the same bytes."""
    lazy = di.map_blocks(dense(), da.from_array(X, chunks=(3, 2)), batch_size=4)
    assert len({calm(lazy).tobytes(), calm(lazy).tobytes(), lazy.compute(scheduler="threads").tobytes()}) == 1


def test_the_network_as_it_was() -> None:
    """A network that is trained on afterwards answers as it did when it was handed over; nobody changes it here."""
    net = dense().train()
    expected, before = plain(net, X), {k: v.clone() for k, v in net.state_dict().items()}
    lazy = di.map_blocks(net, X)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with torch.no_grad():
        net[0].weight.zero_()
    np.testing.assert_allclose(calm(lazy), expected, rtol=1e-5, atol=1e-6)


# Ports, forms, options


def test_ports_of_unlike_ndim() -> None:
    """Ports may have unlike numbers of axes and be cut in unlike ways."""
    x = {"image": da.ones((20, 2, 2), chunks=(6, 1, 2)), "meta": X, "age": X[:, 0].tolist()}
    lazy = di.map_blocks(lambda image, meta, age: image.sum((1, 2)) + meta[:, 0] - age, x)
    assert lazy.chunks == ((6, 6, 6, 2),)
    np.testing.assert_array_equal(calm(lazy), np.full(20, 4.0), strict=True)


def test_dask_ports_with_unlike_chunks() -> None:
    """Of several dask arrays the first one's chunks on axis 0 count."""
    lazy = di.map_blocks(np.subtract, (da.from_array(X, chunks=(6, 1)), da.from_array(X, chunks=(7, 3))))
    assert lazy.chunks[0] == (6, 6, 6, 2)
    assert not calm(lazy).any()


@pytest.mark.parametrize("form", [torch.from_numpy(X), X.tolist(), list(X), np.asfortranarray(X), X.astype(">f4")])
def test_forms(form: Any) -> None:
    """Tensors, lists and arrays of any layout give the same answer, as a dask array."""
    np.testing.assert_allclose(calm(di.map_blocks(dense(), form)), plain(dense(), X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_files(tmp_path: Path, suffix: str) -> None:
    """A file gives the same answer."""
    if suffix == ".npy":
        np.save(tmp_path / "x.npy", X)
    else:
        zarr.create_array(tmp_path / "x.zarr", shape=X.shape, dtype="f4", chunks=(7, 2))[:] = X
    lazy = di.map_blocks(dense(), tmp_path / f"x{suffix}", batch_size=2)
    np.testing.assert_allclose(calm(lazy), plain(dense(), X), rtol=1e-5, atol=1e-6)


def test_bfloat16_tensors() -> None:
    """A bfloat16 tensor reaches a bfloat16 network as what it was."""
    net, x = dense().bfloat16(), torch.from_numpy(X).bfloat16()
    with torch.no_grad():
        expected = net(x).float().numpy()
    np.testing.assert_allclose(calm(di.map_blocks(net, x)), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("batch_size", [1, 20, 21, 10**4])
def test_batch_sizes(batch_size: int) -> None:
    """A micro-batch may be one row or more than there are."""
    lazy = di.map_blocks(dense(), X, batch_size=batch_size)
    np.testing.assert_allclose(calm(lazy), plain(dense(), X), rtol=1e-5, atol=1e-6)


def test_options() -> None:
    """Options count as a record, and as keywords on top of it."""
    lazy = di.map_blocks(dense(), X, options=di.Options(postprocess=np.negative, dtype="float64"), dtype="float32")
    np.testing.assert_allclose(calm(lazy), -plain(dense(), X), rtol=1e-5, atol=1e-6)


# Several outputs


class Counting(nn.Module):
    """Writes a byte to a file each time it sees rows; its answer is a dict."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = str(path)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        with open(self.path, "ab") as file:
            file.write(b".")
        return {"sum": x.sum(1), "parts": (x + 1, [x.mul(2).long()])}


@pytest.fixture
def counted(tmp_path: Path) -> tuple[Any, Callable[[], int]]:
    """A lazy answer of several outputs, 4 chunks of 2 micro-batches each, and how often the network ran for it."""
    file = tmp_path / "calls"
    lazy = di.map_blocks(Counting(file), da.from_array(X, chunks=(5, 2)), batch_size=5)
    file.write_bytes(b"")
    return lazy, lambda: file.stat().st_size


def test_structure(counted: Any) -> None:
    """Several outputs come in the network's structure, each a dask array."""
    (lazy, _) = counted
    (y,) = dask.compute(lazy, scheduler="synchronous")
    np.testing.assert_array_equal(y["sum"], torch.from_numpy(X).sum(1))
    np.testing.assert_array_equal(y["parts"][0], X + 1)
    np.testing.assert_array_equal(y["parts"][1][0], (X * 2).astype("int64"), strict=True)


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_together_once(counted: Any, scheduler: str) -> None:
    """Computed together, several outputs take one run of the network per micro-batch."""
    lazy, n_calls = counted
    dask.compute(lazy["sum"], lazy["parts"][0].mean(), lazy["parts"][1][0], scheduler=scheduler)
    assert n_calls() == 4


def test_apart_twice(counted: Any) -> None:
    """Computed one by one, each output takes a run of its own."""
    lazy, n_calls = counted
    calm(lazy["sum"])
    calm(lazy["parts"][0])
    assert n_calls() == 8


def test_slice_runs_what_it_needs(counted: Any) -> None:
    """A slice takes the chunks that it lies in only."""
    lazy, n_calls = counted
    np.testing.assert_allclose(calm(lazy["sum"][6:9]), X[6:9].sum(1), rtol=1e-5)
    assert n_calls() == 1


# Plain Dask


def test_composable(tmp_path: Path) -> None:
    """The answer is plain Dask: reduced, sliced, cut anew, put together, kept and stored."""
    lazy, expected = di.map_blocks(dense(), da.from_array(X, chunks=(6, 3))), plain(dense(), X)
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(calm(lazy.mean(axis=0)), expected.mean(axis=0), **close)
    np.testing.assert_allclose(calm(lazy[::-2, 1]), expected[::-2, 1], **close)
    np.testing.assert_allclose(calm(lazy[lazy[:, 0] > 0]), expected[expected[:, 0] > 0], **close)
    np.testing.assert_allclose(calm(lazy.rechunk((3, 1))), expected, **close)
    np.testing.assert_allclose(calm(da.concatenate([lazy, lazy - 1])), np.concatenate([expected, expected - 1]), **close)
    np.testing.assert_allclose(calm(lazy.persist(scheduler="synchronous") @ np.ones(2, "f4")), expected.sum(1), **close)
    np.testing.assert_allclose(np.concatenate(list(map(calm, lazy.blocks))), expected, **close)
    with dask.config.set(scheduler="synchronous"):
        lazy.to_zarr(tmp_path / "y.zarr")
    np.testing.assert_allclose(zarr.open_array(tmp_path / "y.zarr", mode="r")[:], expected, **close)


def test_networks_in_a_row() -> None:
    """A lazy answer is the input of the next network, chunks and all."""
    lazy = di.map_blocks(nn.Flatten(), di.map_blocks(dense(), da.from_array(X, chunks=(6, 3))), batch_size=4)
    assert lazy.chunks[0] == (6, 6, 6, 2)
    np.testing.assert_allclose(calm(lazy), plain(dense(), X), rtol=1e-5, atol=1e-6)


def test_chunks_that_dask_made() -> None:
    """The rows may come from any dask graph."""
    x = (da.from_array(X, chunks=(6, 3)) - X.mean(0)).rechunk((4, 2))
    np.testing.assert_allclose(calm(di.map_blocks(dense(), x)), plain(dense(), X - X.mean(0)), rtol=1e-4, atol=1e-5)


def test_chunks_are_not_overwritten() -> None:
    """A network that works in place does not reach a persisted array's chunks."""
    x = da.from_array(X.copy(), chunks=(6, 3)).persist(scheduler="synchronous")
    calm(di.map_blocks(nn.ReLU(inplace=True), x))
    np.testing.assert_array_equal(calm(x), X)


class Crowded:
    """Notes how many threads are inside it at the same time."""

    def __init__(self, path: Path) -> None:
        self.path, self.inside = str(path), 0

    def load(self, device: str) -> None:
        self.inside = 0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.inside += 1
        time.sleep(0.01)
        with open(self.path, "a") as file:
            file.write(f"{self.inside} {threading.current_thread().name}\n")
        self.inside -= 1
        return x


def test_one_chunk_at_a_time(tmp_path: Path) -> None:
    """Without a cluster torch has all cores, so one chunk at a time is inside the network, whatever dask's threads."""
    lazy = di.map_blocks(Crowded(tmp_path / "seen"), da.from_array(X, chunks=(1, 3)))
    lazy.compute(scheduler="threads", num_workers=4)
    seen = [line.split(maxsplit=1) for line in (tmp_path / "seen").read_text().splitlines()]
    assert {inside for inside, _ in seen} == {"1"}
    assert len({name for _, name in seen[1:]}) > 1


def test_torch_threads_stay() -> None:
    """Computing leaves this process's number of torch threads as it is."""
    before = torch.get_num_threads()
    calm(di.map_blocks(dense(), X))
    assert torch.get_num_threads() == before


# Refusals and failures


def test_unknown_chunks() -> None:
    """A dask array that does not know its rows is refused."""
    x = da.from_array(X, chunks=(6, 3))
    with pytest.raises(InputError, match=r"unknown chunks; .* Call \.compute_chunk_sizes\(\)"):
        di.map_blocks(dense(), x[x[:, 0] > 0])


def test_all_refusals_at_once() -> None:
    """All that cannot work is said at once."""
    with pytest.raises(PlanError, match=r"(?s)for 4 reasons.*numbers are needed.*autocast.*batch_size.*the model is a int"):
        di.map_blocks(3, ["a"], autocast="int8", batch_size=0)


def test_output_that_is_not_true() -> None:
    """An output= that the network does not keep to is an error of the chunk that finds out."""
    lazy = di.map_blocks(dense(), X, output=np.empty((0, 5), "float32"))
    with pytest.raises(ModelError, match=r"the model gave \(2,\) float32 per row where \(5,\) float32 was planned"):
        calm(lazy)


def test_failing_rows() -> None:
    """A network that fails on some rows is an error that names them, and is right for the others."""

    def fussy(x: np.ndarray) -> np.ndarray:
        if (x == 13).any():
            raise ValueError("unlucky")
        return x

    lazy = di.map_blocks(fussy, da.arange(20, chunks=5), batch_size=2)
    with pytest.raises(ChunkError, match="rows 13:14 on cpu failed: ValueError: unlucky"):
        calm(lazy)
    assert calm(lazy[:10]).tolist() == list(range(10))


# On a cluster


def test_distributed(cluster_client: Client) -> None:
    """On a cluster the answer is computed on its workers, several outputs in one run."""
    lazy = di.map_blocks(lambda x: (x, -x[:, 0]), da.from_array(X, chunks=(6, 2)))
    rows, first = (future.result() for future in cluster_client.compute(list(lazy)))
    np.testing.assert_array_equal(rows, X)
    np.testing.assert_array_equal(first, -X[:, 0])
    other = di.map_blocks(dense(), X).compute(scheduler=cluster_client)
    np.testing.assert_allclose(other, plain(dense(), X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "option",
    [
        {"on_error": "skip"},
        {"retries": 5},
        {"chunk_timeout": 3.0},
        {"prefetch": 3},
        {"fill_value": 0.0},
        {"max_failed_rows": 3},
        {"restart_workers": True},
    ],
)
def test_what_only_daskinfers_own_calls_follow_is_refused(option: dict[str, Any]) -> None:
    """Options that would have no effect, since Dask computes the chunks, are refused and say where they have one."""
    ((name, value),) = option.items()
    with pytest.raises(OptionError, match=rf"{name}={value!r} was given to map_blocks, whose chunks Dask computes"):
        di.map_blocks(np.negative, da.ones(10), **option)
