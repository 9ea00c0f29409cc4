"""Tuning of scripted devices: each says how long a micro-batch takes and how many rows its memory holds."""

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
    """A device that takes ``seconds(size)`` for a micro-batch, holds ``max_rows``, and records the sizes that it ran."""

    def __init__(self, seconds: Callable[[int], float], max_rows: int = MUCH) -> None:
        self.seconds, self.max_rows = seconds, max_rows
        self.sizes: list[int] = []

    def __call__(self, size: int) -> tuple[int, float]:
        self.sizes.append(size)
        held = min(size, self.max_rows)
        return held, self.seconds(held)


@pytest.fixture(autouse=True)
def _measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure every size once, after the run that does not count."""
    monkeypatch.setattr(autotune, "MIN_MEASURE_SECONDS", 0.0)


@pytest.fixture
def log_lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The DEBUG lines so far."""
    caplog.set_level(logging.DEBUG, "daskinfer.scheduling.autotune")
    return lambda: [record.message for record in caplog.records]


def test_a_short_run_keeps_the_initial_size(log_lines: Callable[[], list[str]]) -> None:
    """Rule 1: if the rows take little time at the initial size, no other is measured."""
    device = Device(lambda size: 1.0)
    assert tune_batch_size(device, SIZES, 199) == (100, 100.0, False, True)
    assert log_lines() == ["rule 1: 199 rows at 100 rows/s are too few to tune"]
    assert device.sizes == [100, 100]


def test_a_run_that_is_just_long_enough(log_lines: Callable[[], list[str]]) -> None:
    """From ``MIN_TUNING_SECONDS`` on, larger sizes are measured."""
    tune_batch_size(device := Device(lambda size: 1.0), SIZES, int(100 * MIN_TUNING_SECONDS))
    assert device.sizes[:4] == [100, 100, 200, 200]


@pytest.mark.parametrize(("of_100", "size"), [(0.5, 200), (0.4, 100)])
def test_smaller_sizes_that_are_faster(log_lines: Callable[[], list[str]], of_100: float, size: int) -> None:
    """Rule 2: if the next smaller size is faster, the last faster one in a row is used; no larger one is measured."""
    device = Device({400: 4.0, 200: 1.0, 100: of_100}.__getitem__)
    assert tune_batch_size(device, SIZES, MUCH, initial=400).batch_size == size
    assert log_lines() == [f"rule 2: smaller batches are faster, batch_size={size}"]


def test_smaller_sizes_that_are_not_faster(log_lines: Callable[[], list[str]]) -> None:
    """The next smaller size is measured once, then the larger ones."""
    device = Device(lambda size: max(1.0, size / 400))
    assert tune_batch_size(device, SIZES, MUCH, initial=200) == (400, 400.0, False, False)
    assert device.sizes == [200, 200, 100, 100, 400, 400, 800, 800]
    assert log_lines() == ["rule 4: 800 rows are not faster, batch_size=400"]


def test_memory_that_holds_a_smaller_size_only(log_lines: Callable[[], list[str]]) -> None:
    """If memory does not hold the initial size, the smaller one that it holds is used."""
    assert tune_batch_size(Device(lambda size: 0.1, max_rows=100), SIZES, MUCH, initial=200).batch_size == 100
    assert log_lines() == ["rule 2: smaller batches are faster, batch_size=100"]


def test_a_larger_size_that_does_not_fit(log_lines: Callable[[], list[str]]) -> None:
    """Rule 3: if memory holds only a smaller micro-batch, the last size that fitted is used."""
    device = Device(lambda size: 1.0, max_rows=200)
    assert tune_batch_size(device, SIZES, MUCH) == (200, 200.0, False, False)
    assert log_lines() == ["rule 3: 400 rows do not fit in memory, batch_size=200"]
    assert device.sizes == [100, 100, 200, 200, 400]


def test_an_initial_size_that_does_not_fit(log_lines: Callable[[], list[str]]) -> None:
    """If memory does not even hold the initial size, it is kept, and the model runner reduces it as it goes."""
    assert tune_batch_size(Device(lambda size: 1.0, max_rows=50), SIZES, MUCH)[0] == 100
    assert log_lines() == ["rule 3: 200 rows do not fit in memory, batch_size=100"]


def test_a_larger_size_that_is_not_faster(log_lines: Callable[[], list[str]]) -> None:
    """Rule 4: the first size that is not faster by ``MIN_SPEEDUP`` ends the tuning, and the one before it is used."""
    device = Device(lambda size: max(1.0, size / 200))
    assert tune_batch_size(device, SIZES, MUCH) == (200, 200.0, False, False)
    assert log_lines() == ["rule 4: 400 rows are not faster, batch_size=200"]
    assert device.sizes[-1] == 400


@pytest.mark.parametrize(("gain", "size"), [(MIN_SPEEDUP * 1.001, 200), (MIN_SPEEDUP * 0.999, 100), (0.5, 100)])
def test_the_least_speedup(gain: float, size: int) -> None:
    """A size is used only if it is faster by at least ``MIN_SPEEDUP``."""
    assert tune_batch_size(Device(lambda rows: 1.0 if rows == 100 else 2.0 / gain), [100, 200], MUCH).batch_size == size


