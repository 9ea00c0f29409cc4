"""The page on Dask's own dashboard: what it counts, what it keeps, and how it looks in a real browser while runs go on."""

from __future__ import annotations

import itertools
import json
import logging
import pickle
import platform
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st

import daskinfer as di
from daskinfer.cluster.worker_spec import WorkerSpec
from daskinfer.core.chunks import ChunkStats, RowFailure
from daskinfer.diagnostics.dashboard import page, plugin, publisher
from daskinfer.diagnostics.dashboard.chunk_map import N_CELLS, UNKNOWN_DEVICE, ChunkMap
from daskinfer.diagnostics.dashboard.publisher import INITIAL_DELAY_SECONDS, MAX_ERRORS, StatusPublisher
from daskinfer.diagnostics.dashboard.state import (
    MAX_DEVICES,
    MAX_POINTS,
    MAX_RUNS,
    OTHERS,
    STEP_SECONDS,
    RunRegistry,
    Snapshot,
    ThroughputHistory,
    limit_devices,
)
from daskinfer.diagnostics.events import ChunkDone, ChunkFailed, ChunkStarted, Event, PlannedDevice, RunEnded, RunStarted
from tests.conftest import wait_until
from tests.support import browser
from tests.support.dask_commands import others

OUTPUT = np.empty(0, np.float32)  # what the networks answer, so that they need not be tried
SENDER = "daskinfer.diagnostics.dashboard.publisher"
Net = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]

in_browser = pytest.mark.skipif(browser.PROGRAM is None, reason="needs a browser: apt-get install chromium")


def receipt(start: int, stop: int, device: str = "cpu:0", began: float = 11.0) -> ChunkStats:
    """What a worker says; ``began`` is 0 for rows that were given up."""
    return ChunkStats(start, stop, device, "EPYC", 4, 1.0, "w", began=began)


def started(start: int, stop: int, device: str = "cpu:0") -> ChunkStarted:
    """The event of a chunk that begins."""
    return ChunkStarted("a", 10.0, start, stop, device)


def came_back(start: int, stop: int, why: str = "ValueError: no") -> ChunkFailed:
    """The event of a chunk that came back."""
    return ChunkFailed("a", 11.0, start, stop, "cpu:0", why)


def done(start: int, stop: int, *failed: int, attempts: int = 1, began: float = 11.0, device: str = "cpu:0") -> ChunkDone:
    """The event of a chunk that is done, but for the rows that failed."""
    failures = tuple(RowFailure(at, at + 1, device, f"ValueError: {at}") for at in failed)
    return ChunkDone("a", 12.0, start, stop, device, receipt(start, stop, device, began), failures, attempts)


def told(*events: Event, run: str = "a", n_rows: int = 100, model: str = "Net", n_devices: int = 2) -> StatusPublisher:
    """A sender that has heard of a run."""
    found = StatusPublisher()
    asked = tuple(PlannedDevice(f"cpu:{i}", "", "cpu", 1 / n_devices) for i in range(n_devices))
    found(RunStarted(run, 9.0, model, ("x",), ("y",), (0, n_rows), (), 8, asked))
    for event in events:
        found(event)
    return found


def shown_on(board: RunRegistry, told: StatusPublisher, now: float = 20.0) -> None:
    """Have a board show what a sender knows."""
    board.update(pickle.loads(pickle.dumps(told.make_snapshot(now).to_message())))


# ---------------------------------------------------------------------------------------------------------- what is counted


