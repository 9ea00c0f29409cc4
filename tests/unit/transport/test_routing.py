"""Which way rows of this process take to a worker, rule by rule, and that every way gives the same answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client

import daskinfer as di
from daskinfer.cluster import preflight
from daskinfer.transport import process_memory, routing
from daskinfer.transport.process_memory import ProcessMemoryArray
from daskinfer.transport.routing import MAX_INLINE_NBYTES, RowRouter
from daskinfer.transport.row_sources import (
    InlineRows,
    ProcessMemoryRows,
    RowSource,
    ScatteredRows,
    SharedMemoryRows,
    TaskResources,
)
from daskinfer.transport.shared_memory import SharedMemoryPool, compute_slot_nbytes

Array = np.ndarray[Any, Any]

X = np.arange(24, dtype="float32").reshape(6, 4)
SMALL, LARGE = np.zeros(MAX_INLINE_NBYTES, "u1"), np.zeros(MAX_INLINE_NBYTES + 1, "u1")


@pytest.fixture
def arena() -> Iterator[SharedMemoryPool]:
    """An arena of one slot."""
    made = SharedMemoryPool(compute_slot_nbytes(1000), 1)
    yield made
    made.close()


class Comms:
    """Stands for a client: what is sent, and to whom."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, Any]] = []

    def scatter(self, array: Array, workers: Any, hash: bool) -> Any:
        assert not hash
        self.sent.append((array, workers))
        return len(self.sent)


IN_ORDER = {
    "all": X,
    "a slice": X[2:4],
    "none": X[:0],
    "rows of nothing": X[:, :0],
    "a number": np.array(1.0),
    "large": LARGE,
}
NOT_IN_ORDER = {
    "fortran": np.asfortranarray(X),
    "columns": X[:, ::2],
    "turned round": X[::-1],
    "on its side": X.T,
    "broadcast": np.broadcast_to(X[:1], (6, 4)),
}


@pytest.mark.parametrize("form", IN_ORDER)
def test_rule_1_rows_stay_where_the_worker_reads_them(form: str, arena: SharedMemoryPool) -> None:
    """Rows that lie one after the other stay where they are, whatever other ways there are."""
    array, slot, client = IN_ORDER[form], arena.free_slots[0], Comms()
    assert RowRouter(client, slot, reads_process_memory=True).send_rows(array) == ProcessMemoryRows(
        ProcessMemoryArray.from_array(array)
    )
    assert (client.sent, slot.allocate(SMALL[:1000].shape, SMALL.dtype) is None) == ([], False)


@pytest.mark.parametrize("form", NOT_IN_ORDER)
def test_rule_2_rows_in_another_order_go_into_the_slot(form: str, arena: SharedMemoryPool) -> None:
    """Rows that do not lie one after the other are put in order in the slot."""
    part = RowRouter(Comms(), arena.free_slots[0], reads_process_memory=True).send_rows(NOT_IN_ORDER[form])
    assert isinstance(part, SharedMemoryRows)
    np.testing.assert_array_equal(part.read_rows(TaskResources(arena.memory)), NOT_IN_ORDER[form], strict=True)


def test_rule_2_rows_go_into_the_slot_where_the_worker_does_not_read(arena: SharedMemoryPool) -> None:
    """For a worker that shares memory and does not read this process's, rows are copied into the slot."""
    assert isinstance(RowRouter(Comms(), arena.free_slots[0]).send_rows(X), SharedMemoryRows)


