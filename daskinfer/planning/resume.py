"""What a run would find at its output, and do about it, for those who only plan it.

Reads the output's manifest, and takes no lock: a run that starts meanwhile is not disturbed.
"""

from __future__ import annotations

from collections.abc import Iterator

from daskinfer.core.formatting import format_seconds
from daskinfer.core.row_ranges import intersect_ranges, subtract_ranges
from daskinfer.planning.plan import Plan
from daskinfer.storage.manifest import CommitState, Header, compute_shard_rows, parse_lines
from daskinfer.storage.output_request import OutputRequest
from daskinfer.storage.paths import COMPLETE, existing_header, format_receipts_name, get_manifest_path, read_record


def count_missing_rows(output_request: OutputRequest, *, overwrite: bool) -> int:
    """Rows of a run's part that its outputs lack."""
    header = output_request.headers[0]
    done = [] if overwrite else [_read_done_ranges(path, output_request) for path in output_request.paths]
    stored = intersect_ranges(done, header.n_rows) if done else []
    return sum(stop - start for start, stop in subtract_ranges(_find_row_range(output_request, header), stored))


def _find_row_range(output_request: OutputRequest, header: Header) -> tuple[int, int]:
    """The run's part of the rows; an output that was begun says how they are cut."""
    found = next((old for path in output_request.paths if (old := existing_header(path)) is not None), header)
    return compute_shard_rows(header.n_rows, found.unit_rows, output_request.shard)


def _read_done_ranges(path: str, output_request: OutputRequest) -> list[tuple[int, int]]:
    """Rows that are stored at a path, as a run that opens it would see it."""
    header = existing_header(path)
    if header is None:
        return []
    folder = get_manifest_path(path)
    if read_record(folder / COMPLETE):
        return [(0, header.n_rows)]
    progress = CommitState(header.n_rows, header.unit_rows)
    try:
        progress.replay(parse_lines((folder / format_receipts_name(output_request.shard)).read_bytes())[0])
    except FileNotFoundError:
        return []
    for failure in progress.failures if output_request.retry_failed_rows else ():
        progress.invalidate(failure.start, failure.stop)
    return progress.done


def resume_notes(output_request: OutputRequest, plan: Plan, *, overwrite: bool) -> Iterator[str]:
    """What a run would do about what it finds, a sentence each."""
    start, stop = _find_row_range(output_request, output_request.headers[0])
    if output_request.shard is not None:
        yield f"shard {output_request.shard[0]} of {output_request.shard[1]}: rows {start:,}:{stop:,}; the table is about all rows"
    where = ", ".join(output_request.paths)
    if not any(existing_header(path) is not None for path in output_request.paths):
        return
    n_left = count_missing_rows(output_request, overwrite=overwrite)
    if overwrite:
        yield f"what lies at {where} already is removed first"
    elif not n_left:
        yield f"nothing to do: all {stop - start:,} rows are at {where} already"
    else:
        time = f", about {format_seconds(plan.seconds * n_left / plan.n_rows)}" if plan.seconds is not None else ""
        yield f"what lies at {where} is continued: {n_left:,} of {stop - start:,} rows are left{time}"
