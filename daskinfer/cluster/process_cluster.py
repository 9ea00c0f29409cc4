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
from daskinfer.execution.result_buffers import results
from daskinfer.transport import shared_memory

IDLE_SECONDS = 600.0  # as long as somebody in a notebook thinks about the next cell; arbitrary


class KeptCluster:
    """At most one cluster and its client, by the devices that were asked for.

    Note: threads share it. The lock guards who has it; it is held while a cluster starts, not while one computes. A cluster
    that a call still uses is never ended by another call or the clock: the last to leave ends it.
    """

    def __init__(self, idle_seconds: float = IDLE_SECONDS) -> None:
        self.idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._current: _Started | None = None
        self._of_parent: _Started | None = None

    @contextlib.contextmanager
    def client(self, devices: Sequence[str]) -> Iterator[Client]:
        """A client of the kept cluster of these devices, started if need be."""
        started = self._enter(tuple(devices))
        try:
            yield started.client
        finally:
            self._leave(started)

    def has(self, devices: Sequence[str]) -> bool:
        """Whether a cluster of these devices is there and can be used."""
        with self._lock:
            return self._current is not None and self._current.devices == tuple(devices) and self._current.alive()

    def close(self) -> None:
        """End the cluster now, or as soon as the calls that use it have ended."""
        with self._lock:
            started, self._current = self._current, None
            if started is not None:
                started.retire()

    def forget(self) -> None:
        """After a fork: the parent's cluster is not the child's, and the client's end would be told to its scheduler."""
        self._lock = threading.Lock()
        self._of_parent, self._current = self._current, None

    def _enter(self, devices: tuple[str, ...]) -> _Started:
        with self._lock:
            current = self._current
            if current is not None and (current.devices != devices or not current.alive()):
                current.retire()
                current = None
            self._current = current = current or _Started(devices)
            current.enter()
            return current

    def _leave(self, started: _Started) -> None:
        with self._lock:
            started.leave()
            if started is self._current and started.n_users == 0:
                started.watch(self.idle_seconds, lambda: self._idle(started))

    def _idle(self, started: _Started) -> None:
        with self._lock:
            if started is self._current and started.n_users == 0:
                self._current = None
                started.retire()


class _Started:
    """A running cluster, how many calls use it, and the clock that runs while none does."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        self.devices = devices
        self.n_users = 0
        self._retired = False
        self._clock: threading.Timer | None = None
        self.cluster = LocalDeviceCluster(list(devices))
        try:
            # Not the current client: the user's own dask calls are none of ours.
            self.client = Client(self.cluster, set_as_default=False)
        except BaseException:
            self.cluster.close()
            raise

    def alive(self) -> bool:
        """Whether the cluster can still be used; the scheduler or a nanny may have been ended by others."""
        return self.client.status == "running" and self.cluster.whole

    def enter(self) -> None:
        self.n_users += 1
        self._stop_clock()

    def leave(self) -> None:
        self.n_users -= 1
        self._end_if_unused()

    def retire(self) -> None:
        """No call will enter any more."""
        self._retired = True
        self._end_if_unused()

    def watch(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop_clock()
        self._clock = threading.Timer(seconds, then)
        self._clock.name = "daskinfer-idle"
        self._clock.daemon = True
        self._clock.start()

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _end_if_unused(self) -> None:
        if self._retired and self.n_users == 0:
            self._stop_clock()
            shared_memory.release(self.client)
            results.release()
            try:
                self.client.close()
            finally:
                self.cluster.close()


kept = KeptCluster()
atexit.register(kept.close)
os.register_at_fork(after_in_child=kept.forget)
