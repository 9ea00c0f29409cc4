"""What each device of a run did, added up event by event."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daskinfer.core.chunks import BatchConfig, ChunkStats, RowFailure
from daskinfer.diagnostics.device_stats import (
    DeviceReport,
    DeviceStatus,
    DeviceTable,
    RollingThroughput,
    merge_devices,
)
from daskinfer.diagnostics.events import ChunkDone, ChunkFailed, ChunkStarted, PlannedDevice, RunStarted


def done(start: int, stop: int, *, n_failed: int = 0, device: str = "cpu:0", **stats: float) -> ChunkDone:
    """A chunk is done, except for its first rows, which failed."""
    given = {"batch_size": 4, "seconds": 1.0, "worker": "w", "began": 11.0} | stats
    failures = (RowFailure(start, start + n_failed, device, "ValueError: no"),) if n_failed else ()
    return ChunkDone("a", 12.0, start, stop, device, ChunkStats(start, stop, device, "EPYC", **given), failures, 1)  # type: ignore[arg-type]


def table(*devices: str) -> DeviceTable:
    """The devices of a run that has begun."""
    found = DeviceTable()
    planned = tuple(PlannedDevice(device, "", "cpu", 1 / len(devices)) for device in devices)
    found(RunStarted("a", 10.0, "Net", (), (), (0, 100), (), BatchConfig(8), planned))
    return found


def test_chunks_add_up_by_the_rules_of_the_fields() -> None:
    """Seconds are summed; memory, batch size and times are the largest, the smallest, and the first and last."""
    devices = table("cpu:0")
    devices(done(0, 8, read_seconds=0.5, peak_nbytes=3, batch_size=8, read_began=20.0, ended=24.0))
    devices(done(8, 16, read_seconds=0.25, peak_nbytes=2, batch_size=4, read_began=15.0, ended=23.0, n_failed=3))
    (report,) = devices.make_reports()
    assert (report.n_chunks, report.n_rows, report.seconds, report.read_seconds) == (2, 13, 2.0, 0.75)
    assert (report.peak_nbytes, report.batch_size, report.began, report.ended) == (3, 4, 15.0, 24.0)


def test_an_abandoned_chunk_has_no_times() -> None:
    """A chunk that was given up, which has no times and no batch size, changes neither."""
    devices = table("cpu:0")
    devices(done(0, 8, read_began=20.0, ended=24.0))
    devices(done(8, 16, began=0.0, seconds=0.0, batch_size=0, n_failed=8))
    (report,) = devices.make_reports()
    assert (report.began, report.ended, report.batch_size, report.n_rows, report.n_chunks) == (20.0, 24.0, 4, 8, 2)


@given(st.lists(st.tuples(st.sampled_from(["cpu:0", "cpu:1"]), st.booleans()), max_size=20))
def test_the_report_and_the_status_have_the_same_counts(chunks: list[tuple[str, bool]]) -> None:
    """Both are views of one accumulator: rows that need no more work are those with a result and those that failed."""
    devices = table("cpu:0", "cpu:1")
    for i, (device, fails) in enumerate(chunks):
        devices(ChunkStarted("a", 11.0, 8 * i, 8 * i + 8, device))
        if fails:
            devices(ChunkFailed("a", 11.0, 8 * i, 8 * i + 8, device, "ValueError: no"))
            devices(ChunkStarted("a", 11.0, 8 * i, 8 * i + 8, device))
        devices(done(8 * i, 8 * i + 8, n_failed=int(fails), device=device))
    for report, status in zip(devices.make_reports(), devices.make_statuses(13.0), strict=True):
        assert (report.device, report.n_rows, report.n_retried) == (
            status.device,
            status.n_rows - status.n_failed,
            status.n_retried,
        )
        assert status.n_in_flight == 0
    assert sum(status.done_share for status in devices.make_statuses(13.0)) == pytest.approx(1.0 if chunks else 0.0)


def test_a_device_outside_the_plan_joins_at_the_end() -> None:
    """Its kind is read off its name; no share was requested of it."""
    devices = table("cpu:0")
    devices(ChunkStarted("a", 11.0, 0, 8, "cuda:1"))
    joined = devices.make_statuses(12.0)[1]
    assert (joined.device, joined.kind, joined.asked_share, joined.n_in_flight) == ("cuda:1", "cuda", None, 1)


def test_several_devices_as_one() -> None:
    """Counts, rows/s and shares are summed, the batch size is the largest; every number has a rule."""
    first = DeviceStatus("cpu:0", "EPYC", "cpu", 8, 1, 2, 3, 4.0, 0.5, 0.25, 16, "gone")
    second = DeviceStatus("cpu:1", "EPYC", "cpu", 10, 0, 1, 1, 2.0, 0.25, 0.5, 32, "")
    merged = merge_devices([first, second], "others")
    assert merged == DeviceStatus("others", "2 devices", "", 18, 1, 3, 4, 6.0, 0.75, 0.75, 32, "")
    assert {one.name for one in fields(DeviceStatus) if not one.metadata} == {"device", "label", "kind", "state", "n_cores"}
    unasked = replace(first, asked_share=None)
    assert merge_devices([unasked, unasked], "others").asked_share is None
    assert merge_devices([unasked, second], "others").asked_share == second.asked_share


def test_totals_are_named_like_the_stats_of_chunks() -> None:
    """A field of the report with a rule names a field of a chunk's stats, so that it is added up without further code."""
    sources = {one.metadata.get("source", one.name) for one in fields(DeviceReport) if one.metadata}
    assert sources <= {one.name for one in fields(ChunkStats)}


def test_throughput_before_the_start() -> None:
    """Rows/s are 0 before anything was sent, and at that moment."""
    throughput = RollingThroughput()
    assert throughput.compute_rows_per_second(1.0) == 0.0
    throughput.start(2.0)
    throughput.start(3.0)  # changes nothing
    throughput.add(4.0, 8)
    assert (throughput.compute_rows_per_second(2.0), throughput.compute_rows_per_second(4.0)) == (0.0, 4.0)


def test_warming_up_is_what_the_first_call_took_beyond_the_others() -> None:
    """The first micro-batch is compared with the mean of the others; without others, nothing is known."""
    devices = table("cpu:0")
    devices(done(0, 4, seconds=3.0, first_call_seconds=3.0))
    assert devices.make_reports()[0].warm_up_seconds == 0.0
    devices(done(4, 12, seconds=1.0))
    assert devices.make_reports()[0].warm_up_seconds == pytest.approx(2.5)
