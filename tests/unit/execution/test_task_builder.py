"""Building tasks: where the rows of each kind of input are, and where outputs go."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from distributed import Client, wait
from hypothesis import given, settings
from hypothesis import strategies as st

from daskinfer.core.chunks import Chunk
from daskinfer.execution.task_builder import TaskBuilder
from daskinfer.planning.inputs import Inputs
from daskinfer.transport.row_sources import (
    MAX_INLINE_NBYTES,
    FileRows,
    GraphRows,
    InlineRows,
    ProcessMemoryRows,
    ScatteredRows,
    SharedMemoryRows,
    Task,
    TaskResources,
)
from daskinfer.transport.shared_memory import SharedMemoryPool

X = np.arange(40, dtype="float32").reshape(10, 4)
CHUNKS = (4, 4, 2)
Y = (np.empty((0, 3), "float32"),)
DTYPES = ("bool", "uint8", "float16", "float32", ">f8", "complex64")


@pytest.fixture(scope="module", autouse=True)
def _zarr_thread(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Start the thread that zarr keeps for the whole process, before a test counts threads."""
    zarr.create_array(tmp_path_factory.mktemp("zarr") / "x", shape=(1,), dtype="f4")[:] = 1


def make_chunks(row_chunks: Sequence[int]) -> list[Chunk]:
    """Make chunks of so many rows each."""
    ends = itertools.pairwise(itertools.accumulate(row_chunks, initial=0))
    return [Chunk(index, start, stop) for index, (start, stop) in enumerate(ends)]


def make_builder(
    value: Any, outputs: Sequence[Any] = Y, row_chunks: Sequence[int] = CHUNKS, client: Any = None
) -> TaskBuilder:
    """Make a builder for these inputs."""
    return TaskBuilder(Inputs.from_value(value), outputs, row_chunks, client)


def build_task(builder: TaskBuilder, chunks: Sequence[Chunk]) -> tuple[Task, SharedMemoryPool]:
    """Build a task of these chunks in a pool of one slot, which is just as large as the builder says."""
    pool = SharedMemoryPool(builder.compute_slot_nbytes(sum(chunk.n_rows for chunk in chunks), len(chunks)), 1)
    task, dependencies = builder.build_task(chunks, pool.free_slots.pop())
    assert dependencies == []
    return task, pool


def write_x(folder: Path, suffix: str) -> Path:
    """Write X into a file."""
    path = folder / f"x{suffix}"
    if suffix == ".npy":
        np.save(path, X)
    else:
        zarr.create_array(path, shape=X.shape, dtype="f4", chunks=(4, 2))[:] = X
    return path


def test_row_sources_by_kind_of_input(tmp_path: Path) -> None:
    """Rows in memory go into the slot; workers read those of files, and compute those of graphs; all are the same."""
    graph = da.from_array(X, chunks=(4, 4)) + 0
    inputs = (X, write_x(tmp_path, ".npy"), write_x(tmp_path, ".zarr"), da.from_array(X, chunks=(4, 4)), graph)
    chunk = make_chunks(CHUNKS)[1]
    task, pool = build_task(make_builder(inputs), [chunk])
    (chunk_input,) = pickle.loads(pickle.dumps(task)).chunk_inputs
    assert [type(source) for source in chunk_input.row_sources] == [
        SharedMemoryRows,
        FileRows,
        FileRows,
        SharedMemoryRows,
        GraphRows,
    ]
    for source in chunk_input.row_sources:
        np.testing.assert_array_equal(source.read_rows(TaskResources(pool.memory)), X[4:8])
    pool.close()


def test_a_task_in_a_slot() -> None:
    """A task with a slot says where each chunk's rows are, where its outputs go, and where the result header goes."""
    task, pool = build_task(make_builder(X), chunks := make_chunks(CHUNKS)[:2])
    assert [chunk_input.chunk for chunk_input in task.chunk_inputs] == chunks
    assert [ref.shape for chunk_input in task.chunk_inputs for ref in chunk_input.output_refs or ()] == [(4, 3), (4, 3)]
    assert (task.pool_ref, task.header_offset) == (pool.ref, pool.slot_nbytes + 4096 - (32 << 10))
    pool.close()


