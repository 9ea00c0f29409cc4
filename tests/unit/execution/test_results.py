"""What a task brought back, and what is said where it is lost on the way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from daskinfer.core.chunks import Chunk, ChunkStats
from daskinfer.errors import SchedulerLost
from daskinfer.execution.device_queue import InFlightTask
from daskinfer.execution.results import DependencyLostError, ResultNotReadyError, fetch_results
from daskinfer.worker.task import ComputedChunk

CHUNK = Chunk(0, 0, 3, 0)


class Answer:
    """A future with a status, and what it gives or raises."""

    def __init__(self, status: str, result: Any = None, client: str = "running") -> None:
        self.status, self._result, self.client = status, result, SimpleNamespace(status=client)

    def result(self, timeout: float) -> Any:
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


def task(*needs: Answer) -> InFlightTask:
    """A task without shared memory, of one chunk."""
    return InFlightTask((CHUNK,), None, (None,), False, 0.0, needs)


def test_an_answer_that_came_back() -> None:
    """Without shared memory the arrays are those that Dask brought."""
    receipt = ChunkStats(0, 3, "cpu:0", "", 3, 1.0, "tcp://a")
    (found,) = fetch_results(Answer("finished", [ComputedChunk([np.arange(3)], receipt)]), task())
    assert (found.chunk, found.stats, found.attempts) == (CHUNK, receipt, 1)
    np.testing.assert_array_equal(found.arrays[0], np.arange(3))


def test_what_the_task_raised_is_raised() -> None:
    """A task's own exception passes, a timeout of its network's included."""
    with pytest.raises(TimeoutError, match="the network's"):
        fetch_results(Answer("error", TimeoutError("the network's")), task())


def test_an_answer_that_does_not_come() -> None:
    """Dask waits for good where a worker ended while its answer was asked for; here nobody does."""
    with pytest.raises(ResultNotReadyError, match=r"^$"):
        fetch_results(Answer("lost", TimeoutError()), task())


@pytest.mark.parametrize(
    ("needs", "client", "error"),
    [
        ([], "running", SchedulerLost),
        ([Answer("finished")], "running", SchedulerLost),
        ([Answer("finished"), Answer("cancelled")], "running", DependencyLostError),
        ([Answer("cancelled")], "connecting", SchedulerLost),
    ],
)
def test_a_task_that_was_cancelled(needs: list[Answer], client: str, error: type[Exception]) -> None:
    """By others, with its scheduler, or since what it needs ended with a worker: only the last is run again."""
    with pytest.raises(error, match=r"^$|the task of rows 0:3 was cancelled, and not by this call"):
        fetch_results(Answer("cancelled", client=client), task(*needs))
