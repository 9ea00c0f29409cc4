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

from daskinfer.core.chunks import Failure, Receipt, Written
from daskinfer.core.row_ranges import in_all, left_over, merged
from daskinfer.errors import ChunkError, DaskInferError, OutputExists, StorageError, TooManyFailures
from daskinfer.storage.formats import Target, is_array, target
from daskinfer.storage.journal import Ledger
from daskinfer.storage.manifest import Entry, shard_rows
from daskinfer.storage.output_request import Wanted
from daskinfer.storage.paths import COMPLETE, HEADER, anew, begun, foreign, manifest_of

_SHOWN = 3  # parts that a message lists before it counts the rest


class Finished(Protocol):
    """What came back of a chunk whose outputs are stored."""

    @property
    def receipt(self) -> Receipt: ...

    @property
    def written(self) -> tuple[tuple[Written, ...], ...]:
        """What was written of each target."""
        ...

    @property
    def failures(self) -> tuple[Failure, ...]: ...

    @property
    def attempts(self) -> int:
        """How often the chunk was tried."""
        ...


class WithoutAnswer(TypedDict):
    """Fields of a :class:`RunReport`."""

    failed_rows: tuple[int, ...]
    failures: tuple[Failure, ...]


class Outputs:
    """What is stored where: ``targets`` for workers, the run's part of the ``rows``, ``done`` that need not be computed."""

    def __init__(self, ledgers: Sequence[Ledger], targets: Sequence[Target], wanted: Wanted) -> None:
        self.targets, self.header = tuple(targets), ledgers[0].header
        self._ledgers = ledgers
        self.rows = shard_rows(self.header.n_rows, self.header.unit_rows, wanted.shard)
        done = in_all([ledger.done for ledger in ledgers], self.header.n_rows)
        here = in_all([done, [self.rows]], self.header.n_rows)
        self.n_failed = sum(self._n_failed(a, b) for a, b in here)
        self.n_before = sum(b - a for a, b in here) - self.n_failed
        # What belongs to others counts as done.
        start, stop = self.rows
        self.done = tuple(merged([*done, (0, start), (stop, self.header.n_rows)]))

    def _n_failed(self, start: int, stop: int) -> int:
        """Rows of these without an answer."""
        return sum(max(0, min(stop, f.stop) - max(start, f.start)) for f in self._ledgers[0].failures)

    @property
    def missing(self) -> bool:
        """Whether there is anything to compute."""
        return any(left_over(self.rows, self.done))

    def keep(self, finished: Finished, micro_batches: Mapping[str, Any]) -> None:
        """Commit a chunk that workers have written, computed with these micro-batches, as a header has them."""
        receipt = finished.receipt
        written = finished.written or ((),) * len(self.targets)
        for ledger, into, parts in zip(self._ledgers, self.targets, written, strict=True):
            ledger.chose(micro_batches)
            published = into.publish(parts)  # before the receipt
            entry = Entry(
                receipt.start,
                receipt.stop,
                receipt.device,
                receipt.batch_size,
                receipt.worker,
                finished.attempts,
                published,
                finished.failures,
                receipt.channels_last,
            )
            ledger.commit(entry, into.files(published))

    def finish(self) -> None:
        """Look again at what ran more than once; where nothing is missing, complete the outputs.

        Raises
        ------
        StorageError
            Where the disk does not hold what was written.
        """
        for ledger in self._ledgers:
            if wrong := ledger.recheck():
                said = ", ".join(
                    f"{part.written.name} (rows {part.start}:{part.stop})" for part in wrong[:_SHOWN] if part.written
                )
                raise StorageError(
                    f"{len(wrong)} parts of the output {ledger.path!r} are not as they were written ({said}); the disk has "
                    "to keep what it is given. Repeat the call: it computes these rows again."
                )
        for ledger, into in zip(self._ledgers, self.targets, strict=True):
            ledger.finish(into.metadata)

    @property
    def without_answer(self) -> WithoutAnswer:
        """Rows of this run's part that are done and have no answer, in the report's words."""
        failures = [f for f in self._ledgers[0].failures if self.rows[0] <= f.start < self.rows[1]]
        rows = sorted(row for failure in failures for row in range(failure.start, failure.stop))
        return {"failed_rows": tuple(rows), "failures": tuple(failures)}


