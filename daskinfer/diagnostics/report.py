"""The report of a run, for people and programs, and the aggregator that makes it from the run's events."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from daskinfer.core.chunks import BatchConfig, RowFailure
from daskinfer.core.formatting import format_text_table, render_template
from daskinfer.core.installation import describe_install
from daskinfer.diagnostics.charts import list_rows, make_bars, place_marks, render_svg
from daskinfer.diagnostics.device_stats import DeviceReport, DeviceTable, select_shown
from daskinfer.diagnostics.events import (
    BatchSizeChosen,
    ChunkDone,
    ChunkFailed,
    DeviceChanged,
    Event,
    RunStarted,
)
from daskinfer.diagnostics.provenance import Hosts
from daskinfer.diagnostics.timeline import Mark, Span, Timeline
from daskinfer.diagnostics.verdict import SLOW_STARTUP_SECONDS, make_verdict, measure_tail
from daskinfer.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class RunReport:
    """Report of a finished run: how many rows in how many seconds of wall time, and what each device contributed.

    Parameters
    ----------
    rows
        Rows of the input that this call computed and that have a result.
    seconds
        Wall time from the first chunk sent to the last row in place, without the start of workers.
    batch_size
        Rows of a micro-batch, as planned or tuned.
    devices
        One record per device, in the plan's order.
    failed_rows
        Global indices of the rows that failed, in ascending order; empty if none did.
    failures
        Which rows failed together, on which device, and why; in the order in which they failed.
    rows_before
        Rows of a stored output that an earlier call had computed, not counted in ``rows``.
    by_kind
        Rows of a micro-batch by kind of device, if tuning measured them.
    channels_last
        Kinds of device on which images had that memory format, since it was measured to be faster.
    timeline
        When each device read, computed and wrote, in a bounded number of spans of one chunk or more.
    facts
        What was computed, as text: the call and its options, model, inputs, outputs, hosts, versions, and the fingerprints
        of a stored output.
    start_seconds
        Wall time before ``seconds``: starting workers, and loading the model and tuning the batch size there.
    marks
        What went wrong and when: failed attempts, workers that died, were restarted or lost; the first of them.
    started_at, ended_at
        When the call began and ended, in seconds since 1970; 0.0 if unknown.

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
    failures: tuple[RowFailure, ...] = ()
    by_kind: Mapping[str, int] = field(default_factory=dict)
    channels_last: tuple[str, ...] = ()
    timeline: tuple[Span, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    start_seconds: float = 0.0
    marks: tuple[Mark, ...] = ()
    started_at: float = 0.0
    ended_at: float = 0.0

    @property
    def rows_per_second(self) -> float:
        """Rows divided by seconds of wall time; 0.0 if nothing was done."""
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def n_retried(self) -> int:
        """Failed attempts at a chunk."""
        return sum(device.n_retried for device in self.devices)

    @property
    def tail_seconds(self) -> float:
        """How long the device that finished first was idle until the last one finished; 0.0 with a single device.

        This process does not count if workers took over from it.
        """
        return measure_tail(self.devices)

    @property
    def load_seconds(self) -> float:
        """How long the device that waited longest for the model to load did so, within ``seconds``."""
        return max((device.load_seconds for device in self.devices), default=0.0)

    @property
    def first_call_seconds(self) -> float:
        """The longest first micro-batch of the model in a process, within ``seconds``."""
        return max((device.first_call_seconds for device in self.devices), default=0.0)

    @property
    def shown_devices(self) -> list[DeviceReport]:
        """The devices that tables list: none if nothing was computed, no workers that were not needed."""
        return select_shown(self.devices) if any(device.is_used for device in self.devices) else []

    def to_dict(self) -> dict[str, Any]:
        """Convert the report to plain strings, numbers, lists and dicts, without the timeline.

        Examples
        --------
        >>> RunReport(8, 2.0, 4, ()).to_dict()["rows_per_second"]
        4.0
        """
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("timeline", "devices")}
        devices = [asdict(device) | {"rows_per_second": device.rows_per_second} for device in self.devices]
        derived = {name: getattr(self, name) for name in ("rows_per_second", "n_retried", "tail_seconds", "verdict")}
        lists = {name: [asdict(one) for one in getattr(self, name)] for name in ("failures", "marks")}
        return own | derived | lists | {"devices": devices, "by_kind": dict(self.by_kind)}

    def _format_devices(self) -> list[list[str]]:
        columns = choose_columns(self.shown_devices)
        return [[format_cell(device) for format_cell in columns.values()] for device in self.shown_devices]

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """Render the report as one HTML page that opens offline: timeline, throughput, shares, memory, failures and facts.

        Parameters
        ----------
        path
            File that the page is written to atomically, replacing an existing one. None: the page is only returned.

        Returns
        -------
        str
            The page, about 1.3 MB: it contains the code that draws its charts.

        Raises
        ------
        SourceMissing
            If the folder of ``path`` does not exist.

        Examples
        --------
        >>> RunReport(8, 2.0, 4, ()).to_html()[:15]
        '<!DOCTYPE html>'
        """
        from daskinfer.diagnostics import html_report  # bokeh takes half a second to import

        page = html_report.render_page(self)
        if path is not None:
            html_report.write_page(page, path)
        return page

    def plot(self) -> Figure:
        """Draw the report as a matplotlib figure, which notebooks show: timeline, throughput, shares and memory.

        Returns
        -------
        matplotlib.figure.Figure
            Created without pyplot, so there is nothing to close.

        Raises
        ------
        MissingExtra
            If matplotlib is not installed.

        Examples
        --------
        >>> len(RunReport(8, 2.0, 4, ()).plot().axes)
        4
        """
        try:
            from daskinfer.diagnostics.figure import plot_report
        except ImportError as error:
            raise MissingExtra(
                f"RunReport.plot() needs matplotlib, which cannot be imported ({error}). "
                f"Install it: {describe_install('plot')}; or use to_html(), which needs no extra."
            ) from error
        return plot_report(self)

    @property
    def found_all_done(self) -> bool:
        """Whether an earlier call had computed every row, so that this one had nothing to do."""
        return self.rows_before > 0 and not any(device.n_chunks for device in self.devices)

    def __str__(self) -> str:
        if self.found_all_done:
            return self.totals
        devices = self.shown_devices
        table = format_text_table(tuple(choose_columns(devices)), self._format_devices()) if devices else ""
        return "\n".join(line for line in (table, self._format_summary(), self.details) if line)

    __repr__ = __str__  # shown at the interpreter's prompt and by notebooks without HTML

    def _repr_html_(self) -> str:
        if self.found_all_done:
            return f"<p>{self.totals}</p>"
        return render_template(
            "diagnostics/report.html.j2",
            headers=tuple(choose_columns(self.shown_devices)),
            rows=self._format_devices(),
            svg=render_svg(list_rows(self), make_bars(self.timeline), place_marks(self)),
            lines=[line for line in (self.details, self._format_summary()) if line],
        )

    def _format_summary(self) -> str:
        return f"{self.totals}; {self.verdict}" if self.verdict else self.totals

    @property
    def totals(self) -> str:
        """How many rows were done in which time, in one line."""
        if self.found_all_done:
            return f"nothing to do: all {self.rows_before:,} rows were already done"
        line = f"{self.rows:,} rows in {self.seconds:.2f} s ({self.rows_per_second:,.0f} rows/s), "
        line += f"batch size {self.batch_size:,}"
        line += f"; {self.rows_before:,} rows were already done" if self.rows_before else ""
        line += (
            f"; {len(self.failed_rows):,} row{'s' if len(self.failed_rows) > 1 else ''} failed" if self.failed_rows else ""
        )
        return line

    @property
    def details(self) -> str:
        """What else is worth a line, or empty: what came before the rows, tuned sizes, failed attempts, an idle tail."""
        before = {"startup": self.start_seconds, "loading": self.load_seconds, "first call": self.first_call_seconds}
        parts = [f"{what} {seconds:.1f} s" for what, seconds in before.items() if seconds >= SLOW_STARTUP_SECONDS]
        if self.by_kind:
            parts.append(f"batch size by kind: {', '.join(f'{kind} {n:,}' for kind, n in self.by_kind.items())}")
        if self.channels_last:
            parts.append(f"images in channels_last on {', '.join(self.channels_last)}")
        if self.n_retried:
            parts.append(f"{self.n_retried:,} failed attempt{'s' if self.n_retried > 1 else ''}")
        if self.tail_seconds > LONG_TAIL_FRACTION * self.seconds:
            parts.append(f"{self.tail_seconds:,.2f} s idle tail")
        return "; ".join(parts)

    @property
    def verdict(self) -> str:
        """What limits the throughput and what to change, in one line; empty if nothing was done (see ``verdict``)."""
        return make_verdict(self.devices, self.seconds, self.start_seconds)


