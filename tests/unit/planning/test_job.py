from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daskinfer.core.chunks import BatchConfig
from daskinfer.core.pytree import flatten
from daskinfer.hardware.discovery import Device
from daskinfer.models.model import as_model
from daskinfer.options import Options
from daskinfer.planning.inputs import Inputs
from daskinfer.planning.job import InferenceJob, Placement, ResumeState
from daskinfer.planning.output_spec import OutputSpec
from daskinfer.scheduling.balancer import MAX_CHUNKS_PER_TASK, DynamicBalancer, LoadBalancer, StaticBalancer
from daskinfer.scheduling.batching import BATCH_DOUBLINGS, MIN_BATCHES
from daskinfer.scheduling.chunking import CHUNK_NBYTES, ChunkLayout, assign_chunks, make_chunks
from daskinfer.storage.formats import Target
from daskinfer.worker.model_runner import ModelRunConfig

N_ROWS, ROW_NBYTES = 10_000, 8
X = np.zeros(N_ROWS, "float32")


class FakeTarget:
    """Stands in for a store that workers write to."""

    path = "y.zarr"

    def write(self, start: int, rows: np.ndarray[Any, Any]) -> None: ...


TARGETS: tuple[Target, ...] = (FakeTarget(),)


def make_job(
    x: Any = X,
    layout: ChunkLayout | None = None,
    weights: Sequence[float] = (1.0, 1.0),
    *,
    model: Callable[..., Any] = np.negative,
    options: Options | None = None,
    targets: tuple[Target, ...] = (),
    prefetch: int = 1,
    row_nbytes: int = ROW_NBYTES,
    **fields: Any,
) -> InferenceJob:
    """Make a job with batches of 16 rows; the output has the bytes of ``row_nbytes`` that the input leaves."""
    inputs = Inputs.from_value(x)
    output = np.empty((0, row_nbytes - inputs.row_nbytes), "u1")
    layout = layout or make_chunks(inputs.n_rows, weights, batch_size=16)
    return InferenceJob(
        **{
            "model_name": "negative",
            "inputs": inputs,
            "loader": as_model(model).make_loader(),
            "output_spec": OutputSpec(flatten(output)[1], (output,)),
            "run_config": ModelRunConfig(
                inputs.ports, BatchConfig(layout.batch_size), replace(options or Options(), prefetch=prefetch)
            ),
            "placement": Placement(tuple(Device(f"cpu:{i}", "cpu", i) for i in range(len(weights)))),
            "weights": tuple(weights),
            "layout": layout,
            "balanced": False,
            "tunable": False,
            "chunk_nbytes": CHUNK_NBYTES,
            "resume": ResumeState(targets),
        }
        | fields
    )


def test_other_batch_sizes_make_other_cells() -> None:
    """Other batch sizes cut the rows again, at whole cells of the largest one, and end tuning."""
    job = make_job(tunable=True).with_batch_sizes({"cpu": 64, "cuda": 128})
    assert (job.layout.batch_size, job.layout.cell_rows, job.tunable) == (128, 128, False)
    assert all(chunk.start % 128 == 0 for chunk in job.layout.chunks)
    batch = job.run_config.batch
    assert (batch.batch_size, batch.get_batch_size("cpu"), batch.get_batch_size("cuda")) == (128, 64, 128)


def test_other_batch_sizes_keep_weights_and_bytes() -> None:
    """After the rows are cut again, devices keep their shares and chunks their limit of bytes."""
    job = make_job(weights=(3.0, 1.0), chunk_nbytes=64 * ROW_NBYTES).with_batch_sizes({"cpu": 32})
    assert [round(rows / N_ROWS, 2) for rows in job.layout.rows_per_device(2)] == [0.75, 0.25]
    assert max(job.layout.row_chunks) == 64


@pytest.mark.parametrize("targets", [TARGETS, ()])
def test_cells_of_a_store_stay(targets: tuple[Target, ...]) -> None:
    """If a store is read or written in units, other batch sizes leave all chunks unchanged."""
    layout = make_chunks(N_ROWS, [1.0, 1.0], batch_size=16, cell_rows=192)
    after = make_job(layout=layout, targets=targets).with_batch_sizes({"cpu": 64}).layout
    assert (after.batch_size, after.cell_rows, after.chunks) == (64, 192, layout.chunks)


def test_chunks_of_dask_arrays_stay() -> None:
    """The chunks of a dask array stay, whatever the batch size."""
    x = da.zeros(1000, chunks=((130, 70, 500, 300),))
    after = make_job(x, assign_chunks(x.chunks[0], [1.0, 1.0], batch_size=16)).with_batch_sizes({"cpu": 64}).layout
    assert (after.row_chunks, after.batch_size) == ((130, 70, 500, 300), 64)


def test_a_job_does_not_change() -> None:
    """A job is unchanged after others were derived from it."""
    job = make_job()
    layout = job.layout
    job.with_batch_sizes({"cpu": 64})
    assert (job.layout, job.run_config.batch.batch_size, job.run_config.batch.by_kind) == (layout, 16, {})


