"""The page ``/daskinfer`` of a scheduler's dashboard: what runs where, how fast, how long it still takes, what went wrong.

It is a bokeh document like the dashboard's other pages: each reader gets one, which is redrawn when there is news of the
run it shows. The dashboard's bokeh application takes no pages once it has started, so this page comes with a second
application beside it, made by the same function and therefore with the dashboard's address prefix, allowed origins and
style. The dashboard's application is told of it too: it lists the plots that JupyterLab's Dask extension offers, and the
links in the bar.

Only imported in a scheduler that has a dashboard. Everything a client sends is escaped, by bokeh or by the templates here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
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

from daskinfer.core.formatting import format_html_table, render_template
from daskinfer.diagnostics import palette
from daskinfer.diagnostics.dashboard.chunk_map import UNKNOWN_DEVICE
from daskinfer.diagnostics.dashboard.state import OTHERS, RunRegistry, RunView
from daskinfer.diagnostics.device_stats import THROUGHPUT_WINDOW_SECONDS, DeviceStatus, select_shown
from daskinfer.diagnostics.palette import (
    FAILED_COLOR,
    INK,
    OTHERS_COLOR,
    RETRYING_COLOR,
    Phase,
    get_device_color,
)
from daskinfer.diagnostics.status import Status, format_devices, format_progress

PAGE_PATH, PLOT_PATH = "/daskinfer", "/individual-daskinfer"

DRAW_SECONDS = 0.5
SILENT_SECONDS = 15.0  # without news until a run counts as silent: thirty times the usual interval; arbitrary

_PLOT_HEIGHT, _LABEL_HEIGHT, _AXES_HEIGHT = 230, 15, 70  # pixels: of a plot, a label, and what surrounds a plot's frame
_MIN_PLOT_WIDTH = 400  # pixels; in a window narrower than two plots, like JupyterLab's, one is below the other
_MAX_NAME_CHARACTERS = 80  # of a model; arbitrary
_FONT = "font-family: Helvetica, Arial, sans-serif; font-size: 13px"


def install_page(scheduler: Scheduler, registry: RunRegistry) -> bool:
    """Add the page to a scheduler's dashboard, fed from ``registry``; return whether there is a dashboard."""
    applications = scheduler.http_application.applications
    dashboard = next((application for application in applications if isinstance(application, BokehTornado)), None)
    if dashboard is None:
        return False
    variables = template_variables(scheduler)
    # These lists are the ones that the dashboard's own pages are drawn with.
    variables["pages"].append(PAGE_PATH.strip("/"))
    variables["plots"].append({"url": PLOT_PATH.strip("/"), "name": PLOT_PATH.partition("-")[2].title()})
    variables["plots"].sort(key=itemgetter("name"))

    def render_page(scheduler: Scheduler, extra: Mapping[str, Any], doc: Any) -> None:
        fill_document(registry, doc)
        doc.template = env.from_string(Path(__file__).with_name("page.html.j2").read_text("utf-8"))
        doc.template_variables.update(extra)

    def render_plot(scheduler: Scheduler, extra: Mapping[str, Any], doc: Any) -> None:
        fill_document(registry, doc)

    pages = {PAGE_PATH: render_page, PLOT_PATH: render_plot}
    added = BokehApplication(pages, scheduler, prefix=dashboard.prefix, template_variables=variables)
    scheduler.http_application.add_application(added)
    added.initialize(IOLoop.current())
    added.start()
    # Only to be listed there: the application beside it serves the plot and its readers.
    dashboard._applications[PLOT_PATH] = ApplicationContext(Application(), url=PLOT_PATH, io_loop=IOLoop.current())
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
    """The page as one reader sees it: the run that was chosen, or the latest."""

    def __init__(self, registry: RunRegistry) -> None:
        self._registry = registry
        self._drawn_state: tuple[object, ...] = ()
        self._run_select = Select(title="run", value="", options=[("", "the latest")], width=320)
        self._run_select.on_change("value", lambda attr, old, new: self.update())
        self._headline = Div(
            text=_EMPTY_HTML, sizing_mode="stretch_width", min_width=_MIN_PLOT_WIDTH, stylesheets=[_WIDE_STYLE]
        )
        self._throughput_plot, self._shares_plot, self._chunk_map_plot = _ThroughputPlot(), _SharesPlot(), _ChunkMapPlot()
        self._phases_plot = _PhasesPlot()
        self._device_table = Div(sizing_mode="stretch_width")
        self._error_table = Div(sizing_mode="stretch_width")
        plots = self._throughput_plot, self._shares_plot, self._phases_plot
        self._body = column(
            row(*(plot.root for plot in plots), sizing_mode="stretch_width", stylesheets=[_WRAP_STYLE]),
            _make_legend("time", _TIME_ENTRIES),
            self._chunk_map_plot.root,
            self._device_table,
            self._error_table,
            sizing_mode="stretch_width",
            visible=False,
        )
        top = row(self._run_select, self._headline, sizing_mode="stretch_width", stylesheets=[_WRAP_STYLE])
        self.root = column(top, self._body, sizing_mode="stretch_width")

    def update(self) -> None:
        """Redraw the page if there is news."""
        runs = {run.snapshot.status.run: run for run in self._registry.runs}
        if not runs:
            return
        running = (run for run in runs.values() if _get_state(run) == _RUNNING)
        shown = runs.get(self._run_select.value) or next(running, next(iter(runs.values())))
        options = [("", "the latest"), *_format_titles(runs)]
        n_others = sum(_get_state(run) == _RUNNING for run in runs.values() if run is not shown)
        state = (shown.snapshot.status.run, shown.n_updates, options)
        if state != self._drawn_state:
            self._drawn_state = state
            self._run_select.options = options
            self._draw(shown, n_others)

    def _draw(self, run: RunView, n_others: int) -> None:
        status = run.snapshot.status
        colors, devices = _assign_colors(status.devices), select_shown(status.devices)
        self._body.visible = True
        self._headline.text = _render_headline(run, n_others)
        self._throughput_plot.draw(run, colors)
        self._shares_plot.draw(devices, colors)
        self._phases_plot.draw(status, devices)
        self._chunk_map_plot.draw(run, colors)
        self._device_table.stylesheets = [_TABLE_STYLE, *_make_swatch_styles([colors[device.device] for device in devices])]
        self._device_table.text = format_html_table(*format_devices(status))
        self._error_table.stylesheets = [_TABLE_STYLE]
        self._error_table.text = _render_errors(run)


