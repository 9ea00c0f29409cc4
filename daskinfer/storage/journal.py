"""The manifest of one stored output on the disk: lock it, create or continue the output, append receipts, complete it.

::

    y.zarr.partial            the output while it is written
    y.zarr                    the same, renamed, once it is complete
    y.zarr.daskinfer/
        lock                  held by a run, shared by the shards of one output; a shard also holds lock-3-of-64
        creating              held while an output is created or completed
        header.json           everything that determines the output's content
        receipts.jsonl        the log of committed chunks; receipts-3-of-64.jsonl for a shard
        staging/              one folder per run for uncommitted data; removed when the output is complete
        failed_rows.json      the rows that failed, if any
        complete.json         checksums of the files above and of the output's metadata; written last

The locks are the system's (``flock``): they end with the process, however it ends. Lock files are empty and are kept, since
a lock on a removed file does not exclude a lock on a new file of the same name.

A committed chunk survives the death of the process at once. Against a loss of power, the data and then the receipts are
flushed about once a second in a background thread. The system may still write receipts before data, so a run that continues
after a reboot, or on another machine, re-reads everything that the receipts list.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

from daskinfer.core.chunks import RowFailure, StoredPart
from daskinfer.core.files import Syncer, fsync_path, hold_lock, lock_descriptor, remove_path, write_atomic
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
    describe_restart,
    format_receipts_name,
    format_shard_suffix,
    get_manifest_path,
    get_partial_path,
    is_part_intact,
    make_stored_part,
    make_unmanaged_output_error,
    read_existing_header,
    read_header,
    read_part,
    read_record,
)

_BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")

OutputCreator = Callable[[str], None]  # creates the empty output at a path


class OutputJournal:
    """The manifest of one output, owned by one run; a context manager that releases it.

    Note: for use by one thread; flushing happens in a background thread.

    Parameters
    ----------
    path
        The path of the output.
    header
        The header of the output that the run is asked for.
    batch_size
        The batch size in rows that the caller named; None: accept the one that an earlier run chose.
    shard
        The part (i, n) of the output that this run writes, counted from 1; None: all of it.
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
        """Remove the manifest if only lock files remain in it and this run owns all of it."""
        if self.shard or not self._has_current_lock():
            return
        remaining = sorted(self.folder.iterdir(), key=lambda path: path.name == LOCK)
        if all(path.name.startswith((LOCK, CREATION_LOCK)) for path in remaining):
            for path in remaining:  # the main lock last: once it is gone, another run may start and take the others
                path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _has_current_lock(self) -> bool:
        """Whether the lock held is still the file at its path: another run may have removed everything and started over."""
        try:
            return bool(self._lock_descriptors) and os.path.samestat(
                os.fstat(self._lock_descriptors[0]), os.stat(self.folder / LOCK)
            )
        except FileNotFoundError:
            return False

    def lock(self) -> None:
        """Lock the output.

        Raises
        ------
        OutputLocked
            If another run holds the lock.
        """
        self._acquire_lock(LOCK, shared=self.shard is not None)
        if self.shard:
            self._acquire_lock(f"{LOCK}{format_shard_suffix(self.shard)}")

    def _acquire_lock(self, name: str, *, shared: bool = False) -> None:
        path, held = self.folder / name, False
        while not held:  # repeats if the owner just removed the lock file: a lock on a removed file protects nothing
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir()
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    lock_descriptor(descriptor, shared=shared, wait=False)
                    held = os.path.samestat(os.fstat(descriptor), os.stat(path))
                except BlockingIOError:
                    raise OutputLocked(
                        f"the output {self.path!r} is locked by another run ({path}); only one run, or one per shard, can "
                        "write it. Wait until that run ends, then repeat the call."
                    ) from None
                finally:
                    if held:
                        self._lock_descriptors.append(descriptor)
                    else:
                        os.close(descriptor)

    def open(self, create: OutputCreator, *, overwrite: bool = False, retry_failed_rows: bool = False) -> None:
        """Create the output, or read which of its rows are done; ``retry_failed_rows``: failed rows count as not done.

        Raises
        ------
        OutputExists
            If a different run started the output, or it was not written by daskinfer.
        """
        with self._hold_creation_lock():
            if overwrite:
                self._wipe()
            existing = read_header(self.path)
            self._check_covered_by_manifest(existing)
            if existing is None or read_existing_header(self.path) is None:  # a header without data is replaced
                self._create_output(create)
            else:
                check_same_run(self.path, existing, self.header, self._batch_size)
                self.header, self.is_complete = existing, self._has_completion_record()
                if self.is_complete and self.partial_path.exists():
                    self._rename_output()  # the last run was killed just before this step
            if self.is_complete:
                return
            last_boot_id = self._open_log()
        if last_boot_id not in ("", _read_boot_id()):
            self._recheck(everything=True)
        for failure in self.commit_state.failures if retry_failed_rows else ():
            self.invalidate(failure.start, failure.stop)

    @property
    def done(self) -> list[tuple[int, int]]:
        """The row ranges that are stored."""
        return [(0, self.header.n_rows)] if self.is_complete else self.commit_state.done

    @property
    def failures(self) -> tuple[RowFailure, ...]:
        """The rows that are done but failed."""
        commit_state = self._merge_shards() if self.is_complete else self.commit_state
        return commit_state.failures if commit_state is not None else ()

    def _merge_shards(self) -> CommitState | None:
        """Merge the logs of all shards; None if one of them has not finished."""
        merged = CommitState(self.header.n_rows, self.header.unit_rows)
        paths = sorted(self.folder.glob("receipts*.jsonl"))
        finished = [merged.replay(parse_lines(path.read_bytes())[0]).is_finished for path in paths]
        n_logs = self.header.shards or 1
        return (
            merged
            if finished == [True] * n_logs and not any(subtract_ranges((0, self.header.n_rows), merged.done))
            else None
        )

    def _has_completion_record(self) -> bool:
        record = read_record(self.folder / COMPLETE)
        if record == {}:
            raise OutputExists(
                f"{COMPLETE} in the manifest {str(self.folder)!r} is corrupt. Run `daskinfer verify {self.path}` to check "
                f"the rest, or {describe_restart(str(self.path), self.header)} to start over."
            )
        return record is not None

    def record_batch_config(self, batch_config: Mapping[str, Any]) -> None:
        """Store the chosen micro-batches before the first receipt, so that a continuing run computes the same bytes."""
        header = replace(self.header, **batch_config)
        if header != self.header:
            self.header = header
            write_atomic(self.folder / HEADER, format_line(header.to_record()))

    def commit(self, entry: JournalEntry, files: Iterable[str]) -> None:
        """Append the receipt of a chunk that is stored in these files, under their final names."""
        self.commit_state.add(entry)
        self._append_record(entry.to_record())
        assert self._log is not None  # open() was called
        self._syncer.add(files, self._log.fileno())

    def invalidate(self, start: int, stop: int) -> None:
        """Withdraw the receipts of rows: they count as not stored."""
        self.commit_state.invalidate(start, stop)
        self._append_record({"void": [start, stop]})

    def recheck(self) -> list[StoredRange]:
        """Re-read what may have been written more than once; parts that do not match their receipts count as not done."""
        return [] if self.is_complete else self._recheck(everything=False)

    def _recheck(self, *, everything: bool) -> list[StoredRange]:
        wrong = [
            stored
            for stored in self.commit_state.stored_ranges
            if stored.part is not None
            and (stored.needs_recheck or everything)
            and not is_part_intact(self.partial_path, stored.part)
        ]
        for stored in wrong:
            self.invalidate(stored.start, stored.stop)
        return wrong

    def finish(self, metadata_parts: Sequence[str]) -> None:
        """End this run's log; if the rows of all shards are stored, mark the output complete and give it its final name.

        ``metadata_parts`` are the parts that hold no rows. Every step can be repeated: if a run is killed between two of
        them, the next run continues.
        """
        if self.is_complete:
            return
        self._syncer.flush()
        with self._hold_creation_lock():
            # Nothing is re-read after this line: another shard may now complete the output, which moves it.
            self._append_record({"end": True})
            merged = self._merge_shards()
            if merged is None:
                return  # another shard will complete the output
            staging.remove_run_folders(self.folder / STAGING)
            for path in self.folder.glob("*.new"):
                remove_path(path)  # left by a killed run
            if merged.failures:
                failures = [asdict(failure) for failure in merged.failures]
                write_atomic(self.folder / FAILED_ROWS, (json.dumps(failures, indent=1) + "\n").encode())
            write_atomic(self.folder / COMPLETE, format_line(self._build_completion_record(metadata_parts)))
            self.is_complete = True
            # Last, so that a file under the output's final name is always complete.
            self._rename_output()

    def discard(self) -> None:
        """Remove an output in which nothing is stored, unless another run took over; what is at its final path stays."""
        if self._has_current_lock():
            with self._hold_creation_lock():
                remove_path(self.partial_path)
                self._wipe_manifest()

    def _build_completion_record(self, metadata_parts: Sequence[str]) -> dict[str, Any]:
        names = [HEADER, *(path.name for path in sorted(self.folder.glob("receipts*.jsonl")))]
        names += [FAILED_ROWS] if (self.folder / FAILED_ROWS).exists() else []
        files = [make_stored_part(name, (self.folder / name).read_bytes()) for name in names]
        metadata = [
            make_stored_part(name, read_part(self.partial_path, name, _get_part_nbytes(name, self.partial_path)))
            for name in metadata_parts
        ]
        return {
            "files": _serialize_parts(files),
            "metadata": _serialize_parts(metadata),
            "nbytes": _get_file_nbytes(self.partial_path),
        }

    def _rename_output(self) -> None:
        if os.path.lexists(self.path):
            raise OutputExists(
                f"another program created {self.path!r} during the run, and nothing is ever overwritten. The complete "
                f"output is at {str(self.partial_path)!r}: move the other one away, then repeat the call."
            )
        os.rename(self.partial_path, self.path)
        fsync_path(self.folder.parent)

    def _create_output(self, create: OutputCreator) -> None:
        self._wipe()
        # The header first: an output without a header is taken for a foreign one.
        write_atomic(self.folder / HEADER, format_line(self.header.to_record()))
        new = self.folder / f"made{Path(self.path).suffix}"
        try:
            create(str(new))
        except BaseException:
            remove_path(new)  # a full disk leaves half a file
            raise
        os.rename(new, self.partial_path)  # atomic
        fsync_path(self.folder.parent)

    def _wipe(self) -> None:
        """Remove everything but the locks: the completion record first, the header, which marks it as managed, last."""
        for path in (self.folder / COMPLETE, Path(self.path), self.partial_path):
            remove_path(path)
        self._wipe_manifest()

    def _wipe_manifest(self) -> None:
        staging.remove_run_folders(self.folder / STAGING)
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == HEADER):
            if not path.name.startswith((LOCK, CREATION_LOCK)):
                remove_path(path)

    def _check_covered_by_manifest(self, header: Header | None) -> None:
        unfinished = header is None or self.partial_path.exists() or not (self.folder / COMPLETE).exists()
        if os.path.lexists(self.path) and unfinished:
            raise make_unmanaged_output_error(self.path)
        if header is None and self.partial_path.exists():
            raise make_unmanaged_output_error(self.partial_path)

    def _open_log(self) -> str:
        """Open the log, cut off a torn line, and record the start of this run; return the boot id of the last run."""
        # Before the log is read: this waits for the writers of earlier runs.
        staging.remove_run_folders(self.folder / STAGING, self._label)
        self._log = open(self.folder / format_receipts_name(self.shard), "a+b", buffering=0)  # noqa: SIM115  # __exit__ closes it
        self._log.seek(0)
        records, n_bytes = parse_lines(self._log.read())
        self._log.truncate(n_bytes)
        self.commit_state = CommitState(self.header.n_rows, self.header.unit_rows).replay(records)
        self.run_folder = str(staging.create_run_folder(self.folder / STAGING, self._label))
        last_boot_id = self.commit_state.boot_id
        start = {"run": self.commit_state.n_runs + 1, "boot": _read_boot_id()}
        self._append_record(start)
        self.commit_state.replay([start])
        return last_boot_id

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
                f"cannot write the receipts {self._log.name!r}: {error.strerror}. Free some space, then repeat the call to "
                "compute the missing rows.",
                error.errno or 0,
            ) from error

    @contextlib.contextmanager
    def _hold_creation_lock(self) -> Iterator[None]:
        """Hold the lock under which an output is created and completed; shards wait for one another."""
        with hold_lock(self.folder / CREATION_LOCK, create=True):
            yield


def _get_part_nbytes(name: str, output: Path) -> int:
    if ":" not in name:
        return (output / name).stat().st_size
    start, _, stop = name.partition(":")
    return int(stop) - int(start)


def _get_file_nbytes(path: Path) -> int:
    """Return the size of an output that is a single file; 0 for a folder, since all of its files have receipts."""
    return path.stat().st_size if path.is_file() else 0


def _serialize_parts(parts: Sequence[StoredPart]) -> list[list[Any]]:
    return [list(asdict(part).values()) for part in parts]


def _read_boot_id() -> str:
    try:
        return _BOOT_ID_PATH.read_text().strip()
    except OSError:
        return "unknown"
