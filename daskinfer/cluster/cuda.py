"""dask-cuda's cluster with daskinfer's workers: GPUs pinned by UUID, and CPU workers beside them.

dask-cuda sets up the worker of each GPU: which GPUs it sees and in which order, its spilling, the cores near it, its
preload. This module replaces only the process that the Nanny runs in, and adds the worker's name, resource and environment
variables. It passes an explicit memory limit, since dask-cuda's default divides the host's memory among GPU workers alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from daskinfer.cluster.nanny import NannyProcess
from daskinfer.cluster.shutdown import close_on_failure
from daskinfer.cluster.worker_spec import LOOPBACK, WorkerSpec
from daskinfer.core.installation import describe_install
from daskinfer.errors import MissingExtra
from daskinfer.hardware.discovery import Device

try:
    from dask_cuda import LocalCUDACluster
    from dask_cuda.plugins import CPUAffinity
except ImportError as error:
    raise MissingExtra(
        f"GPU workers need dask-cuda, but importing it failed ({error}). Install it: "
        f"{describe_install('cuda13')} (driver 580 or newer), or {describe_install('cuda12')} (driver 525 or newer)."
    ) from error


def start_cuda_cluster(gpus: Sequence[Device], cpu_workers: dict[str, Any], spec: WorkerSpec) -> Any:
    """Start a ``LocalCUDACluster`` with workers for ``gpus`` and ``cpu_workers`` (worker specs by name)."""
    with _preserve_environment():
        return _DeviceCUDACluster(gpus, cpu_workers, spec)


@contextlib.contextmanager
def _preserve_environment() -> Iterator[None]:
    """Restore this process's environment afterwards: dask-cuda changes it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


class _DeviceCUDACluster(LocalCUDACluster):  # type: ignore[misc]  # dask-cuda ships no annotations
    def __init__(self, gpus: Sequence[Device], cpu_workers: dict[str, Any], spec: WorkerSpec) -> None:
        self._gpus = {gpu.uuid: gpu for gpu in gpus}
        self._cpu_workers = cpu_workers
        self._spec = spec
        with close_on_failure(self):
            super().__init__(
                CUDA_VISIBLE_DEVICES=[gpu.uuid for gpu in gpus],
                n_workers=len(gpus) + len(cpu_workers),
                memory_limit=spec.memory_limit,
                local_directory=spec.scratch_path,
                host=LOOPBACK,
                security=spec.security,
                dashboard_address=spec.dashboard_address,
                scheduler_kwargs=spec.scheduler_options(),
                name="LocalDeviceCluster",
                silence_logs=logging.CRITICAL,  # the call reports workers that die
            )

    def scale(self, n: int = 0, memory: Any = None, cores: Any = None) -> Any:
        """Write the specs that dask-cuda's constructor requests, and no more: it starts them right afterwards.

        Dask's own method starts them from a callback, where errors are logged and not raised.
        """
        if n <= len(self.worker_spec):
            return super().scale(n, memory, cores)
        while len(self.worker_spec) < n:
            self.worker_spec.update(self.new_worker_spec())
        return None

    def new_worker_spec(self) -> dict[str, Any]:
        """Return dask-cuda's spec of the next GPU with daskinfer's options, then those of CPU workers: all start at once."""
        if self._gpus.keys() <= self.worker_spec.keys():
            name = next(name for name in self._cpu_workers if name not in self.worker_spec)
            return {name: self._make_cpu_worker_spec(self._cpu_workers[name])}
        ((uuid, spec),) = super().new_worker_spec().items()
        _limit_to_allowed_cores(spec["options"]["plugins"])
        base, added = spec["options"], self._spec.nanny_options(self._gpus[uuid], n_threads=1)
        merged = {"preload": base["preload"] + added["preload"], "env": {**base["env"], **added["env"]}}
        return {uuid: {"cls": NannyProcess, "options": {**base, **added, **merged}}}

    def _make_cpu_worker_spec(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Return the spec of a CPU worker in this cluster, with the security, protocol and configuration of GPU workers."""
        shared = {name: self.new_spec["options"][name] for name in ("security", "protocol", "config")}
        return {**spec, "options": {**shared, **spec["options"]}}


def _limit_to_allowed_cores(plugins: Iterable[Any]) -> None:
    """Limit the cores near a GPU to those that this process may use: a batch job may have fewer."""
    allowed = os.sched_getaffinity(0)
    for plugin in plugins:
        if isinstance(plugin, CPUAffinity):
            plugin.cores = sorted(allowed.intersection(plugin.cores) or allowed)
