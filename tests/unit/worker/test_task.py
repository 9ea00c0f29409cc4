"""A task on a worker: read, compute, write; here in this process, which then is the worker."""

from __future__ import annotations

import errno
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client

import daskinfer as di
from daskinfer.core.chunks import Chunk
from daskinfer.core.pytree import Ports
from daskinfer.errors import ChunkError, StorageError
from daskinfer.execution.device_queue import DeviceQueue
from daskinfer.models.model import Model
from daskinfer.options import Options
from daskinfer.scheduling import autotune
from daskinfer.storage.formats import open_source
from daskinfer.storage.paths import is_part_intact
from daskinfer.transport.process_memory import ProcessMemoryArray
from daskinfer.transport.row_sources import (
    ChunkInput,
    FileRows,
    InlineRows,
    ProcessMemoryRows,
    ScatteredRows,
    SharedMemoryRows,
    Task,
)
from daskinfer.transport.shared_memory import RESULT_HEADER_NBYTES, SharedMemoryPool
from daskinfer.worker import device_thread, task
from daskinfer.worker.current_device import current_device
from daskinfer.worker.loaded_models import model_cache
from daskinfer.worker.model_runner import ModelRunConfig
from tests.unit.storage.test_formats import created

X = np.arange(20.0)
PORTS = Ports.from_input(X)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """End this process's device thread and forget its networks after each test."""
    yield
    device_thread.close_device_thread(current_device().worker)
    model_cache.clear()


@pytest.fixture
def arena() -> Iterator[SharedMemoryPool]:
    """Shared memory of one slot that holds two arrays of 20 numbers."""
    made = SharedMemoryPool(RESULT_HEADER_NBYTES + 4096, 1)
    yield made
    made.close()


def order(model: Any = np.negative, targets: Any = (), **options: Any) -> task.TaskContext:
    """What is the same for all tasks of a call over ``X``."""
    job = ModelRunConfig(PORTS, 8, Options(**options), (np.empty(0),))
    return task.TaskContext(Model(model).make_loader(), job, tuple(targets))


def piece(part: Any, start: int = 0, stop: int = 20, places: Any = None) -> ChunkInput:
    """One chunk of one port."""
    return ChunkInput(Chunk(0, start, stop, 0), (part,), places)


def test_answers_come_back() -> None:
    """Without shared memory a task gives a block per chunk, each with its receipt."""
    blocks = task.run_task(order().serialize(), Task((piece(InlineRows(X[:12]), 0, 12), piece(InlineRows(X[12:]), 12))))
    assert blocks is not None
    np.testing.assert_array_equal(np.concatenate([block.arrays[0] for block in blocks]), -X)
    assert [(b.stats.start, b.stats.stop, b.stats.device, b.stats.batch_size) for b in blocks if b.stats] == [
        (0, 12, "inline", 8),
        (12, 20, "inline", 8),
    ]


def test_answers_stay_in_shared_memory(arena: SharedMemoryPool) -> None:
    """Rows that lie in a slot are read there, answers go there, receipts beside them, and nothing comes back."""
    slot = arena.free_slots.pop()
    given, answer = slot.allocate((20,), X.dtype), slot.allocate((20,), X.dtype)
    assert given is not None and answer is not None
    given.get_array(arena.memory)[...] = X
    work = Task((piece(SharedMemoryRows(given), places=(answer,)),), arena.ref, slot.header_offset)
    assert task.run_task(order().serialize(), work) is None
    np.testing.assert_array_equal(answer.get_array(arena.memory), -X)
    assert [(block.receipt.start, block.receipt.stop) for block in slot.read_header()] == [(0, 20)]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("f8", {}), (">f8", {}), ("f4", {"dtype": "float64"}), ("f8", {"preprocess": lambda x: x + 0}), ("f8", {"pad": False})],
)
def test_rows_that_stay_with_the_client(dtype: str, options: dict[str, Any]) -> None:
    """Rows of the client's memory are copied out where the network needs them, micro-batch by micro-batch."""
    x = X.astype(dtype)
    part = pickle.loads(pickle.dumps(ProcessMemoryRows(ProcessMemoryArray.from_array(x[5:]))))
    blocks = task.run_task(order(**options).serialize(), Task((piece(part, 5),)))
    assert blocks is not None
    np.testing.assert_array_equal(blocks[0].arrays[0], -X[5:])


