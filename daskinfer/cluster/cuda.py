"""dask-cuda's cluster with our workers in it: GPUs pinned by UUID, CPU workers beside them.

dask-cuda decides how a GPU's worker is set up (which GPUs it sees and in which order, its spilling, the cores near it, its
preload); taken from it here is only which process the Nanny runs in, and added are the worker's name, resource and
variables. Its own memory limit would divide the host's memory by the GPU workers alone: it is given.
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
from daskinfer.errors import MissingExtra
from daskinfer.hardware.discovery import Device

try:
    from dask_cuda import LocalCUDACluster
    from dask_cuda.plugins import CPUAffinity
except ImportError as error:
    raise MissingExtra(
        f"GPU workers need dask-cuda, which cannot be imported ({error}). Install it for your driver: "
        'pip install "daskinfer[cuda13]" (driver 580 or newer) or "daskinfer[cuda12]" (driver 525 or newer).'
    ) from error


def start_cuda_cluster(gpus: Sequence[Device], cpu_workers: dict[str, Any], spec: WorkerSpec) -> Any:
    """Start a LocalCUDACluster of ``gpus`` and ``cpu_workers`` (worker specs by name)."""
    with _preserve_environment():
        return _DeviceCUDACluster(gpus, cpu_workers, spec)


@contextlib.contextmanager
def _preserve_environment() -> Iterator[None]:
    """Leave this process's environment as it was: dask-cuda writes into it."""
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
                silence_logs=logging.CRITICAL,  # a worker that ends is the call's to speak of
            )

    def scale(self, n: int = 0, memory: Any = None, cores: Any = None) -> Any:
        """Write the specs that dask-cuda's constructor asks for, and no more: it starts them itself right afterwards.

        Dask's own would start them from a callback, where what goes wrong is logged and not raised.
        """
        if n <= len(self.worker_spec):
            return super().scale(n, memory, cores)
        while len(self.worker_spec) < n:
            self.worker_spec.update(self.new_worker_spec())
        return None

    def new_worker_spec(self) -> dict[str, Any]:
        """dask-cuda's spec of the next GPU with what is ours, then the CPU workers', so that all start at once."""
        if self._gpus.keys() <= self.worker_spec.keys():
            name = next(name for name in self._cpu_workers if name not in self.worker_spec)
            return {name: self._make_cpu_worker_spec(self._cpu_workers[name])}
        ((uuid, spec),) = super().new_worker_spec().items()
        _limit_to_allowed_cores(spec["options"]["plugins"])
        theirs, ours = spec["options"], self._spec.nanny_options(self._gpus[uuid], n_threads=1)
        both = {"preload": theirs["preload"] + ours["preload"], "env": {**theirs["env"], **ours["env"]}}
        return {uuid: {"cls": NannyProcess, "options": {**theirs, **ours, **both}}}

    def _make_cpu_worker_spec(self, spec: dict[str, Any]) -> dict[str, Any]:
        """A CPU worker that joins this cluster: its security, protocol and configuration are the GPUs'."""
        shared = {name: self.new_spec["options"][name] for name in ("security", "protocol", "config")}
        return {**spec, "options": {**shared, **spec["options"]}}


def _limit_to_allowed_cores(plugins: Iterable[Any]) -> None:
    """Of the cores near a GPU, take those that this process may use: a batch job may have been given fewer."""
    allowed = os.sched_getaffinity(0)
    for plugin in plugins:
        if isinstance(plugin, CPUAffinity):
            plugin.cores = sorted(allowed.intersection(plugin.cores) or allowed)
