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

from daskinfer.core.chunks import RowFailure, StoredPart
from daskinfer.core.files import Syncer, fsync_path, remove_path, write_atomic
from daskinfer.core.row_ranges import subtract_ranges
from daskinfer.errors import OutputExists, OutputLocked, StorageError
from daskinfer.storage import staging
from daskinfer.storage.manifest import CommitState, Header, JournalEntry, StoredRange, format_line, parse_lines
from daskinfer.storage.paths import (
    COMPLETE,
    CREATION_LOCK,
    FAILED_ROWS,
    HEADER,
    LOCK,
    STAGING,
    Shard,
    check_same_run,
    existing_header,
    format_receipts_name,
    format_shard_suffix,
    get_manifest_path,
    get_partial_path,
    how_to_restart,
    is_part_intact,
    make_stored_part,
    not_ours_error,
    read_header,
    read_part,
    read_record,
)

_BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")

OutputCreator = Callable[[str], None]  # makes the empty output at a path


class OutputJournal:
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
        self.folder, self.partial_path = get_manifest_path(path), get_partial_path(path)
        self.is_complete = False
        self.commit_state = CommitState(header.n_rows, header.unit_rows)
        self.run_folder = ""
        self._batch_size = batch_size
        self._lock_descriptors: list[int] = []
        self._log: BinaryIO | None = None
        self._syncer = Syncer()

    def __enter__(self) -> OutputJournal:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._syncer.close()
        finally:
            if self._log is not None:
                self._log.close()
            with contextlib.suppress(OSError):
                self._remove_empty_manifest()
            for descriptor in self._lock_descriptors:
                os.close(descriptor)
            self._lock_descriptors.clear()

    def _remove_empty_manifest(self) -> None:
        """Remove the manifest where it is nothing but the locks, and all of it is this run's."""
        if self.shard or not self._has_current_lock():
            return
        left = sorted(self.folder.iterdir(), key=lambda path: path.name == LOCK)
        if all(path.name.startswith((LOCK, CREATION_LOCK)) for path in left):
            for path in left:  # the one that is held last: without it another run begins, and takes the others
                path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _has_current_lock(self) -> bool:
        """Whether the lock that is held is the one that lies there: somebody may have removed all, and begun anew."""
        try:
            return bool(self._lock_descriptors) and os.path.samestat(
                os.fstat(self._lock_descriptors[0]), os.stat(self.folder / LOCK)
            )
        except FileNotFoundError:
            return False

    def lock(self) -> None:
        """Take the lock.

        Raises
        ------
        OutputLocked
            Where another run has it.
        """
        self._acquire_lock(LOCK, fcntl.LOCK_SH if self.shard else fcntl.LOCK_EX)
        if self.shard:
            self._acquire_lock(f"{LOCK}{format_shard_suffix(self.shard)}", fcntl.LOCK_EX)

    def _acquire_lock(self, name: str, kind: int) -> None:
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
                        self._lock_descriptors.append(descriptor)
                    else:
                        os.close(descriptor)

    def open(self, create: OutputCreator, *, overwrite: bool = False, retry_failed_rows: bool = False) -> None:
        """Begin the output, or find out what of it is done; ``again``: rows without an answer count as not done.

        Raises
        ------
        OutputExists
            Where the output was begun with something else, or is not daskinfer's.
        """
        with self._hold_creation_lock():
            if overwrite:
                self._wipe()
            found = read_header(self.path)
            self._check_covered_by_manifest(found)
            if found is None or existing_header(self.path) is None:  # or whoever removed the output wants it anew
                self._create_output(create)
            else:
                check_same_run(self.path, found, self.header, self._batch_size)
                self.header, self.is_complete = found, self._has_completion_record()
                if self.is_complete and self.partial_path.exists():
                    self._rename_output()  # the last run was killed just before
            if self.is_complete:
                return
            boot = self._open_log()
        if boot not in ("", _read_boot_id()):
            self._recheck(everything=True)
        for failure in self.commit_state.failures if retry_failed_rows else ():
            self.invalidate(failure.start, failure.stop)

    @property
    def done(self) -> list[tuple[int, int]]:
        """Rows that are stored."""
        return [(0, self.header.n_rows)] if self.is_complete else self.commit_state.done

    @property
    def failures(self) -> tuple[RowFailure, ...]:
        """Rows that are done, and have no answer."""
        progress = self._merge_shards() if self.is_complete else self.commit_state
        return progress.failures if progress is not None else ()

    def _merge_shards(self) -> CommitState | None:
        """What all shards have done; None where one has not ended."""
        progress = CommitState(self.header.n_rows, self.header.unit_rows)
        paths = sorted(self.folder.glob("receipts*.jsonl"))
        ended = [progress.replay(parse_lines(path.read_bytes())[0]).is_finished for path in paths]
        n_logs = self.header.shards or 1
        return (
            progress
            if ended == [True] * n_logs and not any(subtract_ranges((0, self.header.n_rows), progress.done))
            else None
        )

    def _has_completion_record(self) -> bool:
        record = read_record(self.folder / COMPLETE)
        if record == {}:
            raise OutputExists(
                f"the manifest {str(self.folder)!r} was changed: {COMPLETE} is not as it was written. Look with daskinfer "
                f"verify what else was, or {how_to_restart(str(self.path), self.header)} to start over."
            )
        return record is not None

    def record_batch_config(self, batch_config: Mapping[str, Any]) -> None:
        """Keep the micro-batches that were chosen, before the first receipt: whoever goes on computes the same bytes."""
        header = replace(self.header, **batch_config)
        if header != self.header:
            self.header = header
            write_atomic(self.folder / HEADER, format_line(header.to_record()))

    def commit(self, entry: JournalEntry, files: Iterable[str]) -> None:
        """Say that a chunk is stored, in these files, under the names that they keep."""
        self.commit_state.add(entry)
        self._append_record(entry.to_record())
        assert self._log is not None  # open() was called
        self._syncer.add(files, self._log.fileno())

    def invalidate(self, start: int, stop: int) -> None:
        """Say that rows are not stored as was said."""
        self.commit_state.invalidate(start, stop)
        self._append_record({"void": [start, stop]})

    def recheck(self) -> list[StoredRange]:
        """Read again what may have been written more than once; what is not as its receipt says counts as not done."""
        return [] if self.is_complete else self._recheck(everything=False)

    def _recheck(self, *, everything: bool) -> list[StoredRange]:
        wrong = [
            part
            for part in self.commit_state.stored_ranges
            if part.part is not None
            and (part.needs_recheck or everything)
            and not is_part_intact(self.partial_path, part.part)
        ]
        for part in wrong:
            self.invalidate(part.start, part.stop)
        return wrong

    def finish(self, metadata_parts: Sequence[str]) -> None:
        """Where all rows of all shards are stored: mark the output complete, and give it its name.

        ``metadata`` are the parts that hold no rows. Each step can be repeated: a run killed between two of them is
        continued by the next.
        """
        if self.is_complete:
            return
        self._syncer.flush()
        with self._hold_creation_lock():
            # Nothing is read again after this: another shard may complete the output, which moves it.
            self._append_record({"end": True})
            whole = self._merge_shards()
            if whole is None:
                return  # another shard will be the last
            staging.remove_run_folders(self.folder / STAGING)
            for path in self.folder.glob("*.new"):
                remove_path(path)  # of a run that was killed
            if whole.failures:
                listed = [asdict(failure) for failure in whole.failures]
                write_atomic(self.folder / FAILED_ROWS, (json.dumps(listed, indent=1) + "\n").encode())
            write_atomic(self.folder / COMPLETE, format_line(self._build_completion_record(metadata_parts)))
            self.is_complete = True
            # Last: what has the output's own name is always complete.
            self._rename_output()

    def discard(self) -> None:
        """Remove what was begun, where nothing is stored and nobody takes part; not what has come to lie at the path."""
        if self._has_current_lock():
            with self._hold_creation_lock():
                remove_path(self.partial_path)
                self._wipe_manifest()

    def _build_completion_record(self, metadata_parts: Sequence[str]) -> dict[str, Any]:
        names = [HEADER, *(path.name for path in sorted(self.folder.glob("receipts*.jsonl")))]
        names += [FAILED_ROWS] if (self.folder / FAILED_ROWS).exists() else []
        files = [make_stored_part(name, (self.folder / name).read_bytes()) for name in names]
        heads = [
            make_stored_part(name, read_part(self.partial_path, name, _get_part_nbytes(name, self.partial_path)))
            for name in metadata_parts
        ]
        return {
            "files": _serialize_parts(files),
            "metadata": _serialize_parts(heads),
            "nbytes": _get_file_nbytes(self.partial_path),
        }

    def _rename_output(self) -> None:
        if os.path.lexists(self.path):
            raise OutputExists(
                f"the output {self.path!r} appeared while it was being computed; nothing is ever overwritten. "
                f"The whole answer lies at {str(self.partial_path)!r}: move what is in the way, and repeat the call."
            )
        os.rename(self.partial_path, self.path)
        fsync_path(self.folder.parent)

    def _create_output(self, create: OutputCreator) -> None:
        self._wipe()
        # The header first: an output without one is not known to be ours.
        write_atomic(self.folder / HEADER, format_line(self.header.to_record()))
        made = self.folder / f"made{Path(self.path).suffix}"
        try:
            create(str(made))
        except BaseException:
            remove_path(made)  # a disk that is full leaves half a file
            raise
        os.rename(made, self.partial_path)  # whole, or not at all
        fsync_path(self.folder.parent)

    def _wipe(self) -> None:
        """Remove all but the locks; what says that it is complete first, what says whose it is last."""
        for path in (self.folder / COMPLETE, Path(self.path), self.partial_path):
            remove_path(path)
        self._wipe_manifest()

    def _wipe_manifest(self) -> None:
        staging.remove_run_folders(self.folder / STAGING)
        kept = (LOCK, CREATION_LOCK)
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == HEADER):
            if not path.name.startswith(kept):
                remove_path(path)

    def _check_covered_by_manifest(self, found: Header | None) -> None:
        unfinished = found is None or self.partial_path.exists() or not (self.folder / COMPLETE).exists()
        if os.path.lexists(self.path) and unfinished:
            raise not_ours_error(self.path)
        if found is None and self.partial_path.exists():
            raise not_ours_error(self.partial_path)

    def _open_log(self) -> str:
        """Cut off what a crash tore, and begin a run; on which machine the last one was."""
        # Before the log is read: who wrote for an earlier run has ended then.
        staging.remove_run_folders(self.folder / STAGING, self._label)
        self._log = open(self.folder / format_receipts_name(self.shard), "a+b", buffering=0)  # noqa: SIM115  # __exit__ closes it
        self._log.seek(0)
        records, n_bytes = parse_lines(self._log.read())
        self._log.truncate(n_bytes)
        self.commit_state = CommitState(self.header.n_rows, self.header.unit_rows).replay(records)
        self.run_folder = str(staging.create_run_folder(self.folder / STAGING, self._label))
        boot, here = self.commit_state.boot_id, {"run": self.commit_state.n_runs + 1, "boot": _read_boot_id()}
        self._append_record(here)
        self.commit_state.replay([here])
        return boot

    @property
    def _label(self) -> str:
        return f"run{format_shard_suffix(self.shard)}"

    def _append_record(self, record: Mapping[str, Any]) -> None:
        assert self._log is not None  # open() was called
        line = format_line(record)
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
    def _hold_creation_lock(self) -> Iterator[None]:
        """Hold the lock under which an output is begun and completed; shards wait for one another."""
        descriptor = os.open(self.folder / CREATION_LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _get_part_nbytes(name: str, output: Path) -> int:
    if ":" not in name:
        return (output / name).stat().st_size
    start, _, stop = name.partition(":")
    return int(stop) - int(start)


def _get_file_nbytes(path: Path) -> int:
    """Bytes of a single file; 0 for a folder, whose files all have receipts."""
    return path.stat().st_size if path.is_file() else 0


def _serialize_parts(parts: Sequence[StoredPart]) -> list[list[Any]]:
    return [list(asdict(part).values()) for part in parts]


def _read_boot_id() -> str:
    try:
        return _BOOT_ID_PATH.read_text().strip()
    except OSError:
        return "unknown"
