"""The ways in which rows of the client's memory reach one worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from distributed import Client, Future

from daskinfer.core.arrays import Array
from daskinfer.transport.process_memory import ProcessMemoryArray, is_readable_by_peers
from daskinfer.transport.row_sources import (
    InlineRows,
    ProcessMemoryRows,
    RowSource,
    RowTransferError,
    ScatteredRows,
    SharedMemoryRows,
)
from daskinfer.transport.shared_memory import Slot

MAX_INLINE_NBYTES = 64 << 10  # rows that travel in a task at most, where no memory is shared; arbitrary


def is_shareable(array: Any) -> bool:
    """Whether rows of an array can stay where they are, for a worker that reads this process's memory."""
    return isinstance(array, np.ndarray) and array.flags.c_contiguous and is_readable_by_peers(array)


@dataclass(frozen=True)
class RowRouter:
    """How rows of this process reach one worker. First match wins:

    1. The worker ``reads_process_memory`` this process's memory, and the rows lie there one after the other, and can be lent: they stay.
    2. There is a ``slot`` with room: they are copied into it.
    3. There is a ``client``, and they are large: by Dask's comms to one of ``workers`` (addresses; none: to any), through
       the scheduler unless the client reaches workers directly. What Dask has to bring with the task is ``dependencies``.
    4. They travel in the task.
    """

    client: Client | None = None
    slot: Slot | None = None
    workers: Sequence[str] = ()
    reads_process_memory: bool = False
    dependencies: list[Future] = field(default_factory=list)

    def send_rows(self, array: Array) -> RowSource:
        """Send rows on their way; an array that stays has to be there until its task has ended."""
        if self.reads_process_memory and is_shareable(array):
            return ProcessMemoryRows(ProcessMemoryArray.from_array(array))
        if self.slot is not None and (place := self.slot.allocate(array.shape, array.dtype)) is not None:
            place.get_array(self.slot.pool.memory)[...] = array
            return SharedMemoryRows(place)
        array = np.asarray(array, order="C")  # np.ascontiguousarray would make a number 1-d
        if self.client is None or array.nbytes <= MAX_INLINE_NBYTES:
            return InlineRows(array)
        try:
            return self.add_dependency(self.client.scatter(array, workers=list(self.workers) or None, hash=False))
        except (KeyError, OSError, TimeoutError) as error:  # the scheduler does not know it any more, or it knows it still
            raise RowTransferError(self.workers) from error

    def add_dependency(self, future: Future) -> RowSource:
        """What Dask brings, once for all who ask for it."""
        if future not in self.dependencies:
            self.dependencies.append(future)
        return ScatteredRows(self.dependencies.index(future))
