"""Bad rows: found by bisection, filled, and listed; all others have the output that they have without them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import daskinfer as di
from daskinfer.core.chunks import BatchConfig
from daskinfer.core.pytree import Ports
from daskinfer.errors import ChunkError, OptionError, TooManyFailures
from daskinfer.models.loaded_model import LoadedModel
from daskinfer.options import Options
from daskinfer.worker import bad_rows
from daskinfer.worker.model_runner import ModelRunConfig, run_model
from tests.support import faulty
from tests.support.faulty import Array

X = np.arange(2, 1002, dtype=np.float32)  # the output spec is inferred from made-up rows of 0 and 1
BAD = (7.0, 8.0, 500.0, 1001.0)


def is_bad(values: Array) -> Array:
    """Return which of these rows the models here cannot take."""
    return np.isin(values, BAD)


def picky(batch: Array) -> Array:
    """Double the rows, or raise for a bad one."""
    if is_bad(batch).any():
        raise ValueError(f"cannot take {batch[is_bad(batch)][0]:g}")
    return 2 * batch


def return_nan(batch: Array) -> Array:
    """Double the rows, and return NaN for bad ones."""
    return np.where(is_bad(batch), np.float32(np.nan), 2 * batch)


def make_failing(bad: set[int], calls: list[set[int]]) -> Callable[..., None]:
    """Make a function that raises if it gets one of the ``bad`` rows; ``calls`` records the rows that it got."""

    def compute_rows(begin: int, end: int, exclude: Collection[int] = ()) -> None:
        rows = set(range(begin, end)).difference(exclude)
        calls.append(rows)
        if found := sorted(bad & rows):
            raise ValueError(str(found[0]))

    return compute_rows


def never_fatal(error: Exception) -> bool:
    """Blame the rows for every exception."""
    return False


@given(n_rows=st.integers(1, 70), bad=st.sets(st.integers(0, 69)), n_tries=st.integers(0, 2))
def test_bisection_finds_all_bad_rows_and_no_other(n_rows: int, bad: set[int], n_tries: int) -> None:
    """Whatever rows are bad, they are found, and all others are computed together, once."""
    bad = {row for row in bad if row < n_rows} or {n_rows - 1}
    calls, probed = list[set[int]](), list[set[int]]()
    found = bad_rows.isolate_bad_rows(
        make_failing(bad, calls), make_failing(bad, probed), 0, n_rows, ValueError("all"), n_tries, never_fatal
    )
    assert sorted(found) == sorted(bad)
    assert all(why == f"ValueError: {row}" for row, why in found.items()) or (n_rows, n_tries) == (1, 0)
    succeeded = [rows for rows in calls if not bad & rows]
    assert succeeded == ([set(range(n_rows)) - bad] if len(bad) < n_rows else [])
    assert len(calls) - len(succeeded) == (n_tries if n_rows == 1 else len(bad))
    assert sum(map(len, probed)) <= min(2 * len(bad), n_rows.bit_length()) * n_rows + len(bad) * n_tries


@given(n_rows=st.integers(1, 70), bad=st.sets(st.integers(0, 69)), n_tries=st.integers(0, 2))
def test_rows_that_cannot_be_probed(n_rows: int, bad: set[int], n_tries: int) -> None:
    """If every probe fails, as with a model that takes one batch size only, the same rows are found."""
    bad = {row for row in bad if row < n_rows} or {n_rows - 1}
    calls: list[set[int]] = []
    found = bad_rows.isolate_bad_rows(
        make_failing(bad, calls), make_failing(set(range(n_rows)), []), 0, n_rows, ValueError("all"), n_tries, never_fatal
    )
    assert sorted(found) == sorted(bad)
    succeeded = [rows for rows in calls if not bad & rows]
    assert set().union(*succeeded) == set(range(n_rows)) - bad


def test_rows_that_fail_only_together_are_computed() -> None:
    """Rows of which none fails on its own are computed in halves, as large as possible."""
    computed: set[int] = set()

    def compute_rows(begin: int, end: int, exclude: Collection[int] = ()) -> None:
        if end - begin > 3:
            raise ValueError("too many")
        computed.update(set(range(begin, end)).difference(exclude))

    assert bad_rows.isolate_bad_rows(compute_rows, compute_rows, 0, 20, ValueError("too many"), 1, never_fatal) == {}
    assert computed == set(range(20))


def test_a_row_that_fails_once_is_computed() -> None:
    """A row is tried again on its own before it counts as bad."""
    left = [1]

    def compute_rows(begin: int, end: int, exclude: Collection[int] = ()) -> None:
        if begin <= 2 < end and left and left.pop():
            raise ValueError("once")

    assert bad_rows.isolate_bad_rows(compute_rows, compute_rows, 2, 3, ValueError("before"), 1, never_fatal) == {
        2: "ValueError: once"
    }
    assert bad_rows.isolate_bad_rows(compute_rows, compute_rows, 2, 3, ValueError("before"), 1, never_fatal) == {}
    assert bad_rows.isolate_bad_rows(compute_rows, compute_rows, 0, 8, ValueError("before"), 1, never_fatal) == {}


@given(n_rows=st.integers(1, 70), bad=st.sets(st.integers(0, 69), min_size=1))
def test_the_first_bad_row(n_rows: int, bad: set[int]) -> None:
    """The first row that fails on its own is found."""
    bad = {row for row in bad if row < n_rows} or {0}
    assert bad_rows.find_first_failing_range(make_failing(bad, []), 0, n_rows, never_fatal) == (min(bad), min(bad) + 1)


def test_the_first_range_that_fails_only_together() -> None:
    """If no half fails, the whole range is the smallest that does."""

    def compute_rows(begin: int, end: int) -> None:
        if end - begin > 3:
            raise ValueError("too many")

    assert bad_rows.find_first_failing_range(compute_rows, 0, 6, never_fatal) == (0, 6)


def skip_bad_rows(compute_rows: Callable[..., None], begin: int, end: int, is_fatal: bad_rows.IsFatal) -> dict[int, str]:
    """Find the bad rows with one function that computes and probes."""
    return bad_rows.isolate_bad_rows(compute_rows, compute_rows, begin, end, ValueError(), 2, is_fatal)


@pytest.mark.parametrize("find", [bad_rows.find_first_failing_range, skip_bad_rows])
def test_fatal_errors_end_the_search(find: Callable[..., object]) -> None:
    """An exception for which no row is to blame is raised."""
    with pytest.raises(ValueError, match=r"^5$"):
        find(make_failing({5}, []), 0, 8, lambda error: True)


def test_rows_with_nan() -> None:
    """A row with NaN in any output counts, whatever the shape; integers have none."""
    a, b = np.zeros((5, 2, 3)), np.zeros(5, complex)
    a[1, 1, 2], b[3] = np.nan, complex(0, np.nan)
    assert bad_rows.find_nan_rows([a, np.zeros(5, int), b]) == [1, 3]
    assert bad_rows.find_nan_rows([np.zeros(5, int)]) == bad_rows.find_nan_rows([np.zeros((5, 0))]) == []


# Through predict, stream and run


@pytest.fixture(params=["inline", "workers", "auto"])
def where(request: pytest.FixtureRequest, two_cpus: list[str]) -> dict[str, Any]:
    """Return the keywords for computing in this process, on workers, and on workers by their speed."""
    if request.param == "inline":
        return {"devices": "inline", "batch_size": 32}
    weights = {"workers": "even", "auto": "auto"}[request.param]
    return {"devices": two_cpus, "device_weights": weights, "batch_size": 32}


def assert_only_bad_rows_filled(y: Array, report: di.RunReport | None = None, fill: float = np.nan) -> None:
    """Assert that exactly the bad rows are filled, and listed."""
    np.testing.assert_array_equal(y, np.where(is_bad(X), fill, 2 * X))
    if report is not None:
        assert report.failed_rows == tuple(np.flatnonzero(is_bad(X)))
        assert report.rows == len(X) - len(BAD)


def test_bad_rows_are_skipped(where: dict[str, Any]) -> None:
    """Exactly the bad rows have no output, and the report says which, where and why."""
    y, report = di.predict(picky, X, on_error="skip", return_report=True, **where)
    assert_only_bad_rows_filled(y, report)
    assert {f.exception for f in report.failures} == {f"ValueError: cannot take {value:g}" for value in BAD}
    assert {f.device for f in report.failures} <= {d.device for d in report.devices}


def test_the_search_runs_few_rows() -> None:
    """The search costs about two micro-batches per bad row, however large the micro-batches are."""
    ran: list[int] = []

    def counted(batch: Array) -> Array:
        ran.append(len(batch))
        return picky(batch)

    y = di.predict(counted, X, on_error="skip", devices="inline", batch_size=256)
    assert_only_bad_rows_filled(y)
    # Four micro-batches; two bad rows in the first, one in the second and the fourth. Per bad row: one micro-batch with
    # this row alone, and two micro-batches of probes; then one with all other rows.
    assert ran.count(256) <= 4 + len(BAD) + 3 + len(BAD)
    assert sum(n for n in ran if n != 256) <= 2 * len(BAD) * 257


@pytest.mark.parametrize("bad", [BAD, (*X[:40],)])
def test_the_bytes_of_good_rows_stay(bad: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows beside bad ones have the same bytes as without them, also with preprocess and postprocess."""
    monkeypatch.setattr(__name__ + ".BAD", bad)
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
    rows = np.random.default_rng(0).normal(size=(len(X), 16)).astype("float32")
    rows[:, 0] = X

    def before(batch: Array) -> Array:
        picky(batch[:, 0])
        batch[:, 0] /= 1000
        return batch

    how: dict[str, Any] = {"devices": "inline", "batch_size": 64, "postprocess": lambda batch: batch * 2}
    right = di.predict(net, rows / np.r_[[1000], [1] * 15].astype("float32"), **how)
    y = di.predict(net, rows, preprocess=before, on_error="skip", **how)
    expected = np.where(is_bad(X)[:, None], np.float32(np.nan), right)
    np.testing.assert_array_equal(y, expected)


