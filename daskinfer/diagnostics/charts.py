"""Compute what the charts of a run show, for whichever library draws them; and lay out the smallest chart, an SVG.

``html_report`` draws with bokeh and ``figure`` with matplotlib from the same numbers, rows and colours (``palette``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from daskinfer.core.formatting import find_byte_unit, render_template
from daskinfer.diagnostics import palette
from daskinfer.diagnostics.device_stats import DeviceReport, format_device
from daskinfer.diagnostics.palette import INK, Phase, get_device_color
from daskinfer.diagnostics.timeline import Mark, Span

if TYPE_CHECKING:
    from daskinfer.diagnostics.report import RunReport

N_BINS = 80  # of rows/s over time; as many as a reader tells apart; arbitrary
MAX_SVG_DEVICES = 16  # in a notebook's picture; arbitrary
_LABEL_CHARACTERS = 27  # "this process (all 64 cores)"; "MIG-" and the first 22 of a UUID, which tells instances apart


@dataclass(frozen=True, slots=True)
class Row:
    """A device's row in a chart: what events call it, what people call it, and its colour."""

    device: str
    label: str
    color: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A span in one of its stages, named as in ``STAGES``: from ``begin`` to ``end``, seconds since the first bar."""

    span: Span
    stage: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Stage:
    """A phase in the timeline; ``offset`` is from the middle of the device's row, in rows. Later ones cover earlier ones."""

    phase: Phase
    offset: float
    get_interval: Callable[[Span], tuple[float, float]]

    @property
    def label(self) -> str:
        """The phase's name."""
        return self.phase.label


SERIES_HEIGHT = 0.26  # of a bar, in rows; three series share a row
STAGES = (
    Stage(palette.READ, -0.28, lambda span: span.read),
    Stage(palette.LOAD, 0.0, lambda span: span.loaded),
    Stage(palette.COMPUTE, 0.0, lambda span: span.computed),
    Stage(palette.FIRST_CALL, 0.0, lambda span: span.first_call),
    Stage(palette.WRITE, 0.28, lambda span: span.wrote),
)


@dataclass(frozen=True, slots=True)
class Share:
    """A share of all rows, in the device's colour: ``opacity`` of its fill, 0 for an outline alone."""

    label: str
    opacity: float
    offset: float
    get_value: Callable[[DeviceReport], float]


_SHARES = (
    Share("requested", 0.0, -0.28, lambda device: device.asked_share or 0.0),
    Share("measured", 0.4, 0.0, lambda device: device.measured_share),
    Share("done", 1.0, 0.28, lambda device: device.done_share),
)


@dataclass(frozen=True, slots=True)
class MarkStyle:
    """How what went wrong is marked on a timeline: its colour, its shape in matplotlib, in bokeh and as a character.

    ``offset`` is from the middle of the device's row, in rows: chunks fail at the moment their worker dies.
    """

    color: str
    shape: str
    bokeh_shape: str
    character: str
    offset: float = 0.0


MARK_STYLES: Mapping[str, MarkStyle] = {
    "failed attempt": MarkStyle(palette.RETRYING_COLOR, "v", "inverted_triangle", "▼", 0.3),
    "worker died": MarkStyle(palette.FAILED_COLOR, "X", "x", "✖"),
    "worker restarted": MarkStyle(INK, "D", "diamond", "◆"),
    "device lost": MarkStyle(palette.FAILED_COLOR, "s", "square", "■"),
}


@dataclass(frozen=True, slots=True)
class PlacedMark:
    """A mark, with its place in seconds since the first bar."""

    mark: Mark
    seconds: float


@dataclass(frozen=True, slots=True)
class Layer:
    """A device's rows/s in each bin of time, stacked on those of the devices before it: from ``bottom`` to ``top``."""

    row: Row
    bottom: list[float]
    top: list[float]


def make_bars(timeline: Sequence[Span]) -> list[Bar]:
    """Make the bars of a timeline; a stage that took no time has none.

    Examples
    --------
    >>> span = Span("cpu:0", 0, 8, 1, 8, (10.0, 10.5), (11.0, 12.5), (13.0, 13.0))
    >>> [(bar.stage, bar.begin, bar.end) for bar in make_bars([span])]
    [('read', 0.0, 0.5), ('compute', 1.0, 2.5)]
    """
    stages = [
        (span, stage.label, interval)
        for span in timeline
        for stage in STAGES
        if (interval := stage.get_interval(span))[1] > interval[0]
    ]
    zero = min((begin for _, _, (begin, _) in stages), default=0.0)
    return [Bar(span, stage, begin - zero, end - zero) for span, stage, (begin, end) in stages]


