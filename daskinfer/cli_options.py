"""The options that commands share, and how their values are read: as text of the command line, or as values of TOML."""

from __future__ import annotations

import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click
from click.shell_completion import CompletionItem

from daskinfer import job_file, log_lines
from daskinfer.command import results_only
from daskinfer.errors import ClusterError, OptionError, Refusals

if TYPE_CHECKING:
    from daskinfer.status import Status

_Natural = tuple[tuple[type, ...], str]


class _Value(click.ParamType, ABC):  # type: ignore[type-arg]  # click 8.1 has no type argument
    """A value that is ``natural`` in TOML, or text; :meth:`parsed` reads the text and checks the rest."""

    natural: ClassVar[_Natural]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.parsed(value)
        except ValueError as error:
            return self.fail(str(error), param, ctx)

    @abstractmethod
    def parsed(self, value: Any) -> Any:
        """The value; a ValueError says why it is none."""


class _Ports(_Value):
    """A path, or ``image=a.npy,meta=b.npy`` as a dict."""

    name = "path"
    natural = ((str, dict), "a path, or a table of paths by port")

    def parsed(self, value: Any) -> Any:
        found = value
        if isinstance(value, str) and "=" in value:
            pairs = [part.partition("=") for part in value.split(",")]
            found = {name: path for name, _, path in pairs}
        if isinstance(found, dict) and not (found and all(n and isinstance(p, str) and p for n, p in found.items())):
            raise ValueError(f"{value!r} is neither a path nor name=path,name=path")
        return found

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        return [CompletionItem(incomplete, type="file")]


class _Names(_Ports):
    """A dtype, or ``image=float32,meta=int64`` as a dict."""

    name = "text"
    natural = ((str, dict), "a dtype, or a table of dtypes by port")

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        return []


class _Devices(_Value):
    """``cuda,cpu*2``, or a list."""

    name = "text"
    natural = ((str, list), "text, or a list of texts")

    def parsed(self, value: Any) -> Any:
        return value  # checked when the call is planned

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        """The devices of this machine, after those that stand there already."""
        from daskinfer.device import here

        before, comma, last = incomplete.rpartition(",")
        found = {"auto": "every GPU, else CPUs", "cuda": "every GPU", "cpu": "a CPU worker", "inline": "this process"}
        found |= {device.name: device.label for device in here() if device.kind == "cuda"}
        return [CompletionItem(f"{before}{comma}{n}", help=label) for n, label in found.items() if n.startswith(last)]


class _Weights(_Value):
    """``auto``, ``even``, ``1,1,8`` or ``cuda=8,cpu=1``."""

    name = "text"
    natural = ((str, list, dict), "auto, even, a list of numbers, or a table of numbers by device")

    def parsed(self, value: Any) -> Any:
        if value in ("auto", "even"):
            return value
        try:
            if isinstance(value, str) and "=" in value:
                value = {name: weight for name, _, weight in (part.partition("=") for part in value.split(","))}
            if isinstance(value, Mapping):
                return {name: float(weight) for name, weight in value.items()}
            return [float(weight) for weight in (value.split(",") if isinstance(value, str) else value)]
        except (ValueError, TypeError):
            raise ValueError(f"{value!r} is neither auto, even, 1,1,8 nor cuda=8,cpu=1") from None


