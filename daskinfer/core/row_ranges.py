"""Arithmetic on ranges of rows (start, stop)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

Range = tuple[int, int]
Ranges = Sequence[Range]  # sorted and disjoint


def subtract_ranges(rows: Range, done: Ranges) -> Iterator[Range]:
    """Yield the parts of rows (start, stop) that no range of ``done`` covers, in order.

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
    """Return the ranges sorted and disjoint; ranges that overlap or touch become one.

    Examples
    --------
    >>> merge_ranges([(8, 9), (0, 4), (4, 6), (5, 6)])
    [(0, 6), (8, 9)]
    """
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif start < stop:
            merged.append((start, stop))
    return merged


def intersect_ranges(range_lists: Sequence[Ranges], n_rows: int) -> list[Range]:
    """Return the ranges that every one of the lists covers; rows go from 0 to ``n_rows``.

    Examples
    --------
    >>> intersect_ranges([[(0, 6), (8, 9)], [(4, 10)]], 10)
    [(4, 6), (8, 9)]
    """
    missing = merge_ranges(gap for ranges in range_lists for gap in subtract_ranges((0, n_rows), ranges))
    return list(subtract_ranges((0, n_rows), missing))
