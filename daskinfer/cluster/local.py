"""A Dask cluster of this machine's devices: one worker process per GPU, and CPU workers beside them.

Scheduler and cluster object live in the client's process, as with Dask's own local clusters; every worker has a process of
its own that ends with the client (``nanny_process``). With GPUs the cluster is dask-cuda's ``LocalCUDACluster``
(``cuda_cluster``), without them a plain ``SpecCluster``; the class here wraps either, so that neither dask-cuda nor a GPU is
needed where there is none.

- Placement goes by a resource per device (``launch.resource``), which stands in each Nanny's options and so comes back
  with a restarted worker.
- ``allowed-failures`` is 0: with Dask's 3 the client hears of a task that kills its worker after four deaths, and closing
  hung in 6 of 10 trials; with 0 in none (decision 2).
- A CPU worker computes with one torch thread unless told: the last bits of an answer depend on the number of threads, and
  so they are the same for any number of workers. ``"auto"`` devices are one CPU worker per core.
- Memory is divided evenly over workers of both kinds, cores go to the GPU workers first (one each, to feed the GPU).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import dask.config
import torch
from distributed import Client, Scheduler, Security
from distributed.deploy.spec import SpecCluster

from daskinfer.cluster.nanny import NannyProcess
from daskinfer.cluster.shutdown import CLOSE_SECONDS, close_cluster, close_on_failure
from daskinfer.cluster.worker_spec import LOOPBACK, WorkerSpec, dask_config, memory_per_worker, resolve_security
from daskinfer.core.scratch import ScratchDir
from daskinfer.errors import ClusterError, DaskInferError, OptionError
from daskinfer.hardware import device_spec as device_room
from daskinfer.hardware.discovery import Device

logger = logging.getLogger(__name__)

START_SECONDS = 120.0  # two workers that import torch need 4 s on 2 idle cores; the rest is for machines under load


class LocalDeviceCluster:
    """A Dask cluster of this machine's devices, one worker each.

    Use it as any Dask cluster: ``Client(cluster)``, ``cluster.get_client()``, ``cluster.dashboard_link``, ``with``. What is
    not listed here is that of the Dask cluster inside.

    Parameters
    ----------
    devices
        The device language of ``predict``: a string or a list of strings. "auto": every GPU, or where there is none one
        CPU worker per core.
    threads_per_worker
        Torch threads of a CPU worker; "auto" divides the cores that the GPU workers leave evenly.
    memory_limit
        Host memory per worker, in bytes; "auto" divides nine tenths of this machine's evenly.
    dashboard_address
        Where the dashboard listens. None: no dashboard. Everything else listens on loopback only.
    security
        True: scheduler, workers and clients talk by TLS, with certificates made for this cluster, and nobody without them
        gets in (without it, any user of this machine may). A ``distributed.Security``: with its certificates. None: what
        Dask's configuration says, by default no TLS. The dashboard is not encrypted.
    start_timeout, close_timeout
        Seconds until all workers have to be there, and until their processes are killed when the cluster is closed.

    Raises
    ------
    DeviceError
        Where a device is unknown, doubled, absent, or cannot be driven by this torch.
    ClusterError
        Where workers do not start in time.
    MissingExtra
        Where ``security=True`` and ``cryptography`` is not installed.

    Examples
    --------
    >>> import daskinfer as di
    >>> with di.LocalDeviceCluster("cpu*2") as cluster, cluster.get_client() as client:
    ...     di.predict(abs, [-1.0, 2.0], client=client)
    array([1., 2.], dtype=float32)
    """

    def __init__(
        self,
        devices: str | Sequence[str] = "auto",
        *,
        threads_per_worker: int | str = 1,
        memory_limit: int | str = "auto",
        dashboard_address: str | None = f"{LOOPBACK}:0",
        security: bool | Security | None = None,
        start_timeout: float = START_SECONDS,
        close_timeout: float = CLOSE_SECONDS,
    ) -> None:
        machine = device_room.inspect_machine()
        self.devices = device_room.parse_devices(devices, machine)
        if any(d.kind == "inline" for d in self.devices):
            raise ClusterError("devices='inline' has no workers; a cluster needs 'cpu' or 'cuda' devices. Name some.")
        device_room.check_drivable(self.devices, torch.version.cuda, machine)
        n_threads = _resolve_n_threads(threads_per_worker, self.devices, machine.n_cores)
        memory = _resolve_memory_limit(memory_limit, len(self.devices), machine.memory_nbytes)
        certificates = resolve_security(security)
        scratch = ScratchDir()
        start = WorkerSpec(memory, scratch.path, dashboard_address, start_timeout, certificates)
        with _clean_up_on_failure(self.devices, scratch, start_timeout), dask.config.set(dask_config()):
            cluster = _start_cluster(self.devices, n_threads, start)
        self._cluster: Any = cluster
        self.close_timeout = close_timeout
        # Also run when the last reference goes, and when the interpreter exits.
        self._finalizer = weakref.finalize(self, _close_from_any_thread, cluster, scratch, close_timeout)
        _open_clusters.add(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._cluster, name)

    @property
    def scheduler_address(self) -> str:
        """Where clients connect."""
        return str(self._cluster.scheduler_address)

    @property
    def dashboard_link(self) -> str:
        """The URL of the dashboard; empty where there is none."""
        has_one = self._cluster.scheduler_spec["options"]["dashboard"]
        return str(self._cluster.dashboard_link) if has_one else ""

    @property
    def is_healthy(self) -> bool:
        """Whether every device still has its worker, or a nanny that brings it back."""
        nannies = self._cluster.workers.values()
        return self._finalizer.alive and len(nannies) == len(self.devices) and all(nanny.running for nanny in nannies)

    def get_client(self) -> Client:
        """A new client of this cluster; it becomes the current one."""
        return Client(self)

    def scale(self, *_: Any, **__: Any) -> None:
        """Refuse: the workers are the devices."""
        raise ClusterError(
            f"this cluster has one worker for each of {', '.join(d.name for d in self.devices)}; it cannot scale. "
            "Make a LocalDeviceCluster with other devices."
        )

    adapt = scale

    def close(self, timeout: float | None = None) -> None:
        """End all workers and the scheduler, and remove what they left; kill what does not end in ``timeout`` seconds.

        None: the ``close_timeout`` of the constructor.
        """
        if (ending := self._finalizer.detach()) is not None:
            _, ender, (inner, scratch, usual), _ = ending
            ender(inner, scratch, usual if timeout is None else timeout)

    def __enter__(self) -> LocalDeviceCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        address = self._cluster.scheduler_address if self._finalizer.alive else "closed"
        return f"LocalDeviceCluster({', '.join(d.name for d in self.devices)}; {address})"

    def _repr_html_(self) -> str:
        return str(self._cluster._repr_html_())


class _DeviceSpecCluster(SpecCluster):  # type: ignore[misc]  # distributed ships no annotations
    def __init__(self, workers: dict[str, Any], spec: WorkerSpec) -> None:
        with close_on_failure(self):
            super().__init__(
                workers=workers,
                scheduler={"cls": Scheduler, "options": spec.scheduler_options()},
                security=spec.security,
                name=LocalDeviceCluster.__name__,
                silence_logs=logging.CRITICAL,  # a worker that ends is the call's to speak of
            )


def _start_cluster(devices: Sequence[Device], n_threads: int, spec: WorkerSpec) -> Any:
    """Start the Dask cluster and wait for all its workers."""
    # Not by the workers' names: Dask forgets a nanny for good once a worker of its name is away for 15 s, and under load a
    # restart takes longer.
    workers = {
        f"nanny of {d.name}": {
            "cls": NannyProcess,
            "options": {
                **spec.nanny_options(d, n_threads),
                "environment": {**spec.environment, "CUDA_VISIBLE_DEVICES": ""},
            },
        }
        for d in devices
        if d.kind == "cpu"
    }
    if len(workers) == len(devices):
        cluster = _DeviceSpecCluster(workers, spec)
    else:
        from daskinfer.cluster import cuda

        cluster = cuda.start_cuda_cluster([d for d in devices if d.kind == "cuda"], workers, spec)
    with contextlib.suppress(ValueError):
        sys.path.remove(cluster.scheduler.local_directory)  # every server of Dask's puts its folder in front
    return cluster


@contextlib.contextmanager
def _clean_up_on_failure(devices: Sequence[Device], scratch: ScratchDir, timeout: float) -> Iterator[None]:
    """Where starting fails, leave no folder, and say which workers failed."""
    try:
        yield
    except BaseException as error:
        scratch.remove()
        if isinstance(error, DaskInferError) or not isinstance(error, Exception):
            raise
        raise ClusterError(
            f"the workers of {', '.join(d.name for d in devices)} did not start: {error}. All have to be there within "
            f"{timeout:g} s. The cause stands in their log above."
        ) from error


def _resolve_n_threads(threads_per_worker: int | str, devices: Sequence[Device], n_cores: int) -> int:
    if threads_per_worker == "auto":
        n_gpus = sum(d.kind == "cuda" for d in devices)
        return max(1, (n_cores - n_gpus) // max(1, len(devices) - n_gpus))
    if isinstance(threads_per_worker, bool) or not isinstance(threads_per_worker, int) or threads_per_worker < 1:
        raise OptionError(
            f"threads_per_worker is {threads_per_worker!r}; it may be a number from 1 or 'auto'. Pass one of these."
        )
    return threads_per_worker


def _resolve_memory_limit(memory_limit: int | str, n_workers: int, memory_nbytes: int) -> int:
    if memory_limit == "auto":
        return memory_per_worker(n_workers, memory_nbytes)
    if isinstance(memory_limit, bool) or not isinstance(memory_limit, int) or memory_limit < 1:
        raise OptionError(f"memory_limit is {memory_limit!r}; it may be a number of bytes or 'auto'. Pass one of these.")
    return memory_limit


_open_clusters: weakref.WeakSet[LocalDeviceCluster] = weakref.WeakSet()


def _detach_after_fork() -> None:
    """A forked child has a copy of every cluster, but the workers, sockets and folders are its parent's."""
    for cluster in list(_open_clusters):
        cluster._finalizer.detach()
        cluster._cluster.shutdown_on_close = False
        with contextlib.suppress(AttributeError):  # Dask's own; without it the child removes the scheduler's folder
            cluster._cluster.scheduler._workdir._finalizer.detach()


os.register_at_fork(after_in_child=_detach_after_fork)


def _close_from_any_thread(cluster: Any, scratch: ScratchDir, timeout: float) -> None:
    """End the cluster in this thread, unless it is the one that would have to do it meanwhile."""
    if cluster.called_from_running_loop:
        # The garbage collector runs wherever it likes; on the event loop, waiting for the loop would never end.
        threading.Thread(target=_close_from_any_thread, args=(cluster, scratch, timeout), name="daskinfer-end").start()
        return
    try:
        close_cluster(cluster, timeout)
    finally:
        scratch.remove()
