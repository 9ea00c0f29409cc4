"""Every load of a chunk is noted in a file, whichever process it happens in."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from distributed import Client, wait
from distributed.protocol import pickle

from daskinfer.execution import dask_inputs
from daskinfer.execution.dask_inputs import MAX_REPEATS, SHARED_NBYTES, DaskBlocks
from daskinfer.transport.routing import MAX_INLINE_NBYTES, RowRouter
from daskinfer.transport.row_sources import (
    GraphRows,
    InlineRows,
    ProcessMemoryRows,
    RowSource,
    RowTransferError,
    ScatteredRows,
    SharedMemoryRows,
    TaskResources,
)
from daskinfer.transport.shared_memory import SharedMemoryPool, compute_slot_nbytes

N_CHUNKS, N_ROWS = 8, 3
X = np.arange(float(N_CHUNKS * N_ROWS * 2)).reshape(-1, 2)
AS_ONE_GRAPH = "the blocks of the dask array depend on each other: its upstream is computed as one graph"


class Loads:
    """A dask array whose loads are noted."""

    def __init__(self, folder: Path) -> None:
        path = self.path = folder / "loads"

        def load(block_id: Sequence[int]) -> np.ndarray[Any, Any]:
            with path.open("a") as file:
                file.write(f"{block_id[0]} {os.getpid()}\n")
            return np.arange(float(N_ROWS * 2)).reshape(-1, 2) + N_ROWS * 2 * block_id[0]

        self.x = da.map_blocks(load, chunks=((N_ROWS,) * N_CHUNKS, (2,)), dtype=float, meta=np.empty((0, 2)))

    @property
    def lines(self) -> list[list[str]]:
        """Chunk and process of each load."""
        return [line.split() for line in self.path.read_text().splitlines()] if self.path.exists() else []

    @property
    def counts(self) -> Counter[int]:
        """Loads of each chunk."""
        return Counter(int(index) for index, _ in self.lines)

    def by_dask(self, *arrays: da.Array) -> Counter[int]:
        """Loads of each chunk where Dask computes it, which are then forgotten."""
        dask.compute(*arrays, scheduler="synchronous")
        counts = self.counts
        self.path.unlink()
        return counts


@pytest.fixture
def loads(tmp_path: Path) -> Loads:
    """A dask array whose loads are noted."""
    return Loads(tmp_path)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The DEBUG lines so far."""
    caplog.set_level(logging.DEBUG, "daskinfer.execution.dask_inputs")
    return lambda: [record.message for record in caplog.records if record.name == "daskinfer.execution.dask_inputs"]


@pytest.fixture
def arena() -> Iterator[SharedMemoryPool]:
    """An arena of one slot."""
    made = SharedMemoryPool(compute_slot_nbytes(10_000), 1)
    yield made
    made.close()


ONCE = Counter(range(N_CHUNKS))


def fetched(
    parts: Sequence[RowSource], brought: Sequence[Any], arena: SharedMemoryPool | None = None
) -> list[np.ndarray[Any, Any]]:
    """The rows of each port as a worker gets them."""
    within = TaskResources(arena and arena.memory, [future.result() for future in brought])
    return [part.read_rows(within) for part in parts]


def block(blocks: DaskBlocks, index: int) -> list[np.ndarray[Any, Any]]:
    """The rows of each port of one chunk."""
    way = RowRouter()
    return fetched(blocks.make_row_sources(index, way), way.dependencies)


def whole(blocks: DaskBlocks, n_chunks: int = N_CHUNKS, port: int = 0) -> np.ndarray[Any, Any]:
    """All rows of one port, its chunks computed one after the other."""
    return np.concatenate([block(blocks, index)[port] for index in range(n_chunks)])


