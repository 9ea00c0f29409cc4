"""The one thread of a worker that computes, chunk after chunk, in the order in which their rows are there.

A worker has several tasks at once: one reads, one computes, one writes. All computing is done in one thread: torch keeps
its number of threads and its pool of them per thread, the allocator finds the memory of the last chunk again, and a device
is never asked by two. While a chunk is read and nothing else is there to compute, the device waits; how long is counted.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class DeviceThread:
    """Runs one thing at a time, first come, first served.

    Note: the worker's threads share it; ``run`` blocks until it is done. The thread starts with the first thing to run.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="daskinfer-device")
        self._idle_since = time.perf_counter()

    def run(self, compute: Callable[[], T], arrived_at: float) -> tuple[T, float]:
        """What ``compute()`` gives, and for how many seconds the device stood still before it.

        ``there_since`` is when the task came to the worker, by ``time.perf_counter()``: earlier it was not this task that
        the device waited for.
        """
        # In the task's own context: distributed.get_worker() works inside a network.
        return self._executor.submit(contextvars.copy_context().run, self._run_timed, compute, arrived_at).result()

    def _run_timed(self, compute: Callable[[], T], arrived_at: float) -> tuple[T, float]:
        waited = max(0.0, time.perf_counter() - max(self._idle_since, arrived_at))
        try:
            return compute(), waited
        finally:
            self._idle_since = time.perf_counter()

    def close(self) -> None:
        """End the thread once it has nothing more to do."""
        self._executor.shutdown(wait=False)


_device_threads: dict[str, DeviceThread] = {}
_lock = threading.Lock()


def get_device_thread(address: str) -> DeviceThread:
    """The device thread of a worker, made when it is first asked for; several workers may live in one process."""
    with _lock:
        return _device_threads.setdefault(address, DeviceThread())


def close_device_thread(address: str) -> None:
    """End the device thread of a worker, if it has one."""
    with _lock:
        thread = _device_threads.pop(address, None)
    if thread is not None:
        thread.close()