def test_answers_without_a_place_come_back(arena: SharedMemoryPool) -> None:
    """With shared memory, what has no place there comes back, its receipts lie there."""
    slot = arena.free_slots.pop()
    blocks = task.run_task(order().serialize(), Task((piece(InlineRows(X)),), arena.ref, slot.header_offset))
    assert blocks is not None
    np.testing.assert_array_equal(blocks[0].arrays[0], -X)
    assert [block.receipt for block in slot.read_header()] == [blocks[0].stats]


def test_files_are_read_and_written(tmp_path: Path) -> None:
    """From file to file nothing comes back but the receipts, with the seconds of reading and writing."""
    np.save(tmp_path / "x.npy", X)
    y = created(tmp_path / "y.npy", X.shape, X.dtype, 5)
    parts = [FileRows(open_source(tmp_path / "x.npy"), start, start + 10) for start in (0, 10)]
    work = Task((piece(parts[0], 0, 10), piece(parts[1], 10)))
    blocks = task.run_task(order(targets=[y]).serialize(), work)
    assert blocks is not None
    assert [block.arrays for block in blocks] == [[], []]
    assert [len(written) for block in blocks for written in block.written] == [2, 2]
    assert all(is_part_intact(tmp_path / "y.npy", part) for block in blocks for part in block.written[0])
    assert all(block.stats and block.stats.write_seconds > 0 and block.stats.read_seconds > 0 for block in blocks)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), -X)


def test_rows_that_cannot_be_written(tmp_path: Path) -> None:
    """Where an output cannot be written, its rows and the system's number of the error are named."""
    y = created(tmp_path / "y.npy", X.shape, X.dtype, 5)
    (tmp_path / "y.npy").unlink()
    with pytest.raises(
        StorageError, match=r"chunk 0 \(rows 0:20\) cannot be written: FileNotFoundError: .*y\.npy"
    ) as caught:
        task.run_task(order(targets=[y]).serialize(), Task((piece(InlineRows(X)),)))
    assert caught.value.number == errno.ENOENT


def test_results_of_other_tasks_are_rows() -> None:
    """Rows that Dask brings are taken by their position."""
    blocks = task.run_task(order().serialize(), Task((piece(ScatteredRows(1)),)), [None, X])
    assert blocks is not None
    np.testing.assert_array_equal(blocks[0].arrays[0], -X)


def test_a_chunk_without_rows() -> None:
    """No network is loaded for a chunk without rows; its answer has the promised shape and no receipt."""
    n_loads = model_cache.n_loads
    block = task.compute_chunk([X[:0]], 5, 5, order().loader, order().run_config, current_device())
    assert (block.arrays[0].shape, block.stats, model_cache.n_loads) == ((0,), None, n_loads)


def test_an_order_is_unpickled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tasks of a call a worker does, what they have in common is opened once, and the network loaded once."""
    sealed, n_opened, n_loads = order(lambda batch: 3 * batch).serialize(), [], model_cache.n_loads
    loads = cloudpickle.loads
    monkeypatch.setattr(task.cloudpickle, "loads", lambda content: n_opened.append(1) or loads(content))
    for start in (0, 5, 10):
        task.run_task(bytes(bytearray(sealed)), Task((piece(InlineRows(X[start : start + 5]), start, start + 5),)))
    assert len(n_opened) == 1
    assert model_cache.n_loads == n_loads + 1


def test_an_order_travels_without_rows() -> None:
    """Rows given as ``output=`` stay behind, and functions go by value."""
    large = np.zeros(1 << 20)
    sealed = order(output=large, preprocess=halved, postprocess=lambda y: y + 1).serialize()
    assert len(sealed) < 100_000
    options = cloudpickle.loads(sealed).job.options
    assert options.output is None
    assert (options.preprocess(4.0), options.postprocess(1)) == (2.0, 2)
    assert task.make_portable(order().run_config).options == Options()


def halved(batch: Any) -> Any:
    """A function of this module."""
    return batch / 2


def test_a_dask_array_that_lies_about_its_rows(cluster_client: Client) -> None:
    """A block with other rows than its chunk says is refused with the rows, the port and the cure."""
    lazy = da.from_array(X, chunks=10).map_blocks(lambda block: block[:4], dtype=X.dtype)
    for how in ({"client": cluster_client}, {"devices": "inline"}):
        with pytest.raises(
            ChunkError, match=r"rows \d+:\d+: the dask array of .* computed 4 rows there; .*compute_chunk_sizes"
        ):
            di.predict(np.negative, lazy, **how)


def in_device_thread(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A network whose answer is 1 in the device thread, and 0 in any other."""
    return np.full(len(batch), threading.current_thread().name.startswith("daskinfer-device"), float)


