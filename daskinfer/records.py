"""Frozen records that cross processes: what is to be done, what was done, and the sum of it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from daskinfer.tables import html_table, text_table


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows ``start:stop`` of the input, meant for the device at position ``device`` of the plan."""

    index: int
    start: int
    stop: int
    device: int

    @property
    def n_rows(self) -> int:
        """How many rows the chunk holds."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a worker says of a chunk that it finished.

    ``batch_size`` is the smallest micro-batch that was used (rows); it is below the plan's where memory ran out.
    ``seconds`` is the time spent in the network, transfers included, reading and writing not; ``waited_seconds`` is how
    long the device then stood still until this chunk was read.
    """

    start: int
    stop: int
    device: str
    device_name: str
    batch_size: int
    seconds: float
    worker: str
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    waited_seconds: float = 0.0

    def timed(self, read_seconds: float, write_seconds: float, waited_seconds: float) -> Receipt:
        """The same with what was found out around the network."""
        return replace(self, read_seconds=read_seconds, write_seconds=write_seconds, waited_seconds=waited_seconds)


@dataclass(frozen=True, slots=True)
class Written:
    """A part of a stored output that a worker wrote: its name within the output, its bytes, and their checksum."""

    name: str
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Rows ``start:stop`` without an answer, the device that tried last, and what it said."""

    start: int
    stop: int
    device: str
    exception: str


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """One device's part in a run: shares are fractions of all rows, ``seconds`` the time spent in the network.

    ``asked_share`` is the plan's, ``measured_share`` what the device's speed is of all devices', ``done_share`` what it did.
    ``read_seconds`` and ``write_seconds`` are those of all chunks together, beside the network's; ``waited_seconds`` is how
    long the device stood still until a chunk was read.
    """

    device: str
    device_name: str
    n_chunks: int
    n_rows: int
    seconds: float
    asked_share: float
    done_share: float
    measured_share: float = 0.0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    waited_seconds: float = 0.0

    @property
    def rows_per_second(self) -> float:
        """Rows over seconds spent in the network; 0.0 where nothing was done."""
        return self.n_rows / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run did: how many rows, in how many seconds of wall time, and which device did which share.

    Parameters
    ----------
    rows
        Rows of the input that have an answer.
    seconds
        Wall time from the first chunk sent to the last row in place; starting workers is not in it.
    batch_size
        Rows of a micro-batch, as planned.
    devices
        One record per device, in the plan's order.
    failed_rows
        Global indices of rows without an answer, in order; empty when all is well.
    failures
        Which rows failed together, on which device, and why; in the order in which they did.
    rows_before
        Rows of a stored output that an earlier call had done, beside ``rows``.

    Examples
    --------
    >>> import daskinfer as di, numpy as np
    >>> y, report = di.predict(np.sqrt, np.arange(8.0), devices="inline", return_report=True)
    >>> report.rows, [d.device for d in report.devices]
    (8, ['inline'])
    """

    rows: int
    seconds: float
    batch_size: int
    devices: tuple[DeviceReport, ...]
    failed_rows: tuple[int, ...] = ()
    rows_before: int = 0
    failures: tuple[Failure, ...] = ()

    def _cells(self) -> list[list[str]]:
        return [
            [
                d.device,
                d.device_name,
                f"{d.n_chunks:,}",
                f"{d.n_rows:,}",
                f"{d.rows_per_second:,.0f}",
                f"{d.asked_share:.1%}",
                f"{d.measured_share:.1%}",
                f"{d.done_share:.1%}",
            ]
            for d in self.devices
        ]

    def __str__(self) -> str:
        return f"{text_table(_REPORT_HEADERS, self._cells())}\n{self._summary()}"

    __repr__ = __str__  # what a notebook without HTML and the interpreter's prompt show

    def _repr_html_(self) -> str:
        return f"{html_table(_REPORT_HEADERS, self._cells())}<p>{html.escape(self._summary())}</p>"

    def _summary(self) -> str:
        if self.rows_before and not any(device.n_chunks for device in self.devices):
            return f"nothing to do: all {self.rows_before:,} rows were done before"
        per_second = self.rows / self.seconds if self.seconds else 0.0
        said = f"{self.rows:,} rows in {self.seconds:.2f} s ({per_second:,.0f} rows/s), micro-batch {self.batch_size:,}"
        said += f"; {self.rows_before:,} rows were done before" if self.rows_before else ""
        said += f"; {len(self.failed_rows):,} rows have no answer" if self.failed_rows else ""
        return f"{said}; {self.verdict}" if self.verdict else said

    @property
    def verdict(self) -> str:
        """What to change for more speed, in one line; empty where nothing was done. The first that holds:

        1. Devices waited for reads for ``MUCH`` of the time: input-bound.
        2. They computed for ``MOST`` of it: compute-bound.
        3. Writing took ``MOST`` of it: output-bound.
        4. Otherwise what was around the chunks took the time.
        """
        working = [device for device in self.devices if device.n_rows]
        total = self.seconds * len(working)
        if not total:
            return ""
        waited, computed, wrote = (
            min(1.0, sum(getattr(device, f"{what}seconds") for device in working) / total)
            for what in ("waited_", "", "write_")
        )
        if waited >= MUCH:
            return f"input-bound: devices waited {waited:.0%} for reads; raise readers"
        if computed >= MOST:
            return f"compute-bound: devices computed {computed:.0%} of the time"
        if wrote >= MOST:
            return f"output-bound: writing took {wrote:.0%} of the time; use faster storage or fewer devices"
        return f"overhead-bound: devices computed {computed:.0%} of the time; use larger chunks or fewer devices"


