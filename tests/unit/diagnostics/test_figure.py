"""The figure of a run."""

from __future__ import annotations

import sys

import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.collections import PolyCollection

from daskinfer.diagnostics.report import RunReport
from daskinfer.errors import MissingExtra
from tests.unit.diagnostics.test_html_report import MATH, SCRIPT, made


def test_the_figure_shows_the_run() -> None:
    """It has timeline, throughput, shares and memory, with every device, and the verdict above them."""
    report = made(["cuda:0", "cpu:0"], 10)
    figure = report.plot()
    timeline, throughput, shares, memory = figure.axes
    assert report.verdict in figure.get_suptitle()
    assert {scale for axes in figure.axes for scale in (axes.get_xscale(), axes.get_yscale())} == {"linear"}
    for axes in (timeline, shares, memory):
        assert [label.get_text() for label in axes.get_yticklabels()] == ["cuda:0", "cpu:0"]
    bars = [found for found in timeline.collections if isinstance(found, PolyCollection)]
    assert sum(len(found.get_paths()) for found in bars) == 10 * 3
    assert [label.get_text() for label in throughput.get_legend().get_texts()] == ["cuda:0", "cpu:0"]
    assert len(shares.patches) == 2 * 3
    assert [bar.get_width() for bar in memory.patches] == [1.0, 2.0]
    assert memory.get_xlabel() == "GiB"


@pytest.mark.parametrize(
    "report",
    [
        RunReport(0, 0.0, 8, ()),
        made(["cpu:0", "cpu:1"], 0),
        made(["inline"], 1),
        made([f"cuda:{i}" for i in range(20)], 200),
        made([SCRIPT, *MATH, "MIG-0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f"], 10),
    ],
    ids=["empty", "nothing done", "one chunk", "20 devices", "names that are formulas"],
)
def test_every_report_has_a_figure(report: RunReport) -> None:
    """Notebooks show it without pyplot, whatever is in it, and pyplot's list of open figures stays empty."""
    assert report.plot()._repr_png_().startswith(b"\x89PNG")
    assert not Gcf.figs


def test_the_figure_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib, the error tells what to install."""
    monkeypatch.delitem(sys.modules, "daskinfer.diagnostics.figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r'needs matplotlib.*pip install .*\[plot\]"; or use to_html\(\)'):
        RunReport(0, 0.0, 8, ()).plot()
