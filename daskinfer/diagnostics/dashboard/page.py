"""The page ``/daskinfer`` of a scheduler's dashboard: what runs where, how fast, how long still, and what went wrong.

It is a bokeh document like the dashboard's other pages, made anew for everybody who opens it, and drawn again as often as
there is news of the run that is looked at. The dashboard's bokeh application takes no page once it has begun, so this one
comes with an application of its own beside it, made by the same function and therefore with the dashboard's address prefix,
allowed origins and looks. That of the dashboard is told of it too: it lists the plots that JupyterLab's Dask extension
offers, and its bar of links.

Only loaded in a scheduler that has a dashboard. Everything that a client tells is escaped, by bokeh or by the tables here.
"""

from __future__ import annotations

import html
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from operator import itemgetter
from typing import Any

import numpy as np
from bokeh.application import Application
from bokeh.layouts import column, row
from bokeh.models import ColumnDataSource, Div, FactorRange, HoverTool, NumeralTickFormatter, Range1d, Select
from bokeh.plotting import figure
from bokeh.server.contexts import ApplicationContext
from bokeh.server.tornado import BokehTornado
from distributed import Scheduler
from distributed.dashboard.components import add_periodic_callback
from distributed.dashboard.components.scheduler import BOKEH_THEME, env
from distributed.dashboard.core import BokehApplication
from distributed.dashboard.scheduler import template_variables
from tornado.ioloop import IOLoop

from daskinfer.core.formatting import format_html_table
from daskinfer.diagnostics.dashboard.chunk_map import UNKNOWN_DEVICE
from daskinfer.diagnostics.dashboard.state import OTHERS, RunRegistry, RunView
from daskinfer.diagnostics.status import THROUGHPUT_WINDOW_SECONDS, DeviceStatus
from daskinfer.diagnostics.status_text import DEVICE_HEADERS, format_device, format_progress

PAGE_PATH, PLOT_PATH = "/daskinfer", "/individual-daskinfer"

DRAW_SECONDS = 0.5
SILENT_SECONDS = 15.0  # without news until a run is said to be silent: thirty times what is usual; arbitrary

# Neither red nor orange, which are what went wrong; neighbours differ in lightness too.
_DEVICE_COLORS = (
    "#4e79a7",
    "#59a14f",
    "#b07aa1",
    "#76b7b2",
    "#9c755f",
    "#2f4b7c",
    "#8cd17d",
    "#d4a6c8",
    "#499894",
    "#b6992d",
)
_OTHERS_COLOR, _FAILED_COLOR, _RETRYING_COLOR, _PENDING_COLOR, _DONE_BEFORE_COLOR, _TOTAL_COLOR = (
    "#79706e",
    "#d62728",
    "#ff9d1c",
    "#e6e6e6",
    "#a3a3a3",
    "#404040",
)
_PLOT_HEIGHT, _LABEL_HEIGHT, _AXES_HEIGHT = (
    230,
    15,
    70,
)  # pixels: of a plot, of a label, and of what is around a plot's frame
_MIN_PLOT_WIDTH = (
    400  # pixels; in a window that is narrower than two of them, as JupyterLab's are, one stands below the other
)
_MAX_NAME_CHARACTERS = 80  # of a network; arbitrary
_FONT = "font-family: Helvetica, Arial, sans-serif; font-size: 13px"


