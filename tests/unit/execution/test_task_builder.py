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
from daskinfer.transport.routing import MAX_INLINE_NBYTES
from daskinfer.transport.row_sources import (
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


def chunks_of(row_chunks: Sequence[int]) -> list[Chunk]:
    """Chunks of so many rows each."""
    ends = itertools.pairwise(itertools.accumulate(row_chunks, initial=0))
    return [Chunk(index, start, stop, 0) for index, (start, stop) in enumerate(ends)]


def feeder_of(value: Any, outputs: Sequence[Any] = Y, row_chunks: Sequence[int] = CHUNKS, client: Any = None) -> TaskBuilder:
    """A feeder of these inputs."""
    return TaskBuilder(Inputs.from_value(value), outputs, row_chunks, client)


def made(feeder: TaskBuilder, chunks: Sequence[Chunk]) -> tuple[Task, SharedMemoryPool]:
    """A task of these chunks in an arena of one slot that is just as large as the feeder says."""
    arena = SharedMemoryPool(feeder.compute_slot_nbytes(sum(chunk.n_rows for chunk in chunks), len(chunks)), 1)
    task, brought = feeder.build_task(chunks, arena.free_slots.pop())
    assert brought == []
    return task, arena


def in_file(folder: Path, suffix: str) -> Path:
    """X in a file."""
    path = folder / f"x{suffix}"
    if suffix == ".npy":
        np.save(path, X)
    else:
        zarr.create_array(path, shape=X.shape, dtype="f4", chunks=(4, 2))[:] = X
    return path


def test_parts_by_kind_of_input(tmp_path: Path) -> None:
    """Rows in memory go into the slot, those of files are read there, those of tasks computed there; all are the same."""
    graph = da.from_array(X, chunks=(4, 4)) + 0
    inputs = (X, in_file(tmp_path, ".npy"), in_file(tmp_path, ".zarr"), da.from_array(X, chunks=(4, 4)), graph)
    chunk = chunks_of(CHUNKS)[1]
    task, arena = made(feeder_of(inputs), [chunk])
    (piece,) = pickle.loads(pickle.dumps(task)).pieces
    assert [type(part) for part in piece.parts] == [SharedMemoryRows, FileRows, FileRows, SharedMemoryRows, GraphRows]
    for part in piece.parts:
        np.testing.assert_array_equal(part.rows(TaskResources(arena.memory)), X[4:8])
    arena.close()


def test_a_task_in_a_slot() -> None:
    """A task in a slot says where each chunk's rows are, where its answer goes, and where the receipts do."""
    task, arena = made(feeder_of(X), chunks := chunks_of(CHUNKS)[:2])
    assert [piece.chunk for piece in task.chunk_inputs] == chunks
    assert [place.shape for piece in task.chunk_inputs for place in piece.output_refs or ()] == [(4, 3), (4, 3)]
    assert (task.pool_ref, task.header_offset) == (arena.ref, arena.slot_nbytes + 4096 - (32 << 10))
    arena.close()


def test_a_task_for_a_worker_that_reads(tmp_path: Path) -> None:
    """Rows in memory stay there for a worker that reads them, those that do not lie one after the other go into the slot."""
    graph = da.from_array(X, chunks=(4, 4)) + 0
    inputs = (X, in_file(tmp_path, ".npy"), da.from_array(X, chunks=(4, 4)), graph, np.asfortranarray(X))
    feeder, chunk = feeder_of(inputs), chunks_of(CHUNKS)[1]
    arena = SharedMemoryPool(feeder.compute_slot_nbytes(4, 1), 1)
    task, brought = feeder.build_task([chunk], arena.free_slots.pop(), reads_process_memory=True)
    (piece,) = pickle.loads(pickle.dumps(task)).pieces
    assert [type(part) for part in piece.parts] == [
        ProcessMemoryRows,
        FileRows,
        ProcessMemoryRows,
        GraphRows,
        SharedMemoryRows,
    ]
    assert (brought, [place.shape for place in piece.places]) == ([], [(4, 3)])
    for part in piece.parts:
        np.testing.assert_array_equal(part.rows(TaskResources(arena.memory)), X[4:8])
    arena.close()


def test_a_task_without_a_slot() -> None:
    """Without a slot the rows travel in the task and the answers come back."""
    task, brought = feeder_of(X).build_task(chunks_of(CHUNKS)[1:], None)
    assert (task.pool_ref, brought, [piece.output_refs for piece in task.chunk_inputs]) == (None, [], [None, None])
    assert all(isinstance(part, InlineRows) for piece in task.chunk_inputs for part in piece.row_sources)
    rows = [piece.parts[0].rows(TaskResources()) for piece in pickle.loads(pickle.dumps(task)).pieces]
    np.testing.assert_array_equal(np.concatenate(rows), X[4:])


def test_a_task_without_a_slot_holds_its_own_rows_only() -> None:
    """What travels is the rows of the chunk, not the array that they are a view of."""
    task, _ = feeder_of(np.ones((100_000, 4)), row_chunks=(4, 99_996)).build_task([Chunk(0, 0, 4, 0)], None)
    assert len(pickle.dumps(task)) < 2000


def test_large_rows_without_a_slot(cluster_client: Client) -> None:
    """Without a slot the large rows of a task go by Dask's comms to the worker that it is for."""
    address = sorted(cluster_client.has_what())[0]
    x = np.random.default_rng(0).normal(size=(3, MAX_INLINE_NBYTES))
    feeder = feeder_of({"a": x, "b": X[:3]}, row_chunks=(3,), client=cluster_client)
    task, brought = feeder.build_task(chunks_of((3,)), None, [address])
    assert [type(part) for part in task.chunk_inputs[0].row_sources] == [ScatteredRows, InlineRows]
    assert list(cluster_client.who_has(brought).values()) == [(address,)]
    assert len(pickle.dumps(task)) < 2000
    np.testing.assert_array_equal(brought[0].result(), x)


def test_answers_that_go_into_files() -> None:
    """Where workers write the answer to files it has no place in the slot, and takes no bytes of it."""
    feeder = feeder_of(X, outputs=())
    task, arena = made(feeder, chunks_of(CHUNKS)[:1])
    assert task.chunk_inputs[0].output_refs is None
    assert feeder.compute_slot_nbytes(1000, 1) < feeder_of(X).compute_slot_nbytes(1000, 1)
    arena.close()


def test_a_slot_that_is_too_small_for_the_answer() -> None:
    """An answer that has no room comes back by itself, and its rows stay in the slot."""
    feeder = feeder_of(X, outputs=(np.empty((0, 10_000), "float64"),))
    arena = SharedMemoryPool(feeder_of(X).compute_slot_nbytes(10, 1), 1)
    task, _ = feeder.build_task(chunks_of((10,)), arena.free_slots.pop())
    assert (task.chunk_inputs[0].output_refs, type(task.chunk_inputs[0].row_sources[0])) == (None, SharedMemoryRows)
    arena.close()


def test_files_take_no_shared_memory(tmp_path: Path) -> None:
    """Rows that workers read from files count nothing towards a slot, however many they are."""
    feeder = feeder_of(in_file(tmp_path, ".npy"), outputs=())
    assert feeder.compute_slot_nbytes(10**9, 64) == feeder.compute_slot_nbytes(1, 64)


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
    """A slot of the size that was said has room for every port and every output of all chunks."""
    n_outputs = min(n_outputs, len(row_shapes) - 1)
    arrays = [np.ones((sum(row_chunks), *shape), dtype) for shape, dtype in zip(row_shapes, dtypes, strict=False)]
    ports, outputs = arrays[n_outputs:], [array[:0] for array in arrays[:n_outputs]]
    given_ports = tuple(
        da.from_array(a, chunks=(tuple(row_chunks), *((n,) for n in a.shape[1:]))) if i in lazy else a
        for i, a in enumerate(ports)
    )
    task, arena = made(feeder_of(given_ports, outputs, row_chunks), chunks_of(row_chunks))
    for piece in task.chunk_inputs:
        assert [type(part) for part in piece.row_sources] == [SharedMemoryRows] * len(ports)
        assert piece.output_refs is not None
        assert [place.shape for place in piece.output_refs] == [(piece.chunk.n_rows, *out.shape[1:]) for out in outputs]
    arena.close()


def test_rows_in_this_process(tmp_path: Path) -> None:
    """Every kind of input gives the rows of a chunk to this process as well."""
    graph = da.from_array(X, chunks=(5, 2)) * 1
    feeder = feeder_of({"a": X, "b": in_file(tmp_path, ".zarr"), "c": graph, "d": X.tolist()})
    for chunk in chunks_of(CHUNKS):
        for rows in feeder.read_rows(chunk):
            np.testing.assert_array_equal(rows, X[chunk.start : chunk.stop])


def test_rows_in_this_process_are_not_copied() -> None:
    """Rows of an array in this process are the array's own."""
    (rows,) = feeder_of(X).read_rows(Chunk(0, 4, 8, 0))
    assert np.shares_memory(rows, X)


def test_a_slice_of_what_was_persisted(cluster_client: Client) -> None:
    """Blocks that lie on a cluster are brought with the task."""
    with cluster_client.as_current():
        wait(persisted := cluster_client.persist(da.from_array(X, chunks=(4, 4)) + 1))
    task, brought = feeder_of(persisted, client=cluster_client).build_task(chunks_of(CHUNKS), None)
    assert [piece.row_sources for piece in task.chunk_inputs] == [
        (ScatteredRows(0),),
        (ScatteredRows(1),),
        (ScatteredRows(2),),
    ]
    np.testing.assert_array_equal(np.concatenate([future.result() for future in brought]), X + 1)


def test_persisted_rows_in_this_process(cluster_client: Client) -> None:
    """Blocks that lie on a cluster are fetched where this process computes."""
    with cluster_client.as_current():
        wait(persisted := cluster_client.persist(da.from_array(X, chunks=(4, 4)) + 1))
    feeder = feeder_of((persisted, persisted * 2))
    first, second = feeder.read_rows(chunks_of(CHUNKS)[1])
    np.testing.assert_array_equal(first, X[4:8] + 1)
    np.testing.assert_array_equal(second, 2 * (X[4:8] + 1))


def test_dependent_blocks_in_this_process() -> None:
    """Where blocks depend on each other and nobody else computes, their rows are right here as well."""
    x = da.from_array(X, chunks=(4, 4))
    (rows,) = feeder_of(x - x.mean(0)).read_rows(chunks_of(CHUNKS)[2])
    np.testing.assert_allclose(rows, X[8:] - X.mean(0))
