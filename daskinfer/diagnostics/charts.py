"""Compute what the charts of a run show, for whichever library draws them; and lay out the smallest chart, an SVG.

``html_report`` draws with bokeh and ``figure`` with matplotlib from the same numbers, colours and rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from daskinfer.core.formatting import find_byte_unit, render_template
from daskinfer.diagnostics.device_stats import DeviceReport
from daskinfer.diagnostics.timeline import Span

if TYPE_CHECKING:
    from daskinfer.diagnostics.report import RunReport

N_BINS = 80  # of rows/s over time; as many as a reader tells apart; arbitrary
MAX_SVG_DEVICES = 16  # in a notebook's picture; arbitrary
_LABEL_CHARACTERS = 24  # "MIG-" and the first 19 of a UUID, which tells instances apart


@dataclass(frozen=True, slots=True)
class Bar:
    """A span in one of its stages, "read", "compute" or "write": from ``begin`` to ``end``, seconds since the first bar."""

    span: Span
    stage: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Series:
    """Bars of one colour in a chart with a row per device; ``offset`` is from the middle of the row, in rows."""

    label: str
    color: str
    offset: float


SERIES_HEIGHT = 0.26  # of a bar, in rows; three series share a row
# Colours by Okabe and Ito: told apart with any colour vision, and readable on white and on black.
STAGES = (Series("read", "#56b4e9", -0.28), Series("compute", "#0072b2", 0.0), Series("write", "#e69f00", 0.28))
SHARES: tuple[tuple[Series, Callable[[DeviceReport], float]], ...] = (
    (Series("requested", "#bbbbbb", -0.28), lambda device: device.asked_share),
    (Series("measured", "#cc79a7", 0.0), lambda device: device.measured_share),
    (Series("done", "#009e73", 0.28), lambda device: device.done_share),
)
_DEVICE_COLORS = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9"),
    *("#d55e00", "#999999", "#c9b800", "#7a4fbf", "#8c5a3c"),
)


@dataclass(frozen=True, slots=True)
class Layer:
    """A device's rows/s in each bin of time, stacked on those of the devices before it: from ``bottom`` to ``top``."""

    device: str
    color: str
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
        for stage, interval in zip(STAGES, (span.read, span.computed, span.wrote), strict=True)
        if interval[1] > interval[0]
    ]
    zero = min((begin for _, _, (begin, _) in stages), default=0.0)
    return [Bar(span, stage, begin - zero, end - zero) for span, stage, (begin, end) in stages]


def list_device_names(report: RunReport) -> list[str]:
    """List the devices in the plan's order, then any other that has a span."""
    return list(dict.fromkeys([*(d.device for d in report.devices), *(span.device for span in report.timeline)]))


def get_device_color(position: int) -> str:
    """Return the colour of a device by its position; the eleventh has that of the first."""
    return _DEVICE_COLORS[position % len(_DEVICE_COLORS)]


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


def stack_throughput(devices: Sequence[str], bars: Sequence[Bar]) -> tuple[list[float], list[Layer]]:
    """Stack the rows/s of the devices in their order; return the bins' edges and a layer per device."""
    edges, by_device = compute_throughput(bars)
    layers, bottom = [], [0.0] * N_BINS
    for position, device in enumerate(devices):
        top = [below + own for below, own in zip(bottom, by_device.get(device, [0.0] * N_BINS), strict=True)]
        layers.append(Layer(device, get_device_color(position), bottom, top))
        bottom = top
    return edges, layers


_WIDTH, _LEFT_MARGIN, _ROW_HEIGHT, _STAGE_HEIGHT = 640, 170, 22, 6  # pixels of the SVG: its rows hold three stages each
_MAX_COLUMNS = 320  # of time, two pixels each; fewer if the picture would be too large
MAX_SVG_CHARACTERS = 16_000  # of the paths; with the names below 20 kB
_ELEMENT_CHARACTERS = 51  # of a path's element, besides the path itself
_N_OPACITY_LEVELS = 4  # that tell how much of a column is covered


def render_svg(devices: Sequence[str], bars: Sequence[Bar]) -> str:
    """Render the timeline as a small picture without code; empty if there are no bars."""
    if not bars:
        return ""
    shown, n_columns = devices[:MAX_SVG_DEVICES], _MAX_COLUMNS
    paths = _make_paths(shown, bars, n_columns)
    while sum(len(path) + _ELEMENT_CHARACTERS for *_, path in paths) > MAX_SVG_CHARACTERS:
        n_columns //= 2
        paths = _make_paths(shown, bars, n_columns)
    return render_template(
        "diagnostics/timeline.html.j2",
        labels=[shorten_label(name) for name in shown],
        n_more=len(devices) - len(shown),
        paths=paths,
        seconds=max(bar.end for bar in bars),
        stages=STAGES,
        width=_WIDTH,
        left=_LEFT_MARGIN,
        row_height=_ROW_HEIGHT,
        stage_height=_STAGE_HEIGHT,
        column_width=(_WIDTH - _LEFT_MARGIN) / n_columns,
    )


def _make_paths(devices: Sequence[str], bars: Sequence[Bar], n_columns: int) -> list[tuple[str, float, str]]:
    """Draw the bars as paths: colour, opacity and SVG's path data, one per device, stage and opacity."""
    width = max(bar.end for bar in bars) / n_columns
    own: dict[tuple[str, str], list[tuple[Bar, float]]] = {}
    for bar in bars:
        own.setdefault((bar.span.device, bar.stage), []).append((bar, bar.end - bar.begin))
    paths = []
    for row, device in enumerate(devices):
        for position, stage in enumerate(STAGES):
            y = row * _ROW_HEIGHT + position * _STAGE_HEIGHT + 4
            covered = _bin_amounts(own.get((device, stage.label), []), n_columns, width)
            levels = [math.ceil(round(min(1.0, seconds / width) * _N_OPACITY_LEVELS, 6)) for seconds in covered]
            by_level: dict[int, str] = {}
            for level, columns in groupby(range(n_columns), key=levels.__getitem__):
                first, *others = columns
                by_level[level] = by_level.get(level, "") + f"M{first} {y}h{len(others) + 1}"
            paths += [(stage.color, level / _N_OPACITY_LEVELS, path) for level, path in by_level.items() if level]
    return paths


def _bin_amounts(amounts: Iterable[tuple[Bar, float]], n_bins: int, bin_seconds: float) -> list[float]:
    """Spread each amount evenly over the time of its bar, and add them up in bins of ``bin_seconds``."""
    bins = [0.0] * n_bins
    for bar, amount in amounts:
        for i in range(int(bar.begin / bin_seconds), min(n_bins, int(bar.end / bin_seconds) + 1)):
            within = min(bar.end, (i + 1) * bin_seconds) - max(bar.begin, i * bin_seconds)
            bins[i] += amount * max(0.0, within) / (bar.end - bar.begin)
    return bins
