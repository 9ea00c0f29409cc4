"""What a run did, as people and programs read it, and the sum of events that it is made from."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from daskinfer.core.chunks import ChunkStats, RowFailure
from daskinfer.core.formatting import format_html_table, format_text_table
from daskinfer.diagnostics.charts import list_device_names, make_bars, render_svg
from daskinfer.diagnostics.device_stats import DeviceReport
from daskinfer.diagnostics.events import BatchSizeChosen, ChunkDone, ChunkFailed, Event, PlannedDevice, RunStarted
from daskinfer.diagnostics.timeline import Span, Timeline
from daskinfer.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    by_kind
        Rows of a micro-batch by kind of device, where they were measured.
    channels_last
        Kinds of device on which images lay in that memory format, since it was measured to be faster.
    timeline
        When each device read, computed and wrote, in spans of at least one chunk; boundedly many.
    facts
        What was computed, in words: the network, inputs, outputs, versions, and of a stored output the fingerprints.
    start_seconds
        Wall time before ``seconds``: workers start, load the network and measure the micro-batch.

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
        """Rows over seconds of wall time; 0.0 where nothing was done."""
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def n_retried(self) -> int:
        """Attempts at a chunk that came to nothing."""
        return sum(device.n_retried for device in self.devices)

    @property
    def tail_seconds(self) -> float:
        """How long the first device that was done waited for the last; 0.0 where one did it all.

        This process is none of them where workers took over from it.
        """
        ended = [device.ended for device in self.devices if device.n_chunks and device.device != "inline"]
        return max(ended) - min(ended) if ended else 0.0

    @property
    def _total_device_seconds(self) -> float:
        """What the devices had of the time together: all of it each, but where workers took over from this process.

        Until its last chunk they had to start, and after it it was done.
        """
        working = [device for device in self.devices if device.n_rows]
        here = [device.ended - device.began for device in working if device.device == "inline"]
        if not here or len(working) == 1:
            return self.seconds * len(working)
        return here[0] + max(0.0, self.seconds - here[0]) * (len(working) - 1)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain strings, numbers, lists and dicts; the timeline is not in it.

        Examples
        --------
        >>> RunReport(8, 2.0, 4, ()).to_dict()["rows_per_second"]
        4.0
        """
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("timeline", "devices")}
        devices = [{**_convert_to_dict(device), "rows_per_second": device.rows_per_second} for device in self.devices]
        derived = {name: getattr(self, name) for name in ("rows_per_second", "n_retried", "tail_seconds", "verdict")}
        failures = [_convert_to_dict(failure) for failure in self.failures]
        return own | derived | {"devices": devices, "failures": failures, "by_kind": dict(self.by_kind)}

    def _format_devices(self) -> list[list[str]]:
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

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as one page of HTML that opens offline: timeline, speed, shares, memory, failures and facts.

        Parameters
        ----------
        path
            Where the page is written, wholly or not at all; what is there is replaced. None: nowhere.

        Returns
        -------
        str
            The page, some 1.3 MB: the code that draws its charts is in it.

        Raises
        ------
        SourceMissing
            Where the folder of ``path`` does not exist.

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
        """The report as a figure of matplotlib, which notebooks show: timeline, speed, shares and memory.

        Returns
        -------
        matplotlib.figure.Figure
            Apart from pyplot, so there is nothing to close.

        Raises
        ------
        MissingExtra
            Where matplotlib is not installed.

        Examples
        --------
        >>> len(RunReport(8, 2.0, 4, ()).plot().axes)
        4
        """
        try:
            from daskinfer.diagnostics.figure import plot_report
        except ImportError as error:
            raise MissingExtra(
                f"RunReport.plot() needs matplotlib, which cannot be imported ({error}). Install it: "
                'pip install "daskinfer[plot]"; or use to_html(), which needs nothing more.'
            ) from error
        return plot_report(self)

    def __str__(self) -> str:
        lines = [format_text_table(_REPORT_HEADERS, self._format_devices()), self._format_summary(), self.details]
        return "\n".join(line for line in lines if line)

    __repr__ = __str__  # what a notebook without HTML and the interpreter's prompt show

    def _repr_html_(self) -> str:
        said = "".join(f"<p>{html.escape(line)}</p>" for line in (self.details, self._format_summary()) if line)
        picture = render_svg(list_device_names(self), make_bars(self.timeline))
        return f"{format_html_table(_REPORT_HEADERS, self._format_devices())}{picture}{said}"

    def _format_summary(self) -> str:
        return f"{self.totals}; {self.verdict}" if self.verdict else self.totals

    @property
    def totals(self) -> str:
        """How much was done in which time, in one line."""
        if self.rows_before and not any(device.n_chunks for device in self.devices):
            return f"nothing to do: all {self.rows_before:,} rows were done before"
        said = f"{self.rows:,} rows in {self.seconds:.2f} s ({self.rows_per_second:,.0f} rows/s), "
        said += f"micro-batch {self.batch_size:,}"
        said += f"; {self.rows_before:,} rows were done before" if self.rows_before else ""
        said += f"; {len(self.failed_rows):,} rows have no answer" if self.failed_rows else ""
        return said

    @property
    def details(self) -> str:
        """What else is worth a line: a start that took long, micro-batches by kind, retries, a long wait for the last.

        Empty where nothing is.
        """
        said = (
            [f"before that the start took {self.start_seconds:.1f} s"] if self.start_seconds >= SLOW_STARTUP_SECONDS else []
        )
        said += [f"micro-batch by kind: {', '.join(f'{k} {n:,}' for k, n in self.by_kind.items())}"] if self.by_kind else []
        said += [f"images in channels_last on {', '.join(self.channels_last)}"] if self.channels_last else []
        said += [f"attempts that came to nothing: {self.n_retried:,}"] if self.n_retried else []
        if self.tail_seconds > LONG_TAIL_FRACTION * self.seconds:
            said.append(f"the first device was done {self.tail_seconds:.2f} s before the last")
        return "; ".join(said)

    @property
    def verdict(self) -> str:
        """What to change for more speed, in one line; empty where nothing was done. The first that holds:

        1. Devices waited for reads for ``SIGNIFICANT_FRACTION`` of the time: input-bound.
        2. They computed for ``DOMINANT_FRACTION`` of it: compute-bound.
        3. The first device was done ``SIGNIFICANT_FRACTION`` of it before the last: unbalanced.
        4. Writing took ``DOMINANT_FRACTION`` of it: output-bound.
        5. Otherwise what was around the chunks took the time.
        """
        total = self._total_device_seconds
        if not total:
            return ""
        waited, computed, wrote = (
            min(1.0, sum(getattr(device, f"{what}seconds") for device in self.devices if device.n_rows) / total)
            for what in ("waited_", "", "write_")
        )
        if waited >= SIGNIFICANT_FRACTION:
            return f"input-bound: devices waited {waited:.0%} for reads; raise prefetch"
        if computed >= DOMINANT_FRACTION:
            return f"compute-bound: devices computed {computed:.0%} of the time"
        if self.tail_seconds >= SIGNIFICANT_FRACTION * self.seconds:
            late = f"the last device ended {self.tail_seconds:.1f} s after the first"
            return f"unbalanced: {late}; use weights of 'auto', or smaller micro-batches"
        if wrote >= DOMINANT_FRACTION:
            return f"output-bound: writing took {wrote:.0%} of the time; use faster storage or fewer devices"
        cure = "give more rows per call, use fewer devices, or share them with no other run"
        return f"overhead-bound: devices computed {computed:.0%} of the time; {cure}"


