import dataclasses
import json
import pickle
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest

import daskinfer as di
from daskinfer.core.chunks import BatchConfig, ChunkStats, RowFailure
from daskinfer.diagnostics.device_stats import DeviceReport
from daskinfer.diagnostics.events import (
    BatchSizeChosen,
    ChunkDone,
    ChunkFailed,
    DeviceChanged,
    PlannedDevice,
    RunStarted,
)
from daskinfer.diagnostics.report import RunAggregator, RunReport

CURE = "pass more rows per call, use fewer devices, or stop other work on them"


def stats_of(start: int, stop: int, device: str = "cuda:0", seconds: float = 1.0) -> ChunkStats:
    """The stats of a chunk of rows start:stop."""
    return ChunkStats(start, stop, device, f"<{device}>", batch_size=8, seconds=seconds, worker="tcp://worker:1")


def started(shares: dict[str, float]) -> RunAggregator:
    """An aggregator of a run that has begun on devices with these shares."""
    aggregator = RunAggregator()
    devices = tuple(PlannedDevice(name, "", name.partition(":")[0], share) for name, share in shares.items())
    look = ("x: (100,) float32",), ("y: (100,) float32",)
    aggregator(RunStarted("a", 0.0, "Net", *look, (0, 100), (), BatchConfig(8), devices))
    return aggregator


def done(stats: ChunkStats, failures: Sequence[RowFailure] = ()) -> ChunkDone:
    """The event of a chunk that is done."""
    return ChunkDone("a", 1.0, stats.start, stats.stop, stats.device, stats, tuple(failures), 1)


def summed(chunks: list[ChunkStats], shares: dict[str, float], seconds: float) -> RunReport:
    """The report of these chunks."""
    aggregator = started(shares)
    for one in chunks:
        aggregator(done(one))
    return aggregator.make_report(seconds=seconds)


def report() -> RunReport:
    """The report of 100 rows that two devices shared."""
    chunks = [stats_of(0, 60), stats_of(70, 100, "cpu:0", 3.0), stats_of(60, 70, seconds=0.5)]
    return summed(chunks, {"cuda:0": 0.75, "cpu:0": 0.25}, seconds=4.0)


@pytest.mark.parametrize("record", [report(), report().devices[0]])
def test_reports_cross_processes_unchanged(record):
    """Every record survives pickling and cannot be changed."""
    assert pickle.loads(pickle.dumps(record)) == record
    field = next(iter(record.__dataclass_fields__))
    with pytest.raises(FrozenInstanceError, match=field):
        setattr(record, field, None)


def test_a_report_is_plain_for_programs():
    """What goes into JSON has all but the timeline, with rows/s and the verdict."""
    aggregator = started({"cuda:0": 1.0})
    aggregator(BatchSizeChosen("a", 0.5, BatchConfig(16, {"cuda": 16})))
    aggregator(ChunkFailed("a", 0.5, 0, 10, "cuda:0", "ValueError: 0"))
    aggregator(done(stats_of(0, 10), [RowFailure(3, 4, "cuda:0", "ValueError: 3")]))
    found = json.loads(json.dumps(aggregator.make_report(seconds=2.0, facts={"machine": "m"}).to_dict()))
    assert (found["rows"], found["batch_size"]) == (9, 16)
    assert (found["by_kind"], found["failed_rows"], found["n_retried"]) == ({"cuda": 16}, [3], 1)
    assert found["failures"] == [{"start": 3, "stop": 4, "device": "cuda:0", "exception": "ValueError: 3"}]
    assert (found["devices"][0]["rows_per_second"], found["rows_per_second"]) == (9.0, 4.5)
    described = {"model": "Net", "input": "x: (100,) float32", "output": "y: (100,) float32"}
    assert found["facts"] == {**described, "hosts": "worker (cuda:0)", "machine": "m"}
    assert [(mark["device"], mark["kind"], mark["text"]) for mark in found["marks"]] == [
        ("cuda:0", "failed attempt", "rows 0:10: ValueError: 0")
    ]
    assert "timeline" not in found