def test_a_model_of_one_batch_size(where: dict[str, Any]) -> None:
    """A model that takes full micro-batches only gets its bad rows found too."""

    def picky_in_full(batch: Array) -> Array:
        if len(batch) not in (2, 32):  # 2: made-up rows, before anything starts
            raise ValueError(f"{len(batch)} rows")
        return picky(batch)

    y, report = di.predict(picky_in_full, X, on_error="skip", return_report=True, **where)
    assert_only_bad_rows_filled(y, report)


@pytest.mark.parametrize("squeezed", [np.squeeze, lambda batch: np.resize(batch, 32)])
def test_a_model_whose_output_for_few_rows_is_unusable(where: dict[str, Any], squeezed: Callable[[Array], Array]) -> None:
    """A model that returns another shape for few rows, which it never gets otherwise, is searched all the same."""

    def net(batch: Array) -> Array:
        return squeezed(picky(batch)) if len(batch) != 2 else picky(batch)  # 2: made-up rows

    y, report = di.predict(net, X, on_error="skip", return_report=True, **where)
    assert_only_bad_rows_filled(y, report)


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
def test_compiled_models_see_no_other_shape() -> None:
    """A model that recompiles itself for each shape runs full micro-batches only."""
    nets = [torch.jit.script(torch.nn.Linear(1, 1)), torch.compile(torch.nn.Linear(1, 1)), torch.nn.Linear(1, 1)]
    cpu = torch.device("cpu")
    assert [LoadedModel.from_model(torch.nn.Sequential(net), cpu).compiled for net in nets] == [True, True, False]
    seen: list[int] = []

    def net(batch: Array) -> Array:
        seen.append(len(batch))
        return picky(batch)

    run_config = ModelRunConfig(Ports.from_input(X), BatchConfig(32), Options(on_error="skip"))
    output = run_model(LoadedModel(net, cpu, takes_tensors=False, compiled=True), [X], 0, run_config)
    assert_only_bad_rows_filled(output.arrays[0])
    assert sorted(output.failed_rows) == list(np.flatnonzero(is_bad(X)))
    assert set(seen) == {32}