def test_rule_2_rows_that_cannot_be_lent_go_into_the_slot(arena: SharedMemoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in memory that the system keeps from others are copied into the slot, though the worker reads."""
    monkeypatch.setattr(routing, "is_readable_by_peers", lambda array: False)
    assert isinstance(RowRouter(Comms(), arena.free_slots[0], reads_process_memory=True).send_rows(X), SharedMemoryRows)


@pytest.mark.parametrize(("array", "sort"), [(LARGE, ScatteredRows), (SMALL, InlineRows)])
def test_rules_3_and_4_a_full_slot_goes_on(array: Array, sort: type[RowSource], arena: SharedMemoryPool) -> None:
    """What has no room in the slot goes by comms if it is large, else in the task."""
    way = RowRouter(Comms(), arena.free_slots[0])
    assert [type(way.send_rows(rows)) for rows in (SMALL[:900], array, SMALL[:10])] == [
        SharedMemoryRows,
        sort,
        SharedMemoryRows,
    ]


@pytest.mark.parametrize(("workers", "named"), [((), None), (["tcp://a", "tcp://b"], ["tcp://a", "tcp://b"])])
def test_rule_3_large_rows_go_by_comms(workers: Sequence[str], named: Any) -> None:
    """Without shared memory large rows go to the workers that are named, to any if none is, and are brought in order."""
    client = Comms()
    way = RowRouter(client, workers=workers)
    assert [way.send_rows(rows) for rows in (LARGE, SMALL, LARGE)] == [ScatteredRows(0), InlineRows(SMALL), ScatteredRows(1)]
    assert ([workers for _, workers in client.sent], way.dependencies) == ([named] * 2, [1, 2])


def test_rule_4_without_a_client_all_rows_are_sent() -> None:
    """Where there is nothing else even large rows travel in the task, in order and without what they are a view of."""
    part = RowRouter().send_rows(np.asfortranarray(X)[:2])
    assert isinstance(part, InlineRows)
    assert (part.array.base, part.array.flags.c_contiguous, type(RowRouter().send_rows(LARGE))) == (None, True, InlineRows)
    np.testing.assert_array_equal(part.array, X[:2], strict=True)


def test_what_is_brought_is_brought_once() -> None:
    """A result that several parts ask for has one place among what Dask brings."""
    way = RowRouter()
    assert [way.add_dependency(future) for future in ("a", "b", "a")] == [
        ScatteredRows(0),
        ScatteredRows(1),
        ScatteredRows(0),
    ]
    assert way.dependencies == ["a", "b"]
    assert RowRouter().dependencies == []


def test_rows_of_many_bytes_go_by_comms(cluster_client: Client) -> None:
    """Dask brings large rows of any order to one of the workers that are named, and small ones go in the task."""
    address = sorted(cluster_client.has_what())[-1]
    way = RowRouter(cluster_client, workers=[address])
    large = np.asfortranarray(np.arange(MAX_INLINE_NBYTES // 8 + 2.0).reshape(2, -1))
    arrays = [X, large, large[:, ::2], -large]
    parts = [way.send_rows(array) for array in arrays]
    assert [type(part) for part in parts] == [InlineRows, ScatteredRows, InlineRows, ScatteredRows]
    assert set(cluster_client.who_has(way.dependencies).values()) == {(address,)}
    within = TaskResources(dependency_results=[future.result() for future in way.dependencies])
    for part, array in zip(parts, arrays, strict=True):
        np.testing.assert_array_equal(part.read_rows(within), array)


# Real workers


class Net(torch.nn.Module):
    """A network for rows of any width that shows where a number is out of place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.double() * 3, x.double().sum(1, keepdim=True)], 1)


ROWS = np.random.default_rng(0).integers(0, 100, (1000, 6)).astype("float32")
INPUTS: dict[str, Callable[[Path], Any]] = {
    "C-contiguous": lambda folder: ROWS,
    "a slice": lambda folder: ROWS[100:900],
    "Fortran": lambda folder: np.asfortranarray(ROWS),
    "every second row": lambda folder: ROWS[::2],
    "every second column": lambda folder: ROWS[:, ::2],
    "memmap": lambda folder: stored(folder),
    "read-only": lambda folder: np.frombuffer(ROWS.tobytes(), "float32").reshape(ROWS.shape),
    "rows of nothing": lambda folder: ROWS[:, :0],
    "big-endian": lambda folder: ROWS.astype(">f8"),
    "bool": lambda folder: ROWS > 50,
    "bytes": lambda folder: ROWS.astype("u1"),
    "a tensor": lambda folder: torch.from_numpy(ROWS),
    "a list": lambda folder: ROWS[:50].tolist(),
    "dask": lambda folder: da.from_array(ROWS, chunks=(130, 6)),
    "dask, in two pieces": lambda folder: da.from_array(ROWS, chunks=(130, 4)),
    "dask, with tasks": lambda folder: da.from_array(ROWS, chunks=(130, 6)) + 1,
    "dask, with one of all": lambda folder: da.from_array(ROWS, chunks=(130, 6)) + da.from_array(ROWS[0], chunks=-1),
}
NOT_LENT = {"Fortran", "every second row", "every second column", "dask, in two pieces"}


def stored(folder: Path) -> Array:
    """The rows in a file, as a memmap."""
    np.save(folder / "x.npy", ROWS)
    found: Array = np.load(folder / "x.npy", mmap_mode="r")
    return found


