"""The content of a manifest, as records and text: the header, the log of receipts, and which rows they prove to be stored.

This module reads and writes no files. Beside an output ``y.zarr`` stands a folder ``y.zarr.daskinfer``. Its ``header.json``
describes the output; an append-only log has one line per committed chunk. Every line ends with its own checksum, which
detects a line that a crash tore or that somebody changed later.

A run may continue an output only if everything that changes the result is the same: the model, the input, the options in
``RESULT_OPTIONS``, the output's shape and dtype, and the batch size if the caller names one. ``on_error`` may change: rows
that failed under "skip" are computed again under "raise". Devices, weights and prefetch may change: with the same
micro-batch on the same kind of device the bytes do not depend on them (see the docstring of ``daskinfer.scheduling``).

The log has four kinds of lines: ``{"run": n, "boot": id}`` when a run starts, a :class:`JournalEntry` for a chunk,
``{"void": [start, stop]}`` for rows whose stored bytes do not match their receipt, and ``{"end": true}`` when a run has
finished all of its rows.
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
    """Format one line of a manifest: JSON, a tab, the checksum of the JSON.

    Examples
    --------
    >>> format_line({"run": 1})
    b'{"run":1}\\te298b511\\n'
    """
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%s\t%s\n" % (text, _compute_line_crc(text))


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Parse a line that :func:`format_line` wrote; None if it is torn or changed.

    Examples
    --------
    >>> parse_line(format_line({"run": 1})), parse_line(format_line({"run": 1}).replace(b"1", b"2"))
    ({'run': 1}, None)
    """
    text, _, crc = line.removesuffix(b"\n").rpartition(b"\t")
    # Compared as text: as numbers, "a" and "A" would be the same digit, and that change would go unnoticed.
    if not line.endswith(b"\n") or crc != _compute_line_crc(text):
        return None
    record: dict[str, Any] = json.loads(text)
    return record


