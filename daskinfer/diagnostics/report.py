"""The report of a run, for people and programs, and the aggregator that makes it from the run's events."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from daskinfer.core.chunks import BatchConfig, RowFailure
from daskinfer.core.formatting import format_text_table, render_template
from daskinfer.core.installation import describe_install
from daskinfer.diagnostics.charts import list_device_names, make_bars, render_svg
from daskinfer.diagnostics.device_stats import DeviceReport, DeviceTable
from daskinfer.diagnostics.events import BatchSizeChosen, ChunkDone, Event, RunStarted
from daskinfer.diagnostics.timeline import Span, Timeline
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
        What was computed, as text: model, inputs, outputs, versions, and the fingerprints of a stored output.
    start_seconds
        Wall time before ``seconds``: starting workers, loading the model and tuning the batch size.

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
        ended = [device.ended for device in self.devices if device.n_chunks and device.device != "inline"]
        return max(ended) - min(ended) if ended else 0.0

    @property
    def _total_device_seconds(self) -> float:
        """Time available to the devices, summed up: ``seconds`` for each, unless workers took over from this process.

        In that case the workers were starting until this process finished its last chunk, and from then on it was idle.
        """
        working = [device for device in self.devices if device.n_rows]
        inline = [device.ended - device.began for device in working if device.device == "inline"]
        if not inline or len(working) == 1:
            return self.seconds * len(working)
        return inline[0] + max(0.0, self.seconds - inline[0]) * (len(working) - 1)

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
        failures = [asdict(failure) for failure in self.failures]
        return own | derived | {"devices": devices, "failures": failures, "by_kind": dict(self.by_kind)}

    def _format_devices(self) -> list[list[str]]:
        return [[format_cell(device) for format_cell in DEVICE_COLUMNS.values()] for device in self.devices]

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
        lines = [format_text_table(tuple(DEVICE_COLUMNS), self._format_devices()), self._format_summary(), self.details]
        return "\n".join(line for line in lines if line)

    __repr__ = __str__  # shown at the interpreter's prompt and by notebooks without HTML

    def _repr_html_(self) -> str:
        if self.found_all_done:
            return f"<p>{self.totals}</p>"
        return render_template(
            "diagnostics/report.html.j2",
            headers=tuple(DEVICE_COLUMNS),
            rows=self._format_devices(),
            svg=render_svg(list_device_names(self), make_bars(self.timeline)),
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
        line += f"; {len(self.failed_rows):,} rows failed" if self.failed_rows else ""
        return line

    @property
    def details(self) -> str:
        """What else is worth a line, or empty: a slow startup, tuned batch sizes, failed attempts, an idle tail."""
        parts = [f"startup {self.start_seconds:.1f} s"] if self.start_seconds >= SLOW_STARTUP_SECONDS else []
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
        """What limits the throughput and what to change, in one line; empty if nothing was done. The first that holds:

        1. Devices waited for reads for ``SIGNIFICANT_FRACTION`` of the time: input-bound.
        2. They computed for ``DOMINANT_FRACTION`` of it: compute-bound.
        3. The first device finished ``SIGNIFICANT_FRACTION`` of it before the last: unbalanced.
        4. Writing took ``DOMINANT_FRACTION`` of it: output-bound.
        5. Otherwise the work around the chunks took the time: overhead-bound.
        """
        total = self._total_device_seconds
        if not total:
            return ""
        seconds = [(d.waited_seconds, d.seconds, d.write_seconds) for d in self.devices if d.n_rows]
        waited, computed, wrote = (min(1.0, sum(of_one_kind) / total) for of_one_kind in zip(*seconds, strict=True))
        if waited >= SIGNIFICANT_FRACTION:
            return f"input-bound: devices waited for reads {waited:.0%} of the time; raise prefetch"
        if computed >= DOMINANT_FRACTION:
            return f"compute-bound: devices computed {computed:.0%} of the time"
        if self.tail_seconds >= SIGNIFICANT_FRACTION * self.seconds:
            tail = f"the last device finished {self.tail_seconds:.1f} s after the first"
            return f"unbalanced: {tail}; use device_weights='auto' or a smaller batch_size"
        if wrote >= DOMINANT_FRACTION:
            return f"output-bound: writing took {wrote:.0%} of the time; use faster storage or fewer devices"
        cure = "pass more rows per call, use fewer devices, or stop other work on them"
        return f"overhead-bound: devices computed {computed:.0%} of the time; {cure}"


SIGNIFICANT_FRACTION, DOMINANT_FRACTION = 0.15, 0.7  # of the devices' time; arbitrary
LONG_TAIL_FRACTION = 0.1  # of the wall time, from which on the idle tail is mentioned; arbitrary
SLOW_STARTUP_SECONDS = 1.0  # from which on the startup is mentioned; arbitrary

DEVICE_COLUMNS: Mapping[str, Callable[[DeviceReport], str]] = {
    "device": lambda device: device.device,
    "name": lambda device: device.device_name,
    "chunks": lambda device: f"{device.n_chunks:,}",
    "rows": lambda device: f"{device.n_rows:,}",
    "rows/s": lambda device: f"{device.rows_per_second:,.0f}",
    "requested": lambda device: f"{device.asked_share:.1%}",
    "measured": lambda device: f"{device.measured_share:.1%}",
    "done": lambda device: f"{device.done_share:.1%}",
}


class RunAggregator:
    """Adds up a run's events: a few numbers per device and a bounded timeline, however many chunks there are."""

    def __init__(self) -> None:
        self._failures: list[RowFailure] = []
        self._devices = DeviceTable()
        self._timeline = Timeline()
        self._batch = BatchConfig(0)
        self._facts: dict[str, str] = {}

    def __call__(self, event: Event) -> None:
        self._devices(event)
        if isinstance(event, ChunkDone):
            self._failures += event.failures
            self._timeline.add(event.stats)
        elif isinstance(event, RunStarted):
            self._batch = event.batch
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
            facts={**self._facts, **(facts or {})},
            start_seconds=start_seconds,
        )
