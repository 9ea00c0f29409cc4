"""Where a chunk runs: which device this process has, and how many threads torch may use on it.

A worker of our own cluster is told by environment variables, set before its Python starts. A worker of somebody else's
cluster is one device: its first visible GPU, else the CPU with as many threads as Dask gave it. Without any cluster
(``devices="inline"``, or a lazy array computed in threads) it is the CPU of this process, with torch's own threads; the
lock of the loaded model then lets one chunk run at a time, so the cores are not oversubscribed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from distributed import get_worker

from daskinfer.core import env
from daskinfer.errors import DeviceError
from daskinfer.hardware.discovery import Device, read_cpu_label


@dataclass(frozen=True)
class WorkerDevice:
    """The device that this process computes on.

    ``device`` is its name in the plan, ``torch_device`` torch's; ``n_threads`` None leaves torch's threads as they are.
    """

    device: str
    device_name: str
    torch_device: torch.device
    n_threads: int | None
    worker: str

    @contextlib.contextmanager
    def limit_threads(self) -> Iterator[None]:
        """Use this seat's share of the cores in the current thread; torch keeps the number per thread."""
        if self.n_threads is None:
            yield
            return
        before = torch.get_num_threads()
        torch.set_num_threads(self.n_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def peak_nbytes(self) -> int:
        """The most memory that was held so far: of a GPU by tensors of this process, else of the host by this process."""
        if self.torch_device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.torch_device))
        unit = 1 if sys.platform == "darwin" else 1024  # what the system counts in
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_worker_device(dask_worker: Any) -> Device:
    """What this worker is, as the plan wants to know it; the client runs it, and Dask hands over the worker."""
    here = get_worker_device(dask_worker)
    device = Device(here.device, here.torch_device.type, index=0, label=here.device_name)
    if device.kind == "cpu":
        return replace(device, memory_nbytes=int(dask_worker.memory_manager.memory_limit or 0))
    free, total = torch.cuda.mem_get_info(0)
    return replace(
        device,
        uuid=os.environ.get(env.UUID) or f"GPU-{torch.cuda.get_device_properties(0).uuid}",
        memory_nbytes=total,
        free_nbytes=free + torch.cuda.memory_reserved(0),  # what torch holds back is ours again
    )


def current_device() -> WorkerDevice:
    """The seat of the task that asks, or of this process where it is no worker's.

    Raises
    ------
    DeviceError
        Where this process was pinned to one GPU and sees another.
    """
    try:
        worker = get_worker()
    except ValueError:
        return WorkerDevice("inline", _read_cpu_label(), torch.device("cpu"), None, f"process {os.getpid()}")
    return get_worker_device(worker)


def get_worker_device(worker: Any) -> WorkerDevice:
    """The seat of a Dask worker, asked for in its own process."""
    name = os.environ.get(env.DEVICE) or str(worker.name)
    n_threads = int(os.environ.get(env.THREADS) or worker.state.nthreads)
    device, device_name = _resolve_torch_device(os.environ.get(env.DEVICE), os.environ.get(env.UUID, ""))
    return WorkerDevice(name, device_name, device, n_threads, worker.address)


@functools.cache
def _read_cpu_label() -> str:
    """Read once: each chunk that this process computes says it, and reading takes 0.5 ms."""
    return read_cpu_label()


@functools.cache
def _resolve_torch_device(pinned: str | None, uuid: str) -> tuple[torch.device, str]:
    """Torch's device and the hardware's name. dask-cuda rotates the visible GPUs: a worker's own is always the first."""
    if pinned is not None and pinned.startswith("cpu"):
        return torch.device("cpu"), read_cpu_label()
    if not torch.cuda.is_available():
        if pinned is not None:
            raise DeviceError(
                f"the worker of {pinned} finds no CUDA device (CUDA_VISIBLE_DEVICES="
                f"{os.environ.get('CUDA_VISIBLE_DEVICES')!r}, torch {torch.__version__}); it needs the GPU that it is "
                "pinned to. Install the CUDA build of torch, or leave the device out."
            )
        return torch.device("cpu"), read_cpu_label()
    return _resolve_first_gpu(pinned, uuid)


def _resolve_first_gpu(pinned: str | None, uuid: str) -> tuple[torch.device, str]:
    found = torch.cuda.get_device_properties(0)
    if uuid.startswith("GPU-") and str(found.uuid) != uuid.removeprefix("GPU-"):
        raise DeviceError(
            f"the worker of {pinned} sees GPU-{found.uuid} as its first device; it was pinned to {uuid}. "
            "Something set CUDA_VISIBLE_DEVICES, or started CUDA, before the pinning: start CUDA in no preload script."
        )
    return torch.device("cuda:0"), found.name
