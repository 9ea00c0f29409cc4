"""The page on Dask's own dashboard: what it counts, what it keeps, and how it looks in a real browser during runs."""

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
from daskinfer.core.chunks import BatchConfig, ChunkStats, RowFailure
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
from daskinfer.diagnostics.events import (
    ChunkDone,
    ChunkFailed,
    ChunkStarted,
    DeviceChanged,
    Event,
    PlannedDevice,
    RunEnded,
    RunStarted,
)
from tests.conftest import wait_until
from tests.support import browser
from tests.support.dask_commands import external_cluster

OUTPUT = np.empty(0, np.float32)  # what the models return, so that they need not be tried
PUBLISHER = "daskinfer.diagnostics.dashboard.publisher"
Net = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]

in_browser = pytest.mark.skipif(browser.PROGRAM is None, reason="needs a browser: apt-get install chromium")


def stats_of(start: int, stop: int, device: str = "cpu:0", began: float = 11.0) -> ChunkStats:
    """The stats of a chunk; ``began`` is 0 for rows that were given up."""
    return ChunkStats(start, stop, device, "EPYC", 4, 1.0, "w", began=began)


def started(start: int, stop: int, device: str = "cpu:0") -> ChunkStarted:
    """The event of a chunk that begins."""
    return ChunkStarted("a", 10.0, start, stop, device)


def attempt_failed(start: int, stop: int, why: str = "ValueError: no") -> ChunkFailed:
    """The event of a failed attempt."""
    return ChunkFailed("a", 11.0, start, stop, "cpu:0", why)


def done(start: int, stop: int, *failed: int, attempts: int = 1, began: float = 11.0, device: str = "cpu:0") -> ChunkDone:
    """The event of a chunk that is done, except for the rows that failed."""
    failures = tuple(RowFailure(at, at + 1, device, f"ValueError: {at}") for at in failed)
    return ChunkDone("a", 12.0, start, stop, device, stats_of(start, stop, device, began), failures, attempts)


def publisher_of(
    *events: Event, run: str = "a", n_rows: int = 100, model: str = "Net", n_devices: int = 2, shares: bool = True
) -> StatusPublisher:
    """A publisher that has received these events of a run."""
    found = StatusPublisher()
    planned = tuple(PlannedDevice(f"cpu:{i}", "", "cpu", 1 / n_devices if shares else None) for i in range(n_devices))
    found(RunStarted(run, 9.0, model, ("x",), ("y",), (0, n_rows), (), BatchConfig(8), planned))
    for event in events:
        found(event)
    return found


def shown_on(registry: RunRegistry, publisher: StatusPublisher, now: float = 20.0) -> None:
    """Send a publisher's snapshot to a registry."""
    registry.update(pickle.loads(pickle.dumps(publisher.make_snapshot(now).to_message())))


# --------------------------------------------------------------------------------------------------------------- counting


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
    """However a run is split and whatever happens to its chunks, each cell has the share of its rows in each state."""
    n_rows = data.draw(st.integers(1, 3 * N_CELLS))
    cuts = data.draw(st.sets(st.integers(1, n_rows), max_size=12))
    rows = {state: np.zeros(n_rows, bool) for state in ("done", "in_flight", "failed", "retrying")}
    first = data.draw(st.sampled_from([0, 1000]))  # of a shard
    edges = sorted(cuts | {0, n_rows})
    fates = ["pending", "done earlier", "started", "failed", "restarted", "done", "given up"]
    parts = [(a, b, data.draw(st.sampled_from(fates))) for a, b in itertools.pairwise(edges)]
    before = [(first + a, first + b) for a, b, fate in parts if fate == "done earlier"]
    drawn = ChunkMap((first, first + n_rows), before)
    for a, b, fate in parts:
        here, start, stop = slice(a, b), first + a, first + b
        if fate == "done earlier":
            rows["done"][here] = True
        if fate in ("pending", "done earlier"):
            continue
        drawn.mark_started(started(start, stop), 1)
        rows["in_flight"][here] = True
        if fate in ("failed", "restarted", "given up"):
            drawn.mark_failed(attempt_failed(start, stop))
            rows["in_flight"][here], rows["retrying"][here] = False, True
        if fate == "restarted":
            drawn.mark_started(started(start, stop), 1)
            rows["in_flight"][here] = True
            if data.draw(st.booleans()):
                drawn.mark_done(done(start, stop, attempts=2), 1)
                rows["in_flight"][here], rows["retrying"][here], rows["done"][here] = False, False, True
        elif fate == "given up":
            drawn.mark_done(done(start, stop, *range(start, stop), began=0.0), 1)
            rows["retrying"][here], rows["failed"][here] = False, True
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


