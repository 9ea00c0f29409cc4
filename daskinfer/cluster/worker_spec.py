"""What the scheduler and the workers of our own cluster are started with, whatever their kind."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any

import dask.config
from distributed import Security

from daskinfer.core import env
from daskinfer.errors import MissingExtra, OptionError
from daskinfer.hardware.discovery import Device

LOOPBACK = "127.0.0.1"
CLIENT_MEMORY_SHARE = 0.1  # left to the client and the scheduler; arbitrary

# By setting: Dask's default, ours. Dask looks after itself on the cores that compute, 30 ms per second in each worker and 16
# in the client; with these it is 6 and 5 (measured). Its profiler would see our tasks wait for the thread that computes.
_DASK_SETTINGS = {
    "distributed.worker.profile.enabled": (True, False),
    "distributed.admin.tick.interval": ("20ms", "1s"),
    "distributed.admin.system-monitor.interval": ("500ms", "1s"),
}


def resource_name(device: str) -> str:
    """The name of the Dask resource that only the worker of ``device`` has."""
    return f"daskinfer-{device}"


def memory_per_worker(n_workers: int, memory_nbytes: int) -> int:
    """Bytes of host memory that each worker may take, whatever its kind."""
    return int(memory_nbytes * (1 - CLIENT_MEMORY_SHARE)) // n_workers


def dask_config() -> dict[str, Any]:
    """Dask's settings for how often it looks after itself, where the user has left them as they come."""
    return {name: ours for name, (theirs, ours) in _DASK_SETTINGS.items() if dask.config.get(name) == theirs}


def resolve_security(security: bool | Security | None) -> Security:
    """Dask's record of certificates for what a user asked for; without any, what Dask's configuration says.

    Raises
    ------
    OptionError
        Where it is something else.
    MissingExtra
        Where certificates have to be made, and what makes them is not installed.
    """
    if security is True:
        try:
            return Security.temporary()
        except ImportError as error:
            raise MissingExtra(
                f"security=True needs cryptography, which makes the certificates ({error}). Install it: "
                'pip install "daskinfer[tls]"; or pass a distributed.Security with certificates of your own.'
            ) from error
    if security is None or security is False:
        return Security()
    if isinstance(security, Security):
        return security
    raise OptionError(f"security is a {type(security).__name__}; it may be True, a distributed.Security or None. Pass one.")


@dataclass(frozen=True)
class WorkerSpec:
    """What the workers and the scheduler of one cluster are started with, whatever their kind."""

    memory_limit: int
    scratch_path: str
    dashboard_address: str | None
    start_timeout: float
    security: Security = field(default_factory=Security)

    @property
    def protocol(self) -> str:
        """How scheduler, workers and clients talk to each other."""
        return "tls://" if self.security.require_encryption else "tcp://"

    def nanny_options(self, device: Device, n_threads: int) -> dict[str, Any]:
        """Keywords of the :class:`NannyProcess` of a device."""
        return {
            "name": device.name,
            # Tasks in flight at most; how many there are is the driver's to say.
            "nthreads": env.MAX_TASKS_IN_FLIGHT,
            "resources": {resource_name(device.name): env.MAX_TASKS_IN_FLIGHT},
            "memory_limit": self.memory_limit,
            "local_directory": self.scratch_path,
            "start_timeout": self.start_timeout,
            "host": LOOPBACK,
            "protocol": self.protocol,
            "security": self.security,
            "dashboard": False,
            # Imports torch while the cluster starts, not in the first chunk, and sets the allocator.
            "preload": ["daskinfer.worker.task", "daskinfer.cluster.plugin"],
            "silence_logs": logging.CRITICAL,  # what fails in a chunk is raised in the client
            "environment": self.environment,
            "env": {
                env.DEVICE: device.name,
                env.UUID: device.uuid,
                env.THREADS: str(n_threads),
                env.SCRATCH: self.scratch_path,
            },
        }

    @property
    def environment(self) -> dict[str, str | None]:
        """What has to stand in a worker's environment before it starts.

        One heap for all threads (glibc): what a reading thread frees, the next finds. With one each, reading 12 MB chunks
        cost 3 times as much, for pages that are mapped anew (measured). ``mallopt`` in the worker comes too late for it.
        """
        return {"MALLOC_ARENA_MAX": os.environ.get("MALLOC_ARENA_MAX", "1")}

    def scheduler_options(self) -> dict[str, Any]:
        """Keywords of the scheduler; its dashboard has our page from the start, unless others' preloads are configured."""
        preload = dask.config.get("distributed.scheduler.preload") or ["daskinfer.diagnostics.dashboard.plugin"]
        return {
            "host": LOOPBACK,
            "port": 0,
            "protocol": self.protocol,
            "security": self.security,
            "local_directory": self.scratch_path,
            "dashboard": self.dashboard_address is not None,
            # Without a dashboard the scheduler still serves its health there, by default on every interface.
            "dashboard_address": self.dashboard_address or f"{LOOPBACK}:0",
            "allowed_failures": 0,
            "preload": preload if self.dashboard_address is not None else [],
        }
