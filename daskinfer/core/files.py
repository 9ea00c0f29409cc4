"""Files that survive a crash, and locks that do not: atomic writes, ordered flushes, ``flock``, and scratch folders.

A lock is the system's: it ends with the process that holds it, ``kill -9`` included. The owner of a scratch folder holds a
lock on it, so that the next process can remove what no living process owns.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

SYNC_SECONDS = 1.0  # between flushes, for the loss of power
_SCRATCH_PREFIX = "daskinfer-scratch-"


class Syncer:
    """Background flusher: written files first, then the log that records them, about once a second in its own thread."""

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._log_descriptor = -1
        self._last_flush = time.monotonic()
        self._pool: ThreadPoolExecutor | None = None
        self._pending_flush: Future[None] | None = None

    def add(self, files: Iterable[str], log_descriptor: int) -> None:
        """Register files that were written, and the descriptor of the log that records them; flush if it is time."""
        self._files.update(files)
        self._log_descriptor = log_descriptor
        if time.monotonic() - self._last_flush > SYNC_SECONDS and (
            self._pending_flush is None or self._pending_flush.done()
        ):
            self._start_flush()

    def flush(self) -> None:
        """Flush what is pending, and wait for it."""
        self._wait_for_flush()
        if self._files:
            self._start_flush()
            self._wait_for_flush()

    def close(self) -> None:
        """Flush what is pending, and stop the thread."""
        try:
            self.flush()
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def _start_flush(self) -> None:
        self._wait_for_flush()
        self._pool = self._pool or ThreadPoolExecutor(1, "daskinfer-sync")
        files, self._files, self._last_flush = self._files, set(), time.monotonic()
        self._pending_flush = self._pool.submit(_flush, files, self._log_descriptor)

    def _wait_for_flush(self) -> None:
        running, self._pending_flush = self._pending_flush, None
        if running is not None:
            running.result()


def _flush(files: set[str], log_descriptor: int) -> None:
    # Data, then folder entries, then receipts: a receipt that reached the disk before its data would be trusted.
    for path in sorted(files):
        fsync_path(path)
    for folder in sorted({os.path.dirname(path) for path in files}):
        fsync_path(folder)
    os.fsync(log_descriptor)


@contextlib.contextmanager
def add_filename_to_errors(path: str | Path) -> Iterator[None]:
    """Add the file's name to an OSError that has none: the system names no file when a write fails."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def fsync_path(path: str | Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_path(path: Path) -> None:
    """Remove a file, a link or a folder with its content; nothing happens if it is missing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a small file atomically: after a crash either all of it or the previous version is there."""
    new = path.with_name(f"{path.name}.new")
    with add_filename_to_errors(new), open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    fsync_path(path.parent)


def lock_descriptor(descriptor: int, *, shared: bool = False, wait: bool = True) -> None:
    """Lock an open file until its descriptor is closed.

    Parameters
    ----------
    descriptor
        The open file; the lock ends with it, or with the process.
    shared
        True: other shared locks are allowed beside this one. False: no other lock is.
    wait
        True: wait until the lock is free.

    Raises
    ------
    BlockingIOError
        If ``wait`` is False and another process, or another descriptor of this one, holds the lock.

    Examples
    --------
    >>> with tempfile.TemporaryFile() as file:
    ...     lock_descriptor(file.fileno(), wait=False)
    """
    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


@contextlib.contextmanager
def hold_lock(path: str | Path, *, create: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold the exclusive lock on a file or folder; ``create``: make the file, empty, if it is missing.

    Raises
    ------
    BlockingIOError
        If ``wait`` is False and another process, or another descriptor of this one, holds the lock.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY, 0o666)
    try:
        lock_descriptor(descriptor, wait=wait)
        yield
    finally:
        os.close(descriptor)


class ScratchDir:
    """A new folder in the temporary folder that lives no longer than this process; ``path`` is its name.

    Raises
    ------
    OSError
        If it cannot be created.

    Examples
    --------
    >>> scratch = ScratchDir()
    >>> os.path.isdir(scratch.path)
    True
    >>> scratch.remove()
    """

    def __init__(self) -> None:
        remove_stale_scratch()
        # Under another name until it is locked: a process that starts now would take it for abandoned.
        unlocked = tempfile.mkdtemp(prefix=f".{_SCRATCH_PREFIX}")
        self.path = os.path.join(os.path.dirname(unlocked), os.path.basename(unlocked)[1:])
        self._lock_descriptor = os.open(unlocked, os.O_RDONLY)
        lock_descriptor(self._lock_descriptor)
        os.rename(unlocked, self.path)

    def remove(self) -> None:
        """Remove the folder and its content, then those of killed processes, whose workers may have written since."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock_descriptor)
        remove_stale_scratch()


def remove_stale_scratch() -> None:
    """Remove the scratch folders of killed processes; also for callers that create none, having nothing left to compute."""
    remove_stale_files(_SCRATCH_PREFIX)


def remove_stale_files(prefix: str) -> None:
    """Remove files and folders in the temporary folder whose names start with ``prefix`` and whose owners have ended."""
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError), hold_lock(path, wait=False):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
