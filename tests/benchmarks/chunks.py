"""Tiny chunks of a network that does nothing: what a chunk costs, and what the client and the scheduler keep of it."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tests.benchmarks.judging import Verdicts, at_least, at_most
from tests.benchmarks.processes import run_fresh
from tests.benchmarks.sampling import Memory, between
from tests.benchmarks.session import Session

N_FEW, N_MANY = 1_000, 50_000
_GROWTH_FROM = 10_000  # chunks done
_FEW_REPEATS = 5
_N_WORKERS = 2
_ROWS = 2  # of a chunk
_EDGE = 5  # samples that the start and the end are a median of


class Nothing:
    """Gives its rows back, and counts its calls in a file that others can read; an empty path counts nothing."""

    def __init__(self, path: str) -> None:
        self.path = path

    def load(self, device: str) -> None:
        """Find this worker's counter; outside of workers none is kept."""
        name = os.environ.get("DASKINFER_DEVICE", "")
        self.counts = np.memmap(self.path, np.int64, "r+") if name and self.path else np.zeros(_N_WORKERS, np.int64)
        self.index = int(name.partition(":")[2] or 0)

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        self.counts[self.index] += 1
        return batch


def chunks(session: Session) -> Verdicts:
    """Cost per chunk at 1,000 and at 50,000, and growth in between."""
    n_many = max(2 * N_FEW, round(N_MANY * session.scale))
    path = session.folder / "counts"
    path.write_bytes(bytes(8 * _N_WORKERS))
    memory = Memory(whole_tree=False, progress=lambda: _done(path))
    found = run_fresh("chunks:run", {"n_many": n_many, "path": str(path)}, meanwhile=memory.watch)
    session.raw["chunks"] = found | {"memory": memory.as_dict()}
    few, many = found["few_seconds"] / N_FEW, found["many_seconds"] / n_many
    yield at_most(f"tiny chunks: cost per chunk at {n_many:,} / at {N_FEW:,}", many / few, 1.1)
    yield at_least(f"tiny chunks: chunks per second, of {n_many:,}", 1 / many, 1_000)
    yield at_least(f"tiny chunks: chunks per second, of {N_FEW:,}", 1 / few, 1_000)
    start = round(_GROWTH_FROM * n_many / N_MANY)
    (samples,) = memory.rss.values()
    gained = _gain(between(samples, start, n_many - 1))
    yield at_most(f"tiny chunks: client and scheduler grow, chunk {start:,} to {n_many:,}", gained / 1e6, 20.0, " MB")


def _done(path: Path) -> float:
    """Chunks done of the long run, each one call of the network."""
    return float(np.fromfile(path, np.int64).sum())


def _gain(nbytes: list[int]) -> float:
    edge = max(1, min(_EDGE, len(nbytes) // 4))
    return median(nbytes[-edge:]) - median(nbytes[:edge])


def run(n_many: int, path: str) -> dict[str, Any]:
    """Predict few chunks several times, then many; client and scheduler are this process."""
    from distributed import Client

    import daskinfer as di

    devices = ["cpu"] * _N_WORKERS
    with di.LocalDeviceCluster(devices, dashboard_address=None) as cluster, Client(cluster) as client:
        few = [_seconds(Nothing(""), N_FEW, client) for _ in range(1 + _FEW_REPEATS)][1:]
        many = _seconds(Nothing(path), n_many, client)
    return {"few_seconds": median(few), "few": few, "many_seconds": many, "calls": int(_done(Path(path)))}


def _seconds(model: Nothing, n_chunks: int, client: Any) -> float:
    """The run's own seconds: of the whole call, the part that grows with the chunks."""
    import dask.array as da

    import daskinfer as di

    x = da.ones((n_chunks * _ROWS, 1), chunks=(_ROWS, 1), dtype=np.float32)
    y, report = di.predict(model, x, client=client, batch_size=_ROWS, return_report=True)
    if y.shape != x.shape or not (y == 1).all():
        raise ValueError("the answer is wrong")
    return float(report.seconds)
