"""What our clusters set of Dask, and what they leave as the user has it."""

from __future__ import annotations

from typing import Any

import dask
import pytest
from distributed import Client

from daskinfer.cluster.worker_spec import _DASK_SETTINGS, dask_config


def test_housekeeping_where_dask_is_as_it_comes() -> None:
    """Dask's own settings are what we take them for, and give way to ours."""
    with dask.config.set({name: theirs for name, (theirs, _) in _DASK_SETTINGS.items()}):
        assert dask_config() == {name: ours for name, (_, ours) in _DASK_SETTINGS.items()}
    defaults = dask.config.merge(*dask.config.defaults)
    assert {name: dask.config.get(name, config=defaults) for name in _DASK_SETTINGS} == {
        name: theirs for name, (theirs, _) in _DASK_SETTINGS.items()
    }


@pytest.mark.parametrize("value", ["50ms", "1s", None])
def test_housekeeping_leaves_the_users_settings(value: Any) -> None:
    """What the user has set stays, whatever it is, and the rest is ours."""
    with dask.config.set({"distributed.admin.tick.interval": value}):
        assert sorted(dask_config()) == ["distributed.admin.system-monitor.interval", "distributed.worker.profile.enabled"]


def test_workers_of_ours_look_after_themselves_seldom(cluster_client: Client) -> None:
    """Each worker of a cluster of ours has our settings and no profiler, and this process has its own again."""

    def settings(dask_worker: Any) -> tuple[dict[str, Any], bool]:
        from daskinfer.cluster.worker_spec import _DASK_SETTINGS

        found = {name: dask.config.get(name) for name in _DASK_SETTINGS}
        return found, any("profile" in name for name in dask_worker.periodic_callbacks)

    ours = {name: ours for name, (_, ours) in _DASK_SETTINGS.items()}
    assert list(cluster_client.run(settings).values()) == [(ours, False)] * 2
    assert {name: dask.config.get(name) for name in _DASK_SETTINGS} == {name: t for name, (t, _) in _DASK_SETTINGS.items()}
