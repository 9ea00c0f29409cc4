"""run from storage to storage: what is read and written where, how often, and how much is in flight."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import daskinfer as di
from daskinfer.cluster.process_cluster import default_cluster
from daskinfer.scheduling import balancer, chunking
from daskinfer.storage.formats import npy
from daskinfer.storage.formats import zarr as zarr_io
from tests.unit.execution.test_window import watch_scheduler

N_ROWS = 3000


def make_model() -> torch.nn.Module:
    """Make a small random model of (n, 5) -> (n, 3)."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


X = np.random.default_rng(0).normal(size=(N_ROWS, 5)).astype(np.float32)
with torch.inference_mode():
    Y = make_model()(torch.from_numpy(X)).numpy()


def write_input(path: Path, rows_per_chunk: int = 100) -> Path:
    """Write the input into a file of either format."""
    if path.suffix == ".npy":
        np.save(path, X)
    else:
        zarr.create_array(path, data=X, chunks=(rows_per_chunk, 5))
    return path


def read_output(path: Path) -> np.ndarray[Any, Any]:
    """Read the output from a file of either format."""
    return np.load(path) if path.suffix == ".npy" else zarr.open_array(path, mode="r")[:]


def watch_opens(folder: str, log: str) -> None:
    """From now on, write a line to ``log`` for each file in ``folder`` that this process opens, by an audit hook."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(folder):
            os.write(descriptor, f"{os.path.relpath(arguments[0], folder)}\n".encode())

    sys.addaudithook(hook)


@pytest.mark.parametrize("keywords", [{}, {"device_weights": [1, 3]}, {"batch_size": 7}], ids=["auto", "weights", "batch"])
@pytest.mark.parametrize(("source", "target"), [(".npy", ".zarr"), (".zarr", ".npy"), (".zarr", ".zarr"), (".npy", ".npy")])
def test_equals_a_plain_loop(
    two_cpus: list[str], tmp_path: Path, source: str, target: str, keywords: dict[str, Any]
) -> None:
    """From either format to either format the output equals that of a plain torch loop."""
    x, y = write_input(tmp_path / f"x{source}"), tmp_path / f"y{target}"
    assert di.run(make_model(), x, y, devices=two_cpus, **keywords).rows == N_ROWS
    np.testing.assert_allclose(read_output(y), Y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows_per_chunk", [1, 97, 1000, N_ROWS])
def test_stores_with_other_chunks(two_cpus: list[str], tmp_path: Path, rows_per_chunk: int) -> None:
    """Whatever the chunks of the input are, the output has regular chunks of its own and the same values."""
    x, y = write_input(tmp_path / "x.zarr", rows_per_chunk), tmp_path / "y.zarr"
    di.run(make_model(), x, y, devices=two_cpus)
    np.testing.assert_allclose(read_output(y), Y, rtol=1e-5, atol=1e-6)
    assert zarr.open_array(y, mode="r").chunks[1:] == (3,)


def test_a_sharded_store(two_cpus: list[str], tmp_path: Path) -> None:
    """Sharded input is read by whole shards."""
    x, y = tmp_path / "x.zarr", tmp_path / "y.zarr"
    zarr.create_array(x, data=X, chunks=(10, 5), shards=(100, 5))
    di.run(make_model(), x, y, devices=two_cpus)
    np.testing.assert_allclose(read_output(y), Y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefetch", [1, 2, 3])
def test_prefetch_changes_nothing(two_cpus: list[str], tmp_path: Path, prefetch: int) -> None:
    """The bytes of the output do not depend on how many chunks are read ahead."""
    x = write_input(tmp_path / "x.zarr")
    for name, n in (("first", 1), ("second", prefetch)):
        di.run(make_model(), x, tmp_path / f"{name}.npy", devices=two_cpus, batch_size=20, prefetch=n)
    np.testing.assert_array_equal(read_output(tmp_path / "first.npy"), read_output(tmp_path / "second.npy"))


@pytest.mark.parametrize(("source", "target"), [(".npy", ".zarr"), (".zarr", ".npy")])
def test_the_client_reads_and_writes_no_row(
    two_cpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str
) -> None:
    """Rows are read and written by the workers; in the client's process that would fail."""
    for module in (npy, zarr_io):
        monkeypatch.setattr(module.Source, "__getitem__", None)
        monkeypatch.setattr(module.Target, "write", None)
    y = tmp_path / f"y{target}"
    report = di.run(make_model(), write_input(tmp_path / f"x{source}"), y, devices=two_cpus, device_weights=[1, 1])
    np.testing.assert_allclose(read_output(y), Y, rtol=1e-5, atol=1e-6)
    assert all(device.read_seconds > 0 and device.write_seconds > 0 for device in report.devices)


def test_each_chunk_of_the_source_is_read_once(two_cpus: list[str], tmp_path: Path) -> None:
    """If micro-batches are whole chunks of the store, no task cuts one: each of its files is opened exactly once."""
    n_chunks, log = 300, tmp_path / "opened"
    x = zarr.create_array(tmp_path / "x.zarr", shape=(n_chunks * 16, 5), dtype="float32", chunks=(16, 5))
    x[:] = 1.0
    log.touch()
    with default_cluster.acquire_client(two_cpus) as client:
        client.run(watch_opens, str(tmp_path / "x.zarr"), str(log))
    di.run(make_model(), tmp_path / "x.zarr", tmp_path / "y.zarr", devices=two_cpus, batch_size=32)
    n_opened = Counter(line for line in log.read_text().splitlines() if line.startswith("c"))
    assert len(n_opened) == n_chunks
    assert set(n_opened.values()) == {1}


@pytest.mark.parametrize("weights", ["auto", [1, 1]])
def test_what_is_in_flight_does_not_grow_with_the_input(
    two_cpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Any
) -> None:
    """An input of many times what a task may hold becomes many tasks, of which a window per device is in flight."""
    for module in (chunking, balancer):
        monkeypatch.setattr(module, "CHUNK_NBYTES", 20 * X[:1].nbytes)
    x, y = write_input(tmp_path / "x.npy"), tmp_path / "y.npy"
    with default_cluster.acquire_client(two_cpus) as client, watch_scheduler(client) as watch:
        di.run(make_model(), x, y, devices=two_cpus, batch_size=4, device_weights=weights)
    np.testing.assert_allclose(read_output(y), Y, rtol=1e-5, atol=1e-6)
    assert len(watch.keys) >= 60  # of 44 rows each, one of the output's write-units
    assert watch.most_in_flight <= 3 * len(two_cpus)


@pytest.mark.parametrize("target", [".npy", ".zarr"])
def test_no_rows(two_cpus: list[str], tmp_path: Path, target: str) -> None:
    """An input without rows gives an output without rows, and runs no task."""
    np.save(tmp_path / "x.npy", X[:0])
    assert di.run(make_model(), tmp_path / "x.npy", tmp_path / f"y{target}", devices=two_cpus).rows == 0
    assert read_output(tmp_path / f"y{target}").shape == (0, 3)


def test_an_output_that_workers_cannot_write(two_cpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that may not write the output is an error before the first chunk, and leaves no output."""
    monkeypatch.setattr(npy.Target, "writable_path", "/nowhere/y.npy")
    with pytest.raises(di.DaskInferError, match=r"cannot write '/nowhere/y\.npy'\. Use a folder that all hosts share"):
        di.run(make_model(), write_input(tmp_path / "x.npy"), tmp_path / "y.npy", devices=two_cpus)
    assert not (tmp_path / "y.npy").exists()
