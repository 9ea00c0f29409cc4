"""A run that is killed with its whole process group, at each of its steps on the disk, and repeated."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.judging import Verdict
from tests.benchmarks.processes import Failed
from tests.chaos import means, nets
from tests.chaos.effort import Effort, judged
from tests.chaos.shim import KILL, TEAR, Shim
from tests.crashing import digest

N_CHUNKS = 40
FORMATS = (".zarr", ".npy")
END_SECONDS = 60.0  # until no process may be left


def at_every_instant(effort: Effort) -> Verdict:
    """Killed at whichever step and repeated: the same checksum, no more redone than was in flight, no process left.

    Most points are of a run in one process; a sample has two workers beside it, which are not of the group that is killed.
    """
    found = [point for suffix in FORMATS for point in _in_one_process(effort, suffix)]
    workers = [point for suffix in FORMATS for point in _with_workers(effort, suffix)]
    every = found + workers
    same = sum(point["same"] for point in every)
    most = max(point["redone"] for point in found)
    left = max((point["left_seconds"] for point in workers), default=0.0)
    wrong = next((f"{p['suffix']} step {p['at']} action {p['action']}: {p['wrong']}" for p in every if not p["same"]), "")
    return judged(
        f"run killed at every instant, {N_CHUNKS} chunks",
        f"{same}/{len(every)} the same sha256 ({len(found)} inline, {len(workers)} with 2 workers); "
        f"{most} redone inline, {max((p['redone'] for p in workers), default=0)} with workers; "
        f"last process gone after {left:.1f} s" + (f"; first wrong: {wrong}" if wrong else ""),
        f"all; redone <= in flight (1 inline); none left after {END_SECONDS:g} s",
        {
            "same": same == len(every),
            "redone": most <= 1 and all(p["redone"] <= p["in_flight"] for p in workers),
            "none left": left <= END_SECONDS,
        },
    )


def _in_one_process(effort: Effort, suffix: str) -> list[dict[str, Any]]:
    """Every point of a run in one process, twice where a write can be torn."""
    shim = _shim(effort, f"inline{suffix}")
    asked = {
        "library": str(shim.library),
        "folder": str(shim.folder),
        "state": str(shim.state),
        "suffix": suffix,
        "n_chunks": N_CHUNKS,
        "first": effort.pick(random.randrange(1, 16), 1),
        "every": effort.pick(16, 1),
    }
    log = effort.folder / f"zygote{suffix}.log"
    with means.started([means.PYTHON, "-m", "tests.chaos.zygote", json.dumps(asked)], log, shim.environment) as process:
        means.wait_until(lambda: process.poll() is not None, 1800, "the runs")
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        raise Failed(f"the runs ended with {process.returncode}: {log.read_text()[-500:]}")
    undisturbed, *points = lines
    output = f"y{suffix}"
    for point in points:
        right = point["again"] == 0 and not point["wrong"] and point["digest"] == undisturbed["digest"]
        point["same"] = right and point["left"] == [output, f"{output}.daskinfer"]
        point["suffix"] = suffix
        point["wrong"] = point["wrong"] or point.get("said", "") or f"left {point.get('left')}, ended {point['first']}"
    return points


def _with_workers(effort: Effort, suffix: str) -> list[dict[str, Any]]:
    """Some points of a run with two workers, drawn at random."""
    shim = _shim(effort, f"workers{suffix}")
    beside = effort.folder / f"beside{suffix}"
    beside.mkdir()
    np.save(beside / "x.npy", nets.rows(N_CHUNKS * 10))
    steps, _, _ = _run(shim, beside, suffix, 0, KILL)
    sha256 = digest(shim.folder / f"y{suffix}")
    draw, points = random.Random(suffix), []
    for number in range(effort.pick(1, 6)):
        at, action = draw.randrange(1, steps), (KILL, TEAR)[number % 2]
        _clear(shim, beside)
        _, left_seconds, in_flight = _run(shim, beside, suffix, at, action)
        code, said = _command(shim, beside, suffix)
        point = {"suffix": suffix, "at": at, "action": action, "left_seconds": left_seconds, "in_flight": in_flight}
        point["redone"] = sum(nets.begun(beside).values()) - N_CHUNKS
        point["same"] = code == 0 and digest(shim.folder / f"y{suffix}") == sha256
        points.append(point | {"wrong": said[-300:]})
    return points


def _run(shim: Shim, beside: Path, suffix: str, at: int, action: int) -> tuple[int, float, int]:
    """The command, killed at a step; how many steps it made, until its last process was gone, micro-batches in flight."""
    shim.arm(at, action)
    log = beside / "first.log"
    command = [means.PYTHON, "-m", "daskinfer.cli", *_arguments(beside, shim, suffix)]
    env = {**shim.environment, nets.FOLDER: str(beside), nets.SECONDS: "0.02"}
    with means.started(command, log, env) as process:
        shim.aim(process.pid)
        means.wait_until(lambda: process.poll() is not None, 120, "the run")
        mark = process.mark  # type: ignore[attr-defined]
        left_seconds = means.wait_until(lambda: not means.marked(mark), 2 * END_SECONDS, "the end of its processes")
    expected = -signal.SIGKILL if at else 0
    if process.returncode != expected:
        raise Failed(f"step {at}: exit code {process.returncode}: {log.read_text()[-300:]}")
    begun = nets.begun(beside)
    receipts = shim.folder / f"y{suffix}.daskinfer" / "receipts.jsonl"
    committed = Counter(row for start, stop in received(receipts) for row in range(start, stop, 10))
    return shim.disarm(), left_seconds, sum((begun - committed).values())


def received(path: Path) -> list[tuple[int, int]]:
    """Row ranges of all receipts in a log, whole lines only."""
    records = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        if line.endswith("\n"):
            records.append(json.loads(line.split("\t")[0]))
    return [(record["start"], record["stop"]) for record in records if "parts" in record]


def _command(shim: Shim, beside: Path, suffix: str) -> tuple[int, str]:
    env = {nets.FOLDER: str(beside), nets.SECONDS: "0.02"}
    return means.run_command(*_arguments(beside, shim, suffix), folder=beside, env=env)


def _arguments(beside: Path, shim: Shim, suffix: str) -> list[str]:
    how = ["--devices", "cpu,cpu", "--batch-size", "10"]
    return ["run", "tests.chaos.nets:made", str(beside / "x.npy"), str(shim.folder / f"y{suffix}"), *how]


def _shim(effort: Effort, name: str) -> Shim:
    folder = effort.folder / name
    folder.mkdir()
    return Shim.build(effort.folder, folder)


def _clear(shim: Shim, beside: Path) -> None:
    shutil.rmtree(shim.folder)
    shim.folder.mkdir()
    (beside / "notes").unlink(missing_ok=True)
