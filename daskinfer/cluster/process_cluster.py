"""The cluster that ``predict`` keeps for this process between calls.

Starting workers and importing torch in them takes seconds, so the first call without a client starts a cluster and the next
ones find it. It ends with ``di.close()``, after ``IDLE_SECONDS`` without a call, when a call asks for other devices, and
with the process.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence

from distributed import Client

from daskinfer.cluster.local import LocalDeviceCluster
from daskinfer.execution.result_buffers import result_pool
from daskinfer.transport import shared_memory

IDLE_SECONDS = 600.0  # as long as somebody in a notebook thinks about the next cell; arbitrary


class DefaultCluster:
    """At most one cluster and its client, by the devices that were asked for.

    Note: threads share it. The lock guards who has it; it is held while a cluster starts, not while one computes. A cluster
    that a call still uses is never ended by another call or the clock: the last to leave ends it.
    """

    def __init__(self, idle_seconds: float = IDLE_SECONDS) -> None:
        self.idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._current: _RunningCluster | None = None
        self._parent_cluster: _RunningCluster | None = None

    @contextlib.contextmanager
    def acquire_client(self, devices: Sequence[str]) -> Iterator[Client]:
        """A client of the kept cluster of these devices, started if need be."""
        started = self._acquire(tuple(devices))
        try:
            yield started.client
        finally:
            self._release(started)

    def is_running(self, devices: Sequence[str]) -> bool:
        """Whether a cluster of these devices is there and can be used."""
        with self._lock:
            return self._current is not None and self._current.devices == tuple(devices) and self._current.is_usable()

    def close(self) -> None:
        """End the cluster now, or as soon as the calls that use it have ended."""
        with self._lock:
            started, self._current = self._current, None
            if started is not None:
                started.retire()

    def reset_after_fork(self) -> None:
        """After a fork: the parent's cluster is not the child's, and the client's end would be told to its scheduler."""
        self._lock = threading.Lock()
        self._parent_cluster, self._current = self._current, None

    def _acquire(self, devices: tuple[str, ...]) -> _RunningCluster:
        with self._lock:
            current = self._current
            if current is not None and (current.devices != devices or not current.is_usable()):
                current.retire()
                current = None
            self._current = current = current or _RunningCluster(devices)
            current.add_user()
            return current

    def _release(self, running: _RunningCluster) -> None:
        with self._lock:
            running.remove_user()
            if running is self._current and running.n_users == 0:
                running.start_idle_timer(self.idle_seconds, lambda: self._close_if_idle(running))

    def _close_if_idle(self, running: _RunningCluster) -> None:
        with self._lock:
            if running is self._current and running.n_users == 0:
                self._current = None
                running.retire()


class _RunningCluster:
    """A running cluster, how many calls use it, and the clock that runs while none does."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        self.devices = devices
        self.n_users = 0
        self._retired = False
        self._idle_timer: threading.Timer | None = None
        self.cluster = LocalDeviceCluster(list(devices))
        try:
            # Not the current client: the user's own dask calls are none of ours.
            self.client = Client(self.cluster, set_as_default=False)
        except BaseException:
            self.cluster.close()
            raise

    def is_usable(self) -> bool:
        """Whether the cluster can still be used; the scheduler or a nanny may have been ended by others."""
        return self.client.status == "running" and self.cluster.is_healthy

    def add_user(self) -> None:
        self.n_users += 1
        self._cancel_idle_timer()

    def remove_user(self) -> None:
        self.n_users -= 1
        self._close_if_unused()

    def retire(self) -> None:
        """No call will enter any more."""
        self._retired = True
        self._close_if_unused()

    def start_idle_timer(self, seconds: float, on_idle: Callable[[], None]) -> None:
        self._cancel_idle_timer()
        self._idle_timer = threading.Timer(seconds, on_idle)
        self._idle_timer.name = "daskinfer-idle"
        self._idle_timer.daemon = True
        self._idle_timer.start()

    def _cancel_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _close_if_unused(self) -> None:
        if self._retired and self.n_users == 0:
            self._cancel_idle_timer()
            shared_memory.close_cached_pool(self.client)
            result_pool.release()
            try:
                self.client.close()
            finally:
                self.cluster.close()


default_cluster = DefaultCluster()
atexit.register(default_cluster.close)
os.register_at_fork(after_in_child=default_cluster.reset_after_fork)
