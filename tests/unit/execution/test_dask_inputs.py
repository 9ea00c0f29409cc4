"""Dask arrays as inputs, block by block. Each load of a chunk is noted in a file, in whichever process it runs."""

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
from daskinfer.transport.row_sources import (
    MAX_INLINE_NBYTES,
    GraphRows,
    InlineRows,
    ProcessMemoryRows,
    RowRouter,
    RowSource,
    RowTransferError,
    ScatteredRows,
    SharedMemoryRows,
    TaskResources,
)
from daskinfer.transport.shared_memory import SharedMemoryPool, compute_slot_nbytes

N_CHUNKS, N_ROWS = 8, 3
X = np.arange(float(N_CHUNKS * N_ROWS * 2)).reshape(-1, 2)
AS_ONE_GRAPH = "the blocks of the dask array depend on each other; computing its upstream as one graph"


class Loads:
    """A dask array that notes its loads in a file."""

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
        """Number of loads of each chunk."""
        return Counter(int(index) for index, _ in self.lines)

    def count_by_dask(self, *arrays: da.Array) -> Counter[int]:
        """Count the loads of each chunk when Dask computes arrays, and forget them."""
        dask.compute(*arrays, scheduler="synchronous")
        counts = self.counts
        self.path.unlink()
        return counts


@pytest.fixture
def loads(tmp_path: Path) -> Loads:
    """Make a dask array that notes its loads."""
    return Loads(tmp_path)


