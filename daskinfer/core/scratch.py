"""Files and folders in the temporary folder that go with their owner, however it ends.

The owner holds a lock on what it made; the system lets go of it with the process, ``kill -9`` included. Whoever makes the
next one removes what nobody holds any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_FOLDER_PREFIX = "daskinfer-scratch-"


class ScratchDir:
    """A new folder in the temporary folder, for as long as this process lives at most; ``path`` is its name.

    Raises
    ------
    OSError
        Where it cannot be made.

    Examples
    --------
    >>> scratch = ScratchDir()
    >>> os.path.isdir(scratch.path)
    True
    >>> scratch.remove()
    """

    def __init__(self) -> None:
        remove_stale_scratch()
        # Under another name until it is locked: a process that starts now would find it without an owner.
        unlocked = tempfile.mkdtemp(prefix=f".{_FOLDER_PREFIX}")
        self.path = os.path.join(os.path.dirname(unlocked), os.path.basename(unlocked)[1:])
        self._lock_descriptor = os.open(unlocked, os.O_RDONLY)
        fcntl.flock(self._lock_descriptor, fcntl.LOCK_EX)
        os.rename(unlocked, self.path)

    def remove(self) -> None:
        """Remove the folder with all that is in it, and what workers of a killed process have written into its own since."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock_descriptor)
        remove_stale_scratch()


def remove_stale_scratch() -> None:
    """Remove the folders of killed processes: for those who make none, as they find nothing left to compute."""
    remove_stale(_FOLDER_PREFIX)


def remove_stale(prefix: str) -> None:
    """Remove files and folders of this name in the temporary folder whose owners have ended."""
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError), _hold_lock(path):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextlib.contextmanager
def _hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock on it; OSError where somebody does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
