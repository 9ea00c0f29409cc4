import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daskinfer.errors import OptionError
from daskinfer.scheduling.chunking import (
    CHUNK_NBYTES,
    apportion,
    fit_chunk_nbytes,
    make_chunks,
    resolve_weights,
)

NAMES = ["cuda:0", "cuda:1", "cpu:0"]
KINDS = ["cuda", "cuda", "cpu"]

weight = st.sampled_from([0.0, 1e-9, 0.3, 1.0, 1.0, 2.0, 8.0, 1e9])
weights_of_devices = st.lists(weight, min_size=1, max_size=6).filter(any)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("even", (1.0, 1.0, 1.0)),
        ("auto", (8.0, 8.0, 1.0)),
        ([3, 0, 1], (3.0, 0.0, 1.0)),
        (np.array([3, 0, 1], dtype="float32"), (3.0, 0.0, 1.0)),
        ((Fraction(1, 2), np.int64(2), 0.25), (0.5, 2.0, 0.25)),
        ({"cuda": 8, "cpu": 1}, (8.0, 8.0, 1.0)),
        ({"GPU": 8, " Cpu ": 1}, (8.0, 8.0, 1.0)),
        ({"cuda": 8, "GPU:1": 2, "CPU:0": 1}, (8.0, 2.0, 1.0)),
        ({"cpu": 0, "cuda": 1e-300}, (1e-300, 1e-300, 0.0)),
    ],
)
def test_weights_are_resolved_in_the_order_of_the_devices(weights, expected):
    """Every spelling of device_weights gives one float per device, in the devices' order."""
    resolved = resolve_weights(weights, NAMES, KINDS)
    assert resolved == expected
    assert all(type(w) is float for w in resolved)


def test_a_uuid_is_no_kind():
    """A key that is a GPU's UUID means that GPU and not the kind gpu."""
    weights = {"gpu-ab12": 3, "MIG-7": 1}
    assert resolve_weights(weights, ["GPU-AB12", "MIG-7"], ["cuda", "cuda"]) == (3.0, 1.0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2], r"has 2 entries for 3 devices \(cuda:0, cuda:1, cpu:0\). Give one per device"),
        ([1, -2, 1], r"the weight of cuda:1 is -2; allowed are finite numbers from 0. Use 0 to leave"),
        ([math.nan, 1, 1], r"the weight of cuda:0 is nan; allowed"),
        ([1, 1, math.inf], r"the weight of cpu:0 is inf; allowed"),
        ([1, 1, 10**400], r"the weight of cpu:0 is 1000+; allowed"),
        ([True, 1, 1], r"the weight of cuda:0 is True; allowed"),
        (np.array([True, False, True]), r"the weight of cuda:0 is True; allowed"),
        (["8", 1, 1], r"the weight of cuda:0 is '8'; allowed"),
        ({"cuda": None, "cpu": 1}, r"the weight of cuda:0 is None; allowed"),
        ([0, 0.0, 0], r"all 0 .*at least one must be above 0. Give one a weight"),
        ("fast", r"device_weights is 'fast'; allowed are 'auto', 'even'.*Give one number for each of cuda:0, cuda:1"),
        (b"\x01\x01\x01", r"device_weights is b'.*; allowed are"),
        (3, r"device_weights is 3; allowed are"),
        (np.array(3.0), r"device_weights is array\(3.\); allowed are"),
        ({8, 1}, r"device_weights is {8, 1}; allowed are"),
        ({"cuda": 8}, r"no entry for cpu:0; every device needs one. Add 'cpu:0' or 'cpu'"),
        ({"even": 8}, r"an entry 'even' that matches no device; the devices are cuda:0"),
        ({"cuda": 8, "cpu": 1, "cuda:2": 1}, r"an entry 'cuda:2' that matches no device.*Take the entry out"),
        ({"cuda": 8, "gpu": 1, "cpu": 1}, r"two entries for 'cuda', 'gpu' is one; allowed is one. Take"),
    ],
)
def test_weights_are_refused_with_cause_and_cure(weights, message):
    """A refused device_weights names the device or entry, what was got, what is allowed and what to change."""
    with pytest.raises(OptionError, match=message):
        resolve_weights(weights, NAMES, KINDS)


def test_a_refusal_names_a_few_of_many_devices():
    """A message about 40 devices lists eight and counts the rest."""
    with pytest.raises(OptionError, match=r"\(cpu:0, .*, cpu:7 and 32 more\)"):
        resolve_weights([1.0], [f"cpu:{i}" for i in range(40)], ["cpu"] * 40)


def best_shares(n_cells, weights):
    """Try all ways to hand out cells; return those with the least sum of squared distances to the quotas.

    A way obeys the rules that stand above the quotas: weight 0 gets 0, nobody else goes without if that is possible.
    """
    quotas = [n_cells * Fraction(w) / sum(map(Fraction, weights)) for w in weights]
    least = int(n_cells >= sum(w > 0 for w in weights))
    ranges = [range(least, n_cells + 1) if w else range(1) for w in weights]
    ways = [way for way in itertools.product(*ranges) if sum(way) == n_cells]
    cost = {way: sum((c - q) ** 2 for c, q in zip(way, quotas, strict=True)) for way in ways}
    return [way for way in ways if cost[way] == min(cost.values())]


