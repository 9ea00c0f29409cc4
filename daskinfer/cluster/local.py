"""A Dask cluster of this machine's devices: one worker process per GPU, and CPU workers beside them.

The scheduler and the cluster object live in the client's process, as with Dask's own local clusters; each worker has a
process of its own that exits with the client (``nanny``). With GPUs, the cluster is dask-cuda's ``LocalCUDACluster``
(``cuda``), without them a plain ``SpecCluster``. The class here wraps either, so CPU-only machines need no dask-cuda.

- Tasks are placed by one Dask resource per device (``worker_spec.resource_name``). It is part of the options of each Nanny,
  so a restarted worker has it again.
- ``allowed-failures`` is 0, so the client learns of a task that kills its worker after one death; see the docstring of
  ``daskinfer.cluster`` for the measurements.
- A CPU worker computes with one torch thread by default: the last bits of an output depend on the number of threads, so
  they are the same for any number of workers. ``"auto"`` devices mean one CPU worker per core.
- Memory is divided evenly among all workers. GPU workers get cores first, one each to feed the GPU.
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
from daskinfer.core.files import ScratchDir
from daskinfer.errors import ClusterError, DaskInferError, OptionError
from daskinfer.hardware.device_spec import check_drivable, parse_devices
from daskinfer.hardware.discovery import Device, inspect_machine

logger = logging.getLogger(__name__)

START_SECONDS = 120.0  # two workers that import torch need 4 s on 2 idle cores (measured); the rest is for loaded machines


class LocalDeviceCluster:
    """A Dask cluster of this machine's devices, with one worker for each.

    Use it like any Dask cluster: ``Client(cluster)``, ``cluster.get_client()``, ``cluster.dashboard_link``, ``with``.
    Attributes that are not listed here are those of the wrapped Dask cluster.

    Parameters
    ----------
    devices
        Devices as in ``predict``: a string or a list of strings. "auto": every GPU, or without GPUs one CPU worker per core.
    threads_per_worker
        Torch threads of a CPU worker; "auto" divides the cores that GPU workers do not use evenly.
    memory_limit
        Host memory per worker, in bytes; "auto" divides nine tenths of this machine's memory evenly.
    dashboard_address
        Address of the dashboard. None: no dashboard. Everything else listens on loopback only.
    security
        True: scheduler, workers and clients communicate over TLS with certificates made for this cluster, and connections
        without them are rejected (otherwise any user of this machine can connect). A ``distributed.Security``: TLS with its
        certificates. None: Dask's configuration decides, by default no TLS. The dashboard is not encrypted.
    start_timeout, close_timeout
        Seconds within which all workers must start, and after which closing kills their processes.

    Raises
    ------
    DeviceError
        If a device is unknown, requested twice, missing, or not usable by this torch.
    ClusterError
        If workers do not start in time.
    MissingExtra
        If ``security=True`` and ``cryptography`` is not installed.

    Examples
    --------
    >>> import daskinfer as di
    >>> with di.LocalDeviceCluster("cpu*2") as cluster, cluster.get_client() as client:
    ...     di.predict(abs, [-1.0, 2.0], client=client)
    array([1., 2.], dtype=float32)
    """

    def __init__(
        self,
        devices: str | torch.device | Sequence[str | torch.device] = "auto",
        *,
        threads_per_worker: int | str = 1,
        memory_limit: int | str = "auto",
        dashboard_address: str | None = f"{LOOPBACK}:0",
        security: bool | Security | None = None,
        start_timeout: float = START_SECONDS,
        close_timeout: float = CLOSE_SECONDS,
    ) -> None:
        machine = inspect_machine()
        self.devices = parse_devices(devices, machine)
        if any(d.kind == "inline" for d in self.devices):
            raise ClusterError("a cluster needs CPU or GPU devices, got 'inline', which has no workers. Use devices='cpu'.")
        check_drivable(self.devices, torch.version.cuda, machine)
        n_threads = _resolve_n_threads(threads_per_worker, self.devices, machine.n_cores)
        memory = _resolve_memory_limit(memory_limit, len(self.devices), machine.memory_nbytes)
        certificates = resolve_security(security)
        scratch = ScratchDir()
        spec = WorkerSpec(memory, scratch.path, dashboard_address, start_timeout, certificates)
        with _clean_up_on_failure(self.devices, scratch, start_timeout), dask.config.set(dask_config()):
            cluster = _start_cluster(self.devices, n_threads, spec)
        self._cluster: Any = cluster
        self.close_timeout = close_timeout
        # Also runs when the last reference is dropped, and when the interpreter exits.
        self._finalizer = weakref.finalize(self, _close_from_any_thread, cluster, scratch, close_timeout)
        _open_clusters.add(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._cluster, name)

    @property
    def scheduler_address(self) -> str:
        """The address that clients connect to."""
        return str(self._cluster.scheduler_address)

    @property
    def dashboard_link(self) -> str:
        """The URL of the dashboard; empty without one."""
        has_dashboard = self._cluster.scheduler_spec["options"]["dashboard"]
        return str(self._cluster.dashboard_link) if has_dashboard else ""

    @property
    def is_healthy(self) -> bool:
        """Whether every device still has its worker, or a nanny that restarts it."""
        nannies = self._cluster.workers.values()
        return self._finalizer.alive and len(nannies) == len(self.devices) and all(nanny.is_running for nanny in nannies)

    def get_client(self) -> Client:
        """Return a new client of this cluster; it becomes Dask's current client."""
        return Client(self)

    def scale(self, *_: Any, **__: Any) -> None:
        """Raise an error: there is exactly one worker per device."""
        raise ClusterError(
            f"cannot scale this cluster: it has one worker for each of {', '.join(d.name for d in self.devices)}. "
            "Make a LocalDeviceCluster with other devices."
        )

    adapt = scale

    def close(self, timeout: float | None = None) -> None:
        """Stop all workers and the scheduler and remove their files; kill processes that outlast ``timeout`` seconds.

        None: the ``close_timeout`` of the constructor.
        """
        if (finalizer := self._finalizer.detach()) is not None:
            _, close, (cluster, scratch, default_timeout), _ = finalizer
            close(cluster, scratch, default_timeout if timeout is None else timeout)

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
                silence_logs=logging.CRITICAL,  # the call reports workers that die
            )