def by_hand(counts: np.ndarray[Any, np.dtype[np.bool_]]) -> list[int]:
    """Percent of each cell's rows, counted row by row."""
    n_rows, n_cells = len(counts), min(N_CELLS, len(counts))
    edges = [i * n_rows // n_cells for i in range(n_cells + 1)]
    found = []
    for before, after in itertools.pairwise(edges):
        share = counts[before:after].mean()
        found.append(100 if share == 1 else 0 if share == 0 else min(99, max(1, int(share * 100 + 1e-9))))
    return found


@given(st.data())
def test_cells_are_what_counting_row_by_row_gives(data: st.DataObject) -> None:
    """However a run is cut and whatever becomes of its chunks, each cell tells the share of its rows in each state."""
    n_rows = data.draw(st.integers(1, 3 * N_CELLS))
    cuts = data.draw(st.sets(st.integers(1, n_rows), max_size=12))
    rows = {state: np.zeros(n_rows, bool) for state in ("done", "in_flight", "failed", "again")}
    first = data.draw(st.sampled_from([0, 1000]))  # of a shard
    edges = sorted(cuts | {0, n_rows})
    fates = ["waits", "was done before", "begins", "comes back", "begins again", "done", "given up"]
    parts = [(a, b, data.draw(st.sampled_from(fates))) for a, b in itertools.pairwise(edges)]
    before = [(first + a, first + b) for a, b, fate in parts if fate == "was done before"]
    drawn = ChunkMap((first, first + n_rows), before)
    for a, b, fate in parts:
        here, start, stop = slice(a, b), first + a, first + b
        if fate == "was done before":
            rows["done"][here] = True
        if fate in ("waits", "was done before"):
            continue
        drawn.mark_started(started(start, stop), 1)
        rows["in_flight"][here] = True
        if fate in ("comes back", "begins again", "given up"):
            drawn.mark_failed(came_back(start, stop))
            rows["in_flight"][here], rows["again"][here] = False, True
        if fate == "begins again":
            drawn.mark_started(started(start, stop), 1)
            rows["in_flight"][here] = True
            if data.draw(st.booleans()):
                drawn.mark_done(done(start, stop, attempts=2), 1)
                rows["in_flight"][here], rows["again"][here], rows["done"][here] = False, False, True
        elif fate == "given up":
            drawn.mark_done(done(start, stop, *range(start, stop), began=0.0), 1)
            rows["again"][here], rows["failed"][here] = False, True
        elif fate == "done":
            drawn.mark_done(done(start, stop, start), 1)
            rows["in_flight"][here], rows["done"][here] = False, True
            rows["done"][a], rows["failed"][a] = False, True
    cells = drawn.get_cells()
    assert {state: list(getattr(cells, state)) for state in rows} == {
        state: by_hand(counts) for state, counts in rows.items()
    }
    drawn.mark_ended()
    assert not any(drawn.get_cells().in_flight)


def test_cells_know_who_was_there() -> None:
    """A cell has the number of the last device that was there; those beyond the last number are not told apart."""
    drawn = ChunkMap((0, 4))
    drawn.mark_started(started(0, 1), 0)
    drawn.mark_started(started(1, 2), 3)
    drawn.mark_done(done(1, 2), 2)
    drawn.mark_started(started(2, 3), 1000)
    assert list(drawn.get_cells().device) == [0, 2, UNKNOWN_DEVICE, UNKNOWN_DEVICE]
    assert list(ChunkMap((10, 14), [(10, 12)]).get_cells().device) == [UNKNOWN_DEVICE] * 4
    assert ChunkMap((0, 0)).get_cells().done == b""


def test_a_course_is_halved_when_it_grows_too_long() -> None:
    """Points of time stay boundedly many over any run, evenly spaced, and the latest is always there."""
    course = ThroughputHistory()
    for i in range(20 * MAX_POINTS):
        course.add(i * STEP_SECONDS, (float(i),))
    at = np.array([seconds for seconds, _ in course.points])
    assert MAX_POINTS / 2 - 1 <= len(at) <= MAX_POINTS
    assert np.ptp(np.diff(at[:-1])) == 0
    assert at[-1] == (20 * MAX_POINTS - 1) * STEP_SECONDS


def test_devices_beyond_the_last_colour_are_summed_up() -> None:
    """Of many devices the first are told apart, the others are one."""
    events = [started(i, i + 1, f"cpu:{i}") for i in range(30)] + [done(i, i + 1, device=f"cpu:{i}") for i in range(29)]
    devices = told(*events, n_devices=30).make_snapshot(20.0).status.devices
    assert [device.device for device in devices] == [*(f"cpu:{i}" for i in range(MAX_DEVICES - 1)), OTHERS]
    assert (devices[-1].label, devices[-1].n_rows, devices[-1].n_in_flight) == ("7 devices", 6, 1)
    assert sum(device.asked_share for device in devices) == pytest.approx(1.0)
    assert limit_devices(devices[:2]) == devices[:2]


def test_a_snapshot_crosses_processes_in_plain_values() -> None:
    """What is told of a run is read as it was written, has the last messages, and grows with nothing."""
    many = [came_back(i, i + 1, "E" * 10_000) for i in range(50)]
    snapshot = told(started(0, 50), *many, done(60, 62, 61), model="N" * 10_000, n_rows=10**9).make_snapshot(20.0)
    assert Snapshot.from_message(json.loads(json.dumps(snapshot.to_message(), default=list))).errors == snapshot.errors
    assert Snapshot.from_message(pickle.loads(pickle.dumps(snapshot.to_message()))) == snapshot
    assert len(snapshot.errors) == MAX_ERRORS
    assert (snapshot.errors[-1].start, snapshot.errors[-1].exception) == (61, "ValueError: 61")
    assert len(pickle.dumps(snapshot.to_message())) < 10_000


def test_the_last_runs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A board keeps boundedly many runs, those heard of last, and lists the one that began last first."""
    clock = iter(range(1000))
    monkeypatch.setattr("daskinfer.diagnostics.dashboard.state.time.time", lambda: float(next(clock)))
    board = RunRegistry()
    shown_on(board, told(run="goes on"))
    for i in range(MAX_RUNS + 3):
        shown_on(board, told(run=f"run {i}"))
        shown_on(board, told(started(0, 1), run="goes on"))
    names = [shown.snapshot.status.run for shown in board.runs]
    assert names == [*(f"run {i}" for i in range(MAX_RUNS + 2, 3, -1)), "goes on"]
    assert len(board.runs[-1].throughput.points) == 1  # all was told of one moment


# --------------------------------------------------------------------------------------------------------- what one reads


def seen(board: RunRegistry) -> tuple[page.PageView, str]:
    """What a reader sees, as HTML."""
    view = page.PageView(board)
    view.update()
    return view, view._headline.text + view._device_table.text + view._error_table.text


def test_no_run_yet() -> None:
    """Where nothing was computed yet the page says so."""
    view, text = seen(RunRegistry())
    assert "No run yet" in text
    assert not view._body.visible


def test_a_run_that_goes_on() -> None:
    """Rows, speed, what is left, what is in flight and what came back stand at the top, escaped."""
    board = RunRegistry()
    events = [
        started(0, 10),
        started(10, 20, "cpu:1"),
        done(0, 10, 3),
        came_back(10, 20, "<i>no</i>"),
        started(10, 20, "cpu:1"),
    ]
    shown_on(board, told(*events, model="<b>Net"), now=14.0)
    _, text = seen(board)
    assert "<b>&lt;b&gt;Net</b>" in text
    assert "10%, 10 of 100 rows, 2 rows/s, 0:36 left, 1 failed, 1 tried again, 1 chunk in flight" in text
    assert "&lt;i&gt;no" in text
    assert "<i>" not in text


def test_before_the_first_chunk_and_after_the_end() -> None:
    """Before its first chunk a run's workers start; at its end its speed is that of all of it, and why it ended is there."""
    board = RunRegistry()
    shown_on(board, told())
    assert "0%, 0 of 100 rows, workers start<" in seen(board)[1]
    shown_on(board, told(started(0, 50), done(0, 50), RunEnded("a", 20.0, "ValueError: <no>")))
    view, text = seen(board)
    assert "50%, 50 of 100 rows, ended after 0:10, 5 rows/s, ValueError: &lt;no&gt;" in text
    assert f"Net (failed), {publisher._get_user()}" in view._run_select.options[1][1]
    shown_on(board, told(started(0, 1), done(0, 1), RunEnded("a", 10.0, ""), n_rows=1))
    assert "100%, 1 of 1 rows, done after" in seen(board)[1]
    shown_on(board, told(started(0, 1), replace(done(0, 1), at=11.0), RunEnded("a", 11.0, ""), n_rows=0))
    assert "100%, 1 of 0 rows, done after" in seen(board)[1]


def test_runs_of_one_second() -> None:
    """Runs that begin in the same second with the same network can be told apart in the list, the first first."""
    board = RunRegistry()
    for number in range(3):
        shown_on(board, told(started(0, 50), run=f"run {number}"))
        board._runs[f"run {number}"].first_seen = 100.0 + number / 10
    view, _ = seen(board)
    (_, latest), (run, third), (_, second), (_, first) = view._run_select.options
    assert (latest, run) == ("the latest", "run 2")
    assert (second, third) == (f"{first}, no. 2", f"{first}, no. 3")


def test_a_run_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose process is gone without a word is said to be silent after a while."""
    board = RunRegistry()
    shown_on(board, told(started(0, 10)))
    view, text = seen(board)
    assert "nothing was heard" not in text
    monkeypatch.setattr(page, "SILENT_SECONDS", -1.0)
    view.update()
    assert "nothing was heard of it for a while: its process may hang" in view._headline.text
    assert "(silent), " in view._run_select.options[1][1]


def test_who_computes_has_a_name_as_far_as_the_system_knows_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user and host stand beside each run; a number without a name is left out."""
    assert publisher._get_user().endswith(platform.node())
    publisher._get_user.cache_clear()
    monkeypatch.setattr(publisher.getpass, "getuser", {}.__getitem__)  # as where no such user is known
    assert publisher._get_user() == platform.node()
    publisher._get_user.cache_clear()


def test_one_run_of_several_is_looked_at() -> None:
    """The latest that goes on is shown until another is chosen; a run that is no longer kept gives way to the latest."""
    board = RunRegistry()
    for run in ("first", "second"):
        shown_on(board, told(run=run, model=run))
    view, text = seen(board)
    assert "<b>second</b>" in text
    assert "another run goes on on this cluster" in text
    view._run_select.value = "first"
    assert "<b>first</b>" in view._headline.text
    shown_on(board, told(run="third"))
    view.update()
    assert "2 other runs go on on this cluster" in view._headline.text
    for run in ("second", "third"):
        shown_on(board, told(RunEnded(run, 10.0, ""), run=run))
    view.update()
    assert "on this cluster" not in view._headline.text
    view._run_select.value = ""
    view.update()
    assert "<b>first</b>" in view._headline.text  # those that began after it have ended
    view._run_select.value = "first"
    for i in range(MAX_RUNS):
        shown_on(board, told(run=f"run {i}", model=f"run {i}"))
    view.update()
    assert f"<b>run {MAX_RUNS - 1}</b>" in view._headline.text


def test_devices_that_came_later_have_no_speed_before() -> None:
    """A device that joined a run has its line from then on, and is not mistaken for another."""
    board = RunRegistry()
    shown_on(board, told(started(0, 10), done(0, 10)), now=14.0)
    shown_on(board, told(started(0, 10), done(0, 10), started(10, 20, "inline")), now=15.0)
    lines = seen(board)[0]._throughput_plot._source.data
    assert lines["device"] == ["all", "cpu:0", "cpu:1", "inline"]
    assert [len(line) for line in lines["ys"]] == [2] * 4
    assert len(set(lines["colour"])) == 4


# ------------------------------------------------------------------------------------------------------- what is not shown


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a sender said in the log."""
    return [record.getMessage() for record in caplog.records if record.name == SENDER]


def test_nothing_is_told_of_what_is_computed_here(caplog: pytest.LogCaptureFixture) -> None:
    """A run in this process tells no scheduler anything."""
    with caplog.at_level(logging.DEBUG, SENDER):
        di.predict(abs, np.ones(5), devices="inline")
    assert not said(caplog)


def test_a_short_run_is_not_told(cluster_client: Client, caplog: pytest.LogCaptureFixture) -> None:
    """A run that ends well before anybody could look costs no message, one that fails is shown however short it is."""
    handler = plugin.HANDLER
    with caplog.at_level(logging.INFO, SENDER):
        publisher._registered_clients.discard(cluster_client)
        di.predict(abs, [1.0], client=cluster_client)
        time.sleep(2 * INITIAL_DELAY_SECONDS)  # nothing is what is waited for
        assert not said(caplog)
        with pytest.raises(di.DaskInferError, match="ZeroDivisionError"):
            di.predict(lambda batch: 1 // 0, [1.0], client=cluster_client, output=OUTPUT)
        wait_until(lambda: any(line.startswith("runs are shown at http://127.0.0.1:") for line in said(caplog)))
    wait_until(lambda: cluster_client.run_on_scheduler(lambda dask_scheduler: handler in dask_scheduler.handlers))


def slow(seconds: float, until: Path | None = None) -> Net:
    """A network that takes so long per micro-batch, until a file is there."""

    def slowly(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if until is None or not until.exists():
            time.sleep(seconds)  # stands for a network's work
        return batch

    return slowly


def rows(n_rows: int, per_chunk: int = 4) -> da.Array:
    """So many rows in small chunks."""
    return da.from_array(np.arange(n_rows, dtype=np.float32), chunks=per_chunk)


def test_a_cluster_of_ours_has_the_page_from_its_start() -> None:
    """Whoever opens it before the first run finds it."""
    with di.LocalDeviceCluster("cpu") as cluster:
        dashboard = cluster.dashboard_link.removesuffix("/status")
        assert plots(dashboard)["Individual Daskinfer"] == page.PLOT_PATH
        with urllib.request.urlopen(dashboard + page.PAGE_PATH, timeout=30) as answer:
            assert answer.read().count(b'href="daskinfer"') == 1


def test_preloads_that_are_configured_stay() -> None:
    """A configured preload of the scheduler is not replaced by our page's, which then comes with the first run."""
    start = WorkerSpec(2**30, ".", "127.0.0.1:0", 1.0)
    assert start.scheduler_options()["preload"] == ["daskinfer.diagnostics.dashboard.plugin"]
    assert replace(start, dashboard_address=None).scheduler_options()["preload"] == []
    with dask.config.set({"distributed.scheduler.preload": ["theirs"]}):
        assert start.scheduler_options()["preload"] == ["theirs"]


def test_a_scheduler_without_a_dashboard(caplog: pytest.LogCaptureFixture) -> None:
    """Where there is no dashboard the run goes on as ever, and one DEBUG line says why nothing is shown."""
    how = {"n_workers": 1, "dashboard_address": "127.0.0.1:0", "scheduler_kwargs": {"dashboard": False}}
    with (
        LocalCluster(processes=False, **how) as cluster,
        Client(cluster, set_as_default=False) as client,
        caplog.at_level(logging.DEBUG, SENDER),
    ):
        y = di.predict(slow(0.05), rows(80), client=client, batch_size=4)
        wait_until(lambda: said(caplog))
    np.testing.assert_array_equal(y, np.arange(80))
    assert said(caplog) == ["the dashboard shows this run no more: _NotShownError: the scheduler has no dashboard"]


def test_a_client_that_closes_with_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """What can be told to nobody any more is one DEBUG line."""
    found = told(started(0, 50))
    with (
        caplog.at_level(logging.DEBUG, SENDER),
        LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0") as cluster,
    ):
        with Client(cluster, set_as_default=False) as client:
            found.attach_client(client)
            found.attach_client(client)  # the same again changes nothing
            wait_until(lambda: client in publisher._registered_clients)
        found(RunEnded("a", 13.0, ""))
        wait_until(lambda: len(said(caplog)) == 2)  # where it was shown, and why no more
    assert said(caplog)[1].startswith("the dashboard shows this run no more: ")
    assert client not in publisher._registered_clients


def test_another_version_of_daskinfer_on_the_scheduler(cluster_client: Client) -> None:
    """A message that the scheduler cannot read is answered with why, and is nothing in its log."""
    cluster_client.register_plugin(plugin.DashboardPlugin())
    handler, message = plugin.HANDLER, {"status": {"devices": [], "unheard": 1}}
    answer = cluster_client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.handlers[handler](message=message))
    assert answer.startswith("the scheduler has another version of daskinfer: ")