def _make_source(name: str, *columns: str) -> ColumnDataSource:
    """Make what a plot is drawn from, empty at first."""
    return ColumnDataSource({column: [] for column in columns}, name=name)


def _make_plot(height: int, **options: Any) -> Any:
    """Make an empty plot without tools."""
    how = {"x_range": Range1d(0, 1), "sizing_mode": "stretch_width", "tools": "", "toolbar_location": None}
    return figure(height=height, **how, **options)


class _ThroughputPlot:
    """Rows/s of each device over time."""

    def __init__(self) -> None:
        self._source = _make_source("daskinfer-speeds", "xs", "ys", "color", "device", "width")
        title = f"rows/s, {THROUGHPUT_WINDOW_SECONDS:.0f} s averages (dark: all devices)"
        self.root = _make_plot(
            _PLOT_HEIGHT, title=title, x_axis_label="seconds", y_range=Range1d(0, 1), min_width=_MIN_PLOT_WIDTH
        )
        lines = self.root.multi_line("xs", "ys", color="color", line_width="width", source=self._source)
        self.root.add_tools(HoverTool(renderers=[lines], tooltips=[("device", "@device"), ("rows/s", "$y{0,0}")]))
        self.root.yaxis.formatter = NumeralTickFormatter(format="0,0")

    def draw(self, run: RunView, colors: Mapping[str, str]) -> None:
        points = run.throughput.points
        seconds = np.array([at for at, _ in points])
        devices = run.snapshot.status.devices
        speeds = np.zeros((len(devices), len(points)))
        for i, (_, known) in enumerate(points):  # devices that joined later were not there yet
            speeds[: len(known), i] = known
        total = speeds.sum(axis=0)
        self.root.x_range.end = max([1.0, *seconds])
        self.root.y_range.end = max([1.0, *1.05 * total])
        self._source.data = {
            "xs": [seconds] * (len(devices) + 1),
            "ys": [total, *speeds],
            "color": [INK, *colors.values()],
            "device": ["all", *(device.title for device in devices)],
            "width": [1.5] + [2.5] * len(devices),
        }