SIGNIFICANT_FRACTION, DOMINANT_FRACTION = 0.15, 0.7  # of the devices' time; arbitrary
LONG_TAIL_FRACTION = 0.1  # of the wall time, from which on it is said; arbitrary
SLOW_STARTUP_SECONDS = 1.0  # seconds, from which on it is said; arbitrary

_REPORT_HEADERS = ("device", "name", "chunks", "rows", "rows/s", "asked", "measured", "done")


def _convert_to_dict(record: Any) -> dict[str, Any]:
    return {one.name: getattr(record, one.name) for one in fields(record)}


class RunAggregator:
    """Sums a run's events up; holds a few numbers per device and a bounded timeline, however many chunks there are."""

    def __init__(self) -> None:
        self._failures: list[RowFailure] = []
        self._devices: dict[str, _DeviceStats] = {}
        self._timeline = Timeline()
        self._batch_size, self._by_kind = 0, dict[str, int]()
        self._channels_last: tuple[str, ...] = ()
        self._facts: dict[str, str] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, ChunkDone):
            self._get_stats(event.device).add(event.stats, event.n_failed)
            self._failures += event.failures
            self._timeline.add(event.stats)
        elif isinstance(event, ChunkFailed):
            self._get_stats(event.device).n_retried += 1
        elif isinstance(event, RunStarted):
            self._devices = {asked.device: _DeviceStats(asked) for asked in event.devices}
            self._set_batch_config(event)
            self._facts = {"network": event.model, "input": "; ".join(event.inputs), "output": "; ".join(event.outputs)}
        elif isinstance(event, BatchSizeChosen):
            self._set_batch_config(event)

    def _set_batch_config(self, event: RunStarted | BatchSizeChosen) -> None:
        self._batch_size, self._by_kind = event.batch_size, dict(event.by_kind)
        self._channels_last = event.channels_last

    def make_report(
        self, *, seconds: float, start_seconds: float = 0.0, facts: Mapping[str, str] | None = None
    ) -> RunReport:
        """The sum so far, in ``seconds`` of wall time; ``facts`` come beside those that the events say."""
        rows = sum(sums.n_rows for sums in self._devices.values())
        speed = sum(sums.rows_per_second for sums in self._devices.values())
        failed = sorted(row for failure in self._failures for row in range(failure.start, failure.stop))
        return RunReport(
            rows=rows,
            seconds=seconds,
            batch_size=self._batch_size,
            devices=tuple(sums.make_report(rows, speed) for sums in self._devices.values()),
            failed_rows=tuple(failed),
            failures=tuple(self._failures),
            by_kind=self._by_kind,
            channels_last=self._channels_last,
            timeline=self._timeline.spans,
            facts={**self._facts, **(facts or {})},
            start_seconds=start_seconds,
        )

    def _get_stats(self, device: str) -> _DeviceStats:
        return self._devices.setdefault(device, _DeviceStats(PlannedDevice(device, "", "", 0.0)))


