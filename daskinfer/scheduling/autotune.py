"""Tuning: the fastest batch size on a device and the faster memory format, measured on real rows.

At each step the first rule that matches ends the tuning, with one DEBUG line:

1. All rows of this and of earlier runs take less than ``MIN_TUNING_SECONDS`` at the speed of the initial size: keep the
   initial size. So among many short runs one tunes, for all later ones. From ``MIN_FORMAT_CHECK_SECONDS`` on, two more
   micro-batches compare the memory formats.
2. Smaller sizes are faster, each by ``MIN_SPEEDUP`` than the one before: use the last of them.
3. The next larger size does not fit in memory: use the last size.
4. The next larger size is not faster by ``MIN_SPEEDUP``: use the last size.
5. There is no larger candidate: use the last size.

After the initial size the other memory format, if there is one, is measured at the same size; tuning continues with it if
it is faster by ``MIN_SPEEDUP``. Smaller sizes are measured before larger ones: on CPUs, tensors that stay in the caches gain
more (a CNN on both of two cores: 0.84 s with 32 images, 1.0 s with 64 to 256); if they gain nothing, one step shows it.

The run computes these rows again, so that all of its rows use one batch size. That costs a few micro-batches, once per model
and kind of device (``throughput_history`` keeps the result).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

logger = logging.getLogger(__name__)

MIN_TUNING_SECONDS = 2.0  # a shorter run gains less than measuring costs; arbitrary
MIN_FORMAT_CHECK_SECONDS = 0.3  # comparing the memory formats takes some hundredths of it; arbitrary
MIN_SPEEDUP = 1.05  # ratio of rows/s; arbitrary, less is noise
MIN_QUICK_SPEEDUP = 1.25  # ratio of rows/s, by one micro-batch each; arbitrary, well above its noise
SUSTAINED_SECONDS = 0.5  # of micro-batches for a sustained speed; arbitrary, several turns of a busy OS scheduler
MIN_MEASURE_SECONDS = 0.02  # per size; arbitrary, well above the clock's resolution and a context switch
MIN_ELAPSED_SECONDS = 1e-6  # lower bound on the time of a micro-batch; arbitrary, keeps speeds finite

# Runs one micro-batch of so many rows; returns the size that fitted in memory, and the seconds that it took.
BatchRunner = Callable[[int], tuple[int, float]]


class BatchSizeChoice(NamedTuple):
    """Result of tuning: the batch size, rows/s with it, and whether images are in channels_last.

    ``channels_last`` is None if it was not tried. ``is_short_run``: too few rows to measure more than the initial size.
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
    """Measure batch sizes and memory formats until one of the module's rules decides.

    Parameters
    ----------
    run_batch
        Runs one micro-batch of so many rows; a smaller one if memory does not hold it.
    candidates
        Batch sizes in rows, ascending.
    n_rows
        Rows that the device is going to get, plus those of the same model that it computed before.
    run_channels_last
        As ``run_batch``, in that memory format; runs no rows if the model cannot use it. None: it is not tried.
    initial
        The candidate that is used if no other is faster. None: the smallest.

    Returns
    -------
    BatchSizeChoice
        The batch size, its rows/s, the memory format, and whether the run is too short for more.

    Examples
    --------
    >>> tune_batch_size(lambda size: (size, max(size, 300)), [100, 200, 400, 800], 1_000_000)
    BatchSizeChoice(batch_size=400, speed=1.0, channels_last=False, is_short_run=False)
    """
    initial = candidates[0] if initial is None else initial
    last = BatchSizeChoice(initial, _measure_speed(run_batch, initial) or 1.0)
    seconds = n_rows / last.speed
    if seconds < MIN_TUNING_SECONDS:
        logger.debug("rule 1: %d rows at %.0f rows/s are too few to tune", n_rows, last.speed)
        return last._replace(
            is_short_run=True, channels_last=_check_channels_last(run_batch, run_channels_last, last.batch_size, seconds)
        )
    if run_channels_last is not None:
        run_batch, last = _choose_memory_format(run_batch, run_channels_last, last)
    smaller = _try_smaller_sizes(run_batch, [size for size in reversed(candidates) if size < initial], last)
    return smaller or _try_larger_sizes(run_batch, [size for size in candidates if size > initial], last)


