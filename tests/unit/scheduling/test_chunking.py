"""How rows become chunks: fair shares in whole cells, rounds, and limits by bytes."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daskinfer.errors import OptionError
from daskinfer.scheduling.chunking import CHUNK_NBYTES, ChunkLayout, apportion, fit_chunk_nbytes, make_chunks

weight = st.sampled_from([0.0, 1e-9, 0.3, 1.0, 1.0, 2.0, 8.0, 1e9])
weights_of_devices = st.lists(weight, min_size=1, max_size=6).filter(any)


def best_shares(n_cells, weights):
    """Try all ways to divide cells; return those with the least sum of squared distances to the quotas.

    All of them obey the rules that override the quotas: weight 0 gets 0, every other device a cell if there are enough.
    """
    quotas = [n_cells * Fraction(w) / sum(map(Fraction, weights)) for w in weights]
    least = int(n_cells >= sum(w > 0 for w in weights))
    ranges = [range(least, n_cells + 1) if w else range(1) for w in weights]
    ways = [way for way in itertools.product(*ranges) if sum(way) == n_cells]
    cost = {way: sum((c - q) ** 2 for c, q in zip(way, quotas, strict=True)) for way in ways}
    return [way for way in ways if cost[way] == min(cost.values())]


@given(n_cells=st.integers(0, 9), weights=st.lists(weight, min_size=1, max_size=4).filter(any))
def test_no_other_division_is_closer_to_the_quotas(n_cells, weights):
    """Largest remainders are the whole cells closest to the exact quotas, compared with every other division."""
    assert apportion(n_cells, weights) in best_shares(n_cells, weights)


@given(n_cells=st.integers(0, 10**12), weights=weights_of_devices)
def test_shares_are_whole_and_fair(n_cells, weights):
    """Shares sum up; 0 gets 0; every positive weight gets a cell; a share exceeds its quota by less than a cell."""
    cells = apportion(n_cells, weights)
    total = sum(map(Fraction, weights))
    assert sum(cells) == n_cells
    assert all(c == 0 for c, w in zip(cells, weights, strict=True) if w == 0)
    assert n_cells < sum(w > 0 for w in weights) or all(c for c, w in zip(cells, weights, strict=True) if w > 0)
    assert all(c <= max(1, math.ceil(n_cells * Fraction(w) / total)) for c, w in zip(cells, weights, strict=True))


@pytest.mark.parametrize(
    ("n_cells", "weights", "expected"),
    [
        (0, [1, 1], (0, 0)),
        (1, [1, 1], (1, 0)),
        (9, [1] * 8, (2, 1, 1, 1, 1, 1, 1, 1)),
        (2, [8, 1, 1], (2, 0, 0)),
        (3, [8, 1, 1], (1, 1, 1)),
        (10, [1e9, 0, 1e-9], (9, 0, 1)),
        (10**9 + 1, [1e9, 1], (10**9, 1)),
        (7, [0.1, 0.2, 0.7], (1, 1, 5)),
    ],
)
def test_shares_of_known_cases(n_cells, weights, expected):
    """Ties go to the earlier device, too few cells to the heaviest devices; 1e-9 beside 1e9 works."""
    assert apportion(n_cells, weights) == expected


@given(
    n_rows=st.integers(0, 700),
    weights=weights_of_devices,
    batch_size=st.integers(1, 9),
    batches_per_cell=st.integers(1, 3),
    chunk_nbytes=st.sampled_from([1, 300, 2000, 1 << 20]),
)
def test_a_layout_holds_every_row_once_on_the_grid(n_rows, weights, batch_size, batches_per_cell, chunk_nbytes):
    """Chunks are contiguous, whole cells, within their bytes, apportioned by weight, and shrink towards the end."""
    cell = batch_size * batches_per_cell
    layout = make_chunks(n_rows, weights, batch_size=batch_size, cell_rows=cell, row_nbytes=10, chunk_nbytes=chunk_nbytes)
    assigned = list(zip(layout.chunks, layout.devices, strict=True))
    by_device = [[c for c, device in assigned if device == d] for d in range(len(weights))]
    cells = apportion(math.ceil(n_rows / cell), weights)

    assert [row for c in layout.chunks for row in range(c.start, c.stop)] == list(range(n_rows))
    assert [c.index for c in layout.chunks] == list(range(len(layout.chunks)))
    assert all(c.n_rows > 0 and c.start % cell == 0 for c in layout.chunks)
    assert all(c.n_rows * 10 <= max(chunk_nbytes, cell * 10) for c in layout.chunks)
    assert tuple(sum(math.ceil(c.n_rows / cell) for c in own) for own in by_device) == cells
    assert all(len(own) >= min(4, n) for own, n in zip(by_device, cells, strict=True))
    assert all(c.n_rows <= math.ceil(own[0].n_rows / cell) * cell for own in by_device for c in own)


@given(n_cells=st.integers(8, 500), n_devices=st.integers(1, 5))
def test_devices_take_turns_within_rounds(n_cells, n_devices):
    """Devices of equal weight take turns: chunk i belongs to device i modulo their number, if all have cells enough."""
    devices = make_chunks(n_cells * n_devices, [1.0] * n_devices, batch_size=1).devices
    assert devices == tuple(i % n_devices for i in range(len(devices)))


def test_a_light_device_is_spread_over_the_rounds():
    """If there are many chunks, a light device's cells are spread over all rounds, not bunched at either end."""
    layout = make_chunks(1010, [100.0, 1.0], batch_size=1, row_nbytes=1, chunk_nbytes=10)
    starts = [chunk.start for chunk, device in zip(layout.chunks, layout.devices, strict=True) if device == 1]
    assert starts == [10 + 101 * i for i in range(10)]


