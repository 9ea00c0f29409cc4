"""The one thread of a worker that computes, chunk after chunk, in the order in which their rows arrive.

A worker has several tasks at once: one reads, one computes, one writes. All computing is done in one thread, because torch
keeps the number and the pool of its compute threads per calling thread, the allocator reuses the memory of the last chunk,
and no device is used by two threads at a time. The device idles while a chunk is read and no other is ready; that time is
measured.
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
    """Runs one function at a time, first come, first served.

    Note: the worker's threads share it; ``run`` blocks until its function is done. The thread starts with the first
    function.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="daskinfer-device")
        self._idle_since = time.perf_counter()

    def run(self, compute: Callable[[], T], arrived_at: float) -> tuple[T, float]:
        """Return the result of ``compute()``, and for how many seconds the device idled before it.

        ``arrived_at`` is when the task arrived at the worker, by ``time.perf_counter()``; before that, the device did not
        wait for this task.
        """
        # In the task's own context, so that distributed.get_worker() works inside a model.
        return self._executor.submit(contextvars.copy_context().run, self._run_timed, compute, arrived_at).result()

    def _run_timed(self, compute: Callable[[], T], arrived_at: float) -> tuple[T, float]:
        waited_seconds = max(0.0, time.perf_counter() - max(self._idle_since, arrived_at))
        try:
            return compute(), waited_seconds
        finally:
            self._idle_since = time.perf_counter()

    def close(self) -> None:
        """End the thread once it has run everything that is queued."""
        self._executor.shutdown(wait=False)


_device_threads: dict[str, DeviceThread] = {}
_lock = threading.Lock()


def get_device_thread(address: str) -> DeviceThread:
    """Return the device thread of a worker, made on first use; several workers may share one process."""
    with _lock:
        return _device_threads.setdefault(address, DeviceThread())


def close_device_thread(address: str) -> None:
    """End the device thread of a worker, if it has one."""
    with _lock:
        thread = _device_threads.pop(address, None)
    if thread is not None:
        thread.close()
