"""One device's part of the window, and what is in flight there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed import Future

from daskinfer.parts import Task
from daskinfer.records import Chunk
from daskinfer.transport import Arena, Slot

# Makes a task of chunks, rows in memory put into the slot or sent to workers, and names the futures that Dask has to bring.
Feed = Callable[[Sequence[Chunk], Slot | None, Sequence[str]], tuple[Task, list[Future]]]


@dataclass
class Lane:
    """One device's part of the window.

    ``restriction`` are the keywords of ``client.submit`` that keep a task on the device, ``arena`` is None where its worker
    shares no memory with this process.
    """

    device: int
    kind: str
    restriction: dict[str, Any]
    n_places: int
    arena: Arena | None
    tasks: dict[Future, InFlight] = field(default_factory=dict)

    @property
    def workers(self) -> Sequence[str]:
        """Addresses that a task is kept on; none where it is by a resource."""
        found: Sequence[str] = self.restriction.get("workers", ())
        return found

    @property
    def full(self) -> bool:
        """Whether no task more may be in flight."""
        return len(self.tasks) >= self.n_places or (self.arena is not None and not self.arena.free)


@dataclass(frozen=True)
class InFlight:
    """A task on its way: its chunks, its slot if any, and where in it each chunk's answer goes (None: it comes back)."""

    chunks: tuple[Chunk, ...]
    slot: Slot | None
    places: tuple[Any, ...]

    @property
    def rows(self) -> str:
        """The rows, as messages name them."""
        return f"rows {self.chunks[0].start}:{self.chunks[-1].stop}"
