"""The queue of one device."""

from __future__ import annotations

from daskinfer.execution.device_queue import DeviceQueue
from daskinfer.transport.shared_memory import SharedMemoryPool, compute_slot_nbytes


def test_a_queue_is_full_by_tasks_and_not_by_slots() -> None:
    """No more tasks are in flight than are allowed; without a free slot the results come back through Dask's comms."""
    pool = SharedMemoryPool(compute_slot_nbytes(100), 1)
    assert not DeviceQueue(0, "cpu:0", "cpu", {}, 1, pool).is_full
    assert DeviceQueue(0, "cpu:0", "cpu", {}, 0, pool).is_full
    pool.free_slots.clear()
    assert not DeviceQueue(0, "cpu:0", "cpu", {}, 1, pool).is_full
    pool.close()