@pytest.fixture
def log_lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return a function that returns the DEBUG lines so far."""
    caplog.set_level(logging.DEBUG, "daskinfer.execution.dask_inputs")
    return lambda: [record.message for record in caplog.records if record.name == "daskinfer.execution.dask_inputs"]


@pytest.fixture
def pool() -> Iterator[SharedMemoryPool]:
    """Yield a pool of one slot."""
    pool = SharedMemoryPool(compute_slot_nbytes(10_000), 1)
    yield pool
    pool.close()


ONCE = Counter(range(N_CHUNKS))


def read_sources(
    sources: Sequence[RowSource], dependencies: Sequence[Any], pool: SharedMemoryPool | None = None
) -> list[np.ndarray[Any, Any]]:
    """Read the rows of each port as a worker does."""
    resources = TaskResources(pool and pool.memory, [future.result() for future in dependencies])
    return [source.read_rows(resources) for source in sources]


def read_block(blocks: DaskBlocks, index: int) -> list[np.ndarray[Any, Any]]:
    """Read the rows of each port of one chunk."""
    router = RowRouter()
    return read_sources(blocks.make_row_sources(index, router), router.dependencies)


def read_all(blocks: DaskBlocks, n_chunks: int = N_CHUNKS, port: int = 0) -> np.ndarray[Any, Any]:
    """Read all rows of one port, chunk by chunk."""
    return np.concatenate([read_block(blocks, index)[port] for index in range(n_chunks)])


def test_block_by_block(loads: Loads, log_lines: Callable[[], list[str]]) -> None:
    """Independent blocks are loaded when they are requested, each by itself and once, in any order."""
    blocks = DaskBlocks([2 * loads.x + 1], None)
    assert not loads.lines
    for n_done, index in enumerate((5, 0, 7), start=1):
        np.testing.assert_array_equal(read_block(blocks, index)[0], 2 * X[N_ROWS * index : N_ROWS * (index + 1)] + 1)
        assert (loads.counts[index], loads.counts.total()) == (1, n_done)
    assert log_lines() == []


def test_nothing_is_computed_to_find_blocks(loads: Loads, cluster_client: Client) -> None:
    """Finding out that blocks are independent, and where they are, computes nothing and needs no dependency."""
    router = RowRouter()
    sources = DaskBlocks([loads.x], cluster_client).make_row_sources(3, router)
    assert ([type(source) for source in sources], router.dependencies, loads.lines) == ([GraphRows], [], [])


def test_a_chunk_travels_with_its_own_tasks_only(loads: Loads) -> None:
    """The graph of a chunk has no more tasks in an array of many chunks than in one of few."""
    sizes = []
    for x in (loads.x[: 2 * N_ROWS], loads.x):
        (source,) = DaskBlocks([x.map_blocks(np.negative)], None).make_row_sources(1, RowRouter())
        assert isinstance(source, GraphRows)
        sizes.append(len(source.graph))
    assert sizes[1] <= sizes[0] <= 3


@pytest.mark.parametrize("on_cluster", [True, False])
def test_dependent_blocks(
    on_cluster: bool, loads: Loads, log_lines: Callable[[], list[str]], request: pytest.FixtureRequest
) -> None:
    """If every block needs all others, the upstream is computed as one graph, each load as often as Dask runs it."""
    client = request.getfixturevalue("cluster_client") if on_cluster else None
    centred = loads.x - loads.x.mean(0)
    by_dask = loads.count_by_dask(centred)
    np.testing.assert_allclose(read_all(DaskBlocks([centred], client)), X - X.mean(0))
    assert loads.counts <= by_dask
    assert log_lines() == [AS_ONE_GRAPH]


def test_without_a_client_it_is_this_process(loads: Loads, cluster_client: Client) -> None:
    """Without a client the one graph is computed in this process, even if Dask has a current client."""
    with cluster_client.as_current():
        assert read_all(DaskBlocks([loads.x - loads.x.mean(0)], None)).shape == X.shape
    assert {int(process) for _, process in loads.lines} == {os.getpid()}


def test_with_a_client_it_is_the_cluster(loads: Loads, cluster_client: Client) -> None:
    """With a client the one graph is computed on the cluster, and its blocks become dependencies of the tasks."""
    router = RowRouter()
    sources = DaskBlocks([loads.x - loads.x.mean(0)], cluster_client).make_row_sources(0, router)
    assert (sources, len(router.dependencies)) == ([ScatteredRows(0)], 1)
    assert read_sources(sources, router.dependencies)[0].shape == (N_ROWS, 2)
    assert {int(process) for _, process in loads.lines}.isdisjoint({os.getpid()})


def test_persisted_blocks_are_dependencies(loads: Loads, cluster_client: Client) -> None:
    """Blocks that are on the cluster already are used as they are, and not computed again."""
    with cluster_client.as_current():
        wait(persisted := cluster_client.persist(loads.x))
    blocks = DaskBlocks([persisted, persisted + 1], cluster_client)
    np.testing.assert_array_equal(read_all(blocks), X)
    np.testing.assert_array_equal(read_all(blocks, port=1), X + 1)
    router = RowRouter()
    sources = blocks.make_row_sources(0, router)
    assert ([type(source) for source in sources], len(router.dependencies)) == ([ScatteredRows, GraphRows], 1)
    assert loads.counts == ONCE


def test_chunks_on_later_axes_are_merged(loads: Loads) -> None:
    """Rows are whole, however the later axes are cut, and each piece is loaded once."""
    x = da.from_array(np.arange(96.0).reshape(8, 4, 3), chunks=(2, (1, 3), 2))
    blocks = DaskBlocks([x, loads.x[:8].rechunk({0: 2})], None)
    np.testing.assert_array_equal(read_all(blocks, 4), x.compute(scheduler="synchronous"))
    assert read_block(blocks, 1)[0].shape == (2, 4, 3)


def test_ports_that_share_their_upstream(loads: Loads) -> None:
    """If two ports come from one load, a chunk loads it once, as Dask does."""
    blocks = DaskBlocks([loads.x + 1, loads.x * 2], None)
    plus, times = read_block(blocks, 2)
    np.testing.assert_array_equal(plus - 1, times / 2)
    assert loads.counts == Counter([2])


def test_the_same_array_twice(loads: Loads) -> None:
    """One array behind two ports is loaded once for a chunk."""
    first, second = read_block(DaskBlocks([loads.x, loads.x], None), 2)
    np.testing.assert_array_equal(first, second)
    assert loads.counts == Counter([2])


def test_a_cut_between_two_chunks_shares_one_load(loads: Loads, log_lines: Callable[[], list[str]]) -> None:
    """Chunks that are cut across loads are computed block by block, at the price of one more load per cut."""
    cut = loads.x.rechunk({0: 7})
    np.testing.assert_array_equal(read_all(DaskBlocks([cut], None), cut.numblocks[0]), X)
    assert log_lines() == []
    assert loads.counts == ONCE + Counter([2, 4])  # rows 7 and 14 lie within a load, row 21 begins one


def layered(n_own: int) -> da.Array:
    """Make two blocks of one number, each from one load that both share and ``n_own`` loads of its own."""
    graph: dict[Any, Any] = {f"shared-{n_own}": (np.ones, 1)}
    for index in range(2):
        own = [f"load-{n_own}-{index}-{i}" for i in range(n_own)]
        graph |= dict.fromkeys(own, (np.ones, 1))
        graph[(f"own-{n_own}", index)] = (sum, [f"shared-{n_own}", *own])
    return da.Array(graph, f"own-{n_own}", chunks=((1, 1),), dtype=float)


@pytest.mark.parametrize(("n_own", "lines"), [(0, [AS_ONE_GRAPH]), (1, [])])
def test_the_limit_of_repeats(n_own: int, lines: list[str], log_lines: Callable[[], list[str]]) -> None:
    """Loads that run up to ``MAX_REPEATS`` times on average are computed block by block, otherwise as one graph."""
    repeats = 2 * (1 + n_own) / (1 + 2 * n_own)
    assert (repeats > MAX_REPEATS) == bool(lines)
    assert read_all(DaskBlocks([layered(n_own)], None), 2).tolist() == [n_own + 1.0] * 2
    assert log_lines() == lines


def test_rows_in_memory_go_into_the_slot(pool: SharedMemoryPool) -> None:
    """Arrays of this process at the leaves of a graph go into shared memory, but only those of the chunk."""
    x = da.from_array(X, chunks=(N_ROWS, 2))
    sources = DaskBlocks([x, x + 1], None).make_row_sources(2, RowRouter(slot=pool.free_slots[0]))
    first, second = read_sources(sources, [], pool)
    np.testing.assert_array_equal(first, X[6:9])
    np.testing.assert_array_equal(second, X[6:9] + 1)
    assert isinstance(sources[0], SharedMemoryRows) and isinstance(sources[1], GraphRows)
    assert {type(leaf) for leaf in sources[1].leaves.values()} == {SharedMemoryRows}


def test_rows_in_memory_without_a_slot() -> None:
    """Without shared memory the rows of a chunk travel in its task."""
    (source,) = DaskBlocks([da.from_array(X, chunks=(N_ROWS, 2))], None).make_row_sources(0, RowRouter())
    assert isinstance(source, InlineRows)
    np.testing.assert_array_equal(source.array, X[:N_ROWS])


@pytest.mark.parametrize("with_slot", [True, False])
def test_rows_in_memory_stay_in_place_if_workers_read_them(with_slot: bool, pool: SharedMemoryPool) -> None:
    """Arrays of this process at the leaves of a graph stay in place for a worker that reads them."""
    x, slot = da.from_array(X, chunks=(N_ROWS, 2)), pool.free_slots[0] if with_slot else None
    sources = DaskBlocks([x, x + 1], None).make_row_sources(2, RowRouter(slot=slot, reads_process_memory=True))
    first, second = read_sources(sources, [])
    np.testing.assert_array_equal(first, X[6:9])
    np.testing.assert_array_equal(second, X[6:9] + 1)
    assert isinstance(sources[0], ProcessMemoryRows) and isinstance(sources[1], GraphRows)
    assert sources[0].array.shape == (N_ROWS, 2)
    assert {type(leaf) for leaf in sources[1].leaves.values()} == {ProcessMemoryRows}


def test_large_blocks_go_through_comms(cluster_client: Client) -> None:
    """Large rows in memory at the leaves of a graph go through Dask's comms, but only those of the chunk."""
    large = np.ones((2, MAX_INLINE_NBYTES))
    router = RowRouter(cluster_client)
    sources = DaskBlocks([da.from_array(large, chunks=(1, -1)) + 1], cluster_client).make_row_sources(1, router)
    assert len(router.dependencies) == 1
    np.testing.assert_array_equal(read_sources(sources, router.dependencies)[0], large[1:] + 1)


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
def test_leaves_that_are_more_than_bytes_travel_as_they_are(kind: str, reads: bool, pool: SharedMemoryPool) -> None:
    """A masked array keeps its mask, and arrays of Python objects never go where only their addresses would arrive."""
    array, function, expected = NOT_BYTES[kind]
    x = da.from_array(array, chunks=2).map_blocks(function, dtype=float)
    blocks, router = DaskBlocks([x], None), RowRouter(slot=pool.free_slots[0], reads_process_memory=reads)
    sources = [pickle.loads(pickle.dumps(source)) for index in range(2) for source in blocks.make_row_sources(index, router)]
    assert (blocks.compute_leaf_sizes(), [source.leaves for source in sources]) == ((0, 0), [{}, {}])
    assert np.concatenate(read_sources(sources, [], pool)).tolist() == expected


