"""The status of a run, from its events."""

from __future__ import annotations

import pytest

from daskinfer.core.chunks import BatchConfig, ChunkStats, RowFailure
from daskinfer.diagnostics.device_stats import THROUGHPUT_WINDOW_SECONDS
from daskinfer.diagnostics.events import (
    BatchSizeChosen,
    BatchTuningStarted,
    ChunkDone,
    ChunkFailed,
    ChunkStarted,
    DeviceChanged,
    Event,
    PlannedDevice,
    RunEnded,
    RunStarted,
)
from daskinfer.diagnostics.status import StatusTracker, format_devices, format_progress

DEVICES = (PlannedDevice("cuda:0", "L4", "cuda", 0.75), PlannedDevice("cpu:0", "", "cpu", 0.25))


def done(start: int, stop: int, at: float, device: str = "cuda:0", n_failed: int = 0) -> ChunkDone:
    """Rows ``start:stop`` are done, except for the first ``n_failed``, which failed."""
    failures = (RowFailure(start, start + n_failed, device, "ValueError: no"),) if n_failed else ()
    return ChunkDone(
        "a", at, start, stop, device, ChunkStats(start, stop, device, "EPYC", 4, 1.0, "w", began=1.0), failures, 1
    )


def standing(*events: Event, n_before: int = 0) -> StatusTracker:
    """A run of 100 rows in which this happened."""
    found = StatusTracker()
    found(RunStarted("a", 10.0, "Net", ("x",), ("y",), (0, 100), ((0, n_before),), BatchConfig(8), DEVICES))
    for event in events:
        found(event)
    return found


def test_before_the_first_chunk() -> None:
    """Throughput and time are unknown until a chunk has been sent."""
    status = standing(n_before=20).get_status(11.0)
    assert (status.n_done, status.n_rows, status.seconds, status.seconds_left) == (20, 100, None, None)
    assert [(d.device, d.asked_share, d.done_share) for d in status.devices] == [("cuda:0", 0.75, 0.0), ("cpu:0", 0.25, 0.0)]


def test_while_the_batch_size_is_tuned() -> None:
    """Between the start of the workers and the first chunk, the text tells what takes the time."""
    assert format_progress(standing().get_status(11.0)) == ["starting workers"]
    tried = standing(BatchTuningStarted("a", 11.0))
    assert format_progress(tried.get_status(12.0)) == ["tuning batch size"]
    tried(BatchSizeChosen("a", 13.0, BatchConfig(16, {})))
    tried(ChunkStarted("a", 13.0, 0, 10, "cuda:0"))
    assert "tuning batch size" not in format_progress(tried.get_status(14.0))


def test_rows_speed_and_what_is_left() -> None:
    """Rows/s and the time left follow from what was done since the first chunk was sent."""
    events = [ChunkStarted("a", 12.0, 0, 30, "cuda:0"), ChunkStarted("a", 12.0, 30, 40, "cpu:0")]
    status = standing(*events, done(0, 30, 14.0), done(30, 40, 14.0, "cpu:0", n_failed=2)).get_status(16.0)
    assert (status.n_done, status.n_failed, status.seconds) == (40, 2, 4.0)
    assert (status.rows_per_second, status.seconds_left) == (10.0, 6.0)
    cuda, cpu = status.devices
    assert (cuda.n_rows, cuda.rows_per_second, cuda.done_share, cuda.batch_size) == (30, 7.5, 0.75, 4)
    assert (cpu.n_failed, cpu.n_in_flight, cpu.label) == (2, 0, "EPYC")


def test_throughput_is_recent() -> None:
    """A device that has slowed down shows, since what was long ago does not count."""
    events: list[Event] = [ChunkStarted("a", 0.0, 0, 1, "cuda:0")]
    events += [done(i, i + 10, i / 10) for i in range(0, 50, 10)]  # 10 rows/s for 5 s
    events += [done(i, i + 1, i - 49 + 5.0) for i in range(50, 80)]  # then 1 row/s for 30 s
    assert standing(*events).get_status(35.0).rows_per_second == pytest.approx(1.0, rel=2 / THROUGHPUT_WINDOW_SECONDS)


def test_a_failed_attempt_is_not_in_flight() -> None:
    """Chunks in flight are those that were sent and have neither succeeded nor failed."""
    sent = [ChunkStarted("a", 1.0, i, i + 1, "cpu:0") for i in range(3)]
    found = standing(
        *sent, ChunkFailed("a", 2.0, 0, 1, "cpu:0", "OSError: no"), DeviceChanged("a", 2.0, "cpu:0", "replaced")
    )
    cpu = found.get_status(3.0).devices[1]
    assert (cpu.n_in_flight, cpu.n_retried, cpu.state, found.get_status(3.0).n_retried) == (2, 1, "replaced", 1)


