"""A run that is killed at each of its steps on the disk: ``python -m tests.support.crashing FOLDER SUFFIX FIRST STEP``.

Prints one line of JSON: the checksum of the output of an undisturbed run, and of each run that was killed once and repeated.
Each run is a process of its own, forked from this one before it has any thread: importing torch takes seconds.
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
from daskinfer import _storage_api, api  # noqa: F401  # imported before any process is forked
from daskinfer.storage.formats import npy, zarr  # noqa: F401
from daskinfer.storage.verify import verify

# What puts something on the disk. "write" of an open file is a method of its type, so files are counted as they are opened.
_STEPS = ("fsync", "mkdir", "pwritev", "rename", "replace", "rmdir", "unlink")
_N_STEPS_MAX = 10_000


def net(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Something of the input, of half its width."""
    return np.sqrt(rows[:, ::2])


def run(folder: Path, suffix: str) -> None:
    """The command that is killed and repeated."""
    di.run(net, folder / "x.npy", folder / f"y{suffix}", devices="inline", batch_size=16)


def digest(path: Path) -> str:
    """Of all bytes of an output, and of the names of its files."""
    found = hashlib.sha256()
    for file in sorted([path] if path.is_file() else path.rglob("*")):
        found.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return found.hexdigest()


def kill_at(n: int) -> None:
    """From now on, end this process before its n-th step."""
    left = [n]

    def step() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            step()
            return function(*arguments, **keywords)

        return call

    for name in _STEPS:
        setattr(os, name, counted(getattr(os, name)))
    sys.addaudithook(lambda event, arguments: step() if event == "open" and "w" in str(arguments[1]) else None)


def forked(do: Callable[[], None]) -> int:
    """Do it in a process of its own; its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            do()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_once(folder: Path, suffix: str, n: int) -> str | None:
    """The checksum after a run that was killed at its n-th step was repeated; None where it has fewer steps."""

    def disturbed() -> None:
        kill_at(n)
        run(folder, suffix)

    if forked(disturbed) == 0:
        return None
    if (status := forked(lambda: run(folder, suffix))) != 0:
        return f"step {n}: the repeated run ended with {status}"
    found = verify(folder / f"y{suffix}")
    return "; ".join(found.wrong) or digest(folder / f"y{suffix}")


def main(folder: Path, suffix: str, first: int, step: int) -> None:
    """Kill at every ``step``-th step from ``first`` on."""
    found: list[str] = []
    for n in range(first, _N_STEPS_MAX, step):
        work = folder / str(n)
        work.mkdir()
        np.save(work / "x.npy", np.random.default_rng(0).random((200, 6)))
        if (after := killed_once(work, suffix, n)) is None:
            break
        found.append(after)
        shutil.rmtree(work)
    print(json.dumps({"undisturbed": digest(work / f"y{suffix}"), "repeated": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
