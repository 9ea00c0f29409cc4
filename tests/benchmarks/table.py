"""The table of all peers on both full works, as Markdown and as a plot."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click

from tests.benchmarks.session import Race

_HEADERS = {"cnn": "CNN, {n:,} images", "mlp": "MLP, {n:,} rows"}


def rows(races: dict[str, Race]) -> list[tuple[str, list[float | None]]]:
    """Each peer and its seconds per work, None where it has none; the fastest on the first work first."""
    of_works = [races[work] for work in _HEADERS if work in races]
    peers = dict.fromkeys(peer for race in of_works for peer in race.starts)
    found = [(peer, [_seconds(race, peer) for race in of_works]) for peer in peers]
    return sorted(found, key=lambda row: [second or float("inf") for second in row[1]])


def headers(races: dict[str, Race]) -> list[str]:
    """The works' titles, with their true numbers of rows."""
    return [text.format(n=races[w].session.work(w).n_rows) for w, text in _HEADERS.items() if w in races]


def _seconds(race: Race, peer: str) -> float | None:
    return race.seconds(peer) if peer in race.starts and peer not in race.lost else None


def caption(machine: dict[str, Any], versions: dict[str, str]) -> str:
    """Where and when."""
    tools = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"Seconds, warm, median of fresh starts; {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {machine['system']}, {machine['date']}; {tools}."
    )


def markdown(races: dict[str, Race], line: str) -> str:
    """The table for the README."""
    titles = headers(races)
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'---:|' * len(titles)}"]
    for peer, seconds in rows(races):
        name = f"**{peer}**" if peer.startswith("daskinfer") else peer
        lines.append(f"| {name} | {' | '.join('–' if s is None else f'{s:.2f} s' for s in seconds)} |")  # noqa: RUF001
    return "\n".join([*lines, "", line])


def check_plotting() -> None:
    """Refuse where plots cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("--plot needs matplotlib, which is not installed. Run: pip install '.[bench]'.")


def plot(races: dict[str, Race], line: str, path: Path) -> None:
    """Horizontal bars, both works side by side; seconds on a logarithmic scale, as they span two decades."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    found, titles = rows(races)[::-1], headers(races)
    figure = Figure(figsize=(5.5 * len(titles), 0.4 * len(found) + 1.4), layout="constrained")
    axes = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for index, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        _bars(axis, [(peer, seconds[index]) for peer, seconds in found])
        axis.set(title=title, xlabel="seconds, less is better", xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    figure.supxlabel(line, fontsize=6, wrap=True)
    figure.savefig(path, dpi=150)


def _bars(axis: Any, found: list[tuple[str, float | None]]) -> None:
    peers = [peer for peer, _ in found]
    colours = ["tab:orange" if peer.startswith("daskinfer") else "tab:gray" for peer in peers]
    bars = axis.barh(peers, [seconds or 0.0 for _, seconds in found], color=colours)
    axis.bar_label(bars, ["" if seconds is None else f"{seconds:.2f}" for _, seconds in found], padding=3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.15)
