"""Devices here are scripts: rows in, seconds out, and the most rows that their memory holds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from daskinfer.scheduling import autotune
from daskinfer.scheduling.autotune import (
    MIN_ELAPSED_SECONDS,
    MIN_QUICK_SPEEDUP,
    MIN_SPEEDUP,
    MIN_TUNING_SECONDS,
    is_channels_last_faster,
    sustained_throughput,
    tune_batch_size,
)

MUCH = 10**9  # rows
SIZES = [100, 200, 400, 800]


class Device:
    """A device that takes ``seconds(size)`` for a micro-batch and holds ``max_rows``; what it was asked to run."""

    def __init__(self, seconds: Callable[[int], float], max_rows: int = MUCH) -> None:
        self.seconds, self.max_rows = seconds, max_rows
        self.asked: list[int] = []

    def __call__(self, size: int) -> tuple[int, float]:
        self.asked.append(size)
        held = min(size, self.max_rows)
        return held, self.seconds(held)


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure every size once, after the run that does not count."""
    monkeypatch.setattr(autotune, "MIN_MEASURE_SECONDS", 0.0)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The DEBUG lines so far."""
    caplog.set_level(logging.DEBUG, "daskinfer.scheduling.autotune")
    return lambda: [record.message for record in caplog.records]


def test_a_short_run_takes_the_first(said: Callable[[], list[str]]) -> None:
    """Rule 1: rows that are done in no time at the first size are not worth another one."""
    device = Device(lambda size: 1.0)
    assert tune_batch_size(device, SIZES, 199) == (100, 100.0, False, True)
    assert said() == ["rule 1: 199 rows at 100 rows/s are not worth more"]
    assert device.asked == [100, 100]


def test_a_run_that_is_just_worth_it(said: Callable[[], list[str]]) -> None:
    """From ``MIN_TUNING_SECONDS`` on, larger sizes are tried."""
    tune_batch_size(device := Device(lambda size: 1.0), SIZES, int(100 * MIN_TUNING_SECONDS))
    assert device.asked[:4] == [100, 100, 200, 200]


@pytest.mark.parametrize(("of_100", "size"), [(0.5, 200), (0.4, 100)])
def test_smaller_sizes_that_pay(said: Callable[[], list[str]], of_100: float, size: int) -> None:
    """Rule 2: where the next smaller one is faster, it is the last faster one in a row; no larger one is tried."""
    device = Device({400: 4.0, 200: 1.0, 100: of_100}.__getitem__)
    assert tune_batch_size(device, SIZES, MUCH, initial=400).batch_size == size
    assert said() == [f"rule 2: smaller ones pay, it is {size} rows"]


def test_smaller_sizes_that_do_not_pay(said: Callable[[], list[str]]) -> None:
    """One look at the next smaller size, then the larger ones."""
    device = Device(lambda size: max(1.0, size / 400))
    assert tune_batch_size(device, SIZES, MUCH, initial=200) == (400, 400.0, False, False)
    assert device.asked == [200, 200, 100, 100, 400, 400, 800, 800]
    assert said() == ["rule 4: 800 rows do not pay, it is 400"]


def test_memory_that_holds_a_smaller_one_only(said: Callable[[], list[str]]) -> None:
    """Where memory does not hold the first size, the smaller one that it does hold is taken."""
    assert tune_batch_size(Device(lambda size: 0.1, max_rows=100), SIZES, MUCH, initial=200).batch_size == 100
    assert said() == ["rule 2: smaller ones pay, it is 100 rows"]


def test_memory_that_is_short(said: Callable[[], list[str]]) -> None:
    """Rule 3: where memory made a smaller micro-batch of it, the last size that it held is taken."""
    device = Device(lambda size: 1.0, max_rows=200)
    assert tune_batch_size(device, SIZES, MUCH) == (200, 200.0, False, False)
    assert said() == ["rule 3: memory does not hold 400 rows, it is 200"]
    assert device.asked == [100, 100, 200, 200, 400]


def test_memory_that_does_not_hold_the_first(said: Callable[[], list[str]]) -> None:
    """Where memory does not even hold the first size, it stays, and the runner goes on making it smaller."""
    assert tune_batch_size(Device(lambda size: 1.0, max_rows=50), SIZES, MUCH)[0] == 100
    assert said() == ["rule 3: memory does not hold 200 rows, it is 100"]


def test_a_size_that_does_not_pay(said: Callable[[], list[str]]) -> None:
    """Rule 4: the first size that is not faster by ``MIN_SPEEDUP`` ends it, and the last one is taken."""
    device = Device(lambda size: max(1.0, size / 200))
    assert tune_batch_size(device, SIZES, MUCH) == (200, 200.0, False, False)
    assert said() == ["rule 4: 400 rows do not pay, it is 200"]
    assert device.asked[-1] == 400


@pytest.mark.parametrize(("gain", "size"), [(MIN_SPEEDUP * 1.001, 200), (MIN_SPEEDUP * 0.999, 100), (0.5, 100)])
def test_what_pays(gain: float, size: int) -> None:
    """A size is taken where it is faster by ``MIN_SPEEDUP`` at least."""
    assert tune_batch_size(Device(lambda rows: 1.0 if rows == 100 else 2.0 / gain), [100, 200], MUCH).batch_size == size


def test_the_largest_that_there_is(said: Callable[[], list[str]]) -> None:
    """Rule 5: where every size pays, it is the largest."""
    assert tune_batch_size(Device(lambda size: 1.0), SIZES, MUCH) == (800, 800.0, False, False)
    assert said() == ["rule 5: it is 800 rows, the largest to try"]


def test_one_size(said: Callable[[], list[str]]) -> None:
    """A single size is taken, and measured all the same."""
    assert tune_batch_size(Device(lambda size: 1.0), [100], MUCH) == (100, 100.0, False, False)
    assert said() == ["rule 5: it is 100 rows, the largest to try"]


def test_the_first_run_does_not_count() -> None:
    """What a size takes at its first run, which finds its memory and its kernels, is not its speed."""
    seen: set[int] = set()

    def slow_at_first(size: int) -> tuple[int, float]:
        seconds = 1.0 if size in seen else 100.0
        seen.add(size)
        return size, seconds

    assert tune_batch_size(slow_at_first, SIZES, MUCH) == (800, 800.0, False, False)


def test_the_fastest_of_some_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size is run until it was measured long enough, and one run that was disturbed does not make it slow."""
    ticks, seconds = iter(range(100)), iter([9.0, 5.0, 1.0, 7.0] * 2)
    monkeypatch.setattr(autotune, "MIN_MEASURE_SECONDS", 3.0)
    monkeypatch.setattr(autotune, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    assert tune_batch_size(lambda size: (size, next(seconds)), [100, 200], MUCH) == (200, 200.0, False, False)
    assert next(seconds, None) is None


def test_a_run_that_took_no_time() -> None:
    """A clock that is too coarse makes a device very fast, not infinitely."""
    assert tune_batch_size(Device(lambda size: 0.0), [100], MUCH) == (100, 100 / MIN_ELAPSED_SECONDS, False, False)


def test_the_faster_memory_format_is_climbed_in(said: Callable[[], list[str]]) -> None:
    """Tried once, at the first size; the larger sizes are run in the one that won."""
    contiguous, channels_last = Device(lambda size: 1.0), Device(lambda size: 0.5)
    assert tune_batch_size(contiguous, SIZES[:2], MUCH, channels_last) == (200, 400.0, True, False)
    assert (contiguous.asked, channels_last.asked) == ([100, 100], [100, 100, 200, 200])
    assert said()[0] == "channels_last: 200 rows/s, contiguous: 100"


@pytest.mark.parametrize("slower", [1.0, 1 / (MIN_SPEEDUP * 0.999), 2.0])
def test_a_memory_format_that_does_not_pay(slower: float) -> None:
    """As fast, or slower, it is left alone."""
    contiguous, channels_last = Device(lambda size: 1.0), Device(lambda size: slower)
    assert tune_batch_size(contiguous, SIZES[:2], MUCH, channels_last) == (200, 200.0, False, False)
    assert channels_last.asked == [100, 100]


def test_a_memory_format_that_does_not_do() -> None:
    """Where no row comes of it, the network is run in torch's own, however fast that was."""
    assert tune_batch_size(Device(lambda size: 1.0), [100], MUCH, Device(lambda size: 0.1, max_rows=0)) == (
        100,
        100.0,
        False,
        False,
    )


def test_few_rows_are_not_worth_another_memory_format() -> None:
    """Rule 1 comes first: no look at all, or a short one."""
    channels_last = Device(lambda size: 0.1)
    assert tune_batch_size(Device(lambda size: 1.0), SIZES, 29, channels_last) == (100, 100.0, None, True)
    assert not channels_last.asked
    assert tune_batch_size(Device(lambda size: 1.0), SIZES, 199, channels_last) == (100, 100.0, True, True)
    assert channels_last.asked == [100, 100]


@pytest.mark.parametrize(("faster", "pays"), [(MIN_QUICK_SPEEDUP * 1.001, True), (MIN_QUICK_SPEEDUP * 0.999, False)])
def test_what_pays_at_once(faster: float, pays: bool) -> None:
    """One micro-batch each has to show more than its noise; one that does not do is run once."""
    assert is_channels_last_faster(Device(lambda size: 1.0), Device(lambda size: 1.0 / faster), 100) is pays
    assert not is_channels_last_faster(Device(lambda size: 1.0), fails := Device(lambda size: 0.1, max_rows=0), 100)
    assert fails.asked == [100]


def test_the_usual_speed_counts_all_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to expect is no best case: micro-batches that were held up count like the others, the first one does not."""
    took = iter([5.0, 1.0, 3.0, 1.0, 3.0])  # by the clock; the device itself says 1.0 of each
    now = 0.0

    def held_up(size: int) -> tuple[int, float]:
        nonlocal now
        now += next(took)
        return size, 1.0

    monkeypatch.setattr(autotune, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(autotune, "SUSTAINED_SECONDS", 8.0)
    assert sustained_throughput(held_up, 100) == 50.0
