"""Whole micro-batches go through a loop of their own: what it leaves out, and that it gives what the plain way gives."""

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

from daskinfer.core.pytree import Ports
from daskinfer.errors import ChunkError, ModelError
from daskinfer.options import Options
from daskinfer.transport import process_memory
from daskinfer.transport.process_memory import ProcessMemoryArray
from daskinfer.worker import model_runner
from daskinfer.worker.model_runner import ModelRunConfig, run_model
from tests.unit.worker.test_model_runner import Do, load, result, run

X = np.random.default_rng(0).normal(size=(40, 3)).astype("float32")


def test_what_stays_the_same_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk's first, its whole and its last micro-batches: three times into inference mode, however many they are."""
    entered = []

    def precision(*args: Any) -> contextlib.AbstractContextManager[None]:
        entered.append(args)
        return contextlib.nullcontext()

    monkeypatch.setattr(model_runner, "make_autocast_context", precision)
    np.testing.assert_array_equal(result(nn.Identity(), X, batch_size=2, start=1), X)
    assert len(entered) == 3


@pytest.mark.parametrize("model", [nn.Identity(), np.abs], ids=["network", "function"])
def test_the_plain_way_is_taken_by_what_is_no_whole_micro_batch(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """The first, which shows what answers look like, and the end: whatever the model is, the others go through the loop."""
    plain, attempt = [], model_runner._ChunkRun._compute_rows

    def counting(self: Any, begin: int, end: int, *args: Any) -> None:
        plain.append((begin, end))
        attempt(self, begin, end, *args)

    monkeypatch.setattr(model_runner._ChunkRun, "_compute_rows", counting)
    x = np.abs(X)
    np.testing.assert_array_equal(result(model, x, batch_size=4, start=2), x)
    assert plain == [(0, 2), (38, 40)]


def test_rows_elsewhere_cost_a_call_of_the_system_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """A micro-batch of rows in another process's memory is one copy, straight into where the network gets it from."""
    copied, reader = [], process_memory._get_process_vm_readv()

    def counting(*args: Any) -> int:
        copied.append(args)
        return reader(*args)

    monkeypatch.setattr(process_memory, "_get_process_vm_readv", lambda: counting)
    ports = Ports.from_input(X)
    answer = run_model(load(nn.Identity()), [ProcessMemoryArray.from_array(X)], 0, ModelRunConfig(ports, 4, Options()))
    np.testing.assert_array_equal(answer.arrays[0], X)
    assert len(copied) == 10


def test_copies_that_end_early_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may copy less than it was asked for: the rest is asked for again."""
    reader = process_memory._get_process_vm_readv()

    def at_most_5(pid: int, here: Any, n_here: int, there: Any, n_there: int, flags: int) -> int:
        places = there._obj
        given = (places[1], places[3])
        places[1] = places[3] = min(5, places[1])
        copied = reader(pid, here, n_here, there, n_there, flags)
        places[1], places[3] = given
        return copied

    monkeypatch.setattr(process_memory, "_get_process_vm_readv", lambda: at_most_5)
    answer = run_model(
        load(nn.Identity()), [ProcessMemoryArray.from_array(X)], 0, ModelRunConfig(Ports.from_input(X), 4, Options())
    )
    np.testing.assert_array_equal(answer.arrays[0], X)


def test_a_function_that_changes_its_array() -> None:
    """Nor does a function of ndarrays that changes the shape of what it was given disturb the next micro-batch."""

    def spoil(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        answer = x.sum(1)
        x.shape = (-1,)
        return answer

    np.testing.assert_array_equal(result(spoil, X), X.sum(1))


def test_no_answer_lives_while_the_next_is_computed() -> None:
    """What was copied is let go: a device has to hold one answer at a time."""
    answers: list[weakref.ref[torch.Tensor]] = []
    n_alive = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        n_alive.append(sum(answer() is not None for answer in answers))
        answers.append(weakref.ref(answer := x + 1))
        return answer

    np.testing.assert_array_equal(result(Do(forward), X), X + 1)
    assert n_alive == [0] * 10


def test_a_network_that_changes_its_tensor() -> None:
    """Shape and numbers of what a network was given are its own: the next micro-batch is as it would be without it."""
    shapes = []

    def spoil(x: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        answer = x.sum(1)
        x.zero_().unsqueeze_(0)
        return answer

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
def test_rows_that_fail_among_whole_micro_batches(n: int, start: int, batch_size: int, bad: set[int], pad: bool) -> None:
    """Wherever rows fail, exactly these have no answer, and every other has its own."""
    rows = np.arange(1, n + 1, dtype="float32")
    wrong = torch.tensor([row + 1.0 for row in bad])

    def forward(x: torch.Tensor) -> torch.Tensor:
        if torch.isin(x, wrong).any():
            raise ValueError("a bad row")
        return -x

    answer = run(Do(forward), rows, start=start, batch_size=batch_size, pad=pad, on_error="skip")
    failed = sorted(row for row in bad if row < n)
    assert sorted(answer.failed_rows) == failed
    good = np.setdiff1d(np.arange(n), failed)
    if good.size:
        np.testing.assert_array_equal(answer.arrays[0][good], -rows[good])
        assert np.isnan(answer.arrays[0][failed]).all()


def test_the_row_at_fault_is_named() -> None:
    """A failure in the loop names the row of the whole input, as one in the first micro-batch does."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        if (x == 27).any():
            raise ValueError("27")
        return x

    with pytest.raises(ChunkError, match="rows 1027:1028 on cpu failed"):
        run(Do(forward), np.arange(40.0), start=1000)


def test_named_ports_of_several_dtypes() -> None:
    """Every port has a buffer and a dtype of its own."""
    x = {"ids": np.arange(40), "scale": np.arange(40, dtype="float64") / 4}
    answer = result(Do(lambda ids, scale: ids * scale), x, dtype={"scale": "float32"})
    np.testing.assert_array_equal(answer, (x["ids"] * x["scale"]).astype("float32"), strict=True)


def test_the_answer_of_autocast_is_as_planned() -> None:
    """Under autocast a device's float dtype is cast to the plan's, in the loop as before it."""
    net = nn.Linear(3, 2)
    outputs = (np.empty((0, 2), "float32"),)
    answer = result(net, X, autocast="bf16", outputs=outputs)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = torch.cat([net(torch.from_numpy(X[i : i + 4])) for i in range(0, 40, 4)]).float().numpy()
    np.testing.assert_array_equal(answer, expected, strict=True)


@pytest.mark.parametrize(
    "then", [lambda x: (x, x), lambda x: x.astype("float64"), lambda x: x[:, :2], lambda x: x[:3], lambda _: "no answer"]
)
def test_answers_of_a_function_that_change_late(then: Any) -> None:
    """A function's answers are looked at in the loop as a network's are."""
    n_calls = 0

    def function(x: np.ndarray[Any, Any]) -> Any:
        nonlocal n_calls
        n_calls += 1
        return x if n_calls < 6 else then(x)

    with pytest.raises(ModelError, match=r"rows 20:24 gave|for 4 rows|returned a"):
        run(function, X)
    assert n_calls == 6


def test_answers_of_a_function_that_are_no_plain_arrays() -> None:
    """A masked array, a tensor, another order of memory: whatever can be an array is kept as it is in the plain way."""
    for kind in (np.ma.asarray, torch.from_numpy, np.asfortranarray):
        np.testing.assert_array_equal(result(lambda x, kind=kind: kind(x * 2), X), X * 2)


@pytest.mark.parametrize(
    "then", [lambda x: (x, x), lambda x: x.double(), lambda x: x[:, :2], lambda x: x[:3], lambda _: "no answer"]
)
def test_answers_that_change_late(then: Any) -> None:
    """An answer that looks otherwise than the ones before is refused, with its rows named where it is one."""
    n_calls = 0

    def forward(x: torch.Tensor) -> Any:
        nonlocal n_calls
        n_calls += 1
        return x if n_calls < 6 else then(x)

    with pytest.raises(ModelError, match=r"rows 20:24 gave|for 4 rows|returned a"):
        run(Do(forward), X)
    assert n_calls == 6  # nothing runs twice for it


def test_memory_that_gets_short_late() -> None:
    """Out of memory in the loop, the chunk is run again with half of the micro-batch."""
    sizes = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        if len(sizes) == 5:
            raise torch.cuda.OutOfMemoryError("made up")
        return x

    answer = run(Do(forward), X)
    assert answer.batch_size == 2
    np.testing.assert_array_equal(answer.arrays[0], X)
    assert sizes == [4] * 5 + [2] * 20


def test_inference_mode_ends_with_the_chunk() -> None:
    """What runs in the loop sees inference mode on, and it is off again afterwards, also where a network fails."""
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
