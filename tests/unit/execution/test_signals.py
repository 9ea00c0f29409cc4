"""Ctrl-C and SIGTERM: what is in flight ends, twice stops at once, and nobody but the caller hears of it."""

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
    """A script of a user's in a process group of its own, and what it left in a folder."""

    def __init__(self, folder: Path, devices: str, seconds: float) -> None:
        self.folder = folder / "begun"
        self.folder.mkdir()
        path = folder / "script.py"
        path.write_text(SCRIPT)
        command = [sys.executable, str(path), str(self.folder), devices, str(seconds)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def n_begun(self) -> int:
        """Micro-batches that were begun."""
        return len(list(self.folder.iterdir()))

    def n_nannies(self) -> int:
        """Processes that it started for workers; importing torch starts others for a moment."""
        commands = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                commands.append(child.cmdline())
        return sum(nanny._BOOTSTRAP_CODE in command for command in commands)

    def signalled(self, number: int) -> None:
        """Send it to the whole process group, as a terminal does, and to the workers, as a batch system does."""
        children = {int(file.name.split("-")[0]) for file in self.folder.iterdir()} - {self.process.pid}
        os.killpg(self.process.pid, number)
        for child in children if number == signal.SIGINT else ():
            os.kill(child, number)

    def ended(self) -> tuple[int, list[str], str]:
        """Its exit code, the words of what it printed, and its stderr."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out.split(), err


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["inline", "cpu,cpu"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains(tmp_path: Path, devices: str, number: int) -> None:
    """predict raises Interrupted with what is done once what was in flight has ended, and workers print nothing."""
    script = Script(tmp_path, devices, seconds=0.2)
    wait_until(lambda: script.n_begun() > 1, 60)
    script.signalled(number)
    code, words, err = script.ended()
    assert (code, words[:2], words[3:]) == (128 + number, ["Interrupted", str(number.value)], ["True", "True"])
    assert int(words[2]) == 10 * script.n_begun()
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["inline", "cpu,cpu"])
def test_a_second_signal_stops_at_once(tmp_path: Path, devices: str) -> None:
    """What is in flight is not waited for any more, whether it is computed here or by workers."""
    script = Script(tmp_path, devices, seconds=30.0)
    wait_until(lambda: script.n_begun() >= 1, 60)
    began = time.monotonic()
    script.signalled(signal.SIGINT)
    time.sleep(0.2)  # two signals that come together are one
    script.signalled(signal.SIGINT)
    code, words, _ = script.ended()
    assert time.monotonic() - began < 20
    assert (code, words) == (130, ["Interrupted", "2", "0", "True", "True"])


@pytest.mark.parametrize("n_nannies", [1, 2])
def test_a_signal_while_workers_start_is_enough(tmp_path: Path, n_nannies: int) -> None:
    """Nothing is in flight yet: the call ends at once, and neither workers nor Dask say a word."""
    script = Script(tmp_path, "cpu,cpu", seconds=30.0)
    wait_until(lambda: script.n_nannies() >= n_nannies, 60)
    began = time.monotonic()
    script.signalled(signal.SIGINT)
    code, words, err = script.ended()
    assert time.monotonic() - began < 20
    assert (code, words) == (130, ["Interrupted", "2", "0", "True", "True"])
    assert err == "SIGINT: no chunk is on its way yet; what was started is ended\n"


def sent(number: int) -> None:
    """Send this process a signal, and let its handler run."""
    os.kill(os.getpid(), number)
    for _ in range(1000):
        pass


@pytest.fixture
def usual_handlers() -> Iterator[None]:
    """Signals are handled as where nobody has asked for anything else; handlers are as they were afterwards."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}  # coverage ends this process
    yield
    found = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert found == usual


@pytest.fixture
def run(usual_handlers: None) -> SimpleNamespace:
    """What is asked to begin nothing more."""
    return SimpleNamespace(draining=False, began=1.0)


def test_a_signal_before_the_first_chunk_is_raised_at_once(run: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    """Where nothing is in flight there is nothing to wait for; that workers take seconds to end is said meanwhile."""
    run.began = None

    def call() -> None:
        with drain_on_signal(run):
            sent(signal.SIGINT)
            raise AssertionError("it went on")

    with pytest.raises(Interrupted, match=r"^Ctrl-C ended the call before all rows had an answer") as caught:
        call()
    assert caught.value.__suppress_context__
    assert caplog.messages == ["SIGINT: no chunk is on its way yet; what was started is ended"]


def test_without_a_signal_nothing_is_raised(run: SimpleNamespace) -> None:
    """A call that nobody interrupts ends as it would."""
    with drain_on_signal(run):
        pass
    assert not run.draining


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_the_first_signal_is_raised_at_the_end(run: SimpleNamespace, number: int, name: str) -> None:
    """The call is asked to begin nothing more, goes on, and raises when it has ended."""
    went_on: list[bool] = []

    def call() -> None:
        with drain_on_signal(run):
            sent(number)
            went_on.append(run.draining)

    with pytest.raises(Interrupted, match=f"^{name} ended the call before all rows had an answer") as caught:
        call()
    assert went_on == [True]
    assert caught.value.signal_number == number


def test_the_second_signal_is_none_of_the_rows_fault(run: SimpleNamespace) -> None:
    """It passes whoever catches exceptions on the way, and is Interrupted outside."""
    assert not issubclass(StopNow, Exception)

    def call() -> None:
        with drain_on_signal(run):
            for _ in range(3):
                with contextlib.suppress(Exception):
                    sent(signal.SIGINT)
        pytest.fail("caught on the way")

    with pytest.raises(Interrupted, match="Ctrl-C"):
        call()


def test_a_handler_of_the_programs_own_stays(run: SimpleNamespace) -> None:
    """Where the program handles a signal itself, the call does not."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    with drain_on_signal(run):
        sent(signal.SIGTERM)
    assert (came, run.draining) == ([signal.SIGTERM], False)
    signal.signal(signal.SIGTERM, before)


def test_in_another_thread_signals_are_not_touched() -> None:
    """Only the main thread may handle signals: elsewhere a call runs without."""
    found: list[Any] = []

    def call() -> None:
        with drain_on_signal(SimpleNamespace(draining=False, began=1.0)):
            found.append(signal.getsignal(signal.SIGINT))
        found.append(di.predict(np.negative, np.arange(5.0), devices="inline"))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert found[0] is signal.default_int_handler
    np.testing.assert_array_equal(found[1], -np.arange(5.0))


@pytest.mark.usefixtures("usual_handlers")
def test_a_device_that_may_be_added_is_not_while_draining(monkeypatch: pytest.MonkeyPatch) -> None:
    """An automatic call that is interrupted in this process starts no workers to end with."""
    monkeypatch.setattr("daskinfer.execution.run.opened", None)  # opening would fail

    def model(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if batch.max() > 100:
            sent(signal.SIGINT)
        return batch

    with pytest.raises(Interrupted, match="Ctrl-C") as caught:
        di.predict(model, np.arange(5000.0), batch_size=10)
    assert caught.value.partial is not None
    y, done = caught.value.partial
    assert 0 < done.sum() < 5000
    assert np.isnan(y[~done]).all()
    assert caught.value.__notes__ == [f"{done.sum():,} of 5,000 rows have an answer: .partial.answer, where .partial.done."]


@pytest.mark.parametrize("fill_value", [None, -1])
def test_what_stands_in_for_answers_that_cannot_be_nan(fill_value: int | None) -> None:
    """Whatever the dtype holds, the error that ended the call is the one that is raised."""

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


@pytest.mark.usefixtures("usual_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_chunk_interrupts_nothing(number: int) -> None:
    """Where all rows have their answer by then, the call gives it."""

    def signals_last(rows: np.ndarray) -> np.ndarray:
        if 99 in rows:
            os.kill(os.getpid(), number)
        return rows

    x = np.arange(100.0)
    y = di.predict(signals_last, x, devices="inline", batch_size=10, output=x[:0])
    np.testing.assert_array_equal(y, x)
