"""Restarting workers: which ones may be killed, and what happens to the chunks that hang there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from distributed import Client

import daskinfer as di
from daskinfer.cluster.placement import fetch_workers
from daskinfer.cluster.restart import WorkerRestarter, write_pid_file
from daskinfer.core import env
from daskinfer.diagnostics.events import ChunkStarted, DeviceChanged, Event
from daskinfer.errors import ChunkTimeout, ClusterError
from daskinfer.execution import window
from tests.conftest import wait_until
from tests.support import faulty
from tests.support.faulty import CHUNK_ROWS, X


class FakeClient:
    """A client whose cluster restarts workers, or reports why not."""

    def __init__(self, result: str) -> None:
        self.result = result
        self.restarted: list[str] = []

    def restart_workers(self, addresses: list[str], **_: Any) -> dict[str, str]:
        self.restarted += addresses
        return dict.fromkeys(addresses, self.result)


@pytest.fixture
def recorded(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A stopped process, recorded as the worker of cpu:0."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path(tmp_path, "cpu:0.pid").write_text(f"{process.pid} {psutil.Process(process.pid).create_time()}")
    process.send_signal(signal.SIGSTOP)
    yield process
    process.kill()
    process.wait()


def test_a_worker_records_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A managed worker writes its process ID and start time into its cluster's folder; external ones write nothing."""
    write_pid_file()
    monkeypatch.setenv(env.SCRATCH, str(tmp_path))
    write_pid_file()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(env.DEVICE, "cpu:0")
    write_pid_file()
    assert [path.name for path in tmp_path.iterdir()] == ["cpu:0.pid"]
    pid, create_time = Path(tmp_path, "cpu:0.pid").read_text().split()
    assert (int(pid), float(create_time)) == (os.getpid(), psutil.Process().create_time())


def test_a_managed_worker_is_killed(tmp_path: Path, recorded: subprocess.Popen[bytes]) -> None:
    """A stopped process is killed too, and one that has already exited counts as restarted."""
    restarter = WorkerRestarter(FakeClient("no"), {"cpu:0": str(tmp_path)}, allow_external=False)
    assert restarter.restart_worker("cpu:0", "tcp://a")
    assert recorded.wait(10) == -signal.SIGKILL
    assert restarter.restart_worker("cpu:0", "tcp://a")


def test_another_process_with_the_same_id_is_not_killed(tmp_path: Path, recorded: subprocess.Popen[bytes]) -> None:
    """A process ID that the system has reused since is not the worker's."""
    Path(tmp_path, "cpu:0.pid").write_text(f"{recorded.pid} 1.0")
    restarter = WorkerRestarter(FakeClient("no"), {"cpu:0": str(tmp_path)}, allow_external=False)
    assert restarter.restart_worker("cpu:0", "tcp://a")
    assert recorded.poll() is None


@pytest.mark.parametrize("folders", [{}, {"0": ""}, {"0": "/nonexistent"}])
@pytest.mark.parametrize(
    ("allowed", "address", "result", "restarted"),
    [
        (False, "tcp://a", "OK", False),
        (True, "tcp://a", "OK", True),
        (True, "tcp://a", "timed out", False),
        (True, None, "OK", False),
    ],
)
def test_external_workers(folders: dict[str, str], allowed: bool, address: str | None, result: str, restarted: bool) -> None:
    """Their cluster restarts them if that is allowed; nothing else happens to them."""
    client = FakeClient(result)
    assert WorkerRestarter(client, folders, allow_external=allowed).restart_worker("0", address) is restarted
    assert client.restarted == ([address] if allowed and address else [])


# Real workers


@pytest.fixture
def cpus() -> Iterator[dict[str, Any]]:
    """Two managed workers, which a test may kill."""
    yield {"devices": ["cpu", "cpu"], "device_weights": "even", "batch_size": CHUNK_ROWS, "return_report": True}
    di.close()


@pytest.mark.parametrize(
    "act",
    [
        faulty.sleep,
        pytest.param(faulty.hold_the_gil, marks=pytest.mark.slow),
        pytest.param(faulty.stop, marks=pytest.mark.slow),
    ],
)
def test_a_worker_whose_chunk_hangs_is_restarted(cpus: dict[str, Any], tmp_path: Path, act: Any) -> None:
    """A worker that sleeps, holds the GIL or is stopped is detected within 5 s and restarted, and its chunk is computed."""
    di.predict(np.negative, X, **cpus)
    events: list[Event] = []
    net = faulty.make_model(tmp_path, act, [1234], times=1)
    y, report = di.predict(net, X, chunk_timeout=3, progress=events.append, **cpus)
    restarting = next(event for event in events if isinstance(event, DeviceChanged))
    started_at = max(
        e.at for e in events if isinstance(e, ChunkStarted) and e.start <= 1234 < e.stop and e.at < restarting.at
    )
    assert restarting.state == "restarting"
    assert 3 <= restarting.at - started_at < 5
    np.testing.assert_array_equal(y, 2 * X)
    assert report.failures == ()
    assert not psutil.pid_exists(faulty.list_acted_pids(tmp_path)[0])


