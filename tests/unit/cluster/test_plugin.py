"""The worker plugin: present on each worker while a client uses it, removed with the last client."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import psutil
import pytest
from distributed import Client, LocalCluster
from distributed.diagnostics.plugin import SchedulerPlugin

import daskinfer as di
from daskinfer.cluster import plugin
from daskinfer.cluster.placement import fetch_workers
from daskinfer.transport import shared_memory
from daskinfer.worker import device_thread
from daskinfer.worker.loaded_models import model_cache
from tests.conftest import FREE_PORT, wait_until

X = np.arange(64.0, dtype=np.float32)


class Closes:
    """A model of the protocol that writes to a file when it closes."""

    def __init__(self, log: str) -> None:
        self.log = log

    def load(self, device: str) -> None:
        self.device = device

    def __call__(self, batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return batch

    def close(self) -> None:
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()}\n")


def users() -> dict[str, set[str]]:
    """Return the clients for which the workers of this process are set up."""
    return plugin._clients_by_worker


def left() -> list[object]:
    """List what this process still holds for any client."""
    threads = [t.name for t in threading.enumerate() if t.name.startswith("daskinfer-device")]
    return [
        *plugin._clients_by_worker,
        *device_thread._device_threads,
        *shared_memory._attached_pools,
        *model_cache._models,
        *threads,
    ]


@pytest.fixture
def threads_cluster() -> Iterator[LocalCluster]:
    """A Dask cluster of two workers in this process."""
    with LocalCluster(
        processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None, scheduler_kwargs=FREE_PORT
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def tracker() -> None:
    """Start multiprocessing's resource tracker before a test counts processes."""
    resource_tracker.ensure_running()


def test_every_worker_is_set_up(cluster_client: Client) -> None:
    """After a call each worker knows its client."""
    di.predict(np.negative, X, client=cluster_client)
    assert [*cluster_client.run(users).values()] == [
        {address: {cluster_client.id}} for address in fetch_workers(cluster_client)
    ]


def test_once_per_client(threads_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first call of a client registers anything."""
    registered: list[str] = []
    register = Client.register_plugin
    monkeypatch.setattr(Client, "register_plugin", lambda c, made: registered.append(made.name) or register(c, made))
    with Client(threads_cluster, set_as_default=False) as client:
        for _ in range(3):
            di.predict(np.negative, X, client=client)
        assert registered == [f"daskinfer-{client.id}", f"daskinfer-{client.id}-departure"]
        assert plugin._clients_by_worker == {address: {client.id} for address in fetch_workers(client)}
    wait_until(lambda: not plugin._clients_by_worker)


def test_all_goes_with_the_client(threads_cluster: LocalCluster, tmp_path: Any) -> None:
    """When the client closes, models are closed, device threads end and shared memory is let go; the cluster stays."""
    log = tmp_path / "closed"
    with Client(threads_cluster, set_as_default=False) as client:
        di.predict(Closes(str(log)), X, client=client, device_weights=[1, 1])
        assert shared_memory._attached_pools
        assert len(device_thread._device_threads) == 2
        log.unlink()  # this process found out what the answer looks like, and closed its copy
    wait_until(lambda: not left())
    wait_until(lambda: log.exists() and log.read_text())  # in a thread of the worker's
    assert len(log.read_text().splitlines()) == 1  # one process, one model
    scheduler = threads_cluster.scheduler
    wait_until(lambda: not any("daskinfer" in name for name in [*scheduler.plugins, *scheduler.worker_plugins]))
    assert len(scheduler.workers) == 2


def test_all_stays_while_another_client_is_there(threads_cluster: LocalCluster) -> None:
    """The first client that leaves takes nothing away from the second."""
    with Client(threads_cluster, set_as_default=False) as second:
        with Client(threads_cluster, set_as_default=False) as first:
            for client in (first, second):
                di.predict(np.negative, X, client=client, device_weights=[1, 1])
        wait_until(lambda: all(clients == {second.id} for clients in plugin._clients_by_worker.values()))
        assert len(model_cache._models) == 1
        assert len(device_thread._device_threads) == 2
        np.testing.assert_array_equal(di.predict(np.negative, X, client=second), -X)
    wait_until(lambda: not left())


def test_a_scheduler_that_takes_no_code(
    threads_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the scheduler rejects plugins of clients, calls work, and one line names the consequence."""
    register = Client.register_plugin

    def reject(client: Client, plugin: Any) -> Any:
        if isinstance(plugin, SchedulerPlugin):
            raise ValueError("Cannot deserialize: pickle is disabled")
        return register(client, plugin)

    monkeypatch.setattr(Client, "register_plugin", reject)
    with Client(threads_cluster, set_as_default=False) as client:
        with caplog.at_level(logging.DEBUG, "daskinfer.cluster.plugin"):
            for _ in range(2):
                np.testing.assert_array_equal(di.predict(np.negative, X, client=client), -X)
        client.unregister_worker_plugin(plugin.plugin_name(client.id))
    messages = [record.getMessage() for record in caplog.records if record.name == "daskinfer.cluster.plugin"]
    assert messages == [
        "workers will keep loaded models after this client leaves: ValueError('Cannot deserialize: pickle is disabled')"
    ]


def heap_growth() -> int:
    """Measure how many bytes the heap grows by for 64 MiB; by default glibc maps so large an array separately."""

    def heap_nbytes() -> int:
        return sum(part.size for part in psutil.Process().memory_maps() if part.path == "[heap]")

    before, kept = heap_nbytes(), np.ones(64 << 20, np.uint8)
    return heap_nbytes() - before + 0 * len(kept)


def test_the_allocator_of_managed_workers_retains_memory(cluster_client: Client) -> None:
    """A managed worker allocates large arrays on its heap, where the next array reuses the memory."""
    assert all(grown > 32 << 20 for grown in cluster_client.run(heap_growth).values())


def test_imports_of_managed_workers_are_not_garbage_collected(cluster_client: Client) -> None:
    """Garbage collection ignores what existed when a managed worker started, most of it torch."""
    assert min(cluster_client.run(gc.get_freeze_count).values()) > 50_000


def test_the_allocator_of_external_workers_is_unchanged(
    threads_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On external clusters the allocator keeps its settings."""
    monkeypatch.setattr("daskinfer.worker.allocator.retain_freed_memory", None)  # calling it would fail
    with Client(threads_cluster, set_as_default=False) as client:
        np.testing.assert_array_equal(di.predict(np.negative, X, client=client), -X)
    wait_until(lambda: not plugin._clients_by_worker)


@pytest.mark.slow
def test_workers_that_join_later_are_set_up(tracker: None) -> None:
    """A restarted worker and a new one are set up like the first, and released with the client."""
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None, scheduler_kwargs=FREE_PORT
        ) as cluster,
        Client(cluster, set_as_default=False) as watching,
    ):
        with Client(cluster, set_as_default=False) as client:
            di.predict(np.negative, X, client=client)
            (before,) = fetch_workers(client)
            os.kill(*client.run(os.getpid).values(), signal.SIGKILL)
            wait_until(lambda: fetch_workers(client) and before not in fetch_workers(client), 60)
            cluster.scale(2)
            wait_until(lambda: len(fetch_workers(client)) == 2, 60)
            assert client.run(users) == {address: {address: {client.id}} for address in fetch_workers(client)}
            np.testing.assert_array_equal(di.predict(np.negative, X, client=client, device_weights=[1, 1]), -X)
        wait_until(lambda: not any(map(any, [found for found in watching.run(left).values() if found])))
