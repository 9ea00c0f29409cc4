"""dask-cuda's cluster with our workers in it: GPUs pinned by UUID, CPU workers beside them.

dask-cuda decides how a GPU's worker is set up (which GPUs it sees and in which order, its spilling, the cores near it, its
preload); taken from it here is only which process the Nanny runs in, and added are the worker's name, resource and
variables. Its own memory limit would divide the host's memory by the GPU workers alone: it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from daskinfer.cluster import LOOPBACK, nanny_options, scheduler_options, worker_variables
from daskinfer.device import Device
from daskinfer.errors import MissingExtra
from daskinfer.nanny_process import NannyProcess
from daskinfer.worker import UUID_VARIABLE

try:
    from dask_cuda import LocalCUDACluster
except ImportError as error:
    raise MissingExtra(
        f"GPU workers need dask-cuda, which cannot be imported ({error}). Install it for your driver: "
        'pip install "daskinfer[cuda13]" (driver 580 or newer) or "daskinfer[cuda12]" (driver 525 or newer).'
    ) from error


def start(
    gpus: Sequence[Device],
    cpu_workers: dict[str, Any],
    memory_limit: int,
    scratch: str,
    dashboard_address: str | None,
    start_timeout: float,
) -> Any:
    """Start a LocalCUDACluster of ``gpus`` and let ``cpu_workers`` (worker specs by name) join it."""
    cluster = _DeviceCUDACluster(gpus, memory_limit, scratch, dashboard_address, start_timeout)
    # Not through scale(): on such a cluster it drops workers that it did not name.
    cluster.worker_spec.update({name: cluster.beside(spec) for name, spec in cpu_workers.items()})
    try:
        cluster.sync(cluster._correct_state)
    except Exception:
        cluster.close()
        raise
    return cluster


class _DeviceCUDACluster(LocalCUDACluster):  # type: ignore[misc]  # dask-cuda ships no annotations
    def __init__(
        self,
        gpus: Sequence[Device],
        memory_limit: int,
        scratch: str,
        dashboard_address: str | None,
        start_timeout: float,
    ) -> None:
        self._gpus = {gpu.uuid: gpu for gpu in gpus}
        self._of_ours = (memory_limit, scratch, start_timeout)
        super().__init__(
            CUDA_VISIBLE_DEVICES=[gpu.uuid for gpu in gpus],
            memory_limit=memory_limit,
            local_directory=scratch,
            host=LOOPBACK,
            dashboard_address=dashboard_address,
            scheduler_kwargs=scheduler_options(),
            name="LocalDeviceCluster",
            silence_logs=40,
        )

    def new_worker_spec(self) -> dict[str, Any]:
        ((uuid, spec),) = super().new_worker_spec().items()
        gpu = self._gpus[uuid]
        options = spec["options"]
        ours = nanny_options(gpu.name, *self._of_ours)
        options.update(
            ours,
            preload=[*options["preload"], *ours["preload"]],
            env={**options["env"], **worker_variables(gpu, 1, self._of_ours[1]), UUID_VARIABLE: uuid},
        )
        return {uuid: {"cls": NannyProcess, "options": options}}

    def beside(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The spec of a CPU worker that joins this cluster: its security, protocol and configuration are the GPUs'."""
        shared = {name: self.new_spec["options"][name] for name in ("security", "protocol", "config")}
        return {**spec, "options": {**shared, **spec["options"]}}
