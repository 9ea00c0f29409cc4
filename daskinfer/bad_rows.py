"""Rows that make the network fail, found by halving: what fails alone is at fault, what does not gets its answer.

A half keeps its place in the micro-batch, the other's rows are zeros (as at the input's edges), so the answers of good rows
are the same bytes that they would be without the bad ones. A row that fails alone is tried again first: it may be bad luck.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from daskinfer.arrays import Array

Attempt = Callable[[int, int], None]  # computes rows begin:end and puts their answer in place, or raises
Fatal = Callable[[Exception], bool]  # whether an exception is none of the rows' fault


def skip(attempt: Attempt, begin: int, end: int, error: Exception, n_tries: int, fatal: Fatal) -> dict[int, str]:
    """Compute rows that failed together as far as can be; those at fault, and what was raised.

    Parameters
    ----------
    attempt
        Computes rows begin:end.
    begin, end
        Rows that raised ``error``.
    n_tries
        How often a row is tried again alone.
    fatal
        What is raised on.

    Examples
    --------
    >>> def attempt(begin, end):
    ...     if begin <= 5 < end:
    ...         raise ValueError("five")
    >>> skip(attempt, 0, 8, ValueError("five"), 1, lambda error: False)
    {5: 'ValueError: five'}
    """
    if end - begin == 1:
        for _ in range(n_tries):
            again = _raised(attempt, begin, end, fatal)
            if again is None:
                return {}
            error = again
        return {begin: f"{type(error).__name__}: {error}"}
    found: dict[int, str] = {}
    middle = (begin + end) // 2
    for half in ((begin, middle), (middle, end)):
        if (raised := _raised(attempt, *half, fatal)) is not None:
            found |= skip(attempt, *half, raised, n_tries, fatal)
    return found


def first_at_fault(attempt: Attempt, begin: int, end: int, fatal: Fatal) -> tuple[int, int]:
    """The first smallest range of rows that still fails, of begin:end, which failed together."""
    while end - begin > 1:
        middle = (begin + end) // 2
        failing = (half for half in ((begin, middle), (middle, end)) if _raised(attempt, *half, fatal) is not None)
        half = next(failing, None)
        if half is None:
            break  # only together
        begin, end = half
    return begin, end


def _raised(attempt: Attempt, begin: int, end: int, fatal: Fatal) -> Exception | None:
    try:
        attempt(begin, end)
    except Exception as error:
        if fatal(error):
            raise
        return error
    return None


def fill(arrays: Sequence[Array], rows: Sequence[int] | slice, fill_value: float | None) -> None:
    """Put the fill value where rows failed; None: NaN."""
    for array in arrays:
        array[rows] = np.nan if fill_value is None else fill_value


def with_nan(arrays: Sequence[Array]) -> list[int]:
    """Which rows hold a NaN."""
    floats = [array.reshape(len(array), -1) for array in arrays if array.dtype.kind in "fc"]
    bad = [np.isnan(array).any(axis=1) for array in floats]
    return [int(row) for row in np.flatnonzero(np.logical_or.reduce(bad))] if bad else []
