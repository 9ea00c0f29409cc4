"""Computing through a window: what stays where, what is in flight, and what is left when it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client, Future

import daskinfer as di
from daskinfer.execution import run, task_builder
from daskinfer.planning.build_job import build_job
from daskinfer.scheduling.throughput_history import history
from tests.conftest import wait_until

X = np.ones((64, 4), np.float32)


def big_net(seed: int) -> torch.nn.Module:
    """A network of about 4 MB."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 1000), torch.nn.Linear(1000, 1000))


def test_the_rest_is_cancelled_after_an_error(cluster_client: Client, tmp_path: Path) -> None:
    """When a chunk fails, those that have not begun are never computed."""
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
    """Every chunk is computed by the worker that the plan gave it to, also on a cluster that knows only addresses."""
    _, report = di.predict(np.negative, X, devices=two_cpus, device_weights=[1, 7], batch_size=1, return_report=True)
    assert {d.device: d.n_rows for d in report.devices} == {"cpu:0": 8, "cpu:1": 56}


@pytest.fixture
def plain_client() -> Iterator[Client]:
    """A client of a Dask cluster in this process, none of ours."""
    with Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None, set_as_default=False) as client:
        yield client


def test_a_cluster_of_others(plain_client: Client) -> None:
    """Each worker of any Dask cluster is one device, and weights are honoured by its address."""
    y, report = di.predict(big_net(3), X, client=plain_client, device_weights=[3, 1], batch_size=4, return_report=True)
    assert y.shape == (64, 1000)
    assert [d.n_rows for d in report.devices] == [48, 16]


def by_device(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A network that is 4 times slower on cpu:0 than elsewhere."""
    time.sleep(len(batch) * (8e-5 if os.environ.get("DASKINFER_DEVICE") == "cpu:0" else 2e-5))
    return batch


def test_devices_get_rows_by_their_measured_speed(two_cpus: list[str]) -> None:
    """Of unlike devices the faster one gets more rows without being told, and the report says what was measured."""
    history.clear()
    x = np.arange(30_000.0)
    y, report = di.predict(by_device, x, devices=two_cpus, batch_size=50, return_report=True)
    np.testing.assert_array_equal(y, x)
    slow, fast = report.devices
    assert fast.n_rows >= 2 * slow.n_rows
    assert fast.measured_share >= 2 * slow.measured_share
    assert slow.asked_share == fast.asked_share == 0.5


@pytest.mark.parametrize("weights", [[1, 1], [5, 1], "even"])
def test_given_weights_are_honoured_to_the_row(two_cpus: list[str], weights: Any) -> None:
    """Whatever the devices' speeds, weights that were given are met as planned."""
    how = {"devices": two_cpus, "batch_size": 50, "device_weights": weights}
    x = np.arange(6000.0)
    planned = {device.device: device.n_rows for device in di.plan(by_device, x, **how).devices}
    _, report = di.predict(by_device, x, return_report=True, **how)
    assert {device.device: device.n_rows for device in report.devices} == planned


def test_a_large_order_goes_to_the_cluster_once(cluster_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a preprocess carries along travels once, not with each task."""
    table = np.arange(task_builder.MAX_INLINE_CONTEXT_NBYTES // 8 + 1, dtype=float)
    n_sent: list[int] = []
    orders: list[Any] = []
    scatter, submit = Client.scatter, Client.submit

    def counts(client: Client, data: Any, **how: Any) -> Any:
        n_sent.append(len(data))
        return scatter(client, data, **how)

    def looks(client: Client, work: Any, order: Any, *rest: Any, **how: Any) -> Any:
        orders.append(order)
        return submit(client, work, order, *rest, **how)

    monkeypatch.setattr(Client, "scatter", counts)
    monkeypatch.setattr(Client, "submit", looks)
    x = da.from_array(np.arange(40), chunks=2)
    y = di.predict(np.negative, x, client=cluster_client, batch_size=2, preprocess=lambda rows: table[rows])
    np.testing.assert_array_equal(y, -np.arange(40.0))
    assert len(n_sent) == 1
    assert n_sent[0] > table.nbytes
    assert len(orders) > 1
    assert all(isinstance(order, Future) for order in orders)


def test_a_small_order_goes_with_its_tasks(cluster_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent ahead of the tasks where there is little to send."""
    monkeypatch.setattr(Client, "scatter", None)  # sending would fail
    np.testing.assert_array_equal(di.predict(np.negative, X, client=cluster_client), -X)


@pytest.mark.parametrize("devices", ["inline", ["cpu", "cpu"]])
def test_speeds_are_measured_and_remembered(two_cpus: list[str], devices: Any) -> None:
    """Each device's speed is found on the first rows, on all devices at once, and the next call begins with it."""
    history.clear()
    given = {"device_weights": "auto", "batch_size": 50, "client": None, "options": None, "fields": {}}
    call = build_job(by_device, np.arange(30_000.0), devices=devices, **given).make_job()
    found = run.measure_throughput(call)
    assert history.get_or_create(call.history_key).speeds == found
    if devices == "inline":
        assert set(found) == {"inline"}
    else:
        assert 2 * found["cpu:0"] < found["cpu:1"]


def test_a_measurement_that_fails_is_done_without(two_cpus: list[str]) -> None:
    """A network that fails on real rows while it is measured is run as it is, and fails there, its rows named."""

    def picky(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if batch.max() > 0:
            raise ArithmeticError("no")
        return batch

    with pytest.raises(di.DaskInferError, match=r"rows \d+:\d+ on cpu failed: ArithmeticError: no"):
        di.predict(picky, np.ones((1_000_000, 2), np.float32), devices=two_cpus)
    assert di.predict(np.negative, X, devices=two_cpus).shape == X.shape
