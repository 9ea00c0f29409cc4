"""What a run tells while it goes on, through ``progress=``."""

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
def test_events_tell_a_run(two_cpus: list[str], devices: Any) -> None:
    """Each chunk starts and is done, between the run's start and end, and together they are the input."""
    told: list[Event] = []
    y, report = di.predict(double, X, devices=devices, batch_size=50, progress=told.append, return_report=True)
    first, *between, last = told
    assert isinstance(first, RunStarted)
    assert isinstance(last, RunEnded)
    assert (first.n_rows, first.n_rows_before, last.error) == (1000, 0, "")
    assert sum(asked.share for asked in first.devices) == pytest.approx(1)
    done = sorted((event.start, event.stop) for event in between if isinstance(event, ChunkDone))
    assert sorted((event.start, event.stop) for event in between if isinstance(event, ChunkStarted)) == done
    assert [row for start, stop in done for row in range(start, stop)] == list(range(1000))
    assert len({event.run for event in told}) == 1
    assert all(before.at <= after.at for before, after in itertools.pairwise(told))
    assert (report.rows, sum(d.n_chunks for d in report.devices)) == (1000, len(done))
    np.testing.assert_array_equal(y, 2 * X)


def test_times_and_memory_of_a_chunk(two_cpus: list[str]) -> None:
    """A receipt says when its chunk was read, computed and done, in that order, and what its worker held."""
    told: list[Event] = []
    di.predict(double, X, devices=two_cpus, batch_size=50, progress=told.append)
    for event in told:
        if isinstance(event, ChunkDone):
            assert told[0].at <= event.stats.read_began <= event.stats.began <= event.stats.ended <= event.at
            assert event.stats.peak_nbytes > 10 << 20


def test_events_are_records() -> None:
    """They can be pickled, compared and not changed."""
    event = ChunkStarted("a", 1.0, 0, 1, "cpu:0")
    assert pickle.loads(pickle.dumps(event)) == event
    with pytest.raises(AttributeError, match="cannot assign to field 'at'"):
        event.at = 2.0  # type: ignore[misc]


def test_runs_are_told_apart(two_cpus: list[str]) -> None:
    """Two calls at a time on one cluster: each listener hears of its own only."""
    told: list[list[Event]] = [[], []]
    with ThreadPoolExecutor(2) as pool:
        for heard in told:
            pool.submit(di.predict, double, X, devices=two_cpus, batch_size=50, progress=heard.append)
    assert [kinds(heard)["RunEnded"] for heard in told] == [1, 1]
    assert told[0][0].run != told[1][0].run
    assert all(event.run == heard[0].run for heard in told for event in heard)


def test_a_listener_that_raises_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """It is warned of once, and the answer is right."""

    def raises(event: Event) -> None:
        raise ValueError("no")

    with caplog.at_level(logging.WARNING, "daskinfer"):
        np.testing.assert_array_equal(di.predict(double, X, devices="inline", progress=raises), 2 * X)
    assert [record.getMessage().partition(" by ")[0] for record in caplog.records] == ["progress is shown no more"]
    assert "ValueError: no" in caplog.text


def test_attempts_that_failed_are_told(two_cpus: list[str], tmp_path: Path) -> None:
    """A chunk that is tried again starts again; the report counts it."""
    told: list[Event] = []
    net = faulty.network(tmp_path, faulty.raises(faulty.bad), [1234], times=1)
    _, report = di.predict(
        net, faulty.X, devices=two_cpus, batch_size=faulty.CHUNK_ROWS, progress=told.append, return_report=True
    )
    failed = [event for event in told if isinstance(event, ChunkFailed)]
    assert failed
    assert all("bad 1234" in event.exception for event in failed)
    assert kinds(told)["ChunkStarted"] == kinds(told)["ChunkDone"] + len(failed)
    assert report.n_retried == len(failed)


@pytest.mark.parametrize("devices", ["inline", ["cpu", "cpu"]])
def test_what_starts_comes_back(two_cpus: list[str], devices: Any) -> None:
    """Chunks that cannot be read are given up: none is in flight at the end, and never less than none."""

    def block(block_id: tuple[int]) -> Any:
        if block_id == (3,):
            raise OSError("no such block")
        return X[:100]

    standing, seen, told = StatusTracker(), [], list[Event]()

    def look(event: Event) -> None:
        standing(event)
        told.append(event)
        if not isinstance(event, RunEnded):
            seen.append(sum(device.n_in_flight for device in standing.get_status(event.at).devices))

    x = da.map_blocks(block, chunks=((100,) * 10,), dtype="f4", meta=X[:0])
    how = {"on_error": "skip", "retries": 1, "return_report": True}
    _, report = di.predict(double, x, devices=devices, progress=look, **how)
    assert report.failed_rows == tuple(range(300, 400))
    assert report.n_retried == kinds(told)["ChunkFailed"] >= 2
    assert min(seen) == seen[-1] == 0