def test_cells_know_their_device() -> None:
    """A cell has the number of the last device that worked on it; from the last number on they are not told apart."""
    drawn = ChunkMap((0, 4))
    drawn.mark_started(started(0, 1), 0)
    drawn.mark_started(started(1, 2), 3)
    drawn.mark_done(done(1, 2), 2)
    drawn.mark_started(started(2, 3), 1000)
    assert list(drawn.get_cells().device) == [0, 2, UNKNOWN_DEVICE, UNKNOWN_DEVICE]
    assert list(ChunkMap((10, 14), [(10, 12)]).get_cells().device) == [UNKNOWN_DEVICE] * 4
    assert ChunkMap((0, 0)).get_cells().done == b""


def test_the_throughput_is_thinned_out_when_it_grows_too_long() -> None:
    """Over any run, the number of points is bounded, they are evenly spaced, and the latest is always there."""
    history = ThroughputHistory()
    for i in range(20 * MAX_POINTS):
        history.add(i * STEP_SECONDS, (float(i),))
    at = np.array([seconds for seconds, _ in history.points])
    assert MAX_POINTS / 2 - 1 <= len(at) <= MAX_POINTS
    assert np.ptp(np.diff(at[:-1])) == 0
    assert at[-1] == (20 * MAX_POINTS - 1) * STEP_SECONDS


def test_devices_beyond_the_last_colour_are_merged() -> None:
    """Of many devices, the first are told apart, and the others are shown as one."""
    events = [started(i, i + 1, f"cpu:{i}") for i in range(30)] + [done(i, i + 1, device=f"cpu:{i}") for i in range(29)]
    devices = publisher_of(*events, n_devices=30).make_snapshot(20.0).status.devices
    assert [device.device for device in devices] == [*(f"cpu:{i}" for i in range(MAX_DEVICES - 1)), OTHERS]
    assert (devices[-1].label, devices[-1].n_rows, devices[-1].n_in_flight) == ("7 devices", 6, 1)
    assert sum(device.asked_share for device in devices) == pytest.approx(1.0)
    assert limit_devices(devices[:2]) == devices[:2]


def test_a_snapshot_crosses_processes_in_plain_values() -> None:
    """A snapshot is read as it was written, has the last errors, and has the same size for any run."""
    many = [attempt_failed(i, i + 1, "E" * 10_000) for i in range(50)]
    snapshot = publisher_of(started(0, 50), *many, done(60, 62, 61), model="N" * 10_000, n_rows=10**9).make_snapshot(20.0)
    assert Snapshot.from_message(json.loads(json.dumps(snapshot.to_message(), default=list))).errors == snapshot.errors
    assert Snapshot.from_message(pickle.loads(pickle.dumps(snapshot.to_message()))) == snapshot
    assert len(snapshot.errors) == MAX_ERRORS
    assert (snapshot.errors[-1].start, snapshot.errors[-1].exception) == (61, "ValueError: 61")
    assert len(pickle.dumps(snapshot.to_message())) < 10_000


