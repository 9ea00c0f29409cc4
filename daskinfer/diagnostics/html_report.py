"""Render a run's report as one HTML page: it opens offline, needs no other file, and may fetch nothing.

Its charts are bokeh's, whose code is inside the page (1.3 MB); the page's own policy forbids everything from elsewhere.
Names and messages are plain text everywhere: in the page by jinja2's escaping, on axes as ``PlainText`` (bokeh would render
``$$x$$`` as a formula), in tooltips by bokeh's escaping.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from bokeh.embed import components
from bokeh.models import (
    ColumnDataSource,
    DataRange1d,
    FixedTicker,
    HoverTool,
    NumeralTickFormatter,
    PlainText,
    Range1d,
)
from bokeh.plotting import figure
from bokeh.resources import Resources

from daskinfer.core.files import write_atomic
from daskinfer.core.formatting import format_nbytes, render_template
from daskinfer.diagnostics.charts import (
    SERIES_HEIGHT,
    SHARES,
    STAGES,
    Bar,
    compute_idle_seconds,
    get_device_color,
    list_device_names,
    make_bars,
    measure_peak_memory,
    shorten_label,
    stack_throughput,
)
from daskinfer.diagnostics.device_stats import DeviceReport
from daskinfer.diagnostics.report import DEVICE_COLUMNS
from daskinfer.errors import SourceMissing

if TYPE_CHECKING:
    from daskinfer.diagnostics.report import RunReport

MAX_FAILURES = 1000  # in the table; nobody reads more, and the browser lays out each
MAX_EXCEPTION_CHARACTERS = 500  # of an exception's text
_MAX_CHART_HEIGHT = 1200  # pixels; more devices get thinner rows
_PIXELS_PER_CHARACTER = 6  # of a name on an axis, on average

Figure = Any  # bokeh's; its keywords have no types


def render_page(report: RunReport) -> str:
    """Render the whole page."""
    charts = _make_charts(report)
    script, divs = components(charts) if charts else ("", {})
    columns = _make_columns(report)
    return render_template(
        "diagnostics/html_report.html.j2",
        report=report,
        title=report.facts.get("model") or "a run",
        code=Resources(mode="inline", components=["bokeh"], log_level="warn").render() if charts else "",
        script=script,
        charts=divs,
        device_headers=tuple(columns),
        devices=[[format_cell(device) for format_cell in columns.values()] for device in report.devices],
        colors=[get_device_color(position) for position in range(len(report.devices))],
        tail=_describe_tail(report),
        failure_headers=("rows", "device", "error"),
        failures=_format_failures(report),
        n_more=max(0, len(report.failures) - MAX_FAILURES),
        facts=[[name, value] for name, value in report.facts.items() if value],
    )


def write_page(content: str, path: str | os.PathLike[str]) -> None:
    """Write a page to ``path`` atomically, replacing an existing file.

    Raises
    ------
    SourceMissing
        If its folder does not exist.
    OSError
        If it cannot be written there.
    """
    file = Path(os.path.abspath(path))
    if not file.parent.is_dir():
        raise SourceMissing(f"the folder of the report, {str(file.parent)!r}, does not exist. Create it first.")
    try:
        write_atomic(file, content.encode())
    except OSError:
        with contextlib.suppress(OSError):
            file.with_name(f"{file.name}.new").unlink()
        raise


def _make_columns(report: RunReport) -> Mapping[str, Callable[[DeviceReport], str]]:
    """Return the columns of the devices' table: those of the report's text, and more, as a page is wider."""
    idle = compute_idle_seconds(report.devices)
    return {
        **DEVICE_COLUMNS,
        "batch size": lambda device: f"{device.batch_size:,}" if device.batch_size else "",
        "reading": lambda device: f"{device.read_seconds:,.2f} s",
        "waiting": lambda device: f"{device.waited_seconds:,.2f} s",
        "computing": lambda device: f"{device.seconds:,.2f} s",
        "writing": lambda device: f"{device.write_seconds:,.2f} s",
        "peak memory": lambda device: format_nbytes(device.peak_nbytes) if device.peak_nbytes else "",
        "retries": lambda device: f"{device.n_retried:,}",
        "idle tail": lambda device: f"{idle[device.device]:,.2f} s" if device.device in idle else "",
    }


def _format_failures(report: RunReport) -> list[list[str]]:
    return [
        [
            f"{f.start:,}" if f.stop - f.start == 1 else f"{f.start:,} to {f.stop - 1:,}",
            f.device,
            f.exception if len(f.exception) <= MAX_EXCEPTION_CHARACTERS else f"{f.exception[:MAX_EXCEPTION_CHARACTERS]}…",
        ]
        for f in report.failures[:MAX_FAILURES]
    ]


def _describe_tail(report: RunReport) -> str:
    """Describe the idle tail in a sentence; empty if there is none."""
    if not report.tail_seconds:
        return ""
    idle = compute_idle_seconds(report.devices)
    first = max(idle, key=idle.__getitem__)
    return f"{first} finished {report.tail_seconds:,.2f} s before the last device."


def _make_charts(report: RunReport) -> dict[str, Figure]:
    """Make the charts that have anything to show, by name."""
    charts = {}
    if bars := make_bars(report.timeline):
        devices = list_device_names(report)
        charts["timeline"] = _make_timeline_chart(devices, bars)
        charts["throughput"] = _make_throughput_chart(devices, bars, charts["timeline"].x_range)
    if report.devices:
        charts["shares"] = _make_shares_chart(report)
    if report.tail_seconds:
        idle = compute_idle_seconds(report.devices)
        charts["tail"] = _make_bar_chart(report, [idle.get(device.device, 0.0) for device in report.devices], "seconds")
    if any(device.peak_nbytes for device in report.devices):
        charts["memory"] = _make_bar_chart(report, *measure_peak_memory(report.devices))
    return charts


def _make_chart(height: int, devices: Sequence[str], **options: Any) -> Figure:
    """Make a chart whose frame begins right of the longest name even if it shows no names: time axes are aligned."""
    left = 40 + _PIXELS_PER_CHARACTER * max((len(shorten_label(device)) for device in devices), default=0)
    chart: Figure = figure(height=height, sizing_mode="stretch_width", min_border_left=left, **options)
    chart.toolbar.logo = None
    chart.toolbar.autohide = True
    chart.outline_line_color = None
    chart.xgrid.grid_line_color = chart.ygrid.grid_line_color = "#e5e5e5"
    return chart


def _make_device_chart(devices: Sequence[str], row_height: int, x_range: Any, **options: Any) -> Figure:
    """Make a chart with a row of so many pixels per device, the first on top."""
    height = min(_MAX_CHART_HEIGHT, row_height * len(devices) + 80)
    chart = _make_chart(height, devices, x_range=x_range, y_range=Range1d(start=len(devices) - 0.5, end=-0.5), **options)
    chart.yaxis.ticker = FixedTicker(ticks=list(range(len(devices))))
    chart.yaxis.major_label_overrides = {i: PlainText(text=shorten_label(name)) for i, name in enumerate(devices)}
    chart.ygrid.grid_line_color = None
    return chart


def _move_legend_above(chart: Figure) -> None:
    """Move the legend out of the frame, so that it hides nothing."""
    (legend,) = chart.legend
    legend.orientation, legend.border_line_color, legend.padding, legend.margin = "horizontal", None, 0, 2
    chart.add_layout(legend, "above")


_TIME_TOOLS = "xpan,xwheel_zoom,xbox_zoom,reset"


def _make_timeline_chart(devices: Sequence[str], bars: Sequence[Bar]) -> Figure:
    chart = _make_device_chart(devices, 42, Range1d(start=0.0, end=max(bar.end for bar in bars)), tools=_TIME_TOOLS)
    chart.xaxis.axis_label = "seconds since the first chunk"
    row = {device: i for i, device in enumerate(devices)}
    glyphs = []
    for stage in STAGES:
        own = [bar for bar in bars if bar.stage == stage.label]
        if not own:  # bokeh's legend would have its name without its colour
            continue
        middle = np.array([row[bar.span.device] for bar in own], np.float64) + stage.offset
        source = ColumnDataSource(
            {
                "left": np.array([bar.begin for bar in own], np.float64),
                "right": np.array([bar.end for bar in own], np.float64),
                "top": middle - SERIES_HEIGHT / 2,
                "bottom": middle + SERIES_HEIGHT / 2,
                "seconds": np.array([bar.end - bar.begin for bar in own], np.float64),
                "device": [bar.span.device for bar in own],
                "rows": [f"{bar.span.n_rows:,} of {bar.span.start:,}:{bar.span.stop:,}" for bar in own],
                "chunks": np.array([bar.span.n_chunks for bar in own], np.int32),
            }
        )
        style = {"color": stage.color, "fill_alpha": 0.8, "line_width": 0.5, "legend_label": stage.label}
        glyphs.append(chart.quad("left", "right", "top", "bottom", source=source, name=stage.label, **style))
    what = [("device", "@device"), ("", "$name"), ("rows", "@rows"), ("chunks", "@chunks")]
    when = [("from", "@left{0,0.000} s"), ("for", "@seconds{0,0.000} s")]
    chart.add_tools(HoverTool(renderers=glyphs, tooltips=what + when))
    _move_legend_above(chart)
    return chart


def _make_throughput_chart(devices: Sequence[str], bars: Sequence[Bar], x_range: Range1d) -> Figure:
    chart = _make_chart(240, devices, x_range=x_range, y_range=DataRange1d(start=0.0), tools=_TIME_TOOLS)
    chart.xaxis.axis_label, chart.yaxis.axis_label = "seconds since the first chunk", "rows/s"
    chart.yaxis.formatter = NumeralTickFormatter(format="0,0.[00]")
    edges, layers = stack_throughput(devices, bars)
    for layer in layers:
        bottom, top = np.array(layer.bottom), np.array(layer.top)
        columns = {"left": np.array(edges[:-1]), "right": np.array(edges[1:]), "bottom": bottom, "top": top}
        source = ColumnDataSource(columns | {"speed": top - bottom, "device": [layer.device] * len(top)})
        chart.quad("left", "right", "top", "bottom", source=source, color=layer.color, line_width=0)
    chart.add_tools(HoverTool(tooltips=[("device", "@device"), ("rows/s", "@speed{0,0.[0]}"), ("at", "@left{0,0.00} s")]))
    return chart


def _make_shares_chart(report: RunReport) -> Figure:
    devices = [device.device for device in report.devices]
    chart = _make_device_chart(devices, 36, DataRange1d(start=0.0), tools="", toolbar_location=None)
    chart.xaxis.formatter = NumeralTickFormatter(format="0.[0]%")
    for share, get_value in SHARES:
        values = list(map(get_value, report.devices))
        source = ColumnDataSource({"y": np.arange(len(devices)) + share.offset, "share": values, "device": devices})
        style = {"color": share.color, "legend_label": share.label, "name": share.label}
        chart.hbar("y", right="share", height=SERIES_HEIGHT, source=source, **style)
    chart.add_tools(HoverTool(tooltips=[("device", "@device"), ("", "$name @share{0.0%}")]))
    _move_legend_above(chart)
    return chart


def _make_bar_chart(report: RunReport, values: Sequence[float], unit: str) -> Figure:
    """Make a chart of one number per device, in the device's colour."""
    devices = [device.device for device in report.devices]
    chart = _make_device_chart(devices, 36, DataRange1d(start=0.0), tools="", toolbar_location=None)
    chart.xaxis.axis_label = unit
    colors = [get_device_color(position) for position in range(len(devices))]
    source = ColumnDataSource({"y": np.arange(len(devices)), "value": values, "device": devices, "color": colors})
    chart.hbar("y", right="value", height=0.6, source=source, color="color")
    chart.add_tools(HoverTool(tooltips=[("device", "@device"), (unit, "@value{0,0.00}")]))
    return chart