def test_sizes_that_may_pay() -> None:
    """Candidates are half the planned batch size and its doublings, while the smallest share holds ``MIN_BATCHES``."""
    assert make_job().batch_size_candidates == (8, 16, 32, 64, 128, 256, 512)
    assert N_ROWS // 2 // MIN_BATCHES == 625
    assert make_job(weights=(9.0, 1.0)).batch_size_candidates == (8, 16, 32, 64)
    assert make_job(weights=(1.0, 0.0)).batch_size_candidates == (8, 16, 32, 64, 128, 256, 512, 1024)


def test_sizes_of_balanced_devices() -> None:
    """If devices are balanced, a device of low weight does not limit the batch size of all."""
    assert make_job(weights=(9.0, 1.0), balanced=True).batch_size_candidates == make_job().batch_size_candidates


def test_sizes_by_bytes() -> None:
    """A chunk holds at least two batches."""
    assert make_job(chunk_nbytes=200 * ROW_NBYTES).batch_size_candidates == (8, 16, 32, 64)
    assert make_job(chunk_nbytes=1).batch_size_candidates == (16,)


def test_sizes_end() -> None:
    """The batch size doubles only a limited number of times, however many rows there are; rows may have no bytes."""
    job = make_job(np.zeros((10**8, 0)), row_nbytes=0)
    assert job.batch_size_candidates == (8, *(16 << step for step in range(BATCH_DOUBLINGS + 1)))


@pytest.mark.parametrize("targets", [TARGETS, ()])
def test_sizes_divide_the_units_of_a_store(targets: tuple[Target, ...]) -> None:
    """If a store fixes the units, only batch sizes that divide them are candidates."""
    layout = make_chunks(N_ROWS, [1.0, 1.0], batch_size=16, cell_rows=192)
    assert make_job(layout=layout, targets=targets).batch_size_candidates == (8, 16, 32, 64)


def test_the_key_depends_on_model_and_rows() -> None:
    """Throughput is kept per model and row format, independent of the number of rows and devices."""
    known = make_job().history_key
    assert hash(known) == hash(make_job().history_key)
    assert make_job(np.ones(50, "float32"), weights=(1.0,), prefetch=3).history_key == known


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
    """Another model, other rows or other options have a key of their own."""
    key = make_job(**other).history_key
    assert key != make_job().history_key
    assert {key: 1}[key] == 1


def test_how_far_ahead() -> None:
    """Devices may be ahead of a consumer by twice what their windows hold."""
    job = make_job(prefetch=3, chunk_nbytes=100 * ROW_NBYTES)
    assert job.max_task_rows == max(job.layout.row_chunks)
    assert job.max_rows_ahead == 2 * (3 + 2) * 2 * job.max_task_rows


def test_the_largest_task() -> None:
    """A task may hold the bytes of a chunk, but at least a cell or any chunk of a dask array, and at most all rows."""
    small = make_chunks(N_ROWS, [1.0, 1.0], batch_size=16, row_nbytes=ROW_NBYTES, chunk_nbytes=1)
    assert make_job(layout=small, chunk_nbytes=1).max_task_rows == 16
    assert make_job(layout=small, chunk_nbytes=100 * ROW_NBYTES).max_task_rows == 100
    assert make_job(layout=small).max_task_rows == N_ROWS
    x = da.zeros(1000, chunks=((700, 300),))
    assert make_job(x, assign_chunks((700, 300), [1.0, 1.0], batch_size=16), chunk_nbytes=1).max_task_rows == 700
    assert make_job(X[:0], make_chunks(0, [1.0, 1.0], batch_size=16)).max_task_rows == 0


def make_static_balancer(job: InferenceJob, limits: dict[str, int]) -> LoadBalancer:
    """Make a balancer that hands out the chunks of the layout."""
    return StaticBalancer(job.layout, job.row_nbytes, n_devices=2, chunk_nbytes=job.chunk_nbytes)


def make_grid_balancer(job: InferenceJob, limits: dict[str, int]) -> LoadBalancer:
    """Make a balancer that cuts the rows while it runs."""
    return DynamicBalancer.from_grid(job.layout.n_rows, job.layout.cell_rows, [1.0, 1.0], **limits)


def make_chunk_balancer(job: InferenceJob, limits: dict[str, int]) -> LoadBalancer:
    """Make a balancer that hands out fixed chunks by throughput."""
    return DynamicBalancer.from_chunks(job.layout.row_chunks, [1.0, 1.0], **limits)


@pytest.mark.parametrize("make", [make_static_balancer, make_grid_balancer, make_chunk_balancer])
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
    """With any balancer, no task has more rows or chunks than the buffers are sized for."""
    limits = {"row_nbytes": row_nbytes, "chunk_nbytes": chunk_nbytes}
    layout = make_chunks(n_rows, [1.0, 1.0], batch_size=batch_size, **limits)
    job = make_job(np.zeros(n_rows, "u1"), layout, **limits)
    balancer = make(job, limits)
    while tasks := [(device, task) for device in range(2) if (task := balancer.next_task(device))]:
        for device, task in tasks:
            assert sum(chunk.n_rows for chunk in task) <= job.max_task_rows
            assert len(task) <= MAX_CHUNKS_PER_TASK
            balancer.record(device, task, 1e-5)
