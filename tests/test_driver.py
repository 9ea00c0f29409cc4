"""Computing through a window: what stays where, what is in flight, and what is left when it ends."""

from __future__ import annotations

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