def test_insides_that_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the page cannot be added to a dashboard of another version, the scheduler says what kept it from that."""
    assert (
        plugin._install_page(None, RunRegistry()) == "AttributeError: 'NoneType' object has no attribute 'http_application'"
    )
    monkeypatch.delitem(sys.modules, "distributed.dashboard.scheduler")
    assert plugin._install_page(None, RunRegistry()) == "the scheduler has no bokeh, or no dashboard"


# --------------------------------------------------------------------------------------------- schedulers of other processes


@pytest.mark.slow
def test_a_scheduler_without_bokeh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where bokeh is not installed nothing is shown: the run goes on as ever, one DEBUG line here, nothing in its log."""
    with others(tmp_path, lacks="bokeh") as (client, log), caplog.at_level(logging.DEBUG, SENDER):
        assert client.run_on_scheduler(find_spec, "bokeh") is None
        n_heard = len(log.read_text())
        y = di.predict(slow(0.05), rows(80), client=client, batch_size=4)
        wait_until(lambda: said(caplog))
        heard = log.read_text()[n_heard:]
    assert not [
        word for word in ("bokeh", "Page", plugin.HANDLER, "Traceback", " - ERROR - ", " - WARNING - ") if word in heard
    ]
    np.testing.assert_array_equal(y, np.arange(80))
    why = "the scheduler has no bokeh, or no dashboard"
    assert said(caplog) == [f"the dashboard shows this run no more: _NotShownError: {why}"]