def test_bad_rows_are_named(where: dict[str, Any]) -> None:
    """By default a bad row ends the call, with the call that reproduces the error and the results so far."""
    with pytest.raises(ChunkError, match=r"failed: ValueError: cannot take \d+.* x\[\d+:\d+\], devices='inline'") as caught:
        di.predict(picky, X, **where)
    assert caught.value.partial is not None
    y, done = caught.value.partial
    np.testing.assert_array_equal(y[done], 2 * X[done])
    assert not done[is_bad(X)].any()


def test_nan_is_a_failure_on_request(where: dict[str, Any]) -> None:
    """NaN in the output is a failure with ``nan_is_failure``, and a value like any other without."""
    y, report = di.predict(return_nan, X, on_error="skip", nan_is_failure=True, return_report=True, **where)
    assert_only_bad_rows_filled(y, report)
    assert {failure.exception for failure in report.failures} == {"the output contains NaN"}
    assert_only_bad_rows_filled(di.predict(return_nan, X, **where))
    with pytest.raises(ChunkError, match=r"rows \d+:\d+ on cpu failed: ValueError: the output contains NaN"):
        di.predict(return_nan, X, nan_is_failure=True, retries=0, **where)


@pytest.mark.parametrize(("allowed", "n_allowed"), [(3, 3), (0, 0), ("0.3%", 3), ("0%", 0)])
def test_too_many_rows_fail(where: dict[str, Any], allowed: int | str, n_allowed: int) -> None:
    """More failed rows than allowed, as a number or a share, end the call; as many as allowed do not."""
    with pytest.raises(TooManyFailures, match=rf"\d rows failed; max_failed_rows={allowed!r} allows {n_allowed:,}\."):
        di.predict(picky, X, on_error="skip", max_failed_rows=allowed, **where)
    for enough in (4, "0.4%", None):
        assert_only_bad_rows_filled(di.predict(picky, X, on_error="skip", max_failed_rows=enough, **where))


