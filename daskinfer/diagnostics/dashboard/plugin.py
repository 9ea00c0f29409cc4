"""What is set up at a scheduler, by itself or by a client: the page on its dashboard, and who takes what is told of runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin

from daskinfer.diagnostics.dashboard.state import RunRegistry

HANDLER = "daskinfer_run"


class DashboardPlugin(SchedulerPlugin):  # type: ignore[misc]  # distributed ships no annotations
    """Has the runs of all clients shown on a scheduler's dashboard, and takes what they tell; there is one of it.

    The handler is there in any case, and answers why nothing is shown where that is so.
    """

    name = "daskinfer-page"
    idempotent = True
    _registry = RunRegistry()  # a scheduler's own from its start on

    async def start(self, scheduler: Scheduler) -> None:
        board = self._registry = RunRegistry()
        why = _install_page(scheduler, board)

        def handle_message(message: Mapping[str, Any]) -> str:
            try:
                board.update(message)
            except (TypeError, KeyError) as error:
                return f"the scheduler has another version of daskinfer: {error}"
            return why

        scheduler.handlers[HANDLER] = handle_message

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Say so of the runs that it has not ended: a process that was killed says nothing itself."""
        self._registry.mark_lost(client)


def dask_setup(scheduler: Scheduler) -> None:
    """Have the page there before the first run: ``dask scheduler --preload daskinfer.diagnostics.dashboard.plugin``.

    The scheduler starts its plugins right after this.
    """
    scheduler.add_plugin(DashboardPlugin(), idempotent=True)


def _install_page(scheduler: Scheduler, registry: RunRegistry) -> str:
    """Add the page to the dashboard; what kept it from that, if anything did."""
    if "distributed.dashboard.scheduler" not in sys.modules:  # a dashboard that serves pages has loaded it
        return "the scheduler has no bokeh, or no dashboard"
    try:
        from daskinfer.diagnostics.dashboard import page

        return "" if page.install_page(scheduler, registry) else "the scheduler has no dashboard"
    except Exception as error:  # the insides of other versions of bokeh and distributed
        return f"{type(error).__name__}: {error}"
