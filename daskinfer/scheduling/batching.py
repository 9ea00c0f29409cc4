"""The grid: how many rows a micro-batch holds, and how many a cell, of which chunks are made.

The batch size follows from the bytes of a row until a better one is measured (``autotune``). A cell is one micro-batch, or
as many as make up whole units of what is read or written in one go. Pure numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

from daskinfer.errors import OptionError

AUTO_BATCH_NBYTES = 1 << 20  # input bytes of an automatic micro-batch; arbitrary prior, replaced by measurement
AUTO_BATCH_MIN = 8  # rows, if a row is large; arbitrary prior, replaced by measurement
AUTO_BATCH_MAX = 1024  # rows, if a row is small; arbitrary prior, replaced by measurement
BATCH_DOUBLINGS = 6  # how often tuning may double the automatic batch size; arbitrary
BATCH_HALVINGS = 2  # how often tuning may halve it, so that tensors stay in the processor's caches; arbitrary
MIN_CELLS = 64  # cells in the grid that a store is read by, so that there is something to balance; arbitrary
MIN_BATCHES = 8  # micro-batches in the smallest share, so that whole cells meet it to within 1/8; arbitrary
NEGLIGIBLE_WEIGHT = 1e-3  # of the largest; lighter devices would cut the batch size of all devices to a row; arbitrary


def choose_batch_size(n_rows: int, row_nbytes: int, weights: Sequence[float]) -> int:
    """Choose the rows of a micro-batch from the bytes of a row and the smallest share.

    The result is the largest power of two whose rows fit in ``AUTO_BATCH_NBYTES``, between ``AUTO_BATCH_MIN`` and
    ``AUTO_BATCH_MAX``, but at most 1 / ``MIN_BATCHES`` of the rows of the smallest share, so that small inputs are
    split to the row. A device lighter than ``NEGLIGIBLE_WEIGHT`` of the heaviest does not count as the smallest share:
    ``apportion`` gives it one cell anyway. If there are at least as many rows as devices of positive weight, there are
    at least as many cells.

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
    by_devices = (n_rows - 1) // max(
        1, len(positive) - 1
    )  # the largest for which ceil(n_rows / it) cells reach every device
    return max(1, min(by_size, by_share, by_devices))


def align_batch_size(unit_rows: int, batch_size: int) -> int:
    """Reduce a batch size so that it divides ``unit_rows``, the rows read in one go; not below half of it.

    If no divisor of ``unit_rows`` is at least half of ``batch_size``, return ``batch_size`` unchanged.

    Examples
    --------
    >>> align_batch_size(1000, 64), align_batch_size(512, 64), align_batch_size(1, 64), align_batch_size(997, 64)
    (50, 64, 64, 64)
    """
    divisor = next(rows for rows in range(min(unit_rows, batch_size), 0, -1) if unit_rows % rows == 0)
    return divisor if 2 * divisor >= batch_size else batch_size


def read_cell_rows(batch_size: int, unit_rows: int, n_rows: int, *, row_nbytes: int, chunk_nbytes: int) -> int:
    """Choose the rows of a cell that cuts neither a micro-batch nor a unit of ``unit_rows`` rows read in one go.

    A cut inside a unit reads that unit twice. If such a cell is larger than a chunk, or there are fewer than ``MIN_CELLS``
    of them, a cell is one micro-batch.

    Examples
    --------
    >>> [read_cell_rows(64, 512, n_rows, row_nbytes=100, chunk_nbytes=10**8) for n_rows in (10**6, 900)]
    [512, 64]
    """
    cell_rows = lcm(batch_size, unit_rows)
    fits = cell_rows * row_nbytes <= chunk_nbytes and cell_rows * MIN_CELLS <= n_rows
    return cell_rows if fits else batch_size


def make_batch_size_candidates(initial: int, max_rows: int, write_unit_rows: int | None = None) -> tuple[int, ...]:
    """List the batch sizes that tuning may try, in ascending order.

    They are ``initial``, its doubles up to ``max_rows`` (of a store only those that divide its write unit), and its halves
    if there are at least ``2 * initial`` rows.

    Examples
    --------
    >>> make_batch_size_candidates(64, 1000), make_batch_size_candidates(64, 100)
    ((16, 32, 64, 128, 256, 512), (64,))
    >>> make_batch_size_candidates(64, 10_000, write_unit_rows=384)
    (16, 32, 64, 128)
    """
    doubled = (initial << step for step in range(1, BATCH_DOUBLINGS + 1))
    halved = (initial >> step for step in range(BATCH_HALVINGS, 0, -1) if initial % (1 << step) == 0)
    smaller = (size for size in halved if size >= AUTO_BATCH_MIN and max_rows >= 2 * initial)
    return (*smaller, initial, *(size for size in doubled if size <= max_rows and (write_unit_rows or size) % size == 0))


def check_batch_size(batch_size: object) -> int | None:
    """Return a batch size as an int, or None for ``"auto"``; raise OptionError for anything else.

    Examples
    --------
    >>> check_batch_size(64), check_batch_size("auto")
    (64, None)
    """
    if isinstance(batch_size, str) and batch_size == "auto":
        return None
    try:
        rows = 0 if isinstance(batch_size, bool) else operator.index(batch_size)  # type: ignore[arg-type]  # checked by it
    except TypeError:
        rows = 0
    if rows < 1:
        raise OptionError(f"batch_size must be 'auto' or an integer >= 1, got {batch_size!r}")
    return rows
