"""For a plan: what a run would find at its output paths, and how it would resume.

Only the manifests are read, and no lock is taken, so that a run that starts in the meantime is not disturbed.
"""

from __future__ import annotations

from collections.abc import Iterator

from daskinfer.core.formatting import format_seconds
from daskinfer.core.row_ranges import intersect_ranges, subtract_ranges
from daskinfer.planning.plan import Plan
from daskinfer.storage.manifest import CommitState, Header, compute_shard_rows, parse_lines
from daskinfer.storage.output_request import OutputRequest
from daskinfer.storage.paths import COMPLETE, format_receipts_name, get_manifest_path, read_existing_header, read_record


def count_missing_rows(output_request: OutputRequest, *, overwrite: bool) -> int:
    """Return how many rows of a run, or of its shard, are not stored yet."""
    header = output_request.headers[0]
    done = [] if overwrite else [_read_done_ranges(path, output_request) for path in output_request.paths]
    stored = intersect_ranges(done, header.n_rows) if done else []
    return sum(stop - start for start, stop in subtract_ranges(_find_row_range(output_request, header), stored))


def _find_row_range(output_request: OutputRequest, header: Header) -> tuple[int, int]:
    """Return the rows (start, stop) of the run's shard; an existing output determines the units in which they are cut."""
    existing = next((old for path in output_request.paths if (old := read_existing_header(path)) is not None), header)
    return compute_shard_rows(header.n_rows, existing.unit_rows, output_request.shard)


def _read_done_ranges(path: str, output_request: OutputRequest) -> list[tuple[int, int]]:
    """Return the ranges of rows that are stored at a path, as a run that opens it would find them."""
    header = read_existing_header(path)
    if header is None:
        return []
    folder = get_manifest_path(path)
    if read_record(folder / COMPLETE):
        return [(0, header.n_rows)]
    state = CommitState(header.n_rows, header.unit_rows)
    try:
        state.replay(parse_lines((folder / format_receipts_name(output_request.shard)).read_bytes())[0])
    except FileNotFoundError:
        return []
    for failure in state.failures if output_request.retry_failed_rows else ():
        state.invalidate(failure.start, failure.stop)
    return state.done


def make_resume_notes(output_request: OutputRequest, plan: Plan, *, overwrite: bool) -> Iterator[str]:
    """Yield the plan's notes on the shard and on an existing output: overwritten, complete or resumed."""
    start, stop = _find_row_range(output_request, output_request.headers[0])
    if output_request.shard is not None:
        index, n_shards = output_request.shard
        yield f"shard {index} of {n_shards}: rows {start:,}:{stop:,}; the table covers all shards"
    paths = ", ".join(output_request.paths)
    if not any(read_existing_header(path) is not None for path in output_request.paths):
        return
    n_missing = count_missing_rows(output_request, overwrite=overwrite)
    if overwrite:
        yield f"overwrites the existing output at {paths}"
    elif not n_missing:
        yield f"nothing to do: all {stop - start:,} rows are already stored at {paths}"
    else:
        time = f", about {format_seconds(plan.seconds * n_missing / plan.n_rows)}" if plan.seconds is not None else ""
        yield f"resumes {paths}: {n_missing:,} of {stop - start:,} rows left{time}"
