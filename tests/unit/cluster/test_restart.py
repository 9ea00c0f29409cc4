"""Workers that are ended for a fault: whose they are, and what becomes of the chunks that hung there."""

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


class Restarts:
    """A client whose cluster restarts workers, or says why not."""

    def __init__(self, answer: str) -> None:
        self.answer = answer
        self.asked: list[str] = []

    def restart_workers(self, addresses: list[str], **_: Any) -> dict[str, str]:
        self.asked += addresses
        return dict.fromkeys(addresses, self.answer)


@pytest.fixture
def noted(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands still, noted as the one of cpu:0."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path(tmp_path, "cpu:0.pid").write_text(f"{process.pid} {psutil.Process(process.pid).create_time()}")
    process.send_signal(signal.SIGSTOP)
    yield process
    process.kill()
    process.wait()


def test_a_worker_notes_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of our own leaves its number and when it began in its cluster's folder; others leave nothing."""
    write_pid_file()
    monkeypatch.setenv(env.SCRATCH, str(tmp_path))
    write_pid_file()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(env.DEVICE, "cpu:0")
    write_pid_file()
    assert [path.name for path in tmp_path.iterdir()] == ["cpu:0.pid"]
    number, since = Path(tmp_path, "cpu:0.pid").read_text().split()
    assert (int(number), float(since)) == (os.getpid(), psutil.Process().create_time())


def test_a_worker_of_ours_is_killed(tmp_path: Path, noted: subprocess.Popen[bytes]) -> None:
    """Its process ends though it stands still, and one that has ended already is as good as replaced."""
    replacer = WorkerRestarter(Restarts("no"), {"cpu:0": str(tmp_path)}, allow_external=False)
    assert replacer.restart_worker("cpu:0", "tcp://a")
    assert noted.wait(10) == -signal.SIGKILL
    assert replacer.restart_worker("cpu:0", "tcp://a")


def test_another_process_of_the_same_number_is_left_alone(tmp_path: Path, noted: subprocess.Popen[bytes]) -> None:
    """A number that the system gave to another process since is nobody's worker."""
    Path(tmp_path, "cpu:0.pid").write_text(f"{noted.pid} 1.0")
    assert WorkerRestarter(Restarts("no"), {"cpu:0": str(tmp_path)}, allow_external=False).restart_worker("cpu:0", "tcp://a")
    assert noted.poll() is None


@pytest.mark.parametrize("folders", [{}, {"0": ""}, {"0": "/nonexistent"}])
@pytest.mark.parametrize(
    ("allowed", "address", "answer", "replaced"),
    [
        (False, "tcp://a", "OK", False),
        (True, "tcp://a", "OK", True),
        (True, "tcp://a", "timed out", False),
        (True, None, "OK", False),
    ],
)
def test_workers_of_others(folders: dict[str, str], allowed: bool, address: str | None, answer: str, replaced: bool) -> None:
    """Their cluster restarts them where that is allowed; nothing else is done to them."""
    client = Restarts(answer)
    assert WorkerRestarter(client, folders, allow_external=allowed).restart_worker("0", address) is replaced
    assert client.asked == ([address] if allowed and address else [])


# Real workers


@pytest.fixture
def cpus() -> Iterator[dict[str, Any]]:
    """Two workers of our own, which a test may end."""
    yield {"devices": ["cpu", "cpu"], "device_weights": "even", "batch_size": CHUNK_ROWS, "return_report": True}
    di.close()


@pytest.mark.parametrize(
    "act",
    [
        faulty.sleeps,
        pytest.param(faulty.holds_the_gil, marks=pytest.mark.slow),
        pytest.param(faulty.stopped, marks=pytest.mark.slow),
    ],
)
def test_a_chunk_that_hangs_gets_another_worker(cpus: dict[str, Any], tmp_path: Path, act: Any) -> None:
    """A worker that sleeps, holds the GIL or was stopped is noticed within 5 s and replaced, and its chunk done."""
    di.predict(np.negative, X, **cpus)
    told: list[Event] = []
    net = faulty.network(tmp_path, act, [1234], times=1)
    y, report = di.predict(net, X, chunk_timeout=3, progress=told.append, **cpus)
    (replaced,) = (event for event in told if isinstance(event, DeviceChanged))
    began = max(e.at for e in told if isinstance(e, ChunkStarted) and e.start <= 1234 < e.stop and e.at < replaced.at)
    assert replaced.state == "replaced"
    assert 3 <= replaced.at - began < 5
    np.testing.assert_array_equal(y, 2 * X)
    assert report.failures == ()
    assert not psutil.pid_exists(faulty.acted(tmp_path)[0])


@pytest.mark.slow
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_chunk_that_always_hangs(cpus: dict[str, Any], tmp_path: Path, on_error: str) -> None:
    """It is given up once it hung alone twice, and all others are right."""
    net = faulty.network(tmp_path, faulty.sleeps, [1234])
    if on_error == "raise":
        with pytest.raises(ChunkTimeout, match=r"chunk \d+ \(rows 1\d\d\d:\d+\) gave no answer within chunk_timeout=1 s"):
            di.predict(net, X, chunk_timeout=1, **cpus)
        return
    y, report = di.predict(net, X, chunk_timeout=1, on_error="skip", **cpus)
    (failure,) = report.failures
    assert failure.start <= 1234 < failure.stop
    np.testing.assert_array_equal(y, np.where((failure.start <= X) & (failure.stop > X), np.nan, 2 * X))
    assert len(faulty.acted(tmp_path)) == 3


def test_a_reader_who_pauses_is_not_a_chunk_that_hangs(two_cpus: list[str], tmp_path: Path) -> None:
    """Answers that were there while the stream's reader did something else for long do not count as late."""
    net = faulty.network(tmp_path, faulty.killed, [])
    how: dict[str, Any] = {"devices": two_cpus, "device_weights": "even", "batch_size": 10}
    di.predict(net, X, **how)  # its first chunk takes longer, on a machine under load too long
    before = _processes()
    for i, block in enumerate(di.stream(net, X, chunk_timeout=2.0, **how)):
        assert len(block)
        if i in (3, 9):
            time.sleep(3.0)  # what is tested: longer than a chunk may take
    assert _processes() == before


def _processes() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks around every 0.2 s."""
    monkeypatch.setattr(window, "WORKER_CHECK_SECONDS", 0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("reads", [True, False])
def test_a_worker_of_others_that_dies(foreign: Client, tmp_path: Path, reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its nanny brings it back under another address, and every row is right, also where rows were sent to it."""
    if not reads:
        monkeypatch.setattr("daskinfer.cluster.preflight.advertise_process_memory", lambda: None)
        monkeypatch.setattr("daskinfer.transport.shared_memory.can_attach", lambda ref: False)
    net = faulty.network(tmp_path, faulty.killed, [1234], times=1, seconds=0.01)
    y, report = di.predict(net, X, client=foreign, batch_size=CHUNK_ROWS, device_weights=[1, 1], return_report=True)
    np.testing.assert_array_equal(y, 2 * X)
    assert report.failures == ()
    wait_until(lambda: len(fetch_workers(foreign)) == 2, 60)


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_worker_of_others_that_dies_in_a_later_call(foreign: Client, tmp_path: Path) -> None:
    """Where all workers had the network nothing was sent; the one in place of the dead gets it all the same."""
    net = faulty.network(tmp_path, faulty.killed, [1234], times=1, seconds=0.01)
    how: dict[str, Any] = {"client": foreign, "batch_size": CHUNK_ROWS, "device_weights": [1, 1]}
    di.predict(net, X[: 4 * CHUNK_ROWS], **how)
    np.testing.assert_array_equal(di.predict(net, X, **how), 2 * X)
    assert len(faulty.acted(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_worker_of_others_that_hangs_is_left_alone(foreign: Client, tmp_path: Path) -> None:
    """Unless it is allowed nobody restarts it, and the other worker does its chunks."""
    before = foreign.run(os.getpid)
    net = faulty.network(tmp_path, faulty.sleeps, [1234], times=1)
    how = {"client": foreign, "batch_size": CHUNK_ROWS, "device_weights": [1, 1], "chunk_timeout": 1}
    np.testing.assert_array_equal(di.predict(net, X, **how), 2 * X)
    assert foreign.run(os.getpid) == before


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_worker_of_others_is_restarted_where_that_is_allowed(foreign: Client, tmp_path: Path) -> None:
    """With ``restart_workers`` its cluster gives it another process."""
    before = set(foreign.run(os.getpid).values())
    net = faulty.network(tmp_path, faulty.sleeps, [1234], times=1)
    how = {"client": foreign, "batch_size": CHUNK_ROWS, "device_weights": [1, 1], "chunk_timeout": 5}
    np.testing.assert_array_equal(di.predict(net, X, restart_workers=True, **how), 2 * X)
    wait_until(lambda: len(fetch_workers(foreign)) == 2, 60)
    assert len(before & set(foreign.run(os.getpid).values())) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("weights", [[1, 1], [1, 0]])
def test_no_worker_is_left(foreign: Client, tmp_path: Path, weights: list[int]) -> None:
    """Where every worker that has a share hangs, and none may be restarted, the call ends and says so."""
    net = faulty.network(tmp_path, faulty.sleeps, [250])
    with pytest.raises(ClusterError, match=r"no worker is left of .*, with rows still to compute"):
        di.predict(net, X, client=foreign, batch_size=CHUNK_ROWS, device_weights=weights, chunk_timeout=0.5)


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_device_that_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose nanny ended hands its chunks to the other, whatever share it was given."""
    monkeypatch.setattr(window, "MAX_MISSING_SECONDS", 1.0)

    def ended_with_its_nanny(value: float) -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    net = faulty.network(tmp_path, ended_with_its_nanny, [150], times=1)
    y, report = di.predict(net, X, devices=["cpu", "cpu"], batch_size=CHUNK_ROWS, device_weights=[3, 1], return_report=True)
    di.close()
    np.testing.assert_array_equal(y, 2 * X)
    assert max(device.n_rows for device in report.devices) > 3 * len(X) / 4
