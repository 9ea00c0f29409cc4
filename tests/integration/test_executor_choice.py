"""Where rows are computed: the ladder of ``driver``, one test for each way out of it, by its DEBUG line."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import dask.array as da
import numpy as np
import pytest
from distributed import Client

import daskinfer as di
from daskinfer.cluster.process_cluster import default_cluster
from daskinfer.diagnostics.report import RunReport
from daskinfer.execution import run, tuning
from daskinfer.scheduling import autotune
from daskinfer.scheduling.throughput_history import PerformanceRecord, history
from tests.conftest import wait_until

N_ROWS = 4000
X = np.arange(N_ROWS, dtype=np.float32)
CPUS = ["cpu:0", "cpu:1"]
FOREVER = 1e9  # seconds


def slow(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A network of 10,000 rows/s, wherever it runs."""
    time.sleep(1e-4 * len(batch))
    return -batch


def waits_for_workers(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A network that does its first rows at once, and in the client's process no more until the workers are there."""
    from daskinfer.cluster.process_cluster import default_cluster  # it holds a lock: it cannot travel with the function

    if batch.max() >= 3000 and "DASKINFER_DEVICE" not in os.environ:
        wait_until(lambda: default_cluster.is_running(["cpu", "cpu"]), 120)
    return -batch


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A process that has measured nothing, on a machine of two cores, whose DEBUG lines are kept."""
    monkeypatch.setattr(run, "CLUSTER_START_SECONDS", FOREVER)
    monkeypatch.setattr(run, "MIN_COMPARE_SECONDS", FOREVER)
    history.clear()
    with caplog.at_level(logging.DEBUG, "daskinfer.execution.run"):
        yield
    history.clear()


@pytest.fixture
def as_if_none_ran(two_cpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept cluster is there, but the ladder does not see it: starting it takes no time."""
    monkeypatch.setattr(default_cluster, "is_running", lambda devices: False)


def known() -> PerformanceRecord:
    """What the only network of this test is known for."""
    (only,) = history._records.values()
    return only


def computed(model: Any = slow, x: Any = X, **how: Any) -> tuple[dict[str, int], RunReport]:
    """Rows by device, none left out and none done twice, of a call with the right answer; and its report."""
    y, report = di.predict(model, x, return_report=True, **{"batch_size": 100, **how})
    np.testing.assert_array_equal(y, -np.asarray(x))
    by_device = {device.device: device.n_rows for device in report.devices}
    assert sum(by_device.values()) == report.rows == len(x)
    return by_device, report


def rules(caplog: pytest.LogCaptureFixture) -> list[int]:
    """The numbers of the rules that were said, in their order."""
    said = [record.getMessage() for record in caplog.records if record.name == "daskinfer.execution.run"]
    return [int(line.partition(":")[0].removeprefix("rule ")) for line in said if line.startswith("rule ")]


@pytest.mark.slow
def test_workers_that_are_started_take_over(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 7, cold: this process begins, a cluster starts beside it, does the rest and is kept for the next call."""
    monkeypatch.setattr(run, "CLUSTER_START_SECONDS", 0.0)
    di.close()
    try:
        by_device, _ = computed(waits_for_workers, np.arange(20_000, dtype=np.float32))
        assert rules(caplog) == [7]
        assert by_device["inline"] > 0
        assert by_device["cpu:0"] + by_device["cpu:1"] > 0
        assert default_cluster.is_running(["cpu", "cpu"])
    finally:
        di.close()


def test_rule_1(caplog: pytest.LogCaptureFixture) -> None:
    """No rows are computed nowhere."""
    by_device, _ = computed(x=X[:0])
    assert rules(caplog) == [1]
    assert set(by_device.values()) == {0}


def test_rule_2(caplog: pytest.LogCaptureFixture) -> None:
    """Inline is in this process, whatever is known."""
    assert computed(devices="inline")[0] == {"inline": N_ROWS}
    assert rules(caplog) == [2]


@pytest.mark.parametrize("how", [{"devices": ["cpu", "cpu"]}, {"device_weights": "even"}])
def test_rule_3(two_cpus: list[str], caplog: pytest.LogCaptureFixture, how: dict[str, Any]) -> None:
    """Who names devices, or their shares, gets workers."""
    by_device, _ = computed(**how)
    assert rules(caplog) == [3]
    assert set(by_device) == set(CPUS)


def test_rule_3_of_a_client(cluster_client: Client, caplog: pytest.LogCaptureFixture) -> None:
    """Who brings a client gets its workers."""
    assert set(computed(client=cluster_client)[0]) == set(CPUS)
    assert rules(caplog) == [3]


@pytest.mark.parametrize(("inline", "devices"), [(2e6, {"inline"}), (1e6, set(CPUS))])
def test_rule_4(two_cpus: list[str], caplog: pytest.LogCaptureFixture, inline: float, devices: set[str]) -> None:
    """Where both ways were measured, the faster one is taken from the first row on."""
    computed()
    known().speeds.update(inline=inline, workers=1.5e6)
    caplog.clear()
    by_device, _ = computed()
    assert rules(caplog) == [4]
    assert {device for device, n_rows in by_device.items() if n_rows} == devices


def test_rule_5(two_cpus: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """A cluster that is running gets all rows, and its speed is remembered."""
    by_device, _ = computed()
    assert rules(caplog) == [5]
    assert set(by_device) == set(CPUS)
    assert known().speeds["workers"] > 0
    assert "inline" not in known().speeds


def test_rule_6(as_if_none_ran: None, caplog: pytest.LogCaptureFixture) -> None:
    """What ends before workers could start is done in this process, and its speed is remembered."""
    by_device, report = computed()
    assert rules(caplog) == [6]
    assert by_device == {"cpu:0": 0, "cpu:1": 0, "inline": N_ROWS}
    assert set(known().speeds) == {"inline"}
    assert report.seconds > 0


def test_rule_7(as_if_none_ran: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would take longer is begun in this process and goes on on the workers; both speeds are remembered."""
    monkeypatch.setattr(run, "CLUSTER_START_SECONDS", 0.0)
    by_device, _ = computed(x=np.arange(20_000, dtype=np.float32))
    assert rules(caplog) == [7]
    assert by_device["inline"] >= 100
    assert by_device["cpu:0"] + by_device["cpu:1"] > 0
    assert {"inline", "workers"} <= set(known().speeds)


def test_slower_workers_give_way(
    two_cpus: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that turn out slower than this process was stop after their trial, and it does the rest."""
    monkeypatch.setattr(run, "MIN_COMPARE_SECONDS", 0.0)
    computed(devices="inline")
    known().speeds.update(inline=1e9)
    caplog.clear()
    by_device, _ = computed(x=np.arange(20_000, dtype=np.float32))
    assert rules(caplog) == [5]
    assert "it goes on" in caplog.text
    assert by_device["inline"] > 0
    assert by_device["cpu:0"] + by_device["cpu:1"] > 0
    assert {"inline", "workers"} <= set(known().speeds)


def test_faster_workers_stay(two_cpus: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are no slower than this process was keep all rows."""
    monkeypatch.setattr(run, "MIN_COMPARE_SECONDS", 0.0)
    computed(devices="inline")
    known().speeds.update(inline=1.0)
    caplog.clear()
    by_device, _ = computed()
    assert rules(caplog) == [5]
    assert "inline" not in by_device


def test_workers_that_do_not_start(
    as_if_none_ran: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster that cannot start costs a warning, and this process does all of it."""

    @contextlib.contextmanager
    def broken(devices: list[str]) -> Iterator[Client]:
        raise OSError("no port is free")
        yield

    monkeypatch.setattr(run, "CLUSTER_START_SECONDS", 0.0)
    monkeypatch.setattr(default_cluster, "client", broken)
    assert computed()[0]["inline"] == N_ROWS
    (warned,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warned.getMessage() == "the workers did not start, this process goes on alone: no port is free"


def test_an_error_in_this_process_names_rows(as_if_none_ran: None) -> None:
    """Rows that fail before there are workers are named as anywhere."""

    def picky(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if batch.max() >= 2000:
            raise ArithmeticError("too large")
        return batch

    with pytest.raises(di.DaskInferError, match=r"rows \d+:\d+ on cpu failed: ArithmeticError: too large"):
        di.predict(picky, X, batch_size=100)


def test_a_run_to_storage_takes_the_same_ladder(
    as_if_none_ran: None, tmp_path: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store is written by this process and by workers alike."""
    monkeypatch.setattr(run, "CLUSTER_START_SECONDS", 0.0)
    x = np.arange(20_000, dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    report = di.run(slow, tmp_path / "x.npy", tmp_path / "y.npy", batch_size=100)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), -x)
    assert rules(caplog) == [7]
    assert {device.device: device.n_rows > 0 for device in report.devices}["inline"]


def test_a_stream_takes_the_same_ladder(
    as_if_none_ran: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks come in order though this process and workers computed them."""
    monkeypatch.setattr(run, "CLUSTER_START_SECONDS", 0.0)
    x = np.arange(20_000, dtype=np.float32)
    np.testing.assert_array_equal(np.concatenate(list(di.stream(slow, x, batch_size=100))), -x)
    assert rules(caplog) == [7]


# The micro-batch that pays.


def fixed_cost(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A network whose micro-batches cost the same whatever their size, so that larger ones pay."""
    time.sleep(0.01)
    return -batch


LARGE = np.zeros(600_000, np.float32)  # rows; enough for measuring to pay at the first size


@pytest.mark.parametrize("where", ["workers", "inline", "dask"])
def test_the_micro_batch_is_measured_once(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """An automatic micro-batch is climbed to where it pays, reported, remembered and not measured again."""
    n_measured: list[str] = []
    for name in ("measured", "measure"):
        original = getattr(tuning, name)

        def counted(*args: Any, original: Any = original, name: str = name, **keywords: Any) -> Any:
            found = original(*args, **keywords)
            n_measured.append(name) if found else None  # nothing is asked where all is known
            return found

        monkeypatch.setattr(tuning, name, counted)
    devices = "inline" if where == "inline" else request.getfixturevalue("two_cpus")
    x = da.from_array(LARGE, chunks=150_000) if where == "dask" else LARGE
    sizes = [computed(fixed_cost, x, devices=devices, batch_size="auto")[1].batch_size for _ in range(2)]
    assert sizes[0] == sizes[1] > 1024, sizes
    assert known().batch_sizes == {"inline" if where == "inline" else "cpu": sizes[0]}
    assert n_measured == ["measure" if where == "inline" else "measured"]


@pytest.mark.parametrize("devices", ["inline", ["cpu", "cpu"]])
def test_a_short_run_keeps_the_first_micro_batch(two_cpus: list[str], devices: Any) -> None:
    """Where there is little to do nothing is remembered, so that a longer run may measure."""
    _, report = computed(np.negative, np.zeros(100_000, np.float32), devices=devices, batch_size="auto")
    assert report.batch_size == 1024
    assert known().batch_sizes == {}


@pytest.mark.parametrize("devices", ["inline", ["cpu", "cpu"]])
def test_of_many_short_runs_one_measures(two_cpus: list[str], devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was computed with a network before counts as what there is to do: in time, short runs get what pays, too."""
    monkeypatch.setattr(
        autotune, "MIN_MEASURE_SECONDS", 0.2
    )  # here: a loaded machine interrupts some of twenty micro-batches
    short = LARGE[:50_000]
    for n_calls in range(1, 200):
        _, report = computed(fixed_cost, short, devices=devices, batch_size="auto")
        if n_calls == 1:
            assert (report.batch_size, known().batch_sizes) == (1024, {})
        if known().batch_sizes:
            break
    assert known().n_rows == n_calls * len(short)
    assert computed(fixed_cost, short, devices=devices, batch_size="auto")[1].batch_size > 1024


def test_a_given_micro_batch_is_not_measured(two_cpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who names the micro-batch gets it."""
    monkeypatch.setattr(tuning, "benchmark_devices", None)  # measuring would fail
    assert computed(fixed_cost, LARGE, devices=two_cpus, batch_size=30_000)[1].batch_size == 30_000


FIRST_CALL = """
import gc, numpy as np, torch, daskinfer as di
network, x = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU()), np.ones((4096, 4), np.float32)
di.predict
gc.collect()
gc.disable()  # the first of its counts goes up with each container that is made, and down with each that ends
before = gc.get_count()[0]
di.predict(network, x)
print(gc.get_count()[0] - before)
"""


def test_a_first_short_call_leaves_few_objects() -> None:
    """2,100 make Python look through all of torch's after its import: a quarter of a second."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, timeout=120, check=True)
    assert 0 < int(done.stdout) < 1800