def _try_smaller_sizes(run_batch: BatchRunner, sizes: Sequence[int], first: BatchSizeChoice) -> BatchSizeChoice | None:
    """Return the last of these sizes that is faster than the one before it; None if the first of them is not."""
    last = first
    for size in sizes:
        faster = _measure_speed(run_batch, size)
        if faster is None or faster < MIN_SPEEDUP * last.speed:
            break
        last = last._replace(batch_size=size, speed=faster)
    if last is first:
        return None
    logger.debug("rule 2: smaller batches are faster, batch_size=%d", last.batch_size)
    return last


def _try_larger_sizes(run_batch: BatchRunner, sizes: Sequence[int], last: BatchSizeChoice) -> BatchSizeChoice:
    """Return the last size before one that does not fit in memory or is not faster."""
    for size in sizes:
        faster = _measure_speed(run_batch, size)
        if faster is None:
            logger.debug("rule 3: %d rows do not fit in memory, batch_size=%d", size, last.batch_size)
            return last
        if faster < MIN_SPEEDUP * last.speed:
            logger.debug("rule 4: %d rows are not faster, batch_size=%d", size, last.batch_size)
            return last
        last = last._replace(batch_size=size, speed=faster)
    logger.debug("rule 5: no larger candidate, batch_size=%d", last.batch_size)
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
    """Return the runner of the faster memory format, and its result at this batch size."""
    speed = _measure_speed(run_channels_last, last.batch_size)
    logger.debug("channels_last: %s rows/s, contiguous: %.0f", f"{speed:.0f}" if speed else "no", last.speed)
    if speed is None or speed < MIN_SPEEDUP * last.speed:
        return run_batch, last
    return run_channels_last, BatchSizeChoice(last.batch_size, speed, channels_last=True)


def is_channels_last_faster(run_batch: BatchRunner, run_channels_last: BatchRunner, batch_size: int) -> bool:
    """Return whether channels_last is faster, by a micro-batch or two: for a run too short to tune.

    Examples
    --------
    >>> is_channels_last_faster(lambda size: (size, 1.0), lambda size: (size, 0.5), 64)
    True
    """
    (_, seconds), (held, _) = run_batch(batch_size), run_channels_last(batch_size)
    if held == batch_size:  # its first run, which selects its kernels, does not count
        held, channels_last_seconds = run_channels_last(batch_size)
        logger.debug("channels_last: %.2g s for %d rows, contiguous: %.2g s", channels_last_seconds, batch_size, seconds)
    return held == batch_size and MIN_QUICK_SPEEDUP * channels_last_seconds <= seconds


def sustained_throughput(run_batch: BatchRunner, batch_size: int) -> float:
    """Measure rows/s over ``SUSTAINED_SECONDS`` of micro-batches: the speed to expect of a run.

    All of the time counts except the first micro-batch: what a busy machine takes away, it takes from the run as well.
    :func:`tune_batch_size` compares best cases instead.

    Examples
    --------
    >>> def run_batch(size: int) -> tuple[int, float]:
    ...     time.sleep(0.1)
    ...     return size, 0.1
    >>> 30 < sustained_throughput(run_batch, 10) <= 100
    True
    """
    run_batch(batch_size)
    n_done, started_at, seconds = 0, time.perf_counter(), 0.0
    while seconds < SUSTAINED_SECONDS:
        n_done += run_batch(batch_size)[0]
        seconds = max(MIN_ELAPSED_SECONDS, time.perf_counter() - started_at)
    return n_done / seconds


def _measure_speed(run_batch: BatchRunner, batch_size: int) -> float | None:
    """Measure rows/s of the fastest of some micro-batches; None if they do not fit in memory.

    The first one does not count: it allocates memory and selects kernels.
    """
    held, _ = run_batch(batch_size)
    if held < batch_size:
        return None
    seconds, started_at = [run_batch(batch_size)[1]], time.perf_counter()
    while time.perf_counter() - started_at < MIN_MEASURE_SECONDS:
        seconds.append(run_batch(batch_size)[1])
    return batch_size / max(MIN_ELAPSED_SECONDS, min(seconds))
