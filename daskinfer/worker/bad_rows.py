"""Rows that make the network fail, found by halving: what fails alone is at fault, what does not gets its answer.

The search runs the halves as they are, without the zeros that fill a micro-batch up, so it costs about as much as two
micro-batches per row at fault, however large they are. Then each row that was found runs once more where it stands in its
micro-batch (it may have been bad luck), and all others together, zeros in place of those at fault: the answers of good rows
are the same bytes that they would be without the bad ones.

Where that does not agree with the search - a network that takes one batch size only, rows that fail only together - what
runs is filled up from the first half on. Networks that compile themselves for the shapes that they see are shown no other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np

from daskinfer.core.arrays import Array

ProbeRows = Callable[[int, int], None]  # runs rows begin:end, or raises
IsFatal = Callable[[Exception], bool]  # whether an exception is none of the rows' fault


class ProbeOutputError(Exception):
    """Rows that were only probed got no answer that could be used."""


class ComputeRows(Protocol):
    """Computes rows begin:end as a part of their micro-batch and puts their answer in place, or raises."""

    def __call__(self, begin: int, end: int, exclude: Collection[int] = ()) -> None:
        """``without`` are rows that are left out."""


def isolate_bad_rows(
    compute_rows: ComputeRows, probe_rows: ProbeRows, begin: int, end: int, error: Exception, n_tries: int, is_fatal: IsFatal
) -> dict[int, str]:
    """Compute rows that failed together as far as can be; those at fault, and what was raised.

    Parameters
    ----------
    attempt
        Computes rows begin:end.
    probe
        Runs rows begin:end alone, for nothing but to see whether it raises.
    begin, end
        Rows that raised ``error``.
    n_tries
        How often a row is tried again alone.
    fatal
        What is raised on.

    Examples
    --------
    >>> def attempt(begin, end, without=()):
    ...     if begin <= 5 < end and 5 not in without:
    ...         raise ValueError("five")
    >>> isolate_bad_rows(attempt, attempt, 0, 8, ValueError("five"), 1, lambda error: False)
    {5: 'ValueError: five'}
    """
    if end - begin > 1:
        found = _find_bad_rows(compute_rows, probe_rows, begin, end, error, n_tries, is_fatal)
        if found is not None and (
            len(found) == end - begin or _catch_error(compute_rows, begin, end, is_fatal, found) is None
        ):
            return found
    return _compute_by_halving(compute_rows, begin, end, error, n_tries, is_fatal)


def _find_bad_rows(
    compute_rows: ComputeRows, probe_rows: ProbeRows, begin: int, end: int, error: Exception, n_tries: int, is_fatal: IsFatal
) -> dict[int, str] | None:
    """Rows of begin:end, which raised ``error``, that fail alone; None where a row that was found does not."""
    if end - begin == 1:
        # The last try, which costs a whole micro-batch, is the one that counts.
        any(_catch_error(probe_rows, begin, end, is_fatal) is None for _ in range(n_tries - 1))
        return _retry_row(compute_rows, begin, error, 1, is_fatal) or None
    middle = (begin + end) // 2
    first = _catch_error(probe_rows, begin, middle, is_fatal)
    second = error if first is None else _catch_error(probe_rows, middle, end, is_fatal)  # one of the two is to blame
    found: dict[int, str] = {}
    for half, raised in (((begin, middle), first), ((middle, end), second)):
        if raised is not None:
            at_fault = _find_bad_rows(compute_rows, probe_rows, *half, raised, n_tries, is_fatal)
            if at_fault is None:
                return None
            found |= at_fault
    return found


def _compute_by_halving(
    compute_rows: ComputeRows, begin: int, end: int, error: Exception, n_tries: int, is_fatal: IsFatal
) -> dict[int, str]:
    """Rows at fault of begin:end; all others are computed, those of a half together."""
    if end - begin == 1:
        return _retry_row(compute_rows, begin, error, n_tries, is_fatal)
    found: dict[int, str] = {}
    middle = (begin + end) // 2
    for half in ((begin, middle), (middle, end)):
        if (raised := _catch_error(compute_rows, *half, is_fatal)) is not None:
            found |= _compute_by_halving(compute_rows, *half, raised, n_tries, is_fatal)
    return found


def _retry_row(compute_rows: ComputeRows, row: int, error: Exception, n_tries: int, is_fatal: IsFatal) -> dict[int, str]:
    """What a row raised last, empty where it was computed; ``error`` is what it raised before."""
    for _ in range(n_tries):
        again = _catch_error(compute_rows, row, row + 1, is_fatal)
        if again is None:
            return {}
        error = again
    return {row: f"{type(error).__name__}: {error}"}


def find_first_failing_range(compute_rows: ProbeRows, begin: int, end: int, is_fatal: IsFatal) -> tuple[int, int]:
    """The first smallest range of rows that still fails, of begin:end, which failed together."""
    while end - begin > 1:
        middle = (begin + end) // 2
        failing = (
            half for half in ((begin, middle), (middle, end)) if _catch_error(compute_rows, *half, is_fatal) is not None
        )
        half = next(failing, None)
        if half is None:
            break  # only together
        begin, end = half
    return begin, end


def _catch_error(
    run_rows: ComputeRows | ProbeRows, begin: int, end: int, is_fatal: IsFatal, *exclude: Collection[int]
) -> Exception | None:
    try:
        run_rows(begin, end, *exclude)
    except Exception as error:
        if is_fatal(error):
            raise
        return error
    return None


def fill_rows(arrays: Sequence[Array], rows: Sequence[int] | slice, fill_value: float | None) -> None:
    """Put the fill value where rows failed; None: NaN."""
    for array in arrays:
        array[rows] = np.nan if fill_value is None else fill_value


def find_nan_rows(arrays: Sequence[Array]) -> list[int]:
    """Which rows hold a NaN."""
    floats = [array.reshape(len(array), -1) for array in arrays if array.dtype.kind in "fc"]
    bad = [np.isnan(array).any(axis=1) for array in floats]
    return [int(row) for row in np.flatnonzero(np.logical_or.reduce(bad))] if bad else []
