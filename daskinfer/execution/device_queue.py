"""One device's part of the task window: its worker, its limits, and the tasks in flight there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed import Future

from daskinfer.execution.results import InFlightTask
from daskinfer.transport.shared_memory import SharedMemoryPool


@dataclass
class DeviceQueue:
    """One device's part of the window.

    ``device`` is the device's index in the plan, ``name`` its name. ``restriction`` holds the keywords of ``client.submit``
    that keep a task on it, ``max_in_flight`` is the most tasks at a time. ``pool`` is None if its worker shares no memory
    with this process; ``reads_process_memory``: its worker reads this process's own memory. ``nanny`` is the address of the
    nanny that restarts an external worker; empty if it has none, or if tasks are placed by resource. ``last_response`` is
    when its worker last responded or returned, ``restarted_at`` when its process was last killed because of a fault, both by
    ``time.monotonic()``. ``away``: its worker has died and is expected back, as the listeners know. ``lost``: the call
    continues without this device.
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
    away: bool = False
    lost: bool = False

    @property
    def workers(self) -> Sequence[str]:
        """Addresses of the workers that may run its tasks; empty if tasks are placed by resource."""
        addresses: Sequence[str] = self.restriction.get("workers", ())
        return addresses

    @property
    def is_full(self) -> bool:
        """Whether no further task may be submitted."""
        has_isolated_task = any(task.alone for task in self.tasks.values())
        return self.lost or self.is_waiting_for_worker or has_isolated_task or len(self.tasks) >= self.max_in_flight

    @property
    def is_waiting_for_worker(self) -> bool:
        """Whether tasks have no address to go to: the worker is missing, and returns under another one."""
        return bool(self.workers) and self.missing_since is not None and not self.lost

    def find_hung_task(self, chunk_timeout: float | None, now: float) -> InFlightTask | None:
        """Return the task that took too long, if any: the oldest in flight, since tasks are computed in order."""
        if chunk_timeout is None or self.missing_since is not None:
            return None
        if len(self.get_pending_futures()) < len(self.tasks):  # a result waits to be used, and then updates last_response
            return None
        # The limit of one chunk holds for a task of several: the balancer puts only short ones together.
        task = next((self.tasks[future] for future in self.get_pending_futures()), None)
        if task is None or task.hung or now - max(task.submitted_at, self.last_response) <= chunk_timeout:
            return None
        return task

    def get_pending_futures(self) -> list[Future]:
        """Return the tasks that have not ended, in the order of submission; one that ended may wait long to be used."""
        return [future for future in self.tasks if future.status in ("pending", "lost")]

    def find_worker(self, live_workers: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Return the address of its worker among those that are alive; None if it is missing."""
        if self.workers:
            known = (address for address in self.workers if address in live_workers)
            restarted = (a for a, info in live_workers.items() if self.nanny and info.get("nanny") == self.nanny)
            return next(known, None) or next(restarted, None)
        required = set(self.restriction["resources"])
        return next((a for a, info in live_workers.items() if required <= set(info.get("resources", {}))), None)
