"""Draw a run's report with matplotlib; without pyplot, so the figure is on no list of open figures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from daskinfer.diagnostics.charts import (
    SERIES_HEIGHT,
    SHARES,
    STAGES,
    Bar,
    get_device_color,
    list_device_names,
    make_bars,
    measure_peak_memory,
    shorten_label,
    stack_throughput,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from daskinfer.diagnostics.report import RunReport

_WIDTH, _MAX_HEIGHT = 11.0, 30.0  # inches: as wide as a notebook's page
_MAX_LEGEND_DEVICES = 16  # devices in the legend; more would hide the picture


class RunFigure(Figure):
    """A figure that notebooks show even if pyplot is not imported."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png")
        return content.getvalue()


def plot_report(report: RunReport) -> RunFigure:
    """Draw timeline, throughput, shares and memory of a run."""
    devices, bars = list_device_names(report), make_bars(report.timeline)
    n_rows = max(1, len(devices))
    heights = [0.5 + 0.4 * n_rows, 2.2, 0.5 + 0.35 * n_rows]
    figure = RunFigure(figsize=(_WIDTH, min(_MAX_HEIGHT, sum(heights) + 1.5)), layout="constrained")
    figure.suptitle(f"{report.totals}\n{report.verdict}".strip(), fontsize="medium", parse_math=False)
    grid = figure.add_gridspec(3, 2, height_ratios=heights)
    timeline = figure.add_subplot(grid[0, :])
    _plot_timeline(timeline, devices, bars)
    _plot_throughput(figure.add_subplot(grid[1, :], sharex=timeline), devices, bars)
    _plot_shares(figure.add_subplot(grid[2, 0]), report)
    _plot_memory(figure.add_subplot(grid[2, 1]), report)
    return figure


def _format_axes(axes: Axes, title: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize="medium")


def _format_device_axis(axes: Axes, devices: Sequence[str]) -> None:
    """Give each device a row, the first on top; names that contain dollars stay plain text."""
    axes.set_ylim(max(1, len(devices)) - 0.5, -0.5)
    axes.set_yticks(range(len(devices)), [shorten_label(device) for device in devices], parse_math=False)


def _plot_timeline(axes: Axes, devices: Sequence[str], bars: Sequence[Bar]) -> None:
    for row, device in enumerate(devices):
        for stage in STAGES:
            intervals = [
                (bar.begin, bar.end - bar.begin) for bar in bars if bar.span.device == device and bar.stage == stage.label
            ]
            place = (row + stage.offset - SERIES_HEIGHT / 2, SERIES_HEIGHT)
            axes.broken_barh(intervals, place, color=stage.color, alpha=0.8, linewidth=0.3)
    _format_axes(axes, "timeline")
    _format_device_axis(axes, devices)
    handles = [Patch(color=stage.color, label=stage.label) for stage in STAGES]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles), frameon=False)


def _plot_throughput(axes: Axes, devices: Sequence[str], bars: Sequence[Bar]) -> None:
    edges, layers = stack_throughput(devices, bars)
    for layer in layers:
        axes.stairs(layer.top, edges, baseline=layer.bottom, fill=True, color=layer.color)
    axes.set_xlim(0.0, edges[-1] or 1.0)
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("seconds since the first chunk")
    axes.set_ylabel("rows/s")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    _format_axes(axes, "throughput, devices stacked")
    handles = [Patch(color=layer.color, label=shorten_label(layer.device)) for layer in layers[:_MAX_LEGEND_DEVICES]]
    if handles:
        legend = axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _plot_shares(axes: Axes, report: RunReport) -> None:
    for share, get_value in SHARES:
        rows = [row + share.offset for row in range(len(report.devices))]
        axes.barh(rows, list(map(get_value, report.devices)), height=SERIES_HEIGHT, color=share.color, label=share.label)
    _format_axes(axes, "share of rows")
    _format_device_axis(axes, [device.device for device in report.devices])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    # Below the tick labels, whose height is that of some letters however tall the axes are.
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=2.0, ncols=len(SHARES), frameon=False, fontsize="small"
    )


def _plot_memory(axes: Axes, report: RunReport) -> None:
    peaks, unit = measure_peak_memory(report.devices)
    axes.barh(range(len(peaks)), peaks, height=0.6, color=[get_device_color(row) for row in range(len(peaks))])
    _format_axes(axes, "peak memory")
    _format_device_axis(axes, [device.device for device in report.devices])
    axes.set_xlabel(unit)
