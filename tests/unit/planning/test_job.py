from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daskinfer.cluster.placement import Placement
from daskinfer.hardware.discovery import Device
from daskinfer.models.model import as_model
from daskinfer.options import Options
from daskinfer.planning.inputs import Inputs
from daskinfer.planning.job import InferenceJob
from daskinfer.scheduling.balancer import MAX_CHUNKS_PER_TASK, DynamicBalancer, LoadBalancer, StaticBalancer
from daskinfer.scheduling.batching import BATCH_DOUBLINGS, MIN_BATCHES
from daskinfer.scheduling.chunking import CHUNK_NBYTES, ChunkLayout, assign_chunks, make_chunks
from daskinfer.storage.formats import Target
from daskinfer.worker.model_runner import ModelRunConfig

N_ROWS, ROW_NBYTES = 10_000, 8
X = np.zeros(N_ROWS, "float32")


class Written:
    """Stands for a store that workers write."""

    path = "y.zarr"

    def write(self, start: int, rows: np.ndarray[Any, Any]) -> None: ...


TARGETS: tuple[Target, ...] = (Written(),)


def call_of(
    x: Any = X,
    layout: ChunkLayout | None = None,
    weights: Sequence[float] = (1.0, 1.0),
    *,
    model: Callable[..., Any] = np.negative,
    options: Options | None = None,
    **fields: Any,
) -> InferenceJob:
    """A call as a plan makes it, in micro-batches of 16 rows."""
    inputs = Inputs.from_value(x)
    layout = layout or make_chunks(inputs.n_rows, weights, batch_size=16)
    job = ModelRunConfig(inputs.ports, layout.batch_size, options or Options())
    placement = Placement(tuple(Device(f"cpu:{i}", "cpu", i) for i in range(len(weights))))
    given_fields = {"balanced": False, "prefetch": 1, "row_nbytes": ROW_NBYTES, "chunk_nbytes": CHUNK_NBYTES} | fields
    given_fields["part_rows"] = inputs.n_rows
    return InferenceJob(inputs, as_model(model).make_loader(), job, placement, tuple(weights), layout, **given_fields)


def test_other_batch_sizes_make_other_cells() -> None:
    """With other micro-batches the rows are cut anew, at whole cells of the largest, and it is settled."""
    call = call_of(tunable=True).with_batch_sizes({"cpu": 64, "cuda": 128})
    assert (call.layout.batch_size, call.layout.cell_rows, call.tunable) == (128, 128, False)
    assert all(chunk.start % 128 == 0 for chunk in call.layout.chunks)
    assert (call.run_config.batch_size, call.run_config.get_batch_size("cpu"), call.run_config.get_batch_size("cuda")) == (
        128,
        64,
        128,
    )


def test_other_batch_sizes_keep_weights_and_bytes() -> None:
    """Cut anew, the devices have their shares and the chunks their bytes."""
    call = call_of(weights=(3.0, 1.0), chunk_nbytes=64 * ROW_NBYTES).with_batch_sizes({"cpu": 32})
    assert [round(rows / N_ROWS, 2) for rows in call.layout.rows_per_device(2)] == [0.75, 0.25]
    assert max(call.layout.row_chunks) == 64


@pytest.mark.parametrize("targets", [TARGETS, ()])
def test_cells_of_a_store_stay(targets: tuple[Target, ...]) -> None:
    """Where a store is read or written by units, other micro-batches leave all chunks as they are."""
    layout = make_chunks(N_ROWS, [1.0, 1.0], batch_size=16, cell_rows=192)
    after = call_of(layout=layout, targets=targets).with_batch_sizes({"cpu": 64}).layout
    assert (after.batch_size, after.cell_rows, after.chunks) == (64, 192, layout.chunks)


def test_chunks_of_dask_arrays_stay() -> None:
    """A dask array's own chunks stay whatever the micro-batch is."""
    x = da.zeros(1000, chunks=((130, 70, 500, 300),))
    after = call_of(x, assign_chunks(x.chunks[0], [1.0, 1.0], batch_size=16)).with_batch_sizes({"cpu": 64}).layout
    assert (after.row_chunks, after.batch_size) == ((130, 70, 500, 300), 64)


def test_a_call_does_not_change() -> None:
    """The call that others were made of is as it was."""
    call = call_of()
    layout = call.layout
    call.with_batch_sizes({"cpu": 64})
    assert (call.layout, call.run_config.batch_size, call.run_config.by_kind) == (layout, 16, {})


def test_sizes_that_may_pay() -> None:
    """Micro-batches double from the planned one while the smallest share holds ``MIN_BATCHES``; smaller ones come first."""
    assert call_of().batch_size_candidates == (8, 16, 32, 64, 128, 256, 512)
    assert N_ROWS // 2 // MIN_BATCHES == 625
    assert call_of(weights=(9.0, 1.0)).batch_size_candidates == (8, 16, 32, 64)
    assert call_of(weights=(1.0, 0.0)).batch_size_candidates == (8, 16, 32, 64, 128, 256, 512, 1024)


def test_sizes_of_balanced_devices() -> None:
    """Where devices get rows by speed, a light one does not make all micro-batches small."""
    assert call_of(weights=(9.0, 1.0), balanced=True).batch_size_candidates == call_of().batch_size_candidates


