"""What may be typed as device_weights, what it resolves to, and how the rest is refused."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from daskinfer.errors import OptionError
from daskinfer.scheduling.weights import resolve_weights

NAMES = ["cuda:0", "cuda:1", "cpu:0"]
KINDS = ["cuda", "cuda", "cpu"]


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
def test_weights_are_resolved_in_the_order_of_the_devices(weights: Any, expected: tuple[float, ...]) -> None:
    """Every spelling of device_weights gives one float per device, in the devices' order."""
    resolved = resolve_weights(weights, NAMES, KINDS)
    assert resolved == expected
    assert all(type(w) is float for w in resolved)


def test_a_uuid_is_no_kind() -> None:
    """A key that is the UUID of a GPU means that GPU, not the kind gpu."""
    weights = {"gpu-ab12": 3, "MIG-7": 1}
    assert resolve_weights(weights, ["GPU-AB12", "MIG-7"], ["cuda", "cuda"]) == (3.0, 1.0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2], r"has 2 entries for 3 devices \(cuda:0, cuda:1, cpu:0\). Give one per device"),
        ([1, -2, 1], r"^weight of cuda:1 must be finite and >= 0, got -2$"),
        ([math.nan, 1, 1], r"^weight of cuda:0 must be finite and >= 0, got nan$"),
        ([1, 1, math.inf], r"^weight of cpu:0 must be finite and >= 0, got inf$"),
        ([1, 1, 10**400], r"^weight of cpu:0 must be finite and >= 0, got 1000+$"),
        ([True, 1, 1], r"^weight of cuda:0 must be a number >= 0, got True$"),
        (np.array([True, False, True]), r"^weight of cuda:0 must be a number >= 0, got True$"),
        (["8", 1, 1], r"^weight of cuda:0 must be a number >= 0, got '8'$"),
        ({"cuda": None, "cpu": 1}, r"^weight of cuda:0 must be a number >= 0, got None$"),
        ([0, 0.0, 0], r"are all 0\. Give at least one of cuda:0, cuda:1, cpu:0 a weight above 0\."),
        ("fast", r"must be 'auto', 'even', .*, got 'fast'\. Give one number for each of cuda:0, cuda:1"),
        (b"\x01\x01\x01", r"must be 'auto', .*, got b'"),
        (3, r"must be 'auto', .*, got 3\."),
        (np.array(3.0), r"must be 'auto', .*, got array\(3.\)\."),
        ({8, 1}, r"must be 'auto', .*, got {8, 1}\."),
        ({"cuda": 8}, r"no entry for cpu:0\. Add one for 'cpu:0' or 'cpu'; 0 leaves the device"),
        ({"even": 8}, r"an entry 'even' that matches none of the devices \(cuda:0"),
        ({"cuda": 8, "cpu": 1, "cuda:2": 1}, r"an entry 'cuda:2' that matches none of the devices .*Remove the entry"),
        ({"cuda": 8, "gpu": 1, "cpu": 1}, r"two entries for 'cuda', one of them 'gpu'\. Remove one\."),
    ],
)
def test_invalid_weights_are_refused(weights: Any, message: str) -> None:
    """The error names the device or entry, the value, what is allowed, and what to change unless that says it."""
    with pytest.raises(OptionError, match=message):
        resolve_weights(weights, NAMES, KINDS)


def test_an_error_lists_a_few_of_many_devices() -> None:
    """An error about 40 devices lists eight and counts the rest."""
    with pytest.raises(OptionError, match=r"\(cpu:0, .*, cpu:7 and 32 more\)"):
        resolve_weights([1.0], [f"cpu:{i}" for i in range(40)], ["cpu"] * 40)
