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
    """Fail if dask computes anything."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    with dask.config.set(scheduler=refuse):
        yield


class Unreadable:
    """A source whose rows must not be read."""

    shape, dtype, ndim = (20, 3), np.dtype("float32"), 2

    def __getitem__(self, index: object) -> None:
        raise AssertionError("read")


def run_plainly(model: nn.Module, x: np.ndarray) -> np.ndarray:
    """Run the model in a plain torch loop, row by row."""
    with torch.no_grad():
        return torch.cat([model(row[None].clone()) for row in torch.from_numpy(x)]).numpy()


def make_dense(seed: int = 0) -> nn.Module:
    """Make a small model with random weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)).eval()


def compute(lazy: Any) -> Any:
    """Compute in this thread."""
    return lazy.compute(scheduler="synchronous")


# Lazy


@pytest.mark.usefixtures("_nothing_computes")
@pytest.mark.parametrize("chunks", [(5, 3), (7, 1), (20, 3)])
def test_lazy_dask_array(chunks: tuple[int, int]) -> None:
    """Building the lazy output neither computes nor reads a dask array."""
    lazy = di.map_blocks(make_dense(), da.from_array(Unreadable(), chunks=chunks))
    assert (lazy.shape, lazy.dtype, lazy.chunks[0]) == ((20, 2), "float32", da.ones(20, chunks=chunks[0]).chunks[0])


@pytest.mark.usefixtures("_nothing_computes")
def test_lazy_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row of a file is read."""
    np.save(tmp_path / "x.npy", X)
    monkeypatch.setattr("daskinfer.storage.formats.npy.Source.__getitem__", Unreadable.__getitem__)
    assert di.map_blocks(make_dense(), tmp_path / "x.npy").shape == (20, 2)


@pytest.mark.usefixtures("_nothing_computes")
def test_lazy_steps_on_top() -> None:
    """Dask operations on the output stay lazy."""
    lazy = di.map_blocks(make_dense(), da.from_array(Unreadable(), chunks=(5, 3)))
    assert da.concatenate([lazy[3:].mean(axis=0), lazy.rechunk((3, 1))[0] + 1]).shape == (4,)


# Correct for any chunking


@given(data=st.data(), n=st.integers(0, 20), batch_size=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_any_chunking(data: st.DataObject, n: int, batch_size: int) -> None:
    """For any chunks, including empty ones and cuts of later axes, the bytes equal those of a single chunk."""
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    rows = tuple(np.diff([0, *cuts, n]).tolist())
    x = da.from_array(X[:n], chunks=(rows, data.draw(st.sampled_from([(3,), (1, 2), (1, 1, 1)]))))
    lazy = di.map_blocks(make_dense(), x, batch_size=batch_size)
    assert lazy.chunks[0] == rows
    whole = di.map_blocks(make_dense(), da.from_array(X[:n], chunks=(n or 1, 3)), batch_size=batch_size)
    assert compute(lazy).tobytes() == compute(whole).tobytes()
    if n:
        np.testing.assert_allclose(compute(lazy), run_plainly(make_dense(), X[:n]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (0,), (4, 0), (4, 0, 2), (1, 3)])
@pytest.mark.parametrize("make", [np.ones, da.ones])
def test_shapes_without_numbers(make: Callable[..., Any], shape: tuple[int, ...]) -> None:
    """An input without rows, or with an axis of length 0, has an output of the same shape."""
    assert compute(di.map_blocks(np.negative, make(shape))).shape == shape


def test_later_chunks_are_merged() -> None:
    """The model gets whole rows, even if their axes are cut."""
    x = np.arange(2 * 4 * 6, dtype="float32").reshape(2, 4, 6)
    lazy = di.map_blocks(lambda x: x.sum((1, 2)), da.from_array(x, chunks=(1, 3, 2)))
    np.testing.assert_array_equal(compute(lazy), x.sum((1, 2)))


@pytest.mark.parametrize("later", [(), (2,), (2, 3), (1, 2, 3)])
def test_outputs_of_any_ndim(later: tuple[int, ...]) -> None:
    """An output may have fewer axes than the input, or more."""
    expected = X.reshape(20, -1)[:, 0][(..., *[None] * len(later))] * np.ones(later, "float32")
    lazy = di.map_blocks(lambda x: x[:, 0][(..., *[None] * len(later))] * np.ones(later, "float32"), X, batch_size=3)
    np.testing.assert_array_equal(compute(lazy), expected, strict=True)


def test_bytes_are_reproducible() -> None:
    """Computing twice, in one thread or in several, returns the same bytes."""
    lazy = di.map_blocks(make_dense(), da.from_array(X, chunks=(3, 2)), batch_size=4)
    assert len({compute(lazy).tobytes(), compute(lazy).tobytes(), lazy.compute(scheduler="threads").tobytes()}) == 1


def test_the_model_is_a_copy() -> None:
    """The outputs come from the model as it was when it was passed, and the caller's is not changed."""
    model = make_dense().train()
    expected, before = run_plainly(model, X), {k: v.clone() for k, v in model.state_dict().items()}
    lazy = di.map_blocks(model, X)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        model[0].weight.zero_()
    np.testing.assert_allclose(compute(lazy), expected, rtol=1e-5, atol=1e-6)


