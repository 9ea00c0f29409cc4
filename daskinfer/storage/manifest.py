"""What stands in the manifest of a stored output, and what of the output is done: text and numbers, no files.

Beside an output ``y.zarr`` lies a folder ``y.zarr.daskinfer``. Its ``header.json`` says what the output is made of; an
append-only log has a line for each chunk that was committed. Every line ends with its own checksum, so that a line that was
torn by a crash, or changed afterwards, is noticed.

What changes the answer, and therefore has to be the same when a run is continued: the network, the input, the options in
``RESULT_OPTIONS``, the output's shape and dtype, and the micro-batch where the caller names one. ``on_error`` may change:
rows that failed under "skip" are computed again under "raise". Devices, weights and prefetch may change: with the same
micro-batch on the same kind of device the bytes do not depend on them (decision 3).

Log lines are of four kinds: ``{"run": n, "boot": id}`` where a run begins, an :class:`JournalEntry` for a chunk,
``{"void": [start, stop]}`` for rows whose stored bytes turned out not to be what their receipt says, and ``{"end": true}``
where a run has done all that it was to do.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from daskinfer.core.chunks import RowFailure, StoredPart
from daskinfer.core.row_ranges import merge_ranges, subtract_ranges

FORMAT_VERSION = 1
RESULT_OPTIONS = ("dtype", "autocast", "preprocess", "postprocess", "pad", "memory_format", "fill_value", "nan_is_failure")
_SHOWN_HASH_CHARS = 12  # characters of a hash that a message shows; arbitrary


def format_line(record: Mapping[str, Any]) -> bytes:
    """One line of a manifest: JSON, a tab, the checksum of the JSON.

    Examples
    --------
    >>> format_line({"run": 1})
    b'{"run":1}\\te298b511\\n'
    """
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%s\t%s\n" % (text, _compute_line_crc(text))


def parse_line(line: bytes) -> dict[str, Any] | None:
    """What :func:`format_line` was given; None where the line is not as it was written.

    Examples
    --------
    >>> parse_line(format_line({"run": 1})), parse_line(format_line({"run": 1}).replace(b"1", b"2"))
    ({'run': 1}, None)
    """
    text, _, crc = line.removesuffix(b"\n").rpartition(b"\t")
    # As text: the digits of a number may be changed from "a" to "A", and it is still the same number.
    if not line.endswith(b"\n") or crc != _compute_line_crc(text):
        return None
    record: dict[str, Any] = json.loads(text)
    return record


def parse_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The records up to the first line that is torn or changed, and how many bytes they take.

    Examples
    --------
    >>> parse_lines(format_line({"run": 1}) + b'{"ru')
    ([{'run': 1}], 19)
    """
    records, n_bytes = [], 0
    for line in content.splitlines(keepends=True):
        record = parse_line(line)
        if record is None:
            break
        records.append(record)
        n_bytes += len(line)
    return records, n_bytes


