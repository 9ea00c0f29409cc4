"""The page of a run: its content, its safety, and what a real browser makes of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import daskinfer as di
from daskinfer.core.chunks import BatchConfig, ChunkStats, RowFailure
from daskinfer.diagnostics import html_report
from daskinfer.diagnostics.events import ChunkDone, ChunkFailed, PlannedDevice, RunStarted
from daskinfer.diagnostics.html_report import MAX_EXCEPTION_CHARACTERS, MAX_FAILURES
from daskinfer.diagnostics.report import RunAggregator, RunReport
from daskinfer.diagnostics.timeline import MAX_SPANS, Mark
from daskinfer.errors import SourceMissing
from tests.support import browser

SCRIPT = "<script>alert(1)</script>"
IMAGE = '<img src=x onerror="document.title=1">'
MATH = ["$x^$", r"$$\frac{1}{2}$$"]
CHARTS = ("timeline", "throughput", "shares", "tail", "memory")


def made(devices: list[str], n_chunks: int, said: str = "ValueError: 3", label: str = "A100") -> RunReport:
    """The report of chunks of 10 rows, in turns: read for 0.1 s, computed for 0.8, written for 0.1; one row failed."""
    aggregator = RunAggregator()
    planned = tuple(PlannedDevice(device, label, "", 1 / len(devices)) for device in devices)
    aggregator(
        RunStarted(
            "a",
            0.0,
            f"Net {said}",
            ("x: (9,) float32",),
            ("y: (9,) float32",),
            (0, 10 * n_chunks),
            (),
            BatchConfig(8),
            planned,
        )
    )
    for i in range(n_chunks):
        device, at = devices[i % len(devices)], 1000.0 + i // len(devices)
        stats = ChunkStats(10 * i, 10 * i + 10, device, label, 8, 0.8, "w", began=at + 0.1)
        stats = stats.with_timing(read_began=at, ended=at + 1, read_seconds=0.1, write_seconds=0.1, waited_seconds=0.0)
        stats = ChunkStats(**{**as_dict(stats), "peak_nbytes": (1 + i % len(devices)) << 30})
        failures = (RowFailure(10 * i + 3, 10 * i + 4, device, said),) if i == 1 else ()
        aggregator(ChunkDone("a", at, stats.start, stats.stop, device, stats, failures, 1))
    return aggregator.make_report(seconds=1.0 + n_chunks // len(devices), facts={"versions": said, said: label})


def as_dict(stats: ChunkStats) -> dict[str, Any]:
    """The fields of a chunk's stats."""
    return {name: getattr(stats, name) for name in stats.__dataclass_fields__}


