"""Draw the README's picture of the demo from a real one: ``python -m tests.support.demo_picture``."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from tests.support.pictures import ROOT, stamp_picture

PICTURE = ROOT / "notebooks/pictures/demo.png"
COLUMNS = 80
_COMMAND = "daskinfer demo"
_PAPER, _TEXT, _PROMPT = "#1e1e1e", "#d4d4d4", "#6a9955"
_FONT_SIZE, _LINE_HEIGHT, _MARGIN = 22, 29, 24  # pixels; twice those of a screen, so that it is sharp on every one


def run_demo() -> list[str]:
    """Run the demo in a terminal of 80 columns and return the lines of its screen."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "daskinfer.cli.main", "demo"],
            cwd=folder,
            env=os.environ | {"COLUMNS": str(COLUMNS), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return done.stdout.splitlines()


def draw_terminal(path: Path, lines: Sequence[str]) -> None:
    """Draw lines of text as a terminal shows them, below the command that wrote them."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSansMono.ttf"), _FONT_SIZE)
    width = round(font.getlength("x" * COLUMNS)) + 2 * _MARGIN
    sheet = Image.new("RGB", (width, _LINE_HEIGHT * (len(lines) + 1) + 2 * _MARGIN), _PAPER)
    canvas = ImageDraw.Draw(sheet)
    for i, (line, color) in enumerate([(f"$ {_COMMAND}", _PROMPT), *((line, _TEXT) for line in lines)]):
        canvas.text((_MARGIN, _MARGIN + i * _LINE_HEIGHT), line, fill=color, font=font)
    sheet.quantize(32).save(path)


if __name__ == "__main__":
    screen = run_demo()
    draw_terminal(PICTURE, screen)
    stamp_picture(PICTURE, script=__file__, figures=screen)