LONG_TAIL_FRACTION = 0.1  # of the wall time, from which on the idle tail is mentioned; arbitrary

_DEVICE_COLUMNS: Mapping[str, Callable[[DeviceReport], str]] = {
    "device": lambda device: device.title,
    "name": lambda device: device.device_name,
    "chunks": lambda device: f"{device.n_chunks:,}",
    "rows": lambda device: f"{device.n_rows:,}",
    "rows/s": lambda device: f"{device.rows_per_second:,.0f}",
    "requested": lambda device: "" if device.asked_share is None else f"{device.asked_share:.1%}",
    "measured": lambda device: f"{device.measured_share:.1%}",
    "done": lambda device: f"{device.done_share:.1%}",
}


def choose_columns(devices: Sequence[DeviceReport]) -> dict[str, Callable[[DeviceReport], str]]:
    """Choose the columns of a table of devices: shares compare several, and one was requested only if a caller did."""
    columns = dict(_DEVICE_COLUMNS)
    if all(device.asked_share is None for device in devices):
        del columns["requested"]
    if len(devices) == 1:
        del columns["measured"]
    return columns


class RunAggregator:
    """Adds up a run's events: a few numbers per device and a bounded timeline, however many chunks there are."""

    def __init__(self) -> None:
        self._failures: list[RowFailure] = []
        self._devices = DeviceTable()
        self._timeline = Timeline()
        self._batch = BatchConfig(0)
        self._facts: dict[str, str] = {}
        self._hosts = Hosts()
        self._started_at = 0.0

    def __call__(self, event: Event) -> None:
        self._devices(event)
        if isinstance(event, ChunkDone):
            self._failures += event.failures
            self._timeline.add(event.stats)
            self._hosts.add(event.stats)
        elif isinstance(event, ChunkFailed | DeviceChanged):
            self._timeline.mark(event)
        elif isinstance(event, RunStarted):
            self._batch, self._started_at = event.batch, event.at
            self._facts = {"model": event.model, "input": "; ".join(event.inputs), "output": "; ".join(event.outputs)}
        elif isinstance(event, BatchSizeChosen):
            self._batch = event.batch

    def make_report(
        self, *, seconds: float, start_seconds: float = 0.0, facts: Mapping[str, str] | None = None
    ) -> RunReport:
        """Make the report of the events so far, in ``seconds`` of wall time; ``facts`` are added to those of the events."""
        devices = self._devices.make_reports()
        failed = sorted(row for failure in self._failures for row in range(failure.start, failure.stop))
        return RunReport(
            rows=sum(device.n_rows for device in devices),
            seconds=seconds,
            batch_size=self._batch.batch_size,
            devices=devices,
            failed_rows=tuple(failed),
            failures=tuple(self._failures),
            by_kind=dict(self._batch.by_kind),
            channels_last=self._batch.channels_last,
            timeline=self._timeline.spans,
            facts={**self._facts, **self._hosts.describe(), **(facts or {})},
            start_seconds=start_seconds,
            marks=tuple(self._timeline.marks),
            started_at=self._started_at,
            ended_at=time.time(),
        )
