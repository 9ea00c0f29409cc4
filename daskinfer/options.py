"""Every keyword of the public functions, declared once.

The field of a dataclass is the declaration: its type says which values are allowed, ``declare`` adds the help text, a range,
and the functions that take it. From it come the keyword (:func:`with_options`), the check, the flag of the command
(``cli.options``), the key of the job file, the row of the reference (:func:`make_reference_rows`), and what type checkers
read (``_keywords``, written by ``python -m tests.support.write_types``).
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache, wraps
from typing import Any, Literal, TypeVar, cast

from daskinfer.core.declarations import COMPUTING, STORING, Declaration, add_parameters, declare, get_declarations
from daskinfer.core.env import MAX_PREFETCH
from daskinfer.errors import UnknownKeyword

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)

# What other tools call the number of processes.
WORKER_COUNT_KEYWORDS = ("n_jobs", "n_workers", "nworkers", "num_workers", "workers")


@cache
def get_all_declarations() -> Mapping[str, Declaration]:
    """Return every declaration by name: those of a call, then those of :class:`Options`."""
    return {**get_declarations(CallKeywords), **get_declarations(Options)}


@cache
def list_options(function: str) -> tuple[Declaration, ...]:
    """Return what a public function takes.

    Examples
    --------
    >>> [option.name for option in list_options("map_blocks")][:4]
    ['batch_size', 'options', 'dtype', 'autocast']
    """
    return tuple(option for option in get_all_declarations().values() if function in option.functions)


def check_names(owner: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a keyword that ``owner`` does not take, with the one that was meant.

    Raises
    ------
    UnknownKeyword
        For the first one.

    Examples
    --------
    >>> check_names("predict", ["readers"], ["prefetch", "retries"])
    Traceback (most recent call last):
    daskinfer.errors.UnknownKeyword: predict() got an unexpected keyword argument 'readers'; did you mean 'prefetch'?
    """
    if unknown := sorted(set(names) - set(known)):
        raise UnknownKeyword(f"{owner}() got an unexpected keyword argument {unknown[0]!r}; {_advise(unknown[0], known)}")


def _advise(name: str, known: Sequence[str]) -> str:
    declared = get_all_declarations()
    renamed = next((new for new, option in declared.items() if option.formerly == name), name)
    if renamed in known:
        return f"did you mean {renamed!r}?"
    if renamed in declared:
        return f"{renamed!r} is a keyword of {', '.join(declared[renamed].functions)}"
    if name in WORKER_COUNT_KEYWORDS and "devices" in known:
        return "devices sets the number of workers, as in devices='cpu*2'"
    alike = difflib.get_close_matches(name, known, 1)
    return f"did you mean {alike[0]!r}?" if alike else f"allowed are {', '.join(known)}"


def get_renamed_key(key: str) -> str | None:
    """Return what the key of a job file, or the flag without its ``--``, is called now; None if it was not renamed.

    Examples
    --------
    >>> get_renamed_key("no-fresh"), get_renamed_key("pad")
    ('no-overwrite', None)
    """
    negation = "no-" if key.startswith("no-") else ""
    for option in get_all_declarations().values():
        if option.formerly and option.formerly.replace("_", "-") == key.removeprefix(negation):
            return f"{negation}{option.key}"
    return None


def with_options(function: F) -> F:
    """Show every option that a public function takes, in its signature and in its docstring.

    The function itself has ``**keywords``, for :func:`read_keywords`.
    """
    taken = list_options(function.__name__)
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    shown = [
        inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=option.type)
        for option in taken
    ]
    cast(Any, function).__signature__ = signature.replace(parameters=[*own, *shown])
    function.__doc__ = add_parameters(function.__doc__, taken)
    return function


def _document_fields(holder: C) -> C:
    """Add a dataclass's declarations to its docstring, and have its constructor say which keyword was meant."""
    declared = get_declarations(holder)
    holder.__doc__ = add_parameters(holder.__doc__, tuple(declared.values()))
    construct = cast(Any, holder).__init__

    @wraps(construct)
    def check_and_construct(self: Any, **fields: Any) -> None:
        check_names(holder.__name__, list(fields), list(declared))
        construct(self, **fields)

    cast(Any, holder).__init__ = check_and_construct
    return holder