@pytest.mark.slow
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_chunk_that_always_hangs(cpus: dict[str, Any], tmp_path: Path, on_error: str) -> None:
    """It fails once it has hung twice in isolation, and all others are right."""
    net = faulty.make_model(tmp_path, faulty.sleep, [1234])
    if on_error == "raise":
        with pytest.raises(
            ChunkTimeout, match=r"chunk \d+ \(rows 1\d\d\d:\d+\) timed out on .* in isolation \(chunk_timeout=1 s\)"
        ):
            di.predict(net, X, chunk_timeout=1, **cpus)
        return
    y, report = di.predict(net, X, chunk_timeout=1, on_error="skip", **cpus)
    (failure,) = report.failures
    assert failure.start <= 1234 < failure.stop
    np.testing.assert_array_equal(y, np.where((failure.start <= X) & (failure.stop > X), np.nan, 2 * X))
    assert len(faulty.list_acted_pids(tmp_path)) == 3


def test_a_pausing_consumer_is_not_a_hanging_chunk(two_cpus: list[str], tmp_path: Path) -> None:
    """Results that were ready while the consumer of a stream was busy do not count as timed out."""
    net = faulty.make_model(tmp_path, faulty.kill, [])
    how: dict[str, Any] = {"devices": two_cpus, "device_weights": "even", "batch_size": 10}
    di.predict(net, X, **how)  # the first chunk takes longer, on a loaded machine too long
    before = _processes()
    for i, block in enumerate(di.stream(net, X, chunk_timeout=2.0, **how)):
        assert len(block)
        if i in (3, 9):
            time.sleep(3.0)  # longer than a chunk may take, which is what is tested
    assert _processes() == before


def _processes() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the workers every 0.2 s."""
    monkeypatch.setattr(window, "WORKER_CHECK_SECONDS", 0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("reads", [True, False])
def test_an_external_worker_that_dies(foreign: Client, tmp_path: Path, reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its nanny restarts it at another address, and every row is right, even if rows had been sent to it."""
    if not reads:
        monkeypatch.setattr("daskinfer.cluster.preflight.advertise_process_memory", lambda: None)
        monkeypatch.setattr("daskinfer.transport.shared_memory.can_attach", lambda ref: False)
    net = faulty.make_model(tmp_path, faulty.kill, [1234], times=1, seconds=0.01)
    y, report = di.predict(net, X, client=foreign, batch_size=CHUNK_ROWS, device_weights=[1, 1], return_report=True)
    np.testing.assert_array_equal(y, 2 * X)
    assert report.failures == ()
    wait_until(lambda: len(fetch_workers(foreign)) == 2, 60)


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_an_external_worker_that_dies_in_a_later_call(foreign: Client, tmp_path: Path) -> None:
    """If all workers have the model nothing is sent, but the replacement of a dead worker still gets it."""
    net = faulty.make_model(tmp_path, faulty.kill, [1234], times=1, seconds=0.01)
    how: dict[str, Any] = {"client": foreign, "batch_size": CHUNK_ROWS, "device_weights": [1, 1]}
    di.predict(net, X[: 4 * CHUNK_ROWS], **how)
    np.testing.assert_array_equal(di.predict(net, X, **how), 2 * X)
    assert len(faulty.list_acted_pids(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_an_external_worker_that_hangs_is_not_restarted(foreign: Client, tmp_path: Path) -> None:
    """Without permission it is not restarted, and the other worker computes its chunks."""
    before = foreign.run(os.getpid)
    net = faulty.make_model(tmp_path, faulty.sleep, [1234], times=1)
    how = {"client": foreign, "batch_size": CHUNK_ROWS, "device_weights": [1, 1], "chunk_timeout": 1}
    np.testing.assert_array_equal(di.predict(net, X, **how), 2 * X)
    assert foreign.run(os.getpid) == before


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_an_external_worker_is_restarted_if_that_is_allowed(foreign: Client, tmp_path: Path) -> None:
    """With ``restart_workers`` its cluster restarts its process."""
    before = set(foreign.run(os.getpid).values())
    net = faulty.make_model(tmp_path, faulty.sleep, [1234], times=1)
    how = {"client": foreign, "batch_size": CHUNK_ROWS, "device_weights": [1, 1], "chunk_timeout": 5}
    np.testing.assert_array_equal(di.predict(net, X, restart_workers=True, **how), 2 * X)
    wait_until(lambda: len(fetch_workers(foreign)) == 2, 60)
    assert len(before & set(foreign.run(os.getpid).values())) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("weights", [[1, 1], [1, 0]])
def test_no_worker_is_left(foreign: Client, tmp_path: Path, weights: list[int]) -> None:
    """If every worker with a share hangs and none may be restarted, the call fails with that message."""
    net = faulty.make_model(tmp_path, faulty.sleep, [250])
    with pytest.raises(ClusterError, match=r"lost all workers \(.+\) while rows were still to be computed"):
        di.predict(net, X, client=foreign, batch_size=CHUNK_ROWS, device_weights=weights, chunk_timeout=0.5)


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_device_that_does_not_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunks of a device whose nanny died go to the other device, whatever its share was."""
    monkeypatch.setattr(window, "MAX_MISSING_SECONDS", 1.0)

    def ended_with_its_nanny(value: float) -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    net = faulty.make_model(tmp_path, ended_with_its_nanny, [150], times=1)
    y, report = di.predict(net, X, devices=["cpu", "cpu"], batch_size=CHUNK_ROWS, device_weights=[3, 1], return_report=True)
    di.close()
    np.testing.assert_array_equal(y, 2 * X)
    assert max(device.n_rows for device in report.devices) > 3 * len(X) / 4