class _Count(_Value):
    """A number, or a word."""

    name = "number"
    natural = ((int, str), "a whole number, or text")

    def parsed(self, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.lstrip("-").isdecimal() else value


class _Shard(_Value):
    """``3/64``."""

    name = "i/n"
    natural = ((str, list), "text such as '3/64', or a list of two numbers")

    def parsed(self, value: Any) -> tuple[int, int]:
        numbers = value.split("/") if isinstance(value, str) else value
        if len(numbers) != 2 or not all(str(n).isdecimal() for n in numbers):
            raise ValueError(f"{value!r} is no part such as 3/64")
        return int(numbers[0]), int(numbers[1])


class _Keywords(_Value):
    """A JSON object, or a table."""

    name = "json"
    natural = ((str, dict), "a table, or text that is a JSON object")

    def parsed(self, value: Any) -> Any:
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except json.JSONDecodeError as error:
            raise ValueError(f"{value!r} is no JSON object ({error})") from None
        if not isinstance(found, dict):
            raise ValueError(f"{value!r} is no JSON object")
        return found


def _read_config(context: click.Context, parameter: click.Parameter, path: str | None) -> None:
    if path is not None:
        # ``run`` and ``plan`` read the same file: what only the other has is no mistake.
        context.default_map = job_file.read(path, [*context.command.params, PROBE], context)


def _choose_format(context: click.Context, parameter: click.Parameter, log_format: str) -> str:
    log_lines.speak(log_format)
    return log_format


PROBE = click.Option(
    ["--probe/--no-probe"],
    default=True,
    show_default=True,
    help="Measure every device on the first rows: rows/s, and the time to expect.",
)

MODEL = click.argument("model", type=click.Path())
PORTS = _Ports()
INPUT = click.argument("input", type=PORTS)

_HOW = (
    click.option(
        "--config",
        type=click.Path(),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="A TOML file of these options, MODEL, INPUT and OUTPUT; what the command line says goes over it. Relative "
        "paths in it are relative to where the command is run.",
    ),
    click.option("--print-config", is_flag=True, help="Print what such a file and the command line say together, and end."),
    click.option("--devices", type=_Devices(), default="auto", show_default=True, help="auto, cuda, cuda:1, cpu, cpu*4, …"),
    click.option(
        "--device-weights",
        type=_Weights(),
        default="auto",
        show_default=True,
        help="Share of rows per device: even, 1,1,8 or cuda=8,cpu=1.",
    ),
    click.option("--batch-size", type=_Count(), default="auto", show_default=True, help="Rows of a micro-batch."),
    click.option("--factory", help="pkg.mod:make, which makes the network for a file of weights."),
    click.option("--kwargs", type=_Keywords(), help="Keywords of the factory, as a JSON object."),
    click.option("--dtype", type=_Names(), help="Cast the input: float32, or image=float32,meta=int64 per port."),
    click.option("--readers", type=int, default=1, show_default=True, help="Chunks read ahead for each device, 1 to 6."),
    click.option(
        "--on-error",
        type=click.Choice(["raise", "skip"]),
        default="raise",
        show_default=True,
        help="What a row that fails does: end the run, or be filled and listed (exit code 3).",
    ),
    click.option("--fill-value", type=float, help="What stands where rows failed. [default: NaN]"),
    click.option("--max-failed-rows", type=_Count(), help="Rows that may fail: a number, or 1%."),
    click.option("--nan-is-failure/--no-nan-is-failure", help="A row whose answer holds a NaN has failed."),
    click.option("--retries", type=int, default=2, show_default=True, help="How often what raised is tried again."),
    click.option("--chunk-timeout", type=float, metavar="SECONDS", help="Replace a worker whose chunk takes longer."),
    click.option("--restart-workers/--no-restart-workers", help="Workers of --scheduler may be restarted where they hang."),
    click.option("--autocast", type=click.Choice(["bf16", "fp16"]), help="Run under automatic mixed precision."),
    click.option("--pad/--no-pad", default=True, help="Fill micro-batches up to one shape, or not."),
    click.option(
        "--trust-model/--no-trust-model",
        help="The model file may run code when it is loaded (.pt2, TorchScript, …).",
    ),
    click.option("--model-sha256", metavar="HEX", help="The SHA-256 that the model file has to have, on every worker."),
    click.option("--fresh/--no-fresh", help="Remove what lies at OUTPUT already, and start over."),
    click.option("--shard", type=_Shard(), help="3/64: compute the third of 64 parts, counted from 1, of one OUTPUT."),
    click.option(
        "--progress/--no-progress",
        default=None,
        help="How the run stands, on stderr: a bar in a terminal, else a line every few seconds. [default: progress]",
    ),
    click.option(
        "--report",
        type=click.Path(),
        metavar="FILE.html",
        help="Write a page about the run, to open in a browser; of shard 3/64 it is FILE-3-of-64.html.",
    ),
)

_SCHEDULER = (
    click.option("--scheduler", type=click.Path(), help="Address of a running Dask scheduler, or its scheduler file."),
    click.option(
        "--tls-ca-file", type=click.Path(), help="Certificate authority of a scheduler at tls://, as for `dask worker`."
    ),
    click.option("--tls-cert", type=click.Path(), help="Own certificate for such a scheduler."),
    click.option("--tls-key", type=click.Path(), help="Key of the own certificate, where it is a file of its own."),
)

_PRINTED = (
    click.option("--json/--no-json", "as_json", help="Print the result as one line of JSON."),
    click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        is_eager=True,
        callback=_choose_format,
        help="Lines on stderr as text, or each as one JSON object.",
    ),
)

_OPTIONS = (
    *("device_weights", "batch_size", "dtype", "autocast", "readers", "on_error", "fill_value", "max_failed_rows"),
    *("nan_is_failure", "retries", "chunk_timeout", "restart_workers", "pad"),
)

Decorated = Callable[..., Any]


def printed(command: Decorated) -> Decorated:
    """The options on how results and lines are printed."""
    return _with(_PRINTED, command)


