from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from daskinfer.scheduling import throughput_history
from daskinfer.scheduling.throughput_history import MAX_KNOWN, Known, Memory


def test_what_was_noted_is_found_again() -> None:
    """A record that was written is there under its key, and under no other."""
    memory = Memory()
    memory.of("net").batch_sizes["cpu"] = 64
    assert memory.of("net") == Known({}, {"cpu": 64})
    assert memory.of("other") == Known()


def test_records_are_not_shared() -> None:
    """Two new records are two, so that what one network did is not told of another."""
    memory = Memory()
    memory.of("a").speeds["inline"] = 1.0
    assert memory.of("b").speeds == {}


def test_those_used_last_are_kept() -> None:
    """Of more networks than are remembered, those that were not asked for longest are forgotten."""
    memory = Memory()
    for number in range(MAX_KNOWN):
        memory.of(number).speeds["inline"] = float(number)
    memory.of(0)
    memory.of("new")
    assert memory.of(0).speeds == {"inline": 0.0}
    assert memory.of(1).speeds == {}


def test_clear_forgets_everything() -> None:
    """After ``clear`` nothing is known."""
    memory = Memory()
    memory.of("net").speeds["inline"] = 1.0
    memory.clear()
    assert memory.of("net") == Known()


def test_threads_share_one_record() -> None:
    """Threads that ask for one key at once get one record."""
    memory = Memory()
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(lambda i: memory.of(i % 2), range(200)))
    assert len({id(record) for record in records}) == 2


def test_a_process_has_one_memory() -> None:
    """What one call has measured, the next one finds."""
    assert isinstance(throughput_history.memory, Memory)