def test_a_task_for_a_worker_that_reads_process_memory(tmp_path: Path) -> None:
    """Rows in memory stay in place for a worker that can read them; rows that are not contiguous go into the slot."""
    graph = da.from_array(X, chunks=(4, 4)) + 0
    inputs = (X, write_x(tmp_path, ".npy"), da.from_array(X, chunks=(4, 4)), graph, np.asfortranarray(X))
    builder, chunk = make_builder(inputs), make_chunks(CHUNKS)[1]
    pool = SharedMemoryPool(builder.compute_slot_nbytes(4, 1), 1)
    task, dependencies = builder.build_task([chunk], pool.free_slots.pop(), reads_process_memory=True)
    (chunk_input,) = pickle.loads(pickle.dumps(task)).chunk_inputs
    assert [type(source) for source in chunk_input.row_sources] == [
        ProcessMemoryRows,
        FileRows,
        ProcessMemoryRows,
        GraphRows,
        SharedMemoryRows,
    ]
    assert (dependencies, [ref.shape for ref in chunk_input.output_refs]) == ([], [(4, 3)])
    for source in chunk_input.row_sources:
        np.testing.assert_array_equal(source.read_rows(TaskResources(pool.memory)), X[4:8])
    pool.close()


def test_a_task_without_a_slot() -> None:
    """Without a slot the rows travel in the task, and the outputs come back through Dask."""
    task, dependencies = make_builder(X).build_task(make_chunks(CHUNKS)[1:], None)
    assert (task.pool_ref, dependencies, [chunk_input.output_refs for chunk_input in task.chunk_inputs]) == (
        None,
        [],
        [None, None],
    )
    assert all(isinstance(source, InlineRows) for chunk_input in task.chunk_inputs for source in chunk_input.row_sources)
    rows = [
        chunk_input.row_sources[0].read_rows(TaskResources())
        for chunk_input in pickle.loads(pickle.dumps(task)).chunk_inputs
    ]
    np.testing.assert_array_equal(np.concatenate(rows), X[4:])


def test_a_task_without_a_slot_holds_its_own_rows_only() -> None:
    """The rows of the chunk travel, not the array that they are a view of."""
    task, _ = make_builder(np.ones((100_000, 4)), row_chunks=(4, 99_996)).build_task([Chunk(0, 0, 4)], None)
    assert len(pickle.dumps(task)) < 2000


def test_large_rows_without_a_slot(cluster_client: Client) -> None:
    """Without a slot the large rows of a task are sent through Dask's comms to its worker."""
    address = sorted(cluster_client.has_what())[0]
    x = np.random.default_rng(0).normal(size=(3, MAX_INLINE_NBYTES))
    builder = make_builder({"a": x, "b": X[:3]}, row_chunks=(3,), client=cluster_client)
    task, dependencies = builder.build_task(make_chunks((3,)), None, [address])
    assert [type(source) for source in task.chunk_inputs[0].row_sources] == [ScatteredRows, InlineRows]
    assert list(cluster_client.who_has(dependencies).values()) == [(address,)]
    assert len(pickle.dumps(task)) < 2000
    np.testing.assert_array_equal(dependencies[0].result(), x)


def test_outputs_that_go_into_files() -> None:
    """Outputs that workers write to files take no space in the slot."""
    builder = make_builder(X, outputs=())
    task, pool = build_task(builder, make_chunks(CHUNKS)[:1])
    assert task.chunk_inputs[0].output_refs is None
    assert builder.compute_slot_nbytes(1000, 1) < make_builder(X).compute_slot_nbytes(1000, 1)
    pool.close()


def test_a_slot_that_is_too_small_for_the_outputs() -> None:
    """Outputs that do not fit come back through Dask, and the rows stay in the slot."""
    builder = make_builder(X, outputs=(np.empty((0, 10_000), "float64"),))
    pool = SharedMemoryPool(make_builder(X).compute_slot_nbytes(10, 1), 1)
    task, _ = builder.build_task(make_chunks((10,)), pool.free_slots.pop())
    assert (task.chunk_inputs[0].output_refs, type(task.chunk_inputs[0].row_sources[0])) == (None, SharedMemoryRows)
    pool.close()