def install_page(scheduler: Scheduler, registry: RunRegistry) -> bool:
    """Add the page to a scheduler's dashboard, shown from ``board``; whether there is a dashboard."""
    served = scheduler.http_application.applications
    of_dask = next((application for application in served if isinstance(application, BokehTornado)), None)
    if of_dask is None:
        return False
    variables = template_variables(scheduler)
    # These lists are the ones that the dashboard's own pages are drawn with.
    variables["pages"].append(PAGE_PATH.strip("/"))
    variables["plots"].append({"url": PLOT_PATH.strip("/"), "name": PLOT_PATH.partition("-")[2].title()})
    variables["plots"].sort(key=itemgetter("name"))

    def render_page(scheduler: Scheduler, extra: Mapping[str, Any], doc: Any) -> None:
        fill_document(registry, doc)
        doc.template = env.from_string(_TEMPLATE)
        doc.template_variables.update(extra)

    def render_plot(scheduler: Scheduler, extra: Mapping[str, Any], doc: Any) -> None:
        fill_document(registry, doc)

    pages = {PAGE_PATH: render_page, PLOT_PATH: render_plot}
    ours = BokehApplication(pages, scheduler, prefix=of_dask.prefix, template_variables=variables)
    scheduler.http_application.add_application(ours)
    ours.initialize(IOLoop.current())
    ours.start()
    # Only to be listed there: the plot is served, and its readers are seen to, by the application beside it.
    of_dask._applications[PLOT_PATH] = ApplicationContext(Application(), url=PLOT_PATH, io_loop=IOLoop.current())
    return True


def fill_document(registry: RunRegistry, doc: Any) -> None:
    """Fill one reader's document, and keep it up to date."""
    view = PageView(registry)
    view.update()
    add_periodic_callback(doc, view, int(1000 * DRAW_SECONDS))
    doc.add_root(view.root)
    doc.title = "Dask: daskinfer"
    doc.theme = BOKEH_THEME


class PageView:
    """What one reader sees: the run that was chosen, or the latest."""

    def __init__(self, registry: RunRegistry) -> None:
        self._registry = registry
        self._drawn_state: tuple[object, ...] = ()
        self._run_select = Select(title="run", value="", options=[("", "the latest")], width=320)
        self._run_select.on_change("value", lambda attr, old, new: self.update())
        self._headline = Div(
            text=_EMPTY_HTML, sizing_mode="stretch_width", min_width=_MIN_PLOT_WIDTH, stylesheets=[_WIDE_STYLE]
        )
        self._throughput_plot, self._shares_plot, self._chunk_map_plot = _ThroughputPlot(), _SharesPlot(), _ChunkMapPlot()
        self._device_table = Div(sizing_mode="stretch_width")
        self._error_table = Div(sizing_mode="stretch_width")
        self._body = column(
            row(self._throughput_plot.root, self._shares_plot.root, sizing_mode="stretch_width", stylesheets=[_WRAP_STYLE]),
            self._chunk_map_plot.root,
            self._device_table,
            self._error_table,
            sizing_mode="stretch_width",
            visible=False,
        )
        top = row(self._run_select, self._headline, sizing_mode="stretch_width", stylesheets=[_WRAP_STYLE])
        self.root = column(top, self._body, sizing_mode="stretch_width")

    def update(self) -> None:
        """Draw again, where there is news."""
        runs = {shown.snapshot.status.run: shown for shown in self._registry.runs}
        if not runs:
            return
        going_on = (each for each in runs.values() if _get_state(each) == _RUNNING)
        shown = runs.get(self._run_select.value) or next(going_on, next(iter(runs.values())))
        choice = [("", "the latest"), *_format_titles(runs)]
        n_others = sum(_get_state(other) == _RUNNING for other in runs.values() if other is not shown)
        seen = (shown.snapshot.status.run, shown.n_updates, choice)
        if seen != self._drawn_state:
            self._drawn_state = seen
            self._run_select.options = choice
            self._draw(shown, n_others)

    def _draw(self, run: RunView, n_others: int) -> None:
        status = run.snapshot.status
        colours = _assign_colors(status.devices)
        self._body.visible = True
        self._headline.text = _render_headline(run, n_others)
        self._throughput_plot.draw(run, colours)
        self._shares_plot.draw(status.devices, colours)
        self._chunk_map_plot.draw(run, colours)
        self._device_table.stylesheets = [_TABLE_STYLE, *_make_swatch_styles(colours)]
        self._device_table.text = format_html_table(
            DEVICE_HEADERS, [format_device(device, status) for device in status.devices]
        )
        self._error_table.stylesheets = [_TABLE_STYLE]
        self._error_table.text = _render_errors(run)


