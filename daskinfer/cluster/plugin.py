"""Set up workers for a client, and clean up on them when the client leaves.

The plugin is registered once per client on any Dask cluster; Dask also sets it up on workers that restart or join later.
When the client leaves the scheduler for any reason, the plugin is removed: models are closed, shared memory is detached,
the device thread stops, and model files that the client sent are deleted.

Workers of managed clusters set their memory allocator when they start (``dask_setup``): without it, a small CNN took 4.7 s
instead of 1.7 s. On external clusters the allocator is left unchanged, because the workers belong to someone else.
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
_clients_by_worker: dict[str, set[str]] = {}  # client IDs by worker address; in the workers' process


def dask_setup(worker: Worker) -> None:
    """Prepare a worker of a managed cluster: Dask calls this function because the worker preloads this module."""
    allocator.retain_freed_memory()
    # What is imported by now, mostly torch, is never garbage: collecting it blocked the interpreter for 0.18 s (measured),
    # in the middle of a chunk, every few calls.
    gc.freeze()
    restart.write_pid_file()


class WorkerSetupPlugin(WorkerPlugin):  # type: ignore[misc]  # distributed ships no annotations
    """Sets up a worker for one client, and releases everything when its last client leaves."""

    def __init__(self, client_id: str) -> None:
        self.name = plugin_name(client_id)
        self.client_id = client_id

    def setup(self, worker: Worker) -> None:
        _clients_by_worker.setdefault(worker.address, set()).add(self.client_id)

    def teardown(self, worker: Worker) -> None:
        if worker.status in (Status.running, Status.paused):  # the worker stays, the client leaves
            shared_files.remove_client_files(self.client_id)
        users = _clients_by_worker.get(worker.address, set())
        users.discard(self.client_id)
        if users:
            return
        _clients_by_worker.pop(worker.address, None)
        device_thread.close_device_thread(worker.address)
        if not _clients_by_worker:  # several workers may share one process
            shared_memory.detach_all_pools()
            # In its own thread: a model closes once its chunk is done, and the worker's event loop must not wait for that.
            threading.Thread(target=model_cache.clear, name="daskinfer-close", daemon=True).start()


class CleanupPlugin(SchedulerPlugin):  # type: ignore[misc]  # distributed ships no annotations
    """Removes the worker plugin when its client leaves the scheduler."""

    def __init__(self, client_id: str) -> None:
        self.name = f"{plugin_name(client_id)}-departure"
        self.client_id = client_id

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        if client == self.client_id:
            scheduler.loop.add_callback(self._unregister_plugins, scheduler)

    async def _unregister_plugins(self, scheduler: Scheduler) -> None:
        name = plugin_name(self.client_id)
        with contextlib.suppress(OSError):  # workers may close at the same time
            if name in scheduler.worker_plugins:
                await scheduler.unregister_worker_plugin(None, name)
        await scheduler.unregister_scheduler_plugin(self.name)


def plugin_name(client_id: str) -> str:
    """Return the name of a client's worker plugin."""
    return f"daskinfer-{client_id}"


def register_plugins(client: Client) -> None:
    """Register the plugins of a client, once, for its present and future workers."""
    if client in _registered_clients:
        return
    client.register_plugin(WorkerSetupPlugin(client.id))
    try:
        client.register_plugin(CleanupPlugin(client.id))
    except Exception as error:  # the scheduler lacks daskinfer, or accepts no code from clients
        logger.debug("workers will keep loaded models after this client leaves: %r", error)
    _registered_clients.add(client)
