"""The manifest's text: lines with checksums, headers, and the state that receipts add up to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daskinfer.core.chunks import RowFailure, StoredPart
from daskinfer.core.row_ranges import merge_ranges
from daskinfer.storage.manifest import (
    CommitState,
    Header,
    JournalEntry,
    compute_shard_rows,
    format_line,
    parse_line,
    parse_lines,
)

HEADER = Header(
    output="y",
    model="a" * 64,
    input={"x": {"shape": [100, 3], "mtime_ns": 1}},
    options={"autocast": None, "dtype": {"x": "float32"}, "memory_format": "auto"},
    shape=(100, 2),
    dtype="<f4",
    unit_rows=10,
    batch_size=5,
    by_kind={"cpu": 5},
)

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,  # a header has fewer in a field; more of them take minutes to make
)
records = st.dictionaries(st.text(), plain, max_size=12)


@given(records)
def test_a_line_gives_back_its_record(record: dict[str, Any]) -> None:
    """Any record is formatted as one line and parsed back unchanged."""
    line = format_line(record)
    assert (line.count(b"\n"), line[-1:]) == (1, b"\n")
    assert parse_line(line) == record


@given(records, st.data())
def test_a_line_notices_any_changed_byte(record: dict[str, Any], data: st.DataObject) -> None:
    """A line with one changed byte is rejected."""
    line = bytearray(format_line(record))
    at, mask = data.draw(st.integers(0, len(line) - 1)), data.draw(st.integers(1, 255))
    line[at] ^= mask
    assert parse_line(bytes(line)) is None


@given(st.lists(records, max_size=5), st.data())
def test_a_torn_log_keeps_what_came_before(written: list[dict[str, Any]], data: st.DataObject) -> None:
    """A log cut off anywhere gives the records of its whole lines and the position where they end."""
    lines = [format_line(record) for record in written]
    content = b"".join(lines)
    cut = data.draw(st.integers(0, len(content)))
    found, n_bytes = parse_lines(content[:cut])
    assert found == written[: len(found)]
    assert n_bytes == sum(map(len, lines[: len(found)])) <= cut
    assert len(found) == len(written) or cut < n_bytes + len(lines[len(found)])


def test_header_round_trip() -> None:
    """A header is read as it was written, also one with fields that a later version adds."""
    record = parse_line(format_line(HEADER.to_record() | {"later": 1}))
    assert record is not None
    assert Header.from_record(record) == HEADER


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "b" * 64}, "model was aaaaaaaaaaaa… and is bbbbbbbbbbbb…"),
        ({"input": {"x": {"shape": [100, 3], "mtime_ns": 2}}}, "input x mtime_ns was 1 and is 2"),
        ({"input": {"z": {"shape": [100, 3], "mtime_ns": 1}}}, "input x was {'shape'"),
        ({"options": {"autocast": "bf16", "dtype": {"x": "float32"}}}, "options autocast was None and is 'bf16'"),
        ({"options": {"autocast": None, "dtype": None}}, "options dtype was {'x': 'float32'} and is None"),
        ({"output": "z"}, "output was 'y' and is 'z'"),
        ({"shape": (100, 3)}, r"shape was (100, 2) and is (100, 3)"),
        ({"dtype": "<f8"}, "dtype was '<f4' and is '<f8'"),
        ({"shards": 4}, "shards was 0 and is 4"),
        ({"format": 2}, "format was 1 and is 2"),
    ],
)
def test_every_difference_is_named(changed: dict[str, Any], said: str) -> None:
    """Everything that changes the result is listed with old and new value, and nothing else."""
    first, *_ = found = HEADER.find_differences(replace(HEADER, **changed), None)
    assert first.startswith(said)
    assert len(found) <= 2  # a port that is gone and one that is new


def test_what_may_differ() -> None:
    """Write-units and micro-batches are taken from the older run, unless the caller names a batch size."""
    other = replace(HEADER, unit_rows=20, batch_size=20, by_kind={})
    assert HEADER.find_differences(other, None) == []
    assert HEADER.find_differences(other, 5) == []
    assert HEADER.find_differences(other, 20) == ["batch_size was 5 and is 20"]


parts = st.builds(StoredPart, st.text(), st.integers(0), st.integers(0, 2**32 - 1))
failures = st.builds(RowFailure, st.integers(0), st.integers(0), st.text(), st.text())


@given(
    st.builds(
        JournalEntry,
        *(st.integers(0), st.integers(0), st.text(), st.integers(0), st.text(), st.integers(1)),
        st.lists(parts).map(tuple),
        st.lists(failures).map(tuple),
    )
)
def test_a_receipt_gives_back_its_chunk(entry: JournalEntry) -> None:
    """A receipt is parsed back unchanged."""
    record = parse_line(format_line(entry.to_record()))
    assert record is not None
    assert JournalEntry.from_record(record) == entry


@st.composite
def logs(draw: st.DrawFn) -> tuple[int, int, list[tuple[str, int, int]]]:
    """Draw the number of rows, a write-unit, and a sequence of changes to ranges of whole write-units."""
    n_rows, unit_rows = draw(st.integers(1, 60)), draw(st.integers(1, 7))
    n_units = -(-n_rows // unit_rows)
    cut = st.tuples(st.integers(0, n_units - 1), st.integers(1, n_units)).filter(lambda pair: pair[0] < pair[1])
    happened = draw(st.lists(st.tuples(st.sampled_from(["add", "fail", "void"]), cut), max_size=12))
    return n_rows, unit_rows, [(what, a * unit_rows, min(b * unit_rows, n_rows)) for what, (a, b) in happened]


@given(logs())
def test_progress_is_what_the_lines_add_up_to(log: tuple[int, int, list[tuple[str, int, int]]]) -> None:
    """After any sequence of receipts and voids, the state equals that of a row-by-row record."""
    n_rows, unit_rows, happened = log
    progress, rows = CommitState(n_rows, unit_rows), dict.fromkeys(range(n_rows), "")
    for number, (what, start, stop) in enumerate(happened):
        failed = (RowFailure(start, stop, "cpu", "bad"),) if what == "fail" else ()
        written = tuple(StoredPart(f"{number}.{first}", 1, 0) for first in range(start, stop, unit_rows))
        entry = JournalEntry(start, stop, "cpu", 1, "", 1, written, failed)
        progress.replay([{"void": [start, stop]} if what == "void" else entry.to_record()])
        rows |= dict.fromkeys(range(start, stop), "" if what == "void" else what)
    assert progress.done == merge_ranges((row, row + 1) for row, what in rows.items() if what)
    found = merge_ranges((failure.start, failure.stop) for failure in progress.failures)
    assert found == merge_ranges((row, row + 1) for row, what in rows.items() if what == "fail")
    assert [part.start for part in progress.stored_ranges] == sorted(
        {row // unit_rows * unit_rows for row, w in rows.items() if w}
    )


def test_what_may_have_been_written_twice() -> None:
    """A part is marked for a recheck if its chunk was retried, or if an earlier run may have started it."""
    progress = CommitState(40, 10)
    progress.replay([{"run": 1, "boot": "here"}])
    progress.add(JournalEntry(0, 10, "cpu", 1, "", 1, (StoredPart("a", 1, 0),)))
    progress.add(JournalEntry(10, 20, "cpu", 1, "", 2, (StoredPart("b", 1, 0),)))
    progress.replay([{"end": True}])
    assert progress.is_finished
    progress.replay([{"run": 2, "boot": "there"}])
    progress.add(JournalEntry(20, 40, "cpu", 1, "", 1, (StoredPart("c", 1, 0), StoredPart("d", 1, 0))))
    assert [part.needs_recheck for part in progress.stored_ranges] == [False, True, True, True]
    assert (progress.is_finished, progress.n_runs, progress.boot_id) == (False, 2, "there")


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 12))
def test_shards_cover_all_rows_once(n_rows: int, unit_rows: int, n_shards: int) -> None:
    """Shards are whole write-units, in order, and every row is in exactly one; sizes differ by one unit at most."""
    found = [compute_shard_rows(n_rows, unit_rows, (i, n_shards)) for i in range(1, n_shards + 1)]
    assert [row for start, stop in found for row in range(start, stop)] == list(range(n_rows))
    assert all(start % unit_rows == 0 or start == n_rows for start, _ in found)
    n_units = [-(-(stop - start) // unit_rows) for start, stop in found]
    assert max(n_units) - min(n_units) <= 1
