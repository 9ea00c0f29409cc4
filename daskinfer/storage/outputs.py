"""The stored outputs of one run, held together: a chunk is done once it is committed in all of them.

In which order a chunk is committed, and why: its *data* gets its name by a rename, then its *receipt* is appended. Killed
between the two, the chunk is computed once more and put in the same place. The other way round, a receipt would speak of
data that is not there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypedDict

import numpy as np

from daskinfer.core.chunks import ChunkStats, RowFailure, StoredPart
from daskinfer.core.row_ranges import intersect_ranges, merge_ranges, subtract_ranges
from daskinfer.errors import ChunkError, DaskInferError, OutputExists, StorageError, TooManyFailures
from daskinfer.storage.formats import Target, is_array_path, make_target
from daskinfer.storage.journal import OutputJournal
from daskinfer.storage.manifest import JournalEntry, compute_shard_rows
from daskinfer.storage.output_request import OutputRequest
from daskinfer.storage.paths import COMPLETE, HEADER, existing_header, get_manifest_path, how_to_restart, not_ours_error

_MAX_SHOWN_PARTS = 3  # parts that a message lists before it counts the rest


class StoredChunkResult(Protocol):
    """What came back of a chunk whose outputs are stored."""

    @property
    def stats(self) -> ChunkStats: ...

    @property
    def written(self) -> tuple[tuple[StoredPart, ...], ...]:
        """What was written of each target."""
        ...

    @property
    def failures(self) -> tuple[RowFailure, ...]: ...

    @property
    def attempts(self) -> int:
        """How often the chunk was tried."""
        ...


class FailureFields(TypedDict):
    """Fields of a :class:`RunReport`."""

    failed_rows: tuple[int, ...]
    failures: tuple[RowFailure, ...]


class OutputSet:
    """What is stored where: ``targets`` for workers, the run's part of the ``row_range``, ``done`` that need not be computed."""

    def __init__(self, journals: Sequence[OutputJournal], targets: Sequence[Target], output_request: OutputRequest) -> None:
        self.targets, self.header = tuple(targets), journals[0].header
        self._journals = journals
        self.row_range = compute_shard_rows(self.header.n_rows, self.header.unit_rows, output_request.shard)
        done = intersect_ranges([ledger.done for ledger in journals], self.header.n_rows)
        here = intersect_ranges([done, [self.row_range]], self.header.n_rows)
        self.n_failed = sum(self._count_failed_rows(a, b) for a, b in here)
        self.n_rows_before = sum(b - a for a, b in here) - self.n_failed
        # What belongs to others counts as done.
        start, stop = self.row_range
        self.done = tuple(merge_ranges([*done, (0, start), (stop, self.header.n_rows)]))

    def _count_failed_rows(self, start: int, stop: int) -> int:
        """Rows of these without an answer."""
        return sum(max(0, min(stop, f.stop) - max(start, f.start)) for f in self._journals[0].failures)

    @property
    def has_missing_rows(self) -> bool:
        """Whether there is anything to compute."""
        return any(subtract_ranges(self.row_range, self.done))

    def commit(self, result: StoredChunkResult, batch_config: Mapping[str, Any]) -> None:
        """Commit a chunk that workers have written, computed with these micro-batches, as a header has them."""
        receipt = result.stats
        written = result.written or ((),) * len(self.targets)
        for ledger, into, parts in zip(self._journals, self.targets, written, strict=True):
            ledger.record_batch_config(batch_config)
            published = into.publish(parts)  # before the receipt
            entry = JournalEntry(
                receipt.start,
                receipt.stop,
                receipt.device,
                receipt.batch_size,
                receipt.worker,
                result.attempts,
                published,
                result.failures,
                receipt.channels_last,
            )
            ledger.commit(entry, into.get_file_paths(published))

    def finish(self) -> None:
        """Look again at what ran more than once; where nothing is missing, complete the outputs.

        Raises
        ------
        StorageError
            Where the disk does not hold what was written.
        """
        for ledger in self._journals:
            if wrong := ledger.recheck():
                said = ", ".join(
                    f"{part.part.name} (rows {part.start}:{part.stop})" for part in wrong[:_MAX_SHOWN_PARTS] if part.part
                )
                raise StorageError(
                    f"{len(wrong)} parts of the output {ledger.path!r} are not as they were written ({said}); the disk has "
                    "to keep what it is given. Repeat the call: it computes these rows again."
                )
        for ledger, into in zip(self._journals, self.targets, strict=True):
            ledger.finish(into.metadata_parts)

    @property
    def failure_fields(self) -> FailureFields:
        """Rows of this run's part that are done and have no answer, in the report's words."""
        failures = [f for f in self._journals[0].failures if self.row_range[0] <= f.start < self.row_range[1]]
        rows = sorted(row for failure in failures for row in range(failure.start, failure.stop))
        return {"failed_rows": tuple(rows), "failures": tuple(failures)}