def test_what_ended_a_run_is_told() -> None:
    """The last event says why, whatever it was; a stream that is closed early has an end, too."""

    def fails(rows: Any) -> Any:
        raise ValueError("no")

    told: list[Event] = []
    with pytest.raises(di.DaskInferError, match="no"):
        di.predict(fails, X, devices="inline", output=X[:0], retries=0, progress=told.append)
    assert isinstance(told[-1], RunEnded)
    assert "no" in told[-1].error
    told.clear()
    blocks = di.stream(double, X, devices="inline", batch_size=10, progress=told.append)
    next(blocks)
    blocks.close()
    assert isinstance(told[-1], RunEnded)
    assert told[-1].error == "closed before its end"


def test_a_run_that_goes_on_tells_what_was_done_before(tmp_path: Path) -> None:
    """Rows of earlier calls are in the first event; a shard tells of its own part only."""
    np.save(tmp_path / "x.npy", X)
    told: list[Event] = []
    for shard, rows in [((1, 2), (0, 500)), ((2, 2), (500, 1000))]:
        told.clear()
        target = tmp_path / "y.npy"
        di.run(double, tmp_path / "x.npy", target, devices="inline", batch_size=50, shard=shard, progress=told.append)
        assert isinstance(told[0], RunStarted)
        assert (told[0].rows, told[0].done, told[0].n_rows_before) == (rows, (), 0)
    told.clear()
    assert di.run(double, tmp_path / "x.npy", target, devices="inline", batch_size=50, shard=(1, 2)).rows_before == 500

    def careful(rows: Any) -> Any:
        if rows[-1] >= 500 and not (tmp_path / "go on").exists():
            raise ValueError("not yet")
        return rows

    how = {"devices": "inline", "batch_size": 50, "retries": 0, "output": X[:0], "progress": told.append}
    with pytest.raises(di.DaskInferError, match="not yet"):
        di.run(careful, tmp_path / "x.npy", tmp_path / "careful.npy", **how)
    n_done = sum(event.stop - event.start for event in told if isinstance(event, ChunkDone))
    (tmp_path / "go on").touch()
    told.clear()
    di.run(careful, tmp_path / "x.npy", tmp_path / "careful.npy", **how)
    assert isinstance(told[0], RunStarted)
    assert (told[0].rows, told[0].done) == ((0, 1000), ((0, n_done),))
    assert n_done > 0


def test_the_micro_batch_that_was_chosen_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another micro-batch pays, an event says so, and the report has it."""
    told: list[Event] = []
    x = np.ones((400_000, 4), np.float32)
    _, report = di.predict(double, x, devices="inline", progress=told.append, return_report=True)
    chosen = [event.batch_size for event in told if isinstance(event, BatchSizeChosen)]
    assert report.batch_size == (chosen or [told[0].batch_size])[-1]  # type: ignore[attr-defined]


def test_that_micro_batches_are_measured_is_told(two_cpus: list[str]) -> None:
    """Before the first chunk of a network that is new to the workers an event says what takes the time."""
    told: list[Event] = []
    x = np.ones((400_000, 4), np.float32)
    di.predict(lambda batch: batch + 17, x, devices=two_cpus, progress=told.append)
    kinds = [type(event) for event in told]
    assert kinds.index(BatchTuningStarted) < kinds.index(ChunkStarted)


def test_a_client_is_told_to_those_who_ask() -> None:
    """Listeners with a method for it get the client; the others are left alone."""
    seen: list[Any] = []

    class Asks:
        def __call__(self, event: Event) -> None:
            seen.append(event)

        def connected(self, client: Any) -> None:
            seen.append(client)

    EventBus([Asks(), print]).attach_client("client")
    assert seen[0] == "client"
    assert [type(event) for event in seen[1:]] == [Connected]


def test_where_the_dashboard_is_is_told(two_cpus: list[str]) -> None:
    """The address is that of the page on the dashboard of the cluster that computes."""
    told: list[Event] = []
    di.predict(double, X, devices=two_cpus, progress=told.append)
    (found,) = [event for event in told if isinstance(event, Connected)]
    assert found.dashboard.endswith("/daskinfer")
    with urlopen(found.dashboard, timeout=60) as page:
        assert page.status == 200


def test_no_dashboard() -> None:
    """A cluster without one has no address."""
    told: list[Event] = []
    with (
        di.LocalDeviceCluster("cpu", dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        di.predict(double, X, client=client, progress=told.append)
    assert [event.dashboard for event in told if isinstance(event, Connected)] == [""]


@pytest.fixture
def closed() -> Iterator[None]:
    """The cluster that is kept ends with the test, which ends a worker of it."""
    yield
    di.close()


def test_a_worker_that_is_replaced_is_told(closed: None, tmp_path: Path) -> None:
    """A chunk that hangs fails, its device is replaced, and the run goes on."""
    told: list[Event] = []
    net = faulty.network(tmp_path, faulty.sleeps, [1234], times=1)
    how = {"devices": ["cpu", "cpu"], "batch_size": faulty.CHUNK_ROWS, "chunk_timeout": 2.0}
    np.testing.assert_array_equal(di.predict(net, faulty.X, progress=told.append, **how), 2 * faulty.X)
    assert [event.state for event in told if isinstance(event, DeviceChanged)] == ["replaced"]
    assert any(isinstance(event, ChunkFailed) and event.exception == "its worker ended" for event in told)
