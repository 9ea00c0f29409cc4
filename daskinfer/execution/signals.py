"""Ctrl-C and SIGTERM while a call computes: what is in flight ends, nothing more begins; twice stops at once.

Before the first chunk is on its way, while workers start or measure, there is nothing to keep: once is enough.

The handlers are set while a call runs in the main thread, and only where the program has set none of its own.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Protocol

from daskinfer.errors import Interrupted

logger = logging.getLogger(__name__)

# By signal: the handler that stands for "nobody has asked for anything else".
_DEFAULT_HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Drainable(Protocol):
    """What can be asked to begin nothing more; ``started_at`` is None until anything was in flight."""

    draining: bool
    started_at: float | None


class StopNow(KeyboardInterrupt):
    """The second signal, on its way out. No ``Exception``: nobody takes it for what a row, a read or a write raised."""


@contextlib.contextmanager
def drain_on_signal(run: Drainable) -> Iterator[None]:
    """Let the first signal drain ``run``, and raise once it has ended.

    Raises
    ------
    Interrupted
        On leaving, where a signal came; at the second one at once.
    """
    came: list[int] = []

    def handle_signal(number: int, frame: FrameType | None) -> None:
        came.append(number)
        run.draining = True
        name = signal.Signals(number).name
        if len(came) > 1:
            raise StopNow
        if run.started_at is None:  # workers that are starting take seconds to end
            logger.warning("%s: no chunk is on its way yet; what was started is ended", name)
            raise StopNow
        logger.warning("%s: what is in flight is ended; once more stops at once", name)

    with contextlib.suppress(StopNow), _install_handler(handle_signal):
        yield
    if came and run.draining:
        raise make_interrupted(came[0]) from None


@contextlib.contextmanager
def convert_keyboard_interrupt() -> Iterator[None]:
    """Say Ctrl-C as ``Interrupted``, where a call drains nothing since its caller has all that was done."""
    try:
        yield
    except KeyboardInterrupt:
        raise make_interrupted(signal.SIGINT) from None


def make_interrupted(number: int) -> Interrupted:
    """What is raised after a signal."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return Interrupted(f"{name} ended the call before all rows had an answer.", number)


@contextlib.contextmanager
def _install_handler(handler: signal._HANDLER) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = {
        number: signal.getsignal(number) for number, usual in _DEFAULT_HANDLERS.items() if signal.getsignal(number) == usual
    }
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)
