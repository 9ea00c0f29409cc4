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

from daskinfer.core.formatting import html_table
from daskinfer.diagnostics.dashboard.chunk_map import UNKNOWN
from daskinfer.diagnostics.dashboard.state import OTHERS, Board, Shown
from daskinfer.diagnostics.status import SPEED_SECONDS, DeviceStatus
from daskinfer.diagnostics.status_text import HEADERS, cells, words

PAGE, PLOT = "/daskinfer", "/individual-daskinfer"

DRAW_SECONDS = 0.5
SILENT_SECONDS = 15.0  # without news until a run is said to be silent: thirty times what is usual; arbitrary

# Neither red nor orange, which are what went wrong; neighbours differ in lightness too.
_COLOURS = ("#4e79a7", "#59a14f", "#b07aa1", "#76b7b2", "#9c755f", "#2f4b7c", "#8cd17d", "#d4a6c8", "#499894", "#b6992d")
_OTHERS, _FAILED, _AGAIN, _WAITS, _BEFORE, _ALL = "#79706e", "#d62728", "#ff9d1c", "#e6e6e6", "#a3a3a3", "#404040"
_HEIGHT, _LABEL, _AXES = 230, 15, 70  # pixels: of a plot, of a label, and of what is around a plot's frame
_NARROW = 400  # pixels; in a window that is narrower than two of them, as JupyterLab's are, one stands below the other
_NAME_CHARACTERS = 80  # of a network; arbitrary
_FONT = "font-family: Helvetica, Arial, sans-serif; font-size: 13px"


def install(scheduler: Scheduler, board: Board) -> bool:
    """Add the page to a scheduler's dashboard, shown from ``board``; whether there is a dashboard."""
    served = scheduler.http_application.applications
    of_dask = next((application for application in served if isinstance(application, BokehTornado)), None)
    if of_dask is None:
        return False
    variables = template_variables(scheduler)
    # These lists are the ones that the dashboard's own pages are drawn with.
    variables["pages"].append(PAGE.strip("/"))
    variables["plots"].append({"url": PLOT.strip("/"), "name": PLOT.partition("-")[2].title()})
    variables["plots"].sort(key=itemgetter("name"))

    def page(scheduler: Scheduler, extra: Mapping[str, Any], doc: Any) -> None:
        draw(board, doc)
        doc.template = env.from_string(_TEMPLATE)
        doc.template_variables.update(extra)

    def plot(scheduler: Scheduler, extra: Mapping[str, Any], doc: Any) -> None:
        draw(board, doc)

    pages = {PAGE: page, PLOT: plot}
    ours = BokehApplication(pages, scheduler, prefix=of_dask.prefix, template_variables=variables)
    scheduler.http_application.add_application(ours)
    ours.initialize(IOLoop.current())
    ours.start()
    # Only to be listed there: the plot is served, and its readers are seen to, by the application beside it.
    of_dask._applications[PLOT] = ApplicationContext(Application(), url=PLOT, io_loop=IOLoop.current())
    return True


def draw(board: Board, doc: Any) -> None:
    """Fill one reader's document, and keep it up to date."""
    view = View(board)
    view.update()
    add_periodic_callback(doc, view, int(1000 * DRAW_SECONDS))
    doc.add_root(view.root)
    doc.title = "Dask: daskinfer"
    doc.theme = BOKEH_THEME


