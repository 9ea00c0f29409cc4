"""The grid: rows of a micro-batch, and of the cells that chunks are made of; pure numbers.

A micro-batch is chosen from the size of a row until one is measured (``ladder``). A cell is one micro-batch, or as many
as make whole units of what is read or written in one go.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

from daskinfer.errors import OptionError

AUTO_BATCH_NBYTES = 1 << 20  # input of an automatic micro-batch; arbitrary prior, to be replaced by measurement
AUTO_BATCH_MIN = 8  # rows, where one row is large; arbitrary prior, to be replaced by measurement
AUTO_BATCH_MAX = 1024  # rows, where one row is small; arbitrary prior, to be replaced by measurement
BATCH_DOUBLINGS = 6  # of an automatic micro-batch, where a larger one pays; arbitrary
BATCH_HALVINGS = 2  # of it, where a smaller one pays, whose tensors stay in the processor's caches; arbitrary
MIN_CELLS = 64  # of the grid that a store is read by, so that there is something to balance; arbitrary
MIN_BATCHES = 8  # micro-batches in the smallest share, so that whole cells meet it to within 1/8; arbitrary
NEGLIGIBLE_WEIGHT = 1e-3  # of the largest; lighter devices would cut everybody's micro-batch to a row; arbitrary


def choose_batch_size(n_rows: int, row_nbytes: int, weights: Sequence[float]) -> int:
    """Choose the rows of a micro-batch from the size of a row and the smallest share.

    The largest power of two whose rows fit in ``AUTO_BATCH_NBYTES``, between ``AUTO_BATCH_MIN`` and
    ``AUTO_BATCH_MAX``; then at most 1 / ``MIN_BATCHES`` of the rows of the smallest share, so that small inputs are
    split to the row. Devices lighter than ``NEGLIGIBLE_WEIGHT`` of the heaviest do not count as the smallest share:
    each gets its one cell by ``apportion``'s rule. Where there are as many rows as devices of positive weight, there
    are as many cells.

    Examples
    --------
    >>> choose_batch_size(200_000, 256, [1.0, 1.0]), choose_batch_size(200_000, 150_528, [8.0, 1.0])
    (1024, 8)
    >>> choose_batch_size(9, 256, [1.0] * 8)
    1
    """
    fitting = AUTO_BATCH_NBYTES // max(1, row_nbytes)
    by_size = min(max(1 << fitting.bit_length() >> 1, AUTO_BATCH_MIN), AUTO_BATCH_MAX)
    positive = [Fraction(weight) for weight in weights if weight > 0]
    least = max(positive) * NEGLIGIBLE_WEIGHT
    smallest = min(weight for weight in positive if weight >= least)
    by_share = int(n_rows * smallest / sum(positive) / MIN_BATCHES)
    by_devices = (n_rows - 1) // max(1, len(positive) - 1)  # the largest with which ceil(n_rows / it) cells reach all
    return max(1, min(by_size, by_share, by_devices))


def align_batch_size(unit_rows: int, batch_size: int) -> int:
    """The largest micro-batch up to ``batch_size`` that divides the rows that are read in one go, unless it is too small.

    Examples
    --------
    >>> align_batch_size(1000, 64), align_batch_size(512, 64), align_batch_size(1, 64), align_batch_size(997, 64)
    (50, 64, 64, 64)
    """
    divisor = next(rows for rows in range(min(unit_rows, batch_size), 0, -1) if unit_rows % rows == 0)
    return divisor if 2 * divisor >= batch_size else batch_size


def read_cell_rows(batch_size: int, unit_rows: int, n_rows: int, *, row_nbytes: int, chunk_nbytes: int) -> int:
    """Rows of a cell that neither cuts a micro-batch nor what is read in one go; a micro-batch where that is too coarse.

    ``unit_rows`` are the rows that are read in one go: a cut inside them reads them twice.

    Examples
    --------
    >>> [read_cell_rows(64, 512, n_rows, row_nbytes=100, chunk_nbytes=10**8) for n_rows in (10**6, 900)]
    [512, 64]
    """
    cell_rows = lcm(batch_size, unit_rows)
    fits = cell_rows * row_nbytes <= chunk_nbytes and cell_rows * MIN_CELLS <= n_rows
    return cell_rows if fits else batch_size


def make_batch_size_candidates(initial: int, max_rows: int, write_unit_rows: int | None = None) -> tuple[int, ...]:
    """Micro-batches to try: doubled from the first up to ``max_rows``; those that divide a write-unit, where there is one.

    And the first halved, where there are rows enough for twice as many.

    Examples
    --------
    >>> make_batch_size_candidates(64, 1000), make_batch_size_candidates(64, 10_000, divides=384), make_batch_size_candidates(64, 100)
    ((16, 32, 64, 128, 256, 512), (16, 32, 64, 128), (64,))
    """
    doubled = (initial << step for step in range(1, BATCH_DOUBLINGS + 1))
    halved = (initial >> step for step in range(BATCH_HALVINGS, 0, -1) if initial % (1 << step) == 0)
    smaller = (size for size in halved if size >= AUTO_BATCH_MIN and max_rows >= 2 * initial)
    return (*smaller, initial, *(size for size in doubled if size <= max_rows and (write_unit_rows or size) % size == 0))


def check_batch_size(batch_size: object) -> int | None:
    """Return a batch size as an int, or None for ``"auto"``; raise OptionError for all else.

    Examples
    --------
    >>> check_batch_size(64), check_batch_size("auto")
    (64, None)
    """
    if isinstance(batch_size, str) and batch_size == "auto":
        return None
    try:
        rows = 0 if isinstance(batch_size, bool) else operator.index(batch_size)  # type: ignore[arg-type]  # it asks that
    except TypeError:
        rows = 0
    if rows < 1:
        raise OptionError(
            f"batch_size is {batch_size!r}; allowed are 'auto' and whole numbers from 1. "
            "Use batch_size='auto' (--batch-size)."
        )
    return rows
