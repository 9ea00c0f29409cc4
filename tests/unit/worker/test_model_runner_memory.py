from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from daskinfer.errors import ChunkError
from tests.unit.worker.test_model_runner import Changing, Do, X, load, result, run

ERRORS = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CPU allocator": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    "NumPy": lambda: MemoryError("Unable to allocate 2.00 GiB"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "driver": lambda: RuntimeError("CUDA error: out of memory"),
}


class Greedy(nn.Module):
    """Writes into its input, then runs out of memory above ``limit`` rows."""

    def __init__(self, limit: int, error: Callable[[], Exception] = ERRORS["torch"], n_failures: int = 1000) -> None:
        super().__init__()
        self.limit, self.error, self.n_failures = limit, error, n_failures
        self.sizes: list[int] = []
        self.failed: list[weakref.ref[torch.Tensor]] = []
        self.alive: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        self.alive.append(sum(ref() is not None for ref in self.failed))
        y = x.add_(1) * 2
        if len(x) > self.limit and self.n_failures:
            self.n_failures -= 1
            self.failed.append(weakref.ref(y))
            raise self.error()
        return y


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """Free by counting references only."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_memory(error: str, caplog: pytest.LogCaptureFixture) -> None:
    """Out of memory, the micro-batch is halved until it fits, and the same rows are run again."""
    net = Greedy(3, ERRORS[error])
    with caplog.at_level(logging.WARNING, "daskinfer.worker.model_runner"):
        answer = run(net, X, batch_size=8)
    np.testing.assert_array_equal(answer.arrays[0], (X + 1) * 2)
    assert (answer.batch_size, net.sizes[:3]) == (2, [8, 4, 2])
    assert caplog.messages == [f"cpu: out of memory at micro-batch {n}; going on with {n // 2}" for n in (8, 4)]


def test_out_of_memory_midway() -> None:
    """Rows that fail after others went well are run again with them, from the original input."""

    def fail(x: torch.Tensor) -> Any:
        x.add_(1)
        raise MemoryError

    answer = run(Do(Changing(lambda x: x.add_(1), fail, lambda x: x.add_(1))), X)
    np.testing.assert_array_equal(answer.arrays[0], X + 1)
    assert answer.batch_size == 2


@pytest.mark.usefixtures("_no_collector")
def test_out_of_memory_frees_first() -> None:
    """The tensors of a failed attempt are gone before the next one starts."""
    net = Greedy(1)
    run(net, X, batch_size=8)
    assert net.sizes[:4] == [8, 4, 2, 1]
    assert net.alive == [0] * len(net.alive)


@pytest.mark.usefixtures("_no_collector")
def test_out_of_memory_frees_cycles() -> None:
    """They are gone even where the network caught the error and so tied a knot with its own frame."""
    net = Greedy(1)

    def catch(x: torch.Tensor) -> torch.Tensor:
        caught = []
        try:
            return net(x)
        except torch.OutOfMemoryError as error:
            caught.append(error)
            raise

    run(Do(catch), X, batch_size=4)
    assert net.alive == [0] * len(net.alive)


def test_out_of_memory_is_remembered() -> None:
    """A model goes on with what it could hold, for later chunks too."""
    net = Greedy(4)
    model = load(net)
    run(model, X, batch_size=8)
    del net.sizes[:]
    assert run(model, X, batch_size=8).batch_size == 4
    assert set(net.sizes) == {4}
    assert run(model, X, batch_size=2).batch_size == 2


def test_out_of_memory_is_remembered_by_the_shape_of_a_row() -> None:
    """Rows of another shape are not held back by what did not fit."""
    net = Greedy(4)
    model = load(net)
    run(model, X, batch_size=8)
    net.limit = 100
    assert run(model, X[:, :2], batch_size=8).batch_size == 8


def test_out_of_memory_bytes() -> None:
    """With the smaller micro-batch the bytes are those of a run that began with it."""
    torch.manual_seed(0)
    linear = nn.Linear(3, 5)
    tight = nn.Sequential(Greedy(4), linear)
    assert run(tight, X, batch_size=8).arrays[0].tobytes() == run(tight, X, batch_size=4).arrays[0].tobytes()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_out_of_memory_at_one_row(batch_size: int) -> None:
    """Where a single row does not fit, the error says so."""
    with pytest.raises(ChunkError, match=r"OutOfMemoryError: .* A single row does not fit into memory"):
        run(Greedy(0), X, batch_size=batch_size)


def test_out_of_memory_in_preprocess() -> None:
    """A preprocess that runs out of memory gets fewer rows, as they were."""

    def greedy(x: np.ndarray) -> np.ndarray:
        x += 1
        if len(x) > 2:
            raise MemoryError
        return x

    np.testing.assert_array_equal(result(nn.Identity(), X, batch_size=8, preprocess=greedy), X + 1)


def test_other_errors_are_looked_for_at_the_same_micro_batch() -> None:
    """A failure that is no lack of memory shrinks nothing: rows are halved to find those at fault, and the shape stays."""
    net = Greedy(0, lambda: RuntimeError("shapes do not match"))
    with pytest.raises(ChunkError, match="shapes do not match"):
        run(net, X)
    assert set(net.sizes) == {4}
