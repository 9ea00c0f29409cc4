"""Staging folders for uncommitted data; they also keep workers that outlive their run from writing into the output.

Each run has its own folder under ``staging``. The next run removes it first: a late writer then has nowhere to write. A
worker that writes into the output itself (a region of a ``.npy`` file cannot be renamed) holds the folder's *fence*, a lock
that it shares with other writers. Removing the folder waits for that lock and for nothing else, so writers on other hosts
count like local ones.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from daskinfer.core.files import lock_descriptor, remove_path
from daskinfer.errors import OutputLocked

FENCE = "fence"
WAIT_SECONDS = 30.0  # grace period for the writers of an earlier run; arbitrary
POLL_SECONDS = 0.02


def create_run_folder(staging: Path, label: str) -> Path:
    """Create the folder of a new run; ``label`` names the sequence of runs that it belongs to."""
    run = staging / f"{label}.{uuid.uuid4().hex}"
    run.mkdir(parents=True)
    (run / FENCE).touch()
    return run


def remove_run_folders(staging: Path, label: str | None = None) -> None:
    """Remove the folders of all runs with this label (None: of every run), after their writers have finished.

    Raises
    ------
    OutputLocked
        If one is still writing after ``WAIT_SECONDS``.
    """
    for run in list(staging.iterdir()) if staging.exists() else ():
        if label is None or run.name.startswith(f"{label}."):
            _remove_run_folder(run)
    if label is None:
        remove_path(staging)


@contextlib.contextmanager
def hold_write_fence(run_folder: str) -> Iterator[None]:
    """Hold the fence of a run while writing into the output itself.

    Raises
    ------
    FileNotFoundError
        If another run has taken over the output.
    """
    with open(os.path.join(run_folder, FENCE), "r+b") as fence:
        lock_descriptor(fence.fileno(), shared=True)
        os.stat(fence.name)  # the previous holder of the lock may have removed it
        yield


def _remove_run_folder(run_folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError), open(run_folder / FENCE, "r+b") as fence:
        _wait_for_writers(fence.fileno(), run_folder / FENCE)
        (run_folder / FENCE).unlink()  # while holding the lock: writers that wait for it then find the file missing
    old = run_folder if run_folder.suffix == ".old" else run_folder.with_name(f"{run_folder.name}.old")
    os.rename(run_folder, old)  # atomic, even while files are written into it
    remove_path(old)


def _wait_for_writers(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return lock_descriptor(descriptor, wait=False)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OutputLocked(
                    f"a worker of an earlier run is still writing ({str(path)!r} is locked). Stop that process, then repeat "
                    "the call."
                ) from None
        time.sleep(POLL_SECONDS)