def test_files_take_no_shared_memory(tmp_path: Path) -> None:
    """Rows that workers read from files take no space in a slot, however many they are."""
    builder = make_builder(write_x(tmp_path, ".npy"), outputs=())
    assert builder.compute_slot_nbytes(10**9, 64) == builder.compute_slot_nbytes(1, 64)


@given(
    row_shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=2, max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    n_outputs=st.integers(1, 3),
    lazy=st.sets(st.integers(0, 5)),
    row_chunks=st.lists(st.integers(1, 20), min_size=1, max_size=8),
)
@settings(max_examples=60, deadline=None)
def test_a_slot_holds_the_largest_task(
    row_shapes: list[list[int]], dtypes: list[str], n_outputs: int, lazy: set[int], row_chunks: list[int]
) -> None:
    """A slot of the computed size has room for every port and every output of all chunks."""
    n_outputs = min(n_outputs, len(row_shapes) - 1)
    arrays = [np.ones((sum(row_chunks), *shape), dtype) for shape, dtype in zip(row_shapes, dtypes, strict=False)]
    ports, outputs = arrays[n_outputs:], [array[:0] for array in arrays[:n_outputs]]
    given_ports = tuple(
        da.from_array(a, chunks=(tuple(row_chunks), *((n,) for n in a.shape[1:]))) if i in lazy else a
        for i, a in enumerate(ports)
    )
    task, pool = build_task(make_builder(given_ports, outputs, row_chunks), make_chunks(row_chunks))
    for chunk_input in task.chunk_inputs:
        assert [type(source) for source in chunk_input.row_sources] == [SharedMemoryRows] * len(ports)
        assert chunk_input.output_refs is not None
        assert [ref.shape for ref in chunk_input.output_refs] == [
            (chunk_input.chunk.n_rows, *out.shape[1:]) for out in outputs
        ]
    pool.close()


def test_rows_in_this_process(tmp_path: Path) -> None:
    """This process can read the rows of a chunk from every kind of input, too."""
    graph = da.from_array(X, chunks=(5, 2)) * 1
    builder = make_builder({"a": X, "b": write_x(tmp_path, ".zarr"), "c": graph, "d": X.tolist()})
    for chunk in make_chunks(CHUNKS):
        for rows in builder.read_rows(chunk):
            np.testing.assert_array_equal(rows, X[chunk.start : chunk.stop])


def test_rows_in_this_process_are_not_copied() -> None:
    """Rows of an array in this process are views of the array."""
    (rows,) = make_builder(X).read_rows(Chunk(0, 4, 8))
    assert np.shares_memory(rows, X)


def test_a_persisted_array(cluster_client: Client) -> None:
    """Blocks that are on the cluster are dependencies of the task."""
    with cluster_client.as_current():
        wait(persisted := cluster_client.persist(da.from_array(X, chunks=(4, 4)) + 1))
    task, dependencies = make_builder(persisted, client=cluster_client).build_task(make_chunks(CHUNKS), None)
    assert [chunk_input.row_sources for chunk_input in task.chunk_inputs] == [
        (ScatteredRows(0),),
        (ScatteredRows(1),),
        (ScatteredRows(2),),
    ]
    np.testing.assert_array_equal(np.concatenate([future.result() for future in dependencies]), X + 1)


def test_persisted_rows_in_this_process(cluster_client: Client) -> None:
    """Blocks that are on a cluster are fetched if this process computes."""
    with cluster_client.as_current():
        wait(persisted := cluster_client.persist(da.from_array(X, chunks=(4, 4)) + 1))
    builder = make_builder((persisted, persisted * 2))
    first, second = builder.read_rows(make_chunks(CHUNKS)[1])
    np.testing.assert_array_equal(first, X[4:8] + 1)
    np.testing.assert_array_equal(second, 2 * (X[4:8] + 1))


def test_dependent_blocks_in_this_process() -> None:
    """If blocks depend on each other and no cluster computes them, their rows are right in this process, too."""
    x = da.from_array(X, chunks=(4, 4))
    (rows,) = make_builder(x - x.mean(0)).read_rows(make_chunks(CHUNKS)[2])
    np.testing.assert_allclose(rows, X[8:] - X.mean(0))
