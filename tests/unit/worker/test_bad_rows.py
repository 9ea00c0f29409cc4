"""Rows at fault: found by halving, filled, listed, and all others as if they were not there."""

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
from daskinfer.core.pytree import Ports
from daskinfer.errors import ChunkError, OptionError, TooManyFailures
from daskinfer.options import Options
from daskinfer.worker import bad_rows
from daskinfer.worker.loaded import LoadedModel
from daskinfer.worker.model_runner import ModelRunConfig, run_model
from tests.support import faulty
from tests.support.faulty import Array

X = np.arange(2, 1002, dtype=np.float32)  # a network is tried on made-up rows of 0 and 1
BAD = (7.0, 8.0, 500.0, 1001.0)


def at_fault(values: Array) -> Array:
    """Which of these rows the networks here cannot take."""
    return np.isin(values, BAD)


def picky(batch: Array) -> Array:
    """Double rows, or raise for those that it cannot take."""
    if at_fault(batch).any():
        raise ValueError(f"cannot take {batch[at_fault(batch)][0]:g}")
    return 2 * batch


def with_holes(batch: Array) -> Array:
    """Double rows, and answer NaN for those that it cannot take."""
    return np.where(at_fault(batch), np.float32(np.nan), 2 * batch)


def tries(bad: set[int], calls: list[set[int]]) -> Callable[..., None]:
    """An attempt, or a probe, that raises where one of these rows is in it; ``calls`` gets what it was given."""

    def attempt(begin: int, end: int, without: Collection[int] = ()) -> None:
        rows = set(range(begin, end)).difference(without)
        calls.append(rows)
        if found := sorted(bad & rows):
            raise ValueError(str(found[0]))

    return attempt


def never(error: Exception) -> bool:
    """No exception is anything but the rows' fault."""
    return False


@given(n_rows=st.integers(1, 70), bad=st.sets(st.integers(0, 69)), n_tries=st.integers(0, 2))
def test_halving_finds_all_and_no_other(n_rows: int, bad: set[int], n_tries: int) -> None:
    """Whatever rows are at fault, they are found, and all others are computed together, once."""
    bad = {row for row in bad if row < n_rows} or {n_rows - 1}
    calls, probed = list[set[int]](), list[set[int]]()
    found = bad_rows.isolate_bad_rows(tries(bad, calls), tries(bad, probed), 0, n_rows, ValueError("all"), n_tries, never)
    assert sorted(found) == sorted(bad)
    assert all(why == f"ValueError: {row}" for row, why in found.items()) or (n_rows, n_tries) == (1, 0)
    well = [rows for rows in calls if not bad & rows]
    assert well == ([set(range(n_rows)) - bad] if len(bad) < n_rows else [])
    assert len(calls) - len(well) == (n_tries if n_rows == 1 else len(bad))
    assert sum(map(len, probed)) <= min(2 * len(bad), n_rows.bit_length()) * n_rows + len(bad) * n_tries


@given(n_rows=st.integers(1, 70), bad=st.sets(st.integers(0, 69)), n_tries=st.integers(0, 2))
def test_rows_that_cannot_be_probed(n_rows: int, bad: set[int], n_tries: int) -> None:
    """Where every probe fails, as with a network that takes one batch size only, the same rows are found."""
    bad = {row for row in bad if row < n_rows} or {n_rows - 1}
    calls: list[set[int]] = []
    found = bad_rows.isolate_bad_rows(
        tries(bad, calls), tries(set(range(n_rows)), []), 0, n_rows, ValueError("all"), n_tries, never
    )
    assert sorted(found) == sorted(bad)
    well = [rows for rows in calls if not bad & rows]
    assert set().union(*well) == set(range(n_rows)) - bad


def test_rows_that_fail_together_have_answers() -> None:
    """Rows of which none fails alone are computed in halves, however large."""
    computed: set[int] = set()

    def attempt(begin: int, end: int, without: Collection[int] = ()) -> None:
        if end - begin > 3:
            raise ValueError("too many")
        computed.update(set(range(begin, end)).difference(without))

    assert bad_rows.isolate_bad_rows(attempt, attempt, 0, 20, ValueError("too many"), 1, never) == {}
    assert computed == set(range(20))


