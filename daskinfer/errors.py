"""The exception tree: every error that daskinfer raises on purpose.

::

    DaskInferError
    ├── InputError        (ValueError)          an invalid input array, port or dtype
    ├── SourceMissing     (FileNotFoundError)   an input path that does not exist
    ├── OutputExists      (FileExistsError)     an output path that already holds something else
    ├── OutputLocked      (BlockingIOError)     an output that another run is writing
    ├── OptionError       (ValueError)          an invalid option, weight or batch size
    │   └── UnknownKeyword (TypeError)          a keyword that does not exist
    ├── DeviceError       (ValueError)          a device that is unknown, duplicate, absent or unsupported
    ├── ModelError        (ValueError)          a model that cannot be found, loaded, hashed or called
    ├── PlanError         (ValueError)          a plan that does not fit, or several of the above at once
    ├── ClusterError      (RuntimeError)        workers that did not start, or an unsupported operation
    │   └── SchedulerLost                       the connection to the scheduler was lost during a call
    ├── ChunkError        (RuntimeError)        rows that failed while the model ran
    │   ├── WorkerLost                          rows that killed every worker that computed them in isolation
    │   ├── ChunkTimeout  (TimeoutError)        rows that exceeded chunk_timeout, in isolation too
    │   ├── StorageError  (OSError)             rows that cannot be read or written
    │   └── TooManyFailures                     more rows failed than max_failed_rows allows
    ├── Interrupted       (KeyboardInterrupt)   Ctrl-C or SIGTERM, after the chunks in flight finished
    └── MissingExtra      (ImportError)         an optional package that is not installed

An error that ends ``predict`` while it runs, Ctrl-C included, carries the rows computed until then in ``partial``
(:class:`PartialOutput`). The table in ``scheduling.retry`` says how each kind of failure is handled.

A message has four parts: which thing, what was got, what is allowed, what to change. Every class keeps its state in
``args``, so that it survives pickling on its way from a worker, and subclasses the builtin that a caller would catch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class PartialOutput(NamedTuple):
    """The result of a call that ended early: ``output`` holds the computed rows wherever ``done``, (n,) bool, is True.

    The other rows hold the fill value of ``on_error="skip"``, else NaN, or 0 if the dtype has no NaN.
    """

    output: Any
    done: Any


class DaskInferError(Exception):
    """Root of every error that daskinfer raises on purpose; ``partial`` is None unless the error ended a ``predict``.

    Examples
    --------
    >>> import daskinfer as di
    >>> try:
    ...     di.plan(abs, [1.0, 2.0], devices="tpu")
    ... except di.DaskInferError as error:
    ...     print(type(error).__name__)
    DeviceError
    """

    partial: PartialOutput | None = None


class InputError(DaskInferError, ValueError):
    """An input array, port or dtype that the model or the plan cannot take."""


class SourceMissing(DaskInferError, FileNotFoundError):
    """An input path that does not exist."""


class OutputExists(DaskInferError, FileExistsError):
    """An output path that already holds something that this run may not overwrite or continue."""


class OutputLocked(DaskInferError, BlockingIOError):
    """An output that another run is writing."""


class OptionError(DaskInferError, ValueError):
    """An option, a device weight or a batch size outside its allowed values."""


class UnknownKeyword(OptionError, TypeError):
    """A keyword that a function does not take; a TypeError, as from Python's own functions."""


class DeviceError(DaskInferError, ValueError):
    """A device that is unknown, named twice, absent, or that the installed torch cannot use."""


class ModelError(DaskInferError, ValueError):
    """A model that cannot be found, loaded or hashed, or whose output is not made of arrays."""


class PlanError(DaskInferError, ValueError):
    """A plan that cannot work; ``reasons`` holds each problem as a sentence, and a single one may be passed as a string."""

    def __init__(self, reasons: str | Sequence[str]) -> None:
        super().__init__((reasons,) if isinstance(reasons, str) else tuple(reasons))

    @property
    def reasons(self) -> tuple[str, ...]:
        """One sentence for each problem."""
        return tuple(self.args[0])

    def __str__(self) -> str:
        if len(self.reasons) == 1:
            return self.reasons[0]
        lines = "\n".join(f"  {i}. {reason}" for i, reason in enumerate(self.reasons, 1))
        return f"invalid plan, {len(self.reasons)} problems:\n{lines}"


class ClusterError(DaskInferError, RuntimeError):
    """Workers that did not start, or an operation that this cluster does not support."""


class SchedulerLost(ClusterError):
    """The connection to the scheduler was lost while a call ran."""


class ChunkError(DaskInferError, RuntimeError):
    """Rows that failed while the model ran on them."""


class WorkerLost(ChunkError):
    """Rows that killed every worker process that computed them in isolation."""


class ChunkTimeout(ChunkError, TimeoutError):
    """Rows that took longer than ``chunk_timeout``, in isolation too."""

    __new__ = OSError.__new__  # type: ignore[assignment]  # as for StorageError


class StorageError(ChunkError, OSError):
    """Rows that cannot be read or written; ``number`` is the system's ``errno``, 0 if it gave none."""

    # Dask looks __new__ up by name to unpickle what a task raised; RuntimeError's, the first base's, makes no OSError.
    __new__ = OSError.__new__  # type: ignore[assignment]  # typeshed has object's

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message, number)

    @property
    def number(self) -> int:
        """The system's error number (``errno``)."""
        return int(self.args[1])

    def __str__(self) -> str:
        return str(self.args[0])


class TooManyFailures(ChunkError):
    """More rows failed than ``max_failed_rows`` allows."""


class Interrupted(DaskInferError, KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a call; ``signal_number`` tells which."""

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
    """Collects the errors that daskinfer raises on purpose, so that a user sees all of them at once."""

    def __init__(self) -> None:
        self._errors: list[DaskInferError] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Collect a :class:`DaskInferError` that the block raises; let any other exception pass."""
        try:
            yield
        except DaskInferError as error:
            self.add(error)

    def add(self, error: DaskInferError) -> None:
        """Collect an error that is known already."""
        self._errors.append(error)

    def __bool__(self) -> bool:
        return bool(self._errors)

    def attempt(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Call a function; None if it raised an error on purpose, which is kept for later."""
        with self.collect():
            return function(*args, **kwargs)
        return None

    def succeeds(self, function: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> bool:
        """Call a function that only checks; whether it raised nothing on purpose."""
        before = len(self._errors)
        self.attempt(function, *args, **kwargs)
        return len(self._errors) == before

    def raise_if_any(self) -> None:
        """Raise the collected error, or a :class:`PlanError` that lists several; nothing happens without one."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            problems = (e.reasons if isinstance(e, PlanError) else [str(e)] for e in self._errors)
            raise PlanError([problem for group in problems for problem in group])