def test_a_number_among_the_tasks() -> None:
    """An array without axes at a leaf stays without axes."""
    x = da.stack([da.from_array(np.array(2.0)), da.from_array(np.array(3.0))])
    assert read_all(DaskBlocks([x], None), 2).tolist() == [2, 3]  # neither [[2], [3]] nor [2]


def test_a_large_array_of_all_chunks_goes_to_the_cluster_once(cluster_client: Client, pool: SharedMemoryPool) -> None:
    """An array in memory that every chunk reads is sent to the cluster once, and all chunks depend on that copy."""
    large = np.ones((1, SHARED_NBYTES // 8 + 1))
    x = da.from_array(np.arange(6.0)[:, None], chunks=2)
    blocks = DaskBlocks([x + da.from_array(large, chunks=-1)], cluster_client)
    router = RowRouter(slot=pool.free_slots[0])
    sources = [blocks.make_row_sources(index, router)[0] for index in range(3)]
    assert len(router.dependencies) == 1
    rows = np.concatenate(read_sources(sources, router.dependencies, pool))
    assert (rows.shape, rows[:, 0].tolist()) == ((6, large.size), [1, 2, 3, 4, 5, 6])


def test_arrays_that_are_small_or_read_once_are_not_shared(cluster_client: Client) -> None:
    """A small array that all chunks read, and a large one that one chunk reads, travel like rows."""
    small, x = da.from_array(np.ones((1, 2)), chunks=-1), da.from_array(X, chunks=(N_ROWS, 2))
    large = da.from_array(np.ones((2, SHARED_NBYTES)), chunks=(1, -1))
    router = RowRouter()
    DaskBlocks([x + small], cluster_client).make_row_sources(0, router)
    DaskBlocks([large], cluster_client).make_row_sources(0, router)
    assert router.dependencies == []


def test_tasks_are_visited_once_per_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding out what a chunk needs costs the same in an array of many chunks as in one of few."""
    visits = Counter[str]()
    get_dependencies = dask_inputs.get_dependencies

    def count_visit(*args: Any) -> Any:
        visits["nodes"] += 1
        return get_dependencies(*args)

    monkeypatch.setattr(dask_inputs, "get_dependencies", count_visit)
    costs = []
    for n_chunks in (10, 1000):
        visits.clear()
        x = da.ones((n_chunks, 2), chunks=(1, 2)) + 1
        blocks = DaskBlocks([x], None)
        for index in range(n_chunks):
            blocks.make_row_sources(index, RowRouter())
        costs.append(visits["nodes"] / n_chunks)
    assert costs[1] <= costs[0] <= 10


def test_a_shared_array_that_is_lost_goes_to_the_cluster_again(cluster_client: Client, pool: SharedMemoryPool) -> None:
    """An array that was sent once and then lost is sent again for later chunks."""
    large = np.ones((1, SHARED_NBYTES // 8 + 1))
    blocks = DaskBlocks([da.from_array(np.arange(6.0)[:, None], chunks=2) + da.from_array(large, chunks=-1)], cluster_client)
    for index in range(3):
        router = RowRouter(slot=pool.free_slots[0])
        sources = blocks.make_row_sources(index, router)
        (rows,) = read_sources(sources, router.dependencies, pool)
        assert rows[:, 0].tolist() == [2 * index + 1, 2 * index + 2]
        if index == 0:
            router.dependencies[0].cancel()


def test_a_memmap_is_cut_here(cluster_client: Client, pool: SharedMemoryPool, tmp_path: Path) -> None:
    """Each chunk takes its own rows of a memmap in a dask array, which never goes to the cluster as a whole."""
    rows = np.random.default_rng(0).random((6, SHARED_NBYTES // 16))
    np.save(tmp_path / "x.npy", rows)
    x = da.from_array(np.load(tmp_path / "x.npy", mmap_mode="r"), chunks=(2, -1))
    for array, expected in ((x, rows), (x[1:] * 2, rows[1:] * 2)):
        blocks = DaskBlocks([array], cluster_client)
        assert not blocks._shared
        assert blocks.compute_leaf_sizes()[1] == rows[0].nbytes * 2 // array.chunks[0][0]
        for index, stop in enumerate(np.cumsum(array.chunks[0])):
            router = RowRouter(reads_process_memory=True)
            (block,) = read_sources(blocks.make_row_sources(index, router), router.dependencies)
            np.testing.assert_array_equal(block, expected[stop - array.chunks[0][index] : stop])
            assert not router.dependencies


def test_a_shared_array_that_reaches_no_worker(monkeypatch: pytest.MonkeyPatch, cluster_client: Client) -> None:
    """If there is no worker to send it to again, the task is not built, and its chunks can be retried."""
    large = np.ones((1, SHARED_NBYTES // 8 + 1))
    blocks = DaskBlocks([da.from_array(np.arange(6.0)[:, None], chunks=2) + da.from_array(large, chunks=-1)], cluster_client)
    (shared,) = blocks._shared.values()
    shared.cancel()

    def refuse(*_: Any, **__: Any) -> None:
        raise TimeoutError("No valid workers found")

    with monkeypatch.context() as patch:
        patch.setattr(cluster_client, "scatter", refuse)
        with pytest.raises(RowTransferError, match=r"^$"):
            blocks.make_row_sources(0, RowRouter())
    assert blocks.make_row_sources(0, RowRouter())