def _compute_line_crc(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What an output is made of.

    ``output`` is its name among the network's; ``batch_size``, ``by_kind`` and ``channels_last`` are the micro-batches that
    were chosen, and ``unit_rows`` the rows that are written in one go; ``shards`` is 0 where one run computes all of it.
    """

    output: str
    model: str
    input: Mapping[str, Mapping[str, Any]]
    options: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: str
    unit_rows: int
    batch_size: int
    by_kind: Mapping[str, int] = field(default_factory=dict)
    channels_last: tuple[str, ...] = ()
    shards: int = 0
    format: int = FORMAT_VERSION

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Header:
        """From a record as it is read; what is not known is left out, and what is missing is as in format 1."""
        known = {name: record[name] for name in (f.name for f in fields(cls)) if name in record}
        options = {"memory_format": "auto", **record["options"]}
        kinds = tuple(record.get("channels_last", ()))
        return cls(**known | {"shape": tuple(record["shape"]), "options": options, "channels_last": kinds})

    def to_record(self) -> dict[str, Any]:
        """As it is written."""
        return asdict(self)

    def find_differences(self, requested: Header, batch_size: int | None) -> list[str]:
        """What keeps a run that wants ``wanted``, and ``batch_size`` where it is not None, from continuing this one."""
        found = []
        for name in ("format", "model", "input", "options", "output", "shape", "dtype", "shards"):
            found += _find_differences(name, getattr(self, name), getattr(requested, name))
        return found + (_find_differences("batch_size", self.batch_size, batch_size) if batch_size else [])

    @property
    def inherited_config(self) -> tuple[object, ...]:
        """What a run that goes on takes over: micro-batches and write-units."""
        return self.batch_size, dict(self.by_kind), self.channels_last, self.unit_rows

    @property
    def n_rows(self) -> int:
        """Rows of the output."""
        return self.shape[0]


def _find_differences(name: str, was: Any, now: Any) -> list[str]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        keys = sorted(was.keys() | now.keys())
        return [text for key in keys for text in _find_differences(f"{name} {key}", was.get(key), now.get(key))]
    return [] if was == now else [f"{name} was {_format_value(was)} and is {_format_value(now)}"]


def _format_value(value: Any) -> str:
    is_hash = isinstance(value, str) and len(value) > 2 * _SHOWN_HASH_CHARS
    return f"{value[:_SHOWN_HASH_CHARS]}…" if is_hash else repr(value)


@dataclass(frozen=True)
class JournalEntry:
    """A chunk that was committed: rows ``start:stop``, who computed them, and what was stored, one part per write-unit."""

    start: int
    stop: int
    device: str
    batch_size: int
    worker: str
    attempts: int
    parts: tuple[StoredPart, ...]
    failures: tuple[RowFailure, ...] = ()
    channels_last: bool = False

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> JournalEntry:
        """From a record as it is read."""
        parts = tuple(StoredPart(*part) for part in record["parts"])
        return cls(**{**record, "parts": parts, "failures": tuple(RowFailure(*failure) for failure in record["failures"])})

    def to_record(self) -> dict[str, Any]:
        """As it is written: parts and failures without their fields' names."""
        parts, failures = ([list(asdict(one).values()) for one in many] for many in (self.parts, self.failures))
        return vars(self) | {"parts": parts, "failures": failures}


@dataclass(frozen=True)
class StoredRange:
    """One stored part, the rows that it holds, and whether it may have been written more than once."""

    part: StoredPart | None
    start: int
    stop: int
    needs_recheck: bool


class CommitState:
    """What the lines of one output's logs say: which write-units are stored, as what, and which rows have no answer.

    A later line on the same rows replaces what earlier ones said.
    """

    def __init__(self, n_rows: int, unit_rows: int) -> None:
        self._n_rows, self._unit_rows = n_rows, unit_rows
        self._stored_ranges: dict[int, StoredRange] = {}  # by the index of the write-unit
        self.failures: tuple[RowFailure, ...] = ()
        self.is_finished = False  # nothing is missing that this log's run was to do
        self.n_runs = 0
        self.boot_id = ""  # of the last run's machine

    def replay(self, records: Iterable[Mapping[str, Any]]) -> CommitState:
        """Take the lines of a log in."""
        for record in records:
            self.is_finished = "end" in record
            if self.is_finished:
                continue
            if "run" in record:
                self.n_runs, self.boot_id = record["run"], record["boot"]
            elif "void" in record:
                self.invalidate(*record["void"])
            else:
                self.add(JournalEntry.from_record(record))
        return self

    def add(self, entry: JournalEntry) -> None:
        """A chunk was committed."""
        self.invalidate(entry.start, entry.stop)
        units = list(self._iter_write_units(entry.start, entry.stop))
        again = entry.attempts > 1 or self.n_runs > 1
        # Without parts: rows of no bytes.
        parts: Sequence[StoredPart | None] = entry.parts or [None] * len(units)
        for (index, start, stop), written in zip(units, parts, strict=True):
            self._stored_ranges[index] = StoredRange(written, start, stop, again)
        self.failures += entry.failures

    def invalidate(self, start: int, stop: int) -> None:
        """Rows are not stored as it was said."""
        for index, _, _ in self._iter_write_units(start, stop):
            self._stored_ranges.pop(index, None)
        self.failures = tuple(
            replace(f, start=first, stop=last)
            for f in self.failures
            for first, last in subtract_ranges((f.start, f.stop), [(start, stop)])
        )

    @property
    def stored_ranges(self) -> list[StoredRange]:
        """What is stored, in the rows' order."""
        return [part for _, part in sorted(self._stored_ranges.items())]

    @property
    def done(self) -> list[tuple[int, int]]:
        """Row ranges that are stored, in order, none next to another."""
        return merge_ranges((part.start, part.stop) for part in self.stored_ranges)

    def _iter_write_units(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        for first in range(start - start % self._unit_rows, stop, self._unit_rows):
            yield first // self._unit_rows, first, min(first + self._unit_rows, stop)


def compute_shard_rows(n_rows: int, unit_rows: int, shard: tuple[int, int] | None) -> tuple[int, int]:
    """Rows (start, stop) of a shard (i, n), counted from 1: whole write-units; all rows for None.

    Examples
    --------
    >>> [compute_shard_rows(100, 8, (i, 3)) for i in (1, 2, 3)]
    [(0, 32), (32, 64), (64, 100)]
    """
    index, n_shards = shard or (1, 1)
    n_units = -(-n_rows // unit_rows)
    start, stop = (n_units * i // n_shards * unit_rows for i in (index - 1, index))
    return min(start, n_rows), min(stop, n_rows)
