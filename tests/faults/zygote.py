"""Kills ``daskinfer run`` at each of its steps on the disk: ``python -m tests.faults.zygote JSON``, with the shim preloaded.

Each run is a process of its own, forked from this one after it imported everything and before it has a thread: that takes
0.1 s instead of 3. What is forked runs the command as it would be typed, in this process (``--devices inline``), in tasks of
one micro-batch, as with a network that takes half a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from daskinfer import api  # noqa: F401  # imported before any process is forked
from daskinfer.cli.main import main as command
from daskinfer.scheduling import balancer
from daskinfer.storage import verify
from daskinfer.storage.formats import npy, zarr  # noqa: F401
from tests.faults import nets
from tests.faults.shim import KILL, TEAR, Shim
from tests.support.crashing import digest

BATCH_ROWS = 10


class Zygote:
    """Runs the command again and again, below ``shim.folder``; ``n_chunks`` micro-batches each."""

    def __init__(self, shim: Shim, suffix: str, n_chunks: int) -> None:
        self.shim, self.n_chunks, self.output = shim, n_chunks, shim.folder / f"y{suffix}"
        self.beside = shim.folder.with_name(f"{shim.folder.name}-beside")  # what is written there does not count
        self.beside.mkdir()
        np.save(self.beside / "x.npy", nets.rows(n_chunks * BATCH_ROWS))
        os.environ[nets.FOLDER] = str(self.beside)
        balancer.MAX_TASK_SECONDS = balancer.MIN_TASK_SECONDS = 0.0
        torch.set_num_threads(1)
        self.command = ["run", "tests.faults.nets:made", str(self.beside / "x.npy"), str(self.output)]
        self.command += ["--devices", "inline", "--batch-size", str(BATCH_ROWS)]

    def run(self) -> int:
        """The command in a process of its own, the leader of a group; its exit status."""
        pid = os.fork()
        if pid == 0:
            self._child()
        self._await(pid)
        return self.status

    def _child(self) -> None:
        os.setsid()
        self.shim.aim(os.getpid())
        out = os.open(self.beside / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = 99
        try:
            command(self.command, standalone_mode=True)
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            os._exit(code)

    def _await(self, pid: int) -> None:
        self.status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, 0)
            self.status = 98  # somebody of its group outlived it

    def clear(self) -> None:
        """As if nothing had run."""
        shutil.rmtree(self.shim.folder)
        self.shim.folder.mkdir()
        (self.beside / "notes").unlink(missing_ok=True)

    def undisturbed(self) -> tuple[int, str]:
        """How many steps a run has, and the checksum of its output."""
        self.clear()
        self.shim.arm()
        status = self.run()
        steps = self.shim.disarm()
        if status:
            raise RuntimeError(f"the undisturbed run ended with {status}: {self.said()}")
        return steps, digest(self.output)

    def killed(self, at: int, action: int) -> dict[str, Any]:
        """What is there after the run was killed at a step, and the command was repeated."""
        self.clear()
        self.shim.arm(at, action)
        first, writes = self.run(), self.shim.writes
        self.shim.disarm()
        again = self.run()
        found: dict[str, Any] = {"at": at, "action": action, "first": first, "again": again, "writes": writes, "wrong": []}
        if again == 0:
            found["wrong"] = list(verify.verify(self.output).wrong)
            found["digest"] = digest(self.output)
            found["left"] = sorted(p.name for p in self.shim.folder.iterdir())
        else:
            found["said"] = self.said()
        found["redone"] = sum(nets.begun(self.beside).values()) - self.n_chunks
        return found

    def said(self) -> str:
        """The last line of the log."""
        return ((self.beside / "log").read_text().strip().splitlines() or [""])[-1]


def main(asked: dict[str, Any]) -> None:
    """Print a line of JSON of the undisturbed run, and one of each that was killed."""
    shim = Shim(Path(asked["library"]), Path(asked["folder"]), Path(asked["state"]))
    zygote = Zygote(shim, asked["suffix"], asked["n_chunks"])
    steps, sha256 = zygote.undisturbed()
    print(json.dumps({"steps": steps, "digest": sha256}), flush=True)
    for at in range(asked["first"], steps + 1, asked["every"]):
        found = zygote.killed(at, KILL)
        print(json.dumps(found), flush=True)
        if found["writes"]:
            print(json.dumps(zygote.killed(at, TEAR)), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
