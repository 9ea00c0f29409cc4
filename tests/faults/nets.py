"""Networks that note what they do, and that break when a file beside their notes says so.

Rows are (n, 6) float32, and the first number of each is its index, so that a micro-batch is known by its first row.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

WIDTH = 6
FOLDER = "CHAOS_NOTES"  # variable: where `made` keeps its notes; it travels to workers of the command
SECONDS = "CHAOS_SECONDS"  # variable: how long a micro-batch of `made` takes
LONG_SECONDS = 3600


def rows(n: int) -> np.ndarray[Any, Any]:
    """An input."""
    x = np.random.default_rng(0).random((n, WIDTH), np.float32)
    x[:, 0] = np.arange(n)
    return x


class Note(NamedTuple):
    """A micro-batch was begun or ended: its first row, by which process, when (``time.time()``)."""

    first: int
    what: str
    pid: int
    seconds: float


def notes(folder: str | Path) -> list[Note]:
    """All that was noted so far, in order."""
    path = Path(folder, "notes")
    lines = path.read_text().splitlines() if path.exists() else []
    return [Note(int(a), b, int(c), float(d)) for a, b, c, d in (line.split() for line in lines)]


def begun(folder: str | Path) -> Counter[int]:
    """How often each micro-batch was begun."""
    return Counter(note.first for note in notes(folder) if note.what == "begin")


def break_at(folder: str | Path, faults: dict[int, str], times: int = -1) -> None:
    """Have the micro-batches that begin at these rows break, the first so many times; -1: each time."""
    Path(folder, "faults.json").write_text(json.dumps({str(first): [fault, times] for first, fault in faults.items()}))


class Watched(nn.Module):
    """A small network; a micro-batch takes ``seconds``."""

    def __init__(self, folder: str, seconds: float = 0.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, 32), nn.Linear(32, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw) / 8
        self.folder, self.seconds = folder, seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = int(x[0, 0].item())
        watched = self.folder and x.device.type == "cpu" and bool((x[:, 0] != 0).any())  # no made-up rows
        if watched:
            self._note(first, "begin")
            self._break(first)
            time.sleep(self.seconds)
        x = torch.cat([x[:, :1] % 97 / 97, x[:, 1:]], dim=1)  # (n, 6) float32, all of a size
        answer: torch.Tensor = self.last(torch.tanh(self.first(x)))
        if watched:
            self._note(first, "end")
        return answer

    def _note(self, first: int, what: str) -> None:
        line = f"{first} {what} {os.getpid()} {time.time()}\n".encode()
        descriptor = os.open(os.path.join(self.folder, "notes"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.write(descriptor, line)  # in one go: no other process's line comes in between
        os.close(descriptor)

    def _break(self, first: int) -> None:
        try:
            fault, times = json.loads(Path(self.folder, "faults.json").read_text()).get(str(first), ("", 0))
        except FileNotFoundError:
            return
        if fault and (times < 0 or self._is_due(first, times)):
            FAULTS[fault]()

    def _is_due(self, first: int, times: int) -> bool:
        """Whether this fault has not come that often, in whatever process."""
        for number in range(times):
            try:
                os.close(os.open(os.path.join(self.folder, f"fault-{first}-{number}"), os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            return True
        return False


def made() -> nn.Module:
    """What the command loads."""
    return Watched(os.environ[FOLDER], float(os.environ.get(SECONDS, "0")))


def plain(n: int, batch_size: int, seconds: float = 0.0) -> np.ndarray[Any, Any]:
    """The oracle: one plain loop over micro-batches, padded with zeros to one shape, with one thread."""
    net, x = Watched("", seconds), torch.from_numpy(rows(n))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        padded = torch.zeros(-(-n // batch_size) * batch_size, WIDTH)
        padded[:n] = x
        parts = [padded[start : start + batch_size] for start in range(0, n, batch_size)]
        answer = torch.cat([net(part) for part in parts])[:n].numpy()
    torch.set_num_threads(before)
    return answer


def _take_memory() -> None:
    np.ones(600 << 20, np.uint8).sum()


def _raise() -> None:
    raise ArithmeticError("a fault of the test")


FAULTS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sleep": lambda: time.sleep(LONG_SECONDS),
    "gil": lambda: ctypes.PyDLL(None).sleep(LONG_SECONDS),  # PyDLL does not let go of the GIL
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "memory": _take_memory,
    "raise": _raise,
}
