"""Restart a worker that hangs or whose device is broken, by killing its process.

A worker that holds the GIL or is stopped cannot respond, and a nanny asks before it kills. So each worker of a managed
cluster writes its process ID to a file in the cluster's folder when it starts; the client kills that process and the nanny
starts another, on which waiting tasks run about 1 s later. Workers of external clusters are only restarted if the user
allows it, by Dask itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import psutil
from distributed import Client

from daskinfer.core import env

logger = logging.getLogger(__name__)

RESTART_SECONDS = 30.0  # within which Dask must restart a worker; arbitrary


def write_pid_file() -> None:
    """Write the process ID of a worker that starts to a file where the client finds it."""
    folder, device = os.environ.get(env.SCRATCH), os.environ.get(env.DEVICE)
    if folder and device:
        path = _get_pid_path(folder, device)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(f"{os.getpid()} {psutil.Process().create_time()}")
        draft.replace(path)


class WorkerRestarter:
    """Restarts workers during one call.

    Parameters
    ----------
    client
        Client of the workers' cluster.
    folders
        The cluster's folder by device; empty for workers of an external cluster.
    allow_external
        Whether workers of an external cluster may be restarted.
    """

    def __init__(self, client: Client, folders: Mapping[str, str], *, allow_external: bool) -> None:
        self._client, self._folders, self._allow_external = client, folders, allow_external

    def restart_worker(self, device: str, address: str | None) -> bool:
        """Restart a device's worker; return whether that was possible."""
        folder = self._folders.get(device)
        if folder and _kill_recorded_process(folder, device):
            return True
        if not self._allow_external or address is None:
            return False
        results = self._client.restart_workers([address], timeout=RESTART_SECONDS, raise_for_error=False)
        return bool(results.get(address) == "OK")


def _kill_recorded_process(folder: str, device: str) -> bool:
    """Kill the process that a worker recorded; return whether it no longer runs."""
    with contextlib.suppress(OSError, ValueError, psutil.AccessDenied):
        pid, create_time = _get_pid_path(folder, device).read_text().split()
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            if process.create_time() == float(create_time):  # not another process that has reused the ID
                process.kill()
        return True
    return False


def _get_pid_path(folder: str, device: str) -> Path:
    return Path(folder, f"{device}.pid")
