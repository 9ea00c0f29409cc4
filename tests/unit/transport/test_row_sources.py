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
from daskinfer.transport.routing import RowRouter
from daskinfer.transport.row_sources import (
    ChunkInput,
    FileRows,
    GraphRows,
    InlineRows,
    ProcessMemoryRows,
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
def arena() -> Iterator[SharedMemoryPool]:
    """An arena of one slot."""
    made = SharedMemoryPool(compute_slot_nbytes(1000), 1)
    yield made
    made.close()
    detach_all_pools()


def travelled(part: RowSource) -> RowSource:
    """A part as it comes out at a worker; Dask pickles by the latest protocol."""
    found: RowSource = pickle.loads(pickle.dumps(part, pickle.HIGHEST_PROTOCOL))
    return found


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_rows_arrive(form: str, shared: bool, arena: SharedMemoryPool) -> None:
    """Rows of every order and dtype arrive with their shape, dtype and numbers, in shared memory as in the task."""
    array = FORMS[form]
    part = travelled(RowRouter(slot=arena.free_slots[0] if shared else None).send_rows(array))
    assert isinstance(part, SharedMemoryRows if shared else InlineRows)
    rows = part.read_rows(TaskResources(attach_pool(arena.ref)))
    np.testing.assert_array_equal(rows, array, strict=True)


def test_rows_in_a_slot_are_not_copied(arena: SharedMemoryPool) -> None:
    """A worker's rows are the shared memory itself, and none of them is in the task."""
    array = np.ones(900, "u1")
    way = RowRouter(slot=arena.free_slots[0])
    part = way.send_rows(array)
    rows = part.read_rows(TaskResources(arena.memory))
    array[:] = 2
    assert (int(rows.sum()), len(pickle.dumps(part)) < 500) == (900, True)
    way.send_rows(array)
    assert isinstance(part, SharedMemoryRows)
    part.array_ref.get_array(arena.memory)[0] = 9
    assert rows[0] == 9


def test_rows_that_do_not_fit_are_sent(arena: SharedMemoryPool) -> None:
    """Where the slot is full the rows travel in the task, and those that fit afterwards do not."""
    way = RowRouter(slot=arena.free_slots[0])
    kinds = [type(way.send_rows(np.zeros(n, "u1"))) for n in (900, 5000, 100)]
    assert kinds == [SharedMemoryRows, InlineRows, SharedMemoryRows]


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_rows_of_a_file(suffix: str, tmp_path: Path) -> None:
    """A worker reads its rows of a file, and none of them is in the task."""
    path = tmp_path / f"x{suffix}"
    if suffix == ".npy":
        np.save(path, X)
    else:
        da.from_array(X, chunks=(2, 4)).to_zarr(path)
    part = travelled(FileRows(open_source(path), 1, 4))
    np.testing.assert_array_equal(part.read_rows(TaskResources()), X[1:4])


def test_rows_that_dask_brought() -> None:
    """Rows that are another task's result are found by their position."""
    assert travelled(ScatteredRows(1)).read_rows(TaskResources(dependency_results=[None, X])) is X


def test_rows_of_a_graph(arena: SharedMemoryPool) -> None:
    """The tasks that lead to a block are computed from the rows at its leaves, wherever these are."""
    slot, borrowed = RowRouter(slot=arena.free_slots[0]).send_rows(X), ProcessMemoryRows(ProcessMemoryArray.from_array(X))
    leaves: dict[Any, RowSource] = {"a": slot, "b": InlineRows(X), "c": ScatteredRows(0), "d": borrowed}
    graph = {"ab": (np.add, "a", "b"), "abc": (np.subtract, "ab", "c"), "abcd": (np.add, "abc", "d")}
    part = travelled(GraphRows(graph, "abcd", leaves))
    np.testing.assert_array_equal(part.read_rows(TaskResources(arena.memory, [4 * X])), -X)


@pytest.mark.parametrize(
    ("task", "value"), [((np.ma.filled, "x", 9), np.ma.masked_greater(X, 7)), ((np.array, (list, "x")), {5: "not an array"})]
)
def test_what_dask_brought_for_a_graph_is_left_as_it_is(task: Any, value: Any) -> None:
    """A masked array keeps its mask, and what is no array stays what it is."""
    found = GraphRows({"y": task}, "y", {"x": ScatteredRows(0)}).read_rows(TaskResources(dependency_results=[value]))
    np.testing.assert_array_equal(
        found, task[0](*(value if word == "x" else word for word in task[1:])) if task[2:] else [5]
    )


def test_a_graph_without_leaves() -> None:
    """Rows that tasks make out of nothing need nothing."""
    assert GraphRows({"x": (np.zeros, 3)}, "x").read_rows(TaskResources()).tolist() == [0, 0, 0]


def test_a_task_travels(arena: SharedMemoryPool) -> None:
    """A task is the same after it travelled, and small where its rows are elsewhere."""
    piece = ChunkInput(Chunk(0, 0, 6, 0), (RowRouter(slot=arena.free_slots[0]).send_rows(X), ScatteredRows(0)), None)
    task = Task((piece, piece), arena.ref, arena.free_slots[0].header_offset)
    assert pickle.loads(pickle.dumps(task)) == task
    assert len(pickle.dumps(task)) < 1500