def place_marks(report: RunReport) -> list[PlacedMark]:
    """Place the marks on the time axis of the bars, at its ends if they are outside: clocks of other hosts may differ."""
    stages = [stage.get_interval(span) for span in report.timeline for stage in STAGES]
    zero = min((begin for begin, end in stages if end > begin), default=0.0)
    last = max((end for begin, end in stages if end > begin), default=0.0)
    return [PlacedMark(mark, min(max(zero, mark.at), last) - zero) for mark in report.marks]


def list_rows(report: RunReport) -> list[Row]:
    """List the devices that did anything or were to, in the plan's order, then any other that has a span.

    A device's colour is that of its place in the plan, on the dashboard as well.
    """
    names = dict.fromkeys([*(d.device for d in report.devices), *(span.device for span in report.timeline)])
    colors = {name: get_device_color(i) for i, name in enumerate(names)}
    titles = {device.device: device.title for device in report.devices}
    hidden = {device.device for device in report.devices} - {device.device for device in report.shown_devices}
    return [
        Row(name, shorten_label(titles.get(name, format_device(name, 0))), color)
        for name, color in colors.items()
        if name not in hidden
    ]


def list_shares(report: RunReport) -> list[Share]:
    """List the shares to show: the requested one only if shares were requested, that by throughput for several devices."""
    hidden = {
        "requested": all(device.asked_share is None for device in report.devices),
        "measured": len(report.shown_devices) < 2,
    }
    return [share for share in _SHARES if not hidden.get(share.label)]


def shorten_label(name: str) -> str:
    """Shorten a device's name for an axis."""
    return name if len(name) <= _LABEL_CHARACTERS else f"{name[: _LABEL_CHARACTERS - 1]}…"


def compute_idle_seconds(devices: Iterable[DeviceReport]) -> dict[str, float]:
    """Compute how long each device that did anything was idle until the last one finished."""
    ended = {device.device: device.ended for device in devices if device.n_chunks}
    last = max(ended.values(), default=0.0)
    return {device: last - at for device, at in ended.items()}


def measure_peak_memory(devices: Sequence[DeviceReport]) -> tuple[list[float], str]:
    """Return the peak memory of each device, and the unit it is in."""
    unit, nbytes = find_byte_unit(max((device.peak_nbytes for device in devices), default=0))
    return [device.peak_nbytes / nbytes for device in devices], unit


def compute_throughput(bars: Sequence[Bar]) -> tuple[list[float], dict[str, list[float]]]:
    """Compute rows/s of each device over time; a chunk's rows are spread evenly over the time it was computed in.

    Returns
    -------
    tuple of list and dict
        The edges of ``N_BINS`` bins, seconds since the first bar, and by device the mean of each bin.

    Examples
    --------
    >>> span = Span("cpu:0", 0, 8, 1, 8, (10.0, 10.0), (11.0, 13.0), (13.0, 13.0))
    >>> edges, by_device = compute_throughput(make_bars([span]))
    >>> edges[0], edges[-1], {round(speed, 6) for speed in by_device["cpu:0"]}
    (0.0, 2.0, {4.0})
    """
    width = max((bar.end for bar in bars), default=0.0) / N_BINS
    rows: dict[str, list[tuple[Bar, float]]] = {}
    for bar in bars:
        if bar.stage == "compute":
            rows.setdefault(bar.span.device, []).append((bar, bar.span.n_rows / width))
    by_device = {device: _bin_amounts(own, N_BINS, width) for device, own in rows.items()}
    return [width * i for i in range(N_BINS + 1)], by_device


def stack_throughput(rows: Sequence[Row], bars: Sequence[Bar]) -> tuple[list[float], list[Layer]]:
    """Stack the rows/s of the devices in their order; return the bins' edges and a layer per device."""
    edges, by_device = compute_throughput(bars)
    layers, bottom = [], [0.0] * N_BINS
    for row in rows:
        top = [below + own for below, own in zip(bottom, by_device.get(row.device, [0.0] * N_BINS), strict=True)]
        layers.append(Layer(row, bottom, top))
        bottom = top
    return edges, layers


