"""Networks that fail at the rows that they are told, and leave a file for each chunk that they begin."""

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


def killed(value: float) -> None:
    """End this process as the kernel does where memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def stopped(value: float) -> None:
    """Have this process stand still, every thread of it."""
    os.kill(os.getpid(), signal.SIGSTOP)


def sleeps(value: float) -> None:
    """Never come back."""
    time.sleep(1000)


def holds_the_gil(value: float) -> None:
    """Never come back, nor let any other thread run."""
    ctypes.PyDLL(None).sleep(1000)


def raises(make: Callable[[float], Exception]) -> Callable[[float], None]:
    """Raise what ``make`` gives for the value."""

    def act(value: float) -> None:
        raise make(value)

    return act


def bad(value: float) -> Exception:
    """What a network says of a row that it cannot take."""
    return ValueError(f"bad {value:g}")


def network(
    folder: Path, act: Callable[[float], object], at: Sequence[float], times: int | None = None, seconds: float = 0.0
) -> Callable[[Array], Array]:
    """A network that doubles rows, and acts on a micro-batch with one of these values, ``times`` times (None: always)."""
    name, wanted = str(folder), np.array(at)

    def model(batch: Array) -> Array:
        for value in wanted[np.isin(wanted, batch)]:
            tried = len([file for file in os.listdir(name) if file.startswith(f"acted-{value:g}-")])
            if times is None or tried < times:
                with open(f"{name}/acted-{value:g}-{uuid.uuid4().hex}", "x") as file:
                    file.write(str(os.getpid()))
                act(float(value))
        with open(f"{name}/begun-{batch.max():g}-{uuid.uuid4().hex}", "x"):
            time.sleep(seconds)
        return 2 * batch

    return model


def acted(folder: Path) -> list[int]:
    """The processes that a network acted in, in order."""
    files = sorted(folder.glob("acted-*"), key=lambda file: file.stat().st_mtime_ns)
    return [int(file.read_text() or 0) for file in files]


def n_again(folder: Path) -> int:
    """How many micro-batches were computed more than once, counted each time."""
    begun = Counter(file.name.split("-")[1] for file in folder.glob("begun-*"))
    return sum(count - 1 for count in begun.values())
