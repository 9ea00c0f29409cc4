"""All outputs of one run, committed together: a chunk is done once every output has its receipt.

The order of a commit matters: first a rename gives the *data* its final name, then the *receipt* is appended. If the process
is killed between the two, the chunk is computed again and replaces the same data. In the opposite order a receipt could
refer to data that does not exist.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TypedDict

import numpy as np

from daskinfer.core.chunks import BatchConfig, ChunkResult, RowFailure
from daskinfer.core.row_ranges import intersect_ranges, merge_ranges, subtract_ranges
from daskinfer.errors import ChunkError, DaskInferError, OutputExists, StorageError, TooManyFailures
from daskinfer.storage.formats import Target, is_array_path, make_target
from daskinfer.storage.journal import OutputJournal
from daskinfer.storage.manifest import JournalEntry, compute_shard_rows
from daskinfer.storage.output_request import OutputRequest
from daskinfer.storage.paths import (
    COMPLETE,
    HEADER,
    describe_restart,
    get_manifest_path,
    make_unmanaged_output_error,
    read_existing_header,
)

_MAX_SHOWN_PARTS = 3  # parts that an error lists; arbitrary


class FailureFields(TypedDict):
    """The fields of a :class:`RunReport` about failed rows."""

    failed_rows: tuple[int, ...]
    failures: tuple[RowFailure, ...]


class OutputSet:
    """The open outputs of a run.

    ``targets`` are what workers write to, ``row_range`` is the run's part of the rows, and ``done`` lists the ranges that
    need not be computed.
    """

    def __init__(self, journals: Sequence[OutputJournal], targets: Sequence[Target], output_request: OutputRequest) -> None:
        self.targets, self.header = tuple(targets), journals[0].header
        self._journals = journals
        self.row_range = compute_shard_rows(self.header.n_rows, self.header.unit_rows, output_request.shard)
        done = intersect_ranges([journal.done for journal in journals], self.header.n_rows)
        own_done = intersect_ranges([done, [self.row_range]], self.header.n_rows)
        self.n_failed = sum(self._count_failed_rows(a, b) for a, b in own_done)
        self.n_rows_before = sum(b - a for a, b in own_done) - self.n_failed
        # The rows of other shards count as done.
        start, stop = self.row_range
        self.done = tuple(merge_ranges([*done, (0, start), (stop, self.header.n_rows)]))

    def _count_failed_rows(self, start: int, stop: int) -> int:
        """Count the failed rows between ``start`` and ``stop``."""
        return sum(max(0, min(stop, f.stop) - max(start, f.start)) for f in self._journals[0].failures)

    @property
    def has_missing_rows(self) -> bool:
        """Whether there is anything to compute."""
        return any(subtract_ranges(self.row_range, self.done))

    def commit(self, result: ChunkResult, batch: BatchConfig) -> None:
        """Commit a chunk that a worker has written; ``batch`` is the configuration that it was computed with."""
        stats = result.stats
        parts_by_output = result.parts or ((),) * len(self.targets)
        for journal, target, parts in zip(self._journals, self.targets, parts_by_output, strict=True):
            journal.record_batch_config(batch.to_dict())
            published = target.publish(parts)  # before the receipt
            entry = JournalEntry(
                stats.start,
                stats.stop,
                stats.device,
                stats.batch_size,
                stats.worker,
                result.attempts,
                published,
                result.failures,
                stats.channels_last,
            )
            journal.commit(entry, target.get_file_paths(published))

    def finish(self) -> None:
        """Re-read what may have been written more than once; if no row is missing, complete the outputs.

        Raises
        ------
        StorageError
            If stored bytes do not match their receipts.
        """
        for journal in self._journals:
            if wrong := journal.recheck():
                names = ", ".join(
                    f"{stored.part.name} (rows {stored.start}:{stored.stop})"
                    for stored in wrong[:_MAX_SHOWN_PARTS]
                    if stored.part
                )
                raise StorageError(
                    f"{len(wrong)} parts of the output {journal.path!r} do not match their checksums: {names}. Check the "
                    "disk, then repeat the call to compute these rows again."
                )
        for journal, target in zip(self._journals, self.targets, strict=True):
            journal.finish(target.metadata_parts)

    @property
    def failure_fields(self) -> FailureFields:
        """The failed rows of this run's part, as the fields of a report."""
        failures = [f for f in self._journals[0].failures if self.row_range[0] <= f.start < self.row_range[1]]
        rows = sorted(row for failure in failures for row in range(failure.start, failure.stop))
        return {"failed_rows": tuple(rows), "failures": tuple(failures)}


