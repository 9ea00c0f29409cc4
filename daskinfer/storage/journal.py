"""The manifest of one stored output on the disk: locked, begun, continued, appended to, and closed (decision 12).

::

    y.zarr.partial            the output while it is written
    y.zarr                    the same, renamed, once it is complete
    y.zarr.daskinfer/
        lock                  held by a run, shared by the shards of one output; lock-3-of-64 by a shard
        creating              held while an output is begun or completed
        header.json           what the output is made of
        receipts.jsonl        what was committed; receipts-3-of-64.jsonl of a shard
        staging/              a folder per run, for what is not committed yet; gone once the output is complete
        failed_rows.json      rows without an answer, where there are any
        complete.json         checksums of all of this; it stands once the output is complete

Locks are the system's: they go with the process, however it ends. Files of locks are empty and stay, since a lock on a
file that was removed and made anew would not be the same.

What is committed survives the process at once. For a loss of power the data and then its receipts are flushed, about once a
second in a thread of its own; the system may still write receipts before data, so a run that goes on after the machine was
started anew (or on another) reads again what the receipts speak of.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from daskinfer.core.chunks import Failure, Written
from daskinfer.core.files import Syncer, remove, sync, write_whole
from daskinfer.core.row_ranges import left_over
from daskinfer.errors import OutputExists, OutputLocked, StorageError
from daskinfer.storage import staging
from daskinfer.storage.manifest import Entry, Header, Part, Progress, read_lines, to_line
from daskinfer.storage.paths import (
    COMPLETE,
    CREATING,
    FAILED,
    HEADER,
    LOCK,
    STAGING,
    Shard,
    anew,
    begun,
    foreign,
    is_stored,
    manifest_of,
    measured,
    partial_of,
    read_header,
    read_part,
    read_record,
    receipts_name,
    refuse_differences,
    suffix,
)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Make = Callable[[str], None]  # makes the empty output at a path


class Ledger:
    """One output's manifest, held by one run; a context manager that lets go of it.

    Note: one thread uses it; flushing is done in a thread of its own.

    Parameters
    ----------
    path
        The output's.
    header
        What the run wants to write.
    batch_size
        The micro-batch that the caller named; None: any that an earlier run chose will do.
    shard
        Which part of the output this run writes (i, n), counted from 1; None: all of it.
    """

    def __init__(self, path: str, header: Header, batch_size: int | None = None, shard: Shard | None = None) -> None:
        self.path, self.header, self.shard = path, header, shard
        self.folder, self.partial = manifest_of(path), partial_of(path)
        self.complete = False
        self.progress = Progress(header.n_rows, header.unit_rows)
        self.run_folder = ""
        self._batch_size = batch_size
        self._held: list[int] = []
        self._log: BinaryIO | None = None
        self._syncer = Syncer()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._syncer.close()
        finally:
            if self._log is not None:
                self._log.close()
            with contextlib.suppress(OSError):
                self._leave_no_locks()
            for descriptor in self._held:
                os.close(descriptor)
            self._held.clear()

    def _leave_no_locks(self) -> None:
        """Remove the manifest where it is nothing but the locks, and all of it is this run's."""
        if self.shard or not self._is_ours():
            return
        left = sorted(self.folder.iterdir(), key=lambda path: path.name == LOCK)
        if all(path.name.startswith((LOCK, CREATING)) for path in left):
            for path in left:  # the one that is held last: without it another run begins, and takes the others
                path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _is_ours(self) -> bool:
        """Whether the lock that is held is the one that lies there: somebody may have removed all, and begun anew."""
        try:
            return bool(self._held) and os.path.samestat(os.fstat(self._held[0]), os.stat(self.folder / LOCK))
        except FileNotFoundError:
            return False

    def hold(self) -> None:
        """Take the lock.

        Raises
        ------
        OutputLocked
            Where another run has it.
        """
        self._lock(LOCK, fcntl.LOCK_SH if self.shard else fcntl.LOCK_EX)
        if self.shard:
            self._lock(f"{LOCK}{suffix(self.shard)}", fcntl.LOCK_EX)

    def _lock(self, name: str, kind: int) -> None:
        path, held = self.folder / name, False
        while not held:  # or its owner has just withdrawn the output: the lock was nobody's any more
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir()
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                    held = os.path.samestat(os.fstat(descriptor), os.stat(path))
                except BlockingIOError:
                    raise OutputLocked(
                        f"the output {self.path!r} is held by another run ({path} is locked); one run, or one per shard, "
                        "may write it at a time. Wait until that run has ended, and repeat the call."
                    ) from None
                finally:
                    if held:
                        self._held.append(descriptor)
                    else:
                        os.close(descriptor)

    def open(self, make: Make, *, fresh: bool = False, again: bool = False) -> None:
        """Begin the output, or find out what of it is done; ``again``: rows without an answer count as not done.

        Raises
        ------
        OutputExists
            Where the output was begun with something else, or is not daskinfer's.
        """
        with self._creating():
            if fresh:
                self._wipe()
            found = read_header(self.path)
            self._refuse_foreign(found)
            if found is None or begun(self.path) is None:  # or whoever removed the output wants it anew
                self._begin(make)
            else:
                refuse_differences(self.path, found, self.header, self._batch_size)
                self.header, self.complete = found, self._is_complete()
                if self.complete and self.partial.exists():
                    self._publish()  # the last run was killed just before
            if self.complete:
                return
            boot = self._open_log()
        if boot not in ("", _boot()):
            self._recheck(everything=True)
        for failure in self.progress.failures if again else ():
            self.void(failure.start, failure.stop)

    @property
    def done(self) -> list[tuple[int, int]]:
        """Rows that are stored."""
        return [(0, self.header.n_rows)] if self.complete else self.progress.done

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Rows that are done, and have no answer."""
        progress = self._whole() if self.complete else self.progress
        return progress.failures if progress is not None else ()

    def _whole(self) -> Progress | None:
        """What all shards have done; None where one has not ended."""
        progress = Progress(self.header.n_rows, self.header.unit_rows)
        paths = sorted(self.folder.glob("receipts*.jsonl"))
        ended = [progress.read(read_lines(path.read_bytes())[0]).ended for path in paths]
        n_logs = self.header.shards or 1
        return progress if ended == [True] * n_logs and not any(left_over((0, self.header.n_rows), progress.done)) else None

    def _is_complete(self) -> bool:
        record = read_record(self.folder / COMPLETE)
        if record == {}:
            raise OutputExists(
                f"the manifest {str(self.folder)!r} was changed: {COMPLETE} is not as it was written. Look with daskinfer "
                f"verify what else was, or {anew(str(self.path), self.header)} to start over."
            )
        return record is not None

    def chose(self, micro_batches: Mapping[str, Any]) -> None:
        """Keep the micro-batches that were chosen, before the first receipt: whoever goes on computes the same bytes."""
        header = replace(self.header, **micro_batches)
        if header != self.header:
            self.header = header
            write_whole(self.folder / HEADER, to_line(header.record()))

    def commit(self, entry: Entry, files: Iterable[str]) -> None:
        """Say that a chunk is stored, in these files, under the names that they keep."""
        self.progress.add(entry)
        self._append(entry.record())
        assert self._log is not None  # open() was called
        self._syncer.add(files, self._log.fileno())

    def void(self, start: int, stop: int) -> None:
        """Say that rows are not stored as was said."""
        self.progress.void(start, stop)
        self._append({"void": [start, stop]})

    def recheck(self) -> list[Part]:
        """Read again what may have been written more than once; what is not as its receipt says counts as not done."""
        return [] if self.complete else self._recheck(everything=False)

    def _recheck(self, *, everything: bool) -> list[Part]:
        wrong = [
            part
            for part in self.progress.parts
            if part.written is not None and (part.again or everything) and not is_stored(self.partial, part.written)
        ]
        for part in wrong:
            self.void(part.start, part.stop)
        return wrong

    def finish(self, metadata: Sequence[str]) -> None:
        """Where all rows of all shards are stored: mark the output complete, and give it its name.

        ``metadata`` are the parts that hold no rows. Each step can be repeated: a run killed between two of them is
        continued by the next.
        """
        if self.complete:
            return
        self._syncer.flush()
        with self._creating():
            # Nothing is read again after this: another shard may complete the output, which moves it.
            self._append({"end": True})
            whole = self._whole()
            if whole is None:
                return  # another shard will be the last
            staging.end(self.folder / STAGING)
            for path in self.folder.glob("*.new"):
                remove(path)  # of a run that was killed
            if whole.failures:
                listed = [asdict(failure) for failure in whole.failures]
                write_whole(self.folder / FAILED, (json.dumps(listed, indent=1) + "\n").encode())
            write_whole(self.folder / COMPLETE, to_line(self._completion(metadata)))
            self.complete = True
            # Last: what has the output's own name is always complete.
            self._publish()

    def withdraw(self) -> None:
        """Remove what was begun, where nothing is stored and nobody takes part; not what has come to lie at the path."""
        if self._is_ours():
            with self._creating():
                remove(self.partial)
                self._wipe_manifest()

    def _completion(self, metadata: Sequence[str]) -> dict[str, Any]:
        names = [HEADER, *(path.name for path in sorted(self.folder.glob("receipts*.jsonl")))]
        names += [FAILED] if (self.folder / FAILED).exists() else []
        files = [measured(name, (self.folder / name).read_bytes()) for name in names]
        heads = [measured(name, read_part(self.partial, name, _n_bytes(name, self.partial))) for name in metadata]
        return {"files": _plain(files), "metadata": _plain(heads), "nbytes": _size(self.partial)}

    def _publish(self) -> None:
        if os.path.lexists(self.path):
            raise OutputExists(
                f"the output {self.path!r} appeared while it was being computed; nothing is ever overwritten. "
                f"The whole answer lies at {str(self.partial)!r}: move what is in the way, and repeat the call."
            )
        os.rename(self.partial, self.path)
        sync(self.folder.parent)

    def _begin(self, make: Make) -> None:
        self._wipe()
        # The header first: an output without one is not known to be ours.
        write_whole(self.folder / HEADER, to_line(self.header.record()))
        made = self.folder / f"made{Path(self.path).suffix}"
        try:
            make(str(made))
        except BaseException:
            remove(made)  # a disk that is full leaves half a file
            raise
        os.rename(made, self.partial)  # whole, or not at all
        sync(self.folder.parent)

    def _wipe(self) -> None:
        """Remove all but the locks; what says that it is complete first, what says whose it is last."""
        for path in (self.folder / COMPLETE, Path(self.path), self.partial):
            remove(path)
        self._wipe_manifest()

    def _wipe_manifest(self) -> None:
        staging.end(self.folder / STAGING)
        kept = (LOCK, CREATING)
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == HEADER):
            if not path.name.startswith(kept):
                remove(path)

    def _refuse_foreign(self, found: Header | None) -> None:
        unfinished = found is None or self.partial.exists() or not (self.folder / COMPLETE).exists()
        if os.path.lexists(self.path) and unfinished:
            raise foreign(self.path)
        if found is None and self.partial.exists():
            raise foreign(self.partial)

    def _open_log(self) -> str:
        """Cut off what a crash tore, and begin a run; on which machine the last one was."""
        # Before the log is read: who wrote for an earlier run has ended then.
        staging.end(self.folder / STAGING, self._label)
        self._log = open(self.folder / receipts_name(self.shard), "a+b", buffering=0)  # noqa: SIM115  # __exit__ closes it
        self._log.seek(0)
        records, n_bytes = read_lines(self._log.read())
        self._log.truncate(n_bytes)
        self.progress = Progress(self.header.n_rows, self.header.unit_rows).read(records)
        self.run_folder = str(staging.begin(self.folder / STAGING, self._label))
        boot, here = self.progress.boot, {"run": self.progress.n_runs + 1, "boot": _boot()}
        self._append(here)
        self.progress.read([here])
        return boot

    @property
    def _label(self) -> str:
        return f"run{suffix(self.shard)}"

    def _append(self, record: Mapping[str, Any]) -> None:
        assert self._log is not None  # open() was called
        line = to_line(record)
        try:
            if self._log.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise StorageError(
                f"the receipts {self._log.name!r} cannot be written: {error.strerror}; what is stored has to be noted "
                "there. Make room, and repeat the call: it goes on with what is missing.",
                error.errno or 0,
            ) from error

    @contextlib.contextmanager
    def _creating(self) -> Iterator[None]:
        """Hold the lock under which an output is begun and completed; shards wait for one another."""
        descriptor = os.open(self.folder / CREATING, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _n_bytes(name: str, output: Path) -> int:
    if ":" not in name:
        return (output / name).stat().st_size
    start, _, stop = name.partition(":")
    return int(stop) - int(start)


def _size(path: Path) -> int:
    """Bytes of a single file; 0 for a folder, whose files all have receipts."""
    return path.stat().st_size if path.is_file() else 0


def _plain(parts: Sequence[Written]) -> list[list[Any]]:
    return [list(asdict(part).values()) for part in parts]


def _boot() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return "unknown"
