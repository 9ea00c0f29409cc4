"""Everything that daskinfer raises on purpose.

::

    DaskInferError
    ├── InputError        (ValueError)          an input array, port or dtype
    ├── SourceMissing     (FileNotFoundError)   an input path that is not there
    ├── OutputExists      (FileExistsError)     an output path that is taken
    ├── OptionError       (ValueError)          an option, weight or batch size
    ├── DeviceError       (ValueError)          a device that is unknown, doubled, absent or not drivable
    ├── ModelError        (ValueError)          a network that cannot be found, loaded, hashed or understood
    ├── PlanError         (ValueError)          a plan that cannot fit, or several of the above at once
    ├── ClusterError      (RuntimeError)        workers that did not start, or an operation a cluster refuses
    ├── ChunkError        (RuntimeError)        rows that failed while the network ran
    └── MissingExtra      (ImportError)         an optional package that is not installed

A message has four parts: which thing, what was got, what is allowed, what to change. Every class keeps its state in
``args``, so that it survives pickling on its way from a worker, and subclasses the builtin that a caller would catch.
"""

from __future__ import annotations

from collections.abc import Sequence


class DaskInferError(Exception):
    """The root of every error that daskinfer raises on purpose.

    Examples
    --------
    >>> import daskinfer as di
    >>> try:
    ...     di.plan(abs, [1.0, 2.0], devices="tpu")
    ... except di.DaskInferError as error:
    ...     print(type(error).__name__)
    DeviceError
    """


class InputError(DaskInferError, ValueError):
    """An input array, port or dtype that the network or the plan cannot take."""


class SourceMissing(DaskInferError, FileNotFoundError):
    """An input path that does not exist."""


class OutputExists(DaskInferError, FileExistsError):
    """An output path that is taken already."""


class OptionError(DaskInferError, ValueError):
    """An option, a device weight or a batch size outside what is allowed."""


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


class ChunkError(DaskInferError, RuntimeError):
    """Rows that failed while the network ran on them."""


class MissingExtra(DaskInferError, ImportError):
    """An optional package that is not installed; the message names the extra to install."""
