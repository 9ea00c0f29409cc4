"""Close a Dask cluster within a deadline: ask its processes to exit, then kill them, and leave nothing behind."""

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
ABORT_SECONDS = 3 * GRACE_SECONDS  # a nanny takes up to one to abort its start, and one more to stop its worker
POLL_SECONDS = 0.01


@contextlib.contextmanager
def close_on_failure(cluster: Any) -> Iterator[None]:
    """If a cluster's constructor fails or is interrupted, stop what it has started: no one else has a reference to it."""
    try:
        yield
    except BaseException:
        try:
            with contextlib.suppress(Exception):
                _abort_startup(cluster)
        finally:  # a second signal may have interrupted the above
            with contextlib.suppress(Exception):
                kill_processes(_list_processes(cluster))
            cluster.status = Status.closed  # even if it failed before there was anything to close
        raise


def _abort_startup(cluster: Any) -> None:
    if cluster.status is Status.starting:
        cluster.status = Status.failed  # from "starting", Dask's close() leaves the scheduler listening
    for nanny in _list_nannies(cluster):
        cluster.loop.add_callback(nanny.abort)
    _wait_while(lambda: any(map(_is_running, _list_processes(cluster))), ABORT_SECONDS)
    kill_processes(_list_processes(cluster))
    # Dask's close() fails at first if a nanny was aborted before the cluster knew of it; that is expected, so log at DEBUG.
    close_cluster(cluster, CLOSE_SECONDS, level=logging.DEBUG)


def close_cluster(cluster: Any, timeout: float, *, level: int = logging.WARNING) -> None:
    """Close the cluster, then kill those of its processes that still run; log a failing close at ``level``."""
    deadline = time.monotonic() + timeout
    processes = _list_processes(cluster)
    try:
        cluster.close(timeout=timeout)
    except Exception as error:
        # Dask raises UnboundLocalError if closing is cancelled while workers start; they are killed below.
        level = logging.DEBUG if isinstance(error, UnboundLocalError) else level
        logger.log(level, "closing the cluster failed (%r); killing its processes", error)
    _wait_while(lambda: any(map(_is_running, processes)), deadline - time.monotonic())
    kill_processes(processes)
    if cluster.status is not Status.closed:
        cluster.status = Status.running  # otherwise close() waits for the attempt that failed
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
        except RuntimeError:  # the event loop's thread has just added one
            continue


def _list_processes(cluster: Any) -> list[psutil.Process]:
    return [process for nanny in _list_nannies(cluster) for process in nanny.list_processes()]


def _is_running(process: psutil.Process) -> bool:
    """Whether a process still runs; a zombie does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