def test_the_largest_candidate(log_lines: Callable[[], list[str]]) -> None:
    """Rule 5: if every larger size is faster, the largest is used."""
    assert tune_batch_size(Device(lambda size: 1.0), SIZES, MUCH) == (800, 800.0, False, False)
    assert log_lines() == ["rule 5: no larger candidate, batch_size=800"]


def test_a_single_candidate(log_lines: Callable[[], list[str]]) -> None:
    """A single candidate is used, and measured all the same."""
    assert tune_batch_size(Device(lambda size: 1.0), [100], MUCH) == (100, 100.0, False, False)
    assert log_lines() == ["rule 5: no larger candidate, batch_size=100"]


def test_the_first_run_does_not_count() -> None:
    """The first run of a size, which allocates memory and selects kernels, does not count for its speed."""
    seen: set[int] = set()

    def slow_at_first(size: int) -> tuple[int, float]:
        seconds = 1.0 if size in seen else 100.0
        seen.add(size)
        return size, seconds

    assert tune_batch_size(slow_at_first, SIZES, MUCH) == (800, 800.0, False, False)


def test_the_fastest_run_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size is run for ``MIN_MEASURE_SECONDS``, and a run that was disturbed does not make it slow."""
    ticks, seconds = iter(range(100)), iter([9.0, 5.0, 1.0, 7.0] * 2)
    monkeypatch.setattr(autotune, "MIN_MEASURE_SECONDS", 3.0)
    monkeypatch.setattr(autotune, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    assert tune_batch_size(lambda size: (size, next(seconds)), [100, 200], MUCH) == (200, 200.0, False, False)
    assert next(seconds, None) is None


def test_a_run_that_took_no_time() -> None:
    """A clock that is too coarse makes a device very fast, but not infinitely fast."""
    assert tune_batch_size(Device(lambda size: 0.0), [100], MUCH) == (100, 100 / MIN_ELAPSED_SECONDS, False, False)


def test_tuning_continues_in_the_faster_memory_format(log_lines: Callable[[], list[str]]) -> None:
    """The formats are compared once, at the initial size; larger sizes run in the faster one."""
    contiguous, channels_last = Device(lambda size: 1.0), Device(lambda size: 0.5)
    assert tune_batch_size(contiguous, SIZES[:2], MUCH, channels_last) == (200, 400.0, True, False)
    assert (contiguous.sizes, channels_last.sizes) == ([100, 100], [100, 100, 200, 200])
    assert log_lines()[0] == "channels_last: 200 rows/s, contiguous: 100"


@pytest.mark.parametrize("slower", [1.0, 1 / (MIN_SPEEDUP * 0.999), 2.0])
def test_a_memory_format_that_is_not_faster(slower: float) -> None:
    """A format that is as fast, or slower, is not used."""
    contiguous, channels_last = Device(lambda size: 1.0), Device(lambda size: slower)
    assert tune_batch_size(contiguous, SIZES[:2], MUCH, channels_last) == (200, 200.0, False, False)
    assert channels_last.sizes == [100, 100]


def test_a_memory_format_that_the_model_cannot_use() -> None:
    """If it runs no rows, the model runs in the contiguous format, however fast the attempt was."""
    assert tune_batch_size(Device(lambda size: 1.0), [100], MUCH, Device(lambda size: 0.1, max_rows=0)) == (
        100,
        100.0,
        False,
        False,
    )


def test_few_rows_compare_memory_formats_briefly_or_not() -> None:
    """Rule 1 comes first: the other format is not measured, or for two micro-batches."""
    channels_last = Device(lambda size: 0.1)
    assert tune_batch_size(Device(lambda size: 1.0), SIZES, 29, channels_last) == (100, 100.0, None, True)
    assert not channels_last.sizes
    assert tune_batch_size(Device(lambda size: 1.0), SIZES, 199, channels_last) == (100, 100.0, True, True)
    assert channels_last.sizes == [100, 100]


@pytest.mark.parametrize(("speedup", "is_used"), [(MIN_QUICK_SPEEDUP * 1.001, True), (MIN_QUICK_SPEEDUP * 0.999, False)])
def test_a_quick_comparison_of_memory_formats(speedup: float, is_used: bool) -> None:
    """The speedup of a single micro-batch must exceed its noise; a format that the model cannot use runs once."""
    assert is_channels_last_faster(Device(lambda size: 1.0), Device(lambda size: 1.0 / speedup), 100) is is_used
    assert not is_channels_last_faster(Device(lambda size: 1.0), fails := Device(lambda size: 0.1, max_rows=0), 100)
    assert fails.sizes == [100]


def test_sustained_throughput_counts_all_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no best case: micro-batches that were delayed count like the others; only the first does not."""
    durations = iter([5.0, 1.0, 3.0, 1.0, 3.0])  # by the clock; the device itself reports 1.0 each
    now = 0.0

    def run_delayed(size: int) -> tuple[int, float]:
        nonlocal now
        now += next(durations)
        return size, 1.0

    monkeypatch.setattr(autotune, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(autotune, "SUSTAINED_SECONDS", 8.0)
    assert sustained_throughput(run_delayed, 100) == 50.0
