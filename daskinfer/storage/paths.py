"""The paths of an output and its manifest, and reading and checking their bytes."""

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
    """Return the folder of an output's manifest."""
    return Path(f"{path}.daskinfer")


def get_partial_path(path: str) -> Path:
    """Return the path of an output while it is written."""
    return Path(f"{path}.partial")


def format_receipts_name(shard: Shard | None) -> str:
    """Return the name of the log of receipts of a shard, or of a whole run."""
    return f"receipts{format_shard_suffix(shard)}.jsonl"


def read_header(path: str) -> Header | None:
    """Read the header of an output; None if no run has started it.

    Raises
    ------
    OutputExists
        If the header is torn or changed.
    """
    record = read_record(get_manifest_path(path) / HEADER)
    if record is None:
        return None
    if not record:
        raise OutputExists(
            f"the header of the manifest {str(get_manifest_path(path))!r} is corrupt. Pass overwrite=True (--overwrite) to "
            "start over, or choose another path."
        )
    return Header.from_record(record)


def read_existing_header(path: str) -> Header | None:
    """Read the header of an output that holds data; None otherwise: without data the manifest is worthless.

    An output whose run was refused or ended before it stored its first chunk may be taken over by any other run.
    """
    has_data_path = os.path.lexists(path) or get_partial_path(path).exists()
    header = read_header(path) if has_data_path else None
    return header if header is not None and (header.shards or _has_stored_data(get_manifest_path(path))) else None


def _has_stored_data(folder: Path) -> bool:
    """Whether the output is complete or any chunk of it is stored; a line that cannot be parsed counts as a chunk."""
    if (folder / COMPLETE).exists():
        return True
    try:
        with open(folder / format_receipts_name(None), "rb") as lines:
            return any((record := parse_line(line)) is None or "run" not in record for line in lines)
    except FileNotFoundError:
        return False


def check_same_run(path: str, found: Header, requested: Header, batch_size: int | None) -> None:
    """Refuse an output that a different run started; ``batch_size`` None: any is accepted.

    Raises
    ------
    OutputExists
        If they differ; the message lists each difference with its old and new value.
    """
    if differences := found.find_differences(requested, batch_size):
        raise OutputExists(
            f"the output {path!r} belongs to a different run: {'; '.join(differences)}. Repeat the original call to "
            f"continue it, choose another path, or {describe_restart(path, requested)} to start over."
        )


def describe_restart(path: str, requested: Header) -> str:
    """Describe how to start over; a shard is told to remove the files by hand, since other shards share them."""
    if not requested.shards:
        return "pass overwrite=True (--overwrite)"
    partial_path, manifest_path = str(get_partial_path(path)), str(get_manifest_path(path))
    return f"remove {path!r}, {partial_path!r} and {manifest_path!r} while no shard is running,"


def check_parts_present(path: str, header: Header) -> None:
    """Refuse a complete output that lost parts; only sizes are checked, ``verify`` reads the bytes.

    If the complete output is still at its partial path, the file at the path itself is not this run's, and is not checked.

    Raises
    ------
    OutputExists
        If parts are missing; the message names the first of them.
    """
    completion = read_record(get_manifest_path(path) / COMPLETE)
    if not completion or not os.path.lexists(path) or get_partial_path(path).exists():
        return
    commit_state = CommitState(header.n_rows, header.unit_rows)
    for receipts in sorted(get_manifest_path(path).glob("receipts*.jsonl")):
        commit_state.replay(parse_lines(receipts.read_bytes())[0])
    parts = [stored.part for stored in commit_state.stored_ranges if stored.part is not None]
    missing = [part.name for part in parts if not _has_size(Path(path), part)]
    # The user may have changed the content of metadata files, by adding an attribute to a store for example.
    missing += [name for name, *_ in completion["metadata"] if ":" not in name and not Path(path, name).exists()]
    if missing:
        names = ", ".join(missing[:_MAX_SHOWN_PARTS]) + (", …" if len(missing) > _MAX_SHOWN_PARTS else "")
        raise OutputExists(
            f"{len(missing):,} of the {len(parts):,} parts of the complete output {path!r} are missing or truncated "
            f"({names}). Restore them, or {describe_restart(path, header)} to compute all of it again."
        )


def read_record(path: Path) -> dict[str, Any] | None:
    """Read the record of a one-line file; None if the file is missing, empty if it is torn or changed."""
    try:
        return parse_line(path.read_bytes()) or {}
    except FileNotFoundError:
        return None


def read_part(output: Path, name: str, nbytes: int) -> bytes:
    """Read the bytes of a part, a file in a folder or "start:stop" of a file; one byte more if a file is too long."""
    if ":" not in name:
        with open(output / name, "rb") as file:
            return file.read(nbytes + 1)
    with open(output, "rb") as file:
        file.seek(int(name.partition(":")[0]))
        return file.read(nbytes)


def make_stored_part(name: str, content: bytes) -> StoredPart:
    """Describe stored bytes by name, size and checksum."""
    return StoredPart(name, len(content), zlib.crc32(content))


def is_part_intact(output: Path, part: StoredPart) -> bool:
    """Whether the bytes of a part on the disk match its receipt."""
    try:
        return make_stored_part(part.name, read_part(output, part.name, part.nbytes)) == part
    except OSError:
        return False


def _has_size(output: Path, part: StoredPart) -> bool:
    """Whether a part exists with its full size; its bytes are not read."""
    try:
        if ":" in part.name:
            return output.stat().st_size >= int(part.name.partition(":")[0]) + part.nbytes
        return (output / part.name).stat().st_size == part.nbytes
    except OSError:
        return False


def make_unmanaged_output_error(path: str | Path) -> OutputExists:
    """Make the error for a path that holds something without a manifest."""
    return OutputExists(
        f"the output {str(path)!r} already exists, and no manifest describes it. Choose another path, remove it, or, if it "
        "is an array, pass overwrite=True (--overwrite) to replace it."
    )


def format_shard_suffix(shard: Shard | None) -> str:
    """Return the suffix of a shard's file names; empty for a whole run."""
    return f"-{shard[0]}-of-{shard[1]}" if shard else ""