@pytest.mark.slow
@in_browser
def test_the_page_of_a_scheduler_behind_a_proxy(tmp_path: Path) -> None:
    """On a cluster that others started the page comes with the first run, below the prefix that its dashboard has."""
    with others(tmp_path, "--dashboard-prefix", "behind/it") as (client, _):
        di.predict(slow(0.05), rows(80), client=client, batch_size=4)
        prefix = client.dashboard_link.replace("/status", "/behind/it")
        wait_until(lambda: "/individual-daskinfer" in plots(prefix).values())
        with browser.opened(f"{prefix}/daskinfer") as tab:
            tab.wait_for(lambda: "100%, 80 of 80 rows, done after" in tab.text)
            assert "Daskinfer More..." in tab.text
            assert not tab.complaints


@pytest.mark.slow
def test_a_scheduler_that_loads_the_page_itself(tmp_path: Path) -> None:
    """Others can have the page from their scheduler's start; a client's first run adds no second one."""
    with others(tmp_path, "--preload", "daskinfer.diagnostics.dashboard.plugin") as (client, _):
        dashboard = client.dashboard_link.removesuffix("/status")
        assert (before := plots(dashboard))["Individual Daskinfer"] == "/individual-daskinfer"
        di.predict(slow(0.05), rows(80), client=client, batch_size=4)
        wait_until(lambda: client in publisher._registered_clients)
        assert plots(dashboard) == before


