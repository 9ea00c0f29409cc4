"""The ways in which rows of the client's memory reach one worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from distributed import Client, Future

from daskinfer.core.arrays import Array
from daskinfer.transport.process_memory import Borrowed, lendable
from daskinfer.transport.row_sources import Brought, FromClient, FromSlot, Part, Sent, UnsentError
from daskinfer.transport.shared_memory import Slot

SENT_NBYTES = 64 << 10  # rows that travel in a task at most, where no memory is shared; arbitrary


def can_stay(array: Any) -> bool:
    """Whether rows of an array can stay where they are, for a worker that reads this process's memory."""
    return isinstance(array, np.ndarray) and array.flags.c_contiguous and lendable(array)


@dataclass(frozen=True)
class Way:
    """How rows of this process reach one worker. First match wins:

    1. The worker ``reads`` this process's memory, and the rows lie there one after the other, and can be lent: they stay.
    2. There is a ``slot`` with room: they are copied into it.
    3. There is a ``client``, and they are large: by Dask's comms to one of ``workers`` (addresses; none: to any), through
       the scheduler unless the client reaches workers directly. What Dask has to bring with the task is ``brought``.
    4. They travel in the task.
    """

    client: Client | None = None
    slot: Slot | None = None
    workers: Sequence[str] = ()
    reads: bool = False
    brought: list[Future] = field(default_factory=list)

    def take(self, array: Array) -> Part:
        """Send rows on their way; an array that stays has to be there until its task has ended."""
        if self.reads and can_stay(array):
            return FromClient(Borrowed.of(array))
        if self.slot is not None and (place := self.slot.place(array.shape, array.dtype)) is not None:
            place.array(self.slot.arena.memory)[...] = array
            return FromSlot(place)
        array = np.asarray(array, order="C")  # np.ascontiguousarray would make a number 1-d
        if self.client is None or array.nbytes <= SENT_NBYTES:
            return Sent(array)
        try:
            return self.bring(self.client.scatter(array, workers=list(self.workers) or None, hash=False))
        except (KeyError, OSError, TimeoutError) as error:  # the scheduler does not know it any more, or it knows it still
            raise UnsentError(self.workers) from error

    def bring(self, future: Future) -> Part:
        """What Dask brings, once for all who ask for it."""
        if future not in self.brought:
            self.brought.append(future)
        return Brought(self.brought.index(future))
