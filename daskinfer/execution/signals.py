"""Ctrl-C and SIGTERM while a call computes: chunks in flight finish and no more start; a second signal stops at once.

Before the first chunk was submitted, while workers start or batch sizes are tuned, there is nothing to finish: one signal is
enough.

The handlers are installed while a call runs in the main thread, and only for signals that the program does not handle
itself.
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

# By signal: the handler of a program that has installed none.
_DEFAULT_HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Drainable(Protocol):
    """A run that can be told to start no further chunk; ``started_at`` is None until one was in flight."""

    draining: bool
    started_at: float | None


class StopNow(KeyboardInterrupt):
    """Raised by the second signal. Not an ``Exception``: no handler takes it for an error of a row, a read or a write."""


@contextlib.contextmanager
def drain_on_signal(run: Drainable) -> Iterator[None]:
    """Drain ``run`` at the first signal, and raise once it has ended.

    Raises
    ------
    Interrupted
        When the context ends, if a signal was received; at a second signal at once.
    """
    received: list[int] = []

    def handle_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        run.draining = True
        name = signal.Signals(number).name
        if len(received) > 1:
            raise StopNow
        if run.started_at is None:  # workers that are starting take seconds to shut down
            logger.warning("%s received before any chunk was submitted; shutting down workers", name)
            raise StopNow
        logger.warning("%s received: finishing in-flight chunks; send it again to abort", name)

    with contextlib.suppress(StopNow), _install_handler(handle_signal):
        yield
    if received and run.draining:
        raise make_interrupted(received[0]) from None


@contextlib.contextmanager
def convert_keyboard_interrupt() -> Iterator[None]:
    """Convert Ctrl-C into ``Interrupted``, for a call that need not drain: its caller already has every finished block."""
    try:
        yield
    except KeyboardInterrupt:
        raise make_interrupted(signal.SIGINT) from None


def make_interrupted(number: int) -> Interrupted:
    """Make the error that is raised after a signal."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return Interrupted(f"{name} ended the call before all rows had an output.", number)


@contextlib.contextmanager
def _install_handler(handler: signal._HANDLER) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    before = {n: default for n, default in _DEFAULT_HANDLERS.items() if signal.getsignal(n) == default}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, default in before.items():
            signal.signal(number, default)
