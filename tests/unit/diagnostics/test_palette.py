"""The colours of plots, reports and the dashboard: what they mean, who uses them, and whether they can be told apart."""

from __future__ import annotations

import ast
import itertools
import math
import re
from pathlib import Path

import pytest

import daskinfer
from daskinfer.diagnostics import palette
from daskinfer.diagnostics.palette import DEVICE_COLORS, FAILED_COLOR, OTHERS_COLOR, PHASES, RETRYING_COLOR

DIAGNOSTICS = Path(daskinfer.__file__).parent / "diagnostics"
PICTURES = ("figure.py", "html_report.py", "dashboard/page.py")
MIN_CONTRAST = 3.0  # of graphics on white, by the guidelines of the W3C
MIN_DISTANCE = 10.0  # in CIE L*a*b*; 2.3 is just noticeable
# What people with no red, green or blue receptors see of linear RGB: Machado, Oliveira, Fernandes 2009, severity 1.
VISIONS = {
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deuteranopia": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "tritanopia": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}


def to_linear(color: str) -> list[float]:
    """The light of a colour: red, green and blue."""
    values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]


def to_lab(color: str, vision: str) -> tuple[float, float, float]:
    """A colour in a space in which distances are those that a person sees."""
    linear = to_linear(color)
    r, g, b = (min(1.0, max(0.0, sum(map(math.prod, zip(row, linear, strict=True))))) for row in VISIONS[vision])
    white = ((0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505, 0.2126 * r + 0.7152 * g + 0.0722 * b)
    third = (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (*white, third))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_no_colour_is_in_two_palettes() -> None:
    """Devices have hues, phases greys, and problems a red and an orange that no device has."""
    phases = {phase.color for phase in PHASES}
    assert all(len(set(re.findall("..", color[1:]))) == 1 for color in phases)
    devices, problems = {*DEVICE_COLORS, OTHERS_COLOR}, {FAILED_COLOR, RETRYING_COLOR}
    assert len(devices | phases | problems) == len(DEVICE_COLORS) + 1 + len(PHASES) + 2


@pytest.mark.parametrize("vision", VISIONS)
def test_devices_are_told_apart(vision: str) -> None:
    """With any colour vision, two devices look different, and a device does not look like a problem."""
    colors = {color: to_lab(color, vision) for color in (*DEVICE_COLORS, FAILED_COLOR, RETRYING_COLOR)}
    pairs = set(itertools.combinations(colors, 2)) - {(FAILED_COLOR, RETRYING_COLOR)}
    closest = min(pairs, key=lambda pair: math.dist(colors[pair[0]], colors[pair[1]]))
    assert math.dist(colors[closest[0]], colors[closest[1]]) >= MIN_DISTANCE, closest


@pytest.mark.parametrize("color", [*DEVICE_COLORS, OTHERS_COLOR, FAILED_COLOR])
def test_devices_stand_out_on_white(color: str) -> None:
    """Each has the contrast that graphics need."""
    r, g, b = to_linear(color)
    assert 1.05 / (0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05) >= MIN_CONTRAST


def test_phases_look_different() -> None:
    """In the timeline, no two phases have the same grey and hatch."""
    assert len({(phase.color, phase.hatch) for phase in PHASES}) == len({phase.css for phase in PHASES}) == len(PHASES)


@pytest.mark.parametrize("picture", PICTURES)
def test_all_pictures_use_the_palettes(picture: str) -> None:
    """Plot, page and dashboard take both from the one module, and write down no colour but the grey of grid lines."""
    text = (DIAGNOSTICS / picture).read_text()
    imported = {
        alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith(("palette", "charts", "diagnostics"))
        for alias in node.names
    }
    assert imported & {"palette", "STAGES"}
    assert imported & {"get_device_color", "list_rows"}
    assert set(re.findall(r"#[0-9a-fA-F]{3,6}\b", text.partition("_TABLE_STYLE = ")[0])) <= {"#e5e5e5"}


def test_charts_take_their_colours_from_the_palette() -> None:
    """The phases of the timeline are those of the palette, in the module that plot and page are drawn from."""
    from daskinfer.diagnostics.charts import MARK_STYLES, STAGES

    assert {stage.phase for stage in STAGES} <= set(PHASES)
    assert {style.color for style in MARK_STYLES.values()} <= {FAILED_COLOR, RETRYING_COLOR, palette.INK}
    assert not re.findall(r"#[0-9a-fA-F]{6}", (DIAGNOSTICS / "charts.py").read_text())