def test_the_finish_tail():
    """How long the first device that was done waited for the last; devices without a chunk wait for nobody."""
    ended = [
        stats_of(0, 5).with_timing(read_began=1.0, ended=at, read_seconds=0, write_seconds=0, waited_seconds=0)
        for at in (3, 4)
    ]
    other = stats_of(5, 6, "cpu:0").with_timing(read_began=1.0, ended=9.5, read_seconds=0, write_seconds=0, waited_seconds=0)
    assert summed([*ended, other], {"cuda:0": 0.5, "cpu:0": 0.3, "cpu:1": 0.2}, 1.0).tail_seconds == 5.5
    assert summed([], {"cpu:0": 1.0}, 1.0).tail_seconds == 0.0


def test_receipts_are_summed_up_per_device():
    """A report has one record per device in the plan's order, whatever order the chunks came in."""
    first, second = report().devices
    speed = 70 / 1.5 + 30 / 3.0
    assert first == DeviceReport("cuda:0", "<cuda:0>", 2, 70, 1.5, 0.75, 0.7, measured_share=70 / 1.5 / speed, batch_size=8)
    assert second == DeviceReport("cpu:0", "<cpu:0>", 1, 30, 3.0, 0.25, 0.3, measured_share=10 / speed, batch_size=8)
    assert (report().rows, report().batch_size, report().failed_rows) == (100, 8, ())


def test_rows_that_failed_are_listed_and_not_counted():
    """A report lists every failed row in order, its errors as they came, and counts the other rows only."""
    failures = [RowFailure(7, 8, "cpu:0", "ValueError: 7"), RowFailure(2, 4, "cpu:0", "ValueError: 2")]
    aggregator = started({"cpu:0": 1.0})
    aggregator(done(stats_of(0, 10, "cpu:0"), failures))
    found = aggregator.make_report(seconds=1.0)
    assert (found.rows, found.devices[0].n_rows, found.failed_rows) == (7, 7, (2, 3, 7))
    assert found.failures == tuple(failures)
    assert "; 3 rows failed" in str(found)


def test_a_device_that_joined_later_has_no_requested_share():
    """A chunk from a device outside the plan counts, though no share was requested of the device."""
    late = summed([stats_of(0, 5, "cpu:9")], {"cpu:0": 1.0}, seconds=1.0).devices
    assert [(d.device, d.n_rows, d.asked_share) for d in late] == [("cpu:0", 0, 1.0), ("cpu:9", 5, None)]


def test_nothing_done_is_no_division_by_zero():
    """A run without chunks has 0 rows, 0 rows a second and shares of 0."""
    empty = summed([], {"cpu:0": 1.0}, seconds=0.0)
    assert (empty.rows, empty.devices[0].rows_per_second, empty.devices[0].done_share) == (0, 0.0, 0.0)
    assert "0 rows in 0.00 s (0 rows/s)" in str(empty)


def test_a_report_is_read_in_the_terminal():
    """The text is a line per device with requested and done shares, then one line of totals."""
    assert str(report()).splitlines() == [
        "device  name      chunks  rows  rows/s  requested  measured   done",
        "cuda:0  <cuda:0>       2    70      47      75.0%     82.4%  70.0%",
        "cpu:0   <cpu:0>        1    30      10      25.0%     17.6%  30.0%",
        f"100 rows in 4.00 s (25 rows/s), batch size 8; overhead-bound: devices computed 56% of the time; {CURE}",
    ]


def test_a_run_that_had_nothing_to_do_says_so():
    """If earlier calls did all of it, one line says that, in place of a table of zeros, in text and HTML."""
    found = dataclasses.replace(started({"cpu:0": 1.0}).make_report(seconds=0.0), rows_before=5000)
    assert str(found) == "nothing to do: all 5,000 rows were already done"
    assert found._repr_html_() == f"<p>{found}</p>"
    assert found.found_all_done
    assert not report().found_all_done


