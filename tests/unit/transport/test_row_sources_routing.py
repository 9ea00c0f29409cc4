"""How rows of this process reach a worker, rule by rule, and that the results never depend on it."""

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
from daskinfer.transport import process_memory, row_sources
from daskinfer.transport.process_memory import ProcessMemoryArray
from daskinfer.transport.row_sources import (
    MAX_INLINE_NBYTES,
    InlineRows,
    ProcessMemoryRows,
    RowRouter,
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
def pool() -> Iterator[SharedMemoryPool]:
    """Make a pool of one slot."""
    made = SharedMemoryPool(compute_slot_nbytes(1000), 1)
    yield made
    made.close()


class Comms:
    """Stand in for a client: records what is sent, and to which workers."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, Any]] = []

    def scatter(self, array: Array, workers: Any, hash: bool) -> Any:
        assert not hash
        self.sent.append((array, workers))
        return len(self.sent)


CONTIGUOUS = {
    "all": X,
    "a slice": X[2:4],
    "none": X[:0],
    "rows of nothing": X[:, :0],
    "a number": np.array(1.0),
    "large": LARGE,
}
NOT_CONTIGUOUS = {
    "fortran": np.asfortranarray(X),
    "columns": X[:, ::2],
    "turned round": X[::-1],
    "on its side": X.T,
    "broadcast": np.broadcast_to(X[:1], (6, 4)),
}


@pytest.mark.parametrize("form", CONTIGUOUS)
def test_rule_1_rows_stay_where_the_worker_reads_them(form: str, pool: SharedMemoryPool) -> None:
    """Contiguous rows stay where they are, whatever other ways there are."""
    array, slot, client = CONTIGUOUS[form], pool.free_slots[0], Comms()
    assert RowRouter(client, slot, reads_process_memory=True).send_rows(array) == ProcessMemoryRows(
        ProcessMemoryArray.from_array(array)
    )
    assert (client.sent, slot.allocate(SMALL[:1000].shape, SMALL.dtype) is None) == ([], False)


@pytest.mark.parametrize("form", NOT_CONTIGUOUS)
def test_rule_2_rows_in_another_order_go_into_the_slot(form: str, pool: SharedMemoryPool) -> None:
    """Rows that are not contiguous are copied in order into the slot."""
    source = RowRouter(Comms(), pool.free_slots[0], reads_process_memory=True).send_rows(NOT_CONTIGUOUS[form])
    assert isinstance(source, SharedMemoryRows)
    np.testing.assert_array_equal(source.read_rows(TaskResources(pool.memory)), NOT_CONTIGUOUS[form], strict=True)


def test_rule_2_rows_go_into_the_slot_if_the_worker_cannot_read(pool: SharedMemoryPool) -> None:
    """For a worker that shares memory but cannot read this process's, rows are copied into the slot."""
    assert isinstance(RowRouter(Comms(), pool.free_slots[0]).send_rows(X), SharedMemoryRows)


def test_rule_2_unreadable_rows_go_into_the_slot(pool: SharedMemoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in memory that other processes may not read are copied into the slot."""
    monkeypatch.setattr(row_sources, "is_readable_by_peers", lambda array: False)
    assert isinstance(RowRouter(Comms(), pool.free_slots[0], reads_process_memory=True).send_rows(X), SharedMemoryRows)


@pytest.mark.parametrize(("array", "kind"), [(LARGE, ScatteredRows), (SMALL, InlineRows)])
def test_rules_3_and_4_a_full_slot_goes_on(array: Array, kind: type[RowSource], pool: SharedMemoryPool) -> None:
    """Rows without room in the slot go by comms if they are large, otherwise in the task."""
    router = RowRouter(Comms(), pool.free_slots[0])
    assert [type(router.send_rows(rows)) for rows in (SMALL[:900], array, SMALL[:10])] == [
        SharedMemoryRows,
        kind,
        SharedMemoryRows,
    ]


@pytest.mark.parametrize(("workers", "named"), [((), None), (["tcp://a", "tcp://b"], ["tcp://a", "tcp://b"])])
def test_rule_3_large_rows_go_by_comms(workers: Sequence[str], named: Any) -> None:
    """Without shared memory, large rows go to the named workers, or to any, and become dependencies in order."""
    client = Comms()
    router = RowRouter(client, workers=workers)
    assert [router.send_rows(rows) for rows in (LARGE, SMALL, LARGE)] == [
        ScatteredRows(0),
        InlineRows(SMALL),
        ScatteredRows(1),
    ]
    assert ([workers for _, workers in client.sent], router.dependencies) == ([named] * 2, [1, 2])


def test_rule_4_without_a_client_all_rows_are_sent() -> None:
    """If there is no other way, even large rows travel in the task: contiguous, and without the array they are a view of."""
    source = RowRouter().send_rows(np.asfortranarray(X)[:2])
    assert isinstance(source, InlineRows)
    assert (source.array.base, source.array.flags.c_contiguous, type(RowRouter().send_rows(LARGE))) == (
        None,
        True,
        InlineRows,
    )
    np.testing.assert_array_equal(source.array, X[:2], strict=True)


def test_a_dependency_is_added_once() -> None:
    """A result that several row sources refer to is one dependency."""
    router = RowRouter()
    assert [router.add_dependency(future) for future in ("a", "b", "a")] == [
        ScatteredRows(0),
        ScatteredRows(1),
        ScatteredRows(0),
    ]
    assert router.dependencies == ["a", "b"]
    assert RowRouter().dependencies == []


def test_rows_of_many_bytes_go_by_comms(cluster_client: Client) -> None:
    """Dask sends large rows of any memory order to one of the named workers, and small ones go in the task."""
    address = sorted(cluster_client.has_what())[-1]
    router = RowRouter(cluster_client, workers=[address])
    large = np.asfortranarray(np.arange(MAX_INLINE_NBYTES // 8 + 2.0).reshape(2, -1))
    arrays = [X, large, large[:, ::2], -large]
    sources = [router.send_rows(array) for array in arrays]
    assert [type(source) for source in sources] == [InlineRows, ScatteredRows, InlineRows, ScatteredRows]
    assert set(cluster_client.who_has(router.dependencies).values()) == {(address,)}
    resources = TaskResources(dependency_results=[future.result() for future in router.dependencies])
    for source, array in zip(sources, arrays, strict=True):
        np.testing.assert_array_equal(source.read_rows(resources), array)


# Real workers


class Net(torch.nn.Module):
    """A model for rows of any width whose output shows any number that is out of place."""

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
COPIED = {"Fortran", "every second row", "every second column", "dask, in two pieces"}


def stored(folder: Path) -> Array:
    """Return the rows as a memmap of a file."""
    np.save(folder / "x.npy", ROWS)
    rows: Array = np.load(folder / "x.npy", mmap_mode="r")
    return rows


def plain_loop(x: Any) -> Array:
    """Compute the rows in one plain torch loop."""
    rows = np.asarray(x.compute(scheduler="synchronous") if isinstance(x, da.Array) else x)
    rows = np.array(rows, rows.dtype.newbyteorder("="))
    with torch.inference_mode():
        return np.concatenate([Net()(torch.from_numpy(rows[i : i + 64])).numpy() for i in range(0, len(rows), 64)])


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Counter[type]:
    """Count how many arrays of this process took which way."""
    counts: Counter[type] = Counter()
    send_rows = RowRouter.send_rows

    def counted(router: RowRouter, array: Array) -> RowSource:
        source = send_rows(router, array)
        counts[type(source)] += 1
        return source

    monkeypatch.setattr(RowRouter, "send_rows", counted)
    return counts


@pytest.mark.parametrize("form", INPUTS)
def test_rows_are_read_in_place(form: str, cluster_client: Client, taken: Counter[type], tmp_path: Path) -> None:
    """Workers of this host read the rows of every input themselves, and no contiguous one is copied."""
    x = INPUTS[form](tmp_path)
    y = di.predict(Net(), x, client=cluster_client, batch_size=16)
    np.testing.assert_array_equal(y, plain_loop(x))
    assert set(taken) == {SharedMemoryRows if form in COPIED else ProcessMemoryRows}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("form", INPUTS)
def test_rows_go_into_slots_if_workers_cannot_read(
    form: str, cluster_client: Client, taken: Counter[type], tmp_path: Path
) -> None:
    """If workers cannot read this process's memory, every input goes through slots, and the output is the same."""
    x = INPUTS[form](tmp_path)
    y = di.predict(Net(), x, client=cluster_client, batch_size=16)
    np.testing.assert_array_equal(y, plain_loop(x))
    assert set(taken) == {SharedMemoryRows}


def test_a_system_without_process_vm_readv(cluster_client: Client, taken: Counter[type]) -> None:
    """Workers on a system without ``process_vm_readv`` say that they cannot read, and get their rows in slots."""

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
    """Each worker gets its rows in its own way, within one call."""
    check_workers = preflight.check_workers

    def one_reads(*words: Any) -> dict[str, preflight.WorkerInfo]:
        infos = sorted(check_workers(*words).items())
        return {address: replace(info, can_read_client_memory=i == 0) for i, (address, info) in enumerate(infos)}

    monkeypatch.setattr(preflight, "check_workers", one_reads)
    y = di.predict(Net(), ROWS, client=cluster_client, batch_size=16, device_weights=[1, 1])
    np.testing.assert_array_equal(y, plain_loop(ROWS))
    assert set(taken) == {ProcessMemoryRows, SharedMemoryRows}


@pytest.mark.parametrize(
    "how", [{}, {"preprocess": lambda a, b: {"a": a + 0, "b": b + 0}}, {"dtype": {"b": "float64"}}, {"pad": False}]
)
def test_several_inputs(how: dict[str, Any], cluster_client: Client, taken: Counter[type]) -> None:
    """Ports of different memory order, dtype and kind reach the model row by row, also with preprocess and casts."""

    def network(a: Array, b: Array) -> Array:
        return np.concatenate([a, b], 1).astype("float64")

    for first, second in ((ROWS, -np.asfortranarray(ROWS)), (da.from_array(ROWS, chunks=(130, 6)), -ROWS.astype(">i4"))):
        y = di.predict(network, {"a": first, "b": second}, client=cluster_client, batch_size=16, **how)
        np.testing.assert_array_equal(y, np.concatenate([ROWS, -ROWS], 1))
    assert set(taken) == {ProcessMemoryRows, SharedMemoryRows}


def test_unreadable_memory_names_the_rows(cluster_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a worker cannot read rows after all, the error has the rows and the process."""
    from_array = ProcessMemoryArray.from_array
    monkeypatch.setattr(ProcessMemoryArray, "from_array", lambda array: replace(from_array(array), address=1))
    with pytest.raises(
        di.DaskInferError,
        match=r"rows \d+:\d+ on cpu failed: \w*Error: .*the memory of process \d+ cannot be read: Bad address",
    ):
        di.predict(Net(), ROWS, client=cluster_client, batch_size=16)
