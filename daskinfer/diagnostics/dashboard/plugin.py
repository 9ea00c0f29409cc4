"""The scheduler's side: a plugin that adds the page to its dashboard, and the handler that receives the runs' snapshots."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin

from daskinfer.diagnostics.dashboard.state import RunRegistry

HANDLER = "daskinfer_run"


class DashboardPlugin(SchedulerPlugin):  # type: ignore[misc]  # distributed ships no annotations
    """Shows the runs of all clients on a scheduler's dashboard, and receives their snapshots; a scheduler has one.

    The handler is installed in any case; if the page cannot be shown, it returns the reason.
    """

    name = "daskinfer-page"
    idempotent = True
    _registry = RunRegistry()  # replaced by the scheduler's own at its start

    async def start(self, scheduler: Scheduler) -> None:
        registry = self._registry = RunRegistry()
        problem = _install_page(scheduler, registry)

        def handle_message(message: Mapping[str, Any]) -> str:
            try:
                registry.update(message)
            except (TypeError, KeyError) as error:
                return f"the scheduler has another version of daskinfer: {error}"
            return problem

        scheduler.handlers[HANDLER] = handle_message

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Mark the runs of a client that left without ending them; a killed process cannot report it itself."""
        self._registry.mark_lost(client)


def dask_setup(scheduler: Scheduler) -> None:
    """Install the page before the first run: ``dask scheduler --preload daskinfer.diagnostics.dashboard.plugin``.

    The scheduler starts its plugins right after calling this.
    """
    scheduler.add_plugin(DashboardPlugin(), idempotent=True)


def _install_page(scheduler: Scheduler, registry: RunRegistry) -> str:
    """Add the page to the dashboard; return the reason if that is not possible, else an empty string."""
    if "distributed.dashboard.scheduler" not in sys.modules:  # a dashboard that serves pages has imported it
        return "the scheduler has no bokeh, or no dashboard"
    try:
        from daskinfer.diagnostics.dashboard import page

        return "" if page.install_page(scheduler, registry) else "the scheduler has no dashboard"
    except Exception as error:  # other versions of bokeh and distributed have other internals
        return f"{type(error).__name__}: {error}"
