"""Where a result comes from, as a report says it."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pytest

import daskinfer as di
from daskinfer.core.chunks import ChunkStats
from daskinfer.diagnostics.provenance import MAX_LISTED_DEVICES, Hosts, describe_call, format_period
from daskinfer.options import CallKeywords


def prepare(rows: Any) -> Any:
    """Preprocess rows."""
    return rows


@pytest.mark.parametrize(
    ("keywords", "options"),
    [
        ({}, "all as by default"),
        ({"devices": "auto", "batch_size": "auto", "prefetch": 1, "progress": True}, "all as by default"),
        ({"devices": ["cpu", "cpu"], "device_weights": [1, 3]}, "devices=['cpu', 'cpu'], device_weights=[1, 3]"),
        ({"preprocess": prepare, "nan_is_failure": True}, "nan_is_failure=True, preprocess=<prepare>"),
        ({"output": np.full(3, 7.25), "device_weights": np.full(2, 7.25)}, "device_weights=<ndarray>, output=<ndarray>"),
        ({"client": object()}, "client=<object>"),
        ({"options": di.Options(prefetch=2)}, "options=Options(prefetch=2)"),
        ({"device_weights": {"cuda:0": 1.5}}, "device_weights={'cuda:0': 1.5}"),
    ],
)
def test_options_that_differ_from_the_defaults(keywords: dict[str, Any], options: str) -> None:
    """Plain values are shown as typed, anything else by its type or name: never what is in an array."""
    own = {name: value for name, value in keywords.items() if hasattr(CallKeywords(), name)}
    given = CallKeywords(**own, fields={name: value for name, value in keywords.items() if name not in own})
    described = describe_call("predict", given)
    assert sorted(described["options"].split(", ")) == sorted(options.split(", "))
    typed = "" if options == "all as by default" else f", {described['options']}"
    assert described["call"] == f"daskinfer.predict(model, x{typed})"


def test_long_values_are_shortened() -> None:
    """A thousand weights, or a text of a page, do not fill the report."""
    described = describe_call("run", CallKeywords(device_weights=list(range(1000)), devices="cpu," * 1000))
    assert len(described["call"]) < 400


def test_a_period_has_its_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local time with the zone and its offset; the date is repeated if the call ended on another day."""
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        assert format_period(0.0, 61.0) == "1970-01-01 05:30:00 to 05:31:01 IST (UTC+05:30)"
        assert format_period(0.0, 86400.0) == "1970-01-01 05:30:00 to 1970-01-02 05:30:00 IST (UTC+05:30)"
    finally:
        monkeypatch.undo()
        time.tzset()
    assert os.environ.get("TZ") != "Asia/Kolkata"


def test_hosts_and_their_devices() -> None:
    """Each host is named once, with some of its devices; loopback is this host."""
    hosts = Hosts()
    for i in range(2 * (MAX_LISTED_DEVICES + 1)):
        hosts.add(ChunkStats(i, i + 1, f"cuda:{i // 2}", "", 1, 1.0, "tls://[fe80::1]:80"))
    hosts.add(ChunkStats(0, 1, "cpu:0", "", 1, 1.0, ""))  # given up
    assert hosts.describe() == {
        "hosts": f"[fe80::1] ({', '.join(f'cuda:{i}' for i in range(MAX_LISTED_DEVICES))} and 1 more)"
    }
    assert Hosts().describe() == {}
