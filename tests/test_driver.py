"""Shipping a network, and what stays where when chunks are computed."""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client

import daskinfer as di
from daskinfer import driver
from daskinfer.model import Model, ShippedModel, shipped_path
from tests.conftest import wait_until

X = np.ones((64, 4), np.float32)


def big_net(seed: int) -> torch.nn.Module:
    """A network of about 4 MB."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 1000), torch.nn.Linear(1000, 1000))


def shipped_files() -> list[str]:
    """Files of networks on this host, as a worker sees them."""
    folder = Path(shipped_path("x")).parent
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("model-")) if folder.is_dir() else []


def test_one_file_per_host_while_inside(cluster_client: Client) -> None:
    """A network in memory lies in one file per host while it may be loaded, and in none afterwards."""
    recipe = Model(big_net(1)).recipe()
    with driver.shipped(cluster_client, recipe) as travelling:
        assert isinstance(travelling, ShippedModel)
        assert len(pickle.dumps(travelling)) < 500  # whatever the network's size
        files = list(cluster_client.run(shipped_files).values())
        assert files == [[travelling.name]] * 2
    assert list(cluster_client.run(shipped_files).values()) == [[], []]


def test_not_sent_where_it_is_loaded(cluster_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that all workers have loaded is not sent again."""
    net = big_net(2)
    first = di.predict(net, X, client=cluster_client)
    monkeypatch.setattr(driver, "_receive", None)  # sending would fail
    np.testing.assert_array_equal(di.predict(net, X, client=cluster_client), first)


def test_files_and_factories_travel_by_reference(cluster_client: Client) -> None:
    """What every worker can read or import by itself is not shipped."""
    recipe = Model("torch.nn:Identity").recipe()
    with driver.shipped(cluster_client, recipe) as travelling:
        assert travelling is recipe
    np.testing.assert_array_equal(di.predict("torch.nn:Identity", X, client=cluster_client), X)


def test_without_our_scratch_folder_a_file_lies_per_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On clusters of others a shipped file lies in the temporary folder, for its user only, and goes with its folder."""
    monkeypatch.delenv("DASKINFER_SCRATCH", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    driver._receive(None, "model-x", b"content")
    path = Path(shipped_path("model-x"))
    assert path.read_bytes() == b"content"
    assert path.parent.stat().st_mode & 0o077 == 0
    driver._forget(None, "model-x")
    assert not list(tmp_path.iterdir())


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
    assert not shipped_files()
