"""Where the parts of a stored output lie, and reading them as bytes."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

from daskinfer.core.chunks import Written
from daskinfer.errors import OutputExists
from daskinfer.storage.manifest import Header, Progress, from_line, read_lines

HEADER, COMPLETE, FAILED, STAGING, CREATING, LOCK = (
    "header.json",
    "complete.json",
    "failed_rows.json",
    "staging",
    "creating",
    "lock",
)

_SHOWN = 3  # parts that an error names; arbitrary

Shard = tuple[int, int]


def manifest_of(path: str) -> Path:
    """The folder of the manifest of an output."""
    return Path(f"{path}.daskinfer")


def partial_of(path: str) -> Path:
    """Where an output lies while it is written."""
    return Path(f"{path}.partial")


def receipts_name(shard: Shard | None) -> str:
    """The name of a log."""
    return f"receipts{suffix(shard)}.jsonl"


def read_header(path: str) -> Header | None:
    """What an output that was begun is made of; None where none was.

    Raises
    ------
    OutputExists
        Where the header cannot be read.
    """
    record = read_record(manifest_of(path) / HEADER)
    if record is None:
        return None
    if not record:
        raise OutputExists(
            f"the manifest {str(manifest_of(path))!r} has a header that was changed or is not whole; a run continues only "
            "what it can read. Pass fresh=True (--fresh) to start over, or choose another path."
        )
    return Header.of(record)


def begun(path: str) -> Header | None:
    """The header of an output that was begun and holds anything: without data, what a manifest says is of no use.

    An output of a run that was refused, or ended, before its first chunk was stored may become another's.
    """
    there = os.path.lexists(path) or partial_of(path).exists()
    header = read_header(path) if there else None
    return header if header is not None and (header.shards or _holds_anything(manifest_of(path))) else None


def _holds_anything(folder: Path) -> bool:
    """Whether a whole output was completed, or anything was stored of it; a line that cannot be read may have said so."""
    if (folder / COMPLETE).exists():
        return True
    try:
        with open(folder / receipts_name(None), "rb") as lines:
            return any((record := from_line(line)) is None or "run" not in record for line in lines)
    except FileNotFoundError:
        return False


def refuse_differences(path: str, found: Header, wanted: Header, batch_size: int | None) -> None:
    """Refuse an output that was begun with something else than a run wants; ``batch_size`` None: any will do.

    Raises
    ------
    OutputExists
        With each difference, what it was and is.
    """
    if differences := found.differences(wanted, batch_size):
        raise OutputExists(
            f"the output {path!r} was begun with something else: {'; '.join(differences)}. A run continues only what is its "
            f"own. Repeat the call as it was to go on, choose another path, or {anew(path, wanted)} to start over."
        )


def anew(path: str, wanted: Header) -> str:
    """How to start over; what shards share is no shard's to remove."""
    if not wanted.shards:
        return "pass fresh=True (--fresh)"
    return f"remove {path!r}, {str(partial_of(path))!r} and {str(manifest_of(path))!r} while no shard runs,"


def refuse_gone(path: str, header: Header) -> None:
    """Refuse a complete output that lost parts; whether bytes changed is what ``verify`` reads all of it for.

    Where a whole answer still waits under its partial name, what lies at the path is somebody else's.

    Raises
    ------
    OutputExists
        With the first of them.
    """
    completion = read_record(manifest_of(path) / COMPLETE)
    if not completion or not os.path.lexists(path) or partial_of(path).exists():
        return
    progress = Progress(header.n_rows, header.unit_rows)
    for receipts in sorted(manifest_of(path).glob("receipts*.jsonl")):
        progress.read(read_lines(receipts.read_bytes())[0])
    parts = [part.written for part in progress.parts if part.written is not None]
    gone = [part.name for part in parts if not _has_size(Path(path), part)]
    # Their owner may have written to these, a note to a store's metadata for example.
    gone += [name for name, *_ in completion["metadata"] if ":" not in name and not Path(path, name).exists()]
    if gone:
        named = ", ".join(gone[:_SHOWN]) + (", …" if len(gone) > _SHOWN else "")
        raise OutputExists(
            f"the output {path!r} was complete, and {len(gone):,} of its {len(parts):,} parts are gone or cut short since "
            f"({named}); it is not written to again. Put them back, or {anew(path, header)} to compute all of it anew."
        )


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a file of one line; None where there is no file, empty where it is not as it was written."""
    try:
        return from_line(path.read_bytes()) or {}
    except FileNotFoundError:
        return None


def read_part(output: Path, name: str, nbytes: int) -> bytes:
    """The stored bytes of a part: a file of a folder, or "start:stop" of a single file; at most one byte too many."""
    if ":" not in name:
        with open(output / name, "rb") as file:
            return file.read(nbytes + 1)
    with open(output, "rb") as file:
        file.seek(int(name.partition(":")[0]))
        return file.read(nbytes)


def measured(name: str, content: bytes) -> Written:
    """What is said of stored bytes."""
    return Written(name, len(content), zlib.crc32(content))


def is_stored(output: Path, part: Written) -> bool:
    """Whether a part lies on the disk as its receipt says."""
    try:
        return measured(part.name, read_part(output, part.name, part.nbytes)) == part
    except OSError:
        return False


def _has_size(output: Path, part: Written) -> bool:
    """Whether a part is there with all its bytes, whatever they are; nothing is read."""
    try:
        if ":" in part.name:
            return output.stat().st_size >= int(part.name.partition(":")[0]) + part.nbytes
        return (output / part.name).stat().st_size == part.nbytes
    except OSError:
        return False


def foreign(path: str | Path) -> OutputExists:
    """An output that no manifest speaks of."""
    return OutputExists(
        f"the output {str(path)!r} exists already, and no manifest says what it holds; nothing is ever overwritten. Choose "
        "another path, remove it, or, where it is an array, pass fresh=True (--fresh) to start over."
    )


def suffix(shard: Shard | None) -> str:
    """What the names of a shard's files have more than those of a whole run."""
    return f"-{shard[0]}-of-{shard[1]}" if shard else ""
