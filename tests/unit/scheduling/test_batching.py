"""The automatic batch size, the cells of the grid, and the batch sizes that tuning tries."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daskinfer.errors import OptionError
from daskinfer.scheduling.batching import (
    AUTO_BATCH_NBYTES,
    NEGLIGIBLE_WEIGHT,
    align_batch_size,
    check_batch_size,
    choose_batch_size,
    make_batch_size_candidates,
    read_cell_rows,
)

weight = st.sampled_from([0.0, 1e-9, 0.3, 1.0, 1.0, 2.0, 8.0, 1e9])
weights_of_devices = st.lists(weight, min_size=1, max_size=6).filter(any)


@pytest.mark.parametrize(("value", "expected"), [("auto", None), (64, 64), (np.int32(7), 7)])
def test_batch_size_is_auto_or_a_count(value, expected):
    """'auto' becomes None and every integer from 1 an int."""
    assert check_batch_size(value) == expected


@pytest.mark.parametrize("wrong", [0, -1, True, np.True_, 64.0, "64", "Auto", None, np.array([1, 2])])
def test_invalid_batch_sizes_are_refused(wrong):
    """Whatever is no count of rows is refused, among it numbers in strings and booleans."""
    with pytest.raises(OptionError, match=r"^batch_size must be 'auto' or an integer >= 1, got "):
        check_batch_size(wrong)


@pytest.mark.parametrize(
    ("n_rows", "row_nbytes", "expected"),
    [(10**6, 256, 1024), (10**6, 4096, 256), (10**6, 4097, 128), (10**6, 10**9, 8), (10**6, 0, 1024), (80, 1, 10)],
)
def test_a_micro_batch_is_about_a_mebibyte(n_rows, row_nbytes, expected):
    """One device's micro-batch is a power of two of at most a MiB within 8 to 1024 rows, at most an eighth of its rows."""
    assert choose_batch_size(n_rows, row_nbytes, [1.0]) == expected


def test_a_negligible_device_does_not_reduce_the_batch_size():
    """A weight below a thousandth of the largest leaves the batch size as it is; a thousandth reduces it."""
    assert choose_batch_size(100_000, 256, [1.0, 1e-3 / 2]) == 1024
    assert choose_batch_size(100_000, 256, [1.0, 1e-3]) == 12


def test_many_negligible_devices_still_get_a_cell_each():
    """Ten light devices beside a heavy one need eleven cells: batches of 9 give twelve of 100 rows, of 10 only ten."""
    assert choose_batch_size(100, 1, [1.0] + [1e-9] * 10) == 9


@given(
    n_rows=st.integers(0, 5000),
    row_nbytes=st.sampled_from([0, 1, 1000, 5000, 200_000, 1 << 21]),
    weights=weights_of_devices,
)
def test_the_batch_size_leaves_no_device_idle(n_rows, row_nbytes, weights):
    """The automatic batch size keeps to its bytes, to an eighth of each share that counts, and leaves a cell per device."""
    rows = choose_batch_size(n_rows, row_nbytes, weights)
    n_active = sum(w > 0 for w in weights)
    counting = [Fraction(w) for w in weights if w >= NEGLIGIBLE_WEIGHT * max(weights)]
    assert 1 <= rows <= 1024
    assert rows <= 8 or rows * row_nbytes <= AUTO_BATCH_NBYTES
    assert rows == 1 or all(rows * 8 * sum(map(Fraction, weights)) <= n_rows * w for w in counting)
    assert n_rows < n_active or math.ceil(n_rows / rows) >= n_active


@given(unit=st.integers(1, 2000), size=st.integers(1, 1024))
def test_the_batch_size_divides_what_is_read_in_one_go(unit, size):
    """It becomes the unit's largest divisor that is at least half of it, if there is one, and never grows."""
    rows = align_batch_size(unit, size)
    assert rows <= size
    divisors = [d for d in range(1, size + 1) if unit % d == 0 and 2 * d >= size]
    assert rows == (max(divisors) if divisors else size)


@given(size=st.integers(1, 100), unit=st.integers(1, 100), n_rows=st.integers(0, 10**6), row_nbytes=st.integers(1, 1000))
def test_cells_are_whole_micro_batches_and_whole_units_if_possible(size, unit, n_rows, row_nbytes):
    """A cell is a multiple of the batch size, and of the unit unless that is too large for a chunk or the input."""
    cell = read_cell_rows(size, unit, n_rows, row_nbytes=row_nbytes, chunk_nbytes=100_000)
    assert cell % size == 0
    assert cell % unit == 0 or np.lcm(size, unit) * row_nbytes > 100_000 or np.lcm(size, unit) * 64 > n_rows


def test_candidates_double_and_halve():
    """The initial size is always a candidate; it doubles at most six times, up to the limit, if it divides a write unit."""
    assert make_batch_size_candidates(8, 10**9) == (8, 16, 32, 64, 128, 256, 512)
    assert make_batch_size_candidates(16, 32) == (8, 16, 32)
    assert make_batch_size_candidates(16, 31) == (16,)  # too few rows for a choice
    assert make_batch_size_candidates(64, 10**9)[:3] == (16, 32, 64)
    assert make_batch_size_candidates(50, 100) == (25, 50, 100)
    assert make_batch_size_candidates(8, 3) == (8,)
    assert make_batch_size_candidates(6, 100, write_unit_rows=48) == (6, 12, 24, 48)
