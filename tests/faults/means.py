"""What a scenario breaks things with: groups of processes, Dask clusters of others, limits of memory, small disks.

Each is a context manager that takes everything back, however it is left.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from daskinfer.cluster.nanny import kill_processes
from tests.benchmarks.processes import ROOT, Failed, Unavailable

MARK = "CHAOS_MARK"  # variable: all that a process starts, and whatever that starts, has it too
PYTHON = sys.executable
START_SECONDS = 60.0
TRACKER_SECONDS = 10.0  # arbitrary; they need a moment
_MEMORY = Path("/sys/fs/cgroup/memory")
_UNIFIED = Path("/sys/fs/cgroup")


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> float:
    """Poll until it holds; how long that took. Failed where it does not within ``seconds``."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise Failed(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)
    return time.monotonic() - began


def environment(**more: str) -> dict[str, str]:
    """This process's, with the checkout on the path."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def marked(mark: str) -> list[psutil.Process]:
    """Every process that has this mark in its environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@contextlib.contextmanager
def started(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group and a session of its own; all that is left is killed at the end."""
    mark, temporary = uuid.uuid4().hex, log.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**environment(), "TMPDIR": str(temporary), **(env or {}), MARK: mark},
            start_new_session=True,
            cwd=log.parent,
        )
    process.mark = mark  # type: ignore[attr-defined]  # for who looks whether anything is left
    try:
        yield process
    finally:
        _end(mark)
        process.wait()


def _end(mark: str) -> None:
    """Kill all processes of a mark; Python's trackers of semaphores first get time to remove those of the killed."""
    kill_processes(marked(mark))
    deadline = time.monotonic() + TRACKER_SECONDS
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def run_command(
    *arguments: str, folder: Path, env: Mapping[str, str] | None = None, seconds: float = 240
) -> tuple[int, str]:
    """``daskinfer`` with these arguments: its exit code, and all that it printed."""
    log = folder / f"command-{uuid.uuid4().hex[:8]}.log"
    with started([PYTHON, "-m", "daskinfer.cli.main", *arguments], log, env) as process:
        wait_until(lambda: process.poll() is not None, seconds, f"daskinfer {arguments[0]}")
    return process.returncode, log.read_text(errors="replace")


@contextlib.contextmanager
def scheduler(folder: Path, host: str = "127.0.0.1", port: int = 0) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A ``dask scheduler``, and its address."""
    file = folder / f"scheduler-{uuid.uuid4().hex[:8]}.json"
    command = [PYTHON, "-m", "distributed.cli.dask_scheduler", "--host", host, "--port", str(port), "--no-dashboard"]
    with started([*command, "--scheduler-file", str(file)], folder / "scheduler.log") as process:
        wait_until(file.exists, START_SECONDS, "the scheduler")
        import json

        wait_until(lambda: file.read_text().rstrip().endswith("}"), START_SECONDS, "the scheduler's file")
        yield process, json.loads(file.read_text())["address"]


@contextlib.contextmanager
def worker(
    address: str,
    folder: Path,
    name: str,
    *,
    before: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    nanny: bool = True,
) -> Iterator[subprocess.Popen[bytes]]:
    """A ``dask worker`` of one thread; ``before`` goes in front of its command."""
    how = ["--nthreads", "4", "--name", name, "--no-dashboard", "--local-directory", str(folder), "--memory-limit", "0"]
    command = [*before, PYTHON, "-m", "distributed.cli.dask_worker", address, *how, *(() if nanny else ("--no-nanny",))]
    with started(command, folder / f"{name}.log", env) as process:
        yield process


def await_workers(address: str, n: int, seconds: float = START_SECONDS) -> None:
    """Wait until a scheduler has so many workers."""
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(n, timeout=seconds)


@dataclass(frozen=True)
class Limited:
    """A cgroup with a limit of memory; ``before`` goes in front of a command that shall live there."""

    before: tuple[str, ...]
    group: Path

    @property
    def n_kills(self) -> int:
        """How often the kernel killed a process of it."""
        for name in ("memory.events", "memory.oom_control"):
            if (self.group / name).exists():
                lines = (line.split() for line in (self.group / name).read_text().splitlines())
                return int(dict(lines).get("oom_kill", 0))
        return 0


@contextlib.contextmanager
def memory_limit(nbytes: int) -> Iterator[Limited]:
    """A cgroup that may hold so many bytes."""
    unified = (_UNIFIED / "cgroup.controllers").exists()
    group = (_UNIFIED if unified else _MEMORY) / f"daskinfer-chaos-{uuid.uuid4().hex[:8]}"
    limit = group / ("memory.max" if unified else "memory.limit_in_bytes")
    try:
        try:
            group.mkdir()
            limit.write_text(str(nbytes))
        except OSError as error:
            raise Unavailable(f"no memory cgroup can be made on this machine: {error}") from None
        yield Limited(("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"), group)
    finally:
        for _ in range(200):
            for pid in (group / "cgroup.procs").read_text().split() if group.exists() else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(OSError):
                group.rmdir()
            if not group.exists():
                break
            time.sleep(0.05)


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[Callable[[int], None]]:
    """A tmpfs of so many megabytes; call what is yielded to give it another size."""
    path.mkdir()
    system("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path))
    try:
        yield lambda size: system("mount", "-o", f"remount,size={size}m", str(path))
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def system(*command: str) -> None:
    """A command that only root may give; Unavailable where it fails."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise Unavailable(f"{command[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{' '.join(command)}: {error.stderr.strip()}") from None
