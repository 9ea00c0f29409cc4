"""Where the parts of a stored output lie, and reading them as bytes."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

from daskinfer.core.chunks import StoredPart
from daskinfer.errors import OutputExists
from daskinfer.storage.manifest import CommitState, Header, parse_line, parse_lines

HEADER, COMPLETE, FAILED_ROWS, STAGING, CREATION_LOCK, LOCK = (
    "header.json",
    "complete.json",
    "failed_rows.json",
    "staging",
    "creating",
    "lock",
)

_MAX_SHOWN_PARTS = 3  # parts that an error names; arbitrary

Shard = tuple[int, int]


def get_manifest_path(path: str) -> Path:
    """The folder of the manifest of an output."""
    return Path(f"{path}.daskinfer")


def get_partial_path(path: str) -> Path:
    """Where an output lies while it is written."""
    return Path(f"{path}.partial")


def format_receipts_name(shard: Shard | None) -> str:
    """The name of a log."""
    return f"receipts{format_shard_suffix(shard)}.jsonl"


def read_header(path: str) -> Header | None:
    """What an output that was begun is made of; None where none was.

    Raises
    ------
    OutputExists
        Where the header cannot be read.
    """
    record = read_record(get_manifest_path(path) / HEADER)
    if record is None:
        return None
    if not record:
        raise OutputExists(
            f"the manifest {str(get_manifest_path(path))!r} has a header that was changed or is not whole; a run continues only "
            "what it can read. Pass overwrite=True (--overwrite) to start over, or choose another path."
        )
    return Header.from_record(record)


def existing_header(path: str) -> Header | None:
    """The header of an output that was begun and holds anything: without data, what a manifest says is of no use.

    An output of a run that was refused, or ended, before its first chunk was stored may become another's.
    """
    there = os.path.lexists(path) or get_partial_path(path).exists()
    header = read_header(path) if there else None
    return header if header is not None and (header.shards or _has_stored_data(get_manifest_path(path))) else None


def _has_stored_data(folder: Path) -> bool:
    """Whether a whole output was completed, or anything was stored of it; a line that cannot be read may have said so."""
    if (folder / COMPLETE).exists():
        return True
    try:
        with open(folder / format_receipts_name(None), "rb") as lines:
            return any((record := parse_line(line)) is None or "run" not in record for line in lines)
    except FileNotFoundError:
        return False


def check_same_run(path: str, found: Header, requested: Header, batch_size: int | None) -> None:
    """Refuse an output that was begun with something else than a run wants; ``batch_size`` None: any will do.

    Raises
    ------
    OutputExists
        With each difference, what it was and is.
    """
    if differences := found.find_differences(requested, batch_size):
        raise OutputExists(
            f"the output {path!r} was begun with something else: {'; '.join(differences)}. A run continues only what is its "
            f"own. Repeat the call as it was to go on, choose another path, or {how_to_restart(path, requested)} to start over."
        )


def how_to_restart(path: str, requested: Header) -> str:
    """How to start over; what shards share is no shard's to remove."""
    if not requested.shards:
        return "pass overwrite=True (--overwrite)"
    return f"remove {path!r}, {str(get_partial_path(path))!r} and {str(get_manifest_path(path))!r} while no shard runs,"


def check_parts_present(path: str, header: Header) -> None:
    """Refuse a complete output that lost parts; whether bytes changed is what ``verify`` reads all of it for.

    Where a whole answer still waits under its partial name, what lies at the path is somebody else's.

    Raises
    ------
    OutputExists
        With the first of them.
    """
    completion = read_record(get_manifest_path(path) / COMPLETE)
    if not completion or not os.path.lexists(path) or get_partial_path(path).exists():
        return
    progress = CommitState(header.n_rows, header.unit_rows)
    for receipts in sorted(get_manifest_path(path).glob("receipts*.jsonl")):
        progress.replay(parse_lines(receipts.read_bytes())[0])
    parts = [part.part for part in progress.stored_ranges if part.part is not None]
    gone = [part.name for part in parts if not _has_size(Path(path), part)]
    # Their owner may have written to these, a note to a store's metadata for example.
    gone += [name for name, *_ in completion["metadata"] if ":" not in name and not Path(path, name).exists()]
    if gone:
        named = ", ".join(gone[:_MAX_SHOWN_PARTS]) + (", …" if len(gone) > _MAX_SHOWN_PARTS else "")
        raise OutputExists(
            f"the output {path!r} was complete, and {len(gone):,} of its {len(parts):,} parts are gone or cut short since "
            f"({named}); it is not written to again. Put them back, or {how_to_restart(path, header)} to compute all of it anew."
        )


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a file of one line; None where there is no file, empty where it is not as it was written."""
    try:
        return parse_line(path.read_bytes()) or {}
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


def make_stored_part(name: str, content: bytes) -> StoredPart:
    """What is said of stored bytes."""
    return StoredPart(name, len(content), zlib.crc32(content))


def is_part_intact(output: Path, part: StoredPart) -> bool:
    """Whether a part lies on the disk as its receipt says."""
    try:
        return make_stored_part(part.name, read_part(output, part.name, part.nbytes)) == part
    except OSError:
        return False


def _has_size(output: Path, part: StoredPart) -> bool:
    """Whether a part is there with all its bytes, whatever they are; nothing is read."""
    try:
        if ":" in part.name:
            return output.stat().st_size >= int(part.name.partition(":")[0]) + part.nbytes
        return (output / part.name).stat().st_size == part.nbytes
    except OSError:
        return False


def not_ours_error(path: str | Path) -> OutputExists:
    """An output that no manifest speaks of."""
    return OutputExists(
        f"the output {str(path)!r} exists already, and no manifest says what it holds; nothing is ever overwritten. Choose "
        "another path, remove it, or, where it is an array, pass overwrite=True (--overwrite) to start over."
    )


def format_shard_suffix(shard: Shard | None) -> str:
    """What the names of a shard's files have more than those of a whole run."""
    return f"-{shard[0]}-of-{shard[1]}" if shard else ""