def test_block_by_block(loads: Loads, said: Callable[[], list[str]]) -> None:
    """Independent blocks are loaded when they are asked for, each alone and once, in any order."""
    blocks = DaskBlocks([2 * loads.x + 1], None)
    assert not loads.lines
    for n_done, index in enumerate((5, 0, 7), start=1):
        np.testing.assert_array_equal(block(blocks, index)[0], 2 * X[N_ROWS * index : N_ROWS * (index + 1)] + 1)
        assert (loads.counts[index], loads.counts.total()) == (1, n_done)
    assert said() == []


def test_nothing_is_computed_to_look_at_it(loads: Loads, cluster_client: Client) -> None:
    """Finding out that blocks are independent, and where they are, computes nothing and brings nothing."""
    way = RowRouter()
    parts = DaskBlocks([loads.x], cluster_client).make_row_sources(3, way)
    assert ([type(part) for part in parts], way.dependencies, loads.lines) == ([GraphRows], [], [])


def test_a_chunk_travels_with_its_own_tasks_only(loads: Loads) -> None:
    """The graph of a chunk has as many tasks in an array of many chunks as in one of few."""
    sizes = []
    for x in (loads.x[: 2 * N_ROWS], loads.x):
        (part,) = DaskBlocks([x.map_blocks(np.negative)], None).make_row_sources(1, RowRouter())
        assert isinstance(part, GraphRows)
        sizes.append(len(part.graph))
    assert sizes[1] <= sizes[0] <= 3


@pytest.mark.parametrize("on_cluster", [True, False])
def test_dependent_blocks(
    on_cluster: bool, loads: Loads, said: Callable[[], list[str]], request: pytest.FixtureRequest
) -> None:
    """Where every block needs all others, the upstream is computed as one graph, each load as often as Dask does it."""
    client = request.getfixturevalue("cluster_client") if on_cluster else None
    centred = loads.x - loads.x.mean(0)
    by_dask = loads.by_dask(centred)
    np.testing.assert_allclose(whole(DaskBlocks([centred], client)), X - X.mean(0))
    assert loads.counts <= by_dask
    assert said() == [AS_ONE_GRAPH]


def test_without_a_client_it_is_this_process(loads: Loads, cluster_client: Client) -> None:
    """Without a client the one graph is computed in this process, also where Dask has a current client."""
    with cluster_client.as_current():
        assert whole(DaskBlocks([loads.x - loads.x.mean(0)], None)).shape == X.shape
    assert {int(process) for _, process in loads.lines} == {os.getpid()}


def test_with_a_client_it_is_the_cluster(loads: Loads, cluster_client: Client) -> None:
    """With a client the one graph is computed on the cluster, and its blocks are brought to the chunks."""
    way = RowRouter()
    parts = DaskBlocks([loads.x - loads.x.mean(0)], cluster_client).make_row_sources(0, way)
    assert (parts, len(way.dependencies)) == ([ScatteredRows(0)], 1)
    assert fetched(parts, way.dependencies)[0].shape == (N_ROWS, 2)
    assert {int(process) for _, process in loads.lines}.isdisjoint({os.getpid()})


def test_persisted_blocks_are_brought(loads: Loads, cluster_client: Client) -> None:
    """What lies on the cluster already is brought as it is, and not computed again."""
    with cluster_client.as_current():
        wait(persisted := cluster_client.persist(loads.x))
    blocks = DaskBlocks([persisted, persisted + 1], cluster_client)
    np.testing.assert_array_equal(whole(blocks), X)
    np.testing.assert_array_equal(whole(blocks, port=1), X + 1)
    way = RowRouter()
    parts = blocks.make_row_sources(0, way)
    assert ([type(part) for part in parts], len(way.dependencies)) == ([ScatteredRows, GraphRows], 1)
    assert loads.counts == ONCE


def test_chunks_on_later_axes_are_put_together(loads: Loads) -> None:
    """Rows are whole, however the later axes are cut, and each piece is loaded once."""
    x = da.from_array(np.arange(96.0).reshape(8, 4, 3), chunks=(2, (1, 3), 2))
    blocks = DaskBlocks([x, loads.x[:8].rechunk({0: 2})], None)
    np.testing.assert_array_equal(whole(blocks, 4), x.compute(scheduler="synchronous"))
    assert block(blocks, 1)[0].shape == (2, 4, 3)