class _SharesPlot:
    """The share of the rows that each device has done, in an outline of what was requested of it, if anything was."""

    def __init__(self) -> None:
        self._source = _make_source("daskinfer-shares", "device", "requested", "done", "color")
        self.root = _make_plot(_PLOT_HEIGHT, title="share of rows", y_range=FactorRange(" "), min_width=_MIN_PLOT_WIDTH)
        self.root.hbar("device", height=0.5, source=self._source, right="done", color="color")
        outline = {"right": "requested", "fill_color": None, "line_color": INK, "line_width": 1.5}
        self._requested = self.root.hbar("device", height=0.8, source=self._source, **outline)
        tooltips = [("device", "@device"), ("requested", "@requested{0.0%}"), ("done", "@done{0.0%}")]
        self.root.add_tools(HoverTool(tooltips=tooltips))
        self.root.xaxis.formatter = NumeralTickFormatter(format="0%")
        self.root.ygrid.visible = False

    def draw(self, devices: Sequence[DeviceStatus], colors: Mapping[str, str]) -> None:
        _set_devices(self.root, devices)
        self._requested.visible = any(device.asked_share is not None for device in devices)
        requested = [device.asked_share or 0.0 for device in devices]
        done = [device.done_share for device in devices]
        self.root.x_range.end = 1.05 * max([*requested, *done], default=0.0) or 1.0
        outlined = " (outline: requested)" if self._requested.visible else ""
        self.root.title.text = f"share of rows{outlined}"
        self._source.data = {
            "device": [device.title for device in devices],
            "requested": requested,
            "done": done,
            "color": [colors[device.device] for device in devices],
        }


class _PhasesPlot:
    """Where the time of each device went, as shares of the time since the first chunk."""

    def __init__(self) -> None:
        self._source = _make_source("daskinfer-phases", "device", *(phase.label for phase in _TIMED_PHASES))
        how = {"y_range": FactorRange(" "), "min_width": _MIN_PLOT_WIDTH, "background_fill_color": palette.IDLE.color}
        self.root = _make_plot(_PLOT_HEIGHT, title="time of each device", **how)
        labels = [phase.label for phase in _TIMED_PHASES]
        for phase, left, right in zip(_TIMED_PHASES, ["", *labels], labels, strict=False):
            look = {"fill_color": phase.color, "line_color": INK, "line_width": 0.5}
            if phase.hatch:
                look |= {"hatch_pattern": phase.hatch, "hatch_color": INK, "hatch_scale": 6.0, "hatch_weight": 0.7}
            self.root.hbar("device", left=left or 0.0, right=right, height=0.5, source=self._source, name=right, **look)
        self.root.add_tools(HoverTool(tooltips=[("device", "@device"), ("", "$name")]))
        self.root.xaxis.formatter = NumeralTickFormatter(format="0%")
        self.root.ygrid.visible = False

    def draw(self, status: Status, devices: Sequence[DeviceStatus]) -> None:
        _set_devices(self.root, devices)
        columns: dict[str, list[Any]] = {"device": [device.title for device in devices]}
        ends = np.zeros(len(devices))
        for phase, get_seconds in _TIMED_PHASES.items():
            ends = ends + np.array([get_seconds(device) for device in devices]) / max(1e-9, status.seconds or 0.0)
            columns[phase.label] = np.minimum(1.0, ends).tolist()
        self._source.data = columns