def test_the_device_thread_does_the_computing() -> None:
    """A worker computes in its one device thread, whichever thread a task runs in; inline there is none."""
    blocks = task.run_task(order(in_device_thread).serialize(), Task((piece(InlineRows(X)),)))
    assert blocks is not None
    assert blocks[0].arrays[0].all()
    assert (
        not task.compute_chunk([X], 0, 20, order(in_device_thread).loader, order().run_config, current_device())
        .arrays[0]
        .any()
    )


def test_threads_of_torch_are_as_before() -> None:
    """Computing in this process leaves torch's number of threads alone."""
    before = torch.get_num_threads()
    task.compute_chunk([X], 0, 20, order().loader, order().run_config, current_device())
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("n_there", "size"), [(20, 16), (10, 8), (4, 8)])
def test_measuring_tries_what_there_are_rows_for(monkeypatch: pytest.MonkeyPatch, n_there: int, size: int) -> None:
    """Of the micro-batches only those are tried that the rows at hand fill, and the first one in any case."""
    tried: list[int] = []

    def climbs(run: Any, sizes: Any, n_rows: int, channels_last: Any, *, first: int) -> autotune.BatchSizeChoice:
        assert first == 8
        tried.extend(run(size)[0] for size in sizes)
        return autotune.BatchSizeChoice(sizes[-1], 1.0)

    monkeypatch.setattr(task, "best", climbs)
    job = order().run_config
    assert task.measure_batch_sizes([X[:n_there]], order().loader, job, current_device(), (8, 16, 32), 1000) == (
        size,
        1.0,
        False,
        False,
    )
    assert tried == [s for s in (8, 16) if s <= size]


def test_the_usual_speed_is_that_of_what_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks what to expect is not told the speed of the fastest micro-batch."""
    monkeypatch.setattr(task, "sustained_throughput", lambda run, size: float(run(size)[0]))
    assert task.measure_batch_sizes(
        [X], order().loader, order().run_config, current_device(), (8,), 1000, sustained=True
    ) == (8, 8.0, False, True)


def test_measuring_is_a_task_like_any_other(arena: SharedMemoryPool) -> None:
    """On a worker the first chunk's rows are measured in the device thread, from wherever they are."""
    slot = arena.free_slots.pop()
    given = slot.allocate((20,), X.dtype)
    assert given is not None
    given.get_array(arena.memory)[...] = X
    sent, stays = Task((piece(InlineRows(X)),)), Task((piece(ProcessMemoryRows(ProcessMemoryArray.from_array(X))),))
    shared = Task((piece(SharedMemoryRows(given)),), arena.ref, slot.header_offset)
    for work in (sent, stays, shared):
        size, speed, *_ = task.run_benchmark_task(order().serialize(), work, (), (8, 16), int(autotune.MIN_TUNING_SECONDS))
        assert (size, speed > 0) == (8, True)  # so few rows are not worth more


def test_a_lane_is_full_by_places(arena: SharedMemoryPool) -> None:
    """No task more is in flight than there are places; without a free slot an answer comes back by Dask's comms."""
    assert not DeviceQueue(0, "cpu:0", "cpu", {}, 1, arena).is_full
    assert DeviceQueue(0, "cpu:0", "cpu", {}, 0, arena).is_full
    arena.free_slots.clear()
    assert not DeviceQueue(0, "cpu:0", "cpu", {}, 1, arena).is_full
