"""Running out of memory: the batch size is halved, memory is freed first, and the model remembers."""

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
    """A model that writes into its input, then runs out of memory above ``limit`` rows."""

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
    """Let reference counting alone free memory."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_memory(error: str, caplog: pytest.LogCaptureFixture) -> None:
    """Out of memory, the batch size is halved until it fits, and the same rows run again."""
    net = Greedy(3, ERRORS[error])
    with caplog.at_level(logging.WARNING, "daskinfer.worker.model_runner"):
        output = run(net, X, batch_size=8)
    np.testing.assert_array_equal(output.arrays[0], (X + 1) * 2)
    assert (output.batch_size, net.sizes[:3]) == (2, [8, 4, 2])
    assert caplog.messages == [f"cpu: out of memory at batch_size={n}; continuing with {n // 2}" for n in (8, 4)]


def test_out_of_memory_midway() -> None:
    """If later rows of a chunk fail, the whole chunk runs again from the original input."""

    def fail(x: torch.Tensor) -> Any:
        x.add_(1)
        raise MemoryError

    output = run(Do(Changing(lambda x: x.add_(1), fail, lambda x: x.add_(1))), X)
    np.testing.assert_array_equal(output.arrays[0], X + 1)
    assert output.batch_size == 2


@pytest.mark.usefixtures("_no_collector")
def test_out_of_memory_frees_first() -> None:
    """The tensors of a failed attempt are freed before the next one starts."""
    net = Greedy(1)
    run(net, X, batch_size=8)
    assert net.sizes[:4] == [8, 4, 2, 1]
    assert net.alive == [0] * len(net.alive)


@pytest.mark.usefixtures("_no_collector")
def test_out_of_memory_frees_cycles() -> None:
    """They are freed even if the model caught the error, and so made a reference cycle with its own frame."""
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
    """Later chunks use the batch size that fitted, too."""
    net = Greedy(4)
    model = load(net)
    run(model, X, batch_size=8)
    del net.sizes[:]
    assert run(model, X, batch_size=8).batch_size == 4
    assert set(net.sizes) == {4}
    assert run(model, X, batch_size=2).batch_size == 2


def test_out_of_memory_is_remembered_by_the_shape_of_a_row() -> None:
    """A batch size that did not fit does not limit rows of another shape."""
    net = Greedy(4)
    model = load(net)
    run(model, X, batch_size=8)
    net.limit = 100
    assert run(model, X[:, :2], batch_size=8).batch_size == 8


def test_out_of_memory_bytes() -> None:
    """With the reduced batch size the bytes are those of a run that began with it."""
    torch.manual_seed(0)
    linear = nn.Linear(3, 5)
    tight = nn.Sequential(Greedy(4), linear)
    assert run(tight, X, batch_size=8).arrays[0].tobytes() == run(tight, X, batch_size=4).arrays[0].tobytes()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_out_of_memory_at_one_row(batch_size: int) -> None:
    """If a single row does not fit, the error says so."""
    with pytest.raises(ChunkError, match=r"OutOfMemoryError: .* A single row does not fit into memory"):
        run(Greedy(0), X, batch_size=batch_size)


def test_out_of_memory_in_preprocess() -> None:
    """A preprocess that runs out of memory gets fewer rows, unchanged."""

    def greedy(x: np.ndarray) -> np.ndarray:
        x += 1
        if len(x) > 2:
            raise MemoryError
        return x

    np.testing.assert_array_equal(result(nn.Identity(), X, batch_size=8, preprocess=greedy), X + 1)


def test_other_errors_do_not_reduce_the_batch_size() -> None:
    """For any other error the bad rows are found by bisection, and the shape of the micro-batch stays."""
    net = Greedy(0, lambda: RuntimeError("shapes do not match"))
    with pytest.raises(ChunkError, match="shapes do not match"):
        run(net, X)
    assert set(net.sizes) == {4}