def test_ports_that_share_their_upstream(loads: Loads) -> None:
    """Where two ports come from one load, a chunk loads it once, as Dask does."""
    blocks = DaskBlocks([loads.x + 1, loads.x * 2], None)
    plus, times = block(blocks, 2)
    np.testing.assert_array_equal(plus - 1, times / 2)
    assert loads.counts == Counter([2])


def test_the_same_array_twice(loads: Loads) -> None:
    """One array behind two ports is loaded once for a chunk."""
    first, second = block(DaskBlocks([loads.x, loads.x], None), 2)
    np.testing.assert_array_equal(first, second)
    assert loads.counts == Counter([2])


def test_a_cut_between_two_chunks_shares_one_load(loads: Loads, said: Callable[[], list[str]]) -> None:
    """Chunks that are cut across loads are computed block by block, at the price of a load more at each cut."""
    cut = loads.x.rechunk({0: 7})
    np.testing.assert_array_equal(whole(DaskBlocks([cut], None), cut.numblocks[0]), X)
    assert said() == []
    assert loads.counts == ONCE + Counter([2, 4])  # rows 7 and 14 lie within a load, row 21 begins one


def layered(n_own: int) -> da.Array:
    """Two blocks of one number, each made of one load that both share and ``n_own`` loads of its own."""
    graph: dict[Any, Any] = {f"shared-{n_own}": (np.ones, 1)}
    for index in range(2):
        own = [f"load-{n_own}-{index}-{i}" for i in range(n_own)]
        graph |= dict.fromkeys(own, (np.ones, 1))
        graph[(f"own-{n_own}", index)] = (sum, [f"shared-{n_own}", *own])
    return da.Array(graph, f"own-{n_own}", chunks=((1, 1),), dtype=float)


@pytest.mark.parametrize(("n_own", "lines"), [(0, [AS_ONE_GRAPH]), (1, [])])
def test_the_limit_of_repeats(n_own: int, lines: list[str], said: Callable[[], list[str]]) -> None:
    """Loads that are done up to ``MAX_REPEATS`` times on average go block by block, more often as one graph."""
    repeats = 2 * (1 + n_own) / (1 + 2 * n_own)
    assert (repeats > MAX_REPEATS) == bool(lines)
    assert whole(DaskBlocks([layered(n_own)], None), 2).tolist() == [n_own + 1.0] * 2
    assert said() == lines


def test_rows_in_memory_go_into_the_slot(arena: SharedMemoryPool) -> None:
    """Arrays of this process at the leaves of a graph go into shared memory, only those of the chunk."""
    x = da.from_array(X, chunks=(N_ROWS, 2))
    parts = DaskBlocks([x, x + 1], None).make_row_sources(2, RowRouter(slot=arena.free_slots[0]))
    first, second = fetched(parts, [], arena)
    np.testing.assert_array_equal(first, X[6:9])
    np.testing.assert_array_equal(second, X[6:9] + 1)
    assert isinstance(parts[0], SharedMemoryRows) and isinstance(parts[1], GraphRows)
    assert {type(leaf) for leaf in parts[1].leaves.values()} == {SharedMemoryRows}


def test_rows_in_memory_without_a_slot() -> None:
    """Without shared memory the rows of a chunk travel in its task."""
    (part,) = DaskBlocks([da.from_array(X, chunks=(N_ROWS, 2))], None).make_row_sources(0, RowRouter())
    assert isinstance(part, InlineRows)
    np.testing.assert_array_equal(part.array, X[:N_ROWS])


