"""The device that this process computes on, and how many threads torch may use there.

A worker of a managed cluster learns both from environment variables that are set before its Python starts. A worker of an
external cluster is one device: its first visible accelerator, otherwise the CPU with as many threads as Dask gave it.
Without a cluster (``devices="inline"``, or a lazy array computed in threads) the device is the CPU of this process with
torch's own threads; the lock of the loaded model then lets one chunk run at a time, so the cores are not oversubscribed.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from distributed import get_worker

from daskinfer.core import env
from daskinfer.hardware.discovery import Device
from daskinfer.worker.backends import choose_backend, get_backend


@dataclass(frozen=True)
class WorkerDevice:
    """The device that this process computes on.

    ``device`` is its name in the plan, ``torch_device`` is torch's; ``n_threads`` None leaves torch's threads as they are.
    ``uuid`` identifies a GPU across processes; empty for a CPU.
    """

    device: str
    device_name: str
    torch_device: torch.device
    n_threads: int | None
    worker: str
    uuid: str = ""

    def limit_threads(self) -> contextlib.AbstractContextManager[None]:
        """Limit torch to this device's share of the cores, in the current thread: torch keeps the number per thread."""
        return contextlib.nullcontext() if self.n_threads is None else _set_threads(self.n_threads)

    def peak_nbytes(self) -> int:
        """Return the most memory held so far: on a GPU by tensors of this process, on a CPU by the whole process."""
        return get_backend(self.torch_device).get_peak_nbytes(self.torch_device)


@contextlib.contextmanager
def _set_threads(n_threads: int) -> Iterator[None]:
    n_before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(n_before)


def describe_worker_device(dask_worker: Any) -> Device:
    """Describe this worker's device for the plan; the client calls it on each worker, and Dask passes the worker in."""
    own = get_worker_device(dask_worker)
    device = Device(own.device, own.torch_device.type, index=0, label=own.device_name)
    memory = get_backend(own.torch_device).get_memory(own.torch_device)
    if memory is None:
        return replace(device, memory_nbytes=int(dask_worker.memory_manager.memory_limit or 0))
    return replace(device, uuid=own.uuid, memory_nbytes=memory.total_nbytes, free_nbytes=memory.free_nbytes)


def current_device() -> WorkerDevice:
    """Return the device of the worker that runs the calling task, or of this process if it is no worker.

    Raises
    ------
    DeviceError
        If this process is pinned to one GPU and sees another, or none.
    """
    try:
        worker = get_worker()
    except ValueError:
        cpu = torch.device("cpu")
        return WorkerDevice("inline", get_backend(cpu).get_device_name(cpu), cpu, None, f"process {os.getpid()}")
    return get_worker_device(worker)


def get_worker_device(worker: Any) -> WorkerDevice:
    """Return the device of a Dask worker; called in the worker's process."""
    name = os.environ.get(env.DEVICE) or str(worker.name)
    n_threads = int(os.environ.get(env.THREADS) or worker.state.nthreads)
    device, device_name, uuid = _resolve_hardware(os.environ.get(env.DEVICE), os.environ.get(env.UUID, ""))
    return WorkerDevice(name, device_name, device, n_threads, worker.address, uuid)


@functools.cache
def _resolve_hardware(pinned: str | None, uuid: str) -> tuple[torch.device, str, str]:
    """Return torch's device, its hardware name and its UUID, given the name and the UUID that pin this process."""
    backend = choose_backend(pinned)
    if pinned is not None:
        backend.check_pinned(pinned, uuid)
    device = backend.first_device
    return device, backend.get_device_name(device), backend.get_uuid(device)
