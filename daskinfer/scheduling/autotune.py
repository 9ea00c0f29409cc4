"""Which micro-batch pays on a device, and in which memory format: measured on real rows.

The ladder, first match wins, at each step; the exit is one DEBUG line:

1. Everything that there is to do, and that was done before, takes less than ``WORTH_SECONDS`` at the speed of the first
   step: the first size. So of many short runs one measures, for all that come. From ``WORTH_A_LOOK`` seconds on, two
   micro-batches more tell about the other memory format.
2. Smaller sizes are faster, each by ``PAYS`` than the one before: the last of them.
3. Memory would not hold the next larger size: the last size.
4. The next size is not faster by ``PAYS``: the last size.
5. There is no larger one to try: the last size.

After the first step the other memory format is tried at the same size, where there is one; it is gone on in where it is
faster by ``PAYS``. Smaller sizes come before larger ones: on CPUs, tensors that stay in the caches gain more (a CNN on both
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

WORTH_SECONDS = 2.0  # less gains less than measuring costs; arbitrary
WORTH_A_LOOK = 0.3  # seconds, of which a look at the other memory format takes some hundredths; arbitrary
PAYS = 1.05  # times as many rows/s; arbitrary, below it is noise
PAYS_AT_ONCE = 1.25  # times as many rows/s, by one micro-batch each; arbitrary, well above its noise
PROBE_SECONDS = 0.5  # of micro-batches that tell what to expect; arbitrary, some turns of a busy scheduler
STEP_SECONDS = 0.02  # that a size is measured for at least; arbitrary, well above the clock and a context switch
TIMER_SECONDS = 1e-6  # the least that a micro-batch can have taken; arbitrary, keeps speeds finite

# Runs one micro-batch of so many rows; which size it was in the end, and in how many seconds.
RunOne = Callable[[int], tuple[int, float]]


class Best(NamedTuple):
    """What pays: rows of a micro-batch, rows/s with it, and whether images lie in channels_last.

    ``channels_last`` is None where that was not tried; ``short``: there is too little to do for more than the first step.
    """

    size: int
    speed: float
    channels_last: bool | None = False
    short: bool = False


def best(
    run: RunOne, tried: Sequence[int], n_rows: int, channels_last: RunOne | None = None, *, first: int | None = None
) -> Best:
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
    >>> best(lambda size: (size, max(size, 300)), [100, 200, 400, 800], 1_000_000)
    Best(size=400, speed=1.0, channels_last=False, short=False)
    """
    first = tried[0] if first is None else first
    last = Best(first, _speed(run, first) or 1.0)
    seconds = n_rows / last.speed
    if seconds < WORTH_SECONDS:
        logger.debug("rule 1: %d rows at %.0f rows/s are not worth more", n_rows, last.speed)
        return last._replace(short=True, channels_last=_looks(run, channels_last, last.size, seconds))
    if channels_last is not None:
        run, last = _format(run, channels_last, last)
    smaller = _smaller(run, [size for size in reversed(tried) if size < first], last)
    return smaller or _larger(run, [size for size in tried if size > first], last)


def _smaller(run: RunOne, sizes: Sequence[int], first: Best) -> Best | None:
    """The last of these sizes that pays, if any does."""
    last = first
    for size in sizes:
        faster = _speed(run, size)
        if faster is None or faster < PAYS * last.speed:
            break
        last = last._replace(size=size, speed=faster)
    if last is first:
        return None
    logger.debug("rule 2: smaller ones pay, it is %d rows", last.size)
    return last


def _larger(run: RunOne, sizes: Sequence[int], last: Best) -> Best:
    for size in sizes:
        faster = _speed(run, size)
        if faster is None:
            logger.debug("rule 3: memory does not hold %d rows, it is %d", size, last.size)
            return last
        if faster < PAYS * last.speed:
            logger.debug("rule 4: %d rows do not pay, it is %d", size, last.size)
            return last
        last = last._replace(size=size, speed=faster)
    logger.debug("rule 5: it is %d rows, the largest to try", last.size)
    return last


def _looks(run: RunOne, channels_last: RunOne | None, size: int, seconds: float) -> bool | None:
    if channels_last is None:
        return False
    return pays_at_once(run, channels_last, size) if seconds >= WORTH_A_LOOK else None


def _format(run: RunOne, channels_last: RunOne, last: Best) -> tuple[RunOne, Best]:
    """The memory format to go on in, and how fast it is."""
    speed = _speed(channels_last, last.size)
    logger.debug("channels_last: %s rows/s, contiguous: %.0f", f"{speed:.0f}" if speed else "no", last.speed)
    if speed is None or speed < PAYS * last.speed:
        return run, last
    return channels_last, Best(last.size, speed, channels_last=True)


def pays_at_once(run: RunOne, channels_last: RunOne, size: int) -> bool:
    """Whether that memory format is faster by a micro-batch or two, for rows that are not worth the ladder.

    Examples
    --------
    >>> pays_at_once(lambda size: (size, 1.0), lambda size: (size, 0.5), 64)
    True
    """
    (_, seconds), (held, _) = run(size), channels_last(size)
    if held == size:  # its first run, which finds its kernels, does not count
        held, others = channels_last(size)
        logger.debug("channels_last: %.2g s for %d rows, contiguous: %.2g s", others, size, seconds)
    return held == size and PAYS_AT_ONCE * others <= seconds


def usual_speed(run: RunOne, size: int) -> float:
    """Rows/s over ``PROBE_SECONDS`` of micro-batches: what to expect, where :func:`best` compares.

    All of the time counts but the first micro-batch's: what a busy machine takes away, it takes from the run as well.

    Examples
    --------
    >>> def run(size: int) -> tuple[int, float]:
    ...     time.sleep(0.1)
    ...     return size, 0.1
    >>> 30 < usual_speed(run, 10) <= 100
    True
    """
    run(size)
    n_done, began, seconds = 0, time.perf_counter(), 0.0
    while seconds < PROBE_SECONDS:
        n_done += run(size)[0]
        seconds = max(TIMER_SECONDS, time.perf_counter() - began)
    return n_done / seconds


def _speed(run: RunOne, size: int) -> float | None:
    """Rows/s of the fastest of some micro-batches; the first, which finds its memory and its kernels, does not count."""
    held, _ = run(size)
    if held < size:
        return None
    seconds, began = [run(size)[1]], time.perf_counter()
    while time.perf_counter() - began < STEP_SECONDS:
        seconds.append(run(size)[1])
    return size / max(TIMER_SECONDS, min(seconds))
