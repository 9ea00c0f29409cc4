"""Calls that mypy has to accept, and calls in which it has to find an error (``test_options.test_types_of_calls``).

A wrong call says which error is expected. mypy reports an ignore without an error, so each of them has to be found.
"""

from __future__ import annotations

from typing import Any, assert_type

import numpy as np
import torch
from distributed import Client

import daskinfer as di
from daskinfer.diagnostics.events import Event

X = np.zeros((8, 4), np.float32)


def on_event(event: Event) -> None:
    """Listen to a run."""


def make_right_calls(client: Client, report_wanted: bool) -> None:
    """Call the functions as documented."""
    assert_type(di.predict(abs, X, return_report=True), tuple[Any, di.RunReport])
    _, report = di.predict(abs, X, devices=["cpu", "cpu"], device_weights=[1, 3], batch_size=5, return_report=True)
    assert_type(report.rows, int)
    di.predict(abs, X, devices=torch.device("cpu"))
    di.plan(abs, X, devices=["cpu", torch.device("cuda", 0)])
    di.predict(abs, X, return_report=report_wanted)
    di.predict(abs, X, device_weights={"cuda": 8, "cpu": 1}, client=client, progress=on_event, prefetch=2)
    di.predict(abs, {"a": X}, on_error="skip", fill_value=0, max_failed_rows="1%", chunk_timeout=3, trust=True)
    di.predict(abs, X, options=di.Options(autocast="bf16"), memory_format="channels_last", dtype={"x": "float32"})
    for block in di.stream(abs, X, progress=False, retries=0):
        print(block)
    assert_type(di.run(abs, "x.npy", "y.npy", overwrite=True, shard=(1, 2), batch_size="auto"), di.RunReport)
    di.plan(abs, X, target="y.npy", probe=True, device_weights="even", postprocess=np.abs)
    di.map_blocks(abs, X, batch_size=4, pad=False, output=X)
    assert_type(di.__version__, str)


def make_wrong_calls() -> None:
    """Call them with a wrong keyword, a wrong literal, or a wrong type."""
    di.predict(abs, X, readers=2)  # type: ignore[call-overload]
    di.predict(abs, X, on_error="ignore")  # type: ignore[call-overload]
    di.predict(abs, X, prefetch="2")  # type: ignore[call-overload]
    di.predict(abs, X, devices=2)  # type: ignore[call-overload]
    di.predict(abs, X, overwrite=True)  # type: ignore[call-overload]
    di.stream(abs, X, return_report=True)  # type: ignore[call-arg]
    di.stream(abs, X, autocast="bfloat16")  # type: ignore[arg-type]
    di.run(abs, "x.npy", "y.npy", shard=3)  # type: ignore[arg-type]
    di.run(abs, "x.npy", "y.npy", fresh=True)  # type: ignore[call-arg]
    di.run(abs, "x.npy")  # type: ignore[call-arg]
    di.plan(abs, X, progress=True)  # type: ignore[call-arg]
    di.plan(abs, X, batch_size="large")  # type: ignore[arg-type]
    di.map_blocks(abs, X, on_error="skip")  # type: ignore[call-arg]
    di.Options(memory_format="nhwc")  # type: ignore[arg-type]
    di.Options(devices="cpu")  # type: ignore[call-arg]
    di.run(abs, "x.npy", "y.npy").no_such_attribute  # type: ignore[attr-defined]  # noqa: B018
