"""Times one peer on one work, in its own process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import by_hand, ours, tools
from tests.benchmarks.by_hand import Call
from tests.benchmarks.processes import versions
from tests.benchmarks.works import WORKS, Work, difference

_ENOUGH_SECONDS = 60.0  # of calls, after which a single one that was repeated will do

Open = Callable[[Work, np.ndarray], contextlib.AbstractContextManager[Call]]

PEERS: dict[str, Open] = {
    "plain loop, 1 thread": by_hand.one_thread,
    "plain loop, all threads": by_hand.all_threads,
    "one example at a time": by_hand.one_by_one,
    "two processes by hand": by_hand.two_processes,
    "two processes by hand, allocator tuned": by_hand.two_processes_tuned,
    "daskinfer": ours.two_workers,
    "daskinfer, devices auto": ours.auto,
    "daskinfer, no dashboard": ours.without_dashboard,
    "Dask map_blocks": tools.dask,
    "Daft class UDF": tools.daft,
    "Ray Data actors": tools.ray,
    "Spark predict_batch_udf": tools.spark,
}


def measure(peer: str, work: str, scale: float, source: str, expected: str, repeats: int) -> dict[str, Any]:
    """Seconds that a peer takes to open, for its first call and for each later one, and how far off its answer is.

    The clock starts with torch imported and the input in memory. Where ``expected`` does not exist, the answer is written
    there.
    """
    todo = WORKS[work].scaled(scale)
    x = np.array(np.load(source))  # anonymous memory, every page of it touched
    _import_what_counts_as_there(peer)
    began = time.perf_counter()
    with PEERS[peer](todo, x) as call:
        opened = time.perf_counter() - began
        seconds, answer = _timed(call, repeats)
    factor = len(x) / len(answer)  # above 1 where only a part of the rows was timed
    off = _compare(answer, Path(expected))
    return {
        "opened": opened,
        "first": seconds[0] * factor,
        "warm": [s * factor for s in seconds[1:]],
        "difference": off,
        "versions": versions(),
    }


def _import_what_counts_as_there(peer: str) -> None:
    import torch  # noqa: F401  # the clock of a cold start begins with it imported

    if peer.startswith("daskinfer"):
        import daskinfer

        _ = daskinfer.predict  # imported when first asked for


def _timed(call: Call, repeats: int) -> tuple[list[float], np.ndarray]:
    """Call 1 + repeats times, less often where that takes long; each answer is let go first: all would fill the memory."""
    seconds, answer = list[float](), np.empty(0)
    while len(seconds) <= (repeats if sum(seconds) < _ENOUGH_SECONDS else min(1, repeats)):
        del answer
        began = time.perf_counter()
        answer = call()
        seconds.append(time.perf_counter() - began)
    return seconds, answer


def _compare(answer: np.ndarray, expected: Path) -> float:
    if not expected.exists():
        np.save(expected, answer)
    return difference(answer, np.load(expected, mmap_mode="r"))
