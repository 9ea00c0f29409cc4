"""Devices of unlike speed by real quotas of CPU time, on the workers' cgroups.

The speed of a device under a quota is the core-seconds that a plain loop gets there per second, times the rows that the
network does per core-second. The first is measured before the run; the second in the run itself, for a machine that is
shared with others changes its speed from one half minute to the next by more than the target allows. So whatever a worker
spends core-seconds on in the run beside the network, and those that it leaves unused, count against daskinfer.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tests.benchmarks.judging import Verdicts, at_most, failed, skipped
from tests.benchmarks.processes import Failed, Unavailable, run_fresh
from tests.benchmarks.session import Session
from tests.benchmarks.unlike import BATCH_SIZE, IDEAL_SECONDS, SPEEDS

_CGROUPS = Path("/sys/fs/cgroup")
_PERIOD_US = 40_000  # short, so that a device runs evenly; 1 ms, the least quota, is 1/40 of a core
_ALL_CORES = 0.8  # of the cores go to the workers, the rest is the client's
_N_RUNS = 3
_CALIBRATED_PART = 0.25  # of the run's time is spent on finding what a plain loop gets
_ROUNDS = 400  # of work on each batch: about 10 ms of a core, as by sleeping


class Burner:
    """Doubles its rows after real work on them, and says beside each which worker did it, and in how many core-seconds."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex  # a model of its own, with nothing measured yet

    def load(self, device: str) -> None:
        """Make what the work needs."""
        self.square = np.full((96, 96), 0.01, np.float32)
        self.number = int(os.environ.get("DASKINFER_DEVICE", "cpu:0").removeprefix("cpu:"))  # the client loads it, too

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        began = time.thread_time()
        for _ in range(_ROUNDS):
            self.square @ self.square
        answer = np.empty((len(batch), 3))
        answer[:, :1] = 2 * batch
        answer[:, 1:] = self.number, (time.thread_time() - began) / len(batch)
        return answer


def quotas(session: Session) -> Verdicts:
    """Makespan over rows / sum of the speeds that the workers have under their quotas; the median of several runs."""
    for name, ratios in SPEEDS.items():
        target = f"unlike devices {name}, by CPU quotas"
        try:
            found = run_fresh("quotas:run", {"ratios": ratios, "seconds": IDEAL_SECONDS * session.scale})
        except Unavailable as error:
            yield skipped(target, str(error))
        except Failed as error:
            yield failed(target, str(error))
        else:
            session.raw.setdefault("quotas", {})[name] = found
            yield at_most(target, found["ratio"], 1.05)


def run(ratios: list[float], seconds: float) -> dict[str, Any]:
    """Several predicts on a cluster whose workers have quotas in these ratios."""
    from distributed import Client

    import daskinfer as di

    devices = ["cpu"] * len(ratios)
    with di.LocalDeviceCluster(devices, dashboard_address=None) as cluster, Client(cluster) as client:
        di.predict(np.abs, np.ones((1000, 1), np.float32), client=client)
        workers = {w["device"]: w | {"address": a} for a, w in client.run(_who).items()}
        in_order = [workers[f"cpu:{i}"] for i in range(len(ratios))]
        with contextlib.ExitStack() as limits:
            for worker, cores in zip(in_order, _cores(ratios), strict=True):
                limits.enter_context(_limited(worker["pid"], cores))
            addresses = [worker["address"] for worker in in_order]
            runs = [_one_run(client, addresses, seconds) for _ in range(_N_RUNS)]
    return {"ratio": median(run["seconds"] / run["ideal"] for run in runs), "runs": runs}


def _one_run(client: Any, addresses: list[str], seconds: float) -> dict[str, Any]:
    """One predict, of as many rows as plain loops take ``seconds`` for, and what would have been ideal."""
    import daskinfer as di

    plain, cores = _calibrated(client, addresses, max(1.0, seconds * _CALIBRATED_PART))
    x = np.arange(round(seconds * sum(plain)), dtype=np.float32)[:, None]
    y, report = di.predict(Burner(), x, client=client, device_weights="auto", batch_size=BATCH_SIZE, return_report=True)
    if not np.array_equal(y[:, :1], 2 * x):
        raise ValueError("the answer is wrong")
    speeds = [n_cores / y[y[:, 1] == i, 2].mean() for i, n_cores in enumerate(cores)]
    return {
        "seconds": report.seconds,
        "ideal": len(x) / sum(speeds),
        "rows": len(x),
        "plain": plain,  # rows per second of a plain loop before the run
        "cores": cores,
        "speeds": speeds,
        "done": {d.device: d.n_rows for d in report.devices},
    }


def _cores(ratios: list[float]) -> list[float]:
    """Cores of each worker: in these ratios, none above one, and a part of the machine left free."""
    per_ratio = min(1.0 / max(ratios), _ALL_CORES * (os.cpu_count() or 1) / sum(ratios))
    return [ratio * per_ratio for ratio in ratios]


def _who() -> dict[str, Any]:
    return {"pid": os.getpid(), "device": os.environ["DASKINFER_DEVICE"]}


def _calibrated(client: Any, addresses: list[str], seconds: float) -> list[tuple[float, ...]]:
    """Rows per second of each worker under its quota, and the cores it gets: all at once, in a thread as chunks are."""
    futures = [client.submit(calibrate, seconds, workers=[address], pure=False) for address in addresses]
    return list(zip(*client.gather(futures), strict=True))


def calibrate(seconds: float) -> tuple[float, float]:
    """Rows per second of a plain loop in this process, and the cores it gets."""
    burner = Burner()
    burner.load("cpu")
    batch = np.ones((BATCH_SIZE, 1), np.float32)
    began, used, n_rows = time.perf_counter(), time.thread_time(), 0
    while (spent := time.perf_counter() - began) < seconds or not n_rows:
        burner(batch)
        n_rows += len(batch)
    return n_rows / spent, (time.thread_time() - used) / spent


@contextlib.contextmanager
def _limited(pid: int, cores: float) -> Iterator[None]:
    """Move a process into a cgroup of its own that gets so many cores."""
    quota_us = max(1_000, round(cores * _PERIOD_US))
    unified = (_CGROUPS / "cgroup.controllers").exists()
    parent = _CGROUPS if unified else _CGROUPS / "cpu"
    group = parent / f"daskinfer-benchmark-{pid}"
    try:
        try:
            group.mkdir()
            for name, value in (_limits_v2 if unified else _limits_v1)(quota_us).items():
                (group / name).write_text(value)
            (group / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            raise Unavailable(f"no quota of CPU time can be set on this machine's cgroups: {error}") from None
        yield
    finally:
        with contextlib.suppress(OSError):
            (parent / "cgroup.procs").write_text(str(pid))
            group.rmdir()


def _limits_v2(quota_us: int) -> dict[str, str]:
    return {"cpu.max": f"{quota_us} {_PERIOD_US}"}


def _limits_v1(quota_us: int) -> dict[str, str]:
    return {"cpu.cfs_period_us": str(_PERIOD_US), "cpu.cfs_quota_us": str(quota_us)}