def test_the_last_round_is_cut_small():
    """The last of the rounds is cut into a half and two quarters."""
    assert make_chunks(1600, [1.0], batch_size=1).row_chunks == (400, 400, 400, 200, 100, 100)


def test_layouts_of_one_grid_are_concatenated():
    """Joined layouts number their chunks on, in row order, and keep the device of each chunk."""
    parts = [make_chunks(n_rows, [1.0, 1.0], batch_size=10) for n_rows in (40, 0, 25)]
    joined = ChunkLayout.concatenate(parts)
    assert (joined.n_rows, joined.batch_size, joined.cell_rows) == (65, 10, 10)
    assert joined.row_chunks == parts[0].row_chunks + parts[2].row_chunks
    assert joined.devices == parts[0].devices + parts[2].devices
    assert [chunk.index for chunk in joined.chunks] == list(range(len(joined.chunks)))
    assert [chunk.start for chunk in joined.chunks] == [0, *np.cumsum(joined.row_chunks)[:-1]]


def test_the_partial_cell_is_the_last_chunks():
    """Rows beyond the last whole cell belong to the last chunk."""
    layout = make_chunks(81, [1.0], batch_size=10)
    assert layout.row_chunks[-1] == 1
    assert layout.padded_rows(layout.chunks[-1]) == 10


@pytest.mark.parametrize(("n_rows", "row_chunks", "per_device"), [(0, (0,), (0, 0)), (1, (1,), (1, 0)), (2, (1, 1), (1, 1))])
def test_few_rows_make_few_chunks(n_rows, row_chunks, per_device):
    """No rows give no chunk, and dask's chunks of an empty axis; with fewer rows than devices the later ones get none."""
    layout = make_chunks(n_rows, [1.0, 1.0], batch_size=1)
    assert (layout.row_chunks, layout.rows_per_device(2)) == (row_chunks, per_device)


def test_the_largest_chunk_of_each_device():
    """Each device's first largest chunk is found, and None for a device without any."""
    layout = make_chunks(101, [1.0, 0.0, 3.0], batch_size=5)
    assert [c and c.n_rows for c in layout.largest_chunks(3)] == [10, None, 20]


def test_a_million_chunks_are_laid_out():
    """A million chunks of one row are laid out completely, also if one of them goes to a second device."""
    layout = make_chunks(1_000_000, [1e9, 1e-9, 0.0], batch_size=1, row_nbytes=2, chunk_nbytes=1)
    assert len(layout.chunks) == 1_000_000
    assert layout.rows_per_device(3) == (999_999, 1, 0)


def test_write_units_hold_whole_micro_batches():
    """Write units that would cut a micro-batch are refused; the error names the largest batch size that divides them."""
    with pytest.raises(OptionError, match=r"a multiple of batch_size=64, got 100\. Use batch_size=50 \(--batch-size\)\."):
        make_chunks(1000, [1.0], batch_size=64, cell_rows=100)
    with pytest.raises(OptionError, match=r"a multiple of batch_size=64, got 10\. Use batch_size=10 \(--batch-size\)\."):
        make_chunks(1000, [1.0], batch_size=64, cell_rows=10)


@pytest.mark.parametrize(
    ("limits", "expected"), [([], CHUNK_NBYTES), ([0, 1 << 40], CHUNK_NBYTES), ([0, 5000, 6000], 4000), ([10], 1)]
)
def test_a_chunk_fits_the_device_with_the_least_memory(limits, expected):
    """A chunk takes what the device with the least known memory has beside the model, and at most ``CHUNK_NBYTES``."""
    assert fit_chunk_nbytes(limits, model_nbytes=1000) == expected