class View:
    """What one reader sees: the run that was chosen, or the latest."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._seen: tuple[object, ...] = ()
        self._choice = Select(title="run", value="", options=[("", "the latest")], width=320)
        self._choice.on_change("value", lambda attr, old, new: self.update())
        self._head = Div(text=_NOTHING, sizing_mode="stretch_width", min_width=_NARROW, stylesheets=[_WIDE])
        self._speeds, self._shares, self._cells = _Speeds(), _Shares(), _Cells()
        self._devices = Div(sizing_mode="stretch_width")
        self._troubles = Div(sizing_mode="stretch_width")
        self._body = column(
            row(self._speeds.root, self._shares.root, sizing_mode="stretch_width", stylesheets=[_WRAPS]),
            self._cells.root,
            self._devices,
            self._troubles,
            sizing_mode="stretch_width",
            visible=False,
        )
        top = row(self._choice, self._head, sizing_mode="stretch_width", stylesheets=[_WRAPS])
        self.root = column(top, self._body, sizing_mode="stretch_width")

    def update(self) -> None:
        """Draw again, where there is news."""
        runs = {shown.snapshot.status.run: shown for shown in self._board.runs}
        if not runs:
            return
        going_on = (each for each in runs.values() if _state(each) == _GOES_ON)
        shown = runs.get(self._choice.value) or next(going_on, next(iter(runs.values())))
        choice = [("", "the latest"), *_titles(runs)]
        n_others = sum(_state(other) == _GOES_ON for other in runs.values() if other is not shown)
        seen = (shown.snapshot.status.run, shown.n_heard, choice)
        if seen != self._seen:
            self._seen = seen
            self._choice.options = choice
            self._draw(shown, n_others)

    def _draw(self, shown: Shown, n_others: int) -> None:
        status = shown.snapshot.status
        colours = _colours(status.devices)
        self._body.visible = True
        self._head.text = _headline(shown, n_others)
        self._speeds.draw(shown, colours)
        self._shares.draw(status.devices, colours)
        self._cells.draw(shown, colours)
        self._devices.stylesheets = [_TABLE, *_swatches(colours)]
        self._devices.text = html_table(HEADERS, [cells(device, status) for device in status.devices])
        self._troubles.stylesheets = [_TABLE]
        self._troubles.text = _troubles(shown)


class _Speeds:
    """Rows/s of each device over time."""

    def __init__(self) -> None:
        names = ("xs", "ys", "colour", "device", "width")
        self._source = ColumnDataSource({name: [] for name in names}, name="daskinfer-speeds")
        self.root = figure(
            title=f"rows/s, over {SPEED_SECONDS:.0f} s each (dark: all devices)",
            x_axis_label="seconds",
            x_range=Range1d(0, 1),
            y_range=Range1d(0, 1),
            height=_HEIGHT,
            min_width=_NARROW,
            sizing_mode="stretch_width",
            tools="",
            toolbar_location=None,
        )
        lines = self.root.multi_line("xs", "ys", color="colour", line_width="width", source=self._source)
        self.root.add_tools(HoverTool(renderers=[lines], tooltips=[("device", "@device"), ("rows/s", "$y{0,0}")]))
        self.root.yaxis.formatter = NumeralTickFormatter(format="0,0")

    def draw(self, shown: Shown, colours: Sequence[str]) -> None:
        points = shown.course.points
        seconds = np.array([at for at, _ in points])
        devices = shown.snapshot.status.devices
        speeds = np.zeros((len(devices), len(points)))
        for i, (_, known) in enumerate(points):  # devices that came later were not there yet
            speeds[: len(known), i] = known
        together = speeds.sum(axis=0)
        self.root.x_range.end = max([1.0, *seconds])
        self.root.y_range.end = max([1.0, *1.05 * together])
        self._source.data = {
            "xs": [seconds] * (len(devices) + 1),
            "ys": [together, *speeds],
            "colour": [_ALL, *colours],
            "device": ["all", *(device.device for device in devices)],
            "width": [1.5] + [2.5] * len(devices),
        }


class _Shares:
    """Which share of the rows each device was asked for, and which it has done."""

    def __init__(self) -> None:
        names = ("device", "asked", "done", "colour")
        self._source = ColumnDataSource({name: [] for name in names}, name="daskinfer-shares")
        self.root = figure(
            title="share of the rows (grey: as planned, coloured: done)",
            x_range=Range1d(0, 1),
            y_range=FactorRange(" "),
            height=_HEIGHT,
            min_width=_NARROW,
            sizing_mode="stretch_width",
            tools="",
            toolbar_location=None,
        )
        self.root.hbar("device", right="asked", height=0.8, color=_WAITS, line_color="#bbbbbb", source=self._source)
        self.root.hbar("device", right="done", height=0.4, color="colour", source=self._source)
        tooltips = [("device", "@device"), ("planned", "@asked{0.0%}"), ("done", "@done{0.0%}")]
        self.root.add_tools(HoverTool(tooltips=tooltips))
        self.root.xaxis.formatter = NumeralTickFormatter(format="0%")
        self.root.ygrid.visible = False

    def draw(self, devices: Sequence[DeviceStatus], colours: Sequence[str]) -> None:
        names = [device.device for device in devices]
        if self.root.y_range.factors != names[::-1]:
            self.root.y_range.factors = names[::-1]  # the first on top
            self.root.height = max(_HEIGHT, _LABEL * len(names) + _AXES)
        shares = [share for device in devices for share in (device.asked_share, device.done_share)]
        self.root.x_range.end = 1.05 * max(shares, default=0.0) or 1.0
        self._source.data = {
            "device": names,
            "asked": [device.asked_share for device in devices],
            "done": [device.done_share for device in devices],
            "colour": list(colours),
        }


class _Cells:
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
            background_fill_color=_WAITS,
        )
        quads = {"left": "left", "right": "right", "line_color": None, "source": self._source}
        plot.quad(bottom="zero", top="done", color="colour", **quads)
        plot.quad(bottom="done", top="in_flight", color="colour", alpha=0.45, **quads)
        plot.quad(bottom="in_flight", top="failed", color=_FAILED, **quads)
        plot.quad(bottom="again", top=1.0, color=_AGAIN, **quads)
        plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
        plot.yaxis.visible = plot.grid.visible = False
        self._rows = plot.x_range
        # No title of the plot's: that is cut off in a narrow window, where this goes on in a second line.
        legend = Div(text=_LEGEND, sizing_mode="stretch_width", stylesheets=[_WIDE])
        self.root = column(legend, plot, sizing_mode="stretch_width")

    def draw(self, shown: Shown, colours: Sequence[str]) -> None:
        cells = shown.snapshot.cells
        bars = np.array([list(part) for part in (cells.done, cells.in_flight, cells.failed, cells.again, cells.device)])
        # Neighbours that look the same are one bar: seams between them show.
        first = np.flatnonzero(np.any(bars != np.roll(bars, 1, axis=1), axis=0) | (np.arange(bars.shape[1]) == 0))
        done, in_flight, failed, again = bars[:4, first] / 100
        edges = cells.start + np.append(first, bars.shape[1]) * cells.n_rows // max(1, bars.shape[1])
        by_number = dict(enumerate(colours)) | {UNKNOWN: _BEFORE}
        self._rows.start, self._rows.end = cells.start, cells.start + max(1, cells.n_rows)
        self._source.data = {
            "left": edges[:-1],
            "right": edges[1:],
            "zero": np.zeros(len(first)),
            "done": done,
            "in_flight": done + in_flight,
            "failed": done + in_flight + failed,
            "again": np.where(again > 0, 0.85, 1.0),  # a band at the top
            "colour": [by_number.get(number, _OTHERS) for number in bars[4, first].tolist()],
        }


def _colours(devices: Sequence[DeviceStatus]) -> list[str]:
    colours = list(islice(cycle(_COLOURS), len(devices)))
    return [_OTHERS if device.device == OTHERS else colour for device, colour in zip(devices, colours, strict=True)]


def _state(shown: Shown) -> str:
    status = shown.snapshot.status
    if status.ended:
        return "failed" if status.error else "done"
    return "lost" if shown.lost else "silent" if time.time() - shown.last_heard > SILENT_SECONDS else _GOES_ON


def _title(shown: Shown) -> str:
    """A run among others; its words do not change each time, or the list could not be chosen from."""
    began = time.strftime("%H:%M:%S", time.localtime(shown.first_heard))
    return f"{began} {_short(shown.snapshot.status.model)} ({_state(shown)}), {shown.snapshot.who}"


def _titles(runs: dict[str, Shown]) -> list[tuple[str, str]]:
    """Each run and its title, the latest first; those of one title are numbered in the order they came."""
    counts: Counter[str] = Counter()
    titled = []
    for run, shown in reversed(runs.items()):
        counts[title := _title(shown)] += 1
        titled.append((run, title if counts[title] == 1 else f"{title}, no. {counts[title]}"))
    return titled[::-1]


def _short(name: str) -> str:
    return name if len(name) <= _NAME_CHARACTERS else f"{name[:_NAME_CHARACTERS]}…"


_NOTHING = f'<div style="{_FONT}; padding: 1em">No run yet: this page fills when daskinfer computes on this cluster.</div>'
_BAR = (
    '<div style="background: #ddd; border-radius: 3px; height: 14px; margin: 6px 0">'
    '<div style="background: {colour}; border-radius: 3px; height: 14px; width: {percent:.2f}%"></div></div>'
)


def _headline(shown: Shown, n_others: int) -> str:
    status, state = shown.snapshot.status, _state(shown)
    gone = status.error or state == "lost"
    bar = _BAR.format(percent=100 * status.share, colour=_FAILED if gone else _COLOURS[0])
    said = words(status)
    if state in _GONE:
        said.append(_GONE[state])
    elif status.seconds is not None and not status.ended:
        n_in_flight = sum(device.n_in_flight for device in status.devices)
        said.append("1 chunk in flight" if n_in_flight == 1 else f"{n_in_flight:,} chunks in flight")
    head = f"<b>{html.escape(_short(status.model))}</b>{bar}{html.escape(', '.join(said))}"
    if n_others:
        others = "another run goes on" if n_others == 1 else f"{n_others} other runs go on"
        head += f"<br><i>{others} on this cluster: see the list of runs</i>"
    return f'<div style="{_FONT}; padding: 4px 1em">{head}</div>'


_GOES_ON = "goes on"
_GONE = {
    "lost": "its client is gone before its end was heard of",
    "silent": "nothing was heard of it for a while: its process may hang",
}


# The dashboard's bar of links lies over its pages and has room for one line of them: here it takes the room that it needs.
_TEMPLATE = """{% extends "simple.html" %}
{% block extra_resources %}
<style>body { padding-top: 0 } .navbar { position: sticky; margin: 0 -10px 8px }</style>
{% endblock %}"""
_SWATCH = (
    '<span style="white-space: nowrap; margin-right: 1em"><span style="background: {}; opacity: {}; display: inline-block; '
    'width: 12px; height: 12px; margin-right: 4px; border: 1px solid #bbb"></span>{}</span>'
)
_STATES = (
    (_COLOURS[0], 1, "done, in the device's colour"),
    (_COLOURS[0], 0.45, "in flight"),
    (_WAITS, 1, "waits"),
    (_BEFORE, 1, "done before"),
    (_AGAIN, 1, "tried again"),
    (_FAILED, 1, "failed"),
)
_LEGEND = f'<div style="{_FONT}; padding: 4px 1em"><b>rows</b>&ensp;{"".join(_SWATCH.format(*s) for s in _STATES)}</div>'
_WRAPS = ":host { flex-wrap: wrap }"
_WIDE = ":host, .bk-clearfix { width: 100% }"
_TABLE = f"""
table {{ {_FONT}; border-collapse: collapse; margin: 4px 1em }}
th, td {{ text-align: left; padding: 2px 12px 2px 6px; border-bottom: 1px solid #ddd }}
th {{ font-weight: normal; color: #666 }}
"""


def _swatches(colours: Sequence[str]) -> list[str]:
    """The device's colour before its name."""
    cell = "tbody tr:nth-child({}) td:first-child {{ border-left: 10px solid {} }}"
    return [cell.format(i, colour) for i, colour in enumerate(colours, 1)]


def _troubles(shown: Shown) -> str:
    """The last messages of what went wrong, the latest first."""
    rows = [
        (time.strftime("%H:%M:%S", time.localtime(t.at)), t.device, f"rows {t.start:,}:{t.stop:,}", t.exception)
        for t in reversed(shown.snapshot.troubles)
    ]
    return html_table(("when", "device", "", "what went wrong, the latest first"), rows) if rows else ""
