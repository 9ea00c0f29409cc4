"""Ctrl-C and SIGTERM: chunks in flight finish, a second signal stops at once, and only the caller is told."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

import daskinfer as di
from daskinfer.cluster import nanny
from daskinfer.errors import Interrupted
from daskinfer.execution.signals import StopNow, drain_on_signal
from tests.conftest import wait_until

SCRIPT = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as without coverage, which has a handler of its own
import numpy as np
import daskinfer as di

folder, devices, seconds = sys.argv[1], sys.argv[2].split(","), float(sys.argv[3])

def model(batch):
    if batch.max() > 1:  # not the made-up rows
        open(f"{folder}/{os.getpid()}-{batch.max():g}", "w").close()
        time.sleep(seconds)
    return 2 * batch

x = np.arange(1.0, 401.0)
try:
    di.predict(model, x, devices=devices[0] if len(devices) == 1 else devices, device_weights="even", batch_size=10)
except di.errors.Interrupted as error:
    y, done = error.partial
    right = bool((y[done] == 2 * x[done]).all())
    print(f"{type(error).__name__} {error.signal_number} {done.sum()} {right} {isinstance(error, KeyboardInterrupt)}")
    sys.exit(128 + error.signal_number)
print("all")
"""


class Script:
    """A user's script in its own process group, and the files that it wrote into a folder."""

    def __init__(self, folder: Path, devices: str, seconds: float) -> None:
        self.folder = folder / "started"
        self.folder.mkdir()
        path = folder / "script.py"
        path.write_text(SCRIPT)
        command = [sys.executable, str(path), str(self.folder), devices, str(seconds)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def count_started(self) -> int:
        """Count the micro-batches that were started."""
        return len(list(self.folder.iterdir()))

    def count_nannies(self) -> int:
        """Count the processes that it started for workers; importing torch briefly starts others."""
        commands = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                commands.append(child.cmdline())
        return sum(nanny._BOOTSTRAP_CODE in command for command in commands)

    def send_signal(self, number: int) -> None:
        """Signal the whole process group, as a terminal does, and the workers, as a batch system does."""
        children = {int(file.name.split("-")[0]) for file in self.folder.iterdir()} - {self.process.pid}
        os.killpg(self.process.pid, number)
        for child in children if number == signal.SIGINT else ():
            os.kill(child, number)

    def wait(self) -> tuple[int, list[str], str]:
        """Wait for its end; return its exit code, the words that it printed, and its stderr."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out.split(), err


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["inline", "cpu,cpu"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains(tmp_path: Path, devices: str, number: int) -> None:
    """predict raises Interrupted with the rows that are done once chunks in flight have finished; workers print nothing."""
    script = Script(tmp_path, devices, seconds=0.2)
    wait_until(lambda: script.count_started() > 1, 60)
    script.send_signal(number)
    code, words, err = script.wait()
    assert (code, words[:2], words[3:]) == (128 + number, ["Interrupted", str(number.value)], ["True", "True"])
    assert int(words[2]) == 10 * script.count_started()
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["inline", "cpu,cpu"])
def test_a_second_signal_stops_at_once(tmp_path: Path, devices: str) -> None:
    """Chunks in flight are not waited for any more, whether this process or workers compute them."""
    script = Script(tmp_path, devices, seconds=30.0)
    wait_until(lambda: script.count_started() >= 1, 60)
    began = time.monotonic()
    script.send_signal(signal.SIGINT)
    time.sleep(0.2)  # two signals at the same time are delivered as one
    script.send_signal(signal.SIGINT)
    code, words, _ = script.wait()
    assert time.monotonic() - began < 20
    assert (code, words) == (130, ["Interrupted", "2", "0", "True", "True"])


@pytest.mark.parametrize("n_nannies", [1, 2])
def test_a_signal_while_workers_start_is_enough(tmp_path: Path, n_nannies: int) -> None:
    """Nothing is in flight yet: the call ends at once, and neither workers nor Dask print anything."""
    script = Script(tmp_path, "cpu,cpu", seconds=30.0)
    wait_until(lambda: script.count_nannies() >= n_nannies, 60)
    began = time.monotonic()
    script.send_signal(signal.SIGINT)
    code, words, err = script.wait()
    assert time.monotonic() - began < 20
    assert (code, words) == (130, ["Interrupted", "2", "0", "True", "True"])
    assert err == "SIGINT received before any chunk was submitted; shutting down workers\n"


def send_self(number: int) -> None:
    """Send this process a signal, and let its handler run."""
    os.kill(os.getpid(), number)
    for _ in range(1000):
        pass


@pytest.fixture
def default_handlers() -> Iterator[None]:
    """Install the default handlers, and check that they are still installed after the test."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}  # coverage ends this process
    yield
    after = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert after == defaults


@pytest.fixture
def run(default_handlers: None) -> SimpleNamespace:
    """Stand in for a run that has submitted a chunk."""
    return SimpleNamespace(draining=False, started_at=1.0)


def test_a_signal_before_the_first_chunk_is_raised_at_once(run: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    """If nothing is in flight, the call ends at once, and a log line covers the seconds that workers take to shut down."""
    run.started_at = None

    def call() -> None:
        with drain_on_signal(run):
            send_self(signal.SIGINT)
            raise AssertionError("it continued")

    with pytest.raises(Interrupted, match=r"^Ctrl-C ended the call before all rows had an output\.$") as caught:
        call()
    assert caught.value.__suppress_context__
    assert caplog.messages == ["SIGINT received before any chunk was submitted; shutting down workers"]


def test_without_a_signal_nothing_is_raised(run: SimpleNamespace) -> None:
    """A call that is not interrupted ends normally."""
    with drain_on_signal(run):
        pass
    assert not run.draining


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_the_first_signal_is_raised_at_the_end(
    run: SimpleNamespace, number: int, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The run is drained, continues, says how to abort it, and raises when it has ended."""
    continued: list[bool] = []

    def call() -> None:
        with drain_on_signal(run):
            send_self(number)
            continued.append(run.draining)

    with pytest.raises(Interrupted, match=rf"^{name} ended the call before all rows had an output\.$") as caught:
        call()
    assert continued == [True]
    assert caught.value.signal_number == number
    signal_name = signal.Signals(number).name
    assert caplog.messages == [f"{signal_name} received: finishing in-flight chunks; send it again to abort"]


def test_the_second_signal_is_not_taken_for_an_error_of_rows(run: SimpleNamespace) -> None:
    """No handler of exceptions catches it, and the caller gets Interrupted."""
    assert not issubclass(StopNow, Exception)

    def call() -> None:
        with drain_on_signal(run):
            for _ in range(3):
                with contextlib.suppress(Exception):
                    send_self(signal.SIGINT)
        pytest.fail("caught on the way")

    with pytest.raises(Interrupted, match="Ctrl-C"):
        call()


def test_a_handler_of_the_programs_own_stays(run: SimpleNamespace) -> None:
    """If the program handles a signal itself, the call does not."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    with drain_on_signal(run):
        send_self(signal.SIGTERM)
    assert (received, run.draining) == ([signal.SIGTERM], False)
    signal.signal(signal.SIGTERM, before)


def test_in_another_thread_signals_are_not_touched() -> None:
    """Only the main thread may handle signals: a call in another thread leaves the handlers alone."""
    observed: list[Any] = []

    def call() -> None:
        with drain_on_signal(SimpleNamespace(draining=False, started_at=1.0)):
            observed.append(signal.getsignal(signal.SIGINT))
        observed.append(di.predict(np.negative, np.arange(5.0), devices="inline"))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert observed[0] is signal.default_int_handler
    np.testing.assert_array_equal(observed[1], -np.arange(5.0))


@pytest.mark.usefixtures("default_handlers")
def test_no_workers_start_while_draining(monkeypatch: pytest.MonkeyPatch) -> None:
    """An automatic call that is interrupted in this process does not start workers only to shut them down."""
    monkeypatch.setattr("daskinfer.execution.executor_choice.open_client", None)  # starting them would fail

    def model(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if batch.max() > 100:
            send_self(signal.SIGINT)
        return batch

    with pytest.raises(Interrupted, match="Ctrl-C") as caught:
        di.predict(model, np.arange(5000.0), batch_size=10)
    assert caught.value.partial is not None
    y, done = caught.value.partial
    assert 0 < done.sum() < 5000
    assert np.isnan(y[~done]).all()
    note = f"{done.sum():,} of 5,000 rows have an output: .partial.output, where .partial.done is True."
    assert caught.value.__notes__ == [note]


@pytest.mark.parametrize("fill_value", [None, -1])
def test_missing_outputs_of_a_dtype_without_nan(fill_value: int | None) -> None:
    """Whatever the dtype can hold, the error that ended the call is the one that is raised."""

    def model(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if 99 in batch:
            raise ValueError("ninety-nine")
        return batch

    x = np.arange(100, dtype=np.uint8)
    with pytest.raises(di.DaskInferError, match="ninety-nine") as caught:
        di.predict(model, x, devices="inline", batch_size=10, retries=0, output=x[:0], fill_value=fill_value)
    assert caught.value.partial is not None
    y, done = caught.value.partial
    np.testing.assert_array_equal(y, np.where(done, x, 0))
    assert done.any()


@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_chunk_interrupts_nothing(number: int) -> None:
    """If all rows have their output by then, the call returns it."""

    def signals_last(rows: np.ndarray) -> np.ndarray:
        if 99 in rows:
            os.kill(os.getpid(), number)
        return rows

    x = np.arange(100.0)
    y = di.predict(signals_last, x, devices="inline", batch_size=10, output=x[:0])
    np.testing.assert_array_equal(y, x)