def parse_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Parse the lines up to the first that is torn or changed; return the records and their size in bytes.

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
    """Everything that determines the content of an output; its fields are the keys of ``header.json``.

    ``output`` is its name among the model's outputs. ``batch_size``, ``by_kind`` and ``channels_last`` are the chosen
    micro-batches, ``unit_rows`` the rows of a write-unit. ``shards`` is 0 if one run computes the whole output.
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
        """Build a header from a record as read; unknown keys are ignored, missing ones are as in format 1."""
        known = {name: record[name] for name in (f.name for f in fields(cls)) if name in record}
        options = {"memory_format": "auto", **record["options"]}
        kinds = tuple(record.get("channels_last", ()))
        return cls(**known | {"shape": tuple(record["shape"]), "options": options, "channels_last": kinds})

    def to_record(self) -> dict[str, Any]:
        """Return the record as it is written."""
        return asdict(self)

    def find_differences(self, requested: Header, batch_size: int | None) -> list[str]:
        """List what keeps a run with the ``requested`` header, and ``batch_size`` unless None, from continuing this one."""
        differences = []
        for name in ("format", "model", "input", "options", "output", "shape", "dtype", "shards"):
            differences += _find_differences(name, getattr(self, name), getattr(requested, name))
        return differences + (_find_differences("batch_size", self.batch_size, batch_size) if batch_size else [])

    @property
    def inherited_config(self) -> tuple[object, ...]:
        """What a continuing run takes over from this header: micro-batches and write-units."""
        return self.batch_size, dict(self.by_kind), self.channels_last, self.unit_rows

    @property
    def n_rows(self) -> int:
        """Number of rows of the output."""
        return self.shape[0]


def _find_differences(name: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(old.keys() | new.keys())
        return [text for key in keys for text in _find_differences(f"{name} {key}", old.get(key), new.get(key))]
    return [] if old == new else [f"{name} was {_format_value(old)} and is {_format_value(new)}"]


def _format_value(value: Any) -> str:
    is_hash = isinstance(value, str) and len(value) > 2 * _SHOWN_HASH_CHARS
    return f"{value[:_SHOWN_HASH_CHARS]}…" if is_hash else repr(value)


@dataclass(frozen=True)
class JournalEntry:
    """The receipt of a committed chunk: rows ``start:stop``, who computed them, and one stored part per write-unit."""

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
        """Build an entry from a record as read."""
        parts = tuple(StoredPart(*part) for part in record["parts"])
        return cls(**{**record, "parts": parts, "failures": tuple(RowFailure(*failure) for failure in record["failures"])})

    def to_record(self) -> dict[str, Any]:
        """Return the record as it is written: parts and failures are lists of values without field names."""
        parts, failures = ([list(asdict(item).values()) for item in items] for items in (self.parts, self.failures))
        return vars(self) | {"parts": parts, "failures": failures}


@dataclass(frozen=True)
class StoredRange:
    """One stored part (None: rows of zero bytes), its rows, and whether it may have been written more than once."""

    part: StoredPart | None
    start: int
    stop: int
    needs_recheck: bool


class CommitState:
    """Which write-units of an output are stored, as which parts, and which rows failed: the sum of its log lines.

    A later line about the same rows replaces earlier ones.
    """

    def __init__(self, n_rows: int, unit_rows: int) -> None:
        self._n_rows, self._unit_rows = n_rows, unit_rows
        self._stored_ranges: dict[int, StoredRange] = {}  # by the index of the write-unit
        self.failures: tuple[RowFailure, ...] = ()
        self.is_finished = False  # the run of this log has done all of its rows
        self.n_runs = 0
        self.boot_id = ""  # of the machine on which the last run started

    def replay(self, records: Iterable[Mapping[str, Any]]) -> CommitState:
        """Apply the lines of a log; return this state."""
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
        """Add a committed chunk."""
        self.invalidate(entry.start, entry.stop)
        units = list(self._iter_write_units(entry.start, entry.stop))
        needs_recheck = entry.attempts > 1 or self.n_runs > 1
        # An entry without parts holds rows of zero bytes.
        parts: Sequence[StoredPart | None] = entry.parts or [None] * len(units)
        for (index, start, stop), part in zip(units, parts, strict=True):
            self._stored_ranges[index] = StoredRange(part, start, stop, needs_recheck)
        self.failures += entry.failures

    def invalidate(self, start: int, stop: int) -> None:
        """Drop rows, and their failures: they do not count as stored any more."""
        for index, _, _ in self._iter_write_units(start, stop):
            self._stored_ranges.pop(index, None)
        self.failures = tuple(
            replace(f, start=first, stop=last)
            for f in self.failures
            for first, last in subtract_ranges((f.start, f.stop), [(start, stop)])
        )

    @property
    def stored_ranges(self) -> list[StoredRange]:
        """The stored write-units, in row order."""
        return [stored for _, stored in sorted(self._stored_ranges.items())]

    @property
    def done(self) -> list[tuple[int, int]]:
        """The stored row ranges, sorted, adjacent ones merged."""
        return merge_ranges((stored.start, stored.stop) for stored in self.stored_ranges)

    def _iter_write_units(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        for first in range(start - start % self._unit_rows, stop, self._unit_rows):
            yield first // self._unit_rows, first, min(first + self._unit_rows, stop)


def compute_shard_rows(n_rows: int, unit_rows: int, shard: tuple[int, int] | None) -> tuple[int, int]:
    """Compute the rows (start, stop) of a shard (i, n), counted from 1: whole write-units; all rows for None.

    Examples
    --------
    >>> [compute_shard_rows(100, 8, (i, 3)) for i in (1, 2, 3)]
    [(0, 32), (32, 64), (64, 100)]
    """
    index, n_shards = shard or (1, 1)
    n_units = -(-n_rows // unit_rows)
    start, stop = (n_units * i // n_shards * unit_rows for i in (index - 1, index))
    return min(start, n_rows), min(stop, n_rows)
