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
        self._ended = time.perf_counter()

    def run(self, compute: Callable[[], T], there_since: float) -> tuple[T, float]:
        """What ``compute()`` gives, and for how many seconds the device stood still before it.

        ``there_since`` is when the task came to the worker, by ``time.perf_counter()``: earlier it was not this task that
        the device waited for.
        """
        # In the task's own context: distributed.get_worker() works inside a network.
        return self._executor.submit(contextvars.copy_context().run, self._run, compute, there_since).result()

    def _run(self, compute: Callable[[], T], there_since: float) -> tuple[T, float]:
        waited = max(0.0, time.perf_counter() - max(self._ended, there_since))
        try:
            return compute(), waited
        finally:
            self._ended = time.perf_counter()

    def close(self) -> None:
        """End the thread once it has nothing more to do."""
        self._executor.shutdown(wait=False)


_threads: dict[str, DeviceThread] = {}
_lock = threading.Lock()


def of_worker(address: str) -> DeviceThread:
    """The device thread of a worker, made when it is first asked for; several workers may live in one process."""
    with _lock:
        return _threads.setdefault(address, DeviceThread())


def close(address: str) -> None:
    """End the device thread of a worker, if it has one."""
    with _lock:
        thread = _threads.pop(address, None)
    if thread is not None:
        thread.close()
