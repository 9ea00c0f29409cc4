"""Rows from every place where they may be, and tasks that travel."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest

from daskinfer.core.chunks import Chunk
from daskinfer.storage.formats import open_source
from daskinfer.transport.process_memory import ProcessMemoryArray
from daskinfer.transport.row_sources import (
    ChunkInput,
    FileRows,
    GraphRows,
    InlineRows,
    ProcessMemoryRows,
    RowRouter,
    RowSource,
    ScatteredRows,
    SharedMemoryRows,
    Task,
    TaskResources,
)
from daskinfer.transport.shared_memory import SharedMemoryPool, attach_pool, compute_slot_nbytes, detach_all_pools

X = np.arange(24, dtype="float32").reshape(6, 4)

FORMS = {
    "plain": X,
    "fortran": np.asfortranarray(X),
    "every second column": np.repeat(X, 2, axis=1)[:, ::2],
    "turned round": X[::-1, ::-1],
    "on its side": X.T,
    "broadcast": np.broadcast_to(X[:1], (6, 4)),
    "read-only": np.frombuffer(X.tobytes(), "float32").reshape(6, 4),
    "big-endian": X.astype(">f4"),
    "bool": X > 7,
    "complex": X + 1j,
    "float16": X.astype("float16"),
    "1-d": X[:, 0],
    "4-d": X.reshape(6, 2, 1, 2),
    "no rows": X[:0],
    "rows of nothing": X[:, :0],
    "a number": np.array(3.5),
}


@pytest.fixture
def pool() -> Iterator[SharedMemoryPool]:
    """Make a pool of one slot."""
    made = SharedMemoryPool(compute_slot_nbytes(1000), 1)
    yield made
    made.close()
    detach_all_pools()


def send(source: RowSource) -> RowSource:
    """Return a row source as it arrives at a worker; Dask pickles by the latest protocol."""
    received: RowSource = pickle.loads(pickle.dumps(source, pickle.HIGHEST_PROTOCOL))
    return received


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_rows_arrive(form: str, shared: bool, pool: SharedMemoryPool) -> None:
    """Rows of every memory order and dtype arrive unchanged, in shared memory as in the task."""
    array = FORMS[form]
    source = send(RowRouter(slot=pool.free_slots[0] if shared else None).send_rows(array))
    assert isinstance(source, SharedMemoryRows if shared else InlineRows)
    rows = source.read_rows(TaskResources(attach_pool(pool.ref)))
    np.testing.assert_array_equal(rows, array, strict=True)


def test_rows_in_a_slot_are_not_copied(pool: SharedMemoryPool) -> None:
    """A worker's rows are a view of the shared memory, and none of them is in the task."""
    array = np.ones(900, "u1")
    router = RowRouter(slot=pool.free_slots[0])
    source = router.send_rows(array)
    rows = source.read_rows(TaskResources(pool.memory))
    array[:] = 2
    assert (int(rows.sum()), len(pickle.dumps(source)) < 500) == (900, True)
    router.send_rows(array)
    assert isinstance(source, SharedMemoryRows)
    source.array_ref.get_array(pool.memory)[0] = 9
    assert rows[0] == 9


def test_rows_that_do_not_fit_are_sent(pool: SharedMemoryPool) -> None:
    """Rows for which the slot has no room travel in the task; later rows that fit still use the slot."""
    router = RowRouter(slot=pool.free_slots[0])
    kinds = [type(router.send_rows(np.zeros(n, "u1"))) for n in (900, 5000, 100)]
    assert kinds == [SharedMemoryRows, InlineRows, SharedMemoryRows]


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_rows_of_a_file(suffix: str, tmp_path: Path) -> None:
    """A worker reads its rows from a file, and none of them is in the task."""
    path = tmp_path / f"x{suffix}"
    if suffix == ".npy":
        np.save(path, X)
    else:
        da.from_array(X, chunks=(2, 4)).to_zarr(path)
    source = send(FileRows(open_source(path), 1, 4))
    np.testing.assert_array_equal(source.read_rows(TaskResources()), X[1:4])


def test_rows_of_another_task() -> None:
    """Rows that are another task's result are found by their position among the dependencies."""
    assert send(ScatteredRows(1)).read_rows(TaskResources(dependency_results=[None, X])) is X


def test_rows_of_a_graph(pool: SharedMemoryPool) -> None:
    """The tasks that lead to a block are computed from the rows of its leaves, wherever these are."""
    shared, in_place = RowRouter(slot=pool.free_slots[0]).send_rows(X), ProcessMemoryRows(ProcessMemoryArray.from_array(X))
    leaves: dict[Any, RowSource] = {"a": shared, "b": InlineRows(X), "c": ScatteredRows(0), "d": in_place}
    graph = {"ab": (np.add, "a", "b"), "abc": (np.subtract, "ab", "c"), "abcd": (np.add, "abc", "d")}
    source = send(GraphRows(graph, "abcd", leaves))
    np.testing.assert_array_equal(source.read_rows(TaskResources(pool.memory, [4 * X])), -X)


@pytest.mark.parametrize(
    ("task", "value"), [((np.ma.filled, "x", 9), np.ma.masked_greater(X, 7)), ((np.array, (list, "x")), {5: "not an array"})]
)
def test_a_dependency_of_a_graph_is_left_as_it_is(task: Any, value: Any) -> None:
    """A masked array keeps its mask, and a value that is no array stays what it is."""
    found = GraphRows({"y": task}, "y", {"x": ScatteredRows(0)}).read_rows(TaskResources(dependency_results=[value]))
    np.testing.assert_array_equal(
        found, task[0](*(value if word == "x" else word for word in task[1:])) if task[2:] else [5]
    )


def test_a_graph_without_leaves() -> None:
    """Tasks that generate rows need no other rows."""
    assert GraphRows({"x": (np.zeros, 3)}, "x").read_rows(TaskResources()).tolist() == [0, 0, 0]


def test_a_task_travels(pool: SharedMemoryPool) -> None:
    """A task is the same after it was sent, and small if its rows are elsewhere."""
    chunk_input = ChunkInput(Chunk(0, 0, 6), (RowRouter(slot=pool.free_slots[0]).send_rows(X), ScatteredRows(0)), None)
    task = Task((chunk_input, chunk_input), pool.ref, pool.free_slots[0].header_offset)
    assert pickle.loads(pickle.dumps(task)) == task
    assert len(pickle.dumps(task)) < 1500
