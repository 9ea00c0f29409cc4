"""What a process remembers of the models that it ran, and for how long."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from daskinfer.scheduling import throughput_history
from daskinfer.scheduling.throughput_history import MAX_RECORDS, PerformanceHistory, PerformanceRecord


def test_a_record_is_found_again() -> None:
    """A record stays under its key, and no other key shows it."""
    history = PerformanceHistory()
    history.get_or_create("model").batch_sizes["cpu"] = 64
    assert history.get_or_create("model") == PerformanceRecord({}, {"cpu": 64})
    assert history.get_or_create("other") == PerformanceRecord()


def test_records_are_not_shared() -> None:
    """New records share nothing, so that the figures of one model do not appear under another."""
    history = PerformanceHistory()
    history.get_or_create("a").speeds["inline"] = 1.0
    assert history.get_or_create("b").speeds == {}


def test_the_least_recently_used_record_is_dropped() -> None:
    """Beyond ``MAX_RECORDS`` the record that was used longest ago goes."""
    history = PerformanceHistory()
    for number in range(MAX_RECORDS):
        history.get_or_create(number).speeds["inline"] = float(number)
    history.get_or_create(0)
    history.get_or_create("new")
    assert history.get_or_create(0).speeds == {"inline": 0.0}
    assert history.get_or_create(1).speeds == {}


def test_clear_deletes_all_records() -> None:
    """After ``clear`` every record is a new one."""
    history = PerformanceHistory()
    history.get_or_create("model").speeds["inline"] = 1.0
    history.clear()
    assert history.get_or_create("model") == PerformanceRecord()


def test_threads_share_one_record() -> None:
    """Threads that use one key at once get the same record."""
    history = PerformanceHistory()
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(lambda i: history.get_or_create(i % 2), range(200)))
    assert len({id(record) for record in records}) == 2


def test_a_process_has_one_history() -> None:
    """The module holds the history that all calls of the process share."""
    assert isinstance(throughput_history.history, PerformanceHistory)
