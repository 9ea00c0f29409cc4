"""Which of Dask's settings managed clusters change, and which they leave to the user."""

from __future__ import annotations

from typing import Any

import dask
import pytest
from distributed import Client

from daskinfer.cluster.worker_spec import _DASK_SETTINGS, dask_config


def test_dasks_defaults_are_replaced() -> None:
    """Dask's defaults are the recorded ones, and daskinfer's values replace them."""
    with dask.config.set({name: default for name, (default, _) in _DASK_SETTINGS.items()}):
        assert dask_config() == {name: value for name, (_, value) in _DASK_SETTINGS.items()}
    defaults = dask.config.merge(*dask.config.defaults)
    assert {name: dask.config.get(name, config=defaults) for name in _DASK_SETTINGS} == {
        name: default for name, (default, _) in _DASK_SETTINGS.items()
    }


@pytest.mark.parametrize("value", ["50ms", "1s", None])
def test_the_users_settings_are_kept(value: Any) -> None:
    """A setting that the user has changed stays, whatever its value, and the others are replaced."""
    with dask.config.set({"distributed.admin.tick.interval": value}):
        assert sorted(dask_config()) == ["distributed.admin.system-monitor.interval", "distributed.worker.profile.enabled"]


def test_managed_workers_have_daskinfers_settings(cluster_client: Client) -> None:
    """Each worker of a managed cluster has daskinfer's settings and no profiler; this process keeps its own."""

    def read_settings(dask_worker: Any) -> tuple[dict[str, Any], bool]:
        from daskinfer.cluster.worker_spec import _DASK_SETTINGS

        found = {name: dask.config.get(name) for name in _DASK_SETTINGS}
        return found, any("profile" in name for name in dask_worker.periodic_callbacks)

    expected = {name: value for name, (_, value) in _DASK_SETTINGS.items()}
    assert list(cluster_client.run(read_settings).values()) == [(expected, False)] * 2
    assert {name: dask.config.get(name) for name in _DASK_SETTINGS} == {name: t for name, (t, _) in _DASK_SETTINGS.items()}