@pytest.mark.parametrize(
    ("state", "label"), [("restarting", "restarting"), ("replaced", "worker restarted"), ("gone", "lost")]
)
def test_states_have_labels(state: str, label: str) -> None:
    """People read what became of a device; programs read the value of the event."""
    status = standing(DeviceChanged("a", 2.0, "cpu:0", state)).get_status(3.0)
    assert (status.devices[1].state, format_devices(status)[1][1][-1]) == (state, label)


def test_what_was_given_up_is_not_counted_twice() -> None:
    """A chunk that is given up after its last attempt failed is subtracted from those in flight only once."""
    given_up = ChunkDone("a", 3.0, 0, 1, "cpu:0", ChunkStats(0, 1, "cpu:0", "", 0, 0.0, ""), (), 1)
    found = standing(ChunkStarted("a", 1.0, 0, 1, "cpu:0"), ChunkFailed("a", 2.0, 0, 1, "cpu:0", "OSError: no"), given_up)
    cpu = found.get_status(4.0).devices[1]
    assert (cpu.n_in_flight, cpu.n_rows, found.get_status(4.0).n_done) == (0, 1, 1)


def test_devices_and_batch_sizes_that_came_later() -> None:
    """This process computes first if no device was named, and the batch size may be tuned while the run goes on."""
    status = standing(BatchSizeChosen("a", 1.0, BatchConfig(16, {})), ChunkStarted("a", 2.0, 0, 1, "inline")).get_status(3.0)
    assert status.batch_size == 16
    assert [(d.device, d.kind, d.n_in_flight) for d in status.devices][2:] == [("inline", "inline", 1)]


def test_an_ended_run_stands_still() -> None:
    """Once it has ended, its seconds and throughput are those of its end, and nothing is in flight."""
    found = standing(ChunkStarted("a", 1.0, 0, 1, "cpu:0"), RunEnded("a", 3.0, "ChunkError: no"))
    status = found.get_status(100.0)
    assert (status.ended, status.error, status.seconds, status.devices[1].n_in_flight) == (True, "ChunkError: no", 2.0, 0)


def test_nothing_to_do_at_once() -> None:
    """A run without rows has no throughput, and nothing is divided by zero."""
    found = StatusTracker()
    assert found.get_status(0.0).rows_per_second == 0.0


def test_what_is_waited_for_if_nothing_moves() -> None:
    """After unusually long without a result, the text names the devices that have work, and those that restart."""
    found = standing(
        ChunkStarted("a", 10.0, 0, 10, "cuda:0"),
        ChunkStarted("a", 10.0, 10, 20, "cpu:0"),
        DeviceChanged("a", 12.0, "cpu:0", "restarting"),
    )
    assert format_progress(found.get_status(20.0))[-1] == "cpu:0 restarting"
    said = "no result for 0:11: waiting for cuda:0 (1 in flight) and cpu:0 (restarting, 1 in flight)"
    assert format_progress(found.get_status(21.0))[-1] == said
    found(done(0, 10, 30.0))
    assert "no result" not in ", ".join(format_progress(found.get_status(69.0)))  # chunks take 20 s here
    assert format_progress(found.get_status(71.0))[-1].startswith("no result for 0:41: waiting for cpu:0")
    found(RunEnded("a", 72.0, ""))
    assert "no result" not in ", ".join(format_progress(found.get_status(99.0)))


def test_many_devices_are_not_all_named() -> None:
    """Of many devices that are waited for, a few are named and the others counted."""
    found = standing(*[ChunkStarted("a", 10.0, i, i + 1, f"cpu:{i}") for i in range(9)])
    assert format_progress(found.get_status(30.0))[-1].endswith("cpu:3 (1 in flight) and 5 more")


def test_workers_that_are_not_needed_are_not_shown() -> None:
    """While this process computes, idle workers have no line, unless a share was requested of them."""
    planned = tuple(PlannedDevice(f"cpu:{i}", "", "cpu", None) for i in range(2))
    found = StatusTracker()
    found(RunStarted("a", 10.0, "Net", ("x",), ("y",), (0, 100), (), BatchConfig(8), planned, n_cores=4))
    headers, lines = format_devices(found.get_status(10.5))
    assert [line[0] for line in lines] == ["cpu:0", "cpu:1"]
    assert "requested" not in headers
    found(ChunkStarted("a", 11.0, 0, 10, "inline"))
    assert [line[0] for line in format_devices(found.get_status(11.5))[1]] == ["this process (all 4 cores)"]
    found(ChunkStarted("a", 12.0, 10, 20, "cpu:1"))
    assert [line[0] for line in format_devices(found.get_status(12.5))[1]] == ["cpu:1", "this process (all 4 cores)"]
    assert "requested" in format_devices(standing().get_status(11.0))[0]
