"""Measuring on a worker: which batch sizes are tried, what speed is reported, and where the rows come from."""

from __future__ import annotations

from typing import Any

import pytest

from daskinfer.scheduling import autotune
from daskinfer.transport.process_memory import ProcessMemoryArray
from daskinfer.transport.row_sources import InlineRows, ProcessMemoryRows, SharedMemoryRows, Task
from daskinfer.transport.shared_memory import SharedMemoryPool
from daskinfer.worker import benchmark
from daskinfer.worker.current_device import current_device
from tests.unit.worker.test_task import X, make_chunk_input, make_spec

pytestmark = pytest.mark.usefixtures("clean_worker")


@pytest.mark.parametrize(("n_available", "best"), [(20, 16), (10, 8), (4, 8)])
def test_batch_sizes_are_tried_that_the_rows_fill(monkeypatch: pytest.MonkeyPatch, n_available: int, best: int) -> None:
    """Only batch sizes that the available rows fill are tried, and the initial one in any case."""
    tried: list[int] = []

    def try_all(run: Any, sizes: Any, n_rows: int, channels_last: Any, *, initial: int) -> autotune.BatchSizeChoice:
        assert initial == 8
        tried.extend(run(size)[0] for size in sizes)
        return autotune.BatchSizeChoice(sizes[-1], 1.0)

    monkeypatch.setattr(benchmark, "tune_batch_size", try_all)
    choice = benchmark.measure_batch_sizes([X[:n_available]], make_spec(), current_device(), (8, 16, 32), 1000)
    assert choice == (best, 1.0, False, False)
    assert tried == [size for size in (8, 16) if size <= best]


def test_the_sustained_speed_is_that_of_the_chosen_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``sustained`` the speed is not that of the fastest single micro-batch."""
    monkeypatch.setattr(benchmark, "sustained_throughput", lambda run, size: float(run(size)[0]))
    choice = benchmark.measure_batch_sizes([X], make_spec(), current_device(), (8,), 1000, sustained=True)
    assert choice == (8, 8.0, False, True)


def test_a_benchmark_is_a_task_like_any_other(pool: SharedMemoryPool) -> None:
    """On a worker the first chunk's rows are measured in the device thread, wherever they come from."""
    slot = pool.free_slots.pop()
    rows_ref = slot.allocate((20,), X.dtype)
    assert rows_ref is not None
    rows_ref.get_array(pool.memory)[...] = X
    inline = Task((make_chunk_input(InlineRows(X)),))
    in_place = Task((make_chunk_input(ProcessMemoryRows(ProcessMemoryArray.from_array(X))),))
    shared = Task((make_chunk_input(SharedMemoryRows(rows_ref)),), pool.ref, slot.header_offset)
    for task in (inline, in_place, shared):
        size, speed, *_ = benchmark.run_benchmark_task(
            make_spec().serialize(), task, (), (8, 16), int(autotune.MIN_TUNING_SECONDS)
        )
        assert (size, speed > 0) == (8, True)  # so few rows are not worth more
