"""What every picture of a run is drawn from: bars of time, rows/s over time; and the smallest picture, for notebooks."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from daskinfer.diagnostics.device_stats import DeviceReport, ReportLike
from daskinfer.diagnostics.timeline import Span

# By Okabe and Ito, which people of every colour vision can tell apart, and that are seen on white and on black.
STAGE_COLORS = {"read": "#56b4e9", "compute": "#0072b2", "write": "#e69f00"}
SHARE_COLORS = {"asked": "#bbbbbb", "measured": "#cc79a7", "done": "#009e73"}
_DEVICE_COLORS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#999999",
    "#c9b800",
    "#7a4fbf",
    "#8c5a3c",
)

N_BINS = 80  # of rows/s over time; as many as a reader tells apart; arbitrary
MAX_SVG_DEVICES = 16  # in a notebook's picture; arbitrary
_LABEL_CHARACTERS = 24  # "MIG-" and the first 19 of a UUID, which tells instances apart


@dataclass(frozen=True, slots=True)
class Bar:
    """A span in one of its lanes, "read", "compute" or "write": from ``begin`` to ``end``, seconds since the first bar."""

    span: Span
    stage: str
    begin: float
    end: float


def make_bars(timeline: Sequence[Span]) -> list[Bar]:
    """All bars of a timeline that took time.

    Examples
    --------
    >>> span = Span("cpu:0", 0, 8, 1, 8, (10.0, 10.5), (11.0, 12.5), (13.0, 13.0))
    >>> [(bar.stage, bar.begin, bar.end) for bar in make_bars([span])]
    [('read', 0.0, 0.5), ('compute', 1.0, 2.5)]
    """
    lanes = [
        (span, lane, stretch)
        for span in timeline
        for lane, stretch in zip(STAGE_COLORS, (span.read, span.computed, span.wrote), strict=True)
        if stretch[1] > stretch[0]
    ]
    zero = min((begin for _, _, (begin, _) in lanes), default=0.0)
    return [Bar(span, lane, begin - zero, end - zero) for span, lane, (begin, end) in lanes]


def list_device_names(report: ReportLike) -> list[str]:
    """The devices in the plan's order, and whatever else has a span."""
    return list(dict.fromkeys([*(d.device for d in report.devices), *(span.device for span in report.timeline)]))


def get_device_color(position: int) -> str:
    """The colour of a device by its position; the eleventh has the first one's."""
    return _DEVICE_COLORS[position % len(_DEVICE_COLORS)]


def shorten_label(name: str) -> str:
    """A name for an axis."""
    return name if len(name) <= _LABEL_CHARACTERS else f"{name[: _LABEL_CHARACTERS - 1]}…"


def compute_idle_seconds(devices: Iterable[DeviceReport]) -> dict[str, float]:
    """How long each device that did anything was done before the last was."""
    ended = {device.device: device.ended for device in devices if device.n_chunks}
    last = max(ended.values(), default=0.0)
    return {device: last - at for device, at in ended.items()}


def compute_throughput(bars: Sequence[Bar]) -> tuple[list[float], dict[str, list[float]]]:
    """Rows/s of each device over time: a chunk's rows are spread evenly over the time that it was computed in.

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


_WIDTH, _ROW_HEIGHT, _STAGE_HEIGHT = 640, 22, 6  # of the picture in a notebook, a device and a lane in it, in pixels
_LEFT_MARGIN = 170  # where time begins, beside the names
_MAX_COLUMNS = 320  # of time, two pixels each; fewer where the picture would be too large
MAX_SVG_CHARACTERS = 16_000  # of the bars; with the names less than 20 kB
_N_OPACITY_LEVELS = 4  # of how much of a column is covered: as opacity


def render_svg(devices: Sequence[str], bars: Sequence[Bar]) -> str:
    """The timeline as a small picture without code; empty where nothing was drawn."""
    if not bars:
        return ""
    shown, n_columns = list(devices)[:MAX_SVG_DEVICES], _MAX_COLUMNS
    while len(lanes := _render_bars(shown, bars, n_columns)) > MAX_SVG_CHARACTERS:
        n_columns //= 2
    labels = "".join(
        f'<text x="0" y="{i * _ROW_HEIGHT + 13}">{html.escape(shorten_label(name))}</text>' for i, name in enumerate(shown)
    )
    bottom = len(shown) * _ROW_HEIGHT + 14
    key = "".join(f'<tspan fill="{fill}"> {lane}</tspan>' for lane, fill in STAGE_COLORS.items())
    rest = f" and {len(devices) - len(shown):,} more devices" if len(devices) > len(shown) else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{bottom + 6}" '
        f'viewBox="0 0 {_WIDTH} {bottom + 6}" font-family="sans-serif" font-size="12" fill="currentColor" '
        f'style="display:block;margin:.6em 0">{labels}'
        f'<g transform="translate({_LEFT_MARGIN} 0) scale({(_WIDTH - _LEFT_MARGIN) / n_columns:.4g} 1)" stroke-width="{_STAGE_HEIGHT - 1}" '
        f'fill="none">{lanes}</g><text x="{_LEFT_MARGIN}" y="{bottom}">0 s{key}{rest}</text>'
        f'<text x="{_WIDTH}" y="{bottom}" text-anchor="end">{max(bar.end for bar in bars):,.3g} s</text></svg>'
    )


def _render_bars(devices: Sequence[str], bars: Sequence[Bar], n_columns: int) -> str:
    """The bars: a path per device, lane and opacity."""
    width = max(bar.end for bar in bars) / n_columns
    own: dict[tuple[str, str], list[Bar]] = {}
    for bar in bars:
        own.setdefault((bar.span.device, bar.stage), []).append(bar)
    paths = []
    for row, device in enumerate(devices):
        for position, (lane, stroke) in enumerate(STAGE_COLORS.items()):
            y = row * _ROW_HEIGHT + position * _STAGE_HEIGHT + 4
            covered = _bin_amounts([(bar, bar.end - bar.begin) for bar in own.get((device, lane), [])], n_columns, width)
            levels = [math.ceil(round(min(1.0, seconds / width) * _N_OPACITY_LEVELS, 6)) for seconds in covered]
            by_level: dict[int, str] = {}
            for level, columns in groupby(range(n_columns), key=levels.__getitem__):
                first, *others = columns
                by_level[level] = by_level.get(level, "") + f"M{first} {y}h{len(others) + 1}"
            paths += [
                f'<path stroke="{stroke}" stroke-opacity="{level / _N_OPACITY_LEVELS:g}" d="{path}"/>'
                for level, path in by_level.items()
                if level
            ]
    return "".join(paths)


def _bin_amounts(amounts: Iterable[tuple[Bar, float]], n_bins: int, bin_seconds: float) -> list[float]:
    """Amounts, each spread evenly over the time of its bar, summed up in bins of ``width`` seconds."""
    bins = [0.0] * n_bins
    for bar, amount in amounts:
        for i in range(int(bar.begin / bin_seconds), min(n_bins, int(bar.end / bin_seconds) + 1)):
            within = min(bar.end, (i + 1) * bin_seconds) - max(bar.begin, i * bin_seconds)
            bins[i] += amount * max(0.0, within) / (bar.end - bar.begin)
    return bins
