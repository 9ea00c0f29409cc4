import pickle
from dataclasses import FrozenInstanceError

import pytest

from daskinfer.records import Chunk, DeviceReport, Receipt, RunReport


def receipt(start: int, stop: int, device: str = "cuda:0", seconds: float = 1.0) -> Receipt:
    """Make a receipt for rows start:stop."""
    return Receipt(start, stop, device, f"<{device}>", batch_size=8, seconds=seconds, worker="tcp://worker")


def report() -> RunReport:
    """Make a report of 100 rows that two devices shared."""
    receipts = [receipt(0, 60), receipt(70, 100, "cpu:0", 3.0), receipt(60, 70, seconds=0.5)]
    return RunReport.from_receipts(receipts, {"cuda:0": 0.75, "cpu:0": 0.25}, seconds=4.0, batch_size=8)


def test_a_chunk_counts_its_rows():
    """A chunk holds the rows from start up to, and without, stop."""
    assert Chunk(index=3, start=3072, stop=4096, device=1).n_rows == 1024


@pytest.mark.parametrize("record", [Chunk(0, 0, 1, 0), receipt(0, 1), report(), report().devices[0]])
def test_records_cross_processes_unchanged(record):
    """Every record survives pickling and cannot be changed."""
    assert pickle.loads(pickle.dumps(record)) == record
    field = next(iter(record.__dataclass_fields__))
    with pytest.raises(FrozenInstanceError, match=field):
        setattr(record, field, None)


def test_receipts_are_summed_up_per_device():
    """A report has one record per device in the plan's order, whatever order the receipts came in."""
    first, second = report().devices
    assert first == DeviceReport("cuda:0", "<cuda:0>", 2, 70, 1.5, asked_share=0.75, done_share=0.7)
    assert second == DeviceReport("cpu:0", "<cpu:0>", 1, 30, 3.0, asked_share=0.25, done_share=0.3)
    assert (report().rows, report().batch_size, report().failed_rows) == (100, 8, ())


def test_a_device_that_joined_later_was_asked_for_nothing():
    """A receipt from a device outside the plan counts, with an asked share of 0."""
    late = RunReport.from_receipts([receipt(0, 5, "cpu:9")], {"cpu:0": 1.0}, seconds=1.0, batch_size=8).devices
    assert [(d.device, d.n_rows, d.asked_share) for d in late] == [("cpu:0", 0, 1.0), ("cpu:9", 5, 0.0)]


def test_nothing_done_is_no_division_by_zero():
    """A run without receipts has 0 rows, 0 rows a second and shares of 0."""
    empty = RunReport.from_receipts([], {"cpu:0": 1.0}, seconds=0.0, batch_size=8)
    assert (empty.rows, empty.devices[0].rows_per_second, empty.devices[0].done_share) == (0, 0.0, 0.0)
    assert "0 rows in 0.00 s (0 rows/s)" in str(empty)


def test_a_report_is_read_in_the_terminal():
    """The text is a line per device with asked and done shares, then one line of sums."""
    assert str(report()).splitlines() == [
        "device  name      chunks  rows  rows/s  asked   done",
        "cuda:0  <cuda:0>       2    70      47  75.0%  70.0%",
        "cpu:0   <cpu:0>        1    30      10  25.0%  30.0%",
        "100 rows in 4.00 s (25 rows/s), micro-batch 8",
    ]


def test_a_report_is_escaped_in_html():
    """A device's name that looks like HTML is shown as text in a notebook."""
    page = report()._repr_html_()
    assert "&lt;cuda:0&gt;" in page
    assert "<cuda:0>" not in page
    assert page.endswith("<p>100 rows in 4.00 s (25 rows/s), micro-batch 8</p>")
