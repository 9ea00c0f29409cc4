"""What one invocation of the suite was asked for, where its files lie, and every raw figure that it took."""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from tests.benchmarks import processes
from tests.benchmarks.processes import Failed, Unavailable
from tests.benchmarks.works import TOLERANCE, WORKS, Work

REFERENCE = "plain loop, 1 thread"  # its answer is what all others are compared with
OTHER_TOOLS = ("Dask map_blocks", "Daft class UDF", "Ray Data actors", "Spark predict_batch_udf")
_ELSEWHERE = OTHER_TOOLS[1:]  # run by the peers' interpreter
_LONG_SECONDS = 120.0  # a peer whose start takes longer is started once: it is far slower than all it is compared with


@dataclass
class Session:
    """Options, and what was found so far. ``folder`` holds inputs and answers and goes with the session."""

    folder: Path
    starts: int
    scale: float
    peers_python: str = sys.executable
    raw: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=processes.versions)

    def work(self, name: str) -> Work:
        """A work at this session's scale."""
        return WORKS[name].scaled(self.scale)

    def source(self, work: str) -> Path:
        """The path of a work's input, made when first asked for."""
        path = self.folder / f"{work}.npy"
        if not path.exists():
            self.work(work).write(path)
        return path

    def expected(self, work: str) -> Path:
        """The path of a work's answer by the plain loop, made when first asked for."""
        path = self.folder / f"{work}-answer.npy"
        if not path.exists():
            self.start(REFERENCE, work, repeats=0, expected=path)
        return path

    def start(self, peer: str, work: str, *, repeats: int, expected: Path | None = None) -> dict[str, Any]:
        """Time a peer in a fresh process; Failed where its answer is wrong."""
        result = processes.run_fresh(
            "peer:measure",
            {
                "peer": peer,
                "work": work,
                "scale": self.scale,
                "source": str(self.source(work)),
                "expected": str(expected or self.expected(work)),
                "repeats": repeats,
            },
            python=self.peers_python if peer in _ELSEWHERE else sys.executable,
        )
        self.versions = result.pop("versions") | self.versions
        if not result["difference"] <= TOLERANCE:
            raise Failed(f"the answer is off by {result['difference']:.3g}; {TOLERANCE:g} is allowed")
        return result

    def machine(self) -> dict[str, Any]:
        """What the figures were taken on, and when."""
        return {
            "date": datetime.date.today().isoformat(),
            "system": f"{platform.system()} {platform.release()}",
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


class Race:
    """Peers on one work, started freshly in turns, so that noise hits all alike."""

    def __init__(self, session: Session, work: str, *, repeats: int) -> None:
        self.session, self.work, self.repeats = session, work, repeats
        self.starts: dict[str, list[dict[str, Any]]] = {}
        self.lost: dict[str, Exception] = {}  # peers without a figure, and why
        self._long: set[str] = set()  # peers that took long

    def run(self, rounds: dict[str, int]) -> Race:
        """Start each peer as often as it is said to be, one start of each per round; those that take long once."""
        self.session.expected(self.work)
        for number in range(max(rounds.values())):
            for peer, n_starts in rounds.items():
                if number < n_starts and peer not in self.lost and peer not in self._long:
                    self._start(peer)
        return self

    def _start(self, peer: str) -> None:
        began = time.monotonic()
        try:
            result = self.session.start(peer, self.work, repeats=self.repeats)
        except (Failed, Unavailable) as error:
            self.lost[peer] = error
            return
        self.starts.setdefault(peer, []).append(result)
        if time.monotonic() - began > _LONG_SECONDS:
            self._long.add(peer)

    def seconds(self, peer: str, what: str = "warm") -> float:
        """The median over a peer's starts; each start's warm figure is a median itself."""
        if peer in self.lost:
            raise self.lost[peer]
        return median(_figure(start, what) for start in self.starts[peer])

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"starts": self.starts, "lost": {peer: str(error) for peer, error in self.lost.items()}}


def _figure(start: dict[str, Any], what: str) -> float:
    if what == "warm":
        return float(median(start["warm"]))
    if what == "cold":
        return float(start["opened"] + start["first"])
    if what == "second":
        return float(start["warm"][0])
    return float(start[what])
