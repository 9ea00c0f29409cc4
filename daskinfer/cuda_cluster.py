"""dask-cuda's cluster with our workers in it: GPUs pinned by UUID, CPU workers beside them.

dask-cuda decides how a GPU's worker is set up (which GPUs it sees and in which order, its spilling, the cores near it, its
preload); taken from it here is only which process the Nanny runs in, and added are the worker's name, resource and
variables. Its own memory limit would divide the host's memory by the GPU workers alone: it is given.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from daskinfer.cluster import LOOPBACK, Start
from daskinfer.device import Device
from daskinfer.errors import MissingExtra
from daskinfer.nanny_process import NannyProcess

try:
    from dask_cuda import LocalCUDACluster
except ImportError as error:
    raise MissingExtra(
        f"GPU workers need dask-cuda, which cannot be imported ({error}). Install it for your driver: "
        'pip install "daskinfer[cuda13]" (driver 580 or newer) or "daskinfer[cuda12]" (driver 525 or newer).'
    ) from error


def start(gpus: Sequence[Device], cpu_workers: dict[str, Any], with_: Start) -> Any:
    """Start a LocalCUDACluster of ``gpus`` and let ``cpu_workers`` (worker specs by name) join it."""
    cluster = _DeviceCUDACluster(gpus, with_)
    # Not through scale(): on such a cluster it drops workers that it did not name.
    cluster.worker_spec.update({name: cluster.beside(spec) for name, spec in cpu_workers.items()})
    try:
        cluster.sync(cluster._correct_state)
    except BaseException:
        cluster.close()
        raise
    return cluster


class _DeviceCUDACluster(LocalCUDACluster):  # type: ignore[misc]  # dask-cuda ships no annotations
    def __init__(self, gpus: Sequence[Device], with_: Start) -> None:
        self._gpus = {gpu.uuid: gpu for gpu in gpus}
        self._with = with_
        super().__init__(
            CUDA_VISIBLE_DEVICES=[gpu.uuid for gpu in gpus],
            memory_limit=with_.memory_limit,
            local_directory=with_.scratch,
            host=LOOPBACK,
            dashboard_address=with_.dashboard_address,
            scheduler_kwargs=with_.scheduler_options(),
            name="LocalDeviceCluster",
            silence_logs=logging.ERROR,
        )

    def new_worker_spec(self) -> dict[str, Any]:
        ((uuid, spec),) = super().new_worker_spec().items()
        theirs, ours = spec["options"], self._with.nanny_options(self._gpus[uuid], n_threads=1)
        both = {"preload": theirs["preload"] + ours["preload"], "env": {**theirs["env"], **ours["env"]}}
        return {uuid: {"cls": NannyProcess, "options": {**theirs, **ours, **both}}}

    def beside(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The spec of a CPU worker that joins this cluster: its security, protocol and configuration are the GPUs'."""
        shared = {name: self.new_spec["options"][name] for name in ("security", "protocol", "config")}
        return {**spec, "options": {**shared, **spec["options"]}}