def test_the_last_runs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry keeps a bounded number of runs, those updated last, and lists the latest first."""
    clock = iter(range(1000))
    monkeypatch.setattr("daskinfer.diagnostics.dashboard.state.time.time", lambda: float(next(clock)))
    registry = RunRegistry()
    shown_on(registry, publisher_of(run="running"))
    for i in range(MAX_RUNS + 3):
        shown_on(registry, publisher_of(run=f"run {i}"))
        shown_on(registry, publisher_of(started(0, 1), run="running"))
    names = [shown.snapshot.status.run for shown in registry.runs]
    assert names == [*(f"run {i}" for i in range(MAX_RUNS + 2, 3, -1)), "running"]
    assert len(registry.runs[-1].throughput.points) == 1  # all snapshots are of one moment


# --------------------------------------------------------------------------------------------------------- what is shown


def seen(registry: RunRegistry) -> tuple[page.PageView, str]:
    """The page of a reader, as HTML."""
    view = page.PageView(registry)
    view.update()
    return view, view._headline.text + view._device_table.text + view._error_table.text


def test_no_run_yet() -> None:
    """The page tells if nothing was computed yet."""
    view, text = seen(RunRegistry())
    assert "No run yet" in text
    assert not view._body.visible


def test_a_running_run() -> None:
    """Rows, throughput, time left, chunks in flight and errors are at the top, escaped."""
    registry = RunRegistry()
    events = [
        started(0, 10),
        started(10, 20, "cpu:1"),
        done(0, 10, 3),
        attempt_failed(10, 20, "<i>no</i>"),
        started(10, 20, "cpu:1"),
    ]
    shown_on(registry, publisher_of(*events, model="<b>Net"), now=14.0)
    _, text = seen(registry)
    assert "<b>&lt;b&gt;Net</b>" in text
    assert "10%, 10 of 100 rows, 2 rows/s, 0:36 left, 1 failed, 1 retried, 1 chunk in flight" in text
    assert "&lt;i&gt;no" in text
    assert "<i>" not in text


def test_before_the_first_chunk_and_after_the_end() -> None:
    """Before its first chunk, a run's workers start; at its end, its throughput is that of all of it, with the reason."""
    registry = RunRegistry()
    shown_on(registry, publisher_of())
    assert ">starting workers<" in seen(registry)[1]
    shown_on(registry, publisher_of(started(0, 50), done(0, 50), RunEnded("a", 20.0, "ValueError: <no>")))
    view, text = seen(registry)
    assert "50%, 50 of 100 rows, stopped after 0:10, 5 rows/s, ValueError: &lt;no&gt;" in text
    assert f"Net (failed), {publisher._get_user()}" in view._run_select.options[1][1]
    shown_on(registry, publisher_of(started(0, 1), done(0, 1), RunEnded("a", 10.0, ""), n_rows=1))
    assert "100%, 1 of 1 rows, done after" in seen(registry)[1]
    shown_on(registry, publisher_of(started(0, 1), replace(done(0, 1), at=11.0), RunEnded("a", 11.0, ""), n_rows=0))
    assert "100%, 1 of 0 rows, done after" in seen(registry)[1]


def test_runs_of_one_second() -> None:
    """Runs that begin in the same second with the same model can be told apart in the list, in their order."""
    registry = RunRegistry()
    for number in range(3):
        shown_on(registry, publisher_of(started(0, 50), run=f"run {number}"))
        registry._runs[f"run {number}"].first_seen = 100.0 + number / 10
    view, _ = seen(registry)
    (_, latest), (run, third), (_, second), (_, first) = view._run_select.options
    assert (latest, run) == ("the latest", "run 2")
    assert (second, third) == (f"{first}, no. 2", f"{first}, no. 3")


def test_a_run_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose process sends nothing any more is called silent after a while."""
    registry = RunRegistry()
    shown_on(registry, publisher_of(started(0, 10)))
    view, text = seen(registry)
    assert "no update" not in text
    monkeypatch.setattr(page, "SILENT_SECONDS", -1.0)
    view.update()
    assert "no update for a while: its process may be hanging" in view._headline.text
    assert "(silent), " in view._run_select.options[1][1]


def test_the_user_and_host_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user and host are shown with each run; a user without a name is left out."""
    assert publisher._get_user().endswith(platform.node())
    publisher._get_user.cache_clear()
    monkeypatch.setattr(publisher.getpass, "getuser", {}.__getitem__)  # as if no such user were known
    assert publisher._get_user() == platform.node()
    publisher._get_user.cache_clear()


def test_a_worker_that_is_away() -> None:
    """A worker that is restarted is named at the top and in its line; what is waited for is said if nothing moves."""
    registry = RunRegistry()
    away = DeviceChanged("a", 11.0, "cpu:1", "restarting")
    shown_on(registry, publisher_of(started(0, 10), started(10, 20, "cpu:1"), away), now=12.0)
    assert seen(registry)[1].count("restarting") == 2
    shown_on(registry, publisher_of(started(0, 10), started(10, 20, "cpu:1"), away), now=40.0)
    waits = "no result for 0:30: waiting for cpu:0 (1 in flight) and cpu:1 (restarting, 1 in flight)"
    assert waits in seen(registry)[1]


