"""Rows that make the model fail, found by bisection: a row that fails on its own is bad, all others get their output.

The search runs the halves without padding, so it costs about as much as two micro-batches per bad row, however large the
micro-batches are. Then each bad row runs once more at its position in the micro-batch (its failure may have been transient),
and all others run together, with zeros in place of the bad ones, so the outputs of good rows have the same bytes as without
bad rows beside them.

If this second run disagrees with the search (a model that accepts one batch size only, or rows that fail only together), the
bisection is repeated with padded micro-batches. Models that are compiled for the shapes that they see get no other shape.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np

from daskinfer.core.arrays import Array
from daskinfer.worker.error_kinds import describe_error

ProbeRows = Callable[[int, int], None]  # runs rows begin:end, or raises
IsFatal = Callable[[Exception], bool]  # whether no row is to blame for an exception


class ProbeOutputError(Exception):
    """Rows that were only probed had an unusable output."""


class ComputeRows(Protocol):
    """Computes rows begin:end at their positions in the micro-batch and stores their output, or raises."""

    def __call__(self, begin: int, end: int, exclude: Collection[int] = ()) -> None:
        """Compute the rows except those in ``exclude``."""


def isolate_bad_rows(
    compute_rows: ComputeRows, probe_rows: ProbeRows, begin: int, end: int, error: Exception, n_tries: int, is_fatal: IsFatal
) -> dict[int, str]:
    """Compute those of rows begin:end, which failed together, that can be; return the bad ones and what they raised.

    Parameters
    ----------
    compute_rows
        Computes rows begin:end.
    probe_rows
        Runs rows begin:end without padding, only to see whether they raise.
    begin, end
        Rows that raised ``error``.
    n_tries
        How often a row is tried again on its own.
    is_fatal
        Which exceptions end the search and are raised.

    Examples
    --------
    >>> def compute_rows(begin, end, exclude=()):
    ...     if begin <= 5 < end and 5 not in exclude:
    ...         raise ValueError("five")
    >>> isolate_bad_rows(compute_rows, compute_rows, 0, 8, ValueError("five"), 1, lambda error: False)
    {5: 'ValueError: five'}
    """
    if end - begin > 1:
        bad = _find_bad_rows(compute_rows, probe_rows, begin, end, error, n_tries, is_fatal)
        if bad is not None and (len(bad) == end - begin or _catch_error(compute_rows, begin, end, is_fatal, bad) is None):
            return bad
    return _compute_by_halving(compute_rows, begin, end, error, n_tries, is_fatal)


def _find_bad_rows(
    compute_rows: ComputeRows, probe_rows: ProbeRows, begin: int, end: int, error: Exception, n_tries: int, is_fatal: IsFatal
) -> dict[int, str] | None:
    """Return the rows of begin:end, which raised ``error``, that fail on their own; None if one that was found does not."""
    if end - begin == 1:
        # Only the last try, which costs a whole micro-batch, decides.
        any(_catch_error(probe_rows, begin, end, is_fatal) is None for _ in range(n_tries - 1))
        return _retry_row(compute_rows, begin, error, 1, is_fatal) or None
    middle = (begin + end) // 2
    first = _catch_error(probe_rows, begin, middle, is_fatal)
    second = error if first is None else _catch_error(probe_rows, middle, end, is_fatal)  # one half must fail
    bad: dict[int, str] = {}
    for half, raised in (((begin, middle), first), ((middle, end), second)):
        if raised is not None:
            bad_in_half = _find_bad_rows(compute_rows, probe_rows, *half, raised, n_tries, is_fatal)
            if bad_in_half is None:
                return None
            bad |= bad_in_half
    return bad


def _compute_by_halving(
    compute_rows: ComputeRows, begin: int, end: int, error: Exception, n_tries: int, is_fatal: IsFatal
) -> dict[int, str]:
    """Compute rows begin:end half by half, as far as they can be; return the bad rows and what they raised."""
    if end - begin == 1:
        return _retry_row(compute_rows, begin, error, n_tries, is_fatal)
    bad: dict[int, str] = {}
    middle = (begin + end) // 2
    for half in ((begin, middle), (middle, end)):
        if (raised := _catch_error(compute_rows, *half, is_fatal)) is not None:
            bad |= _compute_by_halving(compute_rows, *half, raised, n_tries, is_fatal)
    return bad


def _retry_row(compute_rows: ComputeRows, row: int, error: Exception, n_tries: int, is_fatal: IsFatal) -> dict[int, str]:
    """Try a row again that raised ``error``; return what it raised last, by row, or nothing if it was computed."""
    for _ in range(n_tries):
        latest = _catch_error(compute_rows, row, row + 1, is_fatal)
        if latest is None:
            return {}
        error = latest
    return {row: describe_error(error)}


def find_first_failing_range(compute_rows: ProbeRows, begin: int, end: int, is_fatal: IsFatal) -> tuple[int, int]:
    """Return the first smallest range that still fails, of rows begin:end, which failed together."""
    while end - begin > 1:
        middle = (begin + end) // 2
        failing = (
            half for half in ((begin, middle), (middle, end)) if _catch_error(compute_rows, *half, is_fatal) is not None
        )
        half = next(failing, None)
        if half is None:
            break  # the rows fail only together
        begin, end = half
    return begin, end


def _catch_error(
    run_rows: ComputeRows | ProbeRows, begin: int, end: int, is_fatal: IsFatal, *exclude: Collection[int]
) -> Exception | None:
    """Run rows; return what they raised, or None. A fatal exception is raised."""
    try:
        run_rows(begin, end, *exclude)
    except Exception as error:
        if is_fatal(error):
            raise
        return error
    return None


def fill_rows(arrays: Sequence[Array], rows: Sequence[int] | slice, fill_value: float | None) -> None:
    """Write the fill value into rows that failed; None: NaN."""
    for array in arrays:
        array[rows] = np.nan if fill_value is None else fill_value


def find_nan_rows(arrays: Sequence[Array]) -> list[int]:
    """Return the rows that contain NaN in any of the arrays."""
    floats = [array.reshape(len(array), -1) for array in arrays if array.dtype.kind in "fc"]
    has_nan = [np.isnan(array).any(axis=1) for array in floats]
    return [int(row) for row in np.flatnonzero(np.logical_or.reduce(has_nan))] if has_nan else []
