"""Draw a run's report with matplotlib; without pyplot, so the figure is on no list of open figures."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from daskinfer.diagnostics.charts import (
    MARK_STYLES,
    SERIES_HEIGHT,
    STAGES,
    Bar,
    PlacedMark,
    Row,
    list_rows,
    list_shares,
    make_bars,
    measure_peak_memory,
    place_marks,
    stack_throughput,
)
from daskinfer.diagnostics.palette import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from daskinfer.diagnostics.report import RunReport

_WIDTH, _MAX_HEIGHT = 11.0, 30.0  # inches: as wide as a notebook's page
_MAX_LEGEND_DEVICES = 16  # devices in the legend; more would hide the picture
_MAX_LEGEND_BESIDE = 6  # entries of the timeline's legend that fit beside its title
_HATCHES = {"": "", "/": "////", "\\": "\\\\\\\\", "x": "xxxx", ".": "...."}  # in matplotlib, more characters are denser
_HATCH_STYLE: dict[str, Any] = {"edgecolor": INK, "linewidth": 0.4}
_BAND_OPACITY, _STRIPE_WIDTH = 0.12, 0.008  # of a device's colour behind its bars; of it beside them, in widths of the axes


class RunFigure(Figure):
    """A figure that notebooks show even if pyplot is not imported."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png")
        return content.getvalue()


def plot_report(report: RunReport) -> RunFigure:
    """Draw timeline, throughput, shares and memory of a run."""
    rows, bars = list_rows(report), make_bars(report.timeline)
    n_rows = max(1, len(rows))
    heights = [0.5 + 0.45 * n_rows, 2.2, 0.5 + 0.35 * n_rows]
    figure = RunFigure(figsize=(_WIDTH, min(_MAX_HEIGHT, sum(heights) + 1.5)), layout="constrained")
    figure.suptitle(_wrap_title(report), fontsize="medium", parse_math=False)
    grid = figure.add_gridspec(3, 2, height_ratios=heights)
    timeline = figure.add_subplot(grid[0, :])
    _plot_timeline(timeline, rows, bars, place_marks(report))
    _plot_throughput(figure.add_subplot(grid[1, :], sharex=timeline), rows, bars)
    _plot_shares(figure.add_subplot(grid[2, 0]), rows, report)
    _plot_memory(figure.add_subplot(grid[2, 1]), rows, report)
    return figure


_TITLE_CHARACTERS = 130  # in a line that is as wide as the figure


def _wrap_title(report: RunReport) -> str:
    return "\n".join(line for text in (report.totals, report.verdict) for line in textwrap.wrap(text, _TITLE_CHARACTERS))


def _format_axes(axes: Axes, title: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize="medium")


def _format_device_axis(axes: Axes, rows: Sequence[Row]) -> None:
    """Give each device a row, the first on top; names that contain dollars stay plain text."""
    axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], parse_math=False)


def _plot_timeline(axes: Axes, rows: Sequence[Row], bars: Sequence[Bar], marks: Sequence[PlacedMark]) -> None:
    for number, row in enumerate(rows):
        _draw_device_band(axes, number, row)
        for stage in STAGES:
            intervals = [
                (bar.begin, bar.end - bar.begin)
                for bar in bars
                if bar.span.device == row.device and bar.stage == stage.label
            ]
            place = (number + stage.offset - SERIES_HEIGHT / 2, SERIES_HEIGHT)
            phase = stage.phase
            axes.broken_barh(intervals, place, facecolor=phase.color, hatch=_HATCHES[phase.hatch], **_HATCH_STYLE)
    handles: list[Any] = [
        Patch(facecolor=stage.phase.color, hatch=_HATCHES[stage.phase.hatch], label=stage.label, **_HATCH_STYLE)
        for stage in STAGES
        if any(bar.stage == stage.label for bar in bars)
    ]
    handles += _plot_marks(axes, rows, marks)
    _format_axes(axes, "timeline")
    _format_device_axis(axes, rows)
    if handles:
        how = {"frameon": False, "fontsize": "small", "handlelength": 1.6, "columnspacing": 1.2, "borderaxespad": 0.2}
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles), **how)
    if len(handles) > _MAX_LEGEND_BESIDE:
        axes.set_title("timeline", loc="left", fontsize="medium", pad=20)  # above the legend