@contextlib.contextmanager
def opened(wanted: Wanted, *, fresh: bool) -> Iterator[Outputs]:
    """Begin or continue the outputs of a run, locked until it ends; where it fails with nothing stored, they are removed.

    Raises
    ------
    OutputLocked
        Where another run holds one.
    OutputExists
        Where one was begun with something else, or is not daskinfer's.
    """
    pairs = list(zip(wanted.paths, wanted.headers, strict=True))
    with contextlib.ExitStack() as stack:
        ledgers = [stack.enter_context(Ledger(path, h, wanted.batch_size, wanted.shard)) for path, h in pairs]
        for ledger in ledgers:
            ledger.hold()
        for ledger in ledgers:
            if fresh:
                _check_removable(ledger.path)
        if not fresh:
            _refuse_unlike(wanted)
        taken: list[Ledger] = []
        with _withdrawn_on_failure(taken, wanted):
            for ledger in ledgers:
                ledger.open(partial(_begin, taken, ledger), fresh=fresh, again=wanted.retries_failed)
                taken.append(ledger)
            outputs = Outputs(ledgers, [_target(ledger) for ledger in ledgers], wanted)
            _refuse_half(ledgers, outputs)
            try:
                yield outputs
            except BaseException as error:
                kept = ", ".join(str(ledger.partial) for ledger in ledgers)
                if any(ledger.done for ledger in ledgers) or wanted.shard:
                    error.add_note(
                        f"What is done is kept ({kept}); repeat the call{_cure(error)} to go on with what is missing."
                    )
                elif isinstance(error, KeyboardInterrupt):
                    error.add_note(f"Nothing is stored yet ({kept}); repeat the call to begin again.")
                raise


def _cure(error: BaseException) -> str:
    """What else than the same call may be needed to go on after an error."""
    if isinstance(error, TooManyFailures):
        return ", with a larger max_failed_rows (--max-failed-rows),"
    return ", with on_error='skip' (--on-error) where rows fail again," if isinstance(error, ChunkError) else ""


@contextlib.contextmanager
def _withdrawn_on_failure(ledgers: Sequence[Ledger], wanted: Wanted) -> Iterator[None]:
    """Remove these outputs where a call fails and nothing of them is stored: one that was refused leaves none behind.

    Where it was interrupted they stay, since who writes for it may not have ended; those of a shard may hold what others
    stored.
    """
    try:
        yield
    except Exception as error:
        if wanted.shard is None and not isinstance(error, KeyboardInterrupt) and not any(ledger.done for ledger in ledgers):
            with contextlib.suppress(DaskInferError, OSError):
                for ledger in ledgers:
                    ledger.withdraw()
        raise


def _target(ledger: Ledger) -> Target:
    header = ledger.header
    return target(
        ledger.path, str(ledger.partial), ledger.run_folder, header.shape, np.dtype(header.dtype), header.unit_rows
    )


def _begin(taken: list[Ledger], ledger: Ledger, path: str) -> None:
    taken.append(ledger)  # whatever comes of it
    _make(ledger, path)


def _make(ledger: Ledger, path: str) -> None:
    _target(ledger).create(path)


def _check_removable(path: str) -> None:
    """``fresh`` removes what is ours, and arrays; not whatever else lies at a path that was mistyped."""
    ours = os.path.exists(manifest_of(path) / HEADER)
    if os.path.lexists(path) and not ours and not is_array(path):
        raise foreign(path)


def _refuse_unlike(wanted: Wanted) -> None:
    """Refuse outputs that no one run has begun: written in other units, or one complete and another not there."""
    headers = {path: begun(path) for path in wanted.paths}
    complete = [path for path in wanted.paths if headers[path] is not None and (manifest_of(path) / COMPLETE).exists()]
    if complete and (gone := [path for path in wanted.paths if headers[path] is None]):
        raise OutputExists(
            f"the output {gone[0]!r} is not there, and {complete[0]!r}, of the same run, is complete; what is complete is "
            f"not written to again. Put it back, or {anew(complete[0], wanted.headers[0])} to compute all of them anew."
        )
    units = {header.unit_rows: path for path, header in headers.items() if header is not None and path not in complete}
    if len(units) > 1:
        (one, here), (other, there), *_ = units.items()
        raise OutputExists(
            f"the outputs {here!r} and {there!r} were begun by different runs, in units of {one:,} and {other:,} rows; a "
            f"run continues only what is its own. Name those of one run, or {anew(there, wanted.headers[0])} to start over."
        )


def _refuse_half(ledgers: Sequence[Ledger], outputs: Outputs) -> None:
    """An output that is complete is not written to again, for another's sake that is gone."""
    complete = [ledger.path for ledger in ledgers if ledger.complete]
    if complete and outputs.missing:
        raise foreign(complete[0])