def plain_loop(x: Any) -> Array:
    """One plain torch loop over the rows."""
    rows = np.asarray(x.compute(scheduler="synchronous") if isinstance(x, da.Array) else x)
    rows = np.array(rows, rows.dtype.newbyteorder("="))
    with torch.inference_mode():
        return np.concatenate([Net()(torch.from_numpy(rows[i : i + 64])).numpy() for i in range(0, len(rows), 64)])


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Counter[type]:
    """How many arrays of this process took which way."""
    found: Counter[type] = Counter()
    take = RowRouter.send_rows

    def counted(way: RowRouter, array: Array) -> RowSource:
        part = take(way, array)
        found[type(part)] += 1
        return part

    monkeypatch.setattr(RowRouter, "take", counted)
    return found


@pytest.mark.parametrize("form", INPUTS)
def test_rows_are_read_where_they_lie(form: str, cluster_client: Client, taken: Counter[type], tmp_path: Path) -> None:
    """Workers of this host read the rows of every input themselves, and none is copied that lies in order."""
    x = INPUTS[form](tmp_path)
    y = di.predict(Net(), x, client=cluster_client, batch_size=16)
    np.testing.assert_array_equal(y, plain_loop(x))
    assert set(taken) == {SharedMemoryRows if form in NOT_LENT else ProcessMemoryRows}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("form", INPUTS)
def test_rows_go_into_slots_where_workers_cannot_read(
    form: str, cluster_client: Client, taken: Counter[type], tmp_path: Path
) -> None:
    """Where workers cannot read this process's memory every input goes through slots, and the answer is the same."""
    x = INPUTS[form](tmp_path)
    y = di.predict(Net(), x, client=cluster_client, batch_size=16)
    np.testing.assert_array_equal(y, plain_loop(x))
    assert set(taken) == {SharedMemoryRows}


def test_a_system_that_has_no_way_to_read(cluster_client: Client, taken: Counter[type]) -> None:
    """Workers on a system without ``process_vm_readv`` say that they do not read, and get their rows in slots."""

    def without() -> None:
        process_memory._kept, process_memory._load_libc = process_memory._load_libc, object
        process_memory._get_process_vm_readv.cache_clear()

    def as_before() -> None:
        process_memory._load_libc = process_memory._kept
        del process_memory._kept

    cluster_client.run(without)
    try:
        y = di.predict(Net(), ROWS, client=cluster_client, batch_size=16)
    finally:
        cluster_client.run(as_before)
    np.testing.assert_array_equal(y, plain_loop(ROWS))
    assert set(taken) == {SharedMemoryRows}


def test_some_workers_read_and_some_do_not(
    cluster_client: Client, taken: Counter[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker gets its rows in its own way, in one call."""
    asked = preflight.check_workers

    def one_reads(*words: Any) -> dict[str, preflight.WorkerInfo]:
        answers = sorted(asked(*words).items())
        return {address: replace(answer, reads_memory=i == 0) for i, (address, answer) in enumerate(answers)}

    monkeypatch.setattr(preflight, "check_workers", one_reads)
    y = di.predict(Net(), ROWS, client=cluster_client, batch_size=16, device_weights=[1, 1])
    np.testing.assert_array_equal(y, plain_loop(ROWS))
    assert set(taken) == {ProcessMemoryRows, SharedMemoryRows}


@pytest.mark.parametrize(
    "how", [{}, {"preprocess": lambda a, b: {"a": a + 0, "b": b + 0}}, {"dtype": {"b": "float64"}}, {"pad": False}]
)
def test_several_inputs(how: dict[str, Any], cluster_client: Client, taken: Counter[type]) -> None:
    """Ports of unlike order, dtype and kind reach the network row by row, with a preprocess and casts as without."""

    def network(a: Array, b: Array) -> Array:
        return np.concatenate([a, b], 1).astype("float64")

    for first, second in ((ROWS, -np.asfortranarray(ROWS)), (da.from_array(ROWS, chunks=(130, 6)), -ROWS.astype(">i4"))):
        y = di.predict(network, {"a": first, "b": second}, client=cluster_client, batch_size=16, **how)
        np.testing.assert_array_equal(y, np.concatenate([ROWS, -ROWS], 1))
    assert set(taken) == {ProcessMemoryRows, SharedMemoryRows}


def test_memory_that_is_gone_names_the_rows(cluster_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a worker cannot read rows after all, the error has the rows and the process."""
    lent = ProcessMemoryArray.from_array
    monkeypatch.setattr(ProcessMemoryArray, "from_array", lambda array: replace(lent(array), address=1))
    with pytest.raises(
        di.DaskInferError,
        match=r"rows \d+:\d+ on cpu failed: \w*Error: .*the memory of process \d+ cannot be read: Bad address",
    ):
        di.predict(Net(), ROWS, client=cluster_client, batch_size=16)