def plots(dashboard: str) -> dict[str, str]:
    """The plots that a dashboard offers to JupyterLab, by their title."""
    with urllib.request.urlopen(f"{dashboard}/individual-plots.json", timeout=30) as answer:
        return dict(json.load(answer))


# ------------------------------------------------------------------------------------------------------- in a real browser


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for runs that go on while a test looks at them."""
    with ThreadPoolExecutor(2) as threads:
        yield threads


def column(tab: browser.Tab, source: str, name: str) -> list[Any]:
    """What a plot is drawn from."""
    script = "JSON.stringify([...Bokeh.documents[0].get_model_by_name({!r}).data[{!r}]].map(x => x.length ? [...x] : x))"
    return list(json.loads(tab.evaluate(script.format(source, name))))


def n_done(tab: browser.Tab) -> int:
    """Rows that the page says are done."""
    head = tab.text.partition("%, ")[2].partition(" of ")[0]
    return int(head.replace(",", "")) if head else 0


@in_browser
def test_a_run_in_a_browser(cluster_client: Client, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    """While a run goes on its numbers and plots move, and what failed is there to read; the browser complains of nothing."""
    enough, hasty = tmp_path / "enough", slow(0.02, tmp_path / "enough")

    def net(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if 17 in batch:
            raise ArithmeticError("<img src=x onerror=alert(1)> is no number")
        return hasty(batch)

    how = {"batch_size": 4, "on_error": "skip", "max_failed_rows": 1, "device_weights": [1, 3], "output": OUTPUT}
    dashboard = cluster_client.dashboard_link.removesuffix("/status")
    run = pool.submit(di.predict, net, rows(20_000), client=cluster_client, **how)
    try:
        wait_until(lambda: "/individual-daskinfer" in plots(dashboard).values())
        with browser.opened(f"{dashboard}/daskinfer") as tab:
            before = tab.wait_for(lambda: n_done(tab))
            points = len(column(tab, "daskinfer-speeds", "xs")[0])
            tab.wait_for(lambda: n_done(tab) > before and len(column(tab, "daskinfer-speeds", "xs")[0]) > points)
            assert column(tab, "daskinfer-shares", "asked") == [0.25, 0.75]
            assert any(0 < share <= 1 for share in column(tab, "daskinfer-cells", "done"))
            tab.wait_for(lambda: "rows 17:18 ArithmeticError: <img src=x onerror=alert(1)> is no number" in tab.text)
            assert re.search("chunks? in flight", tab.text)
            assert " left, " in tab.text
            enough.touch()
            tab.wait_for(lambda: "100%, 20,000 of 20,000 rows, done after" in tab.text, 120)
            assert column(tab, "daskinfer-shares", "done") == [0.25, 0.75]
            assert set(column(tab, "daskinfer-cells", "in_flight")) == {0.98, 1}  # one of a cell's 50 rows failed
            assert set(column(tab, "daskinfer-cells", "failed")) == {1}
            tab.open(f"{dashboard}/individual-daskinfer")
            tab.wait_for(lambda: "20,000 of 20,000" in tab.text)
            assert "More..." not in tab.text
            tab.open(f"{dashboard}/workers")
            tab.wait_for(lambda: "Daskinfer More..." in tab.text)
            assert not tab.complaints
    finally:
        enough.touch()
        run.result()


@in_browser
def test_no_run_yet_in_a_browser() -> None:
    """A page that has nothing to show yet is as quiet in a browser, and fills when the first run is heard of."""
    how = {"n_workers": 0, "processes": False, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(**how) as cluster, Client(cluster, set_as_default=False) as client:
        client.register_plugin(plugin.DashboardPlugin())
        with browser.opened(f"http://127.0.0.1:{cluster.scheduler.http_server.port}/daskinfer") as tab:
            tab.wait_for(lambda: "No run yet" in tab.text)
            found = told(started(0, 10), done(0, 10, 3))
            found.attach_client(client)
            tab.wait_for(lambda: "10 of 100 rows" in tab.text)
            found(RunEnded("a", 13.0, "ValueError: no"))
            tab.wait_for(lambda: "ended after 0:03, 3 rows/s, 1 failed, ValueError: no" in tab.text)
            assert not tab.complaints


@in_browser
def test_two_runs_of_one_cluster_in_a_browser(cluster_client: Client, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    """Two clients that compute on one cluster have a run each on its page; the one that is chosen stays in view."""
    enough = tmp_path / "enough"

    def first(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return slow(0.02, enough)(batch)

    def second(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return slow(0.02, enough)(batch)

    with Client(cluster_client.scheduler.address, set_as_default=False) as other:
        runs = [
            pool.submit(di.predict, net, rows(10_000), client=client, batch_size=4, output=OUTPUT)
            for net, client in ((first, cluster_client), (second, other))
        ]
        try:
            dashboard = cluster_client.dashboard_link.removesuffix("/status")
            wait_until(lambda: "/individual-daskinfer" in plots(dashboard).values())
            with browser.opened(f"{dashboard}/daskinfer") as tab:
                for name in ("first", "second"):
                    tab.wait_for(lambda name=name: f"{name} (goes on)" in tab.text)
                for name in ("first", "second", "first"):
                    tab.evaluate(_CHOOSE.format(name))
                    tab.wait_for(lambda name=name: f" {name} " in tab.text.rpartition(")")[2].partition("%")[0])
                    before = tab.wait_for(lambda: n_done(tab))
                    tab.wait_for(lambda before=before: n_done(tab) > before)
                assert not tab.complaints
        finally:
            enough.touch()
            assert all(len(run.result()) == 10_000 for run in runs)


COMPUTING = """
    import sys, time
    import dask.array as da
    from distributed import Client
    import daskinfer as di

    def slowly(batch):
        time.sleep(0.05)
        return batch

    if __name__ == "__main__":
        with Client(sys.argv[1]) as client:
            di.predict(slowly, da.arange(100_000.0, chunks=4), client=client, batch_size=4)