def test_shares_that_nobody_requested_are_not_shown() -> None:
    """Without weights there is no requested share: neither a column nor an outline; with them there are both."""
    registry = RunRegistry()
    shown_on(registry, publisher_of(started(0, 10), done(0, 10)))
    view, text = seen(registry)
    assert "requested" in text and view._shares_plot._requested.visible
    automatic = publisher_of(started(0, 10), done(0, 10), shares=False)
    shown_on(registry, automatic)
    view, text = seen(registry)
    assert "requested" not in text and not view._shares_plot._requested.visible
    assert view._shares_plot.root.title.text == "share of rows"


def test_where_the_time_of_each_device_goes() -> None:
    """Phases of a device follow one another, as fractions of the time since the first chunk."""
    registry = RunRegistry()
    loaded = replace(stats_of(0, 10), load_seconds=2.0, waited_seconds=1.0)
    shown_on(registry, publisher_of(started(0, 10), replace(done(0, 10), stats=loaded)), now=20.0)
    columns = seen(registry)[0]._phases_plot._source.data
    ends = [columns[label][0] for label in ("read", "load the model", "compute")]
    assert ends == pytest.approx([0.1, 0.3, 0.4])
    view = seen(registry)[0]
    plots = [plot.root for plot in (view._throughput_plot, view._shares_plot, view._phases_plot)]
    assert {type(plot.x_scale).__name__ for plot in plots} | {type(plots[0].y_scale).__name__} == {"LinearScale"}


def test_one_run_of_several_is_shown() -> None:
    """The latest active run is shown until another is chosen; a run that is no longer kept is replaced by the latest."""
    registry = RunRegistry()
    for run in ("first", "second"):
        shown_on(registry, publisher_of(run=run, model=run))
    view, text = seen(registry)
    assert "<b>second</b>" in text
    assert "another run is active on this cluster" in text
    view._run_select.value = "first"
    assert "<b>first</b>" in view._headline.text
    shown_on(registry, publisher_of(run="third"))
    view.update()
    assert "2 other runs are active on this cluster" in view._headline.text
    for run in ("second", "third"):
        shown_on(registry, publisher_of(RunEnded(run, 10.0, ""), run=run))
    view.update()
    assert "on this cluster" not in view._headline.text
    view._run_select.value = ""
    view.update()
    assert "<b>first</b>" in view._headline.text  # those that began after it have ended
    view._run_select.value = "first"
    for i in range(MAX_RUNS):
        shown_on(registry, publisher_of(run=f"run {i}", model=f"run {i}"))
    view.update()
    assert f"<b>run {MAX_RUNS - 1}</b>" in view._headline.text


def test_devices_that_joined_later_have_no_throughput_before() -> None:
    """A device that joined a run has its own line from then on."""
    registry = RunRegistry()
    shown_on(registry, publisher_of(started(0, 10), done(0, 10)), now=14.0)
    shown_on(registry, publisher_of(started(0, 10), done(0, 10), started(10, 20, "inline")), now=15.0)
    lines = seen(registry)[0]._throughput_plot._source.data
    assert lines["device"] == ["all", "cpu:0", "cpu:1", "this process"]
    assert [len(line) for line in lines["ys"]] == [2] * 4
    assert len(set(lines["color"])) == 4


