"""The events of a run, through ``progress=``."""

from __future__ import annotations

import itertools
import logging
import pickle
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import dask.array as da
import numpy as np
import pytest
from distributed import Client

import daskinfer as di
from daskinfer.diagnostics.events import (
    BatchSizeChosen,
    BatchTuningStarted,
    ChunkDone,
    ChunkFailed,
    ChunkStarted,
    Connected,
    DeviceChanged,
    Event,
    EventBus,
    RunEnded,
    RunStarted,
)
from daskinfer.diagnostics.status import StatusTracker
from tests.support import faulty

X = np.arange(1000, dtype=np.float32)


def double(rows: Any) -> Any:
    """Twice the rows."""
    return 2 * rows


def kinds(events: list[Event]) -> dict[str, int]:
    """How many there are of each event."""
    return dict(Counter(type(event).__name__ for event in events))


@pytest.mark.parametrize("devices", ["inline", ["cpu", "cpu"]])
def test_events_describe_a_run(two_cpus: list[str], devices: Any) -> None:
    """Each chunk starts and is done between the run's start and end, and together they are the input."""
    events: list[Event] = []
    y, report = di.predict(double, X, devices=devices, batch_size=50, progress=events.append, return_report=True)
    first, *between, last = events
    assert isinstance(first, RunStarted)
    assert isinstance(last, RunEnded)
    assert (first.n_rows, first.n_rows_before, last.error) == (1000, 0, "")
    assert [planned.share for planned in first.devices] == [None] * len(first.devices)  # none was requested
    done = sorted((event.start, event.stop) for event in between if isinstance(event, ChunkDone))
    assert sorted((event.start, event.stop) for event in between if isinstance(event, ChunkStarted)) == done
    assert [row for start, stop in done for row in range(start, stop)] == list(range(1000))
    assert len({event.run for event in events}) == 1
    assert all(before.at <= after.at for before, after in itertools.pairwise(events))
    assert (report.rows, sum(d.n_chunks for d in report.devices)) == (1000, len(done))
    np.testing.assert_array_equal(y, 2 * X)


def test_times_and_memory_of_a_chunk(two_cpus: list[str]) -> None:
    """The stats of a chunk tell when it was read, computed and done, in that order, and how much memory was held."""
    events: list[Event] = []
    di.predict(double, X, devices=two_cpus, batch_size=50, progress=events.append)
    for event in events:
        if isinstance(event, ChunkDone):
            assert events[0].at <= event.stats.read_began <= event.stats.began <= event.stats.ended <= event.at
            assert event.stats.peak_nbytes > 10 << 20


def test_events_are_records() -> None:
    """They can be pickled, compared and not changed."""
    event = ChunkStarted("a", 1.0, 0, 1, "cpu:0")
    assert pickle.loads(pickle.dumps(event)) == event
    with pytest.raises(AttributeError, match="cannot assign to field 'at'"):
        event.at = 2.0  # type: ignore[misc]


def test_runs_are_kept_apart(two_cpus: list[str]) -> None:
    """With two concurrent calls on one cluster, each listener gets the events of its own call only."""
    events: list[list[Event]] = [[], []]
    with ThreadPoolExecutor(2) as pool:
        for received in events:
            pool.submit(di.predict, double, X, devices=two_cpus, batch_size=50, progress=received.append)
    assert [kinds(received)["RunEnded"] for received in events] == [1, 1]
    assert events[0][0].run != events[1][0].run
    assert all(event.run == received[0].run for received in events for event in received)


def test_a_listener_that_raises_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """It is disabled with one warning, and the result is right."""

    def broken(event: Event) -> None:
        raise ValueError("no")

    with caplog.at_level(logging.WARNING, "daskinfer"):
        np.testing.assert_array_equal(di.predict(double, X, devices="inline", progress=broken), 2 * X)
    assert [record.getMessage() for record in caplog.records] == [
        "progress callback broken raised ValueError and was disabled: no"
    ]


def test_failed_attempts_are_events(two_cpus: list[str], tmp_path: Path) -> None:
    """A chunk that is retried starts again; the report counts it."""
    events: list[Event] = []
    net = faulty.make_model(tmp_path, faulty.raise_error(faulty.make_bad_row_error), [1234], times=1)
    _, report = di.predict(
        net, faulty.X, devices=two_cpus, batch_size=faulty.CHUNK_ROWS, progress=events.append, return_report=True
    )
    failed = [event for event in events if isinstance(event, ChunkFailed)]
    assert failed
    assert all("bad 1234" in event.exception for event in failed)
    assert kinds(events)["ChunkStarted"] == kinds(events)["ChunkDone"] + len(failed)
    assert report.n_retried == len(failed)


@pytest.mark.parametrize("devices", ["inline", ["cpu", "cpu"]])
def test_what_starts_comes_back(two_cpus: list[str], devices: Any) -> None:
    """Chunks that cannot be read are given up: none is in flight at the end, and never fewer than none."""

    def block(block_id: tuple[int]) -> Any:
        if block_id == (3,):
            raise OSError("no such block")
        return X[:100]

    standing, seen, events = StatusTracker(), [], list[Event]()

    def look(event: Event) -> None:
        standing(event)
        events.append(event)
        if not isinstance(event, RunEnded):
            seen.append(sum(device.n_in_flight for device in standing.get_status(event.at).devices))

    x = da.map_blocks(block, chunks=((100,) * 10,), dtype="f4", meta=X[:0])
    how = {"on_error": "skip", "retries": 1, "return_report": True}
    _, report = di.predict(double, x, devices=devices, progress=look, **how)
    assert report.failed_rows == tuple(range(300, 400))
    assert report.n_retried == kinds(events)["ChunkFailed"] >= 2
    assert min(seen) == seen[-1] == 0


