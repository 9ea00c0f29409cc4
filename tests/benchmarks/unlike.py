"""Devices of unlike speed that must finish together, by a model that sleeps by rows and worker."""

from __future__ import annotations

import os
import time
import uuid
from typing import Any

import numpy as np

from tests.benchmarks.judging import Verdicts, at_most, failed
from tests.benchmarks.processes import Failed, run_fresh
from tests.benchmarks.session import Session

SPEEDS: dict[str, list[float]] = {"1:1": [1, 1], "1:4": [1, 4], "1:20": [1, 20], "8:8:1:1": [8, 8, 1, 1]}
IDEAL_SECONDS = 20.0
BATCH_SIZE = 64
_FASTEST = 6_400.0  # rows per second: 10 ms per micro-batch, far above what a sleep is off by
_SLOWER = 4.0
_OVERSLEPT = 0.002  # seconds that a sleep may be too long and the next one makes good


class Sleeper:
    """Doubles its rows at its worker's speed; from ``slow_from[device]`` rows on 4 times slower.

    ``speeds`` are rows per second by the device's name. Each instance is a model of its own, with nothing measured yet.
    """

    def __init__(self, speeds: dict[str, float], slow_from: dict[str, int] | None = None) -> None:
        self.speeds, self.slow_from, self.mark = speeds, slow_from or {}, uuid.uuid4().hex

    def load(self, device: str) -> None:
        """Learn which worker this is; outside of workers nobody sleeps."""
        name = os.environ.get("DASKINFER_DEVICE", "")
        self.speed = self.speeds.get(name, float("inf"))
        self.left = self.slow_from.get(name, float("inf"))
        self.until = 0.0

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        now = time.perf_counter()
        begin = self.until if 0 <= now - self.until < _OVERSLEPT else now
        n_fast = min(len(batch), max(0.0, self.left))
        self.left -= len(batch)
        self.until = begin + (n_fast + (len(batch) - n_fast) * _SLOWER) / self.speed
        time.sleep(max(0.0, self.until - now))
        return 2 * batch


def unlike(session: Session) -> Verdicts:
    """Makespan over rows / sum of speeds."""
    for name, ratios in SPEEDS.items():
        yield from _judge(session, f"unlike devices {name}, by sleeping", ratios, None, 1.05)


def slowing(session: Session) -> Verdicts:
    """One device becomes 4 times slower midway: makespan over the piecewise ideal."""
    yield from _judge(session, "unlike devices 1:1, the first slows 4x midway", [1, 1], 0, 1.10)
    yield from _judge(session, "unlike devices 1:4, the faster slows 4x midway", [1, 4], 1, 1.10)


def _judge(session: Session, target: str, ratios: list[float], slowing: int | None, bound: float) -> Verdicts:
    try:
        found = run_fresh("unlike:run", {"ratios": ratios, "slowing": slowing, "seconds": IDEAL_SECONDS * session.scale})
    except Failed as error:
        yield failed(target, str(error))
        return
    session.raw.setdefault("unlike", {})[target] = found
    yield at_most(target, found["seconds"] / found["ideal"], bound)


def run(ratios: list[float], slowing: int | None, seconds: float) -> dict[str, Any]:
    """One predict on a warm cluster of workers that sleep; ``seconds`` is the ideal without any slowing."""
    import daskinfer as di

    speeds = [_FASTEST * ratio / max(ratios) for ratio in ratios]
    n_rows = round(seconds * sum(speeds))
    names = [f"cpu:{i}" for i in range(len(speeds))]
    half = seconds / 2
    slow_from = {} if slowing is None else {names[slowing]: round(half * speeds[slowing])}
    later = sum(speeds) - (0.0 if slowing is None else speeds[slowing] * (1 - 1 / _SLOWER))
    x = np.arange(n_rows, dtype=np.float32)[:, None]
    devices = ["cpu"] * len(speeds)
    di.predict(np.abs, x[:1000], devices=devices)  # starts the cluster, which is kept
    model = Sleeper(dict(zip(names, speeds, strict=True)), slow_from)
    y, report = di.predict(model, x, devices=devices, device_weights="auto", batch_size=BATCH_SIZE, return_report=True)
    di.close()
    if not np.array_equal(y, 2 * x):
        raise ValueError("the answer is wrong")
    done = {d.device: d.n_rows for d in report.devices}
    return {"seconds": report.seconds, "ideal": half + (n_rows - half * sum(speeds)) / later, "rows": n_rows, "done": done}
