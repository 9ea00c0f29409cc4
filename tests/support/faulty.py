"""Models that fail at chosen rows, and write a file for each micro-batch that they start."""

from __future__ import annotations

import ctypes
import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

N_CHUNKS, CHUNK_ROWS = 40, 100
X = np.arange(float(N_CHUNKS * CHUNK_ROWS), dtype=np.float32)
STICKY = "CUDA error: an illegal memory access was encountered"


def kill(value: float) -> None:
    """Kill this process, as the kernel does when it runs out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop(value: float) -> None:
    """Stop every thread of this process."""
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep(value: float) -> None:
    """Never return."""
    time.sleep(1000)


def hold_the_gil(value: float) -> None:
    """Never return, nor let any other thread run."""
    ctypes.PyDLL(None).sleep(1000)


def raise_error(make_error: Callable[[float], Exception]) -> Callable[[float], None]:
    """Return an action that raises the error which ``make_error`` makes for a value."""

    def act(value: float) -> None:
        raise make_error(value)

    return act


def make_bad_row_error(value: float) -> Exception:
    """Make the error of a model for a row that it cannot process."""
    return ValueError(f"bad {value:g}")


def make_model(
    folder: Path, act: Callable[[float], object], at: Sequence[float], times: int | None = None, seconds: float = 0.0
) -> Callable[[Array], Array]:
    """Make a model that doubles rows and acts on micro-batches with a value of ``at``, ``times`` times (None: always)."""
    name, values = str(folder), np.array(at)

    def model(batch: Array) -> Array:
        for value in values[np.isin(values, batch)]:
            n_acted = len([file for file in os.listdir(name) if file.startswith(f"acted-{value:g}-")])
            if times is None or n_acted < times:
                with open(f"{name}/acted-{value:g}-{uuid.uuid4().hex}", "x") as file:
                    file.write(str(os.getpid()))
                act(float(value))
        with open(f"{name}/started-{batch.max():g}-{uuid.uuid4().hex}", "x"):
            time.sleep(seconds)
        return 2 * batch

    return model


def list_acted_pids(folder: Path) -> list[int]:
    """List the IDs of the processes that a model acted in, in order."""
    files = sorted(folder.glob("acted-*"), key=lambda file: file.stat().st_mtime_ns)
    return [int(file.read_text() or 0) for file in files]


def count_recomputed(folder: Path) -> int:
    """Count the repeated computations of micro-batches."""
    started = Counter(file.name.split("-")[1] for file in folder.glob("started-*"))
    return sum(count - 1 for count in started.values())
