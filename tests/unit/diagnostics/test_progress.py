"""The progress of a run, as it is shown."""

from __future__ import annotations

import io
import logging
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from rich.console import Console

import daskinfer as di
from daskinfer.core.chunks import BatchConfig, ChunkStats, RowFailure
from daskinfer.diagnostics import progress, terminal
from daskinfer.diagnostics.events import (
    ChunkDone,
    ChunkFailed,
    ChunkStarted,
    Connected,
    DeviceChanged,
    Event,
    PlannedDevice,
    RunEnded,
    RunStarted,
)
from daskinfer.diagnostics.progress import DisplayListener, make_event_bus, make_line_listener
from daskinfer.diagnostics.status import Status, StatusTracker, format_progress, format_status
from daskinfer.diagnostics.terminal import FREE_COLUMNS, render_statuses
from daskinfer.errors import OptionError
from tests.conftest import wait_until
from tests.support.terminal import Terminal

X = np.arange(400.0, dtype=np.float32)
SCRIPT = """
import time
import numpy as np
import daskinfer as di

def slow(rows):
    time.sleep(0.1)
    return rows

def call(**how):
    di.predict(slow, np.ones((400, 3), np.float32), batch_size=10, **how)
"""


def double(rows: Any) -> Any:
    """Twice the rows, after a while."""
    time.sleep(0.02)
    return 2 * rows


def events(run: str = "a", error: str = "") -> list[Event]:
    """A run of 100 rows, of which one failed, on two devices."""
    devices = (PlannedDevice("cuda:0", "<L4>", "cuda", 0.8), PlannedDevice("cpu:0", "EPYC", "cpu", 0.2))
    stats = ChunkStats(0, 50, "cuda:0", "<L4>", 8, 1.0, "w", began=11.0)
    return [
        RunStarted(run, 10.0, "Net", ("x",), ("y",), (0, 100), (), BatchConfig(8), devices),
        ChunkStarted(run, 11.0, 0, 50, "cuda:0"),
        ChunkStarted(run, 11.0, 50, 100, "cpu:0"),
        ChunkFailed(run, 11.5, 50, 100, "cpu:0", "ValueError: no"),
        DeviceChanged(run, 11.5, "cpu:0", "gone"),
        ChunkDone(run, 13.0, 0, 50, "cuda:0", stats, (RowFailure(3, 4, "cuda:0", "ValueError: 3"),), 1),
        RunEnded(run, 15.0, error),
    ]


def status(n_events: int, error: str = "") -> Status:
    """The status of that run after so many events."""
    tracker = StatusTracker()
    for event in events(error=error)[:n_events]:
        tracker(event)
    return tracker.get_status(13.0)


@pytest.mark.parametrize(
    ("n_events", "line"),
    [
        (1, "Net: starting workers"),
        (3, "Net: 0%, 0 of 100 rows, 0 rows/s"),
        (6, "Net: 50%, 50 of 100 rows, 25 rows/s, 0:02 left, 1 failed, 1 retried, cuda:0 25 rows/s 100%"),
        (7, "Net: 50%, 50 of 100 rows, stopped after 0:04, 12 rows/s, 1 failed, 1 retried, no, cuda:0 12 rows/s 100%"),
    ],
)
def test_a_run_in_one_line(n_events: int, line: str) -> None:
    """A line tells how far a run is, how fast, how long it still takes, and what went wrong."""
    assert format_status(status(n_events, error="no")) == line


def test_nothing_computed_in_one_line() -> None:
    """The line of a run that ends before its first chunk tells so."""
    tracker = StatusTracker()
    tracker(events()[0])
    tracker(RunEnded("a", 11.0, "ModelError: no"))
    assert format_status(tracker.get_status(12.0)) == "Net: 0%, 0 of 100 rows, nothing computed, ModelError: no"


def render(shown: Status, columns: int) -> list[str]:
    """What a terminal of so many columns shows of a run."""
    console = Console(file=io.StringIO(), width=columns, color_system="truecolor", force_terminal=True)
    console.print(render_statuses([shown], columns))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    return [line.rstrip() for line in text.splitlines()]


def test_a_terminal_has_a_line_per_device_and_one_for_all() -> None:
    """Each device has its throughput, batch size and shares; the total has a bar and the time left."""
    lines = [re.sub(r" +", " ", line).strip() for line in render(status(6), 120)]
    assert lines[0] == "device name rows rows/s batch size requested done in flight"
    assert lines[1] == "cuda:0 <L4> 50 25 8 80% 100% 0 1 failed"
    assert lines[2] == "cpu:0 EPYC 0 0 20% 0% 0 lost, 1 retried"
    assert re.fullmatch(r"Net [━╸╺ ]+ 50%, 50 of 100 rows, 25 rows/s, 0:02 left, 1 failed, 1 retried", lines[3])


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120, 200])
def test_a_terminal_of_any_width(columns: int) -> None:
    """No line reaches the last columns, where ^C is written; the bar takes what is left, and no word is cut."""
    for n_events in (1, 3, 6, 7):
        shown = status(n_events)
        lines = render(shown, columns)
        assert max(map(len, lines)) <= columns - FREE_COLUMNS
        if columns >= 60:
            (bar,) = [line for line in lines if "━" in line]
            assert len(bar) == columns - FREE_COLUMNS
            words = " ".join(lines).split()
            assert set(", ".join(format_progress(shown)).split()) <= set(words)


