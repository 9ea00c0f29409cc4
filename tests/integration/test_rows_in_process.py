"""Rows that stay in this process's memory: what is in flight of them, and what is computed only once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import daskinfer as di
from daskinfer.cluster.process_cluster import default_cluster
from daskinfer.planning import output_spec
from daskinfer.scheduling import chunking
from daskinfer.transport import shared_memory
from tests.unit.execution.test_window import watch_scheduler

N_ROWS, N_COLUMNS = 20_000, 64
CHUNK_NBYTES = 1 << 16
ROWS_PER_CHUNK = CHUNK_NBYTES // (4 * N_COLUMNS + 4)  # of input and output together
X = np.random.default_rng(0).standard_normal((N_ROWS, N_COLUMNS), np.float32)


def make_model() -> torch.nn.Module:
    """Make a small random model of (n, 64) -> (n, 1)."""
    torch.manual_seed(0)
    return torch.nn.Linear(N_COLUMNS, 1)


with torch.inference_mode():
    Y = make_model()(torch.from_numpy(X)).numpy()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit the rows that a task may hold to 64 KiB."""
    monkeypatch.setattr(chunking, "CHUNK_NBYTES", CHUNK_NBYTES)


def count_chunks(x: Any, devices: list[str]) -> int:
    """Count the chunks of a call whose model is known; check its output."""
    for _ in range(2):
        y, report = di.predict(make_model(), x, devices=devices, batch_size=20, return_report=True)
        np.testing.assert_allclose(y, Y, rtol=1e-5, atol=1e-6)
    return sum(device.n_chunks for device in report.devices)


@pytest.mark.usefixtures("small_chunks")
def test_rows_that_stay_do_not_count_towards_a_task(two_cpus: list[str]) -> None:
    """Rows that workers read in place do not count towards what a task may hold; rows that are sent do."""
    assert count_chunks(X, two_cpus) < N_ROWS / ROWS_PER_CHUNK / 2
    assert count_chunks(np.asfortranarray(X), two_cpus) >= N_ROWS / ROWS_PER_CHUNK


@pytest.mark.usefixtures("small_chunks")
def test_chunks_of_a_stream_stay_small(two_cpus: list[str]) -> None:
    """The blocks of a stream stay small, since each waits for those before it."""
    for _ in range(2):
        blocks = list(di.stream(make_model(), X, devices=two_cpus, batch_size=20))
        np.testing.assert_allclose(np.concatenate(blocks), Y, rtol=1e-5, atol=1e-6)
    assert len(blocks) >= N_ROWS / ROWS_PER_CHUNK


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("x", "most"), [(X, 2), (np.asfortranarray(X), 3)], ids=["stays", "sent"])
def test_rows_that_stay_are_not_read_ahead(two_cpus: list[str], x: np.ndarray[Any, Any], most: int) -> None:
    """If no rows have to be read ahead, a device has one task that computes and one that is next."""
    with default_cluster.acquire_client(two_cpus) as client, watch_scheduler(client) as watch:
        di.predict(make_model(), x, devices=two_cpus, batch_size=20)
    assert watch.most_in_flight <= most * len(two_cpus)


def test_a_result_header_is_read_once(two_cpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The result header of a task is unpickled once."""
    n_read = 0
    read_result_header = shared_memory.read_result_header

    def counted(*args: Any) -> Any:
        nonlocal n_read
        n_read += 1
        return read_result_header(*args)

    monkeypatch.setattr(shared_memory, "read_result_header", counted)
    with default_cluster.acquire_client(two_cpus) as client, watch_scheduler(client) as watch:
        di.predict(make_model(), X, devices=two_cpus, batch_size=20)
    assert n_read == len(watch.keys)


@pytest.mark.parametrize(
    ("other", "n_tried"),
    [
        ({}, 0),
        ({"x": X[:100]}, 0),
        ({"x": X.astype("float64"), "dtype": "float32"}, 1),
        ({"x": {"input": X}}, 1),
        ({"preprocess": np.negative}, 1),
        ({"autocast": "bf16"}, 1),
        ({"model": torch.nn.Linear(N_COLUMNS, 2)}, 1),
        ({"output": np.empty((0, 1), "float32")}, 0),
    ],
    ids=["again", "fewer rows", "other dtype", "other ports", "preprocess", "autocast", "other model", "output"],
)
def test_the_output_spec_is_inferred_once(
    two_cpus: list[str], monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], n_tried: int
) -> None:
    """A known model is not run on dummy rows again, unless it is called in another way."""
    output_spec.output_specs.clear()
    n_inferred = 0
    infer_from_model = output_spec._infer_from_model

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal n_inferred
        n_inferred += 1
        return infer_from_model(*arguments, **keywords)

    monkeypatch.setattr(output_spec, "_infer_from_model", counted)
    call = {"model": make_model(), "x": X, "devices": two_cpus}
    di.predict(**call)
    assert n_inferred == 1
    counts = []
    for _ in range(2):
        n_inferred = 0
        di.predict(**(call | other))
        counts.append(n_inferred)
    assert counts == ([1, 1] if "preprocess" in other else [n_tried, 0])  # a function's output may change between calls