@pytest.mark.parametrize("with_slot", [True, False])
def test_rows_in_memory_stay_where_workers_read_them(with_slot: bool, arena: SharedMemoryPool) -> None:
    """Arrays of this process at the leaves of a graph stay there for a worker that reads them, only those of the chunk."""
    x, slot = da.from_array(X, chunks=(N_ROWS, 2)), arena.free_slots[0] if with_slot else None
    parts = DaskBlocks([x, x + 1], None).make_row_sources(2, RowRouter(slot=slot, reads_process_memory=True))
    first, second = fetched(parts, [])
    np.testing.assert_array_equal(first, X[6:9])
    np.testing.assert_array_equal(second, X[6:9] + 1)
    assert isinstance(parts[0], ProcessMemoryRows) and isinstance(parts[1], GraphRows)
    assert parts[0].array.shape == (N_ROWS, 2)
    assert {type(leaf) for leaf in parts[1].leaves.values()} == {ProcessMemoryRows}


def test_blocks_of_many_bytes_go_by_comms(cluster_client: Client) -> None:
    """Rows in memory at the leaves of a graph go by Dask's comms too, only those of the chunk."""
    large = np.ones((2, MAX_INLINE_NBYTES))
    way = RowRouter(cluster_client)
    parts = DaskBlocks([da.from_array(large, chunks=(1, -1)) + 1], cluster_client).make_row_sources(1, way)
    assert len(way.dependencies) == 1
    np.testing.assert_array_equal(fetched(parts, way.dependencies)[0], large[1:] + 1)


OBJECTS = np.array([("a",), ("bb",), ("ccc",)], [("word", object)])
NOT_BYTES = {
    "masked": (np.ma.masked_greater(np.arange(3.0), 1), lambda block: np.ma.filled(block, 9), [0, 1, 9]),
    "objects": (OBJECTS, lambda block: np.array([float(len(word)) for word in block["word"]]), [1, 2, 3]),
    "strings": (
        np.array(["a", "bb", "ccc"] * 2, np.dtypes.StringDType())[:3],
        lambda block: np.strings.str_len(block).astype(float),
        [1, 2, 3],
    ),
}


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("kind", NOT_BYTES)
def test_leaves_that_are_more_than_bytes_travel_as_they_are(kind: str, reads: bool, arena: SharedMemoryPool) -> None:
    """A masked array keeps its mask, and arrays of Python's objects never go where only their addresses would arrive."""
    array, function, expected = NOT_BYTES[kind]
    x = da.from_array(array, chunks=2).map_blocks(function, dtype=float)
    blocks, way = DaskBlocks([x], None), RowRouter(slot=arena.free_slots[0], reads_process_memory=reads)
    parts = [pickle.loads(pickle.dumps(part)) for index in range(2) for part in blocks.make_row_sources(index, way)]
    assert (blocks.compute_leaf_sizes(), [part.leaves for part in parts]) == ((0, 0), [{}, {}])
    assert np.concatenate(fetched(parts, [], arena)).tolist() == expected


def test_a_number_among_the_tasks() -> None:
    """An array without axes at a leaf keeps having none."""
    x = da.stack([da.from_array(np.array(2.0)), da.from_array(np.array(3.0))])
    assert whole(DaskBlocks([x], None), 2).tolist() == [2, 3]  # neither [[2], [3]] nor [2]


