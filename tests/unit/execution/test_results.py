"""Fetching the results of tasks, and what is raised if they are lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from daskinfer.core.chunks import Chunk, ChunkResult, ChunkStats
from daskinfer.errors import SchedulerLost
from daskinfer.execution.results import DependencyLostError, InFlightTask, ResultNotReadyError, fetch_results

CHUNK = Chunk(0, 0, 3)


class FakeFuture:
    """A future with a status, and a result that it returns or raises."""

    def __init__(self, status: str, result: Any = None, client: str = "running") -> None:
        self.status, self._result, self.client = status, result, SimpleNamespace(status=client)

    def result(self, timeout: float) -> Any:
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


def make_task(*dependencies: FakeFuture) -> InFlightTask:
    """Make a task of one chunk, without shared memory."""
    return InFlightTask((CHUNK,), None, (None,), False, 0.0, dependencies)


def test_results_that_come_through_dask() -> None:
    """Without shared memory the arrays are those that Dask brought."""
    stats = ChunkStats(0, 3, "cpu:0", "", 3, 1.0, "tcp://a")
    (result,) = fetch_results(FakeFuture("finished", [ChunkResult(CHUNK, [np.arange(3)], stats)]), make_task())
    assert (result.chunk, result.stats, result.attempts) == (CHUNK, stats, 1)
    np.testing.assert_array_equal(result.arrays[0], np.arange(3))


def test_what_the_task_raised_is_raised() -> None:
    """A task's own exception passes, including a timeout of its model."""
    with pytest.raises(TimeoutError, match="the model's"):
        fetch_results(FakeFuture("error", TimeoutError("the model's")), make_task())


def test_a_result_that_never_comes() -> None:
    """Dask would wait forever if a worker dies while its result is fetched; ``fetch_results`` does not."""
    with pytest.raises(ResultNotReadyError, match=r"^$"):
        fetch_results(FakeFuture("lost", TimeoutError()), make_task())


@pytest.mark.parametrize(
    ("dependencies", "client", "error"),
    [
        ([], "running", SchedulerLost),
        ([FakeFuture("finished")], "running", SchedulerLost),
        ([FakeFuture("finished"), FakeFuture("cancelled")], "running", DependencyLostError),
        ([FakeFuture("cancelled")], "connecting", SchedulerLost),
    ],
)
def test_a_task_that_was_cancelled(dependencies: list[FakeFuture], client: str, error: type[Exception]) -> None:
    """By another client, with its scheduler, or because a dependency was lost with a worker: only the last runs again."""
    with pytest.raises(error, match=r"^$|the task for rows 0:3 was cancelled externally \(scheduler lost"):
        fetch_results(FakeFuture("cancelled", client=client), make_task(*dependencies))
