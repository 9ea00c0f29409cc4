"""Ranges of rows (start, stop): pure numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

Range = tuple[int, int]
Ranges = Sequence[Range]  # in order, none in two of them


def subtract_ranges(rows: Range, done: Ranges) -> Iterator[Range]:
    """What is left of rows (start, stop) without those that are done, in order.

    Examples
    --------
    >>> list(subtract_ranges((2, 20), [(0, 4), (8, 10), (10, 12)]))
    [(4, 8), (12, 20)]
    """
    start, stop = rows
    for done_start, done_stop in done:
        if start < min(done_start, stop):
            yield start, min(done_start, stop)
        start = max(start, done_stop)
    if start < stop:
        yield start, stop


def merge_ranges(ranges: Iterable[Range]) -> list[Range]:
    """Ranges in order, with those that touch made one.

    Examples
    --------
    >>> merge_ranges([(8, 9), (0, 4), (4, 6), (5, 6)])
    [(0, 6), (8, 9)]
    """
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        elif start < stop:
            found.append((start, stop))
    return found


def intersect_ranges(range_lists: Sequence[Ranges], n_rows: int) -> list[Range]:
    """Ranges that are in each of several.

    Examples
    --------
    >>> intersect_ranges([[(0, 6), (8, 9)], [(4, 10)]], 10)
    [(4, 6), (8, 9)]
    """
    missing = merge_ranges(gap for ranges in range_lists for gap in subtract_ranges((0, n_rows), ranges))
    return list(subtract_ranges((0, n_rows), missing))
