"""Runs: which device computes which rows, what travels to workers, and what is measured and remembered."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client, Future

import daskinfer as di
from daskinfer.cluster.placement import resolve_placement
from daskinfer.execution import run, task_builder
from daskinfer.planning.build_job import RunArguments, build_job
from daskinfer.scheduling.throughput_history import history
from tests.conftest import wait_until

X = np.ones((64, 4), np.float32)


def make_large_model(seed: int) -> torch.nn.Module:
    """Make a model of about 4 MB."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 1000), torch.nn.Linear(1000, 1000))


def test_the_rest_is_cancelled_after_an_error(cluster_client: Client, tmp_path: Path) -> None:
    """When a chunk fails, those that have not started are never computed."""
    n_chunks = 300

    def fails(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        (tmp_path / str(batch.max())).touch()
        if batch.max() == 3:
            raise ArithmeticError("no")
        time.sleep(0.02)  # stands for a chunk's work
        return batch

    x = da.from_array(np.arange(n_chunks), chunks=1)
    with pytest.raises(di.DaskInferError, match="rows 3:4 on cpu failed: ArithmeticError: no"):
        di.predict(fails, x, client=cluster_client, batch_size=1, device_weights=[1, 0])
    wait_until(lambda: not any(cluster_client.processing().values()))
    assert len(list(tmp_path.iterdir())) < n_chunks


def test_chunks_stay_on_their_device(two_cpus: list[str]) -> None:
    """Every chunk is computed by the worker that the plan assigned it to."""
    _, report = di.predict(np.negative, X, devices=two_cpus, device_weights=[1, 7], batch_size=1, return_report=True)
    assert {d.device: d.n_rows for d in report.devices} == {"cpu:0": 8, "cpu:1": 56}


def test_an_external_cluster(plain_client: Client) -> None:
    """Each worker of any Dask cluster is one device, and gets its share of the rows by its address."""
    y, report = di.predict(
        make_large_model(3), X, client=plain_client, device_weights=[3, 1], batch_size=4, return_report=True
    )
    assert y.shape == (64, 1000)
    assert [d.n_rows for d in report.devices] == [48, 16]


def by_device(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Stand in for a model that is 4 times slower on cpu:0 than elsewhere."""
    time.sleep(len(batch) * (8e-5 if os.environ.get("DASKINFER_DEVICE") == "cpu:0" else 2e-5))
    return batch


def test_devices_get_rows_by_their_measured_speed(two_cpus: list[str]) -> None:
    """Of unlike devices the faster one gets more rows by itself, and the report says what was measured."""
    history.clear()
    x = np.arange(30_000.0)
    y, report = di.predict(by_device, x, devices=two_cpus, batch_size=50, return_report=True)
    np.testing.assert_array_equal(y, x)
    slow, fast = report.devices
    assert fast.n_rows >= 2 * slow.n_rows
    assert fast.measured_share >= 2 * slow.measured_share
    assert slow.asked_share is fast.asked_share is None  # no weights were given


@pytest.mark.parametrize("weights", [[1, 1], [5, 1], "even"])
def test_given_weights_are_honoured_to_the_row(two_cpus: list[str], weights: Any) -> None:
    """Explicit weights are met as planned, whatever the speed of the devices."""
    keywords = {"devices": two_cpus, "batch_size": 50, "device_weights": weights}
    x = np.arange(6000.0)
    planned = {device.device: device.n_rows for device in di.plan(by_device, x, **keywords).devices}
    _, report = di.predict(by_device, x, return_report=True, **keywords)
    assert {device.device: device.n_rows for device in report.devices} == planned


def test_a_large_spec_is_sent_once(cluster_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large object that preprocess refers to travels once, not with each task."""
    table = np.arange(task_builder.MAX_INLINE_SPEC_NBYTES // 8 + 1, dtype=float)
    sent_nbytes: list[int] = []
    specs: list[Any] = []
    scatter, submit = Client.scatter, Client.submit

    def count_bytes(client: Client, data: Any, **keywords: Any) -> Any:
        sent_nbytes.append(len(data))
        return scatter(client, data, **keywords)

    def keep_spec(client: Client, function: Any, spec: Any, *rest: Any, **keywords: Any) -> Any:
        specs.append(spec)
        return submit(client, function, spec, *rest, **keywords)

    monkeypatch.setattr(Client, "scatter", count_bytes)
    monkeypatch.setattr(Client, "submit", keep_spec)
    x = da.from_array(np.arange(40), chunks=2)
    y = di.predict(np.negative, x, client=cluster_client, batch_size=2, preprocess=lambda rows: table[rows])
    np.testing.assert_array_equal(y, -np.arange(40.0))
    assert len(sent_nbytes) == 1
    assert sent_nbytes[0] > table.nbytes
    assert len(specs) > 1
    assert all(isinstance(spec, Future) for spec in specs)


def test_a_small_spec_travels_with_each_task(cluster_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the spec is small, nothing is sent ahead of the tasks."""
    monkeypatch.setattr(Client, "scatter", None)  # sending would fail
    np.testing.assert_array_equal(di.predict(np.negative, X, client=cluster_client), -X)


@pytest.mark.parametrize("devices", ["inline", ["cpu", "cpu"]])
def test_speeds_are_measured_and_remembered(two_cpus: list[str], devices: Any) -> None:
    """The speed of each device is measured on the first rows, on all at once, and the next call starts from it."""
    history.clear()
    placement, client = resolve_placement(devices, None)
    job = build_job(by_device, np.arange(30_000.0), RunArguments(placement, batch_size=50))
    speeds = run.measure_throughput(job, client)
    assert history.get_or_create(job.history_key).speeds == speeds
    if devices == "inline":
        assert set(speeds) == {"inline"}
    else:
        assert 2 * speeds["cpu:0"] < speeds["cpu:1"]


def test_tuning_that_fails_is_skipped(two_cpus: list[str]) -> None:
    """A model that fails on real rows during tuning runs untuned, and its error names the rows."""

    def picky(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if batch.max() > 0:
            raise ArithmeticError("no")
        return batch

    with pytest.raises(di.DaskInferError, match=r"rows \d+:\d+ on cpu failed: ArithmeticError: no"):
        di.predict(picky, np.ones((1_000_000, 2), np.float32), devices=two_cpus)
    assert di.predict(np.negative, X, devices=two_cpus).shape == X.shape
