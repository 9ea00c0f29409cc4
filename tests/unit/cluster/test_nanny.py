from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import psutil
import pytest
from distributed import Client, Scheduler

from daskinfer.cluster import nanny
from daskinfer.cluster.nanny import NannyProcess
from daskinfer.cluster.worker_spec import LOOPBACK

OPTIONS: dict[str, Any] = {"name": "one", "nthreads": 1, "host": LOOPBACK, "memory_limit": 0, "silence_logs": 40}


def with_scheduler(story: Callable[[Scheduler], Awaitable[None]]) -> None:
    """Run a test's coroutine with a scheduler that closes after it."""

    async def run() -> None:
        async with Scheduler(host=LOOPBACK, port=0, dashboard=False, dashboard_address=f"{LOOPBACK}:0") as scheduler:
            await asyncio.wait_for(story(scheduler), 60)

    asyncio.run(run())


async def on_worker(scheduler: Scheduler, function: Callable[[], Any]) -> Any:
    """Run ``function()`` in the only worker and return its result."""
    async with Client(scheduler.address, asynchronous=True, set_as_default=False) as client:
        (result,) = (await client.run(function)).values()
        return result


def read_worker_settings() -> dict[str, Any]:
    """Read a worker's settings; the imports are local, so that the worker need not import this file."""
    import multiprocessing
    import os
    import signal
    import sys

    import dask

    return {
        "given": os.environ.get("NANNY_TEST_GIVEN"),
        "unset": os.environ.get("NANNY_TEST_UNSET"),
        "path": sys.path,
        "config": {key: dask.config.get(key, None) for key in ("nanny-test", "scheduler")},
        "main": getattr(sys.modules["__main__"], "__file__", None),
        "interrupt": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
        "daemon": multiprocessing.current_process().daemon,
        "group": os.getpgid(0),
    }


def test_a_worker_starts_with_the_clients_path_configuration_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It inherits path, configuration and variables, but not the current Dask client, and the script does not run."""
    monkeypatch.setenv("NANNY_TEST_UNSET", "1")
    monkeypatch.syspath_prepend(tmp_path)
    seen: dict[str, Any] = {}

    async def story(scheduler: Scheduler) -> None:
        environment = {"NANNY_TEST_GIVEN": "here", "NANNY_TEST_UNSET": None}
        with dask.config.set({"nanny-test": 7, "scheduler": "dask.distributed"}):
            nanny = NannyProcess(scheduler.address, environment=environment, **OPTIONS)
            await nanny
        assert nanny.is_running
        seen.update(await on_worker(scheduler, read_worker_settings))
        await nanny.close()
        assert not nanny.is_running
        assert nanny.list_processes() == []

    with_scheduler(story)
    assert (seen["given"], seen["unset"], seen["main"]) == ("here", None, None)
    assert str(tmp_path) in seen["path"]
    assert seen["config"] == {"nanny-test": 7, "scheduler": None}
    assert (seen["interrupt"], seen["daemon"]) == (True, True)
    assert seen["group"] != os.getpgid(0)


def test_files_in_the_working_directory_do_not_replace_pythons_modules(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random.py beside the data breaks no worker unless it breaks the client."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    (in_folder / "random.py").write_text("raise ImportError('the wrong random')\n")

    async def story(scheduler: Scheduler) -> None:
        nanny = NannyProcess(scheduler.address, **OPTIONS)
        await nanny
        await nanny.close()

    with_scheduler(story)


def test_interrupting_every_process_ends_none(capfd: pytest.CaptureFixture[str]) -> None:
    """Only the client handles Ctrl-C: nanny and worker ignore it and print nothing."""

    async def story(scheduler: Scheduler) -> None:
        nanny = NannyProcess(scheduler.address, **OPTIONS)
        await nanny
        workers = [p for p in nanny.list_processes() if "resource_tracker" not in " ".join(p.cmdline())]
        assert len(workers) == 2
        for process in workers:
            process.send_signal(signal.SIGINT)
        assert (await on_worker(scheduler, os.getpid)) in {p.pid for p in workers}
        await nanny.close()

    with_scheduler(story)
    assert capfd.readouterr().err == ""


BROKEN = "import os\nraise RuntimeError('broken on purpose')"
FAILURES: dict[str, dict[str, Any]] = {
    "the worker one did not start: RuntimeError: broken on purpose": {"preload_nanny": [BROKEN]},
    "the worker one did not start within 0.01 s": {"start_timeout": 0.01},
    "the worker one did not start: TypeError": {"no_such_option": 1, "worker_class": dict},
}


@pytest.mark.parametrize("message", FAILURES)
def test_a_start_that_fails_says_why_and_leaves_no_process(message: str) -> None:
    """Any error between the first process and the worker's registration stops both processes."""

    async def story(scheduler: Scheduler) -> None:
        nanny = NannyProcess(scheduler.address, **{**OPTIONS, **FAILURES[message]})
        with pytest.raises(RuntimeError, match=message):
            await nanny
        assert not nanny.is_running

    with_scheduler(story)


