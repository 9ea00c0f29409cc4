"""Arithmetic on row ranges, compared with sets of rows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from daskinfer.core.row_ranges import intersect_ranges, merge_ranges, subtract_ranges

ranges = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).filter(lambda r: r[0] < r[1])).map(merge_ranges)


@given(st.lists(ranges, min_size=1, max_size=3))
def test_ranges_are_sets_of_rows(range_lists: list[list[tuple[int, int]]]) -> None:
    """The intersection of several lists of ranges, and the rows outside it, equal those of sets of rows."""
    sets = [{row for start, stop in rows for row in range(start, stop)} for rows in range_lists]
    common = intersect_ranges(range_lists, 30)
    assert {row for start, stop in common for row in range(start, stop)} == set.intersection(*sets)
    rest = [row for start, stop in subtract_ranges((0, 30), common) for row in range(start, stop)]
    assert rest == sorted(set(range(30)) - set.intersection(*sets))
