"""Show runs in a terminal of any width: a line per device and a bar for all rows, which stay one line at the end.

The bar takes what is left of its line; if that is too little for a bar, what it says goes to lines of its own, broken
between its parts. Columns that do not fit are left out, the least important first. The last columns stay free: a terminal
writes ``^C`` where the cursor is, and would go to another line, which nobody could clear.
"""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Sequence
from typing import Any

from daskinfer.core.formatting import format_text_table
from daskinfer.diagnostics.status import Status, format_devices, format_progress

MIN_BAR_COLUMNS = 20  # in a line with text; arbitrary
FREE_COLUMNS = 3  # for ^C
MAX_MODEL_COLUMNS = 30  # of a model's name; arbitrary
_OPTIONAL_COLUMNS = ("name", "in flight", "batch size", "requested", "rows/s")  # left out in this order


class TerminalDisplay:
    """The terminal: all runs of this process, stacked, since a terminal has one live region.

    Note: the threads of the runs share it, and hold its lock while they draw.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._statuses: dict[object, Status] = {}
        self._live: Any = None

    def show(self, run: object, status: Status) -> None:
        with self._lock:
            self._statuses[run] = status
            if self._live is None:
                self._live = make_live()
                self._live.start()
            self._draw()

    def end(self, run: object, status: Status) -> None:
        with self._lock:
            self._statuses[run] = status
            if len(self._statuses) > 1:  # the others continue below it
                del self._statuses[run]
                self._live.console.print(render_statuses([status], self._live.console.width))
                self._draw()
                return
            self._draw()
            self._statuses.clear()
            self._live.stop()
            self._live = None

    def _draw(self) -> None:
        shown = render_statuses(list(self._statuses.values()), self._live.console.width)
        self._live.update(shown, refresh=True)


def make_live() -> Any:
    """Make rich's live region on stderr."""
    from rich.console import Console
    from rich.live import Live

    return Live(console=Console(stderr=True), auto_refresh=False)


def render_statuses(statuses: Sequence[Status], columns: int) -> Any:
    """Render statuses with rich for a terminal of so many columns: devices while a run goes on, and a bar for all rows."""
    from rich.console import Group
    from rich.text import Text

    width, parts = max(1, columns - FREE_COLUMNS), []
    for status in statuses:
        if status.devices and not status.ended:
            header, *lines = _format_table(status, width)
            parts += [Text(header, style="dim"), *map(Text, lines)]
        parts += _render_total(status, width)
        if status.dashboard and not status.ended:
            parts.append(Text(f"dashboard: {status.dashboard}"[:width], style="dim"))
    return Group(*parts)


def _format_table(status: Status, width: int) -> list[str]:
    """Format the devices' table in lines that fit."""
    headers, rows = format_devices(status)
    for optional in ("", *_OPTIONAL_COLUMNS):
        if optional in headers[:-1]:
            left_out = headers.index(optional)
            headers, rows = _drop(headers, left_out), [_drop(row, left_out) for row in rows]
        lines = format_text_table(headers, rows).splitlines()
        if max(map(len, lines)) <= width:
            break
    return [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]


def _drop(cells: list[str], position: int) -> list[str]:
    return cells[:position] + cells[position + 1 :]


def _render_total(status: Status, width: int) -> list[Any]:
    """Render the model, the bar and the text in one line if there is room, else the text below."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    model, parts = status.model, format_progress(status)
    parts = parts[:-1] if status.error else parts  # the error is raised, and shown below
    if len(model) > MAX_MODEL_COLUMNS:
        model = f"{model[: MAX_MODEL_COLUMNS - 1]}…"
    text = ", ".join(parts)
    bar_columns = width - len(model) - len(text) - 2
    below = [] if bar_columns >= MIN_BAR_COLUMNS else [Text(line) for line in wrap_parts(parts, width)]
    line = Table.grid(padding=(0, 1))
    bar = ProgressBar(
        total=1.0, completed=status.fraction_done, width=max(1, width - len(model) - 1 if below else bar_columns)
    )
    line.add_row(Text(model, style="bold", no_wrap=True), bar, *([] if below else [Text(text, no_wrap=True)]))
    return [line, *below]


def wrap_parts(parts: Sequence[str], width: int) -> list[str]:
    """Join parts with commas, in lines that end after a part if it fits, else between words.

    Examples
    --------
    >>> wrap_parts(["50%", "50 of 100 rows", "25 rows/s", "0:02 left"], 21)
    ['50%, 50 of 100 rows,', '25 rows/s, 0:02 left']
    """
    lines: list[str] = []
    for i, part in enumerate(parts):
        piece = part if i == len(parts) - 1 else f"{part},"
        if lines and len(lines[-1]) + 1 + len(piece) <= width:
            lines[-1] += f" {piece}"
        else:
            lines += textwrap.wrap(piece, width) or [""]
    return lines