# One after the other on a device; the rest of its time it was idle. Writing overlaps with computing.
_TIMED_PHASES: Mapping[Phase, Callable[[DeviceStatus], float]] = {
    palette.READ: lambda device: device.waited_seconds,
    palette.LOAD: lambda device: device.load_seconds,
    palette.COMPUTE: lambda device: device.seconds,
}


def _set_devices(plot: Any, devices: Sequence[DeviceStatus]) -> None:
    """Give each device a row, the first on top."""
    names = [device.title for device in devices]
    if plot.y_range.factors != names[::-1]:
        plot.y_range.factors = names[::-1]
        plot.height = max(_PLOT_HEIGHT, _LABEL_HEIGHT * len(names) + _AXES_HEIGHT)


class _ChunkMapPlot:
    """All rows from left to right, coloured by device and state."""

    def __init__(self) -> None:
        columns = ("left", "right", "zero", "done", "in_flight", "failed", "retrying", "color")
        self._source = _make_source("daskinfer-cells", *columns)
        plot = _make_plot(125, x_axis_label="row", y_range=Range1d(0, 1), background_fill_color=palette.PENDING.color)
        quads = {"left": "left", "right": "right", "line_color": None, "source": self._source}
        plot.quad(bottom="zero", top="done", color="color", **quads)
        plot.quad(bottom="done", top="in_flight", color="color", alpha=0.45, **quads)
        plot.quad(bottom="in_flight", top="failed", color=FAILED_COLOR, **quads)
        plot.quad(bottom="retrying", top=1.0, color=RETRYING_COLOR, **quads)
        plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
        plot.yaxis.visible = plot.grid.visible = False
        self._x_range = plot.x_range
        self.root = column(_make_legend("rows", _ROW_ENTRIES), plot, sizing_mode="stretch_width")

    def draw(self, run: RunView, colors: Mapping[str, str]) -> None:
        cells = run.snapshot.cells
        bars = np.array([list(part) for part in (cells.done, cells.in_flight, cells.failed, cells.retrying, cells.device)])
        # Equal neighbours become one bar: a seam between them would show.
        first = np.flatnonzero(np.any(bars != np.roll(bars, 1, axis=1), axis=0) | (np.arange(bars.shape[1]) == 0))
        done, in_flight, failed, retrying = bars[:4, first] / 100
        edges = cells.start + np.append(first, bars.shape[1]) * cells.n_rows // max(1, bars.shape[1])
        by_number = dict(enumerate(colors.values())) | {UNKNOWN_DEVICE: palette.DONE_EARLIER.color}
        self._x_range.start, self._x_range.end = cells.start, cells.start + max(1, cells.n_rows)
        self._source.data = {
            "left": edges[:-1],
            "right": edges[1:],
            "zero": np.zeros(len(first)),
            "done": done,
            "in_flight": done + in_flight,
            "failed": done + in_flight + failed,
            "retrying": np.where(retrying > 0, 0.85, 1.0),  # a band at the top
            "color": [by_number.get(number, OTHERS_COLOR) for number in bars[4, first].tolist()],
        }


def _make_legend(title: str, entries: Sequence[tuple[str, str]]) -> Any:
    """Make a line of swatches and texts; unlike the title of a plot, it wraps in a narrow window."""
    text = render_template("diagnostics/dashboard/legend.html.j2", font=_FONT, title=title, entries=entries)
    return Div(text=text, sizing_mode="stretch_width", stylesheets=[_WIDE_STYLE])


def _assign_colors(devices: Sequence[DeviceStatus]) -> dict[str, str]:
    """Return the colour of each device: that of its place in the plan, as in the report."""
    return {
        device.device: OTHERS_COLOR if device.device == OTHERS else get_device_color(position)
        for position, device in enumerate(devices)
    }


def _get_state(run: RunView) -> str:
    status = run.snapshot.status
    if status.ended:
        return "failed" if status.error else "done"
    return "lost" if run.lost else "silent" if time.time() - run.last_seen > SILENT_SECONDS else _RUNNING


