"""One device's part of the window, and what is in flight there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from distributed import Future

from daskinfer.core.chunks import Chunk
from daskinfer.execution.results import InFlightTask
from daskinfer.transport.row_sources import Task
from daskinfer.transport.shared_memory import SharedMemoryPool, Slot


class TaskFactory(Protocol):
    """Makes tasks: ``TaskBuilder.build_task``."""

    def __call__(
        self, chunks: Sequence[Chunk], slot: Slot | None, workers: Sequence[str], *, reads_process_memory: bool
    ) -> tuple[Task, list[Future]]: ...


@dataclass
class DeviceQueue:
    """One device's part of the window.

    ``name`` is the device's, ``restriction`` are the keywords of ``client.submit`` that keep a task on it, ``pool`` is None
    where its worker shares no memory with this process; ``reads_process_memory``: it reads this process's own. ``nanny`` is the address of
    who brings a worker of others back; empty: nobody, or under its resource. ``last_response`` is when it answered last, or
    was away, ``restarted_at`` when its process was ended for a fault last; ``lost``: its device is given up.
    """

    device: int
    name: str
    kind: str
    restriction: dict[str, Any]
    max_in_flight: int
    pool: SharedMemoryPool | None
    reads_process_memory: bool = False
    nanny: str = ""
    tasks: dict[Future, InFlightTask] = field(default_factory=dict)
    last_response: float = 0.0
    missing_since: float | None = None
    restarted_at: float = 0.0
    lost: bool = False

    @property
    def workers(self) -> Sequence[str]:
        """Addresses that a task is kept on; none where it is by a resource."""
        found: Sequence[str] = self.restriction.get("workers", ())
        return found

    @property
    def is_full(self) -> bool:
        """Whether no task more may be in flight."""
        alone = any(task.alone for task in self.tasks.values())
        return self.lost or self.is_waiting_for_worker or alone or len(self.tasks) >= self.max_in_flight

    @property
    def is_waiting_for_worker(self) -> bool:
        """Whether there is no address for a task: its worker is away, and will have another one."""
        return bool(self.workers) and self.missing_since is not None and not self.lost

    def find_hung_task(self, chunk_timeout: float | None, now: float) -> InFlightTask | None:
        """The task that has taken too long: the oldest in flight, since tasks are computed as they come."""
        if chunk_timeout is None or self.missing_since is not None:
            return None
        if len(self.get_pending_futures()) < len(self.tasks):  # when it answered last is known once that has been used
            return None
        # A task of several chunks may take no longer than one: they go together only where they are short (``dealer``).
        task = next((self.tasks[future] for future in self.get_pending_futures()), None)
        if task is None or task.hung or now - max(task.submitted_at, self.last_response) <= chunk_timeout:
            return None
        return task

    def get_pending_futures(self) -> list[Future]:
        """What has not ended, in the order in which it was sent; what has may wait to be used for long."""
        return [future for future in self.tasks if future.status in ("pending", "lost")]

    def find_worker(self, live_workers: Mapping[str, Mapping[str, Any]]) -> str | None:
        """The address of its worker among those that are there; None: it is away."""
        if self.workers:
            known = (address for address in self.workers if address in live_workers)
            back = (a for a, info in live_workers.items() if self.nanny and info.get("nanny") == self.nanny)
            return next(known, None) or next(back, None)
        wanted = set(self.restriction["resources"])
        return next((a for a, info in live_workers.items() if wanted <= set(info.get("resources", {}))), None)
