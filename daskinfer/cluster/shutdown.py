"""Ending a Dask cluster in time: asked first, then killed, and nothing of it left."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
from distributed import Status

from daskinfer.cluster.nanny import GRACE_SECONDS, kill_processes

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 20.0
ABORT_SECONDS = 3 * GRACE_SECONDS  # a nanny ends its start in one, its worker's in another
POLL_SECONDS = 0.01


@contextlib.contextmanager
def close_on_failure(cluster: Any) -> Iterator[None]:
    """Where a cluster's constructor fails or is interrupted, end what it has started: nobody else can."""
    try:
        yield
    except BaseException:
        try:
            with contextlib.suppress(Exception):
                _abort_startup(cluster)
        finally:  # of whatever a second signal kept from ending
            with contextlib.suppress(Exception):
                kill_processes(_list_processes(cluster))
            cluster.status = Status.closed  # also where it had not got as far as to have anything to close
        raise


def _abort_startup(cluster: Any) -> None:
    if cluster.status is Status.starting:
        cluster.status = Status.failed  # from "starting", Dask's close() leaves the scheduler listening
    for nanny in _list_nannies(cluster):
        cluster.loop.add_callback(nanny.give_up)
    _wait_while(lambda: any(map(_is_running, _list_processes(cluster))), ABORT_SECONDS)
    kill_processes(_list_processes(cluster))
    # Nannies that were given up before the cluster knew of them make Dask's close() fail at first: no news to anybody.
    close_cluster(cluster, CLOSE_SECONDS, level=logging.DEBUG)


def close_cluster(cluster: Any, timeout: float, *, level: int = logging.WARNING) -> None:
    """Close in time, then end what is left of our own processes; ``level`` is the log's for a close that fails."""
    deadline = time.monotonic() + timeout
    processes = _list_processes(cluster)
    try:
        cluster.close(timeout=timeout)
    except Exception as error:
        # Dask's word for a close that was cancelled while workers started: what there is of them ends below.
        level = logging.DEBUG if isinstance(error, UnboundLocalError) else level
        logger.log(level, "the cluster did not close in time (%r); its processes are killed", error)
    _wait_while(lambda: any(map(_is_running, processes)), deadline - time.monotonic())
    kill_processes(processes)
    if cluster.status is not Status.closed:
        cluster.status = Status.running  # it gave up half-way, and would wait for itself
        with contextlib.suppress(Exception):
            cluster.close(timeout=CLOSE_SECONDS)


def _wait_while(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while condition() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _list_nannies(cluster: Any) -> list[Any]:
    while True:
        try:
            return list(getattr(cluster, "_created", ()))
        except RuntimeError:  # the loop's thread has just added one
            continue


def _list_processes(cluster: Any) -> list[psutil.Process]:
    return [process for nanny in _list_nannies(cluster) for process in nanny.list_processes()]


def _is_running(process: psutil.Process) -> bool:
    """Whether a process is still there; one that only waits for init to take note is not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
