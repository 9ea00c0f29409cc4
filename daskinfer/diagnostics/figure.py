"""A run as a figure of matplotlib, apart from pyplot: it belongs to nobody's list of open figures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from daskinfer.core.formatting import find_byte_unit
from daskinfer.diagnostics.charts import (
    SHARE_COLORS,
    STAGE_COLORS,
    Bar,
    compute_throughput,
    get_device_color,
    list_device_names,
    make_bars,
    shorten_label,
)
from daskinfer.diagnostics.device_stats import ReportLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _MAX_HEIGHT = 11.0, 30.0  # inches: as wide as a notebook's page
_MAX_LEGEND_DEVICES = 16  # devices in the key of colours; more would hide the picture


class RunFigure(Figure):
    """A figure that notebooks show also where nobody imported pyplot."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png")
        return content.getvalue()


def plot_report(report: ReportLike) -> RunFigure:
    """Timeline, speed, shares and memory of a run."""
    devices, drawn = list_device_names(report), make_bars(report.timeline)
    rows = max(1, len(devices))
    heights = [0.5 + 0.4 * rows, 2.2, 0.5 + 0.35 * rows]
    size = (_WIDTH, min(_MAX_HEIGHT, sum(heights) + 1.5))
    made = RunFigure(figsize=size, layout="constrained")
    made.suptitle(f"{report.totals}\n{report.verdict}".strip(), fontsize="medium", parse_math=False)
    grid = made.add_gridspec(3, 2, height_ratios=heights)
    timeline = made.add_subplot(grid[0, :])
    _plot_timeline(timeline, devices, drawn)
    _plot_throughput(made.add_subplot(grid[1, :], sharex=timeline), devices, drawn)
    _plot_shares(made.add_subplot(grid[2, 0]), report)
    _plot_memory(made.add_subplot(grid[2, 1]), report)
    return made


def _format_device_axis(axes: Axes, devices: Sequence[str]) -> None:
    """A row per device, the first on top; names are text also where they hold dollars."""
    axes.set_ylim(max(1, len(devices)) - 0.5, -0.5)
    axes.set_yticks(range(len(devices)), [shorten_label(device) for device in devices], parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_timeline(axes: Axes, devices: Sequence[str], bars: Sequence[Bar]) -> None:
    for row, device in enumerate(devices):
        for position, (lane, fill) in enumerate(STAGE_COLORS.items()):
            own = [bar for bar in bars if bar.span.device == device and bar.stage == lane]
            stretches = [(bar.begin, bar.end - bar.begin) for bar in own]
            axes.broken_barh(stretches, (row + (position - 1) * 0.28 - 0.13, 0.26), color=fill, alpha=0.8, linewidth=0.3)
    _format_device_axis(axes, devices)
    axes.set_title("timeline", loc="left", fontsize="medium")
    key = [Patch(color=fill, label=lane) for lane, fill in STAGE_COLORS.items()]
    axes.legend(handles=key, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(key), frameon=False)


def _plot_throughput(axes: Axes, devices: Sequence[str], bars: Sequence[Bar]) -> None:
    edges, by_device = compute_throughput(bars)
    below = [0.0] * (len(edges) - 1)
    for position, device in enumerate(devices):
        top = [a + b for a, b in zip(below, by_device.get(device, [0.0] * len(below)), strict=True)]
        axes.stairs(top, edges, baseline=below, fill=True, color=get_device_color(position))
        below = top
    axes.set_xlim(0.0, edges[-1] or 1.0)
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("seconds since the first chunk")
    axes.set_ylabel("rows/s")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("rows per second, each device on top of the one before", loc="left", fontsize="medium")
    key = [
        Patch(color=get_device_color(position), label=shorten_label(device))
        for position, device in enumerate(devices[:_MAX_LEGEND_DEVICES])
    ]
    if key:
        texts = axes.legend(handles=key, loc="upper left", bbox_to_anchor=(1, 1), frameon=False).get_texts()
        for text in texts:
            text.set_parse_math(False)


def _plot_shares(axes: Axes, report: ReportLike) -> None:
    for position, (what, fill) in enumerate(SHARE_COLORS.items()):
        middles = [row + (position - 1) * 0.28 for row in range(len(report.devices))]
        shares = [getattr(device, f"{what}_share") for device in report.devices]
        axes.barh(middles, shares, height=0.26, color=fill, label=what)
    _format_device_axis(axes, [device.device for device in report.devices])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("share of the rows", loc="left", fontsize="medium")
    # Below the numbers, whose height is that of some letters however tall the axes are.
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=2.0, ncols=len(SHARE_COLORS), frameon=False, fontsize="small"
    )


def _plot_memory(axes: Axes, report: ReportLike) -> None:
    unit, nbytes = find_byte_unit(max((device.peak_nbytes for device in report.devices), default=0))
    peaks = [device.peak_nbytes / nbytes for device in report.devices]
    axes.barh(range(len(peaks)), peaks, height=0.6, color=[get_device_color(row) for row in range(len(peaks))])
    _format_device_axis(axes, [device.device for device in report.devices])
    axes.set_xlabel(unit)
    axes.set_title("peak memory", loc="left", fontsize="medium")
