"""Tasks in flight, and how their results are fetched: from shared memory, or through Dask's comms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from distributed import Future

from daskinfer.core.arrays import Array
from daskinfer.core.chunks import Chunk, ChunkResult
from daskinfer.errors import SchedulerLost
from daskinfer.transport.shared_memory import Slot

FETCH_SECONDS = 60.0  # that results may take from their worker to this process; arbitrary


@dataclass
class InFlightTask:
    """A task in flight: its chunks, its slot if any, and where in the slot the outputs of each chunk go.

    An entry of ``output_refs`` is None if the outputs of that chunk come back through Dask. ``alone``: nothing else may be
    in flight on its device. ``submitted_at`` is by ``time.monotonic()``; ``dependencies`` are the futures whose results Dask
    brings to the worker. ``hung``: it took too long, and its worker was killed for it.
    """

    chunks: tuple[Chunk, ...]
    slot: Slot | None
    output_refs: tuple[Any, ...]
    alone: bool
    submitted_at: float
    dependencies: tuple[Future, ...] = ()
    hung: bool = False

    @property
    def row_label(self) -> str:
        """The rows of the task, as messages name them."""
        return f"rows {self.chunks[0].start}:{self.chunks[-1].stop}"


class ResultNotReadyError(Exception):
    """A result is not available any more, or not yet; its task is still in flight."""


class DependencyLostError(Exception):
    """A dependency of a task was lost with the worker that held it."""


def fetch_results(future: Future, task: InFlightTask) -> list[ChunkResult]:
    """Return the results of a task that has ended, with their arrays from wherever they are; or raise what it raised.

    Raises
    ------
    ResultNotReadyError, DependencyLostError
        If a worker died before its results were fetched, or with a dependency of the task.
    SchedulerLost
        If the task was cancelled.
    """
    results = _fetch_via_dask(future, task)
    header = task.slot.read_header() if task.slot is not None else None
    fetched = []
    for i, result in enumerate(header or results or ()):
        refs = task.output_refs[i]
        if refs is not None and task.slot is not None:
            arrays: Sequence[Array] = [ref.get_array(task.slot.pool.memory) for ref in refs]
        else:
            arrays = results[i].arrays if results else []
        fetched.append(replace(result, arrays=arrays))
    return fetched


def _fetch_via_dask(future: Future, task: InFlightTask) -> Sequence[ChunkResult] | None:
    """Return what the task returned through Dask; None, without fetching, if all of it is in shared memory."""
    in_memory = task.slot is not None and None not in task.output_refs and task.slot.has_header
    if future.status == "finished" and in_memory:
        return None
    if future.status == "cancelled":
        if future.client.status == "running" and any(d.status != "finished" for d in task.dependencies):
            raise DependencyLostError
        raise SchedulerLost(
            f"the task for {task.row_label} was cancelled externally (scheduler lost, or cancelled by another client). "
            "Check that the scheduler is running, and repeat the call."
        )
    try:
        results: Sequence[ChunkResult] | None = future.result(timeout=FETCH_SECONDS)
    except TimeoutError as error:
        # Requested while its worker died: Dask would wait until it is computed again, perhaps forever.
        if future.status != "error":
            raise ResultNotReadyError from error
        raise
    return results
