"""Reading a stored output again, all of it, against what its manifest says.

Whatever byte of the output or of its manifest changed, and whichever file is missing or should not be there, is found: rows
by the checksum in their receipt, the output's metadata and the manifest's own files by those in ``complete.json``, which
checks itself. Locks are empty, and nothing else may lie there.
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
    """What was found: ``wrong`` has a sentence for each thing that is not as it should be.

    ``n_failed`` are rows that were written without an answer, which is as it was.
    """

    n_rows: int
    n_parts: int
    nbytes: int
    wrong: tuple[str, ...]
    n_failed: int = 0

    def __str__(self) -> str:
        if self.wrong:
            return "\n".join(self.wrong)
        said = f"{self.n_rows:,} rows in {self.n_parts:,} parts of {self.nbytes:,} bytes are as they were written"
        return f"{said}; {self.n_failed:,} of them without an answer ({FAILED_ROWS} says which)" if self.n_failed else said


def verify(path: str | os.PathLike[str]) -> VerifyReport:
    """Read an output and its manifest again.

    Raises
    ------
    InputError
        Where no manifest lies beside ``path``.

    Examples
    --------
    >>> import daskinfer as di, numpy as np, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     y = os.path.join(folder, "y.npy")
    ...     _ = di.run(np.sqrt, np.arange(8.0), y, devices="inline")
    ...     print(verify(y))
    8 rows in 8 parts of 64 bytes are as they were written
    """
    output = os.path.abspath(path)
    folder = get_manifest_path(output)
    if not folder.is_dir():
        raise InputError(
            f"the output {output!r} has no manifest ({str(folder)!r}); only what `daskinfer run` wrote can be verified. "
            "Name such an output."
        )
    wrong: list[str] = []
    completion = read_record(folder / COMPLETE)
    if completion is None:
        wrong.append(f"{output}: not complete ({COMPLETE} is missing); repeat the run to go on")
    elif not completion:
        wrong.append(f"{folder / COMPLETE}: changed")
    wrong += _check_manifest(folder, completion or None)
    try:
        header = read_header(output)
    except DaskInferError:
        header = None
    if header is None:
        return VerifyReport(0, 0, 0, (*wrong, f"{folder / HEADER}: missing or changed; the rows cannot be looked at"))
    progress, damaged = _replay_receipts(folder, header)
    parts = progress.stored_ranges
    stored = Path(output) if os.path.lexists(output) else get_partial_path(output)
    wrong += damaged
    wrong += _find_gaps(header, parts, stored)
    wrong += _check_stored_ranges(stored, parts)
    wrong += _check_other_files(stored, parts, completion or {"metadata": [], "nbytes": None})
    n_failed = sum(failure.stop - failure.start for failure in progress.failures)
    nbytes = sum(part.part.nbytes for part in parts if part.part)
    return VerifyReport(header.n_rows, len(parts), nbytes, tuple(wrong), n_failed)


def _check_manifest(folder: Path, completion: dict[str, Any] | None) -> Iterator[str]:
    """The manifest's files, but for the completion itself."""
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
            yield f"{path}: does not belong there"


def _replay_receipts(folder: Path, header: Header) -> tuple[CommitState, list[str]]:
    progress, damaged = CommitState(header.n_rows, header.unit_rows), []
    for path in sorted(folder.glob("receipts*.jsonl")):
        content = path.read_bytes()
        records, n_bytes = parse_lines(content)
        progress.replay(records)
        if n_bytes < len(content):
            damaged.append(f"{path}: line {len(records) + 1} is torn or changed")
    return progress, damaged


def _find_gaps(header: Header, stored_ranges: Sequence[StoredRange], output: Path) -> Iterator[str]:
    done = [(part.start, part.stop) for part in stored_ranges]
    for start, stop in subtract_ranges((0, header.n_rows), done):
        yield f"{output} (rows {start}:{stop}): no receipt"


def _check_stored_ranges(output: Path, stored_ranges: Sequence[StoredRange]) -> Iterator[str]:
    for part in stored_ranges:
        if part.part is not None:
            yield from _compare_part(output, part.part, f" (rows {part.start}:{part.stop})")


def _compare_part(folder: Path, part: StoredPart, rows_label: str) -> Iterator[str]:
    what = f"{folder / part.name}{rows_label}" if ":" not in part.name else f"{folder}, bytes {part.name}{rows_label}"
    try:
        found = make_stored_part(part.name, read_part(folder, part.name, part.nbytes))
    except OSError as error:
        yield f"{what}: cannot be read ({error.strerror})"
        return
    if found.nbytes != part.nbytes:
        yield f"{what}: {'more' if found.nbytes > part.nbytes else 'fewer'} than {part.nbytes} bytes"
    elif found != part:
        yield f"{what}: changed"


def _check_other_files(output: Path, stored_ranges: Sequence[StoredRange], completion: dict[str, Any]) -> Iterator[str]:
    """What of the output holds no rows, and what should not be there."""
    metadata = [StoredPart(*fields) for fields in completion["metadata"]]
    for part in metadata:
        yield from _compare_part(output, part, "")
    if output.is_dir():
        known = {part.name for part in metadata} | {part.part.name for part in stored_ranges if part.part}
        for folder, folders, names in os.walk(output):
            for name in sorted([*folders, *names]):
                path = os.path.join(folder, name)
                if metadata and os.path.relpath(path, output) not in known:
                    yield f"{path}: does not belong there"
    elif output.exists() and completion["nbytes"] not in (None, output.stat().st_size):
        yield f"{output}: {output.stat().st_size} bytes instead of {completion['nbytes']}"