def test_what_else_is_worth_a_line():
    """A slow startup, batch sizes by kind, failed attempts and a long idle tail make a line, in text and HTML."""
    aggregator = started({"cuda:0": 0.5, "cpu:0": 0.5})
    aggregator(BatchSizeChosen("a", 0.5, BatchConfig(16, {"cuda": 16, "cpu": 4})))
    aggregator(ChunkFailed("a", 0.5, 0, 10, "cuda:0", "ValueError: 0"))
    for device, at in (("cuda:0", 1.0), ("cpu:0", 1.25)):
        times = {"read_began": 0.0, "ended": at, "read_seconds": 0.0, "write_seconds": 0.0, "waited_seconds": 0.0}
        aggregator(done(stats_of(0, 10, device).with_timing(**times)))
    details = "startup 21.6 s; batch size by kind: cuda 16, cpu 4; 1 failed attempt; 0.25 s idle tail"
    found = aggregator.make_report(seconds=2.0, start_seconds=21.61)
    assert str(found).splitlines()[-1] == found.details == details
    assert f"<p>{details}</p>" in found._repr_html_()
    assert "idle tail" not in aggregator.make_report(seconds=2.5).details
    assert "startup" not in aggregator.make_report(seconds=2.0, start_seconds=0.9).details
    aggregator(ChunkFailed("a", 1.5, 0, 10, "cuda:0", "ValueError: 0"))
    assert "; 2 failed attempts" in aggregator.make_report(seconds=2.5).details


@pytest.mark.slow
def test_startup_is_no_part_of_the_throughput():
    """The call that starts workers reports how long that took, separately from the seconds of the rows."""
    x = np.zeros(1000, np.float32)
    _, cold = di.predict(np.negative, x, devices=["cpu"], return_report=True)
    _, warm = di.predict(np.negative, x, devices=["cpu"], return_report=True)
    di.close()
    assert cold.start_seconds > warm.start_seconds > 0.0
    assert cold.start_seconds > cold.seconds


class SlowToLoad:
    """A model that loads for a while, and is slow the first time it is called."""

    def load(self, device: str) -> None:
        time.sleep(0.4)  # stands for reading weights
        self.calls = 0

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        self.calls += 1
        if self.calls == 1:
            time.sleep(0.1)  # stands for compiling
        return rows


def test_loading_and_the_first_call_stand_apart():
    """A call that mostly loads its model is told so; the next call finds the model loaded and warm."""
    model, x = di.Model(SlowToLoad(), version="1"), np.zeros(64, np.float32)
    how = {"devices": "inline", "batch_size": 8, "output": x[:0], "return_report": True}
    _, cold = di.predict(model, x, **how)
    _, warm = di.predict(model, x, **how)
    assert cold.load_seconds >= 0.4
    assert cold.verdict.startswith(f"load-bound: loading took {cold.load_seconds:.1f} of {cold.seconds:.1f} s; ")
    (device,) = cold.devices
    assert device.seconds >= device.first_call_seconds >= device.warm_up_seconds > 0.09
    assert [span.loaded[1] - span.loaded[0] >= 0.4 for span in cold.timeline].count(True) == 1
    assert (warm.load_seconds, warm.first_call_seconds) == (0.0, 0.0)


def test_a_notebook_shows_the_timeline():
    """A report with a timeline has a small picture of it between the table and the verdict."""
    times = {"read_began": 1.0, "ended": 3.0, "read_seconds": 0.5, "write_seconds": 0.0, "waited_seconds": 0.0}
    one = dataclasses.replace(stats_of(0, 10).with_timing(**times), began=2.0)
    assert re.search(r"</table><svg .*</svg><p>10 rows", summed([one], {"cuda:0": 1.0}, 3.0)._repr_html_())
    assert "<svg" not in report()._repr_html_()


