"""What is shown of a run while it goes on: a bar in a terminal or a notebook, else lines; all read from its events.

Which of them, first match wins:

1. ``progress`` is a function: it gets the events, and nothing is shown.
2. ``progress=False``: nothing.
3. A notebook: a table in the cell's output, replaced as the run goes on; no extension is needed.
4. A terminal: a line per device and one for all, on stderr. Several runs at a time stand below one another.
5. ``progress=True``: a line on stderr every ``LINE_SECONDS``.
6. ``progress=None``: nothing, as nobody looks on.

Events are only summed up as they come (microseconds); a thread of its own draws, ``DRAW_SECONDS`` apart: a picture takes
5 to 8 ms of CPU here, which is less than a hundredth of the time. Under ``progress=None`` a run shorter than
``INITIAL_DELAY_SECONDS`` shows nothing.
"""

from __future__ import annotations

import html
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from daskinfer.core.formatting import format_html_table
from daskinfer.diagnostics.dashboard import StatusPublisher
from daskinfer.diagnostics.events import Event, EventBus, Listener, RunEnded, RunStarted
from daskinfer.diagnostics.status import Status, StatusTracker
from daskinfer.diagnostics.status_text import DEVICE_HEADERS, format_device, format_progress, format_status
from daskinfer.errors import OptionError

logger = logging.getLogger("daskinfer.progress")  # a name that users set levels by, wherever the module is

Progress = bool | Callable[[Event], Any] | None

DRAW_SECONDS = 1.0
LINE_SECONDS = 5.0
INITIAL_DELAY_SECONDS = 0.5  # arbitrary, as the two above


def make_event_bus(progress: Progress) -> EventBus:
    """Who is told of a run's events, as ``progress=`` says.

    Raises
    ------
    OptionError
        Where it is none of the allowed.
    """
    return EventBus([*_make_listeners(progress), StatusPublisher()])  # the dashboard is whoever's who opens it


def _make_listeners(progress: Progress) -> list[Listener]:
    if callable(progress):
        return [progress]
    if progress not in (None, True, False):
        raise OptionError(
            f"progress is {progress!r}; it may be True, False, None (shown where a person looks on), or a function of "
            "events. Pass one of these."
        )
    if progress is False:
        return []
    patience = INITIAL_DELAY_SECONDS if progress is None else 0.0
    if _is_in_notebook():
        return [DisplayListener(_NotebookDisplay(), DRAW_SECONDS, patience)]
    if sys.stderr is not None and sys.stderr.isatty():
        return [DisplayListener(_terminal_display, DRAW_SECONDS, patience)]
    return [make_line_listener(_write_line)] if progress else []


def make_line_listener(write: Callable[[Status], None], interval: float = LINE_SECONDS) -> Listener:
    """A listener that has the status of a run written every so many seconds, and once when it has ended."""
    return DisplayListener(_LineDisplay(write), interval, interval)


class StatusDisplay(Protocol):
    """Where a status is shown; ``run`` tells several runs apart."""

    def show(self, run: object, status: Status) -> None: ...

    def end(self, run: object, status: Status) -> None: ...


class DisplayListener:
    """A listener that has a view drawn every so many seconds, by a thread that lives as long as the run.

    ``patience`` seconds pass before the first; a run that is over by then is not shown, unless its view wants the end.
    """

    def __init__(self, display: StatusDisplay, interval: float, initial_delay: float) -> None:
        self._display, self._interval, self._initial_delay = display, interval, initial_delay
        self._tracker = StatusTracker()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self, event: Event) -> None:
        self._tracker(event)
        if isinstance(event, RunStarted):
            self._thread = threading.Thread(target=self._draw, name="daskinfer-progress", daemon=True)
            self._thread.start()
        elif isinstance(event, RunEnded) and self._thread is not None:
            self._ended.set()
            self._thread.join()

    def _draw(self) -> None:
        try:
            shown = not self._ended.wait(self._initial_delay)
            while shown and not self._ended.is_set():
                self._display.show(self, self._tracker.get_status(time.time()))
                self._ended.wait(self._interval)
            if shown or isinstance(self._display, _LineDisplay):
                self._display.end(self, self._tracker.get_status(time.time()))
        except Exception as error:  # what is shown never ends what is computed
            logger.warning("progress is shown no more: %s: %s", type(error).__name__, error)


