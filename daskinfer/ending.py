"""Ending a Dask cluster in time: asked first, then killed, and nothing of it left."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
from distributed import Status

from daskinfer.nanny_process import kill

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 20.0
POLL_SECONDS = 0.01


@contextlib.contextmanager
def ended_on_failure(cluster: Any) -> Iterator[None]:
    """Where a cluster's constructor fails or is interrupted, end what it has started: nobody else can."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            if cluster.status is Status.starting:
                cluster.status = Status.failed  # from "starting", Dask's close() leaves the scheduler listening
            kill(_processes(cluster))
            end(cluster, CLOSE_SECONDS)
        cluster.status = Status.closed  # also where it had not got as far as to have anything to close
        raise


def end(cluster: Any, timeout: float) -> None:
    """Close in time, then end what is left of our own processes."""
    deadline = time.monotonic() + timeout
    processes = _processes(cluster)
    try:
        cluster.close(timeout=timeout)
    except Exception as error:
        logger.warning("the cluster did not close within %g s (%r); its processes are killed", timeout, error)
    _wait_while(lambda: any(map(_runs, processes)), deadline - time.monotonic())
    kill(processes)
    if cluster.status is not Status.closed:
        cluster.status = Status.running  # it gave up half-way, and would wait for itself
        with contextlib.suppress(Exception):
            cluster.close(timeout=CLOSE_SECONDS)


def _wait_while(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while condition() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _processes(cluster: Any) -> list[psutil.Process]:
    return [process for nanny in list(getattr(cluster, "_created", ())) for process in nanny.processes()]


def _runs(process: psutil.Process) -> bool:
    """Whether a process is still there; one that only waits for init to take note is not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