@contextlib.contextmanager
def open_outputs(output_request: OutputRequest, *, overwrite: bool) -> Iterator[OutputSet]:
    """Begin or continue the outputs of a run, locked until it ends; where it fails with nothing stored, they are removed.

    Raises
    ------
    OutputLocked
        Where another run holds one.
    OutputExists
        Where one was begun with something else, or is not daskinfer's.
    """
    pairs = list(zip(output_request.paths, output_request.headers, strict=True))
    with contextlib.ExitStack() as stack:
        ledgers = [
            stack.enter_context(OutputJournal(path, h, output_request.batch_size, output_request.shard)) for path, h in pairs
        ]
        for ledger in ledgers:
            ledger.lock()
        for ledger in ledgers:
            if overwrite:
                _check_removable(ledger.path)
        if not overwrite:
            _check_consistent_outputs(output_request)
        taken: list[OutputJournal] = []
        with _discard_on_failure(taken, output_request):
            for ledger in ledgers:
                ledger.open(
                    partial(_track_and_create, taken, ledger),
                    overwrite=overwrite,
                    retry_failed_rows=output_request.retry_failed_rows,
                )
                taken.append(ledger)
            outputs = OutputSet(ledgers, [_make_target_for(ledger) for ledger in ledgers], output_request)
            _check_not_half_complete(ledgers, outputs)
            try:
                yield outputs
            except BaseException as error:
                kept = ", ".join(str(ledger.partial_path) for ledger in ledgers)
                if any(ledger.done for ledger in ledgers) or output_request.shard:
                    error.add_note(
                        f"What is done is kept ({kept}); repeat the call{_describe_cure(error)} to go on with what is missing."
                    )
                elif isinstance(error, KeyboardInterrupt):
                    error.add_note(f"Nothing is stored yet ({kept}); repeat the call to begin again.")
                raise


def _describe_cure(error: BaseException) -> str:
    """What else than the same call may be needed to go on after an error."""
    if isinstance(error, TooManyFailures):
        return ", with a larger max_failed_rows (--max-failed-rows),"
    return ", with on_error='skip' (--on-error) where rows fail again," if isinstance(error, ChunkError) else ""


@contextlib.contextmanager
def _discard_on_failure(journals: Sequence[OutputJournal], output_request: OutputRequest) -> Iterator[None]:
    """Remove these outputs where a call fails and nothing of them is stored: one that was refused leaves none behind.

    Where it was interrupted they stay, since who writes for it may not have ended; those of a shard may hold what others
    stored.
    """
    try:
        yield
    except Exception as error:
        if (
            output_request.shard is None
            and not isinstance(error, KeyboardInterrupt)
            and not any(ledger.done for ledger in journals)
        ):
            with contextlib.suppress(DaskInferError, OSError):
                for ledger in journals:
                    ledger.discard()
        raise


def _make_target_for(journal: OutputJournal) -> Target:
    header = journal.header
    return make_target(
        journal.path, str(journal.partial_path), journal.run_folder, header.shape, np.dtype(header.dtype), header.unit_rows
    )


def _track_and_create(to_discard: list[OutputJournal], journal: OutputJournal, path: str) -> None:
    to_discard.append(journal)  # whatever comes of it
    _create_target(journal, path)


def _create_target(journal: OutputJournal, path: str) -> None:
    _make_target_for(journal).create(path)


def _check_removable(path: str) -> None:
    """``overwrite`` removes what is ours, and arrays; not whatever else lies at a path that was mistyped."""
    ours = os.path.exists(get_manifest_path(path) / HEADER)
    if os.path.lexists(path) and not ours and not is_array_path(path):
        raise not_ours_error(path)


def _check_consistent_outputs(output_request: OutputRequest) -> None:
    """Refuse outputs that no one run has begun: written in other units, or one complete and another not there."""
    headers = {path: existing_header(path) for path in output_request.paths}
    complete = [
        path for path in output_request.paths if headers[path] is not None and (get_manifest_path(path) / COMPLETE).exists()
    ]
    if complete and (gone := [path for path in output_request.paths if headers[path] is None]):
        raise OutputExists(
            f"the output {gone[0]!r} is not there, and {complete[0]!r}, of the same run, is complete; what is complete is "
            f"not written to again. Put it back, or {how_to_restart(complete[0], output_request.headers[0])} to compute all of them anew."
        )
    units = {header.unit_rows: path for path, header in headers.items() if header is not None and path not in complete}
    if len(units) > 1:
        (one, here), (other, there), *_ = units.items()
        raise OutputExists(
            f"the outputs {here!r} and {there!r} were begun by different runs, in units of {one:,} and {other:,} rows; a "
            f"run continues only what is its own. Name those of one run, or {how_to_restart(there, output_request.headers[0])} to start over."
        )


def _check_not_half_complete(journals: Sequence[OutputJournal], outputs: OutputSet) -> None:
    """An output that is complete is not written to again, for another's sake that is gone."""
    complete = [ledger.path for ledger in journals if ledger.is_complete]
    if complete and outputs.has_missing_rows:
        raise not_ours_error(complete[0])
