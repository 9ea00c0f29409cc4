"""Fixtures of the tests that run tasks in this process, which then is the worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from daskinfer.transport.shared_memory import RESULT_HEADER_NBYTES, SharedMemoryPool
from daskinfer.worker import device_thread
from daskinfer.worker.current_device import current_device
from daskinfer.worker.loaded_models import model_cache


@pytest.fixture
def clean_worker() -> Iterator[None]:
    """End this process's device thread and drop its models after the test."""
    yield
    device_thread.close_device_thread(current_device().worker)
    model_cache.clear()


@pytest.fixture
def pool() -> Iterator[SharedMemoryPool]:
    """Shared memory of one slot that holds two arrays of 20 numbers."""
    made = SharedMemoryPool(RESULT_HEADER_NBYTES + 4096, 1)
    yield made
    made.close()