def test_the_reason_of_the_end() -> None:
    """The last event has the reason, whatever it was; a stream that is closed early has an end, too."""

    def fails(rows: Any) -> Any:
        raise ValueError("no")

    events: list[Event] = []
    with pytest.raises(di.DaskInferError, match="no"):
        di.predict(fails, X, devices="inline", output=X[:0], retries=0, progress=events.append)
    assert isinstance(events[-1], RunEnded)
    assert "no" in events[-1].error
    events.clear()
    blocks = di.stream(double, X, devices="inline", batch_size=10, progress=events.append)
    next(blocks)
    blocks.close()
    assert isinstance(events[-1], RunEnded)
    assert events[-1].error == "closed before its end"


def test_a_resumed_run_knows_what_was_done_before(tmp_path: Path) -> None:
    """Rows of earlier calls are in the first event; a shard's events are about its own part only."""
    np.save(tmp_path / "x.npy", X)
    events: list[Event] = []
    for shard, rows in [((1, 2), (0, 500)), ((2, 2), (500, 1000))]:
        events.clear()
        target = tmp_path / "y.npy"
        di.run(double, tmp_path / "x.npy", target, devices="inline", batch_size=50, shard=shard, progress=events.append)
        assert isinstance(events[0], RunStarted)
        assert (events[0].rows, events[0].done, events[0].n_rows_before) == (rows, (), 0)
    events.clear()
    assert di.run(double, tmp_path / "x.npy", target, devices="inline", batch_size=50, shard=(1, 2)).rows_before == 500

    def careful(rows: Any) -> Any:
        if rows[-1] >= 500 and not (tmp_path / "go on").exists():
            raise ValueError("not yet")
        return rows

    how = {"devices": "inline", "batch_size": 50, "retries": 0, "output": X[:0], "progress": events.append}
    with pytest.raises(di.DaskInferError, match="not yet"):
        di.run(careful, tmp_path / "x.npy", tmp_path / "careful.npy", **how)
    n_done = sum(event.stop - event.start for event in events if isinstance(event, ChunkDone))
    (tmp_path / "go on").touch()
    events.clear()
    di.run(careful, tmp_path / "x.npy", tmp_path / "careful.npy", **how)
    assert isinstance(events[0], RunStarted)
    assert (events[0].rows, events[0].done) == ((0, 1000), ((0, n_done),))
    assert n_done > 0


def test_the_tuned_batch_size_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """If another batch size is faster, there is an event, and the report has it."""
    events: list[Event] = []
    x = np.ones((400_000, 4), np.float32)
    _, report = di.predict(double, x, devices="inline", progress=events.append, return_report=True)
    chosen = [event.batch.batch_size for event in events if isinstance(event, BatchSizeChosen)]
    assert report.batch_size == (chosen or [events[0].batch.batch_size])[-1]  # type: ignore[attr-defined]


def test_batch_tuning_is_an_event(two_cpus: list[str]) -> None:
    """Before the first chunk of a model that is new to the workers, an event tells that the batch size is tuned."""
    events: list[Event] = []
    x = np.ones((400_000, 4), np.float32)
    di.predict(lambda batch: batch + 17, x, devices=two_cpus, progress=events.append)
    kinds = [type(event) for event in events]
    assert kinds.index(BatchTuningStarted) < kinds.index(ChunkStarted)


def test_listeners_that_take_the_client_get_it() -> None:
    """Listeners with the method ``attach_client`` get the client; the others only the event."""
    seen: list[Any] = []

    class WithClient:
        def __call__(self, event: Event) -> None:
            seen.append(event)

        def attach_client(self, client: Any) -> None:
            seen.append(client)

    EventBus([WithClient(), print]).attach_client("client")
    assert seen[0] == "client"
    assert [type(event) for event in seen[1:]] == [Connected]


def test_the_url_of_the_dashboard(two_cpus: list[str]) -> None:
    """The URL is that of the page on the dashboard of the cluster that computes."""
    events: list[Event] = []
    di.predict(double, X, devices=two_cpus, progress=events.append)
    (found,) = [event for event in events if isinstance(event, Connected)]
    assert found.dashboard.endswith("/daskinfer")
    with urlopen(found.dashboard, timeout=60) as page:
        assert page.status == 200


def test_no_dashboard() -> None:
    """A cluster without a dashboard has no URL."""
    events: list[Event] = []
    with (
        di.LocalDeviceCluster("cpu", dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        di.predict(double, X, client=client, progress=events.append)
    assert [event.dashboard for event in events if isinstance(event, Connected)] == [""]


@pytest.fixture
def closed() -> Iterator[None]:
    """Close the process's cluster with the test, which kills one of its workers."""
    yield
    di.close()


def test_a_restarted_worker_is_an_event(closed: None, tmp_path: Path) -> None:
    """A chunk that hangs fails, its worker is restarted, and the run continues; the report marks both."""
    events: list[Event] = []
    net = faulty.make_model(tmp_path, faulty.sleep, [1234], times=1)
    how = {"devices": ["cpu", "cpu"], "batch_size": faulty.CHUNK_ROWS, "chunk_timeout": 2.0}
    y, report = di.predict(net, faulty.X, progress=events.append, return_report=True, **how)
    np.testing.assert_array_equal(y, 2 * faulty.X)
    states = [event.state for event in events if isinstance(event, DeviceChanged)]
    assert states in (["restarting"], ["restarting", "replaced"])  # the other worker may end the run before
    assert {"failed attempt", "worker died"} <= {mark.kind for mark in report.marks}
    assert any(isinstance(event, ChunkFailed) and event.exception == "its worker died" for event in events)