class _ThroughputPlot:
    """Rows/s of each device over time."""

    def __init__(self) -> None:
        names = ("xs", "ys", "colour", "device", "width")
        self._source = ColumnDataSource({name: [] for name in names}, name="daskinfer-speeds")
        self.root = figure(
            title=f"rows/s, over {THROUGHPUT_WINDOW_SECONDS:.0f} s each (dark: all devices)",
            x_axis_label="seconds",
            x_range=Range1d(0, 1),
            y_range=Range1d(0, 1),
            height=_PLOT_HEIGHT,
            min_width=_MIN_PLOT_WIDTH,
            sizing_mode="stretch_width",
            tools="",
            toolbar_location=None,
        )
        lines = self.root.multi_line("xs", "ys", color="colour", line_width="width", source=self._source)
        self.root.add_tools(HoverTool(renderers=[lines], tooltips=[("device", "@device"), ("rows/s", "$y{0,0}")]))
        self.root.yaxis.formatter = NumeralTickFormatter(format="0,0")

    def draw(self, run: RunView, colors: Sequence[str]) -> None:
        points = run.throughput.points
        seconds = np.array([at for at, _ in points])
        devices = run.snapshot.status.devices
        speeds = np.zeros((len(devices), len(points)))
        for i, (_, known) in enumerate(points):  # devices that came later were not there yet
            speeds[: len(known), i] = known
        together = speeds.sum(axis=0)
        self.root.x_range.end = max([1.0, *seconds])
        self.root.y_range.end = max([1.0, *1.05 * together])
        self._source.data = {
            "xs": [seconds] * (len(devices) + 1),
            "ys": [together, *speeds],
            "colour": [_TOTAL_COLOR, *colors],
            "device": ["all", *(device.device for device in devices)],
            "width": [1.5] + [2.5] * len(devices),
        }


class _SharesPlot:
    """Which share of the rows each device was asked for, and which it has done."""

    def __init__(self) -> None:
        names = ("device", "asked", "done", "colour")
        self._source = ColumnDataSource({name: [] for name in names}, name="daskinfer-shares")
        self.root = figure(
            title="share of the rows (grey: as planned, coloured: done)",
            x_range=Range1d(0, 1),
            y_range=FactorRange(" "),
            height=_PLOT_HEIGHT,
            min_width=_MIN_PLOT_WIDTH,
            sizing_mode="stretch_width",
            tools="",
            toolbar_location=None,
        )
        self.root.hbar("device", right="asked", height=0.8, color=_PENDING_COLOR, line_color="#bbbbbb", source=self._source)
        self.root.hbar("device", right="done", height=0.4, color="colour", source=self._source)
        tooltips = [("device", "@device"), ("planned", "@asked{0.0%}"), ("done", "@done{0.0%}")]
        self.root.add_tools(HoverTool(tooltips=tooltips))
        self.root.xaxis.formatter = NumeralTickFormatter(format="0%")
        self.root.ygrid.visible = False

    def draw(self, devices: Sequence[DeviceStatus], colors: Sequence[str]) -> None:
        names = [device.device for device in devices]
        if self.root.y_range.factors != names[::-1]:
            self.root.y_range.factors = names[::-1]  # the first on top
            self.root.height = max(_PLOT_HEIGHT, _LABEL_HEIGHT * len(names) + _AXES_HEIGHT)
        shares = [share for device in devices for share in (device.asked_share, device.done_share)]
        self.root.x_range.end = 1.05 * max(shares, default=0.0) or 1.0
        self._source.data = {
            "device": names,
            "asked": [device.asked_share for device in devices],
            "done": [device.done_share for device in devices],
            "colour": list(colors),
        }