def test_integers_need_a_fill_value(where: dict[str, Any]) -> None:
    """Integers have no NaN: a fill value is required before anything runs, and used."""
    with pytest.raises(OptionError, match=r"fill_value must fit the dtype int64 of output y, got NaN"):
        di.predict(lambda batch: picky(batch).astype(int), X, on_error="skip", **where)
    y = di.predict(lambda batch: picky(batch).astype(int), X, on_error="skip", fill_value=-1, **where)
    assert y.dtype == int
    assert_only_bad_rows_filled(y, fill=-1)


def test_every_output_is_filled(where: dict[str, Any]) -> None:
    """Several outputs, in a dict and of any shapes, are all filled at the bad rows."""
    found = di.predict(lambda b: {"a": picky(b), "b": np.stack([picky(b)] * 3, 1)}, X, on_error="skip", **where)
    assert_only_bad_rows_filled(found["a"])
    for column in found["b"].T:
        assert_only_bad_rows_filled(column)


def test_tensors_are_filled(where: dict[str, Any]) -> None:
    """Tensors in give tensors out, with NaN at the bad rows."""
    y = di.predict(picky, torch.from_numpy(X), on_error="skip", **where)
    assert isinstance(y, torch.Tensor)
    assert_only_bad_rows_filled(y.numpy())


def test_streams_are_filled(where: dict[str, Any]) -> None:
    """A stream has all rows in order, bad ones filled."""
    assert_only_bad_rows_filled(np.concatenate(list(di.stream(picky, X, on_error="skip", **where))))


def test_all_rows_are_bad(where: dict[str, Any]) -> None:
    """If all rows are bad, the whole output is filled, in the planned shape."""

    def hopeless(batch: Array) -> Array:
        raise ValueError("no")

    y, report = di.predict(hopeless, X, on_error="skip", output=np.empty((0, 2)), retries=0, return_report=True, **where)
    assert y.shape == (len(X), 2)
    assert np.isnan(y).all()
    assert (report.rows, len(report.failed_rows)) == (0, len(X))


def test_good_rows_have_the_same_bytes_with_bad_rows_beside_them(two_cpus: list[str]) -> None:
    """A model's outputs for good rows are the same to the bit, with bad rows beside them and without."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))

    def checks(batch: Array) -> Array:
        if is_bad(batch).any():
            raise ValueError("bad")
        return batch[:, None]

    how = {"devices": two_cpus, "device_weights": "even", "batch_size": 64}
    plain = di.predict(net, X[:, None], **how)
    y = di.predict(net, X, preprocess=checks, on_error="skip", **how)
    np.testing.assert_array_equal(y[~is_bad(X)], plain[~is_bad(X)])
    assert np.isnan(y[is_bad(X)]).all()


def test_fifty_rows_in_a_hundred_thousand(two_cpus: list[str]) -> None:
    """Exactly the 50 bad rows in 100,000 have no output, and all others are right."""
    x = np.arange(2.0, 100_002.0)
    bad = np.random.default_rng(0).choice(x, 50, replace=False)

    def model(batch: Array) -> Array:
        if np.isin(batch, bad).any():
            raise ArithmeticError("bad")
        return 2 * batch

    y, report = di.predict(model, x, devices=two_cpus, on_error="skip", return_report=True)
    np.testing.assert_array_equal(y, np.where(np.isin(x, bad), np.nan, 2 * x))
    assert report.failed_rows == tuple(np.flatnonzero(np.isin(x, bad)))


def test_a_row_is_retried_before_it_is_blamed(two_cpus: list[str], tmp_path: Path) -> None:
    """A row that fails on its own is tried again up to ``retries`` times."""
    # With 31 others, in 3 of the halves that were run, then once on its own.
    net = faulty.make_model(tmp_path, faulty.raise_error(faulty.make_bad_row_error), [500.0], times=5)
    y, report = di.predict(
        net, X, devices=two_cpus, batch_size=32, device_weights="even", on_error="skip", return_report=True
    )
    np.testing.assert_array_equal(y, 2 * X)
    assert report.failures == ()
