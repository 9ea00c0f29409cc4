"""Rows that make the network fail: exactly these have no answer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.benchmarks.judging import Verdict
from tests.benchmarks.processes import run_fresh
from tests.faults import nets
from tests.faults.effort import Effort, judged

N_ROWS, N_BAD, BATCH_SIZE = 100_000, 50, 256


class Picky(nn.Module):
    """Fails where the second number of any row is above 1, which no good row has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nets.Watched("")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x[:, 1] > 1).any()):
            raise ArithmeticError("a number above 1")
        answer: torch.Tensor = self.inner(x)
        return answer


def bad_rows(effort: Effort) -> Verdict:
    """50 of 100,000 rows fail under "skip": just these are masked and listed, all others have the bytes of a plain loop."""
    found = run_fresh("tests.faults.rows:skipped", {"folder": str(effort.folder)})
    return judged(
        f"{N_BAD} bad rows in {N_ROWS:,}",
        f"{found['masked']} masked, {found['listed']} listed, {found['right']:,} others right",
        f"exactly {N_BAD} masked, others right",
        {
            "masked": found["exact"],
            "others": found["right"] == N_ROWS - N_BAD,
            "stored alike": found["stored"],
        },
    )


def skipped(folder: str) -> dict[str, Any]:
    """A predict and a run; in a fresh process."""
    import daskinfer as di

    x = nets.rows(N_ROWS)
    bad = sorted(random.Random(0).sample(range(N_ROWS), N_BAD))
    expected = nets.plain(N_ROWS, BATCH_SIZE)
    x[bad, 1] = 7
    how: dict[str, Any] = {"devices": ["cpu", "cpu"], "batch_size": BATCH_SIZE, "on_error": "skip", "retries": 0}
    y, report = di.predict(Picky(), x, return_report=True, **how)
    stored = Path(folder, "y.npy")
    again = di.run(Picky(), x, stored, **how)
    di.close()
    masked = np.flatnonzero(np.isnan(y).any(axis=1)).tolist()
    return {
        "masked": len(masked),
        "listed": len(report.failed_rows),
        "exact": masked == list(report.failed_rows) == list(again.failed_rows) == bad,
        "right": int((y == expected).all(axis=1).sum()),
        "stored": np.array_equal(np.load(stored), y, equal_nan=True),
    }
