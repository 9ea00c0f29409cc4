"""daskinfer among its peers, through its public names only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

from tests.benchmarks.by_hand import Call
from tests.benchmarks.works import Work


@contextlib.contextmanager
def two_workers(work: Work, x: np.ndarray) -> Iterator[Call]:
    """Two CPU workers of the cluster that is kept between calls."""
    import daskinfer as di

    net = work.net()
    yield lambda: di.predict(net, x, devices=["cpu", "cpu"])
    di.close()


@contextlib.contextmanager
def auto(work: Work, x: np.ndarray) -> Iterator[Call]:
    """What a user gets who says nothing."""
    import daskinfer as di

    net = work.net()
    yield lambda: di.predict(net, x)
    di.close()


@contextlib.contextmanager
def without_dashboard(work: Work, x: np.ndarray) -> Iterator[Call]:
    """Two CPU workers of a cluster without a dashboard."""
    from distributed import Client

    import daskinfer as di

    net = work.net()
    with di.LocalDeviceCluster("cpu*2", dashboard_address=None) as cluster, Client(cluster) as client:
        yield lambda: di.predict(net, x, client=client)
