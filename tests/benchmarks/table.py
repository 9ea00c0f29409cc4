"""The table of all peers on both full works, as Markdown and as a picture."""

from __future__ import annotations

import importlib.util
import textwrap
from pathlib import Path
from typing import Any

import click

from tests.benchmarks.session import Race

MAX_RATIO = 2.5  # of the longest bar to the next one, from which on it is cut; arbitrary
_OURS, _OTHERS = "tab:orange", "silver"
_CAPTION_WIDTH = 170  # characters at the caption's size below two panels

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
    """The table for the guide on performance."""
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


def make_figures(races: dict[str, Race], line: str) -> dict[str, Any]:
    """Make what the picture shows, as JSON can hold it: the caption, and for each work its title and peers' seconds."""
    found = rows(races)
    works = {title: {peer: seconds[i] for peer, seconds in found} for i, title in enumerate(headers(races))}
    return {"caption": line, "works": works}


def plot(figures: dict[str, Any], path: Path) -> None:
    """Draw bars from zero, a panel for each work with the fastest first; the figures travel in the picture."""
    from matplotlib.figure import Figure

    from tests.support.pictures import stamp_picture

    works = figures["works"]
    n_bars = max(len(peers) for peers in works.values())
    figure = Figure(figsize=(6.2 * len(works), 0.36 * n_bars + 1.3), layout="constrained")
    for axis, (title, peers) in zip(figure.subplots(1, len(works), squeeze=False)[0], works.items(), strict=True):
        _draw_bars(axis, {peer: seconds for peer, seconds in peers.items() if seconds is not None})
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set_xlabel("seconds; shorter is better")
    figure.supxlabel(textwrap.fill(figures["caption"], _CAPTION_WIDTH), fontsize=7, color="tab:gray")
    figure.savefig(path, dpi=150)
    stamp_picture(path, script=__file__, figures=figures)


def _draw_bars(axis: Any, peers: dict[str, float]) -> None:
    """Draw a panel; a bar that would leave no room for the others is cut, and says so."""
    found = sorted(peers.items(), key=lambda item: item[1], reverse=True)
    end = max(seconds for _, seconds in found)
    others = [seconds for _, seconds in found[1:]]
    is_cut = bool(others) and end > MAX_RATIO * max(others)
    limit = 1.25 * max(others) if is_cut else end
    colours = [_OURS if peer.startswith("daskinfer") else _OTHERS for peer, _ in found]
    bars = axis.barh([peer for peer, _ in found], [min(seconds, limit) for _, seconds in found], color=colours)
    labels = [f"{seconds:.2f}" + (" (bar cut)" if is_cut and seconds == end else "") for _, seconds in found]
    axis.bar_label(bars, labels, padding=3)
    for label in axis.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("daskinfer") else "normal")
    if is_cut:
        axis.plot([0.96 * limit, 0.97 * limit], [-0.55, 0.55], color="white", linewidth=4)
    axis.set_xlim(0, (1.45 if is_cut else 1.18) * limit)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