def test_a_row_that_fails_once_has_an_answer() -> None:
    """A row alone is tried again before it is given up."""
    left = [1]

    def attempt(begin: int, end: int, without: Collection[int] = ()) -> None:
        if begin <= 2 < end and left and left.pop():
            raise ValueError("once")

    assert bad_rows.isolate_bad_rows(attempt, attempt, 2, 3, ValueError("before"), 1, never) == {2: "ValueError: once"}
    assert bad_rows.isolate_bad_rows(attempt, attempt, 2, 3, ValueError("before"), 1, never) == {}
    assert bad_rows.isolate_bad_rows(attempt, attempt, 0, 8, ValueError("before"), 1, never) == {}


@given(n_rows=st.integers(1, 70), bad=st.sets(st.integers(0, 69), min_size=1))
def test_the_first_at_fault(n_rows: int, bad: set[int]) -> None:
    """The first row that fails alone is found."""
    bad = {row for row in bad if row < n_rows} or {0}
    assert bad_rows.find_first_failing_range(tries(bad, []), 0, n_rows, never) == (min(bad), min(bad) + 1)


def test_rows_that_fail_only_together() -> None:
    """Where no half fails, all of them are at fault."""

    def attempt(begin: int, end: int) -> None:
        if end - begin > 3:
            raise ValueError("too many")

    assert bad_rows.find_first_failing_range(attempt, 0, 6, never) == (0, 6)


def skipped(attempt: Callable[..., None], begin: int, end: int, fatal: bad_rows.IsFatal) -> dict[int, str]:
    """The rows at fault."""
    return bad_rows.isolate_bad_rows(attempt, attempt, begin, end, ValueError(), 2, fatal)


@pytest.mark.parametrize("find", [bad_rows.find_first_failing_range, skipped])
def test_what_is_nobodys_fault_is_raised_on(find: Callable[..., object]) -> None:
    """An exception that says nothing of the rows ends the search."""
    with pytest.raises(ValueError, match=r"^5$"):
        find(tries({5}, []), 0, 8, lambda error: True)


def test_rows_with_nan() -> None:
    """A row with a NaN in any output counts, whatever its shape; integers have none."""
    a, b = np.zeros((5, 2, 3)), np.zeros(5, complex)
    a[1, 1, 2], b[3] = np.nan, complex(0, np.nan)
    assert bad_rows.find_nan_rows([a, np.zeros(5, int), b]) == [1, 3]
    assert bad_rows.find_nan_rows([np.zeros(5, int)]) == bad_rows.find_nan_rows([np.zeros((5, 0))]) == []


# Through predict, stream and run


@pytest.fixture(params=["inline", "workers", "auto"])
def where(request: pytest.FixtureRequest, two_cpus: list[str]) -> dict[str, Any]:
    """Keywords that say where to compute: in this process, on workers, and on workers by their speed."""
    if request.param == "inline":
        return {"devices": "inline", "batch_size": 32}
    weights = {"workers": "even", "auto": "auto"}[request.param]
    return {"devices": two_cpus, "device_weights": weights, "batch_size": 32}


def right_but_for_the_bad(y: Array, report: di.RunReport | None = None, fill: float = np.nan) -> None:
    """See that exactly the bad rows are filled, and listed."""
    np.testing.assert_array_equal(y, np.where(at_fault(X), fill, 2 * X))
    if report is not None:
        assert report.failed_rows == tuple(np.flatnonzero(at_fault(X)))
        assert report.rows == len(X) - len(BAD)


def test_bad_rows_are_skipped(where: dict[str, Any]) -> None:
    """Exactly the rows at fault have no answer, and the report says which, where and why."""
    y, report = di.predict(picky, X, on_error="skip", return_report=True, **where)
    right_but_for_the_bad(y, report)
    assert {f.exception for f in report.failures} == {f"ValueError: cannot take {value:g}" for value in BAD}
    assert {f.device for f in report.failures} <= {d.device for d in report.devices}


def test_the_search_runs_few_rows() -> None:
    """What is run beside the micro-batches themselves is some micro-batches per row at fault, however large these are."""
    ran: list[int] = []

    def counted(batch: Array) -> Array:
        ran.append(len(batch))
        return picky(batch)

    y = di.predict(counted, X, on_error="skip", devices="inline", batch_size=256)
    right_but_for_the_bad(y)
    # Four micro-batches; two rows at fault in the first, one in the second and the fourth. Per row: once alone in its
    # micro-batch, and twice its micro-batch in probes; then all others of the micro-batch.
    assert ran.count(256) <= 4 + len(BAD) + 3 + len(BAD)
    assert sum(n for n in ran if n != 256) <= 2 * len(BAD) * 257


