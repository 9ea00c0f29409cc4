"""Where rows are computed: one test for each rule of ``execution.executor_choice``, by its DEBUG line."""

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
from daskinfer.execution import executor_choice, tuning
from daskinfer.scheduling import autotune
from daskinfer.scheduling.throughput_history import PerformanceRecord, history
from tests.conftest import wait_until

N_ROWS = 4000
X = np.arange(N_ROWS, dtype=np.float32)
CPUS = ["cpu:0", "cpu:1"]
FOREVER = 1e9  # seconds


def slow(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Stand in for a model of 10,000 rows/s, wherever it runs."""
    time.sleep(1e-4 * len(batch))
    return -batch


def wait_for_workers(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Stand in for a model that computes its first rows at once, and then, in the client, waits until workers are ready."""
    from daskinfer.cluster.process_cluster import default_cluster  # it holds a lock: it cannot travel with the function

    if batch.max() >= 3000 and "DASKINFER_DEVICE" not in os.environ:
        wait_until(lambda: default_cluster.is_running(["cpu", "cpu"]), 120)
    return -batch


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Forget all measurements, never start workers or compare them, and capture the DEBUG lines."""
    monkeypatch.setattr(executor_choice, "CLUSTER_START_SECONDS", FOREVER)
    monkeypatch.setattr(executor_choice, "MIN_COMPARE_SECONDS", FOREVER)
    history.clear()
    with caplog.at_level(logging.DEBUG, "daskinfer.execution.executor_choice"):
        yield
    history.clear()


@pytest.fixture
def unseen_cluster(two_cpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the running cluster from the rules, so that starting it takes no time."""
    monkeypatch.setattr(default_cluster, "is_running", lambda devices: False)


def get_record() -> PerformanceRecord:
    """Return what is remembered of the only model of this test."""
    (record,) = history._records.values()
    return record


def compute(model: Any = slow, x: Any = X, **keywords: Any) -> tuple[dict[str, int], RunReport]:
    """Run a call; check its output, and that each row is computed once; return the rows by device, and the report."""
    y, report = di.predict(model, x, return_report=True, **{"batch_size": 100, **keywords})
    np.testing.assert_array_equal(y, -np.asarray(x))
    by_device = {device.device: device.n_rows for device in report.devices}
    assert sum(by_device.values()) == report.rows == len(x)
    return by_device, report


def list_rules(caplog: pytest.LogCaptureFixture) -> list[int]:
    """List the numbers of the rules that were logged, in order."""
    lines = [record.getMessage() for record in caplog.records if record.name == "daskinfer.execution.executor_choice"]
    return [int(line.partition(":")[0].removeprefix("rule ")) for line in lines if line.startswith("rule ")]


@pytest.mark.slow
def test_workers_that_are_started_take_over(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 7, cold: this process begins; a cluster starts in the background, does the rest, and is kept for later calls."""
    monkeypatch.setattr(executor_choice, "CLUSTER_START_SECONDS", 0.0)
    di.close()
    try:
        by_device, _ = compute(wait_for_workers, np.arange(20_000, dtype=np.float32))
        assert list_rules(caplog) == [7]
        assert by_device["inline"] > 0
        assert by_device["cpu:0"] + by_device["cpu:1"] > 0
        assert default_cluster.is_running(["cpu", "cpu"])
    finally:
        di.close()


def test_rule_1(caplog: pytest.LogCaptureFixture) -> None:
    """Without rows, nothing computes."""
    by_device, _ = compute(x=X[:0])
    assert list_rules(caplog) == [1]
    assert set(by_device.values()) == {0}


def test_rule_2(caplog: pytest.LogCaptureFixture) -> None:
    """``devices="inline"`` is this process, whatever was measured."""
    assert compute(devices="inline")[0] == {"inline": N_ROWS}
    assert list_rules(caplog) == [2]


@pytest.mark.parametrize("keywords", [{"devices": ["cpu", "cpu"]}, {"device_weights": "even"}])
def test_rule_3(two_cpus: list[str], caplog: pytest.LogCaptureFixture, keywords: dict[str, Any]) -> None:
    """Calls that name devices, or their shares, get workers."""
    by_device, _ = compute(**keywords)
    assert list_rules(caplog) == [3]
    assert set(by_device) == set(CPUS)


def test_rule_3_of_a_client(cluster_client: Client, caplog: pytest.LogCaptureFixture) -> None:
    """Calls that pass a client get its workers."""
    assert set(compute(client=cluster_client)[0]) == set(CPUS)
    assert list_rules(caplog) == [3]


@pytest.mark.parametrize(("inline", "devices"), [(2e6, {"inline"}), (1e6, set(CPUS))])
def test_rule_4(two_cpus: list[str], caplog: pytest.LogCaptureFixture, inline: float, devices: set[str]) -> None:
    """If both were measured, the faster one computes from the first row on."""
    compute()
    get_record().speeds.update(inline=inline, workers=1.5e6)
    caplog.clear()
    by_device, _ = compute()
    assert list_rules(caplog) == [4]
    assert {device for device, n_rows in by_device.items() if n_rows} == devices


def test_rule_5(two_cpus: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """A cluster that is running gets all rows, and its speed is remembered."""
    by_device, _ = compute()
    assert list_rules(caplog) == [5]
    assert set(by_device) == set(CPUS)
    assert get_record().speeds["workers"] > 0
    assert "inline" not in get_record().speeds


def test_rule_6(unseen_cluster: None, caplog: pytest.LogCaptureFixture) -> None:
    """A call that finishes before workers could start stays in this process, whose speed is remembered."""
    by_device, report = compute()
    assert list_rules(caplog) == [6]
    assert by_device == {"cpu:0": 0, "cpu:1": 0, "inline": N_ROWS}
    assert set(get_record().speeds) == {"inline"}
    assert report.seconds > 0


def test_rule_7(unseen_cluster: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer call begins in this process and continues on the workers; both speeds are remembered."""
    monkeypatch.setattr(executor_choice, "CLUSTER_START_SECONDS", 0.0)
    by_device, _ = compute(x=np.arange(20_000, dtype=np.float32))
    assert list_rules(caplog) == [7]
    assert by_device["inline"] >= 100
    assert by_device["cpu:0"] + by_device["cpu:1"] > 0
    assert {"inline", "workers"} <= set(get_record().speeds)


def test_slower_workers_stop(two_cpus: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that turn out slower than this process stop, and this process computes the rest."""
    monkeypatch.setattr(executor_choice, "MIN_COMPARE_SECONDS", 0.0)
    compute(devices="inline")
    get_record().speeds.update(inline=1e9)
    caplog.clear()
    by_device, _ = compute(x=np.arange(20_000, dtype=np.float32))
    assert list_rules(caplog) == [5]
    assert "continuing here" in caplog.text
    assert by_device["inline"] > 0
    assert by_device["cpu:0"] + by_device["cpu:1"] > 0
    assert {"inline", "workers"} <= set(get_record().speeds)


def test_faster_workers_stay(two_cpus: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are not slower than this process compute all rows."""
    monkeypatch.setattr(executor_choice, "MIN_COMPARE_SECONDS", 0.0)
    compute(devices="inline")
    get_record().speeds.update(inline=1.0)
    caplog.clear()
    by_device, _ = compute()
    assert list_rules(caplog) == [5]
    assert "inline" not in by_device


def test_workers_that_do_not_start(
    unseen_cluster: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the cluster cannot start, a warning says so, and this process computes everything."""

    @contextlib.contextmanager
    def broken(devices: list[str]) -> Iterator[Client]:
        raise OSError("no port is free")
        yield

    monkeypatch.setattr(executor_choice, "CLUSTER_START_SECONDS", 0.0)
    monkeypatch.setattr(default_cluster, "acquire_client", broken)
    assert compute()[0]["inline"] == N_ROWS
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage() == "workers failed to start; continuing in this process: no port is free"


def test_an_error_in_this_process_names_rows(unseen_cluster: None) -> None:
    """The error of rows that fail before there are workers names them, as on workers."""

    def picky(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if batch.max() >= 2000:
            raise ArithmeticError("too large")
        return batch

    with pytest.raises(di.DaskInferError, match=r"rows \d+:\d+ on cpu failed: ArithmeticError: too large"):
        di.predict(picky, X, batch_size=100)


def test_a_run_to_storage_follows_the_same_rules(
    unseen_cluster: None, tmp_path: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process and workers write to one store."""
    monkeypatch.setattr(executor_choice, "CLUSTER_START_SECONDS", 0.0)
    x = np.arange(20_000, dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    report = di.run(slow, tmp_path / "x.npy", tmp_path / "y.npy", batch_size=100)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), -x)
    assert list_rules(caplog) == [7]
    assert {device.device: device.n_rows > 0 for device in report.devices}["inline"]


def test_a_stream_follows_the_same_rules(
    unseen_cluster: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks come in order even if this process and workers computed them."""
    monkeypatch.setattr(executor_choice, "CLUSTER_START_SECONDS", 0.0)
    x = np.arange(20_000, dtype=np.float32)
    np.testing.assert_array_equal(np.concatenate(list(di.stream(slow, x, batch_size=100))), -x)
    assert list_rules(caplog) == [7]


# The fastest batch size.


def fixed_cost(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Stand in for a model whose micro-batches take the same time whatever their size, so that larger ones are faster."""
    time.sleep(0.01)
    return -batch


LARGE = np.zeros(600_000, np.float32)  # rows; enough for tuning at the first size


@pytest.mark.parametrize("where", ["workers", "inline", "dask"])
def test_the_batch_size_is_tuned_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """An automatic batch size is raised while that is faster, reported, remembered, and not measured again."""
    benchmarks: list[str] = []
    for name in ("benchmark_devices", "benchmark_inline"):
        original = getattr(tuning, name)

        def counted(*args: Any, original: Any = original, name: str = name, **keywords: Any) -> Any:
            benchmarks.append(name)
            return original(*args, **keywords)

        monkeypatch.setattr(tuning, name, counted)
    devices = "inline" if where == "inline" else request.getfixturevalue("two_cpus")
    x = da.from_array(LARGE, chunks=150_000) if where == "dask" else LARGE
    sizes = [compute(fixed_cost, x, devices=devices, batch_size="auto")[1].batch_size for _ in range(2)]
    assert sizes[0] == sizes[1] > 1024, sizes
    assert get_record().batch_sizes == {"inline" if where == "inline" else "cpu": sizes[0]}
    assert benchmarks == ["benchmark_inline" if where == "inline" else "benchmark_devices"]


@pytest.mark.parametrize("devices", ["inline", ["cpu", "cpu"]])
def test_a_short_run_keeps_the_first_batch_size(two_cpus: list[str], devices: Any) -> None:
    """If there is little to compute nothing is remembered, so that a longer run may tune."""
    _, report = compute(np.negative, np.zeros(100_000, np.float32), devices=devices, batch_size="auto")
    assert report.batch_size == 1024
    assert get_record().batch_sizes == {}


@pytest.mark.parametrize("devices", ["inline", ["cpu", "cpu"]])
def test_of_many_short_runs_one_tunes(two_cpus: list[str], devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of earlier calls count: after enough of them, short runs of the same model get the fastest batch size, too."""
    monkeypatch.setattr(
        autotune, "MIN_MEASURE_SECONDS", 0.2
    )  # here: a loaded machine interrupts some of twenty micro-batches
    short = LARGE[:50_000]
    for n_calls in range(1, 200):
        _, report = compute(fixed_cost, short, devices=devices, batch_size="auto")
        if n_calls == 1:
            assert (report.batch_size, get_record().batch_sizes) == (1024, {})
        if get_record().batch_sizes:
            break
    assert get_record().n_rows == n_calls * len(short)
    assert compute(fixed_cost, short, devices=devices, batch_size="auto")[1].batch_size > 1024


def test_a_given_batch_size_is_not_tuned(two_cpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch size that was passed is used."""
    monkeypatch.setattr(tuning, "benchmark_devices", None)  # measuring would fail
    assert compute(fixed_cost, LARGE, devices=two_cpus, batch_size=30_000)[1].batch_size == 30_000


FIRST_CALL = """
import gc, numpy as np, torch, daskinfer as di
model, x = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU()), np.ones((4096, 4), np.float32)
di.predict
gc.collect()
gc.disable()  # its first count rises with each container that is made, and falls with each that is freed
before = gc.get_count()[0]
di.predict(model, x)
print(gc.get_count()[0] - before)
"""


def test_a_first_short_call_leaves_few_objects() -> None:
    """2,100 new objects would make Python's collector go through all of torch's, which takes a quarter of a second."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, timeout=120, check=True)
    assert 0 < int(done.stdout) < 1800
