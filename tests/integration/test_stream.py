"""stream: blocks in order, a bounded look-ahead, and nothing left behind however it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client

import daskinfer as di
from daskinfer.scheduling import chunking
from daskinfer.transport import shared_memory
from tests.conftest import wait_until
from tests.unit.execution.test_window import watch_scheduler

N_ROWS = 2000
LOOK_AHEAD = 2 * 3 * 2 * 8  # rows: twice three tasks of at most 8 rows on each of two devices


def make_model() -> torch.nn.Module:
    """Make a small random model of (n, 5) -> (n, 3)."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def make_rows(n: int) -> np.ndarray[Any, Any]:
    """Make random rows of 5 numbers."""
    return np.random.default_rng(0).normal(size=(n, 5)).astype(np.float32)


@pytest.fixture(params=["workers", "inline"])
def anywhere(request: pytest.FixtureRequest, cluster_client: Client) -> dict[str, Any]:
    """Keywords that select where to compute: on workers, and in this process."""
    if request.param == "inline":
        return {"devices": "inline"}
    return {"client": cluster_client}


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit tasks to 8 rows of 8 bytes, input and output together."""
    monkeypatch.setattr(chunking, "CHUNK_NBYTES", 64)


@pytest.fixture
def counted(small_tasks: None, tmp_path: Path) -> Iterator[Any]:
    """A function that creates a file for each row that it gets; the dummy rows all share one."""

    def model(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        for row in batch:
            (tmp_path / str(int(row))).touch()
        return batch

    return model


def is_idle(client: Client) -> bool:
    """Return whether the cluster holds no task of a call."""
    return not any(str(key).startswith("infer-") for key in client.cluster.scheduler.tasks)


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_equals_a_plain_loop(anywhere: dict[str, Any], n: int) -> None:
    """The concatenated blocks equal the output of a plain torch loop."""
    x, model = make_rows(n), make_model()
    blocks = list(di.stream(model, x, batch_size=16, **anywhere))
    with torch.inference_mode():
        np.testing.assert_allclose(np.concatenate(blocks), model(torch.from_numpy(x)).numpy(), rtol=1e-5, atol=1e-6)


def test_blocks_are_many_and_in_order(anywhere: dict[str, Any], small_tasks: None) -> None:
    """The output arrives in many blocks, each of which continues the one before."""
    x = np.arange(N_ROWS, dtype=np.float32)
    blocks = list(di.stream(np.negative, x, batch_size=4, **anywhere))
    assert len(blocks) > N_ROWS / 10
    np.testing.assert_array_equal(np.concatenate(blocks), -x)


def test_blocks_belong_to_the_caller(anywhere: dict[str, Any], small_tasks: None) -> None:
    """A block may be kept or written to: it shares no memory with later blocks or with the input."""
    x = np.arange(100, dtype=np.float32)
    kept = []
    for block in di.stream(lambda batch: batch, x, batch_size=4, **anywhere):
        block += 1
        kept.append(block)
    np.testing.assert_array_equal(np.concatenate(kept), np.arange(1, 101))
    np.testing.assert_array_equal(x, np.arange(100))


def test_structures_and_tensors(anywhere: dict[str, Any]) -> None:
    """A block has the structure of the model's output, with tensors if the input was one."""
    x = torch.arange(50, dtype=torch.float32)
    blocks = list(di.stream(lambda batch: {"twice": 2 * batch, "same": (batch,)}, x, **anywhere))
    assert torch.equal(torch.cat([block["twice"] for block in blocks]), 2 * x)
    assert torch.equal(torch.cat([block["same"][0] for block in blocks]), x)


def test_a_dask_arrays_chunks_are_the_blocks(anywhere: dict[str, Any]) -> None:
    """The blocks are the chunks of a dask array; chunks without rows yield none."""
    x = da.arange(30, chunks=((10, 0, 15, 5),), dtype=np.float32)
    assert [len(block) for block in di.stream(np.negative, x, **anywhere)] == [10, 15, 5]


def test_no_rows_no_block(anywhere: dict[str, Any]) -> None:
    """An input without rows yields no block."""
    assert list(di.stream(make_model(), make_rows(0), **anywhere)) == []


def test_errors_are_raised_at_once() -> None:
    """What cannot work is refused when stream is called, not when the first block is requested."""
    with pytest.raises(di.DaskInferError, match="tpu"):
        di.stream(make_model(), make_rows(10), devices="tpu")


