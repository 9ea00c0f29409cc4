"""Kills, hangs and errors, call after call, on one cluster: no wrong row, and nothing that grows."""

from __future__ import annotations

import gc
import os
import random
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from tests.benchmarks.judging import Verdict
from tests.benchmarks.processes import run_fresh
from tests.faults import nets
from tests.faults.effort import Effort, judged
from tests.faults.workers import CHUNK_ROWS, DEVICES, killer, lazy, worker_pids

N_ROWS = 400
WARM_CALLS = 2  # until caches and pools are filled
MORE_DESCRIPTORS = 4  # the client has 16 to 19 sockets as workers come and go (measured); what is kept of a call is one each
MORE_MIB = 48.0  # that the client may have at the end: a leaked answer or task of each call would be seen in an hour
SECONDS = {"short": 15.0, "usual": 90.0, "long": 1800.0}


def soak(effort: Effort) -> Verdict:
    """Workers are killed, hang and raise while call follows call: 0 wrong rows; threads, files and memory stay flat."""
    seconds = SECONDS[effort.name]
    arguments = {"folder": str(effort.folder), "seconds": seconds}
    found = run_fresh("tests.faults.soak:calls", arguments, seconds=seconds + 300)
    grown = {name: found["last"][name] - found["first"][name] for name in found["first"]}
    return judged(
        f"soak of {seconds / 60:.3g} min: kills, hangs and errors",
        f"{found['wrong']} wrong rows in {found['calls']} calls, {found['kills']} kills, {found['hangs']} hangs; "
        f"{found['ended']} calls ended early; more: "
        f"{grown['threads']:g} threads, {grown['descriptors']:g} open files, {grown['files']:g} files, "
        f"{grown['mib']:.0f} MiB",
        f"0 wrong rows; threads, files flat, <= {MORE_MIB:g} MiB",
        {
            "wrong rows": found["wrong"] == 0,
            "threads": grown["threads"] <= 1,
            "open files": grown["descriptors"] <= MORE_DESCRIPTORS,
            "files": grown["files"] <= 0,
            "memory": grown["mib"] <= MORE_MIB,
            "disturbed": found["kills"] > 0 and found["hangs"] > 0,
            "most calls end well": found["ended"] <= found["calls"] / 2,
        },
    )


def calls(folder: str, seconds: float) -> dict[str, Any]:
    """Call after call beside a killer; in a fresh process.

    A chunk that is killed twice while it runs alone is taken for poison, and ends its call: what the call had done by then
    has to be right too.
    """
    import daskinfer as di
    from daskinfer.errors import ChunkTimeout, WorkerLost

    expected, draw = nets.plain(N_ROWS, CHUNK_ROWS), random.Random(0)
    how: dict[str, Any] = {"devices": DEVICES, "batch_size": CHUNK_ROWS, "device_weights": "even", "chunk_timeout": 3}
    how["output"] = np.empty((0, 3), np.float32)
    di.predict(abs, [1.0], devices=DEVICES)
    samples: list[dict[str, float]] = []
    n_wrong, n_hangs, n_ended, deadline = 0, 0, 0, time.monotonic() + seconds
    with killer(worker_pids, 0) as kills:
        while time.monotonic() < deadline or len(samples) < 2 * WARM_CALLS:
            place = Path(tempfile.mkdtemp(dir=folder))
            draw_fault = {
                draw.randrange(40) * CHUNK_ROWS: fault for fault in draw.sample(["sleep", "gil", "stop", "raise"], 2)
            }
            nets.break_at(place, draw_fault, times=1)
            done: Any = np.ones(N_ROWS, bool)
            try:
                y = di.predict(nets.Watched(str(place), 0.03), lazy(N_ROWS, CHUNK_ROWS), **how)
            except (WorkerLost, ChunkTimeout) as error:
                if error.partial is None:
                    raise
                (y, done), n_ended = error.partial, n_ended + 1
            n_wrong += int((~(y == expected).all(axis=1) & done).sum())
            n_hangs += sum(fault != "raise" for fault in draw_fault.values())
            samples.append(_sample())
    di.close()
    kept = samples[WARM_CALLS:]
    third = max(1, len(kept) // 3)
    first, last = ({n: median(s[n] for s in part) for n in kept[0]} for part in (kept[:third], kept[-third:]))
    return {
        "wrong": n_wrong,
        "calls": len(samples),
        "kills": len(kills),
        "hangs": n_hangs,
        "ended": n_ended,
        "first": first,
        "last": last,
        "samples": samples,
    }


def _sample() -> dict[str, float]:
    """What the client has now."""
    gc.collect()
    here = psutil.Process()
    shared = Path("/dev/shm")
    temporary = [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("daskinfer")]
    return {
        "threads": threading.active_count(),
        "descriptors": here.num_fds(),
        "files": len(temporary) + sum(f"{here.pid}" in name for name in os.listdir(shared) if shared.is_dir()),
        "mib": here.memory_info().rss / 2**20,
    }
