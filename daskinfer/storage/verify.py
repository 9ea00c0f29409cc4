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

from daskinfer.core.chunks import Written
from daskinfer.core.row_ranges import left_over
from daskinfer.errors import DaskInferError, InputError
from daskinfer.storage.manifest import Header, Part, Progress, read_lines
from daskinfer.storage.paths import (
    COMPLETE,
    CREATING,
    FAILED,
    HEADER,
    LOCK,
    manifest_of,
    measured,
    partial_of,
    read_header,
    read_part,
    read_record,
)


@dataclass(frozen=True)
class Verdict:
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
        return f"{said}; {self.n_failed:,} of them without an answer ({FAILED} says which)" if self.n_failed else said


def verify(path: str | os.PathLike[str]) -> Verdict:
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
    folder = manifest_of(output)
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
    wrong += _manifest(folder, completion or None)
    try:
        header = read_header(output)
    except DaskInferError:
        header = None
    if header is None:
        return Verdict(0, 0, 0, (*wrong, f"{folder / HEADER}: missing or changed; the rows cannot be looked at"))
    progress, damaged = _progress(folder, header)
    parts = progress.parts
    stored = Path(output) if os.path.lexists(output) else partial_of(output)
    wrong += damaged
    wrong += _gaps(header, parts, stored)
    wrong += _stored(stored, parts)
    wrong += _others(stored, parts, completion or {"metadata": [], "nbytes": None})
    n_failed = sum(failure.stop - failure.start for failure in progress.failures)
    nbytes = sum(part.written.nbytes for part in parts if part.written)
    return Verdict(header.n_rows, len(parts), nbytes, tuple(wrong), n_failed)


def _manifest(folder: Path, completion: dict[str, Any] | None) -> Iterator[str]:
    """The manifest's files, but for the completion itself."""
    known = {COMPLETE}
    for fields in completion["files"] if completion else ():
        part = Written(*fields)
        known.add(part.name)
        yield from _compared(folder, part, "")
    for path in sorted(folder.iterdir()):
        if path.name == CREATING or path.name.startswith(LOCK):
            if path.is_dir() or path.stat().st_size:
                yield f"{path}: not empty"
        elif completion and path.name not in known:
            yield f"{path}: does not belong there"


def _progress(folder: Path, header: Header) -> tuple[Progress, list[str]]:
    progress, damaged = Progress(header.n_rows, header.unit_rows), []
    for path in sorted(folder.glob("receipts*.jsonl")):
        content = path.read_bytes()
        records, n_bytes = read_lines(content)
        progress.read(records)
        if n_bytes < len(content):
            damaged.append(f"{path}: line {len(records) + 1} is torn or changed")
    return progress, damaged


def _gaps(header: Header, parts: Sequence[Part], stored: Path) -> Iterator[str]:
    done = [(part.start, part.stop) for part in parts]
    for start, stop in left_over((0, header.n_rows), done):
        yield f"{stored} (rows {start}:{stop}): no receipt"


def _stored(stored: Path, parts: Sequence[Part]) -> Iterator[str]:
    for part in parts:
        if part.written is not None:
            yield from _compared(stored, part.written, f" (rows {part.start}:{part.stop})")


def _compared(folder: Path, part: Written, rows: str) -> Iterator[str]:
    what = f"{folder / part.name}{rows}" if ":" not in part.name else f"{folder}, bytes {part.name}{rows}"
    try:
        found = measured(part.name, read_part(folder, part.name, part.nbytes))
    except OSError as error:
        yield f"{what}: cannot be read ({error.strerror})"
        return
    if found.nbytes != part.nbytes:
        yield f"{what}: {'more' if found.nbytes > part.nbytes else 'fewer'} than {part.nbytes} bytes"
    elif found != part:
        yield f"{what}: changed"


def _others(stored: Path, parts: Sequence[Part], completion: dict[str, Any]) -> Iterator[str]:
    """What of the output holds no rows, and what should not be there."""
    metadata = [Written(*fields) for fields in completion["metadata"]]
    for part in metadata:
        yield from _compared(stored, part, "")
    if stored.is_dir():
        known = {part.name for part in metadata} | {part.written.name for part in parts if part.written}
        for folder, folders, names in os.walk(stored):
            for name in sorted([*folders, *names]):
                path = os.path.join(folder, name)
                if metadata and os.path.relpath(path, stored) not in known:
                    yield f"{path}: does not belong there"
    elif stored.exists() and completion["nbytes"] not in (None, stored.stat().st_size):
        yield f"{stored}: {stored.stat().st_size} bytes instead of {completion['nbytes']}"