@given(n_cells=st.integers(0, 9), weights=st.lists(weight, min_size=1, max_size=4).filter(any))
def test_no_other_way_to_share_is_nearer_to_the_quotas(n_cells, weights):
    """Largest remainders are the nearest whole cells to the exact quotas, as trying every way shows."""
    assert apportion(n_cells, weights) in best_shares(n_cells, weights)


@given(n_cells=st.integers(0, 10**12), weights=weights_of_devices)
def test_shares_are_whole_and_fair(n_cells, weights):
    """Shares sum up; 0 gets 0; no positive weight goes without; a share exceeds its quota by less than a cell."""
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
    """Ties go to the earlier device, fewer cells than devices to the heaviest, and 1e-9 beside 1e9 is no trouble."""
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
    by_device = [[c for c in layout.chunks if c.device_index == d] for d in range(len(weights))]
    cells = apportion(math.ceil(n_rows / cell), weights)

    assert [row for c in layout.chunks for row in range(c.start, c.stop)] == list(range(n_rows))
    assert [c.index for c in layout.chunks] == list(range(len(layout.chunks)))
    assert all(c.n_rows > 0 and c.start % cell == 0 for c in layout.chunks)
    assert all(c.n_rows * 10 <= max(chunk_nbytes, cell * 10) for c in layout.chunks)
    assert tuple(sum(math.ceil(c.n_rows / cell) for c in own) for own in by_device) == cells
    assert all(len(own) >= min(4, n) for own, n in zip(by_device, cells, strict=True))
    assert all(c.n_rows <= math.ceil(own[0].n_rows / cell) * cell for own in by_device for c in own)


@given(n_cells=st.integers(8, 500), n_devices=st.integers(1, 5))
def test_rounds_run_through_the_devices_in_order(n_cells, n_devices):
    """Even devices take turns: chunk i is device i modulo their number, wherever all have the cells for it."""
    devices = [c.device_index for c in make_chunks(n_cells * n_devices, [1.0] * n_devices, batch_size=1).chunks]
    assert devices == [i % n_devices for i in range(len(devices))]


def test_a_light_device_keeps_pace_with_the_rounds():
    """Where chunks are many, a light device's cells are spread over all rounds and not bunched at either end."""
    layout = make_chunks(1010, [100.0, 1.0], batch_size=1, row_nbytes=1, chunk_nbytes=10)
    assert [c.start for c in layout.chunks if c.device_index == 1] == [10 + 101 * i for i in range(10)]


def test_the_last_round_is_cut_small():
    """The last of the rounds is cut into a half and two quarters."""
    assert make_chunks(1600, [1.0], batch_size=1).row_chunks == (400, 400, 400, 200, 100, 100)


def test_the_partial_cell_is_the_last_chunks():
    """Rows beyond the last whole cell belong to the last chunk."""
    layout = make_chunks(81, [1.0], batch_size=10)
    assert layout.row_chunks[-1] == 1
    assert layout.padded_rows(layout.chunks[-1]) == 10


@pytest.mark.parametrize(("n_rows", "row_chunks", "per_device"), [(0, (0,), (0, 0)), (1, (1,), (1, 0)), (2, (1, 1), (1, 1))])
def test_few_rows_make_few_chunks(n_rows, row_chunks, per_device):
    """No row gives no chunk, and dask's chunks of an empty axis; fewer rows than devices leave the later ones out."""
    layout = make_chunks(n_rows, [1.0, 1.0], batch_size=1)
    assert (layout.row_chunks, layout.rows_per_device(2)) == (row_chunks, per_device)


def test_the_largest_chunks_are_known_per_device():
    """Each device's first largest chunk is found, and None for a device without any."""
    layout = make_chunks(101, [1.0, 0.0, 3.0], batch_size=5)
    assert [c and c.n_rows for c in layout.largest_chunks(3)] == [10, None, 20]


def test_a_million_chunks_are_laid_out():
    """A million chunks of one row each come out whole, also where a second device has one cell of them."""
    layout = make_chunks(1_000_000, [1e9, 1e-9, 0.0], batch_size=1, row_nbytes=2, chunk_nbytes=1)
    assert len(layout.chunks) == 1_000_000
    assert layout.rows_per_device(3) == (999_999, 1, 0)


def test_write_units_hold_whole_micro_batches():
    """Write-units that cut through a micro-batch are refused with the largest batch size that divides them."""
    with pytest.raises(OptionError, match=r"hold 100 rows at batch_size=64; .* Use batch_size=50 \(--batch-size\)\."):
        make_chunks(1000, [1.0], batch_size=64, cell_rows=100)
    with pytest.raises(OptionError, match=r"hold 10 rows at batch_size=64; .* Use batch_size=10 \(--batch-size\)\."):
        make_chunks(1000, [1.0], batch_size=64, cell_rows=10)


@pytest.mark.parametrize(
    ("limits", "expected"), [([], CHUNK_NBYTES), ([0, 1 << 40], CHUNK_NBYTES), ([0, 5000, 6000], 4000), ([10], 1)]
)
def test_a_chunk_fits_on_the_smallest_device(limits, expected):
    """A chunk takes what the device with the least known memory has beside the network, and never more than usual."""
    assert fit_chunk_nbytes(limits, model_nbytes=1000) == expected
