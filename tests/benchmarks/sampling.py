"""Watches the memory of processes from outside while they work."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import psutil

INTERVAL_SECONDS = 0.2


@dataclass
class Memory:
    """Samples of a process and, if ``whole_tree``, of all that it starts: (time, bytes) by process.

    ``progress`` is read along with each sample, and stands in for the time where the work's own measure is wanted.
    """

    whole_tree: bool = True
    progress: Callable[[], float] = time.time
    rss: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    pss: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """Sample until the process has ended."""
        top = psutil.Process(process.pid)
        while process.poll() is None:
            at = self.progress()
            for each in [top, *(_children(top) if self.whole_tree else [])]:
                self._sample(at, each)
            time.sleep(INTERVAL_SECONDS)

    def _sample(self, at: float, process: psutil.Process) -> None:
        try:
            found = process.memory_full_info()
            key = f"{process.pid} {process.name()}"
        except psutil.Error:  # it has ended meanwhile
            return
        self.rss.setdefault(key, []).append((at, found.rss))
        self.pss.setdefault(key, []).append((at, getattr(found, "pss", found.rss)))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"rss": self.rss, "pss": self.pss}


def _children(top: psutil.Process) -> list[psutil.Process]:
    try:
        return top.children(recursive=True)
    except psutil.Error:
        return []


def between(samples: Sequence[tuple[float, int]], start: float, stop: float) -> list[int]:
    """Bytes of the samples in a span of time or progress."""
    return [nbytes for at, nbytes in samples if start <= at <= stop]


def peak(of_processes: dict[str, list[tuple[float, int]]], start: float, stop: float) -> int:
    """The most bytes that any one process had."""
    return max((n for samples in of_processes.values() for n in between(samples, start, stop)), default=0)


def growth(of_processes: dict[str, list[tuple[float, int]]], start: float, stop: float) -> int:
    """The most bytes that any one process gained from the second to the fourth quarter, by medians."""
    quarter = (stop - start) / 4
    gains = [0]
    for samples in of_processes.values():
        second = between(samples, start + quarter, start + 2 * quarter)
        fourth = between(samples, start + 3 * quarter, stop)
        if second and fourth:
            gains.append(round(median(fourth) - median(second)))
    return max(gains)