class Words(HTMLParser):
    """The text of a page, and its elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._in_code = "", False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_code = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._in_code = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._in_code else f" {data.strip()}"


def n_charts(page: str) -> int:
    """Count the charts of a page."""
    return page.count('data-root-id="')


def test_the_page_has_it_all() -> None:
    """It has the verdict, totals, the table of devices, five charts, failures and facts."""
    report = made(["cuda:0", "cpu:0"], 11)
    words = Words(report.to_html()).text
    assert n_charts(report.to_html()) == len(CHARTS)
    for said in (report.verdict, report.totals, "Net ValueError: 3", "x: (9,) float32", "cuda:0", "A100", "2.0 GiB"):
        assert said in words
    assert re.search(r"cuda:0\s+A100\s+6\s+60\s+12\s+50.0%\s+\S+\s+55\.0%\s+8\s+1\.0 GiB\s+0", words)
    assert re.search(r"cuda:0\s+0\.60 s\s+0\.00 s\s+0\.00 s\s+0\.00 s\s+4\.80 s\s+0\.60 s\s+0\.00 s", words)
    assert "cpu:0 finished 1.00 s before the last device." in words
    assert "Failed attempts at a chunk: 0." in words
    assert re.search(r"Failed rows: 1\..*13\s+cpu:0\s+ValueError: 3", words, re.DOTALL)


def test_bars_are_as_long_as_what_they_mean() -> None:
    """Every axis is linear, and those of bars begin at 0."""
    charts = html_report._make_charts(made(["cuda:0", "cpu:0"], 11))
    assert set(charts) == set(CHARTS)
    assert {type(scale).__name__ for chart in charts.values() for scale in (chart.x_scale, chart.y_scale)} == {"LinearScale"}
    assert {charts[name].x_range.start for name in ("timeline", "shares", "tail", "memory")} == {0.0}
    assert charts["throughput"].y_range.start == 0.0


def test_the_legend_has_what_is_drawn() -> None:
    """If nothing was written to files, neither the timeline nor its legend has that stage."""

    def stages(write_seconds: float) -> list[str]:
        stats = ChunkStats(0, 8, "cpu:0", "", 8, 0.8, "w", began=1000.1)
        stats = stats.with_timing(
            read_began=1000.0, ended=1001.0, read_seconds=0.1, write_seconds=write_seconds, waited_seconds=0.0
        )
        aggregator = RunAggregator()
        aggregator(ChunkDone("a", 0.0, 0, 8, "cpu:0", stats, (), 1))
        return re.findall(r"</i>(read|compute|write)</span>", aggregator.make_report(seconds=1.0).to_html())

    assert stages(write_seconds=0.1) == ["read", "compute", "write"]
    assert stages(write_seconds=0.0) == ["read", "compute"]


def test_failed_attempts_are_on_the_page() -> None:
    """Retries are counted, by device and in all; failures of several rows are a range."""
    aggregator = RunAggregator()
    aggregator(ChunkFailed("a", 0.0, 0, 8, "cpu:0", "OSError: 5"))
    aggregator(
        ChunkDone("a", 0.0, 0, 8, "cpu:0", ChunkStats(0, 8, "cpu:0", "", 0, 0.0, "w"), (RowFailure(0, 8, "cpu:0", "e"),), 2)
    )
    words = Words(aggregator.make_report(seconds=1.0).to_html()).text
    assert "Failed attempts at a chunk: 1." in words
    assert re.search(r"0 to 7\s+cpu:0\s+e", words)


@pytest.mark.parametrize(
    ("report", "charts"),
    [
        (RunReport(0, 0.0, 8, ()), ()),
        (made(["cpu:0", "cpu:1"], 0), ()),
        (made(["inline"], 1), ("timeline", "throughput", "memory")),
        (made([f"cuda:{i}" for i in range(16)], MAX_SPANS), ("timeline", "throughput", "shares", "memory")),
        (made([f"cuda:{i}" for i in range(100)], 150), CHARTS),
    ],
    ids=["empty", "nothing done", "one chunk", "4,000 spans", "100 devices"],
)
def test_every_report_has_a_page(report: RunReport, charts: tuple[str, ...]) -> None:
    """A page has the charts that have something to show, and no more bytes than they need."""
    page = report.to_html()
    assert n_charts(page) == len(charts)
    assert ("there is no timeline" in page) == ("timeline" not in charts)
    assert len(page) < (2_500_000 if charts else 5_000)


def test_the_page_needs_nothing_beside_itself() -> None:
    """No element loads anything, and the page's policy forbids it."""
    elements = Words(made(["cpu:0"], 3).to_html()).elements
    assert not [tag for tag, given in elements if {"src", "href", "srcset", "action", "data"} & set(given)]
    (policy,) = (given["content"] for tag, given in elements if given.get("http-equiv") == "Content-Security-Policy")
    assert (policy or "").startswith("default-src 'none'")


@pytest.mark.parametrize("evil", [SCRIPT, IMAGE, "</script><script>alert(1)</script>", "'\"--><svg onload=alert(1)>"])
def test_names_and_messages_are_no_code(evil: str) -> None:
    """Device, label, model, exception and facts are plain text everywhere, on the page and in a notebook."""
    report = made([evil, "cpu:0"], 5, said=evil, label=evil)
    plain = Words(made(["a", "cpu:0"], 5).to_html())
    words = Words(report.to_html())
    assert evil not in report.to_html() + report._repr_html_()
    assert [tag for tag, _ in words.elements] == [tag for tag, _ in plain.elements]
    assert words.text.count(evil) >= 6


def test_failures_on_the_page_are_bounded() -> None:
    """The first are shown, with long messages shortened, and a sentence tells how many more there are."""
    failures = tuple(RowFailure(i, i + 1, "cpu:0", "e" * (MAX_EXCEPTION_CHARACTERS + i)) for i in range(MAX_FAILURES + 2))
    page = RunReport(0, 1.0, 8, (), failures=failures, failed_rows=tuple(range(MAX_FAILURES + 2))).to_html()
    assert page.count("<td>cpu:0</td>") == MAX_FAILURES
    assert f"<td>{'e' * MAX_EXCEPTION_CHARACTERS}</td>" in page
    assert f"{'e' * MAX_EXCEPTION_CHARACTERS}…</td>" in page
    assert "e" * (MAX_EXCEPTION_CHARACTERS + 1) not in page
    assert "Not shown: 2 more;" in page


