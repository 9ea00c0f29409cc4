"""Files that are there after a crash: written wholly or not at all, and flushed in the order that counts."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

SYNC_SECONDS = 1.0  # between flushes, for the loss of power


class Syncer:
    """Flushes files and then the log that speaks of them, about once a second, in a thread of its own."""

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._log_descriptor = -1
        self._last_flush = time.monotonic()
        self._pool: ThreadPoolExecutor | None = None
        self._pending_flush: Future[None] | None = None

    def add(self, files: Iterable[str], log_descriptor: int) -> None:
        """Files that were written, and the descriptor of the log that speaks of them."""
        self._files.update(files)
        self._log_descriptor = log_descriptor
        if time.monotonic() - self._last_flush > SYNC_SECONDS and (
            self._pending_flush is None or self._pending_flush.done()
        ):
            self._start_flush()

    def flush(self) -> None:
        """Flush what is left, and wait for it."""
        self._wait_for_flush()
        if self._files:
            self._start_flush()
            self._wait_for_flush()

    def close(self) -> None:
        """Flush what is left, and end the thread."""
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
    # Data, its names, its receipts: a receipt without its data would be believed.
    for path in sorted(files):
        fsync_path(path)
    for folder in sorted({os.path.dirname(path) for path in files}):
        fsync_path(folder)
    os.fsync(log_descriptor)


@contextlib.contextmanager
def with_filename(path: str | Path) -> Iterator[None]:
    """Say of which file it is that the system complains: on writing it does not."""
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
    """Remove whatever lies there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a small file, wholly or not at all."""
    new = path.with_name(f"{path.name}.new")
    with with_filename(new), open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    fsync_path(path.parent)