@dataclass
class _DeviceStats:
    planned: PlannedDevice
    device_name: str = ""
    n_chunks: int = 0
    n_rows: int = 0
    seconds: float = 0.0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    waited_seconds: float = 0.0
    batch_size: int = 0
    peak_nbytes: int = 0
    n_retried: int = 0
    began: float = 0.0
    ended: float = 0.0

    def add(self, stats: ChunkStats, n_failed: int) -> None:
        self.device_name = stats.device_name or self.device_name
        self.n_chunks += 1
        self.n_rows += stats.stop - stats.start - n_failed
        self.seconds += stats.seconds
        self.read_seconds += stats.read_seconds
        self.write_seconds += stats.write_seconds
        self.waited_seconds += stats.waited_seconds
        if stats.batch_size:  # 0 where the chunk was given up
            self.batch_size = min(self.batch_size or stats.batch_size, stats.batch_size)
        self.peak_nbytes = max(self.peak_nbytes, stats.peak_nbytes)
        self.began = min(self.began or stats.read_began, stats.read_began)
        self.ended = max(self.ended, stats.ended)

    @property
    def rows_per_second(self) -> float:
        return self.n_rows / self.seconds if self.seconds else 0.0

    def make_report(self, n_rows_total: int, total_rows_per_second: float) -> DeviceReport:
        own = {name: value for name, value in vars(self).items() if name != "planned"}
        return DeviceReport(
            self.planned.device,
            asked_share=self.planned.share,
            done_share=self.n_rows / n_rows_total if n_rows_total else 0.0,
            measured_share=self.rows_per_second / total_rows_per_second if total_rows_per_second else 0.0,
            **own,
        )