# ------------------------------------------------------------------------------------------------------- what is not shown


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a publisher logged."""
    return [record.getMessage() for record in caplog.records if record.name == PUBLISHER]


def test_an_inline_run_is_not_published(caplog: pytest.LogCaptureFixture) -> None:
    """A run in this process sends nothing to any scheduler."""
    with caplog.at_level(logging.DEBUG, PUBLISHER):
        di.predict(abs, np.ones(5), devices="inline")
    assert not messages(caplog)


def test_a_short_run_is_not_published(cluster_client: Client, caplog: pytest.LogCaptureFixture) -> None:
    """A short run that succeeds costs no message; one that fails is shown however short it is."""
    handler = plugin.HANDLER
    with caplog.at_level(logging.INFO, PUBLISHER):
        publisher._registered_clients.discard(cluster_client)
        di.predict(abs, [1.0], client=cluster_client)
        time.sleep(2 * INITIAL_DELAY_SECONDS)  # nothing must happen
        assert not messages(caplog)
        with pytest.raises(di.DaskInferError, match="ZeroDivisionError"):
            di.predict(lambda batch: 1 // 0, [1.0], client=cluster_client, output=OUTPUT)
        wait_until(lambda: any(line.startswith("runs are shown at http://127.0.0.1:") for line in messages(caplog)))
    wait_until(lambda: cluster_client.run_on_scheduler(lambda dask_scheduler: handler in dask_scheduler.handlers))


def slow(seconds: float, until: Path | None = None) -> Net:
    """A model that takes so long per micro-batch, until a file exists."""

    def slowly(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if until is None or not until.exists():
            time.sleep(seconds)  # stands for a model's work
        return batch

    return slowly


def rows(n_rows: int, per_chunk: int = 4) -> da.Array:
    """So many rows in small chunks."""
    return da.from_array(np.arange(n_rows, dtype=np.float32), chunks=per_chunk)


def test_a_managed_cluster_has_the_page_from_its_start() -> None:
    """It can be opened before the first run."""
    with di.LocalDeviceCluster("cpu") as cluster:
        dashboard = cluster.dashboard_link.removesuffix("/status")
        assert plots(dashboard)["Individual Daskinfer"] == page.PLOT_PATH
        with urllib.request.urlopen(dashboard + page.PAGE_PATH, timeout=30) as response:
            assert response.read().count(b'href="daskinfer"') == 1


def test_preloads_that_are_configured_stay() -> None:
    """A configured preload of the scheduler is not replaced by the page's, which is then added by the first run."""
    start = WorkerSpec(2**30, ".", "127.0.0.1:0", 1.0)
    assert start.scheduler_options()["preload"] == ["daskinfer.diagnostics.dashboard.plugin"]
    assert replace(start, dashboard_address=None).scheduler_options()["preload"] == []
    with dask.config.set({"distributed.scheduler.preload": ["configured"]}):
        assert start.scheduler_options()["preload"] == ["configured"]


def test_a_scheduler_without_a_dashboard(caplog: pytest.LogCaptureFixture) -> None:
    """Without a dashboard the run works as usual, and one DEBUG line tells why nothing is shown."""
    how = {"n_workers": 1, "dashboard_address": "127.0.0.1:0", "scheduler_kwargs": {"dashboard": False}}
    with (
        LocalCluster(processes=False, **how) as cluster,
        Client(cluster, set_as_default=False) as client,
        caplog.at_level(logging.DEBUG, PUBLISHER),
    ):
        y = di.predict(slow(0.05), rows(80), client=client, batch_size=4)
        wait_until(lambda: messages(caplog))
    np.testing.assert_array_equal(y, np.arange(80))
    assert messages(caplog) == [
        "the dashboard no longer shows this run: _PageUnavailableError: the scheduler has no dashboard"
    ]


def test_a_client_that_closes_with_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """A snapshot that nobody can receive any more is one DEBUG line."""
    found = publisher_of(started(0, 50))
    with (
        caplog.at_level(logging.DEBUG, PUBLISHER),
        LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0") as cluster,
    ):
        with Client(cluster, set_as_default=False) as client:
            found.attach_client(client)
            found.attach_client(client)  # the second time changes nothing
            wait_until(lambda: client in publisher._registered_clients)
        found(RunEnded("a", 13.0, ""))
        wait_until(lambda: len(messages(caplog)) == 2)  # where it was shown, and why no longer
    assert messages(caplog)[1].startswith("the dashboard no longer shows this run: ")
    assert client not in publisher._registered_clients


def test_another_version_of_daskinfer_on_the_scheduler(cluster_client: Client) -> None:
    """For a message that it cannot read, the scheduler returns the reason, and logs nothing."""
    cluster_client.register_plugin(plugin.DashboardPlugin())
    handler, message = plugin.HANDLER, {"status": {"devices": [], "unheard": 1}}
    reason = cluster_client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.handlers[handler](message=message))
    assert reason.startswith("the scheduler has another version of daskinfer: ")


