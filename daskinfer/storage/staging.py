"""Where a run puts what is not committed yet, and how a writer that outlived its run is kept out of the output.

Each run has a folder of its own under ``staging``. A run that comes after it removes it first: a late writer then finds
nowhere to put anything. Who writes into the output itself (a region of a ``.npy`` file cannot be renamed) holds the
folder's *fence* meanwhile, shared with other writers; removing the folder waits for it, and looks at nothing else, so that
a process of another host counts as well as one of this.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from daskinfer.core.files import remove_path
from daskinfer.errors import OutputLocked

FENCE = "fence"
WAIT_SECONDS = 30.0  # that a writer of an earlier run may take to end; arbitrary
POLL_SECONDS = 0.02


def create_run_folder(staging: Path, label: str) -> Path:
    """A new folder for a run; ``label`` says whose runs it belongs to."""
    run = staging / f"{label}.{uuid.uuid4().hex}"
    run.mkdir(parents=True)
    (run / FENCE).touch()
    return run


def remove_run_folders(staging: Path, label: str | None = None) -> None:
    """Remove the folders of all runs with this label, those of all for None, once nobody writes for them any more.

    Raises
    ------
    OutputLocked
        Where somebody still does after ``WAIT_SECONDS``.
    """
    for run in list(staging.iterdir()) if staging.exists() else ():
        if label is None or run.name.startswith(f"{label}."):
            _remove_run_folder(run)
    if label is None:
        remove_path(staging)


@contextlib.contextmanager
def write_fence(run_folder: str) -> Iterator[None]:
    """Write into the output itself, as long as the run is the output's.

    Raises
    ------
    FileNotFoundError
        Where another run has taken over.
    """
    with open(os.path.join(run_folder, FENCE), "r+b") as fence:
        fcntl.flock(fence, fcntl.LOCK_SH)
        os.stat(fence.name)  # whoever held the lock until now may have removed it
        yield


def _remove_run_folder(run_folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError), open(run_folder / FENCE, "r+b") as fence:
        _wait_for_writers(fence.fileno(), run_folder / FENCE)
        (run_folder / FENCE).unlink()  # while it is held: who waits for it sees that it is gone
    gone = run_folder if run_folder.suffix == ".old" else run_folder.with_name(f"{run_folder.name}.old")
    os.rename(run_folder, gone)  # at once, whatever is being written into it
    remove_path(gone)


def _wait_for_writers(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise OutputLocked(
                    f"a worker of an earlier run still writes ({str(path)!r} is locked); it has to end first. "
                    "End that process, and repeat the call."
                ) from None
        time.sleep(POLL_SECONDS)