def test_the_page_is_written_wholly(tmp_path: Path) -> None:
    """The file has what is returned, in place of its old content; there is no other file."""
    file = tmp_path / "out.html"
    file.write_text("old")
    report = made(["cpu:0"], 2, said="größer")
    page = report.to_html(file)
    assert file.read_text("utf-8") == page
    assert report.to_html(str(file)).startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [file]


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    """A missing folder is an error; a file that cannot be replaced leaves no other file behind."""
    report = RunReport(0, 0.0, 8, ())
    with pytest.raises(SourceMissing, match=r"the folder of the report, '.*gone', does not exist. Create it first"):
        report.to_html(tmp_path / "gone" / "out.html")
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError, match="taken"):
        report.to_html(tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# --- in a browser

needs_browser = pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium is installed here")
# Elements by name, those in the shadow trees of bokeh's models included.
_ALL = """
((wanted) => {
  const found = node => [...node.querySelectorAll("*")].flatMap(
    one => [...(one.localName === wanted ? [one] : []), ...(one.shadowRoot ? found(one.shadowRoot) : [])]);
  return found(document);
})
"""


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Any]:
    """Show a report in a real browser; the tab is closed with the test."""
    with contextlib.ExitStack() as stack:

        def show(report: RunReport) -> browser.Tab:
            report.to_html(tmp_path / "out.html")
            tab = stack.enter_context(browser.open_tab((tmp_path / "out.html").as_uri()))
            tab.wait_for(lambda: tab.evaluate("document.readyState === 'complete'"))
            return tab

        yield show


def n_drawn(tab: browser.Tab) -> int:
    """Count the canvases that show a chart."""
    return int(tab.evaluate(f"{_ALL}('canvas').filter(c => c.width * c.height > 1000).length"))


@needs_browser
def test_a_real_run_in_a_real_browser(two_cpus: list[str], in_folder: Path, shown: Any) -> None:
    """The page of a run with failures draws its charts offline, fetches nothing and logs no errors."""
    x = np.arange(4000, dtype=np.float32).reshape(2000, 2)
    x[[17, 1500]] = np.nan
    np.save("x.npy", x)

    def net(rows: Any) -> Any:
        if np.isnan(rows).any():
            raise ValueError(f"no number {SCRIPT}")
        return rows * 2

    how = {"devices": two_cpus, "on_error": "skip", "batch_size": 50, "pad": False}
    report = di.run(di.Model(net, version="1"), "x.npy", "y.zarr", **how)
    tab = shown(report)
    # Chromium draws a chart on two canvases or more.
    tab.wait_for(lambda: n_drawn(tab) >= n_charts(report.to_html()))
    assert n_charts(report.to_html()) >= 4
    for said in (report.verdict, "1,998 rows", "Failed rows: 2.", f"no number {SCRIPT}", "model fingerprint"):
        assert said in tab.text
    assert tab.evaluate("performance.getEntriesByType('resource').length") == 0
    for width in (800, 1100, 1600):  # no table is wider than the page
        tab.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        tab.wait_for(lambda width=width: tab.evaluate("window.innerWidth") == width)
        assert tab.evaluate("[...document.querySelectorAll('.wide')].every(one => one.scrollWidth <= one.clientWidth)")
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert tab.errors == []


def hover_until(tab: browser.Tab, text: str) -> bool:
    """Move the mouse over the first chart until a text is shown."""
    left, top, width, height = tab.evaluate(
        f"(() => {{ const r = {_ALL}('canvas')[0].getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; }})()"
    )
    places = [(left + width * x / 40, top + height * y / 20) for x in (24, *range(40)) for y in range(20)]
    for x, y in places:
        tab.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if text in tab.text:
            return True
    return False


@needs_browser
def test_what_hovers_is_text(shown: Any) -> None:
    """Under the mouse, a bar and a mark show their device and what they are; what looks like HTML is text there too."""
    tab = shown(replace(made([IMAGE], 1), marks=(Mark(IMAGE, 1000.5, "worker died", SCRIPT),)))
    tab.wait_for(lambda: n_drawn(tab) >= 3)
    assert hover_until(tab, "0.800 s")
    assert f"device : {IMAGE}" in tab.text.replace("device: ", "device : ")
    assert "10 of 0:10" in tab.text
    assert hover_until(tab, SCRIPT)
    assert tab.evaluate(f"{_ALL}('img').length") == 0
    assert tab.evaluate("document.title").startswith("daskinfer: Net")
    assert tab.errors == []