MUCH, MOST = 0.15, 0.7  # of the devices' time; arbitrary

_REPORT_HEADERS = ("device", "name", "chunks", "rows", "rows/s", "asked", "measured", "done")


class Tally:
    """Sums receipts up as they come; holds a few numbers per device, however many chunks there are.

    ``asked`` maps each device's name to its planned share of the rows, a fraction.
    """

    def __init__(self, asked: Mapping[str, float]) -> None:
        self._asked = asked
        self._failures: list[Failure] = []
        self._devices = {device: _Sums() for device in asked}

    def add(self, receipt: Receipt, failures: Sequence[Failure] = ()) -> None:
        """Count a chunk that is done, but for rows that failed."""
        self._devices.setdefault(receipt.device, _Sums()).add(receipt, sum(f.stop - f.start for f in failures))
        self._failures += failures

    def report(self, *, seconds: float, batch_size: int) -> RunReport:
        """The sum so far; ``seconds`` of wall time, ``batch_size`` as planned."""
        rows = sum(sums.n_rows for sums in self._devices.values())
        speed = sum(sums.rows_per_second for sums in self._devices.values())
        devices = tuple(sums.report(name, self._asked.get(name, 0.0), rows, speed) for name, sums in self._devices.items())
        failed = sorted(row for failure in self._failures for row in range(failure.start, failure.stop))
        return RunReport(
            rows=rows,
            seconds=seconds,
            batch_size=batch_size,
            devices=devices,
            failed_rows=tuple(failed),
            failures=tuple(self._failures),
        )


@dataclass
class _Sums:
    device_name: str = ""
    n_chunks: int = 0
    n_rows: int = 0
    seconds: float = 0.0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    waited_seconds: float = 0.0

    def add(self, receipt: Receipt, n_failed: int) -> None:
        self.device_name = receipt.device_name or self.device_name
        self.n_chunks += 1
        self.n_rows += receipt.stop - receipt.start - n_failed
        self.seconds += receipt.seconds
        self.read_seconds += receipt.read_seconds
        self.write_seconds += receipt.write_seconds
        self.waited_seconds += receipt.waited_seconds

    @property
    def rows_per_second(self) -> float:
        return self.n_rows / self.seconds if self.seconds else 0.0

    def report(self, device: str, asked_share: float, all_rows: int, speed: float) -> DeviceReport:
        return DeviceReport(
            device,
            asked_share=asked_share,
            done_share=self.n_rows / all_rows if all_rows else 0.0,
            measured_share=self.rows_per_second / speed if speed else 0.0,
            **vars(self),
        )