@pytest.mark.parametrize("bad", [BAD, (*X[:40],)])
def test_the_bytes_of_good_rows_stay(bad: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows beside those at fault have the bytes that they have without them, also after functions before and after."""
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
    expected = np.where(at_fault(X)[:, None], np.float32(np.nan), right)
    np.testing.assert_array_equal(y, expected)


def test_a_network_of_one_batch_size(where: dict[str, Any]) -> None:
    """One that takes full micro-batches only is asked for nothing else."""

    def picky_in_full(batch: Array) -> Array:
        if len(batch) not in (2, 32):  # 2: made-up rows, before anything starts
            raise ValueError(f"{len(batch)} rows")
        return picky(batch)

    y, report = di.predict(picky_in_full, X, on_error="skip", return_report=True, **where)
    right_but_for_the_bad(y, report)


@pytest.mark.parametrize("squeezed", [np.squeeze, lambda batch: np.resize(batch, 32)])
def test_a_network_whose_answer_to_few_rows_is_none(where: dict[str, Any], squeezed: Callable[[Array], Array]) -> None:
    """One that answers with another shape to a single row, which it is never asked otherwise, is searched all the same."""

    def net(batch: Array) -> Array:
        return squeezed(picky(batch)) if len(batch) != 2 else picky(batch)  # 2: made-up rows

    y, report = di.predict(net, X, on_error="skip", return_report=True, **where)
    right_but_for_the_bad(y, report)


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
def test_compiled_networks_see_no_other_shape() -> None:
    """A network that makes itself anew for each shape runs full micro-batches only."""
    nets = [torch.jit.script(torch.nn.Linear(1, 1)), torch.compile(torch.nn.Linear(1, 1)), torch.nn.Linear(1, 1)]
    cpu = torch.device("cpu")
    assert [LoadedModel.from_model(torch.nn.Sequential(net), cpu).compiled for net in nets] == [True, True, False]
    seen: list[int] = []

    def net(batch: Array) -> Array:
        seen.append(len(batch))
        return picky(batch)

    job = ModelRunConfig(Ports.from_input(X), 32, Options(on_error="skip"))
    answer = run_model(LoadedModel(net, cpu, takes_tensors=False, compiled=True), [X], 0, job)
    right_but_for_the_bad(answer.arrays[0])
    assert sorted(answer.failed_rows) == list(np.flatnonzero(at_fault(X)))
    assert set(seen) == {32}


def test_bad_rows_are_named(where: dict[str, Any]) -> None:
    """By default the call ends at a row at fault, with the call that shows what is wrong and what was done until then."""
    with pytest.raises(ChunkError, match=r"failed: ValueError: cannot take \d+.* x\[\d+:\d+\], devices='inline'") as caught:
        di.predict(picky, X, **where)
    assert caught.value.partial is not None
    y, done = caught.value.partial
    np.testing.assert_array_equal(y[done], 2 * X[done])
    assert not done[at_fault(X)].any()


def test_nan_counts_where_it_is_asked_for(where: dict[str, Any]) -> None:
    """A NaN in the answer is a failure, or as good as any number."""
    y, report = di.predict(with_holes, X, on_error="skip", nan_is_failure=True, return_report=True, **where)
    right_but_for_the_bad(y, report)
    assert {failure.exception for failure in report.failures} == {"the answer holds a NaN"}
    right_but_for_the_bad(di.predict(with_holes, X, **where))
    with pytest.raises(ChunkError, match=r"rows \d+:\d+ on cpu failed: ValueError: the answer holds a NaN"):
        di.predict(with_holes, X, nan_is_failure=True, retries=0, **where)


@pytest.mark.parametrize(("allowed", "n_allowed"), [(3, 3), (0, 0), ("0.3%", 3), ("0%", 0)])
def test_too_many_rows_fail(where: dict[str, Any], allowed: int | str, n_allowed: int) -> None:
    """More than are allowed, as a number or a share, end the call; as many as are allowed do not."""
    with pytest.raises(TooManyFailures, match=rf"\d rows failed; max_failed_rows={allowed!r} allows {n_allowed:,}\."):
        di.predict(picky, X, on_error="skip", max_failed_rows=allowed, **where)
    for enough in (4, "0.4%", None):
        right_but_for_the_bad(di.predict(picky, X, on_error="skip", max_failed_rows=enough, **where))


def test_integers_need_a_fill_value(where: dict[str, Any]) -> None:
    """An output of integers has no NaN: a fill value is asked for before anything runs, and used."""
    with pytest.raises(OptionError, match=r"the output y is int64, which cannot hold NaN where rows fail"):
        di.predict(lambda batch: picky(batch).astype(int), X, on_error="skip", **where)
    y = di.predict(lambda batch: picky(batch).astype(int), X, on_error="skip", fill_value=-1, **where)
    assert y.dtype == int
    right_but_for_the_bad(y, fill=-1)


def test_every_output_is_filled(where: dict[str, Any]) -> None:
    """Several outputs, in a dict of any shapes, are all filled at the rows at fault."""
    found = di.predict(lambda b: {"a": picky(b), "b": np.stack([picky(b)] * 3, 1)}, X, on_error="skip", **where)
    right_but_for_the_bad(found["a"])
    for column in found["b"].T:
        right_but_for_the_bad(column)


def test_tensors_are_filled(where: dict[str, Any]) -> None:
    """Tensors in are tensors out, NaN where rows are at fault."""
    y = di.predict(picky, torch.from_numpy(X), on_error="skip", **where)
    assert isinstance(y, torch.Tensor)
    right_but_for_the_bad(y.numpy())


def test_streams_are_filled(where: dict[str, Any]) -> None:
    """A stream has all rows in order, those at fault filled."""
    right_but_for_the_bad(np.concatenate(list(di.stream(picky, X, on_error="skip", **where))))


def test_not_one_row_has_an_answer(where: dict[str, Any]) -> None:
    """Where all rows are at fault, the answer is all filled, in the shape that was planned."""

    def hopeless(batch: Array) -> Array:
        raise ValueError("no")

    y, report = di.predict(hopeless, X, on_error="skip", output=np.empty((0, 2)), retries=0, return_report=True, **where)
    assert y.shape == (len(X), 2)
    assert np.isnan(y).all()
    assert (report.rows, len(report.failed_rows)) == (0, len(X))


def test_good_rows_have_the_bytes_they_would_have(two_cpus: list[str]) -> None:
    """A network's answers to good rows are the same to the bit with bad rows beside them and without."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))

    def checks(batch: Array) -> Array:
        if at_fault(batch).any():
            raise ValueError("bad")
        return batch[:, None]

    how = {"devices": two_cpus, "device_weights": "even", "batch_size": 64}
    plain = di.predict(net, X[:, None], **how)
    y = di.predict(net, X, preprocess=checks, on_error="skip", **how)
    np.testing.assert_array_equal(y[~at_fault(X)], plain[~at_fault(X)])
    assert np.isnan(y[at_fault(X)]).all()


def test_fifty_rows_in_a_hundred_thousand(two_cpus: list[str]) -> None:
    """50 bad rows in 100,000 are exactly the ones without an answer, all others are right."""
    x = np.arange(2.0, 100_002.0)
    bad = np.random.default_rng(0).choice(x, 50, replace=False)

    def model(batch: Array) -> Array:
        if np.isin(batch, bad).any():
            raise ArithmeticError("bad")
        return 2 * batch

    y, report = di.predict(model, x, devices=two_cpus, on_error="skip", return_report=True)
    np.testing.assert_array_equal(y, np.where(np.isin(x, bad), np.nan, 2 * x))
    assert report.failed_rows == tuple(np.flatnonzero(np.isin(x, bad)))


def test_a_network_is_tried_again_before_a_row_is_blamed(two_cpus: list[str], tmp_path: Path) -> None:
    """A row that fails alone is tried again as often as ``retries`` says."""
    # With 31 others, in 3 of the halves that were run, then once alone.
    net = faulty.network(tmp_path, faulty.raises(faulty.bad), [500.0], times=5)
    y, report = di.predict(
        net, X, devices=two_cpus, batch_size=32, device_weights="even", on_error="skip", return_report=True
    )
    np.testing.assert_array_equal(y, 2 * X)
    assert report.failures == ()
