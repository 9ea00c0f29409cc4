"""Advise on what to change for more throughput, in one line, from where a run's time went.

The phase that took most of the time is judged first, since less of any other gains little. The first rule that holds
decides:

1. Nothing was computed: no advice.
2. The startup took ``DOMINANT_STARTUP_FRACTION`` of the call and ``SLOW_STARTUP_SECONDS``: startup-bound.
3. Devices waited longer for the model to load than they computed, waited for rows or wrote: load-bound.
4. The model's first call took longer than the others by more than each of these: warm-up-bound.

All further rules judge the devices' time without loading and warming up:

5. They waited for reads for ``SIGNIFICANT_FRACTION`` of it: input-bound.
6. The first device finished ``SIGNIFICANT_FRACTION`` of the wall time before the last: unbalanced.
7. They computed for ``DOMINANT_FRACTION`` of it: compute-bound.
8. Writing took ``DOMINANT_FRACTION`` of it: output-bound.
9. Otherwise the work around the chunks took the time: overhead-bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from daskinfer.diagnostics.device_stats import INLINE, DeviceReport

DOMINANT_STARTUP_FRACTION = 0.5  # of the call's wall time; arbitrary
SLOW_STARTUP_SECONDS = 1.0  # from which on the startup is mentioned; arbitrary
SIGNIFICANT_FRACTION, DOMINANT_FRACTION = 0.15, 0.7  # of the devices' time; arbitrary


@dataclass(frozen=True, slots=True)
class PhaseSeconds:
    """Where the time of a run's devices went: seconds, summed over the devices; ``total`` is all that they had."""

    total: float
    loading: float
    warming_up: float
    waiting: float
    computing: float
    writing: float

    @property
    def total_without_loading(self) -> float:
        """What was left for the rows."""
        return max(1e-9, self.total - self.loading - self.warming_up)

    @property
    def largest_other(self) -> float:
        """The longest phase besides loading and warming up, work around the chunks included."""
        known = (self.waiting, self.computing, self.writing)
        return max(*known, self.total_without_loading - sum(known))


def measure_phases(devices: Sequence[DeviceReport], seconds: float) -> PhaseSeconds:
    """Add up the phases of the devices that computed something, in ``seconds`` of wall time."""
    working = [device for device in devices if device.n_rows]
    warming_up = sum(device.warm_up_seconds for device in working)
    return PhaseSeconds(
        _measure_total(working, seconds),
        sum(device.load_seconds for device in working),
        warming_up,
        sum(device.waited_seconds for device in working),
        sum(device.seconds for device in working) - warming_up,
        sum(device.write_seconds for device in working),
    )


def measure_tail(devices: Sequence[DeviceReport]) -> float:
    """Return how long the device that finished first was idle until the last one finished; 0.0 with a single device.

    This process does not count if workers took over from it.
    """
    ended = [device.ended for device in devices if device.n_chunks and device.device != INLINE]
    return max(ended) - min(ended) if ended else 0.0


def make_verdict(devices: Sequence[DeviceReport], seconds: float, start_seconds: float) -> str:
    """Return the advice of the first rule that holds; empty if nothing was computed."""
    phases = measure_phases(devices, seconds)
    if not phases.total:
        return ""
    called = start_seconds + seconds
    if start_seconds >= SLOW_STARTUP_SECONDS and start_seconds >= DOMINANT_STARTUP_FRACTION * called:
        took = f"starting took {start_seconds:.1f} of {called:.1f} s"
        return (
            f"startup-bound: {took}; pass more rows per call, or make several calls in one process, which keeps its workers"
        )
    working = [device for device in devices if device.n_rows]
    if phases.loading > max(phases.warming_up, phases.largest_other):
        took = f"loading took {max(d.load_seconds for d in working):.1f} of {seconds:.1f} s"
        return f"load-bound: {took}; pass more rows per call, or make several calls in one process, which keeps the model"
    if phases.warming_up > phases.largest_other:
        took = f"the model's first call took {max(d.first_call_seconds for d in working):.1f} of {seconds:.1f} s"
        return f"warm-up-bound: {took}; pass more rows per call, or make several calls in one process"
    return _judge_rows(phases, measure_tail(devices), seconds, len(working))


def _judge_rows(phases: PhaseSeconds, tail_seconds: float, seconds: float, n_devices: int) -> str:
    """Apply rules 5 to 9."""
    total = phases.total_without_loading
    waited, computed, wrote = (min(1.0, s / total) for s in (phases.waiting, phases.computing, phases.writing))
    if waited >= SIGNIFICANT_FRACTION:
        return f"input-bound: devices waited for reads {waited:.0%} of the time; raise prefetch"
    if tail_seconds >= SIGNIFICANT_FRACTION * seconds:
        tail = f"the last device finished {tail_seconds:.1f} s after the first"
        return f"unbalanced: {tail}; use device_weights='auto' or a smaller batch_size"
    if computed >= DOMINANT_FRACTION:
        return f"compute-bound: devices computed {computed:.0%} of the time"
    fewer = "fewer devices" if n_devices > 1 else ""
    if wrote >= DOMINANT_FRACTION:
        cures = " or ".join(filter(None, ["use faster storage", fewer]))
        return f"output-bound: writing took {wrote:.0%} of the time; {cures}"
    cures = ", ".join(filter(None, ["pass more rows per call", fewer and f"use {fewer}"]))
    return f"overhead-bound: devices computed {computed:.0%} of the time; {cures}, or stop other work on them"


def _measure_total(working: Sequence[DeviceReport], seconds: float) -> float:
    """Return the time available to the devices, summed up: ``seconds`` for each, unless workers took over from this process.

    In that case the workers were starting until this process finished its last chunk, and from then on it was idle.
    """
    inline = [device.ended - device.began for device in working if device.device == INLINE]
    if not inline or len(working) == 1:
        return seconds * len(working)
    return inline[0] + max(0.0, seconds - inline[0]) * (len(working) - 1)
