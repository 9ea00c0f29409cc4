"""What a run would find at its output, and do about it, for those who only plan it.

Reads the output's manifest, and takes no lock: a run that starts meanwhile is not disturbed.
"""

from __future__ import annotations

from collections.abc import Iterator

from daskinfer.core.formatting import format_seconds
from daskinfer.core.row_ranges import in_all, left_over
from daskinfer.planning.plan import Plan
from daskinfer.storage.manifest import Header, Progress, read_lines, shard_rows
from daskinfer.storage.output_request import Wanted
from daskinfer.storage.paths import COMPLETE, begun, manifest_of, read_record, receipts_name


def n_missing(wanted: Wanted, *, fresh: bool) -> int:
    """Rows of a run's part that its outputs lack."""
    header = wanted.headers[0]
    done = [] if fresh else [_done(path, wanted) for path in wanted.paths]
    stored = in_all(done, header.n_rows) if done else []
    return sum(stop - start for start, stop in left_over(_rows(wanted, header), stored))


def _rows(wanted: Wanted, header: Header) -> tuple[int, int]:
    """The run's part of the rows; an output that was begun says how they are cut."""
    found = next((old for path in wanted.paths if (old := begun(path)) is not None), header)
    return shard_rows(header.n_rows, found.unit_rows, wanted.shard)


def _done(path: str, wanted: Wanted) -> list[tuple[int, int]]:
    """Rows that are stored at a path, as a run that opens it would see it."""
    header = begun(path)
    if header is None:
        return []
    folder = manifest_of(path)
    if read_record(folder / COMPLETE):
        return [(0, header.n_rows)]
    progress = Progress(header.n_rows, header.unit_rows)
    try:
        progress.read(read_lines((folder / receipts_name(wanted.shard)).read_bytes())[0])
    except FileNotFoundError:
        return []
    for failure in progress.failures if wanted.retries_failed else ():
        progress.void(failure.start, failure.stop)
    return progress.done


def notes(wanted: Wanted, plan: Plan, *, fresh: bool) -> Iterator[str]:
    """What a run would do about what it finds, a sentence each."""
    start, stop = _rows(wanted, wanted.headers[0])
    if wanted.shard is not None:
        yield f"shard {wanted.shard[0]} of {wanted.shard[1]}: rows {start:,}:{stop:,}; the table is about all rows"
    where = ", ".join(wanted.paths)
    if not any(begun(path) is not None for path in wanted.paths):
        return
    n_left = n_missing(wanted, fresh=fresh)
    if fresh:
        yield f"what lies at {where} already is removed first"
    elif not n_left:
        yield f"nothing to do: all {stop - start:,} rows are at {where} already"
    else:
        time = f", about {format_seconds(plan.seconds * n_left / plan.n_rows)}" if plan.seconds is not None else ""
        yield f"what lies at {where} is continued: {n_left:,} of {stop - start:,} rows are left{time}"
