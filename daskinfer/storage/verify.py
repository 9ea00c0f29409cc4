"""Verify a stored output: re-read all of it and compare it with the checksums in its manifest.

Every changed byte of the output or its manifest is found, and every missing or unexpected file. Rows are checked against
their receipts; the output's metadata and the files of the manifest against ``complete.json``, which has a checksum of its
own. Lock files must be empty, and no other file may be there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daskinfer.core.chunks import StoredPart
from daskinfer.core.row_ranges import subtract_ranges
from daskinfer.errors import DaskInferError, InputError
from daskinfer.storage.manifest import CommitState, Header, StoredRange, parse_lines
from daskinfer.storage.paths import (
    COMPLETE,
    CREATION_LOCK,
    FAILED_ROWS,
    HEADER,
    LOCK,
    get_manifest_path,
    get_partial_path,
    make_stored_part,
    read_header,
    read_part,
    read_record,
)


@dataclass(frozen=True)
class VerifyReport:
    """The result of :func:`verify`: ``wrong`` has one line per problem and is empty if all is well.

    ``n_failed`` counts the rows that the run itself recorded as failed; they are no problem of the storage.
    """

    n_rows: int
    n_parts: int
    nbytes: int
    wrong: tuple[str, ...]
    n_failed: int = 0

    def __str__(self) -> str:
        if self.wrong:
            return "\n".join(self.wrong)
        text = f"{self.n_rows:,} rows in {self.n_parts:,} parts ({self.nbytes:,} bytes) match their checksums"
        return f"{text}; {self.n_failed:,} rows failed in the run (listed in {FAILED_ROWS})" if self.n_failed else text


def verify(path: str | os.PathLike[str]) -> VerifyReport:
    """Re-read an output and its manifest, and check every byte against its checksum.

    Parameters
    ----------
    path
        The output of a run to storage, complete or not; its manifest is the folder ``….daskinfer`` beside it.

    Returns
    -------
    VerifyReport
        What was checked, and a line for each problem.

    Raises
    ------
    InputError
        If there is no manifest beside ``path``.

    Examples
    --------
    >>> import daskinfer as di, numpy as np, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     y = os.path.join(folder, "y.npy")
    ...     _ = di.run(np.sqrt, np.arange(8.0), y, devices="inline")
    ...     print(verify(y))
    8 rows in 8 parts (64 bytes) match their checksums
    """
    output = os.path.abspath(path)
    folder = get_manifest_path(output)
    if not folder.is_dir():
        raise InputError(
            f"the output {output!r} has no manifest ({str(folder)!r}). Name an output of `daskinfer run` or `di.run`."
        )
    wrong: list[str] = []
    completion = read_record(folder / COMPLETE)
    if completion is None:
        wrong.append(f"{output}: incomplete ({COMPLETE} is missing); repeat the run to continue it")
    elif not completion:
        wrong.append(f"{folder / COMPLETE}: changed")
    wrong += _check_manifest(folder, completion or None)
    try:
        header = read_header(output)
    except DaskInferError:
        header = None
    if header is None:
        return VerifyReport(0, 0, 0, (*wrong, f"{folder / HEADER}: missing or changed; cannot check the rows"))
    commit_state, damaged = _replay_receipts(folder, header)
    stored_ranges = commit_state.stored_ranges
    data_path = Path(output) if os.path.lexists(output) else get_partial_path(output)
    wrong += damaged
    wrong += _find_gaps(header, stored_ranges, data_path)
    wrong += _check_stored_ranges(data_path, stored_ranges)
    wrong += _check_other_files(data_path, stored_ranges, completion or {"metadata": [], "nbytes": None})
    n_failed = sum(failure.stop - failure.start for failure in commit_state.failures)
    nbytes = sum(stored.part.nbytes for stored in stored_ranges if stored.part)
    return VerifyReport(header.n_rows, len(stored_ranges), nbytes, tuple(wrong), n_failed)


def _check_manifest(folder: Path, completion: dict[str, Any] | None) -> Iterator[str]:
    """Check the files of the manifest, except the completion record itself."""
    known = {COMPLETE}
    for fields in completion["files"] if completion else ():
        part = StoredPart(*fields)
        known.add(part.name)
        yield from _compare_part(folder, part, "")
    for path in sorted(folder.iterdir()):
        if path.name == CREATION_LOCK or path.name.startswith(LOCK):
            if path.is_dir() or path.stat().st_size:
                yield f"{path}: not empty"
        elif completion and path.name not in known:
            yield f"{path}: unexpected"


def _replay_receipts(folder: Path, header: Header) -> tuple[CommitState, list[str]]:
    commit_state, damaged = CommitState(header.n_rows, header.unit_rows), []
    for path in sorted(folder.glob("receipts*.jsonl")):
        content = path.read_bytes()
        records, n_bytes = parse_lines(content)
        commit_state.replay(records)
        if n_bytes < len(content):
            damaged.append(f"{path}: line {len(records) + 1} is torn or changed")
    return commit_state, damaged


def _find_gaps(header: Header, stored_ranges: Sequence[StoredRange], output: Path) -> Iterator[str]:
    done = [(stored.start, stored.stop) for stored in stored_ranges]
    for start, stop in subtract_ranges((0, header.n_rows), done):
        yield f"{output} (rows {start}:{stop}): no receipt"


def _check_stored_ranges(output: Path, stored_ranges: Sequence[StoredRange]) -> Iterator[str]:
    for stored in stored_ranges:
        if stored.part is not None:
            yield from _compare_part(output, stored.part, f" (rows {stored.start}:{stored.stop})")


def _compare_part(folder: Path, part: StoredPart, rows_label: str) -> Iterator[str]:
    location = f"{folder / part.name}{rows_label}" if ":" not in part.name else f"{folder}, bytes {part.name}{rows_label}"
    try:
        actual = make_stored_part(part.name, read_part(folder, part.name, part.nbytes))
    except OSError as error:
        yield f"{location}: cannot be read ({error.strerror})"
        return
    if actual.nbytes != part.nbytes:
        yield f"{location}: {'more' if actual.nbytes > part.nbytes else 'fewer'} than {part.nbytes} bytes"
    elif actual != part:
        yield f"{location}: changed"


def _check_other_files(output: Path, stored_ranges: Sequence[StoredRange], completion: dict[str, Any]) -> Iterator[str]:
    """Check the parts of the output that hold no rows, and report unexpected files."""
    metadata = [StoredPart(*fields) for fields in completion["metadata"]]
    for part in metadata:
        yield from _compare_part(output, part, "")
    if output.is_dir():
        known = {part.name for part in metadata} | {stored.part.name for stored in stored_ranges if stored.part}
        for folder, folders, names in os.walk(output):
            for name in sorted([*folders, *names]):
                path = os.path.join(folder, name)
                if metadata and os.path.relpath(path, output) not in known:
                    yield f"{path}: unexpected"
    elif output.exists() and completion["nbytes"] not in (None, output.stat().st_size):
        yield f"{output}: {output.stat().st_size} bytes instead of {completion['nbytes']}"
