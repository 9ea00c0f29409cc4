from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from daskinfer.scheduling import throughput_history
from daskinfer.scheduling.throughput_history import MAX_RECORDS, PerformanceHistory, PerformanceRecord


def test_what_was_noted_is_found_again() -> None:
    """A record that was written is there under its key, and under no other."""
    memory = PerformanceHistory()
    memory.get_or_create("net").batch_sizes["cpu"] = 64
    assert memory.get_or_create("net") == PerformanceRecord({}, {"cpu": 64})
    assert memory.get_or_create("other") == PerformanceRecord()


def test_records_are_not_shared() -> None:
    """Two new records are two, so that what one network did is not told of another."""
    memory = PerformanceHistory()
    memory.get_or_create("a").speeds["inline"] = 1.0
    assert memory.get_or_create("b").speeds == {}


def test_those_used_last_are_kept() -> None:
    """Of more networks than are remembered, those that were not asked for longest are forgotten."""
    memory = PerformanceHistory()
    for number in range(MAX_RECORDS):
        memory.get_or_create(number).speeds["inline"] = float(number)
    memory.get_or_create(0)
    memory.get_or_create("new")
    assert memory.get_or_create(0).speeds == {"inline": 0.0}
    assert memory.get_or_create(1).speeds == {}


def test_clear_forgets_everything() -> None:
    """After ``clear`` nothing is known."""
    memory = PerformanceHistory()
    memory.get_or_create("net").speeds["inline"] = 1.0
    memory.clear()
    assert memory.get_or_create("net") == PerformanceRecord()


def test_threads_share_one_record() -> None:
    """Threads that ask for one key at once get one record."""
    memory = PerformanceHistory()
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(lambda i: memory.get_or_create(i % 2), range(200)))
    assert len({id(record) for record in records}) == 2


def test_a_process_has_one_memory() -> None:
    """What one call has measured, the next one finds."""
    assert isinstance(throughput_history.history, PerformanceHistory)