def test_other_internals(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the page cannot be added to a dashboard of another version, the scheduler returns the reason."""
    assert (
        plugin._install_page(None, RunRegistry()) == "AttributeError: 'NoneType' object has no attribute 'http_application'"
    )
    monkeypatch.delitem(sys.modules, "distributed.dashboard.scheduler")
    assert plugin._install_page(None, RunRegistry()) == "the scheduler has no bokeh, or no dashboard"


# --------------------------------------------------------------------------------------------- schedulers of other processes


@pytest.mark.slow
def test_a_scheduler_without_bokeh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without bokeh nothing is shown: the run works as usual, with one DEBUG line, and none in the scheduler's log."""
    with external_cluster(tmp_path, lacks="bokeh") as (client, log), caplog.at_level(logging.DEBUG, PUBLISHER):
        assert client.run_on_scheduler(find_spec, "bokeh") is None
        n_logged = len(log.read_text())
        y = di.predict(slow(0.05), rows(80), client=client, batch_size=4)
        wait_until(lambda: messages(caplog))
        logged = log.read_text()[n_logged:]
    assert not [
        word
        for word in ("bokeh", "DashboardPlugin", "Page", plugin.HANDLER, "Traceback", " - ERROR - ", " - WARNING - ")
        if word in logged
    ]
    np.testing.assert_array_equal(y, np.arange(80))
    why = "the scheduler has no bokeh, or no dashboard"
    assert messages(caplog) == [f"the dashboard no longer shows this run: _PageUnavailableError: {why}"]


@pytest.mark.slow
@in_browser
def test_the_page_of_a_scheduler_behind_a_proxy(tmp_path: Path) -> None:
    """On an external cluster, the first run adds the page, below the prefix that its dashboard has."""
    with external_cluster(tmp_path, "--dashboard-prefix", "behind/it") as (client, _):
        di.predict(slow(0.05), rows(80), client=client, batch_size=4)
        prefix = client.dashboard_link.replace("/status", "/behind/it")
        wait_until(lambda: "/individual-daskinfer" in plots(prefix).values())
        with browser.open_tab(f"{prefix}/daskinfer") as tab:
            tab.wait_for(lambda: "100%, 80 of 80 rows, done after" in tab.text)
            assert "Daskinfer More..." in tab.text
            assert not tab.errors


@pytest.mark.slow
def test_a_scheduler_that_loads_the_page_itself(tmp_path: Path) -> None:
    """An external cluster can have the page from its scheduler's start; a client's first run adds no second one."""
    with external_cluster(tmp_path, "--preload", "daskinfer.diagnostics.dashboard.plugin") as (client, _):
        dashboard = client.dashboard_link.removesuffix("/status")
        assert (before := plots(dashboard))["Individual Daskinfer"] == "/individual-daskinfer"
        di.predict(slow(0.05), rows(80), client=client, batch_size=4)
        wait_until(lambda: client in publisher._registered_clients)
        assert plots(dashboard) == before


def plots(dashboard: str) -> dict[str, str]:
    """The plots that a dashboard offers to JupyterLab, by title."""
    with urllib.request.urlopen(f"{dashboard}/individual-plots.json", timeout=30) as response:
        return dict(json.load(response))


# ------------------------------------------------------------------------------------------------------- in a real browser


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for runs that a test watches."""
    with ThreadPoolExecutor(2) as threads:
        yield threads


def column(tab: browser.Tab, source: str, name: str) -> list[Any]:
    """A column of a plot's data."""
    script = "JSON.stringify([...Bokeh.documents[0].get_model_by_name({!r}).data[{!r}]].map(x => x.length ? [...x] : x))"
    return list(json.loads(tab.evaluate(script.format(source, name))))


def n_done(tab: browser.Tab) -> int:
    """The number of done rows on the page."""
    head = tab.text.partition("%, ")[2].partition(" of ")[0]
    return int(head.replace(",", "")) if head else 0


@in_browser
def test_a_run_in_a_browser(cluster_client: Client, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    """During a run, its numbers and plots move, and errors can be read; the browser logs none of its own."""
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
        with browser.open_tab(f"{dashboard}/daskinfer") as tab:
            before = tab.wait_for(lambda: n_done(tab))
            points = len(column(tab, "daskinfer-speeds", "xs")[0])
            tab.wait_for(lambda: n_done(tab) > before and len(column(tab, "daskinfer-speeds", "xs")[0]) > points)
            assert column(tab, "daskinfer-shares", "requested") == [0.25, 0.75]
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
            assert not tab.errors
    finally:
        enough.touch()
        run.result()


@in_browser
def test_no_run_yet_in_a_browser() -> None:
    """A page that has nothing to show yet logs no errors in a browser, and fills when the first snapshot arrives."""
    how = {"n_workers": 0, "processes": False, "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(**how) as cluster, Client(cluster, set_as_default=False) as client:
        client.register_plugin(plugin.DashboardPlugin())
        with browser.open_tab(f"http://127.0.0.1:{cluster.scheduler.http_server.port}/daskinfer") as tab:
            tab.wait_for(lambda: "No run yet" in tab.text)
            found = publisher_of(started(0, 10), done(0, 10, 3))
            found.attach_client(client)
            tab.wait_for(lambda: "10 of 100 rows" in tab.text)
            found(RunEnded("a", 13.0, "ValueError: no"))
            tab.wait_for(lambda: "stopped after 0:03, 3 rows/s, 1 failed, ValueError: no" in tab.text)
            assert not tab.errors


@in_browser
def test_two_runs_of_one_cluster_in_a_browser(cluster_client: Client, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    """Two clients that compute on one cluster have a run each on its page; the one that is chosen stays visible."""
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
            with browser.open_tab(f"{dashboard}/daskinfer") as tab:
                for name in ("first", "second"):
                    tab.wait_for(lambda name=name: f"{name} (running)" in tab.text)
                for name in ("first", "second", "first"):
                    tab.evaluate(_CHOOSE.format(name))
                    tab.wait_for(lambda name=name: f" {name} " in tab.text.partition("%")[0].rpartition(")")[2])
                    before = tab.wait_for(lambda: n_done(tab))
                    tab.wait_for(lambda before=before: n_done(tab) > before)
                assert not tab.errors
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
    """A run whose process was killed is called lost as soon as the scheduler notices."""
    address, dashboard = cluster_client.scheduler.address, cluster_client.dashboard_link.removesuffix("/status")
    with browser.open_tab(f"{dashboard}/daskinfer") as tab:
        with subprocess.Popen([sys.executable, "-c", dedent(COMPUTING), address]) as script:
            try:
                tab.wait_for(lambda: n_done(tab) and "slowly (running)" in tab.text, 60)
            finally:
                script.kill()
        tab.wait_for(lambda: "its client disconnected before the run ended" in tab.text)
        assert "slowly (lost)" in tab.text
        assert not tab.errors


@in_browser
@pytest.mark.parametrize("width", [600, 900, 1000, 1280])
def test_nothing_is_covered_or_cut_off(cluster_client: Client, width: int) -> None:
    """At any width, the bar of links does not cover the page's head, and the legend of the map is complete."""
    di.predict(slow(0.05), rows(80), client=cluster_client, batch_size=4)
    dashboard = cluster_client.dashboard_link.removesuffix("/status")
    with browser.open_tab(f"{dashboard}/daskinfer") as tab:
        tab.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        tab.wait_for(lambda: "rows, done after" in tab.text)
        places = json.loads(tab.evaluate(_PLACES))
        assert places["links"] <= places["head"]
        assert places["legend"] <= places["width"] <= width


# The bottom of the bar of links, the top of the page, and the right edge of the legend of the map.
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

# As a user would: the event updates the model, and the model the server.
_CHOOSE = """
(() => {{
  const find = node => [...(node.shadowRoot || node).querySelectorAll("*")].flatMap(x =>
    x.nodeName === "SELECT" ? [x] : x.shadowRoot ? find(x) : []);
  const select = find(document)[0];
  select.value = [...select.options].find(option => option.text.includes(" {} (")).value;
  select.dispatchEvent(new Event("change"));
}})()
"""
