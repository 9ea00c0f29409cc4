"""Rows that stay in this process's memory: what of them is in flight, and how often anything is looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import daskinfer as di
from daskinfer.cluster.process_cluster import default_cluster
from daskinfer.planning import output_spec
from daskinfer.scheduling import chunking
from daskinfer.scheduling.throughput_history import history
from daskinfer.transport import shared_memory
from tests.unit.execution.test_window import watched

N_ROWS, N_COLUMNS = 20_000, 64
CHUNK_NBYTES = 1 << 16
ROWS_PER_CHUNK = CHUNK_NBYTES // (4 * N_COLUMNS + 4)  # of input and output together
X = np.random.default_rng(0).standard_normal((N_ROWS, N_COLUMNS), np.float32)


def net() -> torch.nn.Module:
    """A small random network of (n, 64) -> (n, 1)."""
    torch.manual_seed(0)
    return torch.nn.Linear(N_COLUMNS, 1)


with torch.inference_mode():
    Y = net()(torch.from_numpy(X)).numpy()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task may hold the rows of 64 KiB."""
    monkeypatch.setattr(chunking, "CHUNK_NBYTES", CHUNK_NBYTES)


def n_chunks(x: Any, devices: list[str]) -> int:
    """How many chunks a call takes whose network is known, with the right answer."""
    for _ in range(2):
        y, report = di.predict(net(), x, devices=devices, batch_size=20, return_report=True)
        np.testing.assert_allclose(y, Y, rtol=1e-5, atol=1e-6)
    return sum(device.n_chunks for device in report.devices)


@pytest.mark.usefixtures("small_chunks")
def test_what_stays_is_held_by_no_task(two_cpus: list[str]) -> None:
    """Rows that workers read where they lie count nothing towards what a task may hold; those that are sent do."""
    assert n_chunks(X, two_cpus) < N_ROWS / ROWS_PER_CHUNK / 2
    assert n_chunks(np.asfortranarray(X), two_cpus) >= N_ROWS / ROWS_PER_CHUNK


@pytest.mark.usefixtures("small_chunks")
def test_answers_that_come_in_order_are_cut_as_before(two_cpus: list[str]) -> None:
    """A stream's blocks stay small, since each waits for those before it."""
    for _ in range(2):
        blocks = list(di.stream(net(), X, devices=two_cpus, batch_size=20))
        np.testing.assert_allclose(np.concatenate(blocks), Y, rtol=1e-5, atol=1e-6)
    assert len(blocks) >= N_ROWS / ROWS_PER_CHUNK


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("x", "most"), [(X, 2), (np.asfortranarray(X), 3)], ids=["stays", "sent"])
def test_what_stays_is_not_read_ahead(two_cpus: list[str], x: np.ndarray[Any, Any], most: int) -> None:
    """Of rows that nobody has to read ahead, a device has one task that computes and one that is next."""
    with default_cluster.acquire_client(two_cpus) as client, watched(client) as watch:
        di.predict(net(), x, devices=two_cpus, batch_size=20)
    assert watch.most_in_flight <= most * len(two_cpus)


def test_a_note_is_read_once(two_cpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker noted of a task is unpickled once."""
    n_read = 0
    read_note = shared_memory.read_result_header

    def counted(*place: Any) -> Any:
        nonlocal n_read
        n_read += 1
        return read_note(*place)

    monkeypatch.setattr(shared_memory, "read_result_header", counted)
    with default_cluster.acquire_client(two_cpus) as client, watched(client) as watch:
        di.predict(net(), X, devices=two_cpus, batch_size=20)
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
    ids=["again", "fewer rows", "other dtype", "other ports", "preprocess", "autocast", "other network", "output"],
)
def test_what_the_answer_looks_like_is_found_out_once(
    two_cpus: list[str], monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], n_tried: int
) -> None:
    """A network that is known is not tried on made-up rows again, unless something else is asked of it."""
    history.clear()
    n_found = 0
    run_made_up = output_spec._infer_from_model

    def counted(*arguments: Any, **how: Any) -> Any:
        nonlocal n_found
        n_found += 1
        return run_made_up(*arguments, **how)

    monkeypatch.setattr(output_spec, "_infer_from_model", counted)
    call = {"model": net(), "x": X, "devices": two_cpus}
    di.predict(**call)
    assert n_found == 1
    found = []
    for _ in range(2):
        n_found = 0
        di.predict(**(call | other))
        found.append(n_found)
    assert found == ([1, 1] if "preprocess" in other else [n_tried, 0])  # a function's answer may be another each time
