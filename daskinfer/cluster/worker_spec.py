"""Options of the scheduler and the workers of a managed cluster, for every kind of device."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any

import dask.config
from distributed import Security

from daskinfer.core import env
from daskinfer.core.installation import describe_install
from daskinfer.errors import MissingExtra, OptionError
from daskinfer.hardware.discovery import Device

LOOPBACK = "127.0.0.1"
CLIENT_MEMORY_SHARE = 0.1  # of host memory, for the client and the scheduler; arbitrary

# By setting: Dask's default, daskinfer's value. Dask's housekeeping takes 30 ms per second of the computing cores in each
# worker and 16 in the client; with these values 6 and 5 (measured). Its profiler would only see tasks that wait for the
# thread that computes.
_DASK_SETTINGS = {
    "distributed.worker.profile.enabled": (True, False),
    "distributed.admin.tick.interval": ("20ms", "1s"),
    "distributed.admin.system-monitor.interval": ("500ms", "1s"),
}


def resource_name(device: str) -> str:
    """Return the name of the Dask resource that only the worker of ``device`` has."""
    return f"daskinfer-{device}"


def memory_per_worker(n_workers: int, memory_nbytes: int) -> int:
    """Return the host memory in bytes that each worker may use, whatever its kind."""
    return int(memory_nbytes * (1 - CLIENT_MEMORY_SHARE)) // n_workers


def dask_config() -> dict[str, Any]:
    """Return daskinfer's values of Dask's housekeeping settings, for those that the user has left at their defaults."""
    return {name: value for name, (default, value) in _DASK_SETTINGS.items() if dask.config.get(name) == default}


def resolve_security(security: bool | Security | None) -> Security:
    """Convert the ``security`` option to Dask's record of certificates; None and False follow Dask's configuration.

    Raises
    ------
    OptionError
        If ``security`` is of another type.
    MissingExtra
        If certificates must be made and ``cryptography`` is not installed.
    """
    if security is True:
        try:
            return Security.temporary()
        except ImportError as error:
            raise MissingExtra(
                f"security=True needs the cryptography package ({error}). "
                f"Run {describe_install('tls')}, or pass a distributed.Security with your own certificates."
            ) from error
    if security is None or security is False:
        return Security()
    if isinstance(security, Security):
        return security
    raise OptionError(f"security must be True, None or a distributed.Security, got a {type(security).__name__}")


@dataclass(frozen=True)
class WorkerSpec:
    """Options shared by the scheduler and all workers of one cluster."""

    memory_limit: int
    scratch_path: str
    dashboard_address: str | None
    start_timeout: float
    security: Security = field(default_factory=Security)

    @property
    def protocol(self) -> str:
        """The protocol between scheduler, workers and clients."""
        return "tls://" if self.security.require_encryption else "tcp://"

    def nanny_options(self, device: Device, n_threads: int) -> dict[str, Any]:
        """Return the keywords of a device's :class:`NannyProcess`."""
        return {
            "name": device.name,
            # The maximum of tasks in flight; the client decides how many it submits.
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
            "preload": ["daskinfer.worker.task", "daskinfer.worker.benchmark", "daskinfer.cluster.plugin"],
            "silence_logs": logging.CRITICAL,  # errors in a chunk are raised in the client
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
        """Environment variables that must be set before a worker starts.

        One heap for all threads (glibc), so memory that one reading thread frees is reused by the next. With a heap each,
        reading 12 MB chunks takes 3 times as long, to map fresh pages (measured). ``mallopt`` in the worker is too late.
        """
        return {"MALLOC_ARENA_MAX": os.environ.get("MALLOC_ARENA_MAX", "1")}

    def scheduler_options(self) -> dict[str, Any]:
        """Return the scheduler's keywords; unless the user configures preloads, its dashboard shows daskinfer's page."""
        preload = dask.config.get("distributed.scheduler.preload") or ["daskinfer.diagnostics.dashboard.plugin"]
        return {
            "host": LOOPBACK,
            "port": 0,
            "protocol": self.protocol,
            "security": self.security,
            "local_directory": self.scratch_path,
            "dashboard": self.dashboard_address is not None,
            # Without a dashboard the scheduler still serves its health here, by default on every interface.
            "dashboard_address": self.dashboard_address or f"{LOOPBACK}:0",
            "allowed_failures": 0,
            "preload": preload if self.dashboard_address is not None else [],
        }
