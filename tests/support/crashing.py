"""Kill a run at each of its steps on the disk: ``python -m tests.support.crashing FOLDER SUFFIX FIRST STEP``.

Prints one line of JSON: the checksum of the output of an undisturbed run, and of each run that was killed once and repeated.
Each run is a process of its own, forked before this process has any thread, because importing torch takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import daskinfer as di
from daskinfer import api  # noqa: F401  # imported before any fork
from daskinfer.storage.formats import npy, zarr  # noqa: F401
from daskinfer.storage.verify import verify

# Functions that change the disk. "write" of an open file is a method of its type, so files are counted when they are opened.
_STEPS = ("fsync", "mkdir", "pwritev", "rename", "replace", "rmdir", "unlink")
_N_STEPS_MAX = 10_000


def model(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Compute an output of half the input's width."""
    return np.sqrt(rows[:, ::2])


def run(folder: Path, suffix: str) -> None:
    """Run the call that is killed and repeated."""
    di.run(model, folder / "x.npy", folder / f"y{suffix}", devices="inline", batch_size=16)


def digest(path: Path) -> str:
    """Compute the checksum of all bytes of an output and of the names of its files."""
    checksum = hashlib.sha256()
    for file in sorted([path] if path.is_file() else path.rglob("*")):
        checksum.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return checksum.hexdigest()


def kill_at(n: int) -> None:
    """Kill this process before its n-th step from now on."""
    n_left = [n]

    def step() -> None:
        n_left[0] -= 1
        if n_left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def count_calls(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            step()
            return function(*args, **kwargs)

        return call

    for name in _STEPS:
        setattr(os, name, count_calls(getattr(os, name)))
    sys.addaudithook(lambda event, arguments: step() if event == "open" and "w" in str(arguments[1]) else None)


def run_forked(function: Callable[[], None]) -> int:
    """Call a function in a forked process; return its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_killed_once(folder: Path, suffix: str, n: int) -> str | None:
    """Kill a run at its n-th step and repeat it; return the checksum, or None if the run has fewer steps."""

    def run_and_kill() -> None:
        kill_at(n)
        run(folder, suffix)

    if run_forked(run_and_kill) == 0:
        return None
    if (status := run_forked(lambda: run(folder, suffix))) != 0:
        return f"step {n}: the repeated run exited with {status}"
    report = verify(folder / f"y{suffix}")
    return "; ".join(report.wrong) or digest(folder / f"y{suffix}")


def main(folder: Path, suffix: str, first: int, step: int) -> None:
    """Kill at every ``step``-th step from ``first`` on."""
    checksums: list[str] = []
    for n in range(first, _N_STEPS_MAX, step):
        work = folder / str(n)
        work.mkdir()
        np.save(work / "x.npy", np.random.default_rng(0).random((200, 6)))
        if (checksum := run_killed_once(work, suffix, n)) is None:
            break
        checksums.append(checksum)
        shutil.rmtree(work)
    print(json.dumps({"undisturbed": digest(work / f"y{suffix}"), "repeated": checksums}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
