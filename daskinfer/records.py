"""Frozen records that cross processes: what is to be done, what was done, and the sum of it."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass

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
    ``seconds`` is the time spent in the network, transfers included, reading and writing not.
    """

    start: int
    stop: int
    device: str
    device_name: str
    batch_size: int
    seconds: float
    worker: str


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """One device's part in a run: shares are fractions of all rows, ``seconds`` the time spent in the network."""

    device: str
    device_name: str
    n_chunks: int
    n_rows: int
    seconds: float
    asked_share: float
    done_share: float

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
        Global indices of rows without an answer; empty when all is well.

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

    @classmethod
    def from_receipts(
        cls, receipts: Iterable[Receipt], asked: dict[str, float], *, seconds: float, batch_size: int
    ) -> RunReport:
        """Sum receipts up per device; ``asked`` maps each device's name to its planned share of the rows."""
        done: dict[str, list[Receipt]] = {device: [] for device in asked}
        for receipt in receipts:
            done.setdefault(receipt.device, []).append(receipt)
        rows = sum(r.stop - r.start for of_device in done.values() for r in of_device)
        devices = tuple(_device_report(device, of, asked.get(device, 0.0), rows) for device, of in done.items())
        return cls(rows=rows, seconds=seconds, batch_size=batch_size, devices=devices)

    def _cells(self) -> list[list[str]]:
        return [
            [
                d.device,
                d.device_name,
                f"{d.n_chunks:,}",
                f"{d.n_rows:,}",
                f"{d.rows_per_second:,.0f}",
                f"{d.asked_share:.1%}",
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
        per_second = self.rows / self.seconds if self.seconds else 0.0
        return f"{self.rows:,} rows in {self.seconds:.2f} s ({per_second:,.0f} rows/s), micro-batch {self.batch_size:,}"


_REPORT_HEADERS = ("device", "name", "chunks", "rows", "rows/s", "asked", "done")


def _device_report(device: str, receipts: list[Receipt], asked: float, all_rows: int) -> DeviceReport:
    rows = sum(r.stop - r.start for r in receipts)
    return DeviceReport(
        device=device,
        device_name=receipts[0].device_name if receipts else "",
        n_chunks=len(receipts),
        n_rows=rows,
        seconds=sum(r.seconds for r in receipts),
        asked_share=asked,
        done_share=rows / all_rows if all_rows else 0.0,
    )