def test_a_process_that_dies_at_once_is_a_failed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python that cannot start raises an error at once."""
    monkeypatch.setattr(nanny, "_BOOTSTRAP_CODE", "raise SystemExit(3)")

    async def story(scheduler: Scheduler) -> None:
        with pytest.raises(RuntimeError, match="its process exited; see its log on stderr"):
            await NannyProcess(scheduler.address, **OPTIONS)

    with_scheduler(story)


@pytest.mark.parametrize("received", [b"", b"null\n", b"null\n" + (100).to_bytes(8, "little") + b"not all"])
def test_a_nanny_whose_client_exits_early_prints_nothing(received: bytes) -> None:
    """A nanny whose client is killed before it has sent all options exits silently."""
    command = [sys.executable, "-P", "-c", nanny._BOOTSTRAP_CODE]
    done = subprocess.run(command, input=received, capture_output=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_a_client_that_exits_while_the_worker_starts_stops_it() -> None:
    """The nanny does not wait for a start that no client needs."""
    import socket

    with socket.create_server((LOOPBACK, 0)) as deaf:
        scheduler = f"tcp://{LOOPBACK}:{deaf.getsockname()[1]}"
        message = NannyProcess(scheduler, **OPTIONS)._encode_message()
        command = [sys.executable, "-P", "-c", nanny._BOOTSTRAP_CODE]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdin is not None and process.stderr is not None
            process.stdin.write(message)
            process.stdin.flush()
            deaf.settimeout(30)
            with deaf.accept()[0]:
                process.stdin.close()
                assert process.wait(10) == 0
            assert process.stderr.read() == b""


def test_killing_spares_pythons_resource_tracker() -> None:
    """Semaphores of killed processes are files in shared memory, which the tracker removes if it outlives them."""
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(sleeping) as killed, subprocess.Popen([*sleeping, "resource_tracker"]) as spared:
        nanny.kill_processes([psutil.Process(killed.pid), psutil.Process(spared.pid)])
        assert killed.wait(10) == -signal.SIGKILL
        nanny.kill_processes([psutil.Process(killed.pid)] if psutil.pid_exists(killed.pid) else [])
        assert spared.poll() is None
        spared.kill()


def test_a_nanny_that_does_not_respond_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the grace period, closing kills a stopped nanny and its worker."""
    monkeypatch.setattr(nanny, "GRACE_SECONDS", 0.1)

    async def story(scheduler: Scheduler) -> None:
        nanny = NannyProcess(scheduler.address, **OPTIONS)
        await nanny
        assert nanny.process is not None
        os.kill(nanny.process.pid, signal.SIGSTOP)
        began = time.monotonic()
        await nanny.close()
        assert time.monotonic() - began < 5
        await nanny.close()

    with_scheduler(story)


def test_the_module_path_travels_ahead_of_all_that_has_to_be_imported() -> None:
    """The first line is the module path as JSON; the rest is preceded by its length."""
    path, rest = NannyProcess("tcp://nowhere:1", **OPTIONS)._encode_message().split(b"\n", 1)
    assert path.startswith(b"[")
    assert len(rest) == 8 + int.from_bytes(rest[:8], "little")
    assert cloudpickle.loads(rest[8:])["options"] == OPTIONS
