"""The loop for full micro-batches: what it leaves out, and that its results are those of the general path."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from daskinfer.core.chunks import BatchConfig
from daskinfer.core.pytree import Ports
from daskinfer.errors import ChunkError, ModelError
from daskinfer.options import Options
from daskinfer.transport import process_memory
from daskinfer.transport.process_memory import ProcessMemoryArray
from daskinfer.worker import model_runner
from daskinfer.worker.model_runner import ModelRunConfig, run_model
from tests.unit.worker.test_model_runner import Do, load, result, run

X = np.random.default_rng(0).normal(size=(40, 3)).astype("float32")


def test_repeated_work_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference mode is entered for the first, the full and the last micro-batches: three times, however many there are."""
    entered = []

    def precision(*args: Any) -> contextlib.AbstractContextManager[None]:
        entered.append(args)
        return contextlib.nullcontext()

    monkeypatch.setattr(model_runner, "make_autocast_context", precision)
    np.testing.assert_array_equal(result(nn.Identity(), X, batch_size=2, start=1), X)
    assert len(entered) == 3


@pytest.mark.parametrize("model", [nn.Identity(), np.abs], ids=["module", "function"])
def test_the_general_path_is_taken_by_partial_micro_batches(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """The first, which shows the output spec, and the last: all others go through the loop, whatever the model."""
    computed, compute_rows = [], model_runner._ChunkRun._compute_rows

    def counting(self: Any, begin: int, end: int, *args: Any) -> None:
        computed.append((begin, end))
        compute_rows(self, begin, end, *args)

    monkeypatch.setattr(model_runner._ChunkRun, "_compute_rows", counting)
    x = np.abs(X)
    np.testing.assert_array_equal(result(model, x, batch_size=4, start=2), x)
    assert computed == [(0, 2), (38, 40)]


def test_remote_rows_cost_one_system_call_per_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in another process's memory are copied once, straight into the buffer that the model reads."""
    copied, reader = [], process_memory._get_process_vm_readv()

    def counting(*args: Any) -> int:
        copied.append(args)
        return reader(*args)

    monkeypatch.setattr(process_memory, "_get_process_vm_readv", lambda: counting)
    ports = Ports.from_input(X)
    output = run_model(
        load(nn.Identity()), [ProcessMemoryArray.from_array(X)], 0, ModelRunConfig(ports, BatchConfig(4), Options())
    )
    np.testing.assert_array_equal(output.arrays[0], X)
    assert len(copied) == 10


def test_partial_copies_are_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may copy less than requested; the rest is requested again."""
    reader = process_memory._get_process_vm_readv()

    def at_most_5(pid: int, local: Any, n_local: int, remote: Any, n_remote: int, flags: int) -> int:
        iovecs = remote._obj
        sizes = (iovecs[1], iovecs[3])
        iovecs[1] = iovecs[3] = min(5, iovecs[1])
        copied = reader(pid, local, n_local, remote, n_remote, flags)
        iovecs[1], iovecs[3] = sizes
        return copied

    monkeypatch.setattr(process_memory, "_get_process_vm_readv", lambda: at_most_5)
    output = run_model(
        load(nn.Identity()),
        [ProcessMemoryArray.from_array(X)],
        0,
        ModelRunConfig(Ports.from_input(X), BatchConfig(4), Options()),
    )
    np.testing.assert_array_equal(output.arrays[0], X)


def test_a_function_that_changes_its_array() -> None:
    """A function that changes the shape of its ndarray does not disturb the next micro-batch."""

    def spoil(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        output = x.sum(1)
        x.shape = (-1,)
        return output

    np.testing.assert_array_equal(result(spoil, X), X.sum(1))


def test_an_output_is_freed_before_the_next_is_computed() -> None:
    """After it was copied it is freed, so the device holds one output at a time."""
    outputs: list[weakref.ref[torch.Tensor]] = []
    n_alive = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        n_alive.append(sum(output() is not None for output in outputs))
        outputs.append(weakref.ref(output := x + 1))
        return output

    np.testing.assert_array_equal(result(Do(forward), X), X + 1)
    assert n_alive == [0] * 10


def test_a_module_that_changes_its_tensor() -> None:
    """A module may change shape and values of its input without disturbing the next micro-batch."""
    shapes = []

    def spoil(x: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        output = x.sum(1)
        x.zero_().unsqueeze_(0)
        return output

    np.testing.assert_allclose(result(Do(spoil), X), X.sum(1), rtol=1e-5)
    assert {*shapes} == {(4, 3)}


@given(
    n=st.integers(1, 40),
    start=st.integers(0, 5),
    batch_size=st.integers(1, 7),
    bad=st.sets(st.integers(0, 39)),
    pad=st.booleans(),
)
@settings(deadline=None)
def test_rows_that_fail_among_full_micro_batches(n: int, start: int, batch_size: int, bad: set[int], pad: bool) -> None:
    """Wherever rows fail, exactly these have no output, and every other row has its own."""
    rows = np.arange(1, n + 1, dtype="float32")
    wrong = torch.tensor([row + 1.0 for row in bad])

    def forward(x: torch.Tensor) -> torch.Tensor:
        if torch.isin(x, wrong).any():
            raise ValueError("a bad row")
        return -x

    output = run(Do(forward), rows, start=start, batch_size=batch_size, pad=pad, on_error="skip")
    failed = sorted(row for row in bad if row < n)
    assert sorted(output.failed_rows) == failed
    good = np.setdiff1d(np.arange(n), failed)
    if good.size:
        np.testing.assert_array_equal(output.arrays[0][good], -rows[good])
        assert np.isnan(output.arrays[0][failed]).all()


def test_the_bad_row_is_named() -> None:
    """A failure in the loop names the row in the whole input, like one in the first micro-batch."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        if (x == 27).any():
            raise ValueError("27")
        return x

    with pytest.raises(ChunkError, match="rows 1027:1028 on cpu failed"):
        run(Do(forward), np.arange(40.0), start=1000)


def test_named_ports_of_several_dtypes() -> None:
    """Every port has a buffer and a dtype of its own."""
    x = {"ids": np.arange(40), "scale": np.arange(40, dtype="float64") / 4}
    output = result(Do(lambda ids, scale: ids * scale), x, dtype={"scale": "float32"})
    np.testing.assert_array_equal(output, (x["ids"] * x["scale"]).astype("float32"), strict=True)


def test_the_output_under_autocast_is_as_planned() -> None:
    """Under autocast the device's float dtype is cast to the planned one, in the loop as before it."""
    net = nn.Linear(3, 2)
    outputs = (np.empty((0, 2), "float32"),)
    output = result(net, X, autocast="bf16", outputs=outputs)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = torch.cat([net(torch.from_numpy(X[i : i + 4])) for i in range(0, 40, 4)]).float().numpy()
    np.testing.assert_array_equal(output, expected, strict=True)


@pytest.mark.parametrize(
    "then", [lambda x: (x, x), lambda x: x.astype("float64"), lambda x: x[:, :2], lambda x: x[:3], lambda _: "no array"]
)
def test_outputs_of_a_function_that_change_late(then: Any) -> None:
    """A function's outputs are checked in the loop like a module's."""
    n_calls = 0

    def function(x: np.ndarray[Any, Any]) -> Any:
        nonlocal n_calls
        n_calls += 1
        return x if n_calls < 6 else then(x)

    with pytest.raises(ModelError, match=r"rows 20:24 returned|for 4 rows|returned a"):
        run(function, X)
    assert n_calls == 6


def test_outputs_of_a_function_that_are_no_plain_arrays() -> None:
    """A masked array, a tensor, another memory order: the result is the same as on the general path."""
    for kind in (np.ma.asarray, torch.from_numpy, np.asfortranarray):
        np.testing.assert_array_equal(result(lambda x, kind=kind: kind(x * 2), X), X * 2)


@pytest.mark.parametrize(
    "then", [lambda x: (x, x), lambda x: x.double(), lambda x: x[:, :2], lambda x: x[:3], lambda _: "no array"]
)
def test_outputs_that_change_late(then: Any) -> None:
    """An output that differs from the ones before is refused, and nothing runs twice for it."""
    n_calls = 0

    def forward(x: torch.Tensor) -> Any:
        nonlocal n_calls
        n_calls += 1
        return x if n_calls < 6 else then(x)

    with pytest.raises(ModelError, match=r"rows 20:24 returned|for 4 rows|returned a"):
        run(Do(forward), X)
    assert n_calls == 6


def test_out_of_memory_in_the_loop() -> None:
    """Out of memory in the loop, the chunk runs again with half of the batch size."""
    sizes = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        if len(sizes) == 5:
            raise torch.cuda.OutOfMemoryError("made up")
        return x

    output = run(Do(forward), X)
    assert output.batch_size == 2
    np.testing.assert_array_equal(output.arrays[0], X)
    assert sizes == [4] * 5 + [2] * 20


def test_inference_mode_ends_with_the_chunk() -> None:
    """Inference mode is on inside the loop, and off afterwards, even if the model fails."""
    seen = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_inference_mode_enabled())
        if len(seen) == 6:
            raise ValueError("made up")
        return x

    with pytest.raises(ChunkError, match="made up"):
        run(Do(forward), X)
    assert all(seen)
    assert not torch.is_inference_mode_enabled()
