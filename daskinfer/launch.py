"""What the scheduler and the workers of our own cluster are started with, whatever their kind."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from daskinfer import variables
from daskinfer.hardware import Device

LOOPBACK = "127.0.0.1"
CLIENT_MEMORY_SHARE = 0.1  # left to the client and the scheduler; arbitrary


def resource(device: str) -> str:
    """The name of the Dask resource that only the worker of ``device`` has."""
    return f"daskinfer-{device}"


def memory_per_worker(n_workers: int, memory_nbytes: int) -> int:
    """Bytes of host memory that each worker may take, whatever its kind."""
    return int(memory_nbytes * (1 - CLIENT_MEMORY_SHARE)) // n_workers


@dataclass(frozen=True)
class Start:
    """What the workers and the scheduler of one cluster are started with, whatever their kind."""

    memory_limit: int
    scratch: str
    dashboard_address: str | None
    timeout: float

    def nanny_options(self, device: Device, n_threads: int) -> dict[str, Any]:
        """Keywords of the :class:`NannyProcess` of a device."""
        return {
            "name": device.name,
            # Tasks in flight at most; how many there are is the driver's to say.
            "nthreads": variables.N_TASKS,
            "resources": {resource(device.name): variables.N_TASKS},
            "memory_limit": self.memory_limit,
            "local_directory": self.scratch,
            "start_timeout": self.timeout,
            "host": LOOPBACK,
            "dashboard": False,
            # Imports torch while the cluster starts, not in the first chunk, and sets the allocator.
            "preload": ["daskinfer.task", "daskinfer.plugin"],
            "silence_logs": logging.CRITICAL,  # what fails in a chunk is raised in the client
            "env": {
                variables.DEVICE: device.name,
                variables.UUID: device.uuid,
                variables.THREADS: str(n_threads),
                variables.SCRATCH: self.scratch,
            },
        }

    def scheduler_options(self) -> dict[str, Any]:
        """Keywords of the scheduler."""
        return {
            "host": LOOPBACK,
            "port": 0,
            "local_directory": self.scratch,
            "dashboard": self.dashboard_address is not None,
            # Without a dashboard the scheduler still serves its health there, by default on every interface.
            "dashboard_address": self.dashboard_address or f"{LOOPBACK}:0",
            "allowed_failures": 0,
        }