@contextlib.contextmanager
def open_outputs(output_request: OutputRequest, *, overwrite: bool) -> Iterator[OutputSet]:
    """Create or continue the outputs of a run, locked until it ends; they are removed if it fails before its first chunk.

    Raises
    ------
    OutputLocked
        If another run is writing one of them.
    OutputExists
        If a different run started one of them, or one was not written by daskinfer.
    """
    pairs = list(zip(output_request.paths, output_request.headers, strict=True))
    with contextlib.ExitStack() as stack:
        journals = [
            stack.enter_context(OutputJournal(path, h, output_request.batch_size, output_request.shard)) for path, h in pairs
        ]
        for journal in journals:
            journal.lock()
        for journal in journals:
            if overwrite:
                _check_removable(journal.path)
        if not overwrite:
            _check_consistent_outputs(output_request)
        opened: list[OutputJournal] = []
        with _discard_on_failure(opened, output_request):
            for journal in journals:
                journal.open(
                    partial(_track_and_create, opened, journal),
                    overwrite=overwrite,
                    retry_failed_rows=output_request.retry_failed_rows,
                )
                opened.append(journal)
            outputs = OutputSet(journals, [_make_target_for(journal) for journal in journals], output_request)
            _check_not_half_complete(journals, outputs)
            try:
                yield outputs
            except BaseException as error:
                paths = ", ".join(str(journal.partial_path) for journal in journals)
                if any(journal.done for journal in journals) or output_request.shard:
                    error.add_note(
                        f"Finished rows are kept ({paths}); repeat the call{_describe_cure(error)} to compute the rest."
                    )
                elif isinstance(error, KeyboardInterrupt):
                    error.add_note(f"No rows are stored yet ({paths}); repeat the call to start again.")
                raise


def _describe_cure(error: BaseException) -> str:
    """Describe what to change in the repeated call after an error; empty if nothing."""
    if isinstance(error, TooManyFailures):
        return ", with a larger max_failed_rows (--max-failed-rows),"
    return ", with on_error='skip' (--on-error skip) if rows fail again," if isinstance(error, ChunkError) else ""


@contextlib.contextmanager
def _discard_on_failure(journals: Sequence[OutputJournal], output_request: OutputRequest) -> Iterator[None]:
    """Remove these outputs if a call fails before it stored anything: a refused call leaves nothing behind.

    After an interrupt they stay, since workers may still be writing. The outputs of a shard stay too, since they may hold
    the rows of other shards.
    """
    try:
        yield
    except Exception as error:
        if (
            output_request.shard is None
            and not isinstance(error, KeyboardInterrupt)
            and not any(journal.done for journal in journals)
        ):
            with contextlib.suppress(DaskInferError, OSError):
                for journal in journals:
                    journal.discard()
        raise


def _make_target_for(journal: OutputJournal) -> Target:
    header = journal.header
    return make_target(
        journal.path, str(journal.partial_path), journal.run_folder, header.shape, np.dtype(header.dtype), header.unit_rows
    )


def _track_and_create(to_discard: list[OutputJournal], journal: OutputJournal, path: str) -> None:
    to_discard.append(journal)  # first: creating it may fail halfway
    _create_target(journal, path)


def _create_target(journal: OutputJournal, path: str) -> None:
    _make_target_for(journal).create(path)


def _check_removable(path: str) -> None:
    """Refuse to overwrite anything but daskinfer's outputs and arrays: the path may be mistyped."""
    is_managed = os.path.exists(get_manifest_path(path) / HEADER)
    if os.path.lexists(path) and not is_managed and not is_array_path(path):
        raise make_unmanaged_output_error(path)


def _check_consistent_outputs(output_request: OutputRequest) -> None:
    """Refuse outputs that no single run wrote: with different write-units, or one complete and another missing."""
    headers = {path: read_existing_header(path) for path in output_request.paths}
    complete = [
        path for path in output_request.paths if headers[path] is not None and (get_manifest_path(path) / COMPLETE).exists()
    ]
    if complete and (missing := [path for path in output_request.paths if headers[path] is None]):
        raise OutputExists(
            f"the output {missing[0]!r} is missing, but {complete[0]!r} of the same run is complete. Restore the missing "
            f"one, or {describe_restart(complete[0], output_request.headers[0])} to compute all outputs again."
        )
    units = {header.unit_rows: path for path, header in headers.items() if header is not None and path not in complete}
    if len(units) > 1:
        (unit_1, path_1), (unit_2, path_2), *_ = units.items()
        raise OutputExists(
            f"the outputs {path_1!r} and {path_2!r} belong to different runs, with write-units of {unit_1:,} and {unit_2:,} "
            f"rows. Name the outputs of one run, or {describe_restart(path_2, output_request.headers[0])} to start over."
        )


def _check_not_half_complete(journals: Sequence[OutputJournal], outputs: OutputSet) -> None:
    """Refuse to write to a complete output again because another output of the run lacks rows."""
    complete = [journal.path for journal in journals if journal.is_complete]
    if complete and outputs.has_missing_rows:
        raise make_unmanaged_output_error(complete[0])
