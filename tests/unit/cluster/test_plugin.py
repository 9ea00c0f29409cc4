"""The worker plugin: there on every worker while a client of ours is, gone with the last of them."""

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
from tests.conftest import wait_until

X = np.arange(64.0, dtype=np.float32)


class Closes:
    """A model of the protocol that writes to a file when it is closed."""

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
    """The clients for which the worker of this process is made ready."""
    return plugin._clients_by_worker


def left() -> list[object]:
    """What this process still holds for any client."""
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
    with LocalCluster(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def tracker() -> None:
    """The process that multiprocessing keeps beside this one, started before a test counts processes."""
    resource_tracker.ensure_running()


def test_every_worker_is_made_ready(cluster_client: Client) -> None:
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
    """Where the scheduler refuses plugins of clients, calls work, and one line says what that costs."""
    register = Client.register_plugin

    def refuses(client: Client, made: Any) -> Any:
        if isinstance(made, SchedulerPlugin):
            raise ValueError("Cannot deserialize: pickle is disabled")
        return register(client, made)

    monkeypatch.setattr(Client, "register_plugin", refuses)
    with Client(threads_cluster, set_as_default=False) as client:
        with caplog.at_level(logging.DEBUG, "daskinfer.cluster.plugin"):
            for _ in range(2):
                np.testing.assert_array_equal(di.predict(np.negative, X, client=client), -X)
        client.unregister_worker_plugin(plugin.plugin_name(client.id))
    said = [record.getMessage() for record in caplog.records if record.name == "daskinfer.cluster.plugin"]
    assert said == [
        "the workers keep what they have loaded when this client leaves: "
        "ValueError('Cannot deserialize: pickle is disabled')"
    ]


def heap_growth() -> int:
    """Bytes that the heap of this process grows by for 64 MiB; glibc maps so much on its own unless it is told not to."""

    def heap_nbytes() -> int:
        return sum(part.size for part in psutil.Process().memory_maps() if part.path == "[heap]")

    before, kept = heap_nbytes(), np.ones(64 << 20, np.uint8)
    return heap_nbytes() - before + 0 * len(kept)


def test_the_allocator_of_our_workers_keeps_memory(cluster_client: Client) -> None:
    """A worker of ours takes large arrays from its heap, where the next finds the memory again."""
    assert all(grown > 32 << 20 for grown in cluster_client.run(heap_growth).values())


def test_what_our_workers_have_imported_is_never_looked_through(cluster_client: Client) -> None:
    """The collector of garbage leaves alone what was there when a worker of ours started; torch alone is most of it."""
    assert min(cluster_client.run(gc.get_freeze_count).values()) > 50_000


def test_the_allocator_of_others_is_theirs(threads_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """On clusters of others the allocator stays as it is."""
    monkeypatch.setattr("daskinfer.worker.allocator.retain_freed_memory", None)  # calling it would fail
    with Client(threads_cluster, set_as_default=False) as client:
        np.testing.assert_array_equal(di.predict(np.negative, X, client=client), -X)
    wait_until(lambda: not plugin._clients_by_worker)


@pytest.mark.slow
def test_workers_that_come_later_are_made_ready(tracker: None) -> None:
    """A worker that is restarted and one that joins are made ready as the first was, and let go with the client."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
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
