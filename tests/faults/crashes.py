"""A run that is killed with its whole process group, at each of its steps on the disk, and repeated."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.judging import Verdict
from tests.benchmarks.processes import Failed
from tests.faults import means, nets
from tests.faults.effort import Effort, judged
from tests.faults.shim import KILL, TEAR, Shim
from tests.support.crashing import digest

N_CHUNKS = 40
FORMATS = (".zarr", ".npy")
END_SECONDS = 60.0  # until no process may be left


def at_every_instant(effort: Effort) -> Verdict:
    """Killed at whichever step and repeated: the same checksum, no more redone than was in flight, no process left.

    Most points are of a run in one process; a sample has two workers beside it, which are not of the group that is killed.
    """
    found = [point for suffix in FORMATS for point in _in_one_process(effort, suffix)]
    workers = [point for suffix in effort.pick(FORMATS[:1], FORMATS) for point in _with_workers(effort, suffix)]
    every = found + workers
    same = sum(point["same"] for point in every)
    most = max(point["redone"] for point in found)
    left = max((point["left_seconds"] for point in workers), default=0.0)
    wrong = next((f"{p['suffix']} step {p['at']} action {p['action']}: {p['wrong']}" for p in every if not p["same"]), "")
    return judged(
        f"run killed at every instant, {N_CHUNKS} chunks",
        f"{same}/{len(every)} the same sha256 ({len(found)} inline, {len(workers)} with 2 workers); "
        f"{most} redone inline, {max((p['redone'] for p in workers), default=0)} with workers; "
        f"last process gone within {left:.1f} s" + (f"; first wrong: {wrong}" if wrong else ""),
        f"all; redone <= in flight (1 inline); none left after {END_SECONDS:g} s",
        {
            "same": same == len(every),
            "redone": most <= 1 and all(p["redone"] <= p["in_flight"] for p in workers),
            "killed": all(p["killed"] for p in workers),
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
    with means.started([means.PYTHON, "-m", "tests.faults.zygote", json.dumps(asked)], log, shim.environment) as process:
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
    """Some points of a run with two workers, drawn at random; every other time the command is repeated at once."""
    shim = _shim(effort, f"workers{suffix}")
    beside = effort.folder / f"beside{suffix}"
    beside.mkdir()
    np.save(beside / "x.npy", nets.rows(N_CHUNKS * 10))
    shim.arm()
    code, said = _command(shim, beside, suffix, **shim.environment)
    if code:
        raise Failed(f"the undisturbed run ended with {code}: {said[-300:]}")
    steps, sha256 = shim.disarm(), digest(shim.folder / f"y{suffix}")
    draw, points = random.Random(suffix), []
    for number in effort.pick([1], range(8)):
        shutil.rmtree(shim.folder)
        shim.folder.mkdir()
        (beside / "notes").unlink()
        point = _killed(
            shim, beside, suffix, draw.randrange(1, steps), (KILL, TEAR)[number // 2 % 2], at_once=number % 2 == 1
        )
        point["same"] = point["code"] == 0 and digest(shim.folder / f"y{suffix}") == sha256
        points.append(point | {"suffix": suffix})
    return points


def _killed(shim: Shim, beside: Path, suffix: str, at: int, action: int, *, at_once: bool) -> dict[str, Any]:
    """The command, killed at a step and repeated: at once, or when the last of its workers is gone."""
    shim.arm(at, action)
    env = {**shim.environment, **_environment(beside)}
    command = [means.PYTHON, "-m", "daskinfer.cli.main", *_arguments(beside, shim, suffix)]
    with means.started(command, beside / "first.log", env) as process:
        shim.aim(process.pid)
        means.wait_until(lambda: process.poll() is not None, 120, "the run")
        mark = process.mark  # type: ignore[attr-defined]
        ended, pids = time.monotonic(), {p.pid for p in means.marked(mark)} | {n.pid for n in nets.notes(beside)}
        shim.disarm()
        log = shim.folder / f"y{suffix}.daskinfer" / "receipts.jsonl"
        committed = Counter(row for start, stop in received(log) for row in range(start, stop, 10))
        if not at_once:
            means.wait_until(lambda: not means.marked(mark), 2 * END_SECONDS, "the end of its processes")
            left_seconds = time.monotonic() - ended
        code, said = _command(shim, beside, suffix)
        if at_once:
            means.wait_until(lambda: not means.marked(mark), 2 * END_SECONDS, "the end of its processes")
            left_seconds = time.monotonic() - ended  # at most
    begun = Counter(n.first for n in nets.notes(beside) if n.what == "begin" and n.pid in pids)
    redone = sum(nets.begun(beside).values()) - N_CHUNKS
    found = {"at": at, "action": action, "code": code, "left_seconds": left_seconds, "redone": redone, "wrong": said[-300:]}
    return found | {"in_flight": sum((begun - committed).values()), "killed": process.returncode == -signal.SIGKILL}


def received(path: Path) -> list[tuple[int, int]]:
    """Row ranges of all receipts in a log, whole lines only."""
    records = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        if line.endswith("\n"):
            records.append(json.loads(line.split("\t")[0]))
    return [(record["start"], record["stop"]) for record in records if "parts" in record]


def _command(shim: Shim, beside: Path, suffix: str, **more: str) -> tuple[int, str]:
    return means.run_command(*_arguments(beside, shim, suffix), folder=beside, env={**_environment(beside), **more})


def _environment(beside: Path) -> dict[str, str]:
    return {nets.FOLDER: str(beside), nets.SECONDS: "0.02"}


def _arguments(beside: Path, shim: Shim, suffix: str) -> list[str]:
    how = ["--devices", "cpu,cpu", "--batch-size", "10"]
    return ["run", "tests.faults.nets:made", str(beside / "x.npy"), str(shim.folder / f"y{suffix}"), *how]


def _shim(effort: Effort, name: str) -> Shim:
    folder = effort.folder / name
    folder.mkdir()
    return Shim.build(effort.folder, folder)