"""


@in_browser
def test_a_client_that_was_killed_in_a_browser(cluster_client: Client) -> None:
    """A run whose process was killed is said to be lost as soon as the scheduler knows it."""
    address, dashboard = cluster_client.scheduler.address, cluster_client.dashboard_link.removesuffix("/status")
    with browser.opened(f"{dashboard}/daskinfer") as tab:
        with subprocess.Popen([sys.executable, "-c", dedent(COMPUTING), address]) as script:
            try:
                tab.wait_for(lambda: n_done(tab) and "slowly (goes on)" in tab.text, 60)
            finally:
                script.kill()
        tab.wait_for(lambda: "its client is gone before its end was heard of" in tab.text)
        assert "slowly (lost)" in tab.text
        assert not tab.complaints


@in_browser
@pytest.mark.parametrize("width", [600, 900, 1000, 1280])
def test_nothing_is_covered_or_cut_off(cluster_client: Client, width: int) -> None:
    """At any width the bar of links leaves the page's head free, and the legend of the map is all there."""
    di.predict(slow(0.05), rows(80), client=cluster_client, batch_size=4)
    dashboard = cluster_client.dashboard_link.removesuffix("/status")
    with browser.opened(f"{dashboard}/daskinfer") as tab:
        tab.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        tab.wait_for(lambda: "rows, done after" in tab.text)
        places = json.loads(tab.evaluate(_PLACES))
        assert places["links"] <= places["head"]
        assert places["legend"] <= places["width"] <= width


# Where the bar of links ends and the page begins, and how far the words of the map's legend reach to the right.
_PLACES = """
(() => {
  const all = node => [...(node.shadowRoot || node).querySelectorAll("*")].flatMap(x =>
    [x, ...(x.shadowRoot ? all(x) : [])]);
  const words = all(document).filter(x => x.nodeName === "SPAN" && x.style.whiteSpace === "nowrap");
  return JSON.stringify({
    links: document.querySelector(".navbar").getBoundingClientRect().bottom,
    head: document.querySelector(".content").getBoundingClientRect().top,
    legend: Math.max(...words.map(x => x.getBoundingClientRect().right)),
    width: document.documentElement.clientWidth,
  });
})()
"""

# As a hand would: the model hears of it by the event, and the server by the model.
_CHOOSE = """
(() => {{
  const find = node => [...(node.shadowRoot || node).querySelectorAll("*")].flatMap(x =>
    x.nodeName === "SELECT" ? [x] : x.shadowRoot ? find(x) : []);
  const select = find(document)[0];
  select.value = [...select.options].find(option => option.text.includes(" {} (")).value;
  select.dispatchEvent(new Event("change"));
}})()
"""