def make_reference_rows() -> list[dict[str, str]]:
    """Return the reference table: a row for each option, every value as text.

    Examples
    --------
    >>> row = next(row for row in make_reference_rows() if row["name"] == "prefetch")
    >>> row["type"], row["default"], row["allowed"], row["flag"], row["key"]
    ('int', '1', 'an integer between 1 and 6', '--prefetch', 'prefetch')
    """
    return [
        {
            "name": option.name,
            "section": option.section,
            "type": option.type,
            "default": repr(option.default),
            "allowed": option.describe_allowed(),
            "help": option.help,
            "functions": ", ".join(option.functions),
            "flag": f"--{option.key}" if option.key else "",
            "key": option.key or "",
        }
        for option in get_all_declarations().values()
    ]


def _validate_fields(record: Any, declarations: Mapping[str, Declaration]) -> None:
    for name, option in declarations.items():
        if (value := getattr(record, name)) is not option.default:  # a default is allowed
            option.validate(value)


def _is_dtype(dtype: Any) -> bool:
    names = [*dtype.keys(), *dtype.values()] if isinstance(dtype, Mapping) else [dtype]
    return all(isinstance(name, str) for name in names)


def _is_failure_limit(limit: Any) -> bool:
    return _parse_failure_limit(limit, 0) is not None


def _parse_failure_limit(limit: int | str | None, n_rows: int) -> int | None:
    """Return the rows out of ``n_rows`` that a number or share allows; None if it is neither."""
    if type(limit) is int and limit >= 0:
        return limit
    share = limit.removesuffix("%") if isinstance(limit, str) and limit.endswith("%") else ""
    if not share.replace(".", "", 1).isdecimal() or float(share) > 100:
        return None
    return int(n_rows * Fraction(share) / 100)


@dataclass(frozen=True, kw_only=True)
class CallKeywords:
    """The keywords of one call, as typed; ``fields`` are those of :class:`Options` among them.

    Only switches are checked here; every other value by what uses it, so that all errors are reported at once.
    """

    devices: Any = declare(
        "auto",
        'Devices to compute on. A string, comma-joined, or a list: "auto" (every GPU, or one CPU worker per core if '
        'there is none), "cuda" (every GPU), "cuda:1", "GPU-<uuid>", "MIG-<uuid>", "cpu", "cpu*4", "cpu:0" (the first '
        'CPU worker); "inline" computes in this process. A ``torch.device`` stands for its text.',
        type="str | torch.device | Sequence[str | torch.device]",
        section="where",
        functions=COMPUTING,
        flag_help="For example cuda, cuda:1, cpu, cpu*4, cuda,cpu*2 or inline.",
        allowed="a string, a torch.device or a list of these",
    )
    device_weights: Literal["auto", "even"] | Sequence[float] | Mapping[str, float] = declare(
        "auto",
        'Share of rows that each device gets. A list in the devices\' order, a mapping by device or kind, "even", or '
        '"auto": by the throughput measured during the call, starting from a prior by kind, which the plan shows as '
        "assumed. 0 leaves a device out.",
        section="where",
        functions=COMPUTING,
        flag_help="For example even, 1,1,8 or cuda=8,cpu=1.",
        allowed="'auto', 'even', a list of numbers, or a mapping from device or kind to number",
    )
    batch_size: int | Literal["auto"] = declare(
        "auto",
        'Rows of a micro-batch. "auto" starts from the size of a row and the smallest share; if there is enough to '
        "compute, the sizes that are fastest are measured for each kind of device. ``map_blocks`` goes by the size of "
        "a row alone.",
        section="how fast",
        allowed="an integer >= 1, or 'auto'",
    )
    client: Any = declare(
        None,
        "Dask client whose workers are the devices. None: the current client if there is one and ``devices`` is "
        '"auto", else a local cluster that is started once per process and kept for the next call (see '
        ":func:`close`).",
        type="Client | None",
        section="where",
        functions=COMPUTING,
        flag=False,
        allowed="a Dask client or None",
    )
    progress: Any = declare(
        None,
        "Show progress: a bar in a terminal, a table in a notebook, else a line every few seconds. None: only in a "
        "terminal or notebook. True: always. False: never. A function: call it with each event "
        "(``daskinfer.diagnostics.events``) and show nothing.",
        type="bool | Callable[[Event], Any] | None",
        section="what is shown",
        functions=("predict", "stream", "run"),
        flag_help="It goes to stderr. [default: progress]",
        allowed="True, False, None or a function of events",
    )
    return_report: bool = declare(
        False,
        "Return a tuple of the output and the RunReport, instead of the output.",
        section="what is shown",
        functions=("predict",),
        flag=False,
    )
    overwrite: bool = declare(
        False,
        "Remove an existing output first, instead of continuing it. False: an output of the same call is continued, "
        "any other refused. Without a target ``plan`` ignores it.",
        section="what",
        functions=STORING,
        formerly="fresh",
    )
    shard: tuple[int, int] | None = declare(
        None,
        "Compute part i of n, counted from 1, as one of n calls that write one output. The call that ends last "
        "completes the output. None: all of it. Without a target ``plan`` ignores it.",
        section="what",
        functions=STORING,
        flag_help="For example 3/64.",
        allowed="a pair (i, n) with 1 <= i <= n, or None",
    )
    probe: bool = declare(
        False,
        "Measure every device on the first rows, for rows/s and the expected time. Starts workers if there are none. "
        "False: nothing starts, and speeds are shown if an earlier call of this process measured them.",
        section="what is shown",
        functions=("plan",),
    )
    options: Options | None = declare(
        None,
        "How the model is run; other keywords replace its fields.",
        section="what",
        flag=False,
        allowed="an Options or None",
    )
    fields: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _validate_fields(self, get_declarations(CallKeywords))


