"""Which micro-batch pays on a device, and in which memory format: measured on real rows.

The ladder, first match wins, at each step; the exit is one DEBUG line:

1. Everything that there is to do, and that was done before, takes less than ``MIN_TUNING_SECONDS`` at the speed of the first
   step: the first size. So of many short runs one measures, for all that come. From ``MIN_FORMAT_CHECK_SECONDS`` seconds on, two
   micro-batches more tell about the other memory format.
2. Smaller sizes are faster, each by ``MIN_SPEEDUP`` than the one before: the last of them.
3. Memory would not hold the next larger size: the last size.
4. The next size is not faster by ``MIN_SPEEDUP``: the last size.
5. There is no larger one to try: the last size.

After the first step the other memory format is tried at the same size, where there is one; it is gone on in where it is
faster by ``MIN_SPEEDUP``. Smaller sizes come before larger ones: on CPUs, tensors that stay in the caches gain more (a CNN on both
of two cores: 0.84 s with 32 images, 1.0 s with 64 to 256); where they gain nothing, one step says so.

The rows are computed again in the run, so that all of its rows have one size: a few micro-batches, once per network and
kind of device (``pace`` remembers).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

logger = logging.getLogger(__name__)

MIN_TUNING_SECONDS = 2.0  # less gains less than measuring costs; arbitrary
MIN_FORMAT_CHECK_SECONDS = 0.3  # seconds, of which a look at the other memory format takes some hundredths; arbitrary
MIN_SPEEDUP = 1.05  # times as many rows/s; arbitrary, below it is noise
MIN_QUICK_SPEEDUP = 1.25  # times as many rows/s, by one micro-batch each; arbitrary, well above its noise
SUSTAINED_SECONDS = 0.5  # of micro-batches that tell what to expect; arbitrary, some turns of a busy scheduler
MIN_MEASURE_SECONDS = 0.02  # that a size is measured for at least; arbitrary, well above the clock and a context switch
MIN_ELAPSED_SECONDS = 1e-6  # the least that a micro-batch can have taken; arbitrary, keeps speeds finite

# Runs one micro-batch of so many rows; which size it was in the end, and in how many seconds.
BatchRunner = Callable[[int], tuple[int, float]]


class BatchSizeChoice(NamedTuple):
    """What pays: rows of a micro-batch, rows/s with it, and whether images lie in channels_last.

    ``channels_last`` is None where that was not tried; ``is_short_run``: there is too little to do for more than the first step.
    """

    batch_size: int
    speed: float
    channels_last: bool | None = False
    is_short_run: bool = False


def tune_batch_size(
    run_batch: BatchRunner,
    candidates: Sequence[int],
    n_rows: int,
    run_channels_last: BatchRunner | None = None,
    *,
    initial: int | None = None,
) -> BatchSizeChoice:
    """Climb the ladder.

    Parameters
    ----------
    run
        Runs one micro-batch of so many rows; where memory does not hold it, a smaller one.
    tried
        Micro-batches in rows, ascending.
    n_rows
        Rows that the device is going to get, and those that it had of the same network before.
    channels_last
        As ``run``, in this memory format; no rows where it does not do. None: it is not to be tried.
    first
        The one of ``tried`` that is used where nothing else pays. None: the smallest.

    Examples
    --------
    >>> tune_batch_size(lambda size: (size, max(size, 300)), [100, 200, 400, 800], 1_000_000)
    Best(size=400, speed=1.0, channels_last=False, is_short_run=False)
    """
    initial = candidates[0] if initial is None else initial
    last = BatchSizeChoice(initial, _measure_speed(run_batch, initial) or 1.0)
    seconds = n_rows / last.speed
    if seconds < MIN_TUNING_SECONDS:
        logger.debug("rule 1: %d rows at %.0f rows/s are not worth more", n_rows, last.speed)
        return last._replace(
            is_short_run=True, channels_last=_check_channels_last(run_batch, run_channels_last, last.batch_size, seconds)
        )
    if run_channels_last is not None:
        run_batch, last = _choose_memory_format(run_batch, run_channels_last, last)
    smaller = _try_smaller_sizes(run_batch, [size for size in reversed(candidates) if size < initial], last)
    return smaller or _try_larger_sizes(run_batch, [size for size in candidates if size > initial], last)


def _try_smaller_sizes(run_batch: BatchRunner, sizes: Sequence[int], first: BatchSizeChoice) -> BatchSizeChoice | None:
    """The last of these sizes that pays, if any does."""
    last = first
    for size in sizes:
        faster = _measure_speed(run_batch, size)
        if faster is None or faster < MIN_SPEEDUP * last.speed:
            break
        last = last._replace(batch_size=size, speed=faster)
    if last is first:
        return None
    logger.debug("rule 2: smaller ones pay, it is %d rows", last.batch_size)
    return last


def _try_larger_sizes(run_batch: BatchRunner, sizes: Sequence[int], last: BatchSizeChoice) -> BatchSizeChoice:
    for size in sizes:
        faster = _measure_speed(run_batch, size)
        if faster is None:
            logger.debug("rule 3: memory does not hold %d rows, it is %d", size, last.batch_size)
            return last
        if faster < MIN_SPEEDUP * last.speed:
            logger.debug("rule 4: %d rows do not pay, it is %d", size, last.batch_size)
            return last
        last = last._replace(batch_size=size, speed=faster)
    logger.debug("rule 5: it is %d rows, the largest to try", last.batch_size)
    return last


def _check_channels_last(
    run_batch: BatchRunner, run_channels_last: BatchRunner | None, batch_size: int, seconds: float
) -> bool | None:
    if run_channels_last is None:
        return False
    return is_channels_last_faster(run_batch, run_channels_last, batch_size) if seconds >= MIN_FORMAT_CHECK_SECONDS else None


def _choose_memory_format(
    run_batch: BatchRunner, run_channels_last: BatchRunner, last: BatchSizeChoice
) -> tuple[BatchRunner, BatchSizeChoice]:
    """The memory format to go on in, and how fast it is."""
    speed = _measure_speed(run_channels_last, last.batch_size)
    logger.debug("channels_last: %s rows/s, contiguous: %.0f", f"{speed:.0f}" if speed else "no", last.speed)
    if speed is None or speed < MIN_SPEEDUP * last.speed:
        return run_batch, last
    return run_channels_last, BatchSizeChoice(last.batch_size, speed, channels_last=True)


def is_channels_last_faster(run_batch: BatchRunner, run_channels_last: BatchRunner, batch_size: int) -> bool:
    """Whether that memory format is faster by a micro-batch or two, for rows that are not worth the ladder.

    Examples
    --------
    >>> is_channels_last_faster(lambda size: (size, 1.0), lambda size: (size, 0.5), 64)
    True
    """
    (_, seconds), (held, _) = run_batch(batch_size), run_channels_last(batch_size)
    if held == batch_size:  # its first run, which finds its kernels, does not count
        held, others = run_channels_last(batch_size)
        logger.debug("channels_last: %.2g s for %d rows, contiguous: %.2g s", others, batch_size, seconds)
    return held == batch_size and MIN_QUICK_SPEEDUP * others <= seconds


def sustained_throughput(run_batch: BatchRunner, batch_size: int) -> float:
    """Rows/s over ``SUSTAINED_SECONDS`` of micro-batches: what to expect, where :func:`tune_batch_size` compares.

    All of the time counts but the first micro-batch's: what a busy machine takes away, it takes from the run as well.

    Examples
    --------
    >>> def run(size: int) -> tuple[int, float]:
    ...     time.sleep(0.1)
    ...     return size, 0.1
    >>> 30 < sustained_throughput(run, 10) <= 100
    True
    """
    run_batch(batch_size)
    n_done, began, seconds = 0, time.perf_counter(), 0.0
    while seconds < SUSTAINED_SECONDS:
        n_done += run_batch(batch_size)[0]
        seconds = max(MIN_ELAPSED_SECONDS, time.perf_counter() - began)
    return n_done / seconds


def _measure_speed(run_batch: BatchRunner, batch_size: int) -> float | None:
    """Rows/s of the fastest of some micro-batches; the first, which finds its memory and its kernels, does not count."""
    held, _ = run_batch(batch_size)
    if held < batch_size:
        return None
    seconds, began = [run_batch(batch_size)[1]], time.perf_counter()
    while time.perf_counter() - began < MIN_MEASURE_SECONDS:
        seconds.append(run_batch(batch_size)[1])
    return batch_size / max(MIN_ELAPSED_SECONDS, min(seconds))
