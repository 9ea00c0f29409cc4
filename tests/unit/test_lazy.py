from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
from dask._task_spec import Alias
from torch import nn

from daskinfer import lazy
from daskinfer.errors import ChunkError
from daskinfer.models.model import as_model
from daskinfer.options import Options
from daskinfer.planning.inputs import Inputs
from daskinfer.planning.output_spec import infer_output_spec
from daskinfer.worker.model_runner import ModelRunConfig
from daskinfer.worker.task import ComputedChunk

X = np.random.default_rng(0).normal(size=(10, 3)).astype("float32")


def build(model: Any, x: Any, row_chunks: tuple[int, ...], *, batch_size: int = 2, **fields: Any) -> tuple[da.Array, Any]:
    """The private blocks and the public arrays."""
    inputs, recipe, options = Inputs.from_value(x), as_model(model).make_loader(), Options(**fields)
    promised = infer_output_spec(recipe, inputs.ports, inputs.make_empty_arrays(), options)
    blocks = lazy.build_blocks(
        inputs.make_dask_arrays(row_chunks), recipe, ModelRunConfig(inputs.ports, batch_size, options, promised.outputs)
    )
    return blocks, lazy.build_outputs(blocks, promised.structure, promised.outputs)


def tasks(collection: da.Array) -> list[Any]:
    """The keys of the optimised graph that are work or data, not other names for them."""
    optimised = dict(dask.optimize(collection)[0].__dask_graph__())
    return [key for key, node in optimised.items() if not isinstance(node, Alias)]


def computed(blocks: da.Array) -> list[ComputedChunk]:
    """Each block."""
    return list(dask.compute(*blocks.to_delayed().ravel(), scheduler="synchronous"))


def test_blocks() -> None:
    """There is one block per chunk, with every output and a receipt."""
    blocks, _ = build(lambda x: {"a": x, "b": x[:, 0]}, X, (4, 6))
    first, second = computed(blocks)
    assert [array.shape for array in first.arrays + second.arrays] == [(4, 3), (4,), (6, 3), (6,)]
    assert (second.stats.start, second.stats.stop, second.stats.batch_size) == (4, 10, 2)


def test_inline_receipt() -> None:
    """Without a cluster the receipt says that it was computed in this process."""
    (block,) = computed(build(nn.Linear(3, 2), X, (10,))[0])
    assert block.stats.device == "inline"


def test_chunk_without_rows() -> None:
    """A chunk without rows has answers without rows, of its own, and no receipt; the network is not loaded for it."""
    job = ModelRunConfig(Inputs.from_value(X).ports, 2, Options(), (np.empty((0, 5), "int64"),))
    empty = lazy.compute_block(X[:0], (slice(3, 3),), loader=None, run_config=job)
    assert (empty.arrays[0].shape, empty.arrays[0].dtype, empty.stats) == ((0, 5), "int64", None)
    assert empty.arrays[0] is not job.outputs[0]


@pytest.mark.parametrize("n_given", [3, 5])
def test_chunk_of_another_length(n_given: int) -> None:
    """A dask array whose chunks are not as long as they say is refused: its rows would be counted wrongly."""
    lying = da.from_array(X, chunks=((4, 6), 3)).map_blocks(lambda rows: np.ones((n_given, 3), "f4"), dtype="f4")
    with pytest.raises(ChunkError, match=rf"rows \d+:\d+: the dask array of x computed {n_given} rows there"):
        computed(build(nn.Linear(3, 2), lying, (4, 6))[0])


def test_one_task_per_chunk(tmp_path: Path) -> None:
    """Reading a file, the network and its one output are one task per chunk; the model in memory is one node."""
    np.save(tmp_path / "x.npy", X)
    blocks, y = build(nn.Linear(3, 2), tmp_path / "x.npy", (2,) * 5)
    assert len(tasks(y)) == len(tasks(blocks)) == 5 + 1


def test_one_task_per_chunk_with_ports(tmp_path: Path) -> None:
    """So are several files."""
    np.save(tmp_path / "a.npy", X)
    np.save(tmp_path / "b.npy", X[:, 0])
    _, y = build(first, {"a": tmp_path / "a.npy", "b": tmp_path / "b.npy"}, (2,) * 5)
    assert len(tasks(y)) == 5 + 1


def first(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The first of two ports."""
    return a


def test_dask_array_costs_one_task_more() -> None:
    """A dask array's chunk with its later axes put together is a task of its own."""
    x = da.ones((10, 3), chunks=(2, 3), dtype="float32")
    assert len(tasks(build(nn.Linear(3, 2), x, x.chunks[0])[1])) == 2 * 5 + 1


def test_model_by_reference_is_no_node(tmp_path: Path) -> None:
    """A model that workers can import needs no node."""
    np.save(tmp_path / "x.npy", X)
    _, y = build("torch.nn:Flatten", tmp_path / "x.npy", (2,) * 5)
    assert len(tasks(y)) == 5


@pytest.mark.parametrize("n_chunks", [1, 64])
def test_model_travels_once(n_chunks: int) -> None:
    """However many chunks there are, the model is in the graph once."""
    _, y = build(
        nn.Linear(1000, 100),
        da.ones((64, 1000), chunks=(64 // n_chunks, 1000), dtype="float32"),
        (64 // n_chunks,) * n_chunks,
    )
    model = 4 * (100 * 1000 + 100)
    assert model < len(pickle.dumps(y)) < 1.2 * model
    assert model < len(pickle.dumps(dict(dask.optimize(y)[0].__dask_graph__()))) < 1.2 * model


def test_rows_of_output_do_not_travel() -> None:
    """What output= holds in rows is in no graph."""
    _, y = build(nn.Linear(3, 2), da.from_array(X, chunks=(5, 3)), (5, 5), output=np.ones((10**6, 2), "float32"))
    assert len(pickle.dumps(y)) < 20_000
    assert y.compute(scheduler="synchronous").shape == (10, 2)


def test_output_given_as_dask_array() -> None:
    """A dask array as output= says what the answer looks like, and is not computed."""
    like = da.from_delayed(dask.delayed(lambda: 1 / 0)(), shape=(7, 2), dtype="float32")
    _, y = build(nn.Linear(3, 2), X, (10,), output=like)
    assert y.compute(scheduler="synchronous").shape == (10, 2)


def test_steps_travel_by_value() -> None:
    """A pre- or postprocess that no worker could import travels with the graph."""
    shift = 3
    _, y = build(nn.Identity(), X, (4, 6), preprocess=lambda x: x + shift, postprocess=lambda y: -y)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(y)).compute(scheduler="synchronous"), -(X + 3))


def test_names_tell_models_apart() -> None:
    """Equal calls make equal names, other networks, options and micro-batches other ones."""
    x = da.ones((10, 3), chunks=5, dtype="float32")
    torch.manual_seed(0)
    net, other = nn.Linear(3, 2), nn.Linear(3, 2)
    same = [build(net, x, (5, 5))[1].name for _ in range(2)]
    assert same[0] == same[1]
    others = [build(other, x, (5, 5)), build(net, x, (5, 5), batch_size=3), build(net, x, (5, 5), postprocess=np.negative)]
    others.append(build(net, x, (5, 5), postprocess=np.abs))
    assert len({same[0], *(y.name for _, y in others)}) == 5
