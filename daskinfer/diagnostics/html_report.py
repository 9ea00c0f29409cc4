"""A run as one page of HTML: it opens offline, needs nothing beside itself, and may fetch nothing.

Charts are bokeh's, with its code inside the page (1.3 MB); the page's own policy forbids all that is loaded from elsewhere.
Names and messages are text wherever they stand: in the page by jinja2's escaping, on axes as ``PlainText`` (bokeh would set
``$$x$$`` as a formula), in tooltips by bokeh's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
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
from markupsafe import Markup

from daskinfer.core.files import write_atomic
from daskinfer.core.formatting import find_byte_unit, format_html_table, format_nbytes
from daskinfer.diagnostics.charts import (
    SHARE_COLORS,
    STAGE_COLORS,
    Bar,
    compute_idle_seconds,
    compute_throughput,
    get_device_color,
    list_device_names,
    make_bars,
    shorten_label,
)
from daskinfer.diagnostics.device_stats import ReportLike
from daskinfer.errors import SourceMissing

MAX_FAILURES = 1000  # in the table; more are no reading, and each is a row for the browser to lay out
MAX_EXCEPTION_CHARACTERS = 500  # of an exception's text
_MAX_CHART_HEIGHT = 1200  # of a chart, in pixels; more devices get thinner rows
_PIXELS_PER_CHARACTER = 6  # of a name on an axis, on average

Figure = Any  # bokeh's; its keywords have no types


def render_page(report: ReportLike) -> str:
    """The whole page."""
    devices, drawn = list_device_names(report), make_bars(report.timeline)
    charts = _make_charts(report, devices, drawn)
    script, divs = components(charts) if charts else ("", {})
    code = Resources(mode="inline", components=["bokeh"], log_level="warn").render() if charts else ""
    return _PAGE_TEMPLATE.render(
        report=report,
        code=Markup(code),
        script=Markup(script),
        charts={name: Markup(div) for name, div in divs.items()},
        devices=Markup(format_html_table(_DEVICE_HEADERS, _format_devices(report))),
        colors=[get_device_color(position) for position in range(len(report.devices))],
        tail=_describe_tail(report),
        failures=Markup(format_html_table(_FAILURE_HEADERS, _format_failures(report))),
        n_more=max(0, len(report.failures) - MAX_FAILURES),
        facts=Markup(format_html_table(("", ""), [[name, said] for name, said in report.facts.items() if said])),
    )


def write_page(content: str, path: str | os.PathLike[str]) -> None:
    """Put a page at ``path``, wholly or not at all; what is there already is replaced.

    Raises
    ------
    SourceMissing
        Where its folder does not exist.
    OSError
        Where it cannot be written there.
    """
    file = Path(os.path.abspath(path))
    if not file.parent.is_dir():
        raise SourceMissing(f"the report's folder {str(file.parent)!r} does not exist; a folder is needed. Create it first.")
    try:
        write_atomic(file, content.encode())
    except OSError:
        with contextlib.suppress(OSError):
            file.with_name(f"{file.name}.new").unlink()
        raise


_DEVICE_HEADERS = (
    *("device", "name", "chunks", "rows", "rows/s", "asked", "measured", "done", "micro-batch"),
    *("reading", "waiting", "computing", "writing", "peak memory", "tried again", "done before the last"),
)
_FAILURE_HEADERS = ("rows", "device", "what it said")


def _format_devices(report: ReportLike) -> list[list[str]]:
    idle = compute_idle_seconds(report.devices)
    return [
        [
            d.device,
            d.device_name,
            f"{d.n_chunks:,}",
            f"{d.n_rows:,}",
            f"{d.rows_per_second:,.0f}",
            *(f"{share:.1%}" for share in (d.asked_share, d.measured_share, d.done_share)),
            f"{d.batch_size:,}" if d.batch_size else "",
            *(f"{s:,.2f} s" for s in (d.read_seconds, d.waited_seconds, d.seconds, d.write_seconds)),
            format_nbytes(d.peak_nbytes) if d.peak_nbytes else "",
            f"{d.n_retried:,}",
            f"{idle[d.device]:,.2f} s" if d.device in idle else "",
        ]
        for d in report.devices
    ]


def _format_failures(report: ReportLike) -> list[list[str]]:
    return [
        [
            f"{f.start:,}" if f.stop - f.start == 1 else f"{f.start:,} to {f.stop - 1:,}",
            f.device,
            f.exception if len(f.exception) <= MAX_EXCEPTION_CHARACTERS else f"{f.exception[:MAX_EXCEPTION_CHARACTERS]}…",
        ]
        for f in report.failures[:MAX_FAILURES]
    ]


def _describe_tail(report: ReportLike) -> str:
    """The finish tail as a sentence; empty where there was none."""
    idle = compute_idle_seconds(report.devices)
    if not report.tail_seconds:
        return ""
    first = max(idle, key=idle.__getitem__)
    return f"{first} was done {report.tail_seconds:,.2f} s before the last device."


def _make_charts(report: ReportLike, devices: Sequence[str], bars: Sequence[Bar]) -> dict[str, Figure]:
    """The charts for which there is anything to show, by name."""
    charts = {}
    if bars:
        charts["timeline"] = _make_timeline_chart(devices, bars)
        charts["speed"] = _make_throughput_chart(devices, bars, charts["timeline"].x_range)
    if report.devices:
        charts["shares"] = _make_shares_chart(report)
    if report.tail_seconds:
        idle = compute_idle_seconds(report.devices)
        charts["tail"] = _make_bar_chart(report, [idle.get(d.device, 0.0) for d in report.devices], "seconds")
    if any(device.peak_nbytes for device in report.devices):
        unit, nbytes = find_byte_unit(max(device.peak_nbytes for device in report.devices))
        charts["memory"] = _make_bar_chart(report, [device.peak_nbytes / nbytes for device in report.devices], unit)
    return charts


def _make_chart(height: int, devices: Sequence[str], **options: Any) -> Figure:
    """A chart whose frame begins right of the longest name, also where there are none: time lies under time."""
    left = 40 + _PIXELS_PER_CHARACTER * max((len(shorten_label(device)) for device in devices), default=0)
    chart: Figure = figure(height=height, sizing_mode="stretch_width", min_border_left=left, **options)
    chart.toolbar.logo = None
    chart.toolbar.autohide = True
    chart.outline_line_color = None
    chart.xgrid.grid_line_color = chart.ygrid.grid_line_color = "#e5e5e5"
    return chart


def _make_device_chart(devices: Sequence[str], row_height: int, x_range: Any, **options: Any) -> Figure:
    """A chart with a row of so many pixels per device, the first on top."""
    height = min(_MAX_CHART_HEIGHT, row_height * len(devices) + 80)
    chart = _make_chart(height, devices, x_range=x_range, y_range=Range1d(start=len(devices) - 0.5, end=-0.5), **options)
    chart.yaxis.ticker = FixedTicker(ticks=list(range(len(devices))))
    chart.yaxis.major_label_overrides = {i: PlainText(text=shorten_label(name)) for i, name in enumerate(devices)}
    chart.ygrid.grid_line_color = None
    return chart


def _move_legend_above(chart: Figure) -> None:
    """The key outside, where it hides nothing."""
    (key,) = chart.legend
    key.orientation, key.border_line_color, key.padding, key.margin = "horizontal", None, 0, 2
    chart.add_layout(key, "above")


_TIME_TOOLS = "xpan,xwheel_zoom,xbox_zoom,reset"


def _make_timeline_chart(devices: Sequence[str], bars: Sequence[Bar]) -> Figure:
    chart = _make_device_chart(devices, 42, Range1d(start=0.0, end=max(bar.end for bar in bars)), tools=_TIME_TOOLS)
    chart.xaxis.axis_label = "seconds since the first chunk"
    row = {device: i for i, device in enumerate(devices)}
    glyphs = []
    for position, (lane, fill) in enumerate(STAGE_COLORS.items()):
        own = [bar for bar in bars if bar.stage == lane]
        if not own:  # Bokeh's key would have its name without its color
            continue
        middle = np.array([row[bar.span.device] for bar in own], np.float64) + (position - 1) * 0.28
        source = ColumnDataSource(
            {
                "left": np.array([bar.begin for bar in own], np.float64),
                "right": np.array([bar.end for bar in own], np.float64),
                "top": middle - 0.13,
                "bottom": middle + 0.13,
                "seconds": np.array([bar.end - bar.begin for bar in own], np.float64),
                "device": [bar.span.device for bar in own],
                "rows": [f"{bar.span.n_rows:,} of {bar.span.start:,}:{bar.span.stop:,}" for bar in own],
                "chunks": np.array([bar.span.n_chunks for bar in own], np.int32),
            }
        )
        how = {"fill_color": fill, "line_color": fill, "fill_alpha": 0.8, "line_width": 0.5, "legend_label": lane}
        glyphs.append(chart.quad("left", "right", "top", "bottom", source=source, name=lane, **how))
    shown = [("device", "@device"), ("", "$name"), ("rows", "@rows"), ("chunks", "@chunks")]
    times = [("from", "@left{0,0.000} s"), ("for", "@seconds{0,0.000} s")]
    chart.add_tools(HoverTool(renderers=glyphs, tooltips=shown + times))
    _move_legend_above(chart)
    return chart


def _make_throughput_chart(devices: Sequence[str], bars: Sequence[Bar], x_range: Range1d) -> Figure:
    """Rows/s of the devices, each on top of the one before."""
    chart = _make_chart(240, devices, x_range=x_range, y_range=DataRange1d(start=0.0), tools=_TIME_TOOLS)
    chart.xaxis.axis_label, chart.yaxis.axis_label = "seconds since the first chunk", "rows/s"
    chart.yaxis.formatter = NumeralTickFormatter(format="0,0.[00]")
    edges, by_device = compute_throughput(bars)
    below = np.zeros(len(edges) - 1)
    for position, device in enumerate(devices):
        speed = np.array(by_device.get(device, np.zeros_like(below)))
        source = ColumnDataSource(
            {
                "left": np.array(edges[:-1]),
                "right": np.array(edges[1:]),
                "bottom": below,
                "top": below + speed,
                "speed": speed,
                "device": [device] * len(speed),
            }
        )
        chart.quad("left", "right", "top", "bottom", source=source, color=get_device_color(position), line_width=0)
        below = below + speed
    chart.add_tools(HoverTool(tooltips=[("device", "@device"), ("rows/s", "@speed{0,0.[0]}"), ("at", "@left{0,0.00} s")]))
    return chart


def _make_shares_chart(report: ReportLike) -> Figure:
    devices = [device.device for device in report.devices]
    chart = _make_device_chart(devices, 36, DataRange1d(start=0.0), tools="", toolbar_location=None)
    chart.xaxis.formatter = NumeralTickFormatter(format="0.[0]%")
    for position, (what, fill) in enumerate(SHARE_COLORS.items()):
        source = ColumnDataSource(
            {
                "y": np.arange(len(devices)) + (position - 1) * 0.28,
                "share": [getattr(device, f"{what}_share") for device in report.devices],
                "device": devices,
            }
        )
        chart.hbar("y", right="share", height=0.26, source=source, color=fill, legend_label=what, name=what)
    chart.add_tools(HoverTool(tooltips=[("device", "@device"), ("", "$name @share{0.0%}")]))
    _move_legend_above(chart)
    return chart


def _make_bar_chart(report: ReportLike, values: Sequence[float], unit: str) -> Figure:
    devices = [device.device for device in report.devices]
    chart = _make_device_chart(devices, 36, DataRange1d(start=0.0), tools="", toolbar_location=None)
    chart.xaxis.axis_label = unit
    fills = [get_device_color(position) for position in range(len(devices))]
    source = ColumnDataSource({"y": np.arange(len(devices)), "value": values, "device": devices, "color": fills})
    chart.hbar("y", right="value", height=0.6, source=source, color="color")
    chart.add_tools(HoverTool(tooltips=[("device", "@device"), (unit, "@value{0,0.00}")]))
    return chart


_PAGE_TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<meta name="viewport" content="width=device-width">
<title>daskinfer: {{ report.facts.network or "a run" }}</title>
<style>
body { font: 15px/1.5 sans-serif; color: #222; background: #fff; max-width: 1280px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.5em; margin-bottom: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1em; margin: 1.8em 0 .3em; }
.verdict { font-size: 1.15em; font-weight: bold; margin: .3em 0; }
.wide { overflow-x: auto; }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 0 2em; }
.side > div { min-width: 0; }
table { border-collapse: collapse; font-size: .85em; }
th, td { padding: .2em .55em; text-align: left; vertical-align: top; border-bottom: 1px solid #e5e5e5; }
td:last-child { overflow-wrap: anywhere; }
#devices td { white-space: nowrap; }
#facts thead { display: none; }
{% for color in colors %}
#devices tbody tr:nth-child({{ loop.index }}) td:first-child { border-left: .7em solid {{ color }}; }
{% endfor %}
</style>
{{ code }}
</head>
<body>
<h1>{{ report.facts.network or "a run" }}</h1>
{% if report.verdict %}
<p class="verdict">{{ report.verdict }}</p>
{% endif %}
<p>{{ report.totals }}{% if report.details %}<br>{{ report.details }}{% endif %}</p>
<div class="wide" id="devices">{{ devices }}</div>
<h2>Timeline</h2>
{% if charts.timeline %}
{{ charts.timeline }}
<h2>Rows per second</h2>
<p>Each device on top of the one before, in the colours of the table.</p>
{{ charts.speed }}
{% else %}
<p>No chunk was computed, so there is no timeline.</p>
{% endif %}
<div class="side">
{% if charts.shares %}
<div><h2>Share of the rows</h2>{{ charts.shares }}</div>
{% endif %}
{% if charts.tail %}
<div><h2>Done before the last</h2>{{ charts.tail }}</div>
{% endif %}
{% if charts.memory %}
<div><h2>Peak memory</h2>{{ charts.memory }}</div>
{% endif %}
</div>
{% if tail %}
<p>{{ tail }}</p>
{% endif %}
<h2>Retries and rows without an answer</h2>
<p>
Attempts at a chunk that came to nothing: {{ "{:,}".format(report.n_retried) }}.
Rows without an answer: {{ "{:,}".format(report.failed_rows|length) }}.
</p>
{% if report.failures %}
<div class="wide">{{ failures }}</div>
{% endif %}
{% if n_more %}
<p>Not shown: {{ "{:,}".format(n_more) }} more; <code>RunReport.failures</code> has all of them.</p>
{% endif %}
<h2>Facts</h2>
<div id="facts">{{ facts }}</div>
{{ script }}
</body>
</html>
""")