def scheduled(command: Decorated) -> Decorated:
    """The options that name a scheduler."""
    return _with(_SCHEDULER, command)


def how(command: Decorated) -> Decorated:
    """The options that ``run`` and ``plan`` share."""
    return _with(_HOW, scheduled(printed(command)))


def _with(options: tuple[Callable[[Decorated], Decorated], ...], command: Decorated) -> Decorated:
    for option in reversed(options):
        command = option(command)
    return command


def call(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """Call a function of the api with the network and the keywords that the options say."""
    _refuse_early(given)
    # A factory "my_nets:make" is meant to be found where the command is given, as with python -m.
    sys.path.insert(0, os.getcwd())
    from daskinfer import Model

    log_lines.adopt()
    source = Model(
        given["model"],
        factory=given["factory"],
        kwargs=given["kwargs"] or None,
        trust=given["trust_model"],
        sha256=given["model_sha256"],
    )
    keywords = {name: given[name] for name in _OPTIONS}
    with results_only(), ExitStack() as stack:
        if given["scheduler"]:
            keywords["client"] = stack.enter_context(client_of(given))
        return function(source, devices=given["devices"], **keywords)


def _refuse_early(given: Mapping[str, Any]) -> None:
    """Say what is most often mistyped, paths and devices, all of it, before torch is imported, which takes seconds."""
    from daskinfer.device import parse
    from daskinfer.hardware import machine
    from daskinfer.io import check_path, open_source

    refusals = Refusals()
    for path in paths(given["input"]):
        with refusals.collect():
            open_source(path)
    for path in paths(given["output"]):
        with refusals.collect():
            check_path(path)
    with refusals.collect():
        if not given["scheduler"]:
            parse(given["devices"], machine())
    refusals.raise_if_any()


def paths(ports: str | Mapping[str, str] | None) -> list[str]:
    """The paths of INPUT or OUTPUT, none where it was not given."""
    if ports is None:
        return []
    return [ports] if isinstance(ports, str) else list(ports.values())


def progress_of(asked: bool | None) -> Any:
    """What ``progress=`` is to be: False, a bar where a terminal shows it, else lines of the log every few seconds."""
    from daskinfer.progress import lines
    from daskinfer.status_words import sentence

    def say(status: Status) -> None:
        if status.ended and status.seconds is None and status.error:
            return  # the command's own last line says it
        log_lines.progress_logger.info("%s", sentence(status), extra={"fields": asdict(status)})

    if asked is False:
        return False
    if not log_lines.speaks_json() and sys.stderr is not None and sys.stderr.isatty():
        return asked
    return lines(say)


def client_of(given: Mapping[str, Any], timeout: float | None = None) -> Any:
    """A client of the scheduler that the options name; ``timeout`` in seconds, None: Dask's own.

    Raises
    ------
    ClusterError
        Where it cannot be reached.
    """
    from distributed import Client

    scheduler: str = given["scheduler"]
    where: dict[str, Any] = {"scheduler_file": scheduler} if os.path.exists(scheduler) else {"address": scheduler}
    if timeout is not None:
        where["timeout"] = timeout
    try:
        return Client(**where, security=_security(given), set_as_default=False)
    except (OSError, TimeoutError, ValueError, TypeError, RuntimeError) as error:  # the last two: of its certificates
        raise ClusterError(
            f"the scheduler {scheduler!r} cannot be reached ({error}); the address of a running one, or its file, is "
            "needed, and for one at tls:// --tls-ca-file and --tls-cert. Start one with `dask scheduler`, or leave "
            "--scheduler out."
        ) from error


def _security(given: Mapping[str, Any]) -> Any:
    """Certificates where they were named, else None: Dask's configuration may name some."""
    from distributed import Security

    named = {"tls_ca_file": given["tls_ca_file"], "tls_client_cert": given["tls_cert"], "tls_client_key": given["tls_key"]}
    named = {name: path for name, path in named.items() if path}
    return Security(require_encryption=True, **named) if named else None


def check_report(path: str | None) -> None:
    """Refuse a report that could not be written, before the run that it is about.

    Raises
    ------
    OptionError
        Where it does not end in .html, or cannot be written there.
    """
    if path is None:
        return
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"the report {path!r} does not end in .html, which is what it is. Name it so.")
    folder = os.path.dirname(os.path.abspath(path))
    there = path if os.path.lexists(path) else folder
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(there, os.W_OK):
        raise OptionError(
            f"the report {path!r} cannot be written; a file is needed that can be, in a folder that is there. Make "
            f"{folder!r}, check its rights, or choose another path."
        )
