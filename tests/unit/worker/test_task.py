"""A task on a worker: read, compute, write. Here this process is the worker."""

from __future__ import annotations

import errno
import pickle
import threading
from pathlib import Path
from typing import Any

import cloudpickle
import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client

import daskinfer as di
from daskinfer.core.chunks import BatchConfig, Chunk
from daskinfer.core.pytree import Ports
from daskinfer.errors import ChunkError, StorageError
from daskinfer.models.model import Model
from daskinfer.options import Options
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
from daskinfer.transport.shared_memory import SharedMemoryPool
from daskinfer.worker import task
from daskinfer.worker.current_device import current_device
from daskinfer.worker.loaded_models import model_cache
from daskinfer.worker.model_runner import ModelRunConfig, RunSpec, make_portable
from tests.unit.storage.test_formats import created

X = np.arange(20.0)
PORTS = Ports.from_input(X)
pytestmark = pytest.mark.usefixtures("clean_worker")


def make_spec(model: Any = np.negative, targets: Any = (), **options: Any) -> RunSpec:
    """Make what is the same for all tasks of a call over ``X``."""
    run_config = ModelRunConfig(PORTS, BatchConfig(8), Options(**options), (np.empty(0),))
    return RunSpec(Model(model).make_loader(), run_config, tuple(targets))


def make_chunk_input(row_source: Any, start: int = 0, stop: int = 20, output_refs: Any = None) -> ChunkInput:
    """Make one chunk of one port."""
    return ChunkInput(Chunk(0, start, stop), (row_source,), output_refs)


def test_results_come_back() -> None:
    """Without shared memory a task returns a result per chunk, each with its statistics."""
    results = task.run_task(
        make_spec().serialize(),
        Task((make_chunk_input(InlineRows(X[:12]), 0, 12), make_chunk_input(InlineRows(X[12:]), 12))),
    )
    assert results is not None
    np.testing.assert_array_equal(np.concatenate([result.arrays[0] for result in results]), -X)
    assert [(r.stats.start, r.stats.stop, r.stats.device, r.stats.batch_size) for r in results] == [
        (0, 12, "inline", 8),
        (12, 20, "inline", 8),
    ]


def test_results_stay_in_shared_memory(pool: SharedMemoryPool) -> None:
    """Rows in a slot are read there, outputs and statistics are written there, and nothing comes back."""
    slot = pool.free_slots.pop()
    rows_ref, output_ref = slot.allocate((20,), X.dtype), slot.allocate((20,), X.dtype)
    assert rows_ref is not None
    assert output_ref is not None
    rows_ref.get_array(pool.memory)[...] = X
    chunk_input = make_chunk_input(SharedMemoryRows(rows_ref), output_refs=(output_ref,))
    assert task.run_task(make_spec().serialize(), Task((chunk_input,), pool.ref, slot.header_offset)) is None
    np.testing.assert_array_equal(output_ref.get_array(pool.memory), -X)
    assert [(result.stats.start, result.stats.stop) for result in slot.read_header()] == [(0, 20)]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("f8", {}), (">f8", {}), ("f4", {"dtype": "float64"}), ("f8", {"preprocess": lambda x: x + 0}), ("f8", {"pad": False})],
)
def test_rows_that_stay_with_the_client(dtype: str, options: dict[str, Any]) -> None:
    """Rows in the client's memory are copied out micro-batch by micro-batch, as the model needs them."""
    x = X.astype(dtype)
    part = pickle.loads(pickle.dumps(ProcessMemoryRows(ProcessMemoryArray.from_array(x[5:]))))
    results = task.run_task(make_spec(**options).serialize(), Task((make_chunk_input(part, 5),)))
    assert results is not None
    np.testing.assert_array_equal(results[0].arrays[0], -X[5:])


def test_results_without_room_in_the_slot_come_back(pool: SharedMemoryPool) -> None:
    """With shared memory, outputs without room there come back, while their statistics are written there."""
    slot = pool.free_slots.pop()
    results = task.run_task(make_spec().serialize(), Task((make_chunk_input(InlineRows(X)),), pool.ref, slot.header_offset))
    assert results is not None
    np.testing.assert_array_equal(results[0].arrays[0], -X)
    assert [result.stats for result in slot.read_header()] == [results[0].stats]


def test_files_are_read_and_written(tmp_path: Path) -> None:
    """From file to file only the statistics come back, with the seconds of reading and writing."""
    np.save(tmp_path / "x.npy", X)
    y = created(tmp_path / "y.npy", X.shape, X.dtype, 5)
    parts = [FileRows(open_source(tmp_path / "x.npy"), start, start + 10) for start in (0, 10)]
    work = Task((make_chunk_input(parts[0], 0, 10), make_chunk_input(parts[1], 10)))
    results = task.run_task(make_spec(targets=[y]).serialize(), work)
    assert results is not None
    assert [result.arrays for result in results] == [[], []]
    assert [len(written) for result in results for written in result.parts] == [2, 2]
    assert all(is_part_intact(tmp_path / "y.npy", part) for result in results for part in result.parts[0])
    assert all(result.stats.write_seconds > 0 and result.stats.read_seconds > 0 for result in results)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), -X)