def test_what_is_left_of_a_run_in_a_terminal() -> None:
    """At its end there is a line for all of it, without a table: the report, or the error, comes next."""
    for error in ("", "Interrupted: no"):
        (line,) = render(status(7, error), 100)
        assert re.fullmatch(r"Net [━╸╺ ]+ 50%, .* (done|stopped) after 0:04, 12 rows/s, 1 failed, 1 retried", line)


def test_the_link_to_the_dashboard_while_the_run_goes_on() -> None:
    """A terminal shows the page's URL and a notebook a link, but only to web pages; a finished run has neither."""

    def shown(address: str, *others: Event) -> tuple[str, str]:
        tracker = StatusTracker()
        for event in [*events()[:3], Connected("a", 11.0, address), *others]:
            tracker(event)
        now = tracker.get_status(13.0)
        return "\n".join(render(now, 60)), progress._render_html(now)

    address = "http://127.0.0.1:8787/daskinfer?a&b"
    terminal, notebook = shown(address)
    assert f"dashboard: {address}" in terminal.splitlines()[-1]
    assert '<a href="http://127.0.0.1:8787/daskinfer?a&amp;b" target="_blank">dashboard</a>' in notebook
    for none in (shown(""), shown(address, events()[-1])):
        assert "dashboard" not in "".join(none)
    assert "<a" not in shown("javascript:alert(1)")[1]


def test_a_notebook_has_the_same_escaped() -> None:
    """The table of a cell has the same content, and names are text."""
    page = progress._render_html(status(6))
    assert "&lt;L4&gt;" in page
    assert "<L4>" not in page
    assert '<progress max="1" value="0.5"' in page
    assert "0:02 left" in page


@pytest.mark.parametrize("wrong", ["yes", 1.5, []])
def test_what_progress_may_be(wrong: Any) -> None:
    """Anything but a bool, None or a function is refused before anything starts."""
    with pytest.raises(OptionError, match=r"progress must be True, False, None \(.*\) or a function of events, got .+"):
        di.predict(double, X, devices="inline", progress=wrong)


@pytest.mark.parametrize(("progress", "n_lines"), [(None, 0), (False, 0), (True, 1)])
def test_without_a_terminal(capsys: pytest.CaptureFixture[str], progress: bool | None, n_lines: int) -> None:
    """Without a terminal, nothing is shown unless requested, and then as lines on stderr."""
    di.predict(double, X, devices="inline", batch_size=100, progress=progress)
    found = capsys.readouterr()
    assert found.out == ""
    assert len(found.err.splitlines()) == n_lines
    assert not n_lines or found.err.startswith("daskinfer: double: 100%, 400 of 400 rows, done after 0:00")


def test_without_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has no stderr (a service, pythonw) shows nothing and computes."""
    monkeypatch.setattr(sys, "stderr", None)
    assert di.predict(double, X, devices="inline").shape == (400,)


def test_lines_come_at_intervals() -> None:
    """A line is written at intervals, and one at the end."""
    found: list[Status] = []
    listener = make_line_listener(found.append, interval=0.01)
    listener(events()[0])
    wait_until(lambda: len(found) > 2)
    for event in events()[1:]:
        listener(event)
    assert (found[0].ended, found[-1].ended) == (False, True)


def test_a_display_that_fails_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A display that fails is disabled with one warning."""

    def fails(status: Status) -> None:
        raise OSError("no space")

    with caplog.at_level(logging.WARNING, "daskinfer"):
        listener = make_line_listener(fails, interval=0.01)
        for event in events():
            listener(event)
    assert [record.getMessage() for record in caplog.records] == [
        "the progress display failed and was disabled: OSError: no space"
    ]


