"""How a network is run: one frozen record, checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypedDict

from daskinfer.core.env import MAX_PREFETCH
from daskinfer.errors import OptionError, UnknownKeyword

_AUTOCAST = ("bf16", "fp16")
_MEMORY_FORMATS = ("auto", "contiguous", "channels_last")
_ON_ERROR = ("raise", "skip")
# What the functions that users call take beside these options.
_OTHER_KEYWORDS = (
    "devices",
    "device_weights",
    "batch_size",
    "client",
    "progress",
    "return_report",
    "overwrite",
    "shard",
    "probe",
)
_WORKER_COUNT_KEYWORDS = (
    "n_jobs",
    "n_workers",
    "nworkers",
    "num_workers",
    "workers",
)  # what other tools call the number of processes


class OptionFields(TypedDict, total=False):
    """The fields of :class:`Options` as keywords."""

    dtype: str | Mapping[str, str] | None
    autocast: str | None
    preprocess: Callable[..., Any] | None
    postprocess: Callable[..., Any] | None
    output: Any
    pad: bool
    memory_format: str
    prefetch: int
    on_error: str
    fill_value: float | None
    max_failed_rows: int | str | None
    nan_is_failure: bool
    retries: int
    chunk_timeout: float | None
    restart_workers: bool
    trust: bool


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a network is run; each field is also a keyword of ``predict``, ``stream``, ``map_blocks``, ``run``, ``plan``.

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
    memory_format
        How the values of images (n, channels, height, width) and volumes lie in memory when an ``nn.Module`` gets them, in
        torch's terms. "auto": "contiguous", or "channels_last" where that is measured to be faster, with answers that
        agree; only measured where the micro-batch is. Answers of the two differ in the last bits.
    prefetch
        How many chunks are read ahead for each device while it computes, 1 to 6; more where storage is slow.
    on_error
        "raise": rows that fail end the call. "skip": they are found by halving, filled with ``fill_value``, and listed in
        the report; all other rows get their answers. Not for ``map_blocks``, which has no report.
    fill_value
        What stands where rows failed. None: NaN, which only floats and complex numbers have.
    max_failed_rows
        How many rows may fail under "skip", as a number or as a share of all ("1%"), before the call ends with
        ``TooManyFailures``; each shard of a ``run`` may have as many, or that share of its own. None: any.
    nan_is_failure
        True: a row whose answer holds a NaN has failed.
    retries
        How often rows whose computing, reading or writing raised are tried again, a little later each time; 0 and up.
    chunk_timeout
        Seconds that a chunk may take on a device, loading the network included, until its worker is replaced and the chunk
        tried again; with "inline" there is none to replace. Workers of a cluster that is not daskinfer's are replaced with
        ``restart_workers``, and else left out from then on. None: any.
    restart_workers
        True: workers of a cluster that is not daskinfer's may be restarted where they hang or their device broke.
    trust
        True: as ``Model(…, trust=True)``: the network's file may run code when it is loaded. False: such a file is refused.

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
    memory_format: str = "auto"
    prefetch: int = 1
    on_error: str = "raise"
    fill_value: float | None = None
    max_failed_rows: int | str | None = None
    nan_is_failure: bool = False
    retries: int = 2
    chunk_timeout: float | None = None
    restart_workers: bool = False
    trust: bool = False

    def __post_init__(self) -> None:
        if self.autocast is not None and not (isinstance(self.autocast, str) and self.autocast in _AUTOCAST):
            raise OptionError(f"autocast is {self.autocast!r}; it may be 'bf16', 'fp16' or None. Pass one of these.")
        for name in ("preprocess", "postprocess"):
            given = getattr(self, name)
            if given is not None and not callable(given):
                raise OptionError(
                    f"{name} is a {type(given).__name__}; it may be a function of arrays or None. Pass a function."
                )
        object.__setattr__(self, "dtype", _validate_dtype(self.dtype))
        if not isinstance(self.pad, bool):
            raise OptionError(f"pad is {self.pad!r}; it may be True or False. Pass one of these.")
        if not (isinstance(self.memory_format, str) and self.memory_format in _MEMORY_FORMATS):
            allowed = "'auto', 'contiguous' or 'channels_last'"
            raise OptionError(f"memory_format is {self.memory_format!r}; it may be {allowed}. Pass one of these.")
        if type(self.prefetch) is not int or not 1 <= self.prefetch <= MAX_PREFETCH:
            raise OptionError(
                f"prefetch is {self.prefetch!r}; it may be a number from 1 to {MAX_PREFETCH}. Pass one of these."
            )

        self._check_failure_options()

    def _check_failure_options(self) -> None:
        if not (isinstance(self.on_error, str) and self.on_error in _ON_ERROR):
            raise OptionError(f"on_error is {self.on_error!r}; it may be 'raise' or 'skip'. Pass one of these.")
        for name in ("nan_is_failure", "restart_workers", "trust"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}; it may be True or False. Pass one of these.")
        if type(self.retries) is not int or self.retries < 0:
            raise OptionError(f"retries is {self.retries!r}; it may be a number from 0. Pass one.")
        if self.chunk_timeout is not None and not (_is_number(self.chunk_timeout) and self.chunk_timeout > 0):
            raise OptionError(
                f"chunk_timeout is {self.chunk_timeout!r}; it may be seconds, above 0, or None. Pass one of these."
            )
        if self.fill_value is not None and not _is_number(self.fill_value):
            raise OptionError(f"fill_value is {self.fill_value!r}; it may be a number or None. Pass one of these.")
        self.compute_max_failed_rows(0)

    def compute_max_failed_rows(self, n_rows: int) -> float:
        """How many of so many rows may fail.

        Examples
        --------
        >>> Options(max_failed_rows="1%").compute_max_failed_rows(250), Options().compute_max_failed_rows(250)
        (2, inf)
        """
        asked = self.max_failed_rows
        if asked is None:
            return math.inf
        if type(asked) is int and asked >= 0:
            return asked
        share = asked.removesuffix("%") if isinstance(asked, str) and asked.endswith("%") else ""
        if not share.replace(".", "", 1).isdecimal() or float(share) > 100:
            raise OptionError(
                f"max_failed_rows is {asked!r}; it may be a number from 0, a share such as '1%', or None. Pass one of these."
            )
        return int(n_rows * Fraction(share) / 100)

    def get_cast_dtype(self, port: str) -> str | None:
        """The name of the dtype that ``port`` is cast to, None where it stays as it is."""
        if isinstance(self.dtype, Mapping):
            return self.dtype.get(port)
        return self.dtype


def merge_options(options: Options | None, fields: OptionFields) -> Options:
    """The options record, with the keywords on top of it.

    Raises
    ------
    OptionError
        For a keyword that there is none of (``UnknownKeyword``), or a value that is not allowed.
    """
    known = [one.name for one in dataclasses.fields(Options)]
    if unknown := sorted(fields.keys() - known):
        alike = difflib.get_close_matches(unknown[0], [*known, *_OTHER_KEYWORDS], 1)
        cure = f"Did you mean {alike[0]!r}?" if alike else "Leave it out."
        if unknown[0] in _OTHER_KEYWORDS:
            cure = "Another function takes it: leave it out."
        if unknown[0] in _WORKER_COUNT_KEYWORDS:
            cure = "The devices say how many workers there are: devices='cpu*2', for example."
        allowed = f"allowed are those in the function's signature and {', '.join(known)}"
        raise UnknownKeyword(f"the keyword {unknown[0]!r} was given; {allowed}. {cure}")
    return replace(options or Options(), **fields)


def is_trusted(options: Options | None, fields: OptionFields) -> bool:
    """Whether the caller trusts the network's file, also where another option cannot be."""
    return bool(fields.get("trust", options is not None and options.trust))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _validate_dtype(dtype: Any) -> str | dict[str, str] | None:
    """A mapping is copied: options do not change once they are made."""
    names = [*dtype.keys(), *dtype.values()] if isinstance(dtype, Mapping) else [] if dtype is None else [dtype]
    if all(isinstance(name, str) for name in names):
        return dict(dtype) if isinstance(dtype, Mapping) else dtype
    raise OptionError(
        f"dtype is {dtype!r}; it may be a name such as 'float32', a mapping from port to name, or None. Pass a name."
    )