def _format_title(run: RunView) -> str:
    """Format a run's entry in the list; it must not change while the run goes on, or nobody could choose from the list."""
    began = time.strftime("%H:%M:%S", time.localtime(run.first_seen))
    return f"{began} {_shorten_name(run.snapshot.status.model)} ({_get_state(run)}), {run.snapshot.user}"


def _format_titles(runs: dict[str, RunView]) -> list[tuple[str, str]]:
    """Return each run and its title, the latest first; equal titles are numbered, the first run first."""
    counts: Counter[str] = Counter()
    titled = []
    for name, run in reversed(runs.items()):
        counts[title := _format_title(run)] += 1
        titled.append((name, title if counts[title] == 1 else f"{title}, no. {counts[title]}"))
    return titled[::-1]


def _shorten_name(name: str) -> str:
    return name if len(name) <= _MAX_NAME_CHARACTERS else f"{name[:_MAX_NAME_CHARACTERS]}…"


def _render_headline(run: RunView, n_others: int) -> str:
    status, state = run.snapshot.status, _get_state(run)
    parts = format_progress(status)
    if state in _STATE_MESSAGES:
        parts.append(_STATE_MESSAGES[state])
    elif status.seconds is not None and not status.ended:
        n_in_flight = sum(device.n_in_flight for device in status.devices)
        parts.append("1 chunk in flight" if n_in_flight == 1 else f"{n_in_flight:,} chunks in flight")
    return render_template(
        "diagnostics/dashboard/headline.html.j2",
        font=_FONT,
        model=_shorten_name(status.model),
        color=FAILED_COLOR if status.error or state == "lost" else get_device_color(0),
        percent=100 * status.fraction_done,
        text=", ".join(parts),
        n_others=n_others,
    )


_RUNNING = "running"
_STATE_MESSAGES = {
    "lost": "its client disconnected before the run ended",
    "silent": "no update for a while: its process may be hanging",
}

_EMPTY_HTML = (
    f'<div style="{_FONT}; padding: 1em">No run yet: this page fills when daskinfer computes on this cluster.</div>'
)
_ROW_ENTRIES = (
    (f"background: {get_device_color(0)}", "done, in the device's colour"),
    (f"background: {get_device_color(0)}; opacity: 0.45", "in flight"),
    (palette.PENDING.css, palette.PENDING.label),
    (palette.DONE_EARLIER.css, palette.DONE_EARLIER.label),
    (f"background: {RETRYING_COLOR}", "retrying"),
    (f"background: {FAILED_COLOR}", "failed"),
)
_TIME_ENTRIES = (
    (palette.READ.css, "waiting for reads"),
    (palette.LOAD.css, palette.LOAD.label),
    (palette.COMPUTE.css, palette.COMPUTE.label),
    (palette.IDLE.css, palette.IDLE.label),
)
_WRAP_STYLE = ":host { flex-wrap: wrap }"
_WIDE_STYLE = ":host, .bk-clearfix { width: 100% }"
_TABLE_STYLE = f"""
table {{ {_FONT}; border-collapse: collapse; margin: 4px 1em }}
th, td {{ text-align: left; padding: 2px 12px 2px 6px; border-bottom: 1px solid #ddd }}
th {{ font-weight: normal; color: #666 }}
"""


def _make_swatch_styles(colors: Sequence[str]) -> list[str]:
    """Make the styles that put a device's colour before its name."""
    cell = "tbody tr:nth-child({}) td:first-child {{ border-left: 10px solid {} }}"
    return [cell.format(i, color) for i, color in enumerate(colors, 1)]


def _render_errors(run: RunView) -> str:
    """Render the last errors as a table, the latest first."""
    rows = [
        (time.strftime("%H:%M:%S", time.localtime(one.at)), one.device, f"rows {one.start:,}:{one.stop:,}", one.exception)
        for one in reversed(run.snapshot.errors)
    ]
    return format_html_table(("time", "device", "", "error, the latest first"), rows) if rows else ""
