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
from daskinfer.core.chunks import BatchConfig, ChunkResult
from daskinfer.errors import ChunkError
from daskinfer.models.model import as_model
from daskinfer.options import Options
from daskinfer.planning.inputs import Inputs
from daskinfer.planning.output_spec import infer_output_spec
from daskinfer.worker.model_runner import ModelRunConfig

X = np.random.default_rng(0).normal(size=(10, 3)).astype("float32")


def build(model: Any, x: Any, row_chunks: tuple[int, ...], *, batch_size: int = 2, **fields: Any) -> tuple[da.Array, Any]:
    """Build the private blocks and the public arrays."""
    inputs, loader, options = Inputs.from_value(x), as_model(model).make_loader(), Options(**fields)
    spec = infer_output_spec(loader, inputs.ports, inputs.make_empty_arrays(), options)
    run_config = ModelRunConfig(inputs.ports, BatchConfig(batch_size), options, spec.outputs)
    blocks = lazy.build_blocks(inputs.make_dask_arrays(row_chunks), loader, run_config)
    return blocks, lazy.build_outputs(blocks, spec.structure, spec.outputs)


def list_tasks(collection: da.Array) -> list[Any]:
    """Return the keys of the optimised graph that are work or data, without aliases."""
    optimised = dict(dask.optimize(collection)[0].__dask_graph__())
    return [key for key, node in optimised.items() if not isinstance(node, Alias)]


def compute_blocks(blocks: da.Array) -> list[ChunkResult]:
    """Compute every block."""
    return list(dask.compute(*blocks.to_delayed().ravel(), scheduler="synchronous"))


def test_blocks() -> None:
    """Each chunk is one block, with every output and the statistics."""
    blocks, _ = build(lambda x: {"a": x, "b": x[:, 0]}, X, (4, 6))
    first, second = compute_blocks(blocks)
    assert [array.shape for array in first.arrays + second.arrays] == [(4, 3), (4,), (6, 3), (6,)]
    assert (second.stats.start, second.stats.stop, second.stats.batch_size) == (4, 10, 2)


def test_inline_stats() -> None:
    """Without a cluster, the statistics say that the chunk was computed in this process."""
    (block,) = compute_blocks(build(nn.Linear(3, 2), X, (10,))[0])
    assert block.stats.device == "inline"


def test_chunk_without_rows() -> None:
    """A chunk without rows has outputs without rows, of its own, and empty statistics; the model is not loaded for it."""
    run_config = ModelRunConfig(Inputs.from_value(X).ports, BatchConfig(2), Options(), (np.empty((0, 5), "int64"),))
    empty = lazy.compute_block(X[:0], (slice(3, 3),), loader=None, run_config=run_config)
    assert (empty.arrays[0].shape, empty.arrays[0].dtype, empty.stats.is_abandoned) == ((0, 5), "int64", True)
    assert empty.arrays[0] is not run_config.outputs[0]


@pytest.mark.parametrize("n_actual", [3, 5])
def test_chunk_of_another_length(n_actual: int) -> None:
    """A dask array whose chunks are not as long as declared is refused: its rows would be assigned wrongly."""
    mismatched = da.from_array(X, chunks=((4, 6), 3)).map_blocks(lambda rows: np.ones((n_actual, 3), "f4"), dtype="f4")
    with pytest.raises(
        ChunkError, match=rf"rows \d+:\d+: the dask array of x computed {n_actual} rows, not as many as its chunks say"
    ):
        compute_blocks(build(nn.Linear(3, 2), mismatched, (4, 6))[0])


def test_one_task_per_chunk(tmp_path: Path) -> None:
    """Reading a file, the model and its only output are one task per chunk; a model in memory is one node."""
    np.save(tmp_path / "x.npy", X)
    blocks, y = build(nn.Linear(3, 2), tmp_path / "x.npy", (2,) * 5)
    assert len(list_tasks(y)) == len(list_tasks(blocks)) == 5 + 1


def test_one_task_per_chunk_with_ports(tmp_path: Path) -> None:
    """Several files are read in the same one task per chunk."""
    np.save(tmp_path / "a.npy", X)
    np.save(tmp_path / "b.npy", X[:, 0])
    _, y = build(get_first, {"a": tmp_path / "a.npy", "b": tmp_path / "b.npy"}, (2,) * 5)
    assert len(list_tasks(y)) == 5 + 1


def get_first(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the first of two ports."""
    return a


def test_dask_array_costs_one_task_more() -> None:
    """Merging the later axes of a dask array is one more task per chunk."""
    x = da.ones((10, 3), chunks=(2, 3), dtype="float32")
    assert len(list_tasks(build(nn.Linear(3, 2), x, x.chunks[0])[1])) == 2 * 5 + 1


def test_model_by_reference_is_no_node(tmp_path: Path) -> None:
    """A model that workers can import is no node of the graph."""
    np.save(tmp_path / "x.npy", X)
    _, y = build("torch.nn:Flatten", tmp_path / "x.npy", (2,) * 5)
    assert len(list_tasks(y)) == 5


@pytest.mark.parametrize("n_chunks", [1, 64])
def test_model_travels_once(n_chunks: int) -> None:
    """The model is in the graph once, however many chunks there are."""
    _, y = build(
        nn.Linear(1000, 100),
        da.ones((64, 1000), chunks=(64 // n_chunks, 1000), dtype="float32"),
        (64 // n_chunks,) * n_chunks,
    )
    model = 4 * (100 * 1000 + 100)
    assert model < len(pickle.dumps(y)) < 1.2 * model
    assert model < len(pickle.dumps(dict(dask.optimize(y)[0].__dask_graph__()))) < 1.2 * model


def test_rows_of_output_do_not_travel() -> None:
    """The rows of output= are not in the graph."""
    _, y = build(nn.Linear(3, 2), da.from_array(X, chunks=(5, 3)), (5, 5), output=np.ones((10**6, 2), "float32"))
    assert len(pickle.dumps(y)) < 20_000
    assert y.compute(scheduler="synchronous").shape == (10, 2)


def test_output_given_as_dask_array() -> None:
    """A dask array as output= describes the output, and is not computed."""
    like = da.from_delayed(dask.delayed(lambda: 1 / 0)(), shape=(7, 2), dtype="float32")
    _, y = build(nn.Linear(3, 2), X, (10,), output=like)
    assert y.compute(scheduler="synchronous").shape == (10, 2)


def test_steps_travel_by_value() -> None:
    """A pre- or postprocess that workers cannot import travels with the graph."""
    shift = 3
    _, y = build(nn.Identity(), X, (4, 6), preprocess=lambda x: x + shift, postprocess=lambda y: -y)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(y)).compute(scheduler="synchronous"), -(X + 3))


def test_names_tell_models_apart() -> None:
    """Equal calls produce equal names; other models, options and batch sizes produce other names."""
    x = da.ones((10, 3), chunks=5, dtype="float32")
    torch.manual_seed(0)
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    same = [build(model, x, (5, 5))[1].name for _ in range(2)]
    assert same[0] == same[1]
    others = [
        build(other, x, (5, 5)),
        build(model, x, (5, 5), batch_size=3),
        build(model, x, (5, 5), postprocess=np.negative),
    ]
    others.append(build(model, x, (5, 5), postprocess=np.abs))
    assert len({same[0], *(y.name for _, y in others)}) == 5
