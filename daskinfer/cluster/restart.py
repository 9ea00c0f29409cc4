"""Ends a worker's process, so that its nanny starts another: one that hangs, or whose device is broken.

A worker that holds the GIL or was stopped answers nobody, and a nanny asks first. So a worker of our own cluster notes its
process in the cluster's folder when it starts, and is killed by that; waiting tasks run there about 1 s after it is back.
Workers of clusters of others are left alone unless their restart is allowed; Dask then does it.
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

RESTART_SECONDS = 30.0  # until Dask has restarted a worker; arbitrary


def write_pid_file() -> None:
    """In a worker that starts: leave its number where the client finds it."""
    folder, device = os.environ.get(env.SCRATCH), os.environ.get(env.DEVICE)
    if folder and device:
        path = _get_pid_path(folder, device)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(f"{os.getpid()} {psutil.Process().create_time()}")
        draft.replace(path)


class WorkerRestarter:
    """Ends workers of one call.

    Parameters
    ----------
    client
        Whose workers they are.
    folders
        The cluster's folder by device; empty for workers that are not ours.
    allowed
        Whether workers of others may be restarted.
    """

    def __init__(self, client: Client, folders: Mapping[str, str], *, allow_external: bool) -> None:
        self._client, self._folders, self._allow_external = client, folders, allow_external

    def restart_worker(self, device: str, address: str | None) -> bool:
        """End a device's worker; whether that was possible."""
        folder = self._folders.get(device)
        if folder and _kill_recorded_process(folder, device):
            return True
        if not self._allow_external or address is None:
            return False
        answer = self._client.restart_workers([address], timeout=RESTART_SECONDS, raise_for_error=False)
        return bool(answer.get(address) == "OK")


def _kill_recorded_process(folder: str, device: str) -> bool:
    """End the process that a worker noted; whether it is gone, by us or by itself."""
    with contextlib.suppress(OSError, ValueError, psutil.AccessDenied):
        number, since = _get_pid_path(folder, device).read_text().split()
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(number))
            if process.create_time() == float(since):  # not another that has its number by now
                process.kill()
        return True
    return False


def _get_pid_path(folder: str, device: str) -> Path:
    return Path(folder, f"{device}.pid")