class _LineDisplay:
    """A line now and then."""

    def __init__(self, write: Callable[[Status], None]) -> None:
        self._write = write

    def show(self, run: object, status: Status) -> None:
        self._write(status)

    end = show


def _write_line(status: Status) -> None:
    sys.stderr.write(f"daskinfer: {format_status(status)}\n")
    sys.stderr.flush()


class _TerminalDisplay:
    """The terminal: all runs of this process below one another, as a terminal has one place that moves.

    Note: the runs' threads share it, and hold its lock while they draw.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._statuses: dict[object, Status] = {}
        self._live: Any = None

    def show(self, run: object, status: Status) -> None:
        with self._lock:
            self._statuses[run] = status
            if self._live is None:
                self._live = _make_live()
                self._live.start()
            self._draw()

    def end(self, run: object, status: Status) -> None:
        with self._lock:
            self._statuses[run] = status
            if len(self._statuses) > 1:  # the others go on below it
                del self._statuses[run]
                self._live.console.print(_render_statuses([status]))
                self._draw()
                return
            self._draw()
            self._statuses.clear()
            self._live.stop()
            self._live = None

    def _draw(self) -> None:
        self._live.update(_render_statuses(list(self._statuses.values())), refresh=True)


_terminal_display = _TerminalDisplay()


def _make_live() -> Any:
    from rich.console import Console
    from rich.live import Live

    return Live(console=Console(stderr=True), auto_refresh=False)


def _render_statuses(statuses: list[Status]) -> Any:
    """Statuses as rich draws them: each a table of devices, and a bar of all rows."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for status in statuses:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for header in DEVICE_HEADERS:
            table.add_column(header, justify="left" if header in ("device", "name", "") else "right", no_wrap=True)
        for device in status.devices:
            table.add_row(*map(Text, format_device(device, status)))
        total = Table.grid(padding=(0, 1))
        total.add_row(
            Text(status.model, style="bold"),
            ProgressBar(total=1.0, completed=status.fraction_done, width=30),
            Text(", ".join(format_progress(status))),
        )
        parts += [table, total] if status.devices else [total]
        if status.dashboard and not status.ended:
            parts.append(Text(f"dashboard: {status.dashboard}", style="dim", no_wrap=True))
    return Group(*parts)


class _NotebookDisplay:
    """A cell of a notebook: one output, which is replaced."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, run: object, status: Status) -> None:
        from IPython.display import display

        page = {"text/html": _render_html(status), "text/plain": format_status(status)}
        if self._handle is None:
            self._handle = display(page, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(page, raw=True)

    end = show


def _render_html(status: Status) -> str:
    """A status as HTML."""
    said = ", ".join(format_progress(status))
    bar = f'<progress max="1" value="{status.fraction_done:.4g}" style="width: 20em"></progress>'
    table = (
        format_html_table(DEVICE_HEADERS, [format_device(device, status) for device in status.devices])
        if status.devices
        else ""
    )
    return f"<div><b>{html.escape(status.model)}</b> {bar} {html.escape(said)}{_render_link(status)}</div>{table}"


def _render_link(status: Status) -> str:
    """The way to the dashboard while there is something to see; what is kept of a notebook would lead nowhere."""
    if status.ended or not status.dashboard.startswith(("http://", "https://", "/", "proxy/")):
        return ""
    return f', <a href="{html.escape(status.dashboard)}" target="_blank">dashboard</a>'


def _is_in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None