def test_a_large_array_of_all_chunks_goes_to_the_cluster_once(cluster_client: Client, arena: SharedMemoryPool) -> None:
    """An array in memory that every chunk reads goes to the cluster once, and all chunks are brought that one."""
    large = np.ones((1, SHARED_NBYTES // 8 + 1))
    x = da.from_array(np.arange(6.0)[:, None], chunks=2)
    blocks = DaskBlocks([x + da.from_array(large, chunks=-1)], cluster_client)
    way = RowRouter(slot=arena.free_slots[0])
    parts = [blocks.make_row_sources(index, way)[0] for index in range(3)]
    assert len(way.dependencies) == 1
    rows = np.concatenate(fetched(parts, way.dependencies, arena))
    assert (rows.shape, rows[:, 0].tolist()) == ((6, large.size), [1, 2, 3, 4, 5, 6])


def test_what_is_small_or_read_once_does_not(cluster_client: Client) -> None:
    """A small array that all chunks read, and a large one that one chunk reads, travel as rows do."""
    small, x = da.from_array(np.ones((1, 2)), chunks=-1), da.from_array(X, chunks=(N_ROWS, 2))
    large = da.from_array(np.ones((2, SHARED_NBYTES)), chunks=(1, -1))
    way = RowRouter()
    DaskBlocks([x + small], cluster_client).make_row_sources(0, way)
    DaskBlocks([large], cluster_client).make_row_sources(0, way)
    assert way.dependencies == []


def test_tasks_are_looked_at_once_per_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding out what a chunk needs costs the same among many chunks as among few."""
    looked = Counter[str]()
    known = dask_inputs.get_dependencies

    def counted(*args: Any) -> Any:
        looked["nodes"] += 1
        return known(*args)

    monkeypatch.setattr(dask_inputs, "get_dependencies", counted)
    costs = []
    for n_chunks in (10, 1000):
        looked.clear()
        x = da.ones((n_chunks, 2), chunks=(1, 2)) + 1
        blocks = DaskBlocks([x], None)
        for index in range(n_chunks):
            blocks.make_row_sources(index, RowRouter())
        costs.append(looked["nodes"] / n_chunks)
    assert costs[1] <= costs[0] <= 10


def test_a_shared_array_that_is_lost_goes_to_the_cluster_again(cluster_client: Client, arena: SharedMemoryPool) -> None:
    """What was sent once and is there no more is sent again, for the chunks that are still to come."""
    large = np.ones((1, SHARED_NBYTES // 8 + 1))
    blocks = DaskBlocks([da.from_array(np.arange(6.0)[:, None], chunks=2) + da.from_array(large, chunks=-1)], cluster_client)
    for index in range(3):
        way = RowRouter(slot=arena.free_slots[0])
        parts = blocks.make_row_sources(index, way)
        (rows,) = fetched(parts, way.dependencies, arena)
        assert rows[:, 0].tolist() == [2 * index + 1, 2 * index + 2]
        if index == 0:
            way.dependencies[0].cancel()


def test_a_memmap_is_cut_here(cluster_client: Client, arena: SharedMemoryPool, tmp_path: Path) -> None:
    """Of a memmap in a dask array each chunk takes its own rows, and nothing of it goes to the cluster as a whole."""
    rows = np.random.default_rng(0).random((6, SHARED_NBYTES // 16))
    np.save(tmp_path / "x.npy", rows)
    x = da.from_array(np.load(tmp_path / "x.npy", mmap_mode="r"), chunks=(2, -1))
    for array, expected in ((x, rows), (x[1:] * 2, rows[1:] * 2)):
        blocks = DaskBlocks([array], cluster_client)
        assert not blocks._shared
        assert blocks.compute_leaf_sizes()[1] == rows[0].nbytes * 2 // array.chunks[0][0]
        for index, stop in enumerate(np.cumsum(array.chunks[0])):
            way = RowRouter(reads_process_memory=True)
            (found,) = fetched(blocks.make_row_sources(index, way), way.dependencies)
            np.testing.assert_array_equal(found, expected[stop - array.chunks[0][index] : stop])
            assert not way.dependencies


def test_a_shared_array_that_reaches_no_worker_is_unsent(monkeypatch: pytest.MonkeyPatch, cluster_client: Client) -> None:
    """Where no worker is there to send it to again, its chunks wait as others do."""
    large = np.ones((1, SHARED_NBYTES // 8 + 1))
    blocks = DaskBlocks([da.from_array(np.arange(6.0)[:, None], chunks=2) + da.from_array(large, chunks=-1)], cluster_client)
    (shared,) = blocks._shared.values()
    shared.cancel()

    def nobody(*_: Any, **__: Any) -> None:
        raise TimeoutError("No valid workers found")

    with monkeypatch.context() as patch:
        patch.setattr(cluster_client, "scatter", nobody)
        with pytest.raises(RowTransferError, match=r"^$"):
            blocks.make_row_sources(0, RowRouter())
    assert blocks.make_row_sources(0, RowRouter())
