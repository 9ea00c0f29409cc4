"""One device's part of the window, and what is in flight there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from distributed import Future

from daskinfer.core.chunks import Chunk
from daskinfer.execution.results import InFlight
from daskinfer.transport.row_sources import Task
from daskinfer.transport.shared_memory import Arena, Slot


class Feed(Protocol):
    """Makes tasks: ``Feeder.task``."""

    def __call__(
        self, chunks: Sequence[Chunk], slot: Slot | None, workers: Sequence[str], *, reads: bool
    ) -> tuple[Task, list[Future]]: ...


@dataclass
class Lane:
    """One device's part of the window.

    ``name`` is the device's, ``restriction`` are the keywords of ``client.submit`` that keep a task on it, ``arena`` is None
    where its worker shares no memory with this process; ``reads``: it reads this process's own. ``nanny`` is the address of
    who brings a worker of others back; empty: nobody, or under its resource. ``quiet_since`` is when it answered last, or
    was away, ``replaced_at`` when its process was ended for a fault last; ``gone``: its device is given up.
    """

    device: int
    name: str
    kind: str
    restriction: dict[str, Any]
    n_places: int
    arena: Arena | None
    reads: bool = False
    nanny: str = ""
    tasks: dict[Future, InFlight] = field(default_factory=dict)
    quiet_since: float = 0.0
    away_since: float | None = None
    replaced_at: float = 0.0
    gone: bool = False

    @property
    def workers(self) -> Sequence[str]:
        """Addresses that a task is kept on; none where it is by a resource."""
        found: Sequence[str] = self.restriction.get("workers", ())
        return found

    @property
    def full(self) -> bool:
        """Whether no task more may be in flight."""
        alone = any(task.alone for task in self.tasks.values())
        return self.gone or self.nowhere or alone or len(self.tasks) >= self.n_places

    @property
    def nowhere(self) -> bool:
        """Whether there is no address for a task: its worker is away, and will have another one."""
        return bool(self.workers) and self.away_since is not None and not self.gone

    def hangs(self, chunk_timeout: float | None, now: float) -> InFlight | None:
        """The task that has taken too long: the oldest in flight, since tasks are computed as they come."""
        if chunk_timeout is None or self.away_since is not None:
            return None
        if len(self.unanswered()) < len(self.tasks):  # when it answered last is known once that has been used
            return None
        # A task of several chunks may take no longer than one: they go together only where they are short (``dealer``).
        task = next((self.tasks[future] for future in self.unanswered()), None)
        if task is None or task.hung or now - max(task.submitted, self.quiet_since) <= chunk_timeout:
            return None
        return task

    def unanswered(self) -> list[Future]:
        """What has not ended, in the order in which it was sent; what has may wait to be used for long."""
        return [future for future in self.tasks if future.status in ("pending", "lost")]

    def worker_of(self, there: Mapping[str, Mapping[str, Any]]) -> str | None:
        """The address of its worker among those that are there; None: it is away."""
        if self.workers:
            known = (address for address in self.workers if address in there)
            back = (a for a, info in there.items() if self.nanny and info.get("nanny") == self.nanny)
            return next(known, None) or next(back, None)
        wanted = set(self.restriction["resources"])
        return next((a for a, info in there.items() if wanted <= set(info.get("resources", {}))), None)
