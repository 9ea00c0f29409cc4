"""What a worker is made ready with while a client of ours is there: its allocator, and the end of what was made for us.

Registered once per client on any Dask cluster; Dask sets it up again on workers that are restarted or join later. When the
client leaves the scheduler, however it leaves, the plugin goes too: models are closed, shared memory is let go, the device
thread ends, and networks that it shipped there are removed.

Workers of our own clusters have their allocator set when they start (``dask_setup``): untuned, a small CNN took 4.7 s
instead of 1.7 s. On clusters of others it is left as it is: the worker is theirs.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref

from distributed import Client, Scheduler, Status, Worker
from distributed.diagnostics.plugin import SchedulerPlugin, WorkerPlugin

from daskinfer.cluster import restart
from daskinfer.models import shared_files
from daskinfer.transport import shared_memory
from daskinfer.worker import allocator, device_thread
from daskinfer.worker.loaded_models import model_cache

logger = logging.getLogger(__name__)

_registered_clients: weakref.WeakSet[Client] = weakref.WeakSet()
_clients_by_worker: dict[str, set[str]] = {}  # clients by worker; in the worker's process


def dask_setup(worker: Worker) -> None:
    """What Dask calls in a worker that preloads this module: those of our own clusters."""
    allocator.retain_freed_memory()
    # What is imported by now, torch above all, is no garbage: looking through it held the interpreter for 0.18 s (measured),
    # in the middle of a chunk, every few calls.
    gc.freeze()
    restart.write_pid_file()


class WorkerSetupPlugin(WorkerPlugin):  # type: ignore[misc]  # distributed ships no annotations
    """Makes a worker ready for one client, and takes everything back when the last client has gone."""

    def __init__(self, client_id: str) -> None:
        self.name = plugin_name(client_id)
        self.client_id = client_id

    def setup(self, worker: Worker) -> None:
        _clients_by_worker.setdefault(worker.address, set()).add(self.client_id)

    def teardown(self, worker: Worker) -> None:
        if worker.status in (Status.running, Status.paused):  # it stays: it is the client that goes
            shared_files.remove_client_files(self.client_id)
        users = _clients_by_worker.get(worker.address, set())
        users.discard(self.client_id)
        if users:
            return
        _clients_by_worker.pop(worker.address, None)
        device_thread.close_device_thread(worker.address)
        if not _clients_by_worker:  # several workers may live in one process
            shared_memory.detach_all_pools()
            # In a thread of its own: a model is closed once its chunk is done, and the worker's loop must not wait for it.
            threading.Thread(target=model_cache.clear, name="daskinfer-close", daemon=True).start()


class CleanupPlugin(SchedulerPlugin):  # type: ignore[misc]  # distributed ships no annotations
    """Takes the worker plugin off when its client leaves the scheduler."""

    def __init__(self, client_id: str) -> None:
        self.name = f"{plugin_name(client_id)}-departure"
        self.client_id = client_id

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        if client == self.client_id:
            scheduler.loop.add_callback(self._unregister_plugins, scheduler)

    async def _unregister_plugins(self, scheduler: Scheduler) -> None:
        name = plugin_name(self.client_id)
        with contextlib.suppress(OSError):  # workers that end at the same time
            if name in scheduler.worker_plugins:
                await scheduler.unregister_worker_plugin(None, name)
        await scheduler.unregister_scheduler_plugin(self.name)


def plugin_name(client_id: str) -> str:
    """The name of a client's worker plugin."""
    return f"daskinfer-{client_id}"


def register_plugins(client: Client) -> None:
    """Make all workers of a client ready, now and later; once per client."""
    if client in _registered_clients:
        return
    client.register_plugin(WorkerSetupPlugin(client.id))
    try:
        client.register_plugin(CleanupPlugin(client.id))
    except Exception as error:  # a scheduler without daskinfer, or one that takes no code from clients
        logger.debug("the workers keep what they have loaded when this client leaves: %r", error)
    _registered_clients.add(client)