def test_rows_that_cannot_be_written(tmp_path: Path) -> None:
    """If an output cannot be written, the error has its rows and the system's error number."""
    y = created(tmp_path / "y.npy", X.shape, X.dtype, 5)
    (tmp_path / "y.npy").unlink()
    with pytest.raises(
        StorageError, match=r"chunk 0 \(rows 0:20\) cannot be written: FileNotFoundError: .*y\.npy"
    ) as caught:
        task.run_task(make_spec(targets=[y]).serialize(), Task((make_chunk_input(InlineRows(X)),)))
    assert caught.value.number == errno.ENOENT


def test_results_of_other_tasks_are_rows() -> None:
    """Results of other Dask tasks are found by their position."""
    results = task.run_task(make_spec().serialize(), Task((make_chunk_input(ScatteredRows(1)),)), [None, X])
    assert results is not None
    np.testing.assert_array_equal(results[0].arrays[0], -X)


def test_a_chunk_without_rows() -> None:
    """No model is loaded for a chunk without rows; its result has the planned shape, and no batch size."""
    n_loads = model_cache.n_loads
    result = task.compute_chunk([X[:0]], Chunk(0, 5, 5), make_spec(), current_device())
    assert (result.arrays[0].shape, result.stats.batch_size, model_cache.n_loads) == ((0,), 0, n_loads)


def test_a_spec_is_unpickled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tasks of a call a worker runs, their spec is unpickled once and the model is loaded once."""
    serialized, n_unpickled, n_loads = make_spec(lambda batch: 3 * batch).serialize(), [], model_cache.n_loads
    loads = cloudpickle.loads
    monkeypatch.setattr(task.cloudpickle, "loads", lambda content: n_unpickled.append(1) or loads(content))
    for start in (0, 5, 10):
        task.run_task(
            bytes(bytearray(serialized)), Task((make_chunk_input(InlineRows(X[start : start + 5]), start, start + 5),))
        )
    assert len(n_unpickled) == 1
    assert model_cache.n_loads == n_loads + 1


def test_a_spec_travels_without_rows() -> None:
    """Rows passed as ``output=`` stay behind, and functions are pickled by value."""
    large = np.zeros(1 << 20)
    serialized = make_spec(output=large, preprocess=halved, postprocess=lambda y: y + 1).serialize()
    assert len(serialized) < 100_000
    options = cloudpickle.loads(serialized).run_config.options
    assert options.output is None
    assert (options.preprocess(4.0), options.postprocess(1)) == (2.0, 2)
    assert make_portable(make_spec().run_config).options == Options()


def halved(batch: Any) -> Any:
    """Halve a batch, as a function of this module."""
    return batch / 2


def test_a_dask_array_with_wrong_chunk_sizes(cluster_client: Client) -> None:
    """A block with fewer rows than its chunk says is refused with the rows, the port and the cure."""
    lazy = da.from_array(X, chunks=10).map_blocks(lambda block: block[:4], dtype=X.dtype)
    for how in ({"client": cluster_client}, {"devices": "inline"}):
        with pytest.raises(
            ChunkError,
            match=r"rows \d+:\d+: the dask array of .* computed 4 rows, not as many as its chunks say.*compute_chunk_sizes",
        ):
            di.predict(np.negative, lazy, **how)


def in_device_thread(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return 1 in the device thread, and 0 in any other."""
    return np.full(len(batch), threading.current_thread().name.startswith("daskinfer-device"), float)


def test_the_device_thread_does_the_computing() -> None:
    """A worker computes in its one device thread, whichever thread the task runs in; inline there is none."""
    results = task.run_task(make_spec(in_device_thread).serialize(), Task((make_chunk_input(InlineRows(X)),)))
    assert results is not None
    assert results[0].arrays[0].all()
    inline = task.compute_chunk([X], Chunk(0, 0, 20), make_spec(in_device_thread), current_device())
    assert not inline.arrays[0].any()


def test_threads_of_torch_are_as_before() -> None:
    """Computing in this process does not change torch's number of threads."""
    before = torch.get_num_threads()
    task.compute_chunk([X], Chunk(0, 0, 20), make_spec(), current_device())
    assert torch.get_num_threads() == before


def greedy(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Run out of memory for one of the rows."""
    if (batch == 7).any():
        raise MemoryError("7")
    return -batch


def test_memory_is_a_rows_fault_only_if_the_task_runs_alone() -> None:
    """Beside other tasks any of them may use the memory, so the chunk fails; alone, the row is found and skipped."""
    spec, chunk_input = make_spec(greedy, on_error="skip").serialize(), make_chunk_input(InlineRows(X))
    with pytest.raises(ChunkError, match=r"rows 0:20 on cpu failed: MemoryError: 7"):
        task.run_task(spec, Task((chunk_input,), alone=False))
    results = task.run_task(spec, Task((chunk_input,), alone=True))
    assert results is not None
    assert [(failure.start, failure.stop) for failure in results[0].failures] == [(7, 8)]