class _ChunkMapPlot:
    """All rows from left to right, coloured by device and by what has become of them."""

    def __init__(self) -> None:
        names = ("left", "right", "zero", "done", "in_flight", "failed", "again", "colour")
        self._source = ColumnDataSource({name: [] for name in names}, name="daskinfer-cells")
        plot = figure(
            x_axis_label="row",
            x_range=Range1d(0, 1),
            y_range=Range1d(0, 1),
            height=125,
            sizing_mode="stretch_width",
            tools="",
            toolbar_location=None,
            background_fill_color=_PENDING_COLOR,
        )
        quads = {"left": "left", "right": "right", "line_color": None, "source": self._source}
        plot.quad(bottom="zero", top="done", color="colour", **quads)
        plot.quad(bottom="done", top="in_flight", color="colour", alpha=0.45, **quads)
        plot.quad(bottom="in_flight", top="failed", color=_FAILED_COLOR, **quads)
        plot.quad(bottom="again", top=1.0, color=_RETRYING_COLOR, **quads)
        plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
        plot.yaxis.visible = plot.grid.visible = False
        self._x_range = plot.x_range
        # No title of the plot's: that is cut off in a narrow window, where this goes on in a second line.
        legend = Div(text=_LEGEND_HTML, sizing_mode="stretch_width", stylesheets=[_WIDE_STYLE])
        self.root = column(legend, plot, sizing_mode="stretch_width")

    def draw(self, run: RunView, colors: Sequence[str]) -> None:
        cells = run.snapshot.cells
        bars = np.array([list(part) for part in (cells.done, cells.in_flight, cells.failed, cells.retrying, cells.device)])
        # Neighbours that look the same are one bar: seams between them show.
        first = np.flatnonzero(np.any(bars != np.roll(bars, 1, axis=1), axis=0) | (np.arange(bars.shape[1]) == 0))
        done, in_flight, failed, again = bars[:4, first] / 100
        edges = cells.start + np.append(first, bars.shape[1]) * cells.n_rows // max(1, bars.shape[1])
        by_number = dict(enumerate(colors)) | {UNKNOWN_DEVICE: _DONE_BEFORE_COLOR}
        self._x_range.start, self._x_range.end = cells.start, cells.start + max(1, cells.n_rows)
        self._source.data = {
            "left": edges[:-1],
            "right": edges[1:],
            "zero": np.zeros(len(first)),
            "done": done,
            "in_flight": done + in_flight,
            "failed": done + in_flight + failed,
            "again": np.where(again > 0, 0.85, 1.0),  # a band at the top
            "colour": [by_number.get(number, _OTHERS_COLOR) for number in bars[4, first].tolist()],
        }


def _assign_colors(devices: Sequence[DeviceStatus]) -> list[str]:
    colours = list(islice(cycle(_DEVICE_COLORS), len(devices)))
    return [_OTHERS_COLOR if device.device == OTHERS else colour for device, colour in zip(devices, colours, strict=True)]


def _get_state(run: RunView) -> str:
    status = run.snapshot.status
    if status.ended:
        return "failed" if status.error else "done"
    return "lost" if run.lost else "silent" if time.time() - run.last_seen > SILENT_SECONDS else _RUNNING


def _format_title(run: RunView) -> str:
    """A run among others; its words do not change each time, or the list could not be chosen from."""
    began = time.strftime("%H:%M:%S", time.localtime(run.first_seen))
    return f"{began} {_shorten_name(run.snapshot.status.model)} ({_get_state(run)}), {run.snapshot.user}"


def _format_titles(runs: dict[str, RunView]) -> list[tuple[str, str]]:
    """Each run and its title, the latest first; those of one title are numbered in the order they came."""
    counts: Counter[str] = Counter()
    titled = []
    for run, shown in reversed(runs.items()):
        counts[title := _format_title(shown)] += 1
        titled.append((run, title if counts[title] == 1 else f"{title}, no. {counts[title]}"))
    return titled[::-1]


def _shorten_name(name: str) -> str:
    return name if len(name) <= _MAX_NAME_CHARACTERS else f"{name[:_MAX_NAME_CHARACTERS]}…"


