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
    BoxAnnotation,
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
    MARK_STYLES,
    SERIES_HEIGHT,
    STAGES,
    Bar,
    PlacedMark,
    Row,
    Stage,
    compute_idle_seconds,
    list_rows,
    list_shares,
    make_bars,
    measure_peak_memory,
    place_marks,
    stack_throughput,
)
from daskinfer.diagnostics.device_stats import DeviceReport
from daskinfer.diagnostics.palette import INK
from daskinfer.diagnostics.provenance import format_period
from daskinfer.diagnostics.report import choose_columns
from daskinfer.errors import SourceMissing

if TYPE_CHECKING:
    from daskinfer.diagnostics.report import RunReport

MAX_FAILURES = 1000  # in the table; nobody reads more, and the browser lays out each
MAX_EXCEPTION_CHARACTERS = 500  # of an exception's text
_MAX_CHART_HEIGHT = 1200  # pixels; more devices get thinner rows
_MIN_LEFT = 90  # pixels of a time axis's left margin, for rows/s of six digits and their title
_PIXELS_PER_CHARACTER = 6  # of a name on an axis, on average

Figure = Any  # bokeh's; its keywords have no types


def render_page(report: RunReport) -> str:
    """Render the whole page."""
    charts = _make_charts(report)
    script, divs = components(charts) if charts else ("", {})
    columns, times = _make_columns(report), _make_time_columns(report)
    shown, colors = report.shown_devices, {row.device: row.color for row in list_rows(report)}
    return render_template(
        "diagnostics/html_report.html.j2",
        report=report,
        title=report.facts.get("model") or "a run",
        period=format_period(report.started_at, report.ended_at) if report.started_at else "",
        call=report.facts.get("command") or report.facts.get("call") or "",
        code=Resources(mode="inline", components=["bokeh"], log_level="warn").render() if charts else "",
        script=script,
        charts=divs,
        device_headers=tuple(columns),
        devices=[[format_cell(device) for format_cell in columns.values()] for device in shown],
        time_headers=tuple(times),
        times=[[format_cell(device) for format_cell in times.values()] for device in shown],
        colors=[colors[device.device] for device in shown],
        tail=_describe_tail(report),
        legends={"timeline": _list_stage_entries(report), "shares": _list_share_entries(report)},
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
    return {
        **choose_columns(report.shown_devices),
        "batch size": lambda device: f"{device.batch_size:,}" if device.batch_size else "",
        "peak memory": lambda device: format_nbytes(device.peak_nbytes) if device.peak_nbytes else "",
        "retries": lambda device: f"{device.n_retried:,}",
    }


def _make_time_columns(report: RunReport) -> Mapping[str, Callable[[DeviceReport], str]]:
    """Return the columns of the table of where the devices' time went."""
    idle = compute_idle_seconds(report.devices)
    return {
        "device": lambda device: device.title,
        "reading": lambda device: f"{device.read_seconds:,.2f} s",
        "waiting for reads": lambda device: f"{device.waited_seconds:,.2f} s",
        "loading the model": lambda device: f"{device.load_seconds:,.2f} s",
        "first call": lambda device: f"{device.first_call_seconds:,.2f} s",
        "computing": lambda device: f"{device.seconds:,.2f} s",
        "writing": lambda device: f"{device.write_seconds:,.2f} s",
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


def _list_stage_entries(report: RunReport) -> list[tuple[str, str, str]]:
    """List the timeline's legend: the background of a swatch or the colour of a character, the character, and the text."""
    shown = {bar.stage for bar in make_bars(report.timeline)}
    happened = {mark.kind for mark in report.marks}
    return [
        *((stage.phase.css, "", stage.label) for stage in STAGES if stage.label in shown),
        *((f"color: {style.color}", style.character, kind) for kind, style in MARK_STYLES.items() if kind in happened),
    ]


def _list_share_entries(report: RunReport) -> list[tuple[str, str, str]]:
    ink = ", ".join(str(int(INK[i : i + 2], 16)) for i in (1, 3, 5))
    return [(f"background: rgba({ink}, {share.opacity})", "", share.label) for share in list_shares(report)]


def _describe_tail(report: RunReport) -> str:
    """Describe the idle tail in a sentence; empty if there is none."""
    if not report.tail_seconds:
        return ""
    if report.tail_seconds < _SHORT_TAIL_FRACTION * report.seconds:
        return f"Devices finished within {report.tail_seconds:,.2f} s of each other."
    idle = compute_idle_seconds(report.devices)
    first = max(report.devices, key=lambda device: idle.get(device.device, 0.0))
    return f"{first.title} finished {report.tail_seconds:,.2f} s before the last device."


_SHORT_TAIL_FRACTION = 0.1  # of the wall time, below which nobody was late; arbitrary


def _make_charts(report: RunReport) -> dict[str, Figure]:
    """Make the charts that have anything to show, by name."""
    charts = {}
    rows = list_rows(report)
    if bars := make_bars(report.timeline):
        charts["timeline"] = _make_timeline_chart(rows, bars, place_marks(report))
        charts["throughput"] = _make_throughput_chart(rows, bars, charts["timeline"].x_range)
    if len(report.shown_devices) > 1:
        charts["shares"] = _make_shares_chart(report, rows)
    if report.tail_seconds >= _SHORT_TAIL_FRACTION * report.seconds > 0:
        charts["tail"] = _make_bar_chart(rows, compute_idle_seconds(report.devices), "seconds")
    if any(device.peak_nbytes for device in report.devices):
        peaks, unit = measure_peak_memory(report.devices)
        by_device = dict(zip((device.device for device in report.devices), peaks, strict=True))
        charts["memory"] = _make_bar_chart(rows, by_device, unit)
    return charts


def _make_chart(height: int, rows: Sequence[Row], **options: Any) -> Figure:
    """Make a chart whose frame begins right of the longest name even if it shows no names: time axes are aligned."""
    left = max(_MIN_LEFT, 40 + _PIXELS_PER_CHARACTER * max((len(row.label) for row in rows), default=0))
    chart: Figure = figure(height=height, sizing_mode="stretch_width", min_border_left=left, **options)
    chart.toolbar.logo = None
    chart.toolbar.autohide = True
    chart.outline_line_color = None
    chart.xgrid.grid_line_color = chart.ygrid.grid_line_color = "#e5e5e5"
    return chart


def _make_device_chart(rows: Sequence[Row], row_height: int, x_range: Any, **options: Any) -> Figure:
    """Make a chart with a row of so many pixels per device, the first on top."""
    height = min(_MAX_CHART_HEIGHT, row_height * len(rows) + 80)
    chart = _make_chart(height, rows, x_range=x_range, y_range=Range1d(start=len(rows) - 0.5, end=-0.5), **options)
    chart.yaxis.ticker = FixedTicker(ticks=list(range(len(rows))))
    chart.yaxis.major_label_overrides = {i: PlainText(text=row.label) for i, row in enumerate(rows)}
    chart.ygrid.grid_line_color = None
    return chart


def _make_small_chart(rows: Sequence[Row]) -> Figure:
    """Make a chart of a third of the page's width, so with few ticks."""
    chart = _make_device_chart(rows, 36, DataRange1d(start=0.0), tools="", toolbar_location=None)
    chart.xaxis.ticker.desired_num_ticks, chart.xaxis.ticker.num_minor_ticks = 4, 0
    return chart


_TIME_TOOLS = "xpan,xwheel_zoom,xbox_zoom,reset"


def _make_timeline_chart(rows: Sequence[Row], bars: Sequence[Bar], marks: Sequence[PlacedMark]) -> Figure:
    end = max(bar.end for bar in bars)
    chart = _make_device_chart(rows, 46, Range1d(start=0.0, end=end), tools=_TIME_TOOLS)
    chart.xaxis.axis_label = "seconds since the first chunk"
    for number, row in enumerate(rows):  # the device's colour, palely behind its bars
        chart.add_layout(
            BoxAnnotation(bottom=number - 0.45, top=number + 0.45, fill_color=row.color, fill_alpha=0.12, level="underlay")
        )
    numbers = {row.device: number for number, row in enumerate(rows)}
    glyphs = [_draw_stage(chart, stage, own, numbers) for stage in STAGES if (own := _select_stage(bars, stage))]
    what = [("device", "@device"), ("", "$name"), ("rows", "@rows"), ("chunks", "@chunks")]
    when = [("from", "@left{0,0.000} s"), ("for", "@seconds{0,0.000} s")]
    chart.add_tools(HoverTool(renderers=glyphs, tooltips=what + when))
    _draw_marks(chart, marks, rows)
    return chart


def _select_stage(bars: Sequence[Bar], stage: Stage) -> list[Bar]:
    return [bar for bar in bars if bar.stage == stage.label]


def _draw_stage(chart: Figure, stage: Stage, bars: Sequence[Bar], numbers: Mapping[str, int]) -> Any:
    """Draw the bars of one stage; return the glyph."""
    middle = np.array([numbers[bar.span.device] for bar in bars], np.float64) + stage.offset
    source = ColumnDataSource(
        {
            "left": np.array([bar.begin for bar in bars], np.float64),
            "right": np.array([bar.end for bar in bars], np.float64),
            "top": middle - SERIES_HEIGHT / 2,
            "bottom": middle + SERIES_HEIGHT / 2,
            "seconds": np.array([bar.end - bar.begin for bar in bars], np.float64),
            "device": [bar.span.device for bar in bars],
            "rows": [f"{bar.span.n_rows:,} of {bar.span.start:,}:{bar.span.stop:,}" for bar in bars],
            "chunks": np.array([bar.span.n_chunks for bar in bars], np.int32),
        }
    )
    style = {"fill_color": stage.phase.color, "line_color": INK, "line_width": 0.5}
    if stage.phase.hatch:
        style |= {"hatch_pattern": stage.phase.hatch, "hatch_color": INK, "hatch_scale": 6.0, "hatch_weight": 0.7}
    return chart.quad("left", "right", "top", "bottom", source=source, name=stage.label, **style)


def _draw_marks(chart: Figure, marks: Sequence[PlacedMark], rows: Sequence[Row]) -> None:
    """Draw what went wrong over the bars; under the mouse, each mark tells what it was."""
    numbers = {row.device: number for number, row in enumerate(rows)}
    glyphs = []
    for kind, style in MARK_STYLES.items():
        if own := [one for one in marks if one.mark.kind == kind and one.mark.device in numbers]:
            source = ColumnDataSource(
                {
                    "x": [one.seconds for one in own],
                    "y": [numbers[one.mark.device] + style.offset for one in own],
                    "device": [one.mark.device for one in own],
                    "text": [one.mark.text for one in own],
                }
            )
            look = {"marker": style.bokeh_shape, "size": 13, "line_width": 2, "line_color": "white"}
            if style.bokeh_shape == "x":  # which is lines only
                look |= {"line_width": 4, "line_color": style.color}
            glyphs.append(chart.scatter("x", "y", source=source, fill_color=style.color, name=kind, **look))
    if glyphs:
        tooltips = [("device", "@device"), ("", "$name"), ("at", "@x{0,0.000} s"), ("", "@text")]
        chart.add_tools(HoverTool(renderers=glyphs, tooltips=tooltips))


def _make_throughput_chart(rows: Sequence[Row], bars: Sequence[Bar], x_range: Range1d) -> Figure:
    chart = _make_chart(240, rows, x_range=x_range, y_range=DataRange1d(start=0.0), tools=_TIME_TOOLS)
    chart.xaxis.axis_label, chart.yaxis.axis_label = "seconds since the first chunk", "rows/s"
    chart.yaxis.formatter = NumeralTickFormatter(format="0,0.[00]")
    edges, layers = stack_throughput(rows, bars)
    for layer in layers:
        bottom, top = np.array(layer.bottom), np.array(layer.top)
        columns = {"left": np.array(edges[:-1]), "right": np.array(edges[1:]), "bottom": bottom, "top": top}
        source = ColumnDataSource(columns | {"speed": top - bottom, "device": [layer.row.label] * len(top)})
        chart.quad("left", "right", "top", "bottom", source=source, color=layer.row.color, line_width=1)
    chart.add_tools(HoverTool(tooltips=[("device", "@device"), ("rows/s", "@speed{0,0.[0]}"), ("at", "@left{0,0.00} s")]))
    return chart


def _make_shares_chart(report: RunReport, rows: Sequence[Row]) -> Figure:
    """Draw the shares in the devices' colours; the legend has them in ink."""
    chart = _make_small_chart(rows)
    chart.xaxis.formatter = NumeralTickFormatter(format="0.[0]%")
    devices = {device.device: device for device in report.devices}
    known = [(number, row, devices[row.device]) for number, row in enumerate(rows) if row.device in devices]
    for share in list_shares(report):
        source = ColumnDataSource(
            {
                "y": [number + share.offset for number, _, _ in known],
                "share": [share.get_value(device) for _, _, device in known],
                "device": [row.label for _, row, _ in known],
                "color": [row.color for _, row, _ in known],
            }
        )
        size = {"right": "share", "height": SERIES_HEIGHT, "fill_alpha": share.opacity}
        chart.hbar("y", **size, source=source, fill_color="color", line_color="color", name=share.label)
    chart.add_tools(HoverTool(tooltips=[("device", "@device"), ("", "$name @share{0.0%}")]))
    return chart


def _make_bar_chart(rows: Sequence[Row], values: Mapping[str, float], unit: str) -> Figure:
    """Make a chart of one number per device, in the device's colour."""
    chart = _make_small_chart(rows)
    chart.xaxis.axis_label = unit
    source = ColumnDataSource(
        {
            "y": np.arange(len(rows)),
            "value": [values.get(row.device, 0.0) for row in rows],
            "device": [row.label for row in rows],
            "color": [row.color for row in rows],
        }
    )
    chart.hbar("y", right="value", height=0.6, source=source, color="color")
    chart.add_tools(HoverTool(tooltips=[("device", "@device"), (unit, "@value{0,0.00}")]))
    return chart
