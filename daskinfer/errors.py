"""Everything that daskinfer raises on purpose.

::

    DaskInferError
    ├── InputError        (ValueError)          an input array, port or dtype
    ├── SourceMissing     (FileNotFoundError)   an input path that is not there
    ├── OutputExists      (FileExistsError)     an output path that is taken
    ├── OutputLocked      (BlockingIOError)     an output that another run holds
    ├── OptionError       (ValueError)          an option, weight or batch size
    │   └── UnknownKeyword (TypeError)          a keyword that there is none of
    ├── DeviceError       (ValueError)          a device that is unknown, doubled, absent or not drivable
    ├── ModelError        (ValueError)          a network that cannot be found, loaded, hashed or understood
    ├── PlanError         (ValueError)          a plan that cannot fit, or several of the above at once
    ├── ClusterError      (RuntimeError)        workers that did not start, or an operation a cluster refuses
    │   └── SchedulerLost                       the scheduler went away while a call ran
    ├── ChunkError        (RuntimeError)        rows that failed while the network ran
    │   ├── WorkerLost                          rows that ended the process of every worker that computed them alone
    │   ├── ChunkTimeout  (TimeoutError)        rows that took longer than chunk_timeout, alone too
    │   ├── StorageError  (OSError)             rows that cannot be read or written
    │   └── TooManyFailures                     more rows failed than max_failed_rows allows
    ├── Interrupted       (KeyboardInterrupt)   Ctrl-C or SIGTERM, once what was in flight had ended
    └── MissingExtra      (ImportError)         an optional package that is not installed

An error that ends ``predict`` while it runs, Ctrl-C included, has ``partial``: what was done until then (:class:`Partial`).
What is done about which failure stands in a table in ``faults``.

A message has four parts: which thing, what was got, what is allowed, what to change. Every class keeps its state in
``args``, so that it survives pickling on its way from a worker, and subclasses the builtin that a caller would catch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple


class Partial(NamedTuple):
    """What was done when a call ended early: ``answer`` has all rows, where ``done``, (n,) bool, is True.

    Elsewhere it holds the fill value of ``on_error="skip"``, else NaN, or 0 where its dtype has no NaN.
    """

    answer: Any
    done: Any


class DaskInferError(Exception):
    """The root of every error that daskinfer raises on purpose; ``partial`` is None unless a ``predict`` was under way.

    Examples
    --------
    >>> import daskinfer as di
    >>> try:
    ...     di.plan(abs, [1.0, 2.0], devices="tpu")
    ... except di.DaskInferError as error:
    ...     print(type(error).__name__)
    DeviceError
    """

    partial: Partial | None = None


class InputError(DaskInferError, ValueError):
    """An input array, port or dtype that the network or the plan cannot take."""


class SourceMissing(DaskInferError, FileNotFoundError):
    """An input path that does not exist."""


class OutputExists(DaskInferError, FileExistsError):
    """An output path that is taken already."""


class OutputLocked(DaskInferError, BlockingIOError):
    """An output that another run is writing."""


class OptionError(DaskInferError, ValueError):
    """An option, a device weight or a batch size outside what is allowed."""


class UnknownKeyword(OptionError, TypeError):
    """A keyword that a function does not take, as Python's own functions say it."""


class DeviceError(DaskInferError, ValueError):
    """A device that is unknown, asked for twice, absent, or that this torch cannot drive."""


class ModelError(DaskInferError, ValueError):
    """A network that cannot be found, loaded, hashed, or whose answer cannot be understood."""


class PlanError(DaskInferError, ValueError):
    """Why a plan cannot work; ``reasons`` holds each as a sentence, and a single one may be given as it is."""

    def __init__(self, reasons: str | Sequence[str]) -> None:
        super().__init__((reasons,) if isinstance(reasons, str) else tuple(reasons))

    @property
    def reasons(self) -> tuple[str, ...]:
        """One sentence for each thing that has to change."""
        return tuple(self.args[0])

    def __str__(self) -> str:
        if len(self.reasons) == 1:
            return self.reasons[0]
        lines = "\n".join(f"  {i}. {reason}" for i, reason in enumerate(self.reasons, 1))
        return f"this cannot run, for {len(self.reasons)} reasons:\n{lines}"


class ClusterError(DaskInferError, RuntimeError):
    """Workers that did not start, or an operation that this cluster refuses."""


class SchedulerLost(ClusterError):
    """The scheduler of a call went away while it ran."""


class ChunkError(DaskInferError, RuntimeError):
    """Rows that failed while the network ran on them."""


class WorkerLost(ChunkError):
    """Rows that ended the process of every worker that computed them alone."""


class ChunkTimeout(ChunkError, TimeoutError):
    """Rows that took longer than ``chunk_timeout``, alone too."""

    __new__ = OSError.__new__  # type: ignore[assignment]  # as for StorageError


class StorageError(ChunkError, OSError):
    """Rows that cannot be read or written; ``number`` is the system's (``errno``), 0 where it said nothing."""

    # How Dask unpickles what a task raised asks for it by name, and would find RuntimeError's, which makes no OSError.
    __new__ = OSError.__new__  # type: ignore[assignment]  # typeshed has object's

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message, number)

    @property
    def number(self) -> int:
        """The system's number of the error."""
        return int(self.args[1])

    def __str__(self) -> str:
        return str(self.args[0])


class TooManyFailures(ChunkError):
    """More rows failed than ``max_failed_rows`` allows."""


class Interrupted(DaskInferError, KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a call; ``signal_number`` says which."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)

    @property
    def signal_number(self) -> int:
        """2 for Ctrl-C, 15 for SIGTERM."""
        return int(self.args[1])

    def __str__(self) -> str:
        return str(self.args[0])


class MissingExtra(DaskInferError, ImportError):
    """An optional package that is not installed; the message names the extra to install."""


class ErrorCollector:
    """Collects errors raised on purpose, so that a user hears of all of them in one go."""

    def __init__(self) -> None:
        self._errors: list[DaskInferError] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep an error of ours for later; others pass."""
        try:
            yield
        except DaskInferError as error:
            self._errors.append(error)

    def raise_if_any(self) -> None:
        """Raise the one error, or one that lists them all."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            said = (e.reasons if isinstance(e, PlanError) else [str(e)] for e in self._errors)
            raise PlanError([reason for reasons in said for reason in reasons])
