"""Builds the shim that counts a run's steps on the disk, and tells it what to do at which."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.benchmarks.processes import Unavailable

KILL, TEAR, STOP = 1, 2, 3  # what is done at the step; see shim.c
_FIELDS = ("counting", "steps", "at", "action", "group", "writes")


@dataclass(frozen=True)
class Shim:
    """The library, the folder whose files count, and the numbers that it shares with whoever loads it."""

    library: Path
    folder: Path
    state: Path

    @classmethod
    def build(cls, work: Path, folder: Path) -> Shim:
        """Compile it into ``work``; files below ``folder`` count."""
        if shutil.which("gcc") is None:
            raise Unavailable("gcc is not installed")
        library = work / "shim.so"
        if not library.exists():
            source = Path(__file__).with_suffix(".c")
            flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
            subprocess.run(["gcc", *flags, "-o", str(library), str(source), "-ldl"], check=True)
        state = work / f"{folder.name}.state"
        state.write_bytes(bytes(8 * len(_FIELDS)))
        return cls(library, folder, state)

    @property
    def environment(self) -> dict[str, str]:
        """What loads it into a process and whatever that starts."""
        return {"LD_PRELOAD": str(self.library), "CHAOS_FOLDER": str(self.folder), "CHAOS_STATE": str(self.state)}

    def arm(self, at: int = 0, action: int = KILL, group: int = 0) -> None:
        """Count from 1 again, and do ``action`` at step ``at``; 0: only count."""
        self._write([0, 0, at, action, group, 0])
        self._write([1, 0, at, action, group, 0])

    def aim(self, group: int) -> None:
        """Say whose group is killed."""
        with self.state.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            memory[32:40] = int(group).to_bytes(8, "little")

    def disarm(self) -> int:
        """Count no more; how many steps there were."""
        steps = int(self._read()[1])
        self._write([0, steps, 0, 0, 0, 0])
        return steps

    @property
    def writes(self) -> bool:
        """Whether the step at which something was done was a write, which can be torn."""
        return bool(self._read()[5])

    @property
    def struck(self) -> bool:
        """Whether the step at which something is done has come."""
        _, steps, at, *_ = self._read()
        return bool(at and steps >= at)

    def _read(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.frombuffer(self.state.read_bytes(), np.int64)

    def _write(self, numbers: list[int]) -> None:
        content = np.array(numbers, np.int64).tobytes()
        with self.state.open("r+b") as file:
            os.pwrite(file.fileno(), content, 0)
