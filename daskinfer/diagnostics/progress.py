"""Show the progress of a run: a bar in a terminal or a notebook, else log lines; all of it from the run's events.

The first rule that matches decides:

1. ``progress`` is a function: it gets the events, and nothing is shown.
2. ``progress=False``: nothing is shown.
3. In a notebook: a table in the cell's output, replaced as the run goes on; it needs no extension.
4. In a terminal: a line per device and a total, on stderr (``terminal``). Concurrent runs are stacked.
5. ``progress=True``: a line on stderr every ``LINE_SECONDS``.
6. ``progress=None``: nothing, since nobody is watching.

Events are only added up as they arrive (microseconds); a separate thread draws every ``DRAW_SECONDS``: drawing takes
5 to 8 ms of CPU here, less than a hundredth of the time. With ``progress=None``, a run shorter than
``INITIAL_DELAY_SECONDS`` shows nothing.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from daskinfer.core.formatting import render_template
from daskinfer.diagnostics.dashboard import StatusPublisher
from daskinfer.diagnostics.events import Event, EventBus, Listener, RunEnded, RunStarted
from daskinfer.diagnostics.status import Status, StatusTracker, format_devices, format_progress, format_status
from daskinfer.diagnostics.terminal import TerminalDisplay
from daskinfer.errors import OptionError

logger = logging.getLogger("daskinfer.progress")  # users set levels by this name, whatever the module's

Progress = bool | Callable[[Event], Any] | None

DRAW_SECONDS = 1.0
LINE_SECONDS = 5.0
INITIAL_DELAY_SECONDS = 0.5  # arbitrary, like the two above


def make_event_bus(progress: Progress, *, on_dashboard: bool = True) -> EventBus:
    """Make the event bus of a run, with the listeners that ``progress=`` asks for.

    ``on_dashboard``: the run may get a client, and anybody may open its dashboard.

    Raises
    ------
    OptionError
        If ``progress`` is none of the allowed values.
    """
    return EventBus([*_make_listeners(progress), *([StatusPublisher()] if on_dashboard else [])])


def _make_listeners(progress: Progress) -> list[Listener]:
    if callable(progress):
        return [progress]
    if progress not in (None, True, False):
        raise OptionError(
            "progress must be True, False, None (shown in terminals and notebooks) or a function of events, "
            f"got {progress!r}"
        )
    if progress is False:
        return []
    initial_delay = INITIAL_DELAY_SECONDS if progress is None else 0.0
    if _is_in_notebook():
        return [DisplayListener(_NotebookDisplay(), DRAW_SECONDS, initial_delay)]
    if sys.stderr is not None and sys.stderr.isatty():
        return [DisplayListener(terminal_display, DRAW_SECONDS, initial_delay)]
    return [make_line_listener(_write_line)] if progress else []


def make_line_listener(write: Callable[[Status], None], interval: float = LINE_SECONDS) -> Listener:
    """Make a listener that calls ``write`` with the run's status every ``interval`` seconds, and once when it has ended."""
    return DisplayListener(_LineDisplay(write), interval, interval)


class StatusDisplay(Protocol):
    """A place that shows statuses; ``run`` tells several runs apart."""

    def show(self, run: object, status: Status) -> None: ...

    def end(self, run: object, status: Status) -> None: ...


class DisplayListener:
    """A listener that has a display drawn every ``interval`` seconds, by a thread that lives as long as the run.

    ``initial_delay`` seconds pass before the first time; a run that is over by then is not shown, except that
    a :class:`_LineDisplay` still shows its end.
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
        except Exception as error:  # a broken display never stops the computation
            logger.warning("the progress display failed and was disabled: %s: %s", type(error).__name__, error)


class _LineDisplay:
    """Lines, one per status."""

    def __init__(self, write: Callable[[Status], None]) -> None:
        self._write = write

    def show(self, run: object, status: Status) -> None:
        self._write(status)

    end = show


def _write_line(status: Status) -> None:
    sys.stderr.write(f"daskinfer: {format_status(status)}\n")
    sys.stderr.flush()


terminal_display = TerminalDisplay()


class _NotebookDisplay:
    """A notebook's cell: one output, which is replaced."""

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
    headers, devices = format_devices(status)
    text = ", ".join(format_progress(status))
    return render_template("diagnostics/progress.html.j2", status=status, text=text, headers=headers, devices=devices)


def _is_in_notebook() -> bool:
    """Return whether this process is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None