def test_a_call_that_is_over_at_once_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal is left alone by calls of half a second."""
    shown: list[object] = []
    monkeypatch.setattr(progress, "_is_in_notebook", lambda: False)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(progress.terminal_display, "show", lambda *shown_status: shown.append(shown_status))
    bus = make_event_bus(None)
    for event in events():
        bus(event)
    assert not shown


def in_a_terminal(code: str) -> str:
    """The output of a script in a terminal of 120 columns, without control sequences."""
    with Terminal(SCRIPT + code, 120) as shown:
        return shown.read_all()


@pytest.mark.slow
def test_a_bar_in_a_real_terminal() -> None:
    """The bar moves while the run goes on, and ends at all rows; warnings stand above it."""
    shown = in_a_terminal("import warnings, sys\ncall(devices='inline')")
    shares = [int(share) for share in re.findall(r"(\d+)%, [\d,]+ of 400 rows", shown)]
    assert len(set(shares)) > 2
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert "this process" in shown
    assert "400 of 400 rows, done after" in shown


INTERRUPTED = """
import logging
from daskinfer.cli.logging import configure_logging
from daskinfer.diagnostics import progress

configure_logging()
progress.DRAW_SECONDS, progress.INITIAL_DELAY_SECONDS = 0.1, 0.0
for columns in sys.stdin:
    print("columns", columns.strip())
    try:
        call(devices="inline")
    except KeyboardInterrupt as error:
        logging.getLogger("daskinfer").warning("%s", error)
    print("over")
"""


def test_ctrl_c_in_a_real_terminal() -> None:
    """At any width, nothing of the table or a bar is left above what the command says after Ctrl-C."""
    with Terminal(f"import sys{SCRIPT}{INTERRUPTED}") as shown:
        for columns in (60, 80, 200):
            shown.resize(columns)
            shown.type(f"{columns}\n")
            running = shown.read_until(lambda screen: any("rows/s, 0:" in line for line in screen.lines))
            assert [line.split()[0] for line in running.lines if "device" in line] == ["device"]
            shown.type("\x03")
            lines = shown.read_until(lambda screen: "over" in screen.lines).lines
            _, first, *said, last = filter(None, lines)  # the end of the line before may come late
            assert (first, last) == (f"columns {columns}", "over")
            text = " ".join(said)
            assert re.match(r"([-\d]+ [:\d]+ )?daskinfer.execution.signals: SIGINT received", text)
            assert not [word for word in ("device", "this process", "left", "^C") if word in text]
            assert text.count("slow ━") == text.count("stopped after") == 1


@pytest.mark.slow
def test_two_runs_in_one_terminal() -> None:
    """Two concurrent calls are stacked, and each has its end."""
    shown = in_a_terminal(
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(2) as pool:\n"
        "    for call in [pool.submit(call, devices='inline'), pool.submit(call, devices='inline')]:\n"
        "        call.result()\n"
    )
    assert shown.count("400 of 400 rows, done after") >= 2


def test_one_of_two_runs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run stays above the running ones, and the terminal is released at the end of the last."""
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    screen = terminal.TerminalDisplay()
    live = terminal.make_live()
    live.console = console
    monkeypatch.setattr(terminal, "make_live", lambda: live)
    screen.show("first", status(6))
    screen.show("second", status(3))
    screen.end("first", status(7))
    screen.end("second", status(7))
    assert screen._live is None
    assert console.file.getvalue().count("done after") >= 2  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_table_in_a_real_notebook(tmp_path: Path) -> None:
    """A cell has one output, the last of many; there is nothing on stderr."""
    notebook = nbformat.v4.new_notebook(  # type: ignore[no-untyped-call]
        cells=[nbformat.v4.new_code_cell(SCRIPT + "call(devices='inline')")]  # type: ignore[no-untyped-call]
    )
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    (output,) = notebook.cells[0].outputs
    assert all("400 of 400 rows, done after" in output["data"][kind] for kind in ("text/html", "text/plain"))


def test_a_cell_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook's kernel a run has one output, which is updated."""
    import IPython
    from IPython import display

    shown: list[str] = []
    handle = SimpleNamespace(update=lambda page, raw: shown.append(f"again {page['text/html']}"))
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr(display, "display", lambda page, raw, display_id: shown.append(page["text/html"]) or handle)
    bus = make_event_bus(True)
    bus(events()[0])
    wait_until(lambda: shown)
    for event in events()[1:]:
        bus(event)
    assert shown[0].startswith("<div>")
    assert shown[-1].startswith("again <div>")
    assert "100 rows" in shown[-1]


def test_runs_at_a_time_have_their_own_lines() -> None:
    """Listeners of two runs add up their own events."""
    found: dict[str, list[Status]] = {"a": [], "b": []}
    listeners = {run: make_line_listener(found[run].append, interval=60) for run in found}
    with ThreadPoolExecutor(2) as pool:
        for run in found:
            pool.submit(lambda run: [listeners[run](event) for event in events(run)], run)
    assert [(run, [one.run for one in seen]) for run, seen in found.items()] == [("a", ["a"]), ("b", ["b"])]


def test_an_end_without_a_start() -> None:
    """A listener that was added after the start has nothing to end."""
    DisplayListener(progress.terminal_display, 1.0, 1.0)(RunEnded("a", 1.0, ""))