def _draw_device_band(axes: Axes, number: int, row: Row) -> None:
    """Show a device's colour behind its bars, palely, and beside them."""
    axes.axhspan(number - 0.45, number + 0.45, color=row.color, alpha=_BAND_OPACITY, linewidth=0)
    place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "clip_on": False}
    axes.add_patch(Rectangle((-_STRIPE_WIDTH, number - 0.45), _STRIPE_WIDTH, 0.9, color=row.color, linewidth=0, **place))


def _plot_marks(axes: Axes, rows: Sequence[Row], marks: Sequence[PlacedMark]) -> list[Any]:
    """Mark what went wrong; return the entries of the legend."""
    numbers = {row.device: number for number, row in enumerate(rows)}
    handles = []
    for kind, style in MARK_STYLES.items():
        own = [one for one in marks if one.mark.kind == kind and one.mark.device in numbers]
        if own:
            look: dict[str, Any] = {"color": style.color, "marker": style.shape, "linestyle": "none", "markersize": 9.0}
            look |= {"markeredgecolor": "white", "markeredgewidth": 0.8}
            places = [one.seconds for one in own], [numbers[one.mark.device] + style.offset for one in own]
            axes.plot(*places, clip_on=False, zorder=5, **look)
            handles.append(Line2D([], [], label=kind, **look))
    return handles


def _plot_throughput(axes: Axes, rows: Sequence[Row], bars: Sequence[Bar]) -> None:
    edges, layers = stack_throughput(rows, bars)
    for layer in layers:
        axes.stairs(layer.top, edges, baseline=layer.bottom, fill=True, color=layer.row.color)
    axes.set_xlim(0.0, edges[-1] or 1.0)
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("seconds since the first chunk")
    axes.set_ylabel("rows/s")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    _format_axes(axes, "throughput, devices stacked")
    handles = [Patch(color=layer.row.color, label=layer.row.label) for layer in layers[:_MAX_LEGEND_DEVICES]]
    if handles:
        legend = axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _plot_shares(axes: Axes, rows: Sequence[Row], report: RunReport) -> None:
    """Draw shares in the devices' colours; the legend has them in ink."""
    devices = {device.device: device for device in report.devices}
    known = [(number, row, devices[row.device]) for number, row in enumerate(rows) if row.device in devices]
    handles = []
    for share in list_shares(report):
        for number, row, device in known:
            look: dict[str, Any] = {"facecolor": (row.color, share.opacity), "edgecolor": row.color, "height": SERIES_HEIGHT}
            axes.barh(number + share.offset, share.get_value(device), **look)
        handles.append(Patch(facecolor=(INK, share.opacity), edgecolor=INK, label=share.label))
    _format_axes(axes, "share of rows")
    _format_device_axis(axes, rows)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    # Below the tick labels, whose height is that of some letters however tall the axes are.
    below: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, 0), "borderaxespad": 2.0}
    axes.legend(handles=handles, **below, ncols=len(handles), frameon=False, fontsize="small")


def _plot_memory(axes: Axes, rows: Sequence[Row], report: RunReport) -> None:
    peaks, unit = measure_peak_memory(report.devices)
    by_device = dict(zip((device.device for device in report.devices), peaks, strict=True))
    values = [by_device.get(row.device, 0.0) for row in rows]
    axes.barh(range(len(rows)), values, height=0.6, color=[row.color for row in rows])
    _format_axes(axes, "peak memory")
    _format_device_axis(axes, rows)
    axes.set_xlabel(unit)
