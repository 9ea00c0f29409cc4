"""The line of advice that a report ends with: one test for each exit of the ladder."""

from __future__ import annotations

import pytest

from daskinfer.diagnostics.device_stats import DeviceReport
from daskinfer.diagnostics.verdict import make_verdict

KEEPS = "pass more rows per call, or make several calls in one process"


def device(name: str = "cpu:0", n_rows: int = 100, **seconds: float) -> DeviceReport:
    """A device that computed rows in batches of 10."""
    return DeviceReport(name, "", 1, n_rows, batch_size=10, **seconds)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("devices", "start_seconds", "verdict"),
    [
        ([], 0.0, ""),
        ([device(n_rows=0)], 0.0, ""),
        (
            [device(seconds=4.0)],
            5.0,
            f"startup-bound: starting took 5.0 of 9.6 s; {KEEPS}, which keeps its workers",
        ),
        ([device(seconds=4.0)], 4.0, "compute-bound: devices computed 87% of the time"),
        (
            [device(seconds=0.4, load_seconds=4.0)],
            0.0,
            f"load-bound: loading took 4.0 of 4.6 s; {KEEPS}, which keeps the model",
        ),
        (
            [device(seconds=1.2, load_seconds=1.5, waited_seconds=1.0, write_seconds=1.0)],
            0.0,
            f"load-bound: loading took 1.5 of 4.6 s; {KEEPS}, which keeps the model",
        ),
        (
            [device(seconds=4.0, first_call_seconds=3.1)],
            0.0,
            f"warm-up-bound: the model's first call took 3.1 of 4.6 s; {KEEPS}",
        ),
        (
            [device(seconds=1.5, load_seconds=1.0, waited_seconds=0.6)],
            0.0,
            "input-bound: devices waited for reads 17% of the time; raise prefetch",
        ),
        ([device(seconds=2.6, load_seconds=1.5)], 0.0, "compute-bound: devices computed 84% of the time"),
        (
            [device(seconds=2.4, ended=2.5), device("cpu:1", seconds=4.4, ended=4.5)],
            0.0,
            "unbalanced: the last device finished 2.0 s after the first; use device_weights='auto' or a smaller batch_size",
        ),
        (
            [device(seconds=1.0, write_seconds=4.0), device("cpu:1", seconds=1.0, write_seconds=4.0)],
            0.0,
            "output-bound: writing took 87% of the time; use faster storage or fewer devices",
        ),
        ([device(seconds=1.0, write_seconds=4.0)], 0.0, "output-bound: writing took 87% of the time; use faster storage"),
        (
            [device(seconds=2.3), device("cpu:1", seconds=2.3)],
            0.0,
            "overhead-bound: devices computed 50% of the time; pass more rows per call, use fewer devices, or stop other "
            "work on them",
        ),
        (
            [device(seconds=2.3)],
            0.0,
            "overhead-bound: devices computed 50% of the time; pass more rows per call, or stop other work on them",
        ),
    ],
    ids=[
        *("1: no device", "1: no row", "2: startup", "not 2: less than half", "3: loading", "3: the longest of many"),
        *(
            "4: the first call",
            "5: reads",
            "7: computing, without loading",
            "6: unbalanced, though they computed",
            "8: writing",
        ),
        *("8: writing, one device", "9: overhead", "9: overhead, one device"),
    ],
)
def test_each_rule_decides_in_its_turn(devices: list[DeviceReport], start_seconds: float, verdict: str) -> None:
    """The phase that took most of the time is judged first; of a call that loads for most of it, nothing else is said."""
    assert make_verdict(devices, 4.6, start_seconds) == verdict


def test_a_short_startup_is_no_advice() -> None:
    """Half a second of startup is not worth a word, even if the rows took less."""
    assert make_verdict([device(seconds=0.09)], 0.1, 0.5) == "compute-bound: devices computed 90% of the time"


def test_a_device_whose_worker_starts_is_not_idle() -> None:
    """A device's time begins with its first chunk, and ends for this process when workers take over from it."""
    devices = [
        device("inline", seconds=4.0, began=100.0, ended=104.0),
        device("cpu:0", seconds=5.5, began=104.0, ended=110.0),
        device("cpu:1", seconds=5.5, began=104.0, ended=109.5),
    ]
    assert make_verdict(devices, 10.0, 0.0) == "compute-bound: devices computed 94% of the time"