@_document_fields
@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is run; each field is also a keyword of ``predict``, ``stream``, ``run``, ``plan`` and ``map_blocks``.

    ``map_blocks`` does not take the fields that are followed only while daskinfer computes: on failures and reading ahead.

    Raises
    ------
    OptionError
        If a field is outside what is allowed.

    Examples
    --------
    >>> Options(autocast="bf16").autocast
    'bf16'
    """

    dtype: str | Mapping[str, str] | None = declare(
        None,
        'Cast the input to this dtype, micro-batch by micro-batch on the worker. A name ("float32", "bfloat16"), or a '
        "mapping that casts the ports it names. None: no cast, and an input that the model cannot take is refused.",
        section="what",
        flag_help="For example float32, or image=float32,meta=int64 by port.",
        allowed="a name such as 'float32', a mapping from port to name, or None",
        check=_is_dtype,
    )
    autocast: Literal["bf16", "fp16"] | None = declare(
        None, "Run the model under torch.autocast with this precision. None: in its own precision.", section="how fast"
    )
    preprocess: Callable[..., Any] | None = declare(
        None,
        "Function called on the rows of each micro-batch on the worker, before padding. It gets ndarrays, one "
        "argument per port. The model gets what it returns: an array, a tuple (by position) or a dict (by name), with "
        "as many rows.",
        section="what",
        flag=False,
    )
    postprocess: Callable[..., Any] | None = declare(
        None,
        "Function called on the model's output on the worker, without padding. It gets ndarrays in the structure of "
        "the model's output, and returns the output, with as many rows.",
        section="what",
        flag=False,
    )
    output: Any = declare(
        None,
        "Sample of the output, for models whose output cannot be inferred by a trial on made-up rows. An array of any "
        'number of rows, such as ``np.empty((0, 10), "float32")``, in the structure of the model\'s output. None: '
        "inferred.",
        section="what",
        flag=False,
        allowed="an array, a structure of arrays, or None",
    )
    pad: bool = declare(
        True,
        "Pad every micro-batch with zero rows to one shape. Outputs then do not depend on how the input is cut. "
        "False: for models whose output for one row depends on other rows in the batch, or that cannot take zeros.",
        section="what",
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = declare(
        "auto",
        'Memory format in which an nn.Module gets images (n, channels, height, width) and volumes. "auto": '
        '"contiguous", or "channels_last" if that is measured to be faster and the outputs agree; measured only if '
        "``batch_size`` is. Outputs of the two differ in the last bits.",
        section="how fast",
        flag_help="auto: the one measured to be faster, if --batch-size is auto.",
    )
    prefetch: int = declare(
        1,
        "Chunks to read ahead for each device while it computes. Raise it if storage is slow.",
        section="how fast",
        functions=COMPUTING,
        minimum=1,
        maximum=MAX_PREFETCH,
        formerly="readers",
    )
    on_error: Literal["raise", "skip"] = declare(
        "raise",
        'Whether rows that fail end the call (raise) or are filled and listed in the report (skip). "skip" finds them '
        "by halving and fills them with ``fill_value``; all other rows get their outputs.",
        section="when it fails",
        functions=COMPUTING,
        flag_help="Skipped rows end the command with exit code 3.",
    )
    fill_value: float | None = declare(
        None,
        "Value of the rows that ``on_error`` skips. None: NaN, which only floats and complex numbers have.",
        section="when it fails",
        functions=COMPUTING,
        flag_help="[default: NaN]",
    )
    max_failed_rows: int | str | None = declare(
        None,
        "How many rows ``on_error`` may skip, as a number or a share of all rows. Beyond that the call ends with "
        "``TooManyFailures``. Each shard of a ``run`` may have as many, or that share of its own rows. None: any "
        "number.",
        section="when it fails",
        functions=COMPUTING,
        flag_help="For example 5 or 1%.",
        allowed="an integer >= 0, a share such as '1%', or None",
        check=_is_failure_limit,
    )
    nan_is_failure: bool = declare(False, "Treat rows with NaN in their output as failed.", section="when it fails")
    retries: int = declare(
        2,
        "How often to retry rows whose computing, reading or writing raised, a little later each time.",
        section="when it fails",
        functions=COMPUTING,
        minimum=0,
    )
    chunk_timeout: float | None = declare(
        None,
        "Seconds that a chunk may take on a device before its worker is replaced and the chunk is retried. Loading "
        'the model counts. With "inline" there is no worker to replace. Workers of an external cluster are restarted '
        "under ``restart_workers``, and otherwise used no more. None: no limit.",
        section="when it fails",
        functions=COMPUTING,
        above=0,
        unit="seconds",
    )
    restart_workers: bool = declare(
        False,
        "Allow workers of an external cluster to be restarted if they hang or their device broke.",
        section="when it fails",
        functions=COMPUTING,
    )
    trust: bool = declare(
        False,
        "Allow the model file to run code when it is loaded (.pt2, TorchScript, …). As ``Model(…, trust=True)``. "
        "False: such a file is refused.",
        section="what",
        flag="trust-model",
    )

    def __post_init__(self) -> None:
        _validate_fields(self, get_declarations(Options))
        if isinstance(self.dtype, Mapping):  # options do not change once they are made
            object.__setattr__(self, "dtype", dict(self.dtype))

    def compute_max_failed_rows(self, n_rows: int) -> float:
        """Return how many of ``n_rows`` rows may fail.

        Examples
        --------
        >>> Options(max_failed_rows="1%").compute_max_failed_rows(250), Options().compute_max_failed_rows(250)
        (2, inf)
        """
        limit = _parse_failure_limit(self.max_failed_rows, n_rows)
        return math.inf if limit is None else limit

    def get_cast_dtype(self, port: str) -> str | None:
        """Return the name of the dtype that ``port`` is cast to; None if it is not cast."""
        if isinstance(self.dtype, Mapping):
            return self.dtype.get(port)
        return self.dtype


def read_keywords(function: str, keywords: Mapping[str, Any]) -> CallKeywords:
    """Sort what a public function was called with into its own keywords and the fields of :class:`Options`.

    Raises
    ------
    OptionError
        For a keyword that the function does not take (``UnknownKeyword``).
    """
    check_names(function, list(keywords), [option.name for option in list_options(function)])
    own = {name: value for name, value in keywords.items() if name in get_declarations(CallKeywords)}
    return CallKeywords(**own, fields={name: value for name, value in keywords.items() if name not in own})


def merge_options(options: Options | None, fields: Mapping[str, Any]) -> Options:
    """Return ``options`` with ``fields`` replaced.

    Raises
    ------
    OptionError
        If a value is not allowed, or there is no such field (``UnknownKeyword``).
    """
    return replace(options or Options(), **fields)


def is_trusted(options: Options | None, fields: Mapping[str, Any]) -> bool:
    """Return whether the caller trusts the model's file, even if another option is wrong."""
    return bool(fields.get("trust", options is not None and options.trust))
