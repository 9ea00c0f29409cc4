"""What a task brought back: from shared memory, or by Dask's comms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distributed import Future

from daskinfer.core.arrays import Array
from daskinfer.core.chunks import Chunk, ChunkStats, RowFailure, StoredPart
from daskinfer.errors import SchedulerLost
from daskinfer.transport.shared_memory import Slot

FETCH_SECONDS = 60.0  # that an answer may take from its worker to this process; arbitrary


@dataclass(frozen=True)
class ChunkResult:
    """A chunk with its answer, (n, *shape) per output, none where it went into files; valid until the next is asked for.

    ``written`` is what was written of each target, ``failures`` the rows without an answer, in order, ``attempts`` how often
    it was tried.
    """

    chunk: Chunk
    arrays: Sequence[Array]
    stats: ChunkStats
    written: tuple[tuple[StoredPart, ...], ...] = ()
    failures: tuple[RowFailure, ...] = ()
    attempts: int = 1


@dataclass
class InFlightTask:
    """A task on its way: its chunks, its slot if any, and where in it each chunk's answer goes (None: it comes back).

    ``alone``: nothing else may be in flight on its device. ``submitted_at`` by ``time.monotonic()``; ``dependencies`` is what Dask
    brings with it. ``hung``: it took too long, and its worker was ended for it.
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
        """The rows, as messages name them."""
        return f"rows {self.chunks[0].start}:{self.chunks[-1].stop}"


class ResultNotReadyError(Exception):
    """An answer is there no more, or not yet; its task is still on its way."""


class DependencyLostError(Exception):
    """What Dask had to bring with a task ended with a worker."""


def fetch_results(future: Future, task: InFlightTask) -> list[ChunkResult]:
    """The chunks of a task that has ended, with their answers, wherever these are; or what it raised.

    Raises
    ------
    UnfetchedError, NeedsLostError
        Where a worker ended before the answer was here.
    SchedulerLost
        Where the task was cancelled.
    """
    blocks = _fetch_via_dask(future, task)
    noted = task.slot.read_header() if task.slot is not None else None
    found = []
    for i, (chunk, block) in enumerate(zip(task.chunks, noted or blocks or (), strict=True)):
        places = task.output_refs[i]
        if places is not None and task.slot is not None:
            arrays = [place.array(task.slot.pool.memory) for place in places]
        else:
            arrays = blocks[i].arrays if blocks else []
        found.append(ChunkResult(chunk, arrays, block.receipt, block.written, block.failures))
    return found


def _fetch_via_dask(future: Future, task: InFlightTask) -> Sequence[Any] | None:
    """What came back; nothing is fetched where all of the answer is in shared memory."""
    if future.status == "finished" and task.slot is not None and None not in task.output_refs and task.slot.has_header:
        return None
    if future.status == "cancelled":
        if future.client.status == "running" and any(needed.status != "finished" for needed in task.dependencies):
            raise DependencyLostError
        raise SchedulerLost(
            f"the task of {task.row_label} was cancelled, and not by this call: the scheduler was lost, or somebody did. "
            "Look whether the scheduler still runs, and repeat the call."
        )
    try:
        blocks: Sequence[Any] | None = future.result(timeout=FETCH_SECONDS)
    except TimeoutError as error:
        # Asked for while its worker ended: Dask would wait until it is computed again, here or nowhere.
        if future.status != "error":
            raise ResultNotReadyError from error
        raise
    return blocks