def _start_cluster(devices: Sequence[Device], n_threads: int, spec: WorkerSpec) -> Any:
    """Start the Dask cluster and wait for all its workers."""
    # Not keyed by the workers' names: Dask drops a nanny for good once the worker of that name is missing for 15 s, and a
    # restart under load takes longer.
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
        sys.path.remove(cluster.scheduler.local_directory)  # every Dask server prepends its folder
    return cluster


@contextlib.contextmanager
def _clean_up_on_failure(devices: Sequence[Device], scratch: ScratchDir, timeout: float) -> Iterator[None]:
    """If starting fails, remove the folder and raise an error that names the workers."""
    try:
        yield
    except BaseException as error:
        scratch.remove()
        if isinstance(error, DaskInferError) or not isinstance(error, Exception):
            raise
        raise ClusterError(
            f"the workers of {', '.join(d.name for d in devices)} did not start: {error}. "
            f"See their log above for the cause (start_timeout={timeout:g} s)."
        ) from error


def _resolve_n_threads(threads_per_worker: int | str, devices: Sequence[Device], n_cores: int) -> int:
    if threads_per_worker == "auto":
        n_gpus = sum(d.kind == "cuda" for d in devices)
        return max(1, (n_cores - n_gpus) // max(1, len(devices) - n_gpus))
    if isinstance(threads_per_worker, bool) or not isinstance(threads_per_worker, int) or threads_per_worker < 1:
        raise OptionError(f"threads_per_worker must be an integer >= 1 or 'auto', got {threads_per_worker!r}")
    return threads_per_worker


def _resolve_memory_limit(memory_limit: int | str, n_workers: int, memory_nbytes: int) -> int:
    if memory_limit == "auto":
        return memory_per_worker(n_workers, memory_nbytes)
    if isinstance(memory_limit, bool) or not isinstance(memory_limit, int) or memory_limit < 1:
        raise OptionError(f"memory_limit must be an integer >= 1 (bytes) or 'auto', got {memory_limit!r}")
    return memory_limit


_open_clusters: weakref.WeakSet[LocalDeviceCluster] = weakref.WeakSet()


def _detach_after_fork() -> None:
    """Keep a forked child from closing its copy of each cluster: workers, sockets and folders belong to the parent."""
    for cluster in list(_open_clusters):
        cluster._finalizer.detach()
        cluster._cluster.shutdown_on_close = False
        with contextlib.suppress(AttributeError):  # private to Dask; otherwise the child removes the scheduler's folder
            cluster._cluster.scheduler._workdir._finalizer.detach()


os.register_at_fork(after_in_child=_detach_after_fork)


def _close_from_any_thread(cluster: Any, scratch: ScratchDir, timeout: float) -> None:
    """Close the cluster in this thread, or in a new one if this thread runs the cluster's event loop."""
    if cluster.called_from_running_loop:
        # The garbage collector may run in any thread; on the event loop, waiting for that loop would deadlock.
        threading.Thread(
            target=_close_from_any_thread, args=(cluster, scratch, timeout), name="daskinfer-close-cluster"
        ).start()
        return
    try:
        close_cluster(cluster, timeout)
    finally:
        scratch.remove()
