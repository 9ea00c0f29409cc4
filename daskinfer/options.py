"""How a network is run: one frozen record, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from daskinfer.errors import OptionError
from daskinfer.variables import MAX_READERS

_AUTOCAST = ("bf16", "fp16")


class OptionFields(TypedDict, total=False):
    """The fields of :class:`Options` as keywords."""

    dtype: str | Mapping[str, str] | None
    autocast: str | None
    preprocess: Callable[..., Any] | None
    postprocess: Callable[..., Any] | None
    output: Any
    pad: bool
    readers: int


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a network is run; each field is also a keyword of ``predict``, ``map_blocks``, ``run`` and ``plan``.

    Parameters
    ----------
    dtype
        Cast the input to this dtype, by its name ("float32", "bfloat16"), micro-batch by micro-batch in the worker.
        A mapping casts the ports that it names. None casts nothing, and an input that the network cannot take is refused.
    autocast
        "bf16" or "fp16": run the network under ``torch.autocast``. None: in its own precision.
    preprocess
        Called in the worker on the rows of each micro-batch (ndarrays, one argument per port), before padding; what it
        returns is given to the network: an array, a tuple (by position) or a dict (by name), with as many rows.
    postprocess
        Called in the worker on the network's answer (ndarrays in the network's structure), padding taken off; what it
        returns is the answer, with as many rows.
    output
        What the answer looks like, for networks whose answer cannot be found out by a trial on made-up rows: an array
        of any number of rows, such as ``np.empty((0, 10), "float32")``, in the structure of the network's answer.
        None: found out.
    pad
        True: every micro-batch is filled up with zero rows to one shape, so that answers do not depend on how the
        input is cut. False: for networks that look across the batch, or that cannot take zeros.
    readers
        How many chunks are read ahead for each device while it computes, 1 to 6; more where storage is slow.

    Raises
    ------
    OptionError
        Where a field is outside what is allowed.

    Examples
    --------
    >>> Options(autocast="bf16").autocast
    'bf16'
    """

    dtype: str | Mapping[str, str] | None = None
    autocast: str | None = None
    preprocess: Callable[..., Any] | None = None
    postprocess: Callable[..., Any] | None = None
    output: Any = None
    pad: bool = True
    readers: int = 1

    def __post_init__(self) -> None:
        if self.autocast is not None and not (isinstance(self.autocast, str) and self.autocast in _AUTOCAST):
            raise OptionError(f"autocast is {self.autocast!r}; it may be 'bf16', 'fp16' or None. Pass one of these.")
        for name in ("preprocess", "postprocess"):
            given = getattr(self, name)
            if given is not None and not callable(given):
                raise OptionError(
                    f"{name} is a {type(given).__name__}; it may be a function of arrays or None. Pass a function."
                )
        object.__setattr__(self, "dtype", _checked_dtype(self.dtype))
        if not isinstance(self.pad, bool):
            raise OptionError(f"pad is {self.pad!r}; it may be True or False. Pass one of these.")
        if type(self.readers) is not int or not 1 <= self.readers <= MAX_READERS:
            raise OptionError(f"readers is {self.readers!r}; it may be a number from 1 to {MAX_READERS}. Pass one of these.")

    def cast(self, port: str) -> str | None:
        """The name of the dtype that ``port`` is cast to, None where it stays as it is."""
        if isinstance(self.dtype, Mapping):
            return self.dtype.get(port)
        return self.dtype


def _checked_dtype(dtype: Any) -> str | dict[str, str] | None:
    """A mapping is copied: options do not change once they are made."""
    names = [*dtype.keys(), *dtype.values()] if isinstance(dtype, Mapping) else [] if dtype is None else [dtype]
    if all(isinstance(name, str) for name in names):
        return dict(dtype) if isinstance(dtype, Mapping) else dtype
    raise OptionError(
        f"dtype is {dtype!r}; it may be a name such as 'float32', a mapping from port to name, or None. Pass a name."
    )
