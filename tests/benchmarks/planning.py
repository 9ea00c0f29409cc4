"""The plan of a huge input over a thousand devices: its time and its memory."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

from tests.benchmarks.judging import Verdicts, at_most
from tests.benchmarks.processes import run_fresh
from tests.benchmarks.session import Session

_N_ROWS, _N_DEVICES = 10**9, 1_000
_ROW_NBYTES = 64 * 4  # the MLP's
_MB = 1e6


def plan(session: Session) -> Verdicts:
    """10^9 rows over 1,000 devices, by the planner alone and as users ask for it."""
    for name, function in {"lay_out": "planning:laid_out", "di.plan": "planning:planned"}.items():
        found = run_fresh(function, {})
        session.raw.setdefault("plan", {})[name] = found
        yield at_most(f"plan of 10^9 rows over 1,000 devices, {name}: time", found["seconds"], 1.0, " s")
        yield at_most(f"plan of 10^9 rows over 1,000 devices, {name}: memory", found["peak_nbytes"] / _MB, 50.0, " MB")


def laid_out() -> dict[str, Any]:
    """The planner alone."""
    from daskinfer.scheduling.chunking import make_chunks

    return _measured(lambda: make_chunks(_N_ROWS, [1.0] * _N_DEVICES, batch_size=1024, row_nbytes=_ROW_NBYTES))


def planned() -> dict[str, Any]:
    """What users call, over an input that takes no memory."""
    import numpy as np

    import daskinfer as di
    from tests.benchmarks.works import WORKS

    net = WORKS["mlp"].net()
    x = np.broadcast_to(np.zeros(64, np.float32), (_N_ROWS, 64))
    di.plan(net, x[:10], devices="cpu")  # imports and the first probe are not the plan's
    return _measured(lambda: di.plan(net, x, devices=f"cpu*{_N_DEVICES}"))


def _measured(make: Any) -> dict[str, Any]:
    """Seconds of one call, and the peak of what Python allocated in another, since tracing slows it down."""
    began = time.perf_counter()
    made = make()
    seconds = time.perf_counter() - began
    del made
    tracemalloc.start()
    made = make()
    peak = tracemalloc.get_traced_memory()[1]
    del made
    return {"seconds": seconds, "peak_nbytes": peak}