_EMPTY_HTML = (
    f'<div style="{_FONT}; padding: 1em">No run yet: this page fills when daskinfer computes on this cluster.</div>'
)
_BAR_HTML = (
    '<div style="background: #ddd; border-radius: 3px; height: 14px; margin: 6px 0">'
    '<div style="background: {colour}; border-radius: 3px; height: 14px; width: {percent:.2f}%"></div></div>'
)


def _render_headline(run: RunView, n_others: int) -> str:
    status, state = run.snapshot.status, _get_state(run)
    gone = status.error or state == "lost"
    bar = _BAR_HTML.format(percent=100 * status.fraction_done, colour=_FAILED_COLOR if gone else _DEVICE_COLORS[0])
    said = format_progress(status)
    if state in _STATE_MESSAGES:
        said.append(_STATE_MESSAGES[state])
    elif status.seconds is not None and not status.ended:
        n_in_flight = sum(device.n_in_flight for device in status.devices)
        said.append("1 chunk in flight" if n_in_flight == 1 else f"{n_in_flight:,} chunks in flight")
    head = f"<b>{html.escape(_shorten_name(status.model))}</b>{bar}{html.escape(', '.join(said))}"
    if n_others:
        others = "another run goes on" if n_others == 1 else f"{n_others} other runs go on"
        head += f"<br><i>{others} on this cluster: see the list of runs</i>"
    return f'<div style="{_FONT}; padding: 4px 1em">{head}</div>'


_RUNNING = "goes on"
_STATE_MESSAGES = {
    "lost": "its client is gone before its end was heard of",
    "silent": "nothing was heard of it for a while: its process may hang",
}


# The dashboard's bar of links lies over its pages and has room for one line of them: here it takes the room that it needs.
_TEMPLATE = """{% extends "simple.html" %}
{% block extra_resources %}
<style>body { padding-top: 0 } .navbar { position: sticky; margin: 0 -10px 8px }</style>
{% endblock %}"""
_SWATCH_HTML = (
    '<span style="white-space: nowrap; margin-right: 1em"><span style="background: {}; opacity: {}; display: inline-block; '
    'width: 12px; height: 12px; margin-right: 4px; border: 1px solid #bbb"></span>{}</span>'
)
_LEGEND_ENTRIES = (
    (_DEVICE_COLORS[0], 1, "done, in the device's colour"),
    (_DEVICE_COLORS[0], 0.45, "in flight"),
    (_PENDING_COLOR, 1, "waits"),
    (_DONE_BEFORE_COLOR, 1, "done before"),
    (_RETRYING_COLOR, 1, "tried again"),
    (_FAILED_COLOR, 1, "failed"),
)
_LEGEND_HTML = f'<div style="{_FONT}; padding: 4px 1em"><b>rows</b>&ensp;{"".join(_SWATCH_HTML.format(*s) for s in _LEGEND_ENTRIES)}</div>'
_WRAP_STYLE = ":host { flex-wrap: wrap }"
_WIDE_STYLE = ":host, .bk-clearfix { width: 100% }"
_TABLE_STYLE = f"""
table {{ {_FONT}; border-collapse: collapse; margin: 4px 1em }}
th, td {{ text-align: left; padding: 2px 12px 2px 6px; border-bottom: 1px solid #ddd }}
th {{ font-weight: normal; color: #666 }}
"""


def _make_swatch_styles(colors: Sequence[str]) -> list[str]:
    """The device's colour before its name."""
    cell = "tbody tr:nth-child({}) td:first-child {{ border-left: 10px solid {} }}"
    return [cell.format(i, colour) for i, colour in enumerate(colors, 1)]


def _render_errors(run: RunView) -> str:
    """The last messages of what went wrong, the latest first."""
    rows = [
        (time.strftime("%H:%M:%S", time.localtime(t.at)), t.device, f"rows {t.start:,}:{t.stop:,}", t.exception)
        for t in reversed(run.snapshot.errors)
    ]
    return format_html_table(("when", "device", "", "what went wrong, the latest first"), rows) if rows else ""
