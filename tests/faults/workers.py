"""Workers that die, run out of memory, are poisoned or hang: what was in flight is done elsewhere, no innocent is lost."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import psutil

from tests.benchmarks.judging import Verdict
from tests.benchmarks.processes import Failed, run_fresh
from tests.faults import means, nets
from tests.faults.effort import Effort, judged

N_CHUNKS, CHUNK_ROWS = 200, 10
CHUNK_SECONDS = 0.06  # more than `dealer.TASK_SECONDS`: a task is one chunk
WINDOW = 3  # tasks in flight per device: prefetch + 2
DEVICES = ["cpu", "cpu"]


def lazy(n: int, chunk_rows: int) -> Any:
    """The input in chunks of so many rows, which a call keeps."""
    return da.from_array(nets.rows(n), chunks=(chunk_rows, nets.WIDTH))


@contextlib.contextmanager
def killer(pids: Any, seed: int) -> Iterator[list[float]]:
    """Kill one of the workers every 1 to 3 s; when that was."""
    draw, ended, kills = random.Random(seed), threading.Event(), list[float]()

    def kill() -> None:
        while not ended.wait(draw.uniform(1, 3)):
            there = pids()
            if there:
                with contextlib.suppress(psutil.NoSuchProcess):
                    psutil.Process(draw.choice(there)).kill()
                    kills.append(time.monotonic())

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield kills
    finally:
        ended.set()
        thread.join()


def worker_pids() -> list[int]:
    """The workers of the cluster that this process keeps, not their nannies, in order."""
    from daskinfer.cluster.process_cluster import default_cluster

    current = default_cluster._current
    nannies = list(current.cluster.workers.values()) if current is not None else []
    found = [child for nanny in nannies for process in nanny.list_processes()[:1] for child in process.children()]
    return sorted(p.pid for p in found if p.is_running() and not any("resource_tracker" in w for w in _words(p)))


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def killed(effort: Effort) -> Verdict:
    """A worker is killed every 1 to 3 s: the answer has the bytes of a plain loop, and only what was in flight ran twice."""
    seeds = range(effort.pick(1, 10))
    found = [run_fresh("tests.faults.workers:killed_once", {"folder": _new(effort, f"{s}"), "seed": s}) for s in seeds]
    n_same, n_kills = sum(f["same"] for f in found), sum(f["kills"] for f in found)
    n_again = sum(f["again"] for f in found)
    within = all(f["again"] <= WINDOW * f["kills"] for f in found)
    return judged(
        f"worker killed every 1 to 3 s, {N_CHUNKS} chunks",
        f"{n_same}/{len(found)} the same bytes; {n_kills} kills, {n_again} chunks run again",
        f"{len(found)}/{len(found)}; <= {WINDOW} x kills",
        {"the same bytes": n_same == len(found), "run again": within, "kills": n_kills >= len(found)},
    )


def killed_once(folder: str, seed: int) -> dict[str, Any]:
    """One predict beside a killer; in a fresh process."""
    import daskinfer as di

    n = N_CHUNKS * CHUNK_ROWS
    how: dict[str, Any] = {"batch_size": CHUNK_ROWS, "device_weights": "even", "devices": DEVICES}
    di.predict(abs, [1.0], devices=DEVICES)  # the workers are there
    with killer(worker_pids, seed) as kills:
        y = di.predict(nets.Watched(folder, CHUNK_SECONDS), lazy(n, CHUNK_ROWS), output=np.empty((0, 3), np.float32), **how)
    di.close()
    same = np.array_equal(y, nets.plain(n, CHUNK_ROWS))
    return {"same": same, "kills": len(kills), "again": sum(nets.begun(folder).values()) - N_CHUNKS}


def out_of_memory(effort: Effort) -> Verdict:
    """A ``dask worker`` in a cgroup of 300 MB, and a chunk that asks for 600 MB: only that is given up."""
    folder = Path(_new(effort, "oom"))
    with contextlib.ExitStack() as stack:
        limit = stack.enter_context(means.memory_limit(300 << 20))
        _, address = stack.enter_context(means.scheduler(folder))
        stack.enter_context(means.worker(address, folder, "small", before=limit.before))
        means.await_workers(address, 1)
        found = run_fresh(
            "tests.faults.workers:out_of_memory_once", {"folder": str(folder), "address": address}, seconds=180
        )
        n_kills = limit.n_kills
    return judged(
        "worker OOM-killed in a 300 MB cgroup",
        f"{n_kills} kills, given up after {found['seconds']:.1f} s; {found['right']} of {found['others']} other rows right",
        "<= 30 s; all others",
        {
            "killed by the kernel": n_kills >= 2,
            "in time": found["seconds"] <= 30,
            "all others": found["right"] == found["others"],
            "only that chunk": found["failed"] == found["asked"],
        },
    )


def out_of_memory_once(folder: str, address: str) -> dict[str, Any]:
    """One predict on workers of others; in a fresh process."""
    from distributed import Client

    import daskinfer as di

    n, poison = 200, 100
    nets.break_at(folder, {poison: "memory"})
    with Client(address, set_as_default=False) as client:
        y, report = di.predict(
            nets.Watched(folder, CHUNK_SECONDS),
            lazy(n, CHUNK_ROWS),
            client=client,
            batch_size=CHUNK_ROWS,
            device_weights="even",
            on_error="skip",
            output=np.empty((0, 3), np.float32),
            return_report=True,
        )
    ended = time.time()
    first = next(note.seconds for note in nets.notes(folder) if note.first == poison)
    good = np.ones(n, bool)
    good[poison : poison + CHUNK_ROWS] = False
    right = int((y == nets.plain(n, CHUNK_ROWS)).all(axis=1)[good].sum())
    return {
        "seconds": ended - first,
        "right": right,
        "others": int(good.sum()),
        "failed": list(report.failed_rows),
        "asked": np.flatnonzero(~good).tolist(),
    }


def poison(effort: Effort) -> Verdict:
    """1, 3, 5 of 40 chunks kill their worker: the command ends with 3, lists just their rows, and has all others right."""
    counts = effort.pick([1], [1, 3, 5])
    n_lost, n_named, codes = 0, 0, []
    for count in counts:
        folder = Path(_new(effort, f"poison-{count}"))
        asked = sorted(row * 10 for row in random.Random(count).sample(range(40), count))
        np.save(folder / "x.npy", nets.rows(400))
        nets.break_at(folder, dict.fromkeys(asked, "kill"))
        # Longer than `dealer.MAX_TASK_SECONDS`: a chunk is one micro-batch.
        env = {nets.FOLDER: str(folder), nets.SECONDS: "0.55"}
        how = ["--devices", "cpu,cpu", "--batch-size", "10", "--on-error", "skip"]
        code, said = means.run_command("run", "tests.faults.nets:made", "x.npy", "y.npy", *how, folder=folder, env=env)
        codes.append(code)
        if code not in (0, 3):
            raise Failed(f"exit code {code}: {said.strip().splitlines()[-1:]}")
        bad = np.zeros(400, bool)
        bad[[row + i for row in asked for i in range(10)]] = True
        y = np.load(folder / "y.npy")
        n_lost += int((~(y == nets.plain(400, 10)).all(axis=1) & ~bad).sum())
        n_named += _named(folder / "y.npy.daskinfer" / "failed_rows.json") == np.flatnonzero(bad).tolist()
    return judged(
        f"poison: {', '.join(map(str, counts))} of 40 chunks kill their worker",
        f"{n_lost} innocent rows lost; exit {','.join(map(str, codes))}; poison named {n_named}/{len(counts)}",
        "0; exit 3; named",
        {"innocents": n_lost == 0, "exit": set(codes) == {3}, "named": n_named == len(counts)},
    )


def _named(path: Path) -> list[int]:
    """The rows that are listed as failed because their worker was lost."""
    listed = json.loads(path.read_text()) if path.exists() else []
    return sorted(row for f in listed if "WorkerLost" in f["exception"] for row in range(f["start"], f["stop"]))


def hung(effort: Effort) -> Verdict:
    """A chunk sleeps, holds the GIL in C, or stops its process: it is noticed, its worker replaced, and the chunk done."""
    folders = {fault: _new(effort, fault) for fault in ("sleep", "gil", "stop")}
    found = run_fresh("tests.faults.workers:hung_each", {"folders": folders}, seconds=240)
    return judged(
        "hung (sleep, GIL, SIGSTOP), chunk_timeout 3 s",
        "noticed / done after " + ", ".join(f"{k} {f['noticed']:.1f} / {f['done']:.1f} s" for k, f in found.items()),
        "<= 5 / 12 s",
        {
            "noticed": all(f["noticed"] <= 5 for f in found.values()),
            "done": all(f["done"] <= 12 for f in found.values()),
            "same bytes": all(f["same"] for f in found.values()),
        },
    )


def hung_each(folders: dict[str, str]) -> dict[str, Any]:
    """A predict with each of these faults; in a fresh process."""
    import daskinfer as di

    noticed: list[float] = []

    class Hears(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "timed out on" in record.getMessage():
                noticed.append(record.created)

    logging.getLogger("daskinfer").addHandler(Hears())
    di.predict(abs, [1.0], devices=DEVICES)
    found = {fault: _hung_once(folder, fault, noticed) for fault, folder in folders.items()}
    di.close()
    return found


def _hung_once(folder: str, fault: str, noticed: list[float]) -> dict[str, Any]:
    import daskinfer as di

    n, hangs = 200, 100
    nets.break_at(folder, {hangs: fault}, times=1)
    noticed.clear()
    before = set(worker_pids())
    y = di.predict(
        nets.Watched(folder, 0.2),
        lazy(n, CHUNK_ROWS),
        devices=DEVICES,
        batch_size=CHUNK_ROWS,
        device_weights="even",
        chunk_timeout=3,
        output=np.empty((0, 3), np.float32),
    )
    began = next(note.seconds for note in nets.notes(folder) if note.first == hangs)
    done = next(note.seconds for note in nets.notes(folder) if (note.first, note.what) == (hangs, "end"))
    if not noticed:
        raise Failed(f"{fault}: nobody noticed")
    means.wait_until(lambda: len(set(worker_pids()) - before) == 1 and len(worker_pids()) == 2, 30, "another worker")
    replaced = max(psutil.Process(pid).create_time() for pid in worker_pids())
    same = np.array_equal(y, nets.plain(n, CHUNK_ROWS))
    return {"noticed": noticed[0] - began, "done": max(done, replaced) - began, "same": same}


def _new(effort: Effort, name: str) -> str:
    folder = effort.folder / name
    folder.mkdir()
    return str(folder)
