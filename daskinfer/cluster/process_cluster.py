"""The default cluster of this process, reused between calls.

Starting workers and importing torch in them takes seconds, so the first call without a client starts a cluster and later
calls reuse it. It is closed by ``di.close()``, after ``IDLE_SECONDS`` without a call, when a call requests other devices,
and when the process exits.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence

from distributed import Client

from daskinfer.cluster.local import LocalDeviceCluster
from daskinfer.transport import shared_memory

IDLE_SECONDS = 600.0  # how long someone may think about the next cell of a notebook; arbitrary


class DefaultCluster:
    """At most one cluster with its client, identified by the requested devices.

    Note: threads share it. The lock guards which cluster is current and how many calls use it; it is held while a cluster
    starts or closes, not while one computes. Neither another call nor the idle timer closes a cluster that a call still
    uses: the last call to finish closes it.
    """

    def __init__(self, idle_seconds: float = IDLE_SECONDS) -> None:
        self.idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._current: _RunningCluster | None = None
        self._parent_cluster: _RunningCluster | None = None
        self._release_callbacks: list[Callable[[], object]] = []

    def add_release_callback(self, callback: Callable[[], object]) -> None:
        """Register a function that releases what is kept for later calls; it runs each time a cluster closes.

        It runs before the client and the cluster close, while the lock is held: it must not call this object.
        """
        self._release_callbacks.append(callback)

    @contextlib.contextmanager
    def acquire_client(self, devices: Sequence[str]) -> Iterator[Client]:
        """Yield a client of the cluster of these devices; start one if none is running."""
        running = self._acquire(tuple(devices))
        try:
            yield running.client
        finally:
            self._release(running)

    def is_running(self, devices: Sequence[str]) -> bool:
        """Whether a cluster of these devices is running and usable."""
        with self._lock:
            return self._current is not None and self._current.devices == tuple(devices) and self._current.is_usable()

    def close(self) -> None:
        """Close the cluster now, or as soon as the calls that use it finish."""
        with self._lock:
            running, self._current = self._current, None
            if running is not None:
                running.retire()

    def reset_after_fork(self) -> None:
        """Forget the parent's cluster in a forked child.

        The object is kept: closing its client, as garbage collection would, tells the parent's scheduler to drop it.
        """
        self._lock = threading.Lock()
        self._parent_cluster, self._current = self._current, None

    def _acquire(self, devices: tuple[str, ...]) -> _RunningCluster:
        with self._lock:
            current = self._current
            if current is not None and (current.devices != devices or not current.is_usable()):
                current.retire()
                current = None
            self._current = current = current or _RunningCluster(devices, self._release_callbacks)
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
    """A running cluster, the number of calls that use it, and the idle timer that runs while there are none."""

    def __init__(self, devices: tuple[str, ...], release_callbacks: Sequence[Callable[[], object]]) -> None:
        self.devices = devices
        self._release_callbacks = release_callbacks
        self.n_users = 0
        self._retired = False
        self._idle_timer: threading.Timer | None = None
        self.cluster = LocalDeviceCluster(list(devices))
        try:
            # Not as Dask's current client: the user's own Dask calls must not run here.
            self.client = Client(self.cluster, set_as_default=False)
        except BaseException:
            self.cluster.close()
            raise

    def is_usable(self) -> bool:
        """Whether the cluster can still be used: the scheduler or a nanny may have been killed."""
        return self.client.status == "running" and self.cluster.is_healthy

    def add_user(self) -> None:
        self.n_users += 1
        self._cancel_idle_timer()

    def remove_user(self) -> None:
        self.n_users -= 1
        self._close_if_unused()

    def retire(self) -> None:
        """Accept no further calls, and close once no call is left."""
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
            with contextlib.ExitStack() as stack:  # in reverse: the cluster closes last, even if releasing fails
                stack.callback(self.cluster.close)
                stack.callback(self.client.close)
                for callback in self._release_callbacks:
                    stack.callback(callback)
                stack.callback(shared_memory.close_cached_pool, self.client)


default_cluster = DefaultCluster()
atexit.register(default_cluster.close)
os.register_at_fork(after_in_child=default_cluster.reset_after_fork)