def test_sizes_by_bytes() -> None:
    """A micro-batch is in a chunk at least twice."""
    assert call_of(chunk_nbytes=200 * ROW_NBYTES).batch_size_candidates == (8, 16, 32, 64)
    assert call_of(chunk_nbytes=1).batch_size_candidates == (16,)


def test_sizes_end() -> None:
    """However many rows there are, a micro-batch doubles so many times at most; rows of no bytes are survived."""
    call = call_of(np.zeros((10**8, 0)), row_nbytes=0)
    assert call.batch_size_candidates == (8, *(16 << step for step in range(BATCH_DOUBLINGS + 1)))


@pytest.mark.parametrize("targets", [TARGETS, ()])
def test_sizes_divide_the_units_of_a_store(targets: tuple[Target, ...]) -> None:
    """Where a store's units stay, only micro-batches that they are whole multiples of are tried."""
    layout = make_chunks(N_ROWS, [1.0, 1.0], batch_size=16, cell_rows=192)
    assert call_of(layout=layout, targets=targets).batch_size_candidates == (8, 16, 32, 64)


def test_the_key_is_the_networks_and_the_rows() -> None:
    """Speeds are remembered for a network on rows of one look, however many rows and devices there are."""
    known = call_of().history_key
    assert hash(known) == hash(call_of().history_key)
    assert call_of(np.ones(50, "float32"), weights=(1.0,), prefetch=3).history_key == known


@pytest.mark.parametrize(
    "other",
    [
        {"model": np.abs},
        {"x": np.zeros(N_ROWS)},
        {"x": np.zeros((N_ROWS, 1), "float32")},
        {"x": (X, X)},
        {"options": Options(dtype="float16")},
        {"options": Options(dtype={"x": "float16"})},
        {"options": Options(autocast="bf16")},
        {"options": Options(preprocess=np.abs)},
        {"options": Options(postprocess=np.abs)},
    ],
)
def test_another_key(other: dict[str, Any]) -> None:
    """Another network, other rows and another way to run it have speeds of their own."""
    key = call_of(**other).history_key
    assert key != call_of().history_key
    assert {key: 1}[key] == 1


def test_how_far_ahead() -> None:
    """Devices may be ahead of a reader by twice what their windows hold."""
    call = call_of(prefetch=3, chunk_nbytes=100 * ROW_NBYTES)
    assert call.max_task_rows == max(call.layout.row_chunks)
    assert call.max_rows_ahead == 2 * (3 + 2) * 2 * call.max_task_rows


def test_the_largest_task() -> None:
    """A task holds the bytes of a chunk, one cell at least, a given chunk whole, and no more rows than there are."""
    small = make_chunks(N_ROWS, [1.0, 1.0], batch_size=16, row_nbytes=ROW_NBYTES, chunk_nbytes=1)
    assert call_of(layout=small, chunk_nbytes=1).max_task_rows == 16
    assert call_of(layout=small, chunk_nbytes=100 * ROW_NBYTES).max_task_rows == 100
    assert call_of(layout=small).max_task_rows == N_ROWS
    x = da.zeros(1000, chunks=((700, 300),))
    assert call_of(x, assign_chunks((700, 300), [1.0, 1.0], batch_size=16), chunk_nbytes=1).max_task_rows == 700
    assert call_of(X[:0], make_chunks(0, [1.0, 1.0], batch_size=16)).max_task_rows == 0


def planned(call: InferenceJob, limits: dict[str, int]) -> LoadBalancer:
    """Who deals what the layout says."""
    return StaticBalancer(call.layout, call.row_nbytes, n_devices=2, chunk_nbytes=call.chunk_nbytes)


def by_grid(call: InferenceJob, limits: dict[str, int]) -> LoadBalancer:
    """Who cuts as it goes."""
    return DynamicBalancer.from_grid(call.layout.n_rows, call.layout.cell_rows, [1.0, 1.0], **limits)


def by_chunks(call: InferenceJob, limits: dict[str, int]) -> LoadBalancer:
    """Who deals given chunks by speed."""
    return DynamicBalancer.from_chunks(call.layout.row_chunks, [1.0, 1.0], **limits)


@pytest.mark.parametrize("make", [planned, by_grid, by_chunks])
@given(
    n_rows=st.integers(1, 500),
    batch_size=st.sampled_from([1, 16, 100]),
    row_nbytes=st.sampled_from([1, 8, 1000]),
    chunk_nbytes=st.sampled_from([1, 300, 20_000, CHUNK_NBYTES]),
)
@settings(max_examples=40, deadline=None)
def test_no_task_is_larger_than_the_largest(
    make: Callable[[InferenceJob, dict[str, int]], LoadBalancer],
    n_rows: int,
    batch_size: int,
    row_nbytes: int,
    chunk_nbytes: int,
) -> None:
    """Whoever deals, no task has more rows or more chunks than the slots were made for."""
    limits = {"row_nbytes": row_nbytes, "chunk_nbytes": chunk_nbytes}
    layout = make_chunks(n_rows, [1.0, 1.0], batch_size=batch_size, **limits)
    call = call_of(np.zeros(n_rows, "u1"), layout, **limits)
    dealer = make(call, limits)
    while tasks := [(device, task) for device in range(2) if (task := dealer.next_task(device))]:
        for device, task in tasks:
            assert sum(chunk.n_rows for chunk in task) <= call.max_task_rows
            assert len(task) <= MAX_CHUNKS_PER_TASK
            dealer.record(device, task, 1e-5)