_WIDTH, _LEFT_MARGIN, _ROW_HEIGHT, _STAGE_HEIGHT = 640, 190, 22, 6  # pixels of the SVG: its rows hold three stages each
_MAX_COLUMNS = 320  # of time, two pixels each; fewer if the picture would be too large
MAX_SVG_CHARACTERS = 16_000  # of the paths; with the names below 20 kB
_ELEMENT_CHARACTERS = 51  # of a path's element, besides the path itself
_N_OPACITY_LEVELS = 4  # that tell how much of a column is covered
MAX_SVG_MARKS = 40  # 60 bytes each; arbitrary


def render_svg(rows: Sequence[Row], bars: Sequence[Bar], marks: Sequence[PlacedMark] = ()) -> str:
    """Render the timeline as a small picture without code; empty if there are no bars."""
    if not bars:
        return ""
    shown, n_columns = rows[:MAX_SVG_DEVICES], _MAX_COLUMNS
    paths = _make_paths(shown, bars, n_columns)
    while sum(len(path) + _ELEMENT_CHARACTERS for *_, path in paths) > MAX_SVG_CHARACTERS:
        n_columns //= 2
        paths = _make_paths(shown, bars, n_columns)
    seconds = max(bar.end for bar in bars)
    return render_template(
        "diagnostics/timeline.html.j2",
        rows=shown,
        n_more=len(rows) - len(shown),
        paths=paths,
        marks=_make_mark_places(shown, marks, seconds),
        seconds=seconds,
        stages=[stage for stage in STAGES if any(bar.stage == stage.label for bar in bars)],
        width=_WIDTH,
        left=_LEFT_MARGIN,
        row_height=_ROW_HEIGHT,
        stage_height=_STAGE_HEIGHT,
        column_width=(_WIDTH - _LEFT_MARGIN) / n_columns,
    )


def _make_mark_places(rows: Sequence[Row], marks: Sequence[PlacedMark], seconds: float) -> list[tuple[str, int, int]]:
    """Return the colour and the pixel of each mark; of several at one pixel the first, which is what began it."""
    numbers = {row.device: number for number, row in enumerate(rows)}
    colors: dict[tuple[int, int], str] = {}
    for one in marks:
        if one.mark.device in numbers:
            x = _LEFT_MARGIN + round(min(1.0, one.seconds / seconds) * (_WIDTH - _LEFT_MARGIN))
            colors.setdefault((x, numbers[one.mark.device] * _ROW_HEIGHT), MARK_STYLES[one.mark.kind].color)
    return [(color, x, y) for (x, y), color in colors.items()][:MAX_SVG_MARKS]


def _make_paths(rows: Sequence[Row], bars: Sequence[Bar], n_columns: int) -> list[tuple[str, float, str]]:
    """Draw the bars as paths: colour, opacity and SVG's path data, one per device, stage and opacity."""
    width = max(bar.end for bar in bars) / n_columns
    own: dict[tuple[str, str], list[tuple[Bar, float]]] = {}
    for bar in bars:
        own.setdefault((bar.span.device, bar.stage), []).append((bar, bar.end - bar.begin))
    paths = []
    for number, row in enumerate(rows):
        for stage in STAGES:
            y = number * _ROW_HEIGHT + round((1 + stage.offset / 0.28) * _STAGE_HEIGHT) + 4
            covered = _bin_amounts(own.get((row.device, stage.label), []), n_columns, width)
            levels = [math.ceil(round(min(1.0, seconds / width) * _N_OPACITY_LEVELS, 6)) for seconds in covered]
            by_level: dict[int, str] = {}
            for level, columns in groupby(range(n_columns), key=levels.__getitem__):
                first, *others = columns
                by_level[level] = by_level.get(level, "") + f"M{first} {y}h{len(others) + 1}"
            paths += [(stage.phase.color, level / _N_OPACITY_LEVELS, path) for level, path in by_level.items() if level]
    return paths


def _bin_amounts(amounts: Iterable[tuple[Bar, float]], n_bins: int, bin_seconds: float) -> list[float]:
    """Spread each amount evenly over the time of its bar, and add them up in bins of ``bin_seconds``."""
    bins = [0.0] * n_bins
    for bar, amount in amounts:
        for i in range(int(bar.begin / bin_seconds), min(n_bins, int(bar.end / bin_seconds) + 1)):
            within = min(bar.end, (i + 1) * bin_seconds) - max(bar.begin, i * bin_seconds)
            bins[i] += amount * max(0.0, within) / (bar.end - bar.begin)
    return bins