# Ports, forms, options


def test_ports_of_unlike_ndim() -> None:
    """Ports may differ in their number of axes and in their chunks."""
    x = {"image": da.ones((20, 2, 2), chunks=(6, 1, 2)), "meta": X, "age": X[:, 0].tolist()}
    lazy = di.map_blocks(lambda image, meta, age: image.sum((1, 2)) + meta[:, 0] - age, x)
    assert lazy.chunks == ((6, 6, 6, 2),)
    np.testing.assert_array_equal(compute(lazy), np.full(20, 4.0), strict=True)


def test_dask_ports_with_unlike_chunks() -> None:
    """Of several dask arrays, the chunks of the first on axis 0 apply."""
    lazy = di.map_blocks(np.subtract, (da.from_array(X, chunks=(6, 1)), da.from_array(X, chunks=(7, 3))))
    assert lazy.chunks[0] == (6, 6, 6, 2)
    assert not compute(lazy).any()


@pytest.mark.parametrize("form", [torch.from_numpy(X), X.tolist(), list(X), np.asfortranarray(X), X.astype(">f4")])
def test_forms(form: Any) -> None:
    """Tensors, lists and arrays of any memory layout return the same output, as a dask array."""
    np.testing.assert_allclose(
        compute(di.map_blocks(make_dense(), form)), run_plainly(make_dense(), X), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_files(tmp_path: Path, suffix: str) -> None:
    """A file returns the same output."""
    if suffix == ".npy":
        np.save(tmp_path / "x.npy", X)
    else:
        zarr.create_array(tmp_path / "x.zarr", shape=X.shape, dtype="f4", chunks=(7, 2))[:] = X
    lazy = di.map_blocks(make_dense(), tmp_path / f"x{suffix}", batch_size=2)
    np.testing.assert_allclose(compute(lazy), run_plainly(make_dense(), X), rtol=1e-5, atol=1e-6)


def test_bfloat16_tensors() -> None:
    """A bfloat16 tensor reaches a bfloat16 model as bfloat16."""
    model, x = make_dense().bfloat16(), torch.from_numpy(X).bfloat16()
    with torch.no_grad():
        expected = model(x).float().numpy()
    np.testing.assert_allclose(compute(di.map_blocks(model, x)), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("batch_size", [1, 20, 21, 10**4])
def test_batch_sizes(batch_size: int) -> None:
    """A batch may be one row, or larger than the input."""
    lazy = di.map_blocks(make_dense(), X, batch_size=batch_size)
    np.testing.assert_allclose(compute(lazy), run_plainly(make_dense(), X), rtol=1e-5, atol=1e-6)


def test_options() -> None:
    """Options may be a record, and keywords override its fields."""
    lazy = di.map_blocks(make_dense(), X, options=di.Options(postprocess=np.negative, dtype="float64"), dtype="float32")
    np.testing.assert_allclose(compute(lazy), -run_plainly(make_dense(), X), rtol=1e-5, atol=1e-6)


# Several outputs


class Counting(nn.Module):
    """Writes a byte to a file each time it is called, and returns a dict."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = str(path)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        with open(self.path, "ab") as file:
            file.write(b".")
        return {"sum": x.sum(1), "parts": (x + 1, [x.mul(2).long()])}


@pytest.fixture
def counted(tmp_path: Path) -> tuple[Any, Callable[[], int]]:
    """A lazy output of several arrays in 4 chunks of one batch each, and a function that counts calls of the model."""
    file = tmp_path / "calls"
    lazy = di.map_blocks(Counting(file), da.from_array(X, chunks=(5, 2)), batch_size=5)
    file.write_bytes(b"")
    return lazy, lambda: file.stat().st_size


def test_structure(counted: Any) -> None:
    """Several outputs have the structure of the model's output, each a dask array."""
    (lazy, _) = counted
    (y,) = dask.compute(lazy, scheduler="synchronous")
    np.testing.assert_array_equal(y["sum"], torch.from_numpy(X).sum(1))
    np.testing.assert_array_equal(y["parts"][0], X + 1)
    np.testing.assert_array_equal(y["parts"][1][0], (X * 2).astype("int64"), strict=True)


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_computed_together(counted: Any, scheduler: str) -> None:
    """Computed together, several outputs take one call of the model per batch."""
    lazy, n_calls = counted
    dask.compute(lazy["sum"], lazy["parts"][0].mean(), lazy["parts"][1][0], scheduler=scheduler)
    assert n_calls() == 4


def test_computed_separately(counted: Any) -> None:
    """Computed one by one, each output takes a run of its own."""
    lazy, n_calls = counted
    compute(lazy["sum"])
    compute(lazy["parts"][0])
    assert n_calls() == 8


def test_slice_computes_only_its_chunks(counted: Any) -> None:
    """A slice computes only the chunks that contain it."""
    lazy, n_calls = counted
    np.testing.assert_allclose(compute(lazy["sum"][6:9]), X[6:9].sum(1), rtol=1e-5)
    assert n_calls() == 1


# Plain Dask


def test_composable(tmp_path: Path) -> None:
    """The output is plain Dask: it can be reduced, sliced, rechunked, concatenated, persisted and stored."""
    lazy, expected = di.map_blocks(make_dense(), da.from_array(X, chunks=(6, 3))), run_plainly(make_dense(), X)
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(compute(lazy.mean(axis=0)), expected.mean(axis=0), **close)
    np.testing.assert_allclose(compute(lazy[::-2, 1]), expected[::-2, 1], **close)
    np.testing.assert_allclose(compute(lazy[lazy[:, 0] > 0]), expected[expected[:, 0] > 0], **close)
    np.testing.assert_allclose(compute(lazy.rechunk((3, 1))), expected, **close)
    np.testing.assert_allclose(compute(da.concatenate([lazy, lazy - 1])), np.concatenate([expected, expected - 1]), **close)
    np.testing.assert_allclose(compute(lazy.persist(scheduler="synchronous") @ np.ones(2, "f4")), expected.sum(1), **close)
    np.testing.assert_allclose(np.concatenate(list(map(compute, lazy.blocks))), expected, **close)
    with dask.config.set(scheduler="synchronous"):
        lazy.to_zarr(tmp_path / "y.zarr")
    np.testing.assert_allclose(zarr.open_array(tmp_path / "y.zarr", mode="r")[:], expected, **close)


def test_models_in_a_row() -> None:
    """A lazy output, with its chunks, can be the input of the next model."""
    lazy = di.map_blocks(nn.Flatten(), di.map_blocks(make_dense(), da.from_array(X, chunks=(6, 3))), batch_size=4)
    assert lazy.chunks[0] == (6, 6, 6, 2)
    np.testing.assert_allclose(compute(lazy), run_plainly(make_dense(), X), rtol=1e-5, atol=1e-6)


def test_chunks_that_dask_made() -> None:
    """The rows may come from any dask graph."""
    x = (da.from_array(X, chunks=(6, 3)) - X.mean(0)).rechunk((4, 2))
    np.testing.assert_allclose(
        compute(di.map_blocks(make_dense(), x)), run_plainly(make_dense(), X - X.mean(0)), rtol=1e-4, atol=1e-5
    )


def test_chunks_are_not_overwritten() -> None:
    """A model that works in place does not change the chunks of a persisted array."""
    x = da.from_array(X.copy(), chunks=(6, 3)).persist(scheduler="synchronous")
    compute(di.map_blocks(nn.ReLU(inplace=True), x))
    np.testing.assert_array_equal(compute(x), X)


class ConcurrencyProbe:
    """Records how many threads call it at the same time."""

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
    """Without a cluster torch uses all cores, so the model runs one chunk at a time, however many threads dask has."""
    lazy = di.map_blocks(ConcurrencyProbe(tmp_path / "seen"), da.from_array(X, chunks=(1, 3)))
    lazy.compute(scheduler="threads", num_workers=4)
    seen = [line.split(maxsplit=1) for line in (tmp_path / "seen").read_text().splitlines()]
    assert {inside for inside, _ in seen} == {"1"}
    assert len({name for _, name in seen[1:]}) > 1


def test_torch_threads_stay() -> None:
    """Computing does not change the number of torch threads of this process."""
    before = torch.get_num_threads()
    compute(di.map_blocks(make_dense(), X))
    assert torch.get_num_threads() == before


# Errors


def test_unknown_chunks() -> None:
    """A dask array of unknown length is refused."""
    x = da.from_array(X, chunks=(6, 3))
    with pytest.raises(InputError, match=r"unknown chunk sizes, .* Call x\.compute_chunk_sizes\(\)"):
        di.map_blocks(make_dense(), x[x[:, 0] > 0])


def test_all_problems_at_once() -> None:
    """Everything that cannot work is reported at once."""
    with pytest.raises(
        PlanError, match=r"(?s)invalid plan, 4 problems.*x holds text.*autocast.*batch_size.*model must be .*, got int"
    ):
        di.map_blocks(3, ["a"], autocast="int8", batch_size=0)


def test_wrong_output_option() -> None:
    """An output= that does not match the model's output is an error of the first chunk."""
    lazy = di.map_blocks(make_dense(), X, output=np.empty((0, 5), "float32"))
    with pytest.raises(ModelError, match=r"the model returned \(2,\) float32 per row, \(5,\) float32 was planned"):
        compute(lazy)


def test_failing_rows() -> None:
    """A model that fails on some rows raises an error that names them, and computes the others."""

    def fail_on_13(x: np.ndarray) -> np.ndarray:
        if (x == 13).any():
            raise ValueError("unlucky")
        return x

    lazy = di.map_blocks(fail_on_13, da.arange(20, chunks=5), batch_size=2)
    with pytest.raises(ChunkError, match="rows 13:14 on cpu failed: ValueError: unlucky"):
        compute(lazy)
    assert compute(lazy[:10]).tolist() == list(range(10))


# On a cluster


def test_distributed(cluster_client: Client) -> None:
    """On a cluster the workers compute the output, several arrays in one run."""
    lazy = di.map_blocks(lambda x: (x, -x[:, 0]), da.from_array(X, chunks=(6, 2)))
    rows, first = (future.result() for future in cluster_client.compute(list(lazy)))
    np.testing.assert_array_equal(rows, X)
    np.testing.assert_array_equal(first, -X[:, 0])
    other = di.map_blocks(make_dense(), X).compute(scheduler=cluster_client)
    np.testing.assert_allclose(other, run_plainly(make_dense(), X), rtol=1e-5, atol=1e-6)


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
def test_options_of_computing_functions_are_refused(option: dict[str, Any]) -> None:
    """Options without effect, since Dask computes the chunks, are refused as keywords and as fields of Options."""
    ((name, value),) = option.items()
    with pytest.raises(OptionError, match=rf"{name!r} is a keyword of predict, stream, run"):
        di.map_blocks(np.negative, da.ones(10), **option)
    message = rf"map_blocks takes no {name}, got {name}={value!r}: Dask .* use predict, stream or run"
    with pytest.raises(OptionError, match=message):
        di.map_blocks(np.negative, da.ones(10), options=di.Options(**option))