def test_a_report_is_escaped_in_html():
    """A device's name that looks like HTML is shown as text in a notebook."""
    page = report()._repr_html_()
    assert "&lt;cuda:0&gt;" in page
    assert "<cuda:0>" not in page
    assert page.endswith(f"{CURE}</p>")


def test_workers_that_were_not_needed_are_not_listed() -> None:
    """If this process was faster, its line is the only one, under the name that people know; programs get all devices."""
    aggregator = RunAggregator()
    planned = tuple(PlannedDevice(f"cpu:{i}", "", "cpu", None) for i in range(2))
    aggregator(RunStarted("a", 0.0, "Net", (), (), (0, 10), (), BatchConfig(8), planned, n_cores=2))
    aggregator(done(stats_of(0, 10, "inline")))
    found = aggregator.make_report(seconds=1.0)
    header, line, _ = str(found).splitlines()
    assert header.split() == ["device", "name", "chunks", "rows", "rows/s", "done"]
    assert line.startswith("this process (all 2 cores)  <inline> ")
    assert [device.device for device in found.devices] == ["cpu:0", "cpu:1", "inline"]
    assert [one["asked_share"] for one in found.to_dict()["devices"]] == [None] * 3
    assert "cpu:0" not in found._repr_html_()


def test_a_device_that_got_nothing_is_listed_if_a_share_was_requested() -> None:
    """A caller who gives weights sees what became of each."""
    text = str(summed([stats_of(0, 10, "cpu:0")], {"cpu:0": 0.5, "cpu:1": 0.5}, seconds=1.0))
    assert "requested" in text.splitlines()[0]
    assert text.splitlines()[2].split()[0] == "cpu:1"


def test_what_went_wrong_is_marked() -> None:
    """Failed attempts, and workers that die, return or are lost, are on the timeline of plot, page and notebook."""
    aggregator = started({"cuda:0": 0.5, "cpu:0": 0.5})
    times = {"read_began": 10.0, "ended": 14.0, "read_seconds": 0.5, "write_seconds": 0.0, "waited_seconds": 0.0}
    aggregator(done(dataclasses.replace(stats_of(0, 10, seconds=3.0).with_timing(**times), began=11.0)))
    aggregator(DeviceChanged("a", 12.0, "cpu:0", "restarting"))
    aggregator(ChunkFailed("a", 12.0, 10, 20, "cpu:0", "its worker died"))
    aggregator(DeviceChanged("a", 13.0, "cpu:0", "replaced"))
    aggregator(DeviceChanged("a", 13.5, "cpu:0", "gone"))
    found = aggregator.make_report(seconds=4.0)
    kinds = [mark.kind for mark in found.marks]
    assert kinds == ["worker died", "failed attempt", "worker restarted", "device lost"]
    timeline = found.plot().axes[0]
    assert set(kinds) <= {text.get_text() for text in timeline.get_legend().get_texts()}
    assert sorted(float(line.get_xdata()[0]) for line in timeline.lines) == [2.0, 2.0, 3.0, 3.5]
    page = found.to_html()
    assert all(f"</b>{kind}</span>" in page for kind in kinds)
    assert "rows 10:20: its worker died" in page
    assert found._repr_html_().count("<circle") == 3  # of two at one time, the first


def test_the_call_and_its_time_are_in_the_report(in_folder: Path) -> None:
    """A report says which function ran with which options, when and where; no array is in it."""
    before = time.time()
    np.save("x.npy", np.full(8, 3.5))
    _, found = di.predict(np.sqrt, np.full(8, 3.5), devices="inline", batch_size=4, return_report=True)
    assert found.facts["call"] == "daskinfer.predict(model, x, devices='inline', batch_size=4)"
    assert before <= found.started_at <= found.ended_at <= time.time()
    stored = di.run(np.sqrt, "x.npy", "y.npy", devices="inline")
    assert stored.facts["options"] == "devices='inline'"
    assert stored.facts["hosts"] == f"{platform.node()} (this process)"
    assert "3.5" not in str(stored.facts)