def test_nothing_is_computed_before_the_first_block(anywhere: dict[str, Any], counted: Any, tmp_path: Path) -> None:
    """If no block is requested, nothing starts."""
    blocks = di.stream(counted, np.arange(1, N_ROWS + 1, dtype=np.float32), output=np.empty(0, "float32"), **anywhere)
    assert not list(tmp_path.iterdir())
    blocks.close()


def test_the_look_ahead_is_bounded(cluster_client: Client, counted: Any, tmp_path: Path) -> None:
    """While no block is requested, the devices pause after a bounded number of rows; then they continue."""
    x = np.arange(N_ROWS, dtype=np.float32)
    blocks = di.stream(counted, x, client=cluster_client, batch_size=1, output=np.empty(0, "float32"))
    first = next(blocks)
    wait_until(lambda: not any(cluster_client.processing().values()))
    assert len(list(tmp_path.iterdir())) <= len(first) + LOOK_AHEAD + 8
    np.testing.assert_array_equal(np.concatenate([first, *blocks]), x)
    assert len(list(tmp_path.iterdir())) == N_ROWS


def test_in_this_process_nothing_is_ahead(counted: Any, tmp_path: Path) -> None:
    """Inline, a block is computed when it is requested."""
    blocks = di.stream(counted, np.arange(N_ROWS, dtype=np.float32), devices="inline", batch_size=1)
    next(blocks)
    assert len(list(tmp_path.iterdir())) <= 8
    blocks.close()


def test_closing_early_cancels_the_rest(cluster_client: Client, counted: Any, tmp_path: Path) -> None:
    """After close() no task is left, few rows were computed, no memory is held, and the cluster serves the next call."""
    x = np.arange(N_ROWS, dtype=np.float32)
    blocks = di.stream(counted, x, client=cluster_client, batch_size=1, output=np.empty(0, "float32"))
    with watch_scheduler(cluster_client) as watch:
        first = next(blocks)
        blocks.close()
        wait_until(lambda: is_idle(cluster_client))
    assert len(list(tmp_path.iterdir())) <= len(first) + LOOK_AHEAD + 8
    assert not watch.in_flight
    pool = shared_memory._cached_pools.get(cluster_client)
    assert pool is None or pool.is_idle
    np.testing.assert_array_equal(di.predict(np.negative, x, client=cluster_client), -x)


def test_leaving_the_loop_closes(cluster_client: Client, counted: Any, tmp_path: Path) -> None:
    """Leaving the loop needs no close()."""
    x = np.arange(N_ROWS, dtype=np.float32)
    for _ in di.stream(counted, x, client=cluster_client, batch_size=1, output=np.empty(0, "float32")):
        break
    wait_until(lambda: is_idle(cluster_client))
    assert len(list(tmp_path.iterdir())) < N_ROWS


def test_ctrl_c_raises_interrupted() -> None:
    """Ctrl-C while a block is computed ends the stream as it ends predict; the blocks before it were yielded."""

    def interrupt(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if 500 in batch:
            raise KeyboardInterrupt
        return 2 * batch

    blocks: list[np.ndarray[Any, Any]] = []
    keywords: dict[str, Any] = {"devices": "inline", "batch_size": 8, "output": np.empty(0)}
    with pytest.raises(di.Interrupted, match=r"^Ctrl-C ended the call before all rows had an output"):
        blocks.extend(di.stream(interrupt, np.arange(2000.0), **keywords))
    np.testing.assert_array_equal(np.concatenate(blocks), 2 * np.arange(sum(map(len, blocks))))


def test_errors_name_rows(anywhere: dict[str, Any]) -> None:
    """The blocks before the failing rows are yielded, then the error names those rows."""

    def picky(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if batch.max() >= 30:
            raise ArithmeticError("too large")
        return batch

    blocks = di.stream(picky, da.arange(60, chunks=10, dtype=np.float32), batch_size=10, **anywhere)
    received = []
    with pytest.raises(di.DaskInferError, match=r"rows \d+:\d+ on cpu failed: ArithmeticError: too large"):
        received.extend(blocks)
    assert len(received) <= 3


def test_two_streams_of_one_client(cluster_client: Client, small_tasks: None) -> None:
    """Streams that are consumed in turn do not disturb each other."""
    x = np.arange(200, dtype=np.float32)
    both = [di.stream(model, x, client=cluster_client, batch_size=4) for model in (np.negative, np.square)]
    pairs = list(zip(*both, strict=False))  # up to the shorter one's end
    negative = np.concatenate([block for block, _ in pairs])
    square = np.concatenate([block for _, block in pairs])
    np.testing.assert_array_equal(negative, -x[: len(negative)])
    np.testing.assert_array_equal(square, x[: len(square)] ** 2)
    for blocks in both:
        blocks.close()
