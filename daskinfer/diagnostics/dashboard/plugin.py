"""What is set up at a scheduler, by itself or by a client: the page on its dashboard, and who takes what is told of runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin

from daskinfer.diagnostics.dashboard.state import Board

HANDLER = "daskinfer_run"


class Page(SchedulerPlugin):  # type: ignore[misc]  # distributed ships no annotations
    """Has the runs of all clients shown on a scheduler's dashboard, and takes what they tell; there is one of it.

    The handler is there in any case, and answers why nothing is shown where that is so.
    """

    name = "daskinfer-page"
    idempotent = True
    _board = Board()  # a scheduler's own from its start on

    async def start(self, scheduler: Scheduler) -> None:
        board = self._board = Board()
        why = _installed(scheduler, board)

        def take(message: Mapping[str, Any]) -> str:
            try:
                board.take(message)
            except (TypeError, KeyError) as error:
                return f"the scheduler has another version of daskinfer: {error}"
            return why

        scheduler.handlers[HANDLER] = take

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Say so of the runs that it has not ended: a process that was killed says nothing itself."""
        self._board.gone(client)


def dask_setup(scheduler: Scheduler) -> None:
    """Have the page there before the first run: ``dask scheduler --preload daskinfer.diagnostics.dashboard.plugin``.

    The scheduler starts its plugins right after this.
    """
    scheduler.add_plugin(Page(), idempotent=True)


def _installed(scheduler: Scheduler, board: Board) -> str:
    """Add the page to the dashboard; what kept it from that, if anything did."""
    if "distributed.dashboard.scheduler" not in sys.modules:  # a dashboard that serves pages has loaded it
        return "the scheduler has no bokeh, or no dashboard"
    try:
        from daskinfer.diagnostics.dashboard import page

        return "" if page.install(scheduler, board) else "the scheduler has no dashboard"
    except Exception as error:  # the insides of other versions of bokeh and distributed
        return f"{type(error).__name__}: {error}"
