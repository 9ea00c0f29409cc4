"""``python -m tests.support.draw_pictures [NAME ...]``: make the pictures of README and guides from what runs now.

``demo`` is the screen of ``daskinfer demo`` at 80 columns, ``timeline`` what ``report.plot()`` draws of a run on two CPU
workers, ``dashboard`` the page ``/daskinfer`` during such a run, in a browser. Each carries its figures (``pictures``).
``python -m tests.benchmarks --plot`` draws ``benchmarks``. Run this alone on the machine, since it shows speeds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import daskinfer as di
from daskinfer.demo import digits
from daskinfer.demo.show import WEIGHTS
from daskinfer.diagnostics.events import ChunkDone, Event
from tests.support import browser
from tests.support.pictures import ROOT, stamp_picture

FOLDER = ROOT / "notebooks/pictures"
COLUMNS = 80
N_IMAGES = 1_500_000  # for some seconds on two cores
SHOWN_SHARE = 0.5  # of the rows are done when the page is photographed
INK, ACCENT, PAPER = "#e6edf3", "#ff9e3d", "#0d1117"
_BLOCK = "█"
_FONT_SIZE, _LINE_INCHES = 11, 0.20
_COLUMN_INCHES = 0.602 * _FONT_SIZE / 72  # of DejaVu Sans Mono
_SHOWN_FIELDS = ("rows", "seconds", "batch_size", "rows_per_second", "start_seconds", "verdict")


def draw_demo(path: Path) -> None:
    """Run the demo in a folder of its own, and draw what it prints as a terminal shows it."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "daskinfer.cli", "demo"],
            cwd=folder,
            env=os.environ | {"COLUMNS": str(COLUMNS), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
    draw_screen(path, ["$ daskinfer demo", *done.stdout.splitlines()])


def draw_screen(path: Path, lines: list[str]) -> None:
    """Draw lines of text in one width, light on dark, with bars in place of full blocks; daskinfer's own stand out."""
    width, height = COLUMNS + 4, len(lines) + 2  # in characters
    figure = Figure(figsize=(width * _COLUMN_INCHES, height * _LINE_INCHES), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), frame_on=False, xticks=[], yticks=[])
    for number, line in enumerate(lines, 1):
        color = ACCENT if line.startswith("daskinfer ") and _BLOCK in line else INK
        for bar in re.finditer(f"{_BLOCK}+", line):
            axes.add_patch(Rectangle((2 + bar.start(), number + 0.15), len(bar[0]), 0.7, color=color))
        text = line.replace(_BLOCK, " ").replace("$", r"\$")
        axes.text(2, number + 0.75, text, family="DejaVu Sans Mono", size=_FONT_SIZE, color=color, va="baseline")
    figure.savefig(path, dpi=150, facecolor=PAPER)
    stamp_picture(path, script=__file__, figures={"screen": lines})


def draw_timeline(path: Path) -> None:
    """Classify the demo's images from Zarr to Zarr on two workers that run already, and plot the report."""
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images.zarr")
        digits.write(images, N_IMAGES // 5, seed=1)
        for name in ("warm.zarr", "scores.zarr"):
            report = di.run(_make_model(), images, Path(folder, name), devices="cpu*2", progress=False)
    di.close()
    report.plot().savefig(path, dpi=110)
    stamp_picture(path, script=__file__, figures=_select_figures(report))


def draw_dashboard(path: Path) -> None:
    """Photograph the page in the middle of a run."""
    images = np.resize(digits.load()[0][digits.HELD_OUT, None], (N_IMAGES, 1, 8, 8))
    n_done, is_half_done = 0, threading.Event()

    def count(event: Event) -> None:
        nonlocal n_done
        if isinstance(event, ChunkDone):
            n_done += event.stop - event.start
            if n_done >= SHOWN_SHARE * N_IMAGES:
                is_half_done.set()

    with di.LocalDeviceCluster("cpu*2") as cluster, cluster.get_client() as client, ThreadPoolExecutor(1) as pool:
        url = cluster.dashboard_link.replace("/status", "/daskinfer")
        with browser.open_tab(url) as tab:
            tab.wait_for(lambda: "No run yet" in tab.text)
            running = pool.submit(di.predict, _make_model(), images, client=client, progress=count, return_report=True)
            tab.wait_for(lambda: is_half_done.is_set() or running.done(), 120.0)
            tab.save_picture(path)
            _, report = running.result()
    stamp_picture(path, script=__file__, figures=_select_figures(report))


def _make_model() -> di.Model:
    return di.Model(os.fspath(WEIGHTS), factory="daskinfer.demo.net:make_model")


def _select_figures(report: di.RunReport) -> dict[str, Any]:
    """Return the figures of a report that are not about this machine's paths and names."""
    found = report.to_dict()
    devices = [{"device": device.device, "rows": device.n_rows, "seconds": device.seconds} for device in report.devices]
    return {name: found[name] for name in _SHOWN_FIELDS} | {"devices": devices}


PICTURES = {"demo": draw_demo, "timeline": draw_timeline, "dashboard": draw_dashboard}


def main(names: list[str]) -> None:
    """Make these pictures, or all."""
    for name in names or PICTURES:
        PICTURES[name](FOLDER / f"{name}.png")
        print(f"made {FOLDER / name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
