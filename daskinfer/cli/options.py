"""The options that commands share, and the call of the api with them.

An option of the api becomes a flag from its declaration in ``daskinfer.options``; only the command's own stand here.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from logging import DEBUG, INFO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from daskinfer.cli import config, logging
from daskinfer.cli.exit_codes import reserve_stdout
from daskinfer.cli.help import Flag
from daskinfer.cli.types import (
    DevicesType,
    DtypesType,
    KeywordsType,
    PathsType,
    ShardType,
    WeightsType,
    is_batch_size,
    make_count_type,
    make_number_type,
)
from daskinfer.core.declarations import Declaration
from daskinfer.errors import ClusterError, ErrorCollector, OptionError
from daskinfer.options import get_all_declarations, list_options

if TYPE_CHECKING:
    from daskinfer.diagnostics.status import Status

C = TypeVar("C", bound=click.Command)


def _read_config(context: click.Context, parameter: click.Parameter, path: str | None) -> None:
    if path is None:
        return
    # ``run`` and ``plan`` read the same file: a key that only the other has is allowed.
    job = config.read_config(path, [*context.command.params, PROBE], context)
    context.default_map = job.values
    context.obj.faulty |= job.faulty
    for error in job.errors:  # raised with what else is wrong, once the arguments are parsed
        context.obj.errors.add(error)


def _choose_format(context: click.Context, parameter: click.Parameter, log_format: str) -> str:
    logging.configure_logging(log_format)
    return log_format


def _choose_output(context: click.Context, parameter: click.Parameter, as_json: bool) -> bool:
    context.obj.as_json = as_json
    return as_json


def _raise_verbosity(context: click.Context, parameter: click.Parameter, is_on: bool) -> None:
    if is_on:
        logging.raise_verbosity(DEBUG if parameter.name == "debug" else INFO)


# Types of values that are more than a number, a choice or a switch.
_DECLARED = get_all_declarations()
_TYPES: Mapping[str, click.ParamType[Any]] = {
    "devices": DevicesType(),
    "device_weights": WeightsType(),
    "batch_size": make_count_type(_DECLARED["batch_size"], is_batch_size),
    "dtype": DtypesType(),
    "max_failed_rows": make_count_type(_DECLARED["max_failed_rows"]),
    "shard": ShardType(),
    "progress": click.BOOL,
}


def make_flag(option: Declaration, **attributes: Any) -> Flag:
    """Make the flag of an option from its declaration; ``attributes`` override those of ``click.Option``."""
    kind = _TYPES.get(option.name) or _make_type(option)
    is_switch = kind is click.BOOL
    settings: dict[str, Any] = {
        "section": option.section,
        "declaration": option,
        "default": option.default,
        "show_default": option.default not in (None, False),
        "help": _describe_flag(option),
        "metavar": option.unit.upper() or None,
        "type": None if is_switch else kind,
    }
    names = [f"--{option.key}/--no-{option.key}" if is_switch else f"--{option.key}", option.name]
    return Flag(names, **settings | attributes)


def _make_type(option: Declaration) -> click.ParamType[Any]:
    if option.kind is bool:
        return click.BOOL
    return make_number_type(option) if option.kind in (int, float) else click.Choice(option.choices)


def _describe_flag(option: Declaration) -> str:
    """Return the help of a flag, which names other options by their flags."""
    keys = {name: f"--{declared.key}" for name, declared in get_all_declarations().items() if declared.key}
    text = re.sub(r"``(\w+)``", lambda match: keys.get(match[1], match[1]), option.summary)
    limits = "" if option.maximum is None else f"Between {option.minimum} and {option.maximum}."
    return " ".join(filter(None, [text, limits, option.flag_help]))


PROBE = make_flag(_DECLARED["probe"], default=True, show_default=True)

MODEL = click.argument("model", type=click.Path())
PATHS_TYPE = PathsType()
INPUT = click.argument("input", type=PATHS_TYPE)

_RUN_OPTIONS = (
    Flag(
        ["--config"],
        section="what",
        type=click.Path(),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="A TOML file of these options, MODEL, INPUT and OUTPUT; the command line overrides it. Relative paths in it "
        "are relative to the working directory.",
    ),
    Flag(["--factory"], section="what", help="pkg.mod:make, which makes the model for a file of weights."),
    Flag(["--kwargs"], section="what", type=KeywordsType(), help="Keywords of the factory, as a JSON object."),
    Flag(
        ["--model-sha256"],
        section="what",
        metavar="HEX",
        help="The SHA-256 that the model file must have, on every worker.",
    ),
    Flag(
        ["--model-version"],
        section="what",
        metavar="TEXT",
        help="Which model this is, if its content cannot be read stably; change it whenever the model changes.",
    ),
    *(make_flag(option) for option in list_options("run") if option.key),
    Flag(
        ["--report"],
        section="what is shown",
        type=click.Path(),
        metavar="FILE.html",
        help="Write a page about the run, to open in a browser; of shard 3/64 it is FILE-3-of-64.html.",
    ),
    Flag(
        ["--print-config"],
        section="what is shown",
        is_flag=True,
        help="Print the effective configuration as TOML and exit.",
    ),
)

_SCHEDULER_OPTIONS = (
    Flag(
        ["--scheduler"],
        section="where",
        type=click.Path(),
        help="Address of a running Dask scheduler, or its scheduler file.",
    ),
    Flag(
        ["--wait-for-workers"],
        section="where",
        type=int,
        metavar="N",
        help="Wait until --scheduler, or its file, exists and has N workers. [default: use those it has]",
    ),
    Flag(
        ["--tls-ca-file"],
        section="where",
        type=click.Path(),
        help="Certificate authority of a tls:// scheduler, as for `dask worker`.",
    ),
    Flag(["--tls-cert"], section="where", type=click.Path(), help="Own certificate for a tls:// scheduler."),
    Flag(
        ["--tls-key"],
        section="where",
        type=click.Path(),
        help="Key of the own certificate, if it is in a file of its own.",
    ),
)

# Of every command, and of the group: ``daskinfer --debug run …`` and ``daskinfer run … --debug`` are the same.
LOG_OPTIONS = (
    Flag(
        ["-v", "--verbose"],
        section="what is shown",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_raise_verbosity,
        help="Show more of the log on stderr, such as where the dashboard is.",
    ),
    Flag(
        ["--debug"],
        section="what is shown",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_raise_verbosity,
        help="Show all of the log, with each choice that is made, and an error's traceback.",
    ),
)

_OUTPUT_OPTIONS = (
    Flag(
        ["--json/--no-json", "as_json"],
        section="what is shown",
        is_eager=True,
        callback=_choose_output,
        help="Print the result, or why there is none, as one line of JSON.",
    ),
    Flag(
        ["--log-format"],
        section="what is shown",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        is_eager=True,
        callback=_choose_format,
        help="Write lines on stderr as text, or each as one JSON object.",
    ),
    *LOG_OPTIONS,
)

VERIFY_PROGRESS = Flag(
    ["--progress/--no-progress"],
    section="what is shown",
    default=True,
    show_default=True,
    help="Say on stderr what is being read.",
)


def add_output_options(command: C) -> C:
    """Add the options on how results and lines are printed."""
    command.params += _OUTPUT_OPTIONS
    return command


def add_scheduler_options(command: C) -> C:
    """Add the options that name a scheduler."""
    command.params += _SCHEDULER_OPTIONS
    return command


def add_run_options(command: C) -> C:
    """Add the options that ``run`` and ``plan`` share."""
    command.params += _RUN_OPTIONS
    return add_output_options(add_scheduler_options(command))


def call_api(function: str, options: Mapping[str, Any], *arguments: Any, **keywords: Any) -> Any:
    """Call a function of the api with the model, these arguments, and the keywords that the command's options give.

    What is most often mistyped is checked before torch is imported, which takes seconds.
    """
    _validate_early(options)
    # A factory "my_nets:make" is found in the working directory, as with python -m.
    sys.path.insert(0, os.getcwd())
    import daskinfer

    logging.adopt_dask_loggers()
    model = daskinfer.Model(
        options["model"],
        factory=options["factory"],
        kwargs=options["kwargs"] or None,
        trust=options["trust"],
        sha256=options["model_sha256"],
        version=options["model_version"],
    )
    keywords |= {option.name: options[option.name] for option in list_options(function) if option.key}
    if "progress" in keywords:
        keywords["progress"] = make_progress(options["progress"])
    with reserve_stdout(), ExitStack() as stack:
        if options["scheduler"]:
            keywords["client"] = stack.enter_context(connect_client(options))
        return getattr(daskinfer, function)(model, *arguments, **keywords)


def _validate_early(options: Mapping[str, Any]) -> None:
    """Refuse at once all that can be known to be wrong by now; what is slow comes after the first sign of life."""
    from daskinfer.hardware.device_spec import parse_devices
    from daskinfer.hardware.discovery import inspect_machine
    from daskinfer.models.paths import check_reference
    from daskinfer.storage.formats import check_input_path, check_output_path, open_source
    from daskinfer.storage.output_request import check_shard

    errors: ErrorCollector = click.get_current_context().obj.errors
    errors.attempt(check_reference, options["model"], has_factory=options["factory"] is not None)
    inputs = [path for path in list_paths(options["input"]) if errors.succeeds(check_input_path, path)]
    for path in list_paths(options["output"]):
        errors.attempt(check_output_path, path)
    errors.attempt(check_shard, options["shard"], overwrite=options["overwrite"])
    errors.attempt(check_report, options["report"])
    errors.attempt(check_scheduler, options)
    if not options["scheduler"]:
        errors.attempt(parse_devices, options["devices"], inspect_machine())
    if not errors:
        log_start(f"{options['model']}: loading torch and the model", options["progress"])
    for path in inputs:  # imports Zarr for some
        errors.attempt(open_source, path)
    errors.raise_if_any()


def log_start(message: str, progress: bool | None) -> None:
    """Say what takes the next seconds, before anything slow is imported."""
    if progress is False:
        return
    if _is_watched():
        click.echo(message, err=True)
    else:
        logging.progress_logger.info("%s", message)


def _is_watched() -> bool:
    """Return whether progress is shown to a person, and not written to a log."""
    return not logging.is_json_format() and sys.stderr is not None and sys.stderr.isatty()


def check_scheduler(options: Mapping[str, Any]) -> None:
    """Refuse a scheduler or certificates that are not there, and to wait for no workers, or without a scheduler.

    Raises
    ------
    OptionError
        With what was given.
    """
    scheduler, n_workers = options["scheduler"], options["wait_for_workers"]
    if n_workers is not None and n_workers < 1:
        raise OptionError(f"--wait-for-workers must be an integer >= 1, got {n_workers}")
    if n_workers is not None and not scheduler:
        raise OptionError(
            f"--wait-for-workers {n_workers} needs --scheduler: daskinfer always waits for workers that it starts itself. "
            "Leave it out, or name a scheduler."
        )
    for name in ("tls_ca_file", "tls_cert", "tls_key"):
        if options[name] and not os.path.isfile(options[name]):
            raise OptionError(f"--{name.replace('_', '-')} must name a file, got {options[name]!r}; correct the path")
    if not scheduler or os.path.isfile(scheduler) or _ADDRESS.fullmatch(scheduler):
        return
    if "://" in scheduler:
        raise OptionError(f"the scheduler's address {scheduler!r} has no port. Add it: {scheduler.rstrip('/')}:8786.")
    if not scheduler.endswith(".json"):
        raise OptionError(
            f"the scheduler {scheduler!r} is neither an existing file nor an address. Name the file that "
            "`dask scheduler --scheduler-file` writes, or an address such as tcp://host:8786."
        )
    if n_workers is None:
        raise OptionError(
            f"the scheduler file {scheduler!r} does not exist. Correct the path, or wait for the file with "
            "--wait-for-workers 1."
        )


# What Dask can connect to: with a port, unless it is a name within this process.
_ADDRESS = re.compile(r"inproc://.+|([a-z]+://)?(\[[^\]\s]+\]|[^/:\s]+):[0-9]{1,5}/?", re.IGNORECASE)


def list_paths(ports: str | Mapping[str, str] | None) -> list[str]:
    """Return the paths of INPUT or OUTPUT; none if it was not given."""
    if ports is None:
        return []
    return [ports] if isinstance(ports, str) else list(ports.values())


def make_progress(progress: bool | None) -> Any:
    """Return the value for ``progress=``: a bar if stderr is a terminal, else a listener that logs lines."""
    from daskinfer.diagnostics.progress import make_line_listener
    from daskinfer.diagnostics.status import format_status

    def log_status(status: Status) -> None:
        if status.ended and status.seconds is None and status.error:
            return  # the command's own last line says so
        logging.progress_logger.info("%s", format_status(status), extra={"fields": asdict(status)})

    if progress is False:
        return False
    if _is_watched():
        return progress
    return make_line_listener(log_status)


def connect_client(options: Mapping[str, Any], timeout: float | None = None) -> Any:
    """Connect to the scheduler that the options name, and wait until it has as many workers as they ask for.

    ``timeout`` is in seconds, for the scheduler to answer; None: Dask's own.

    Raises
    ------
    ClusterError
        If it cannot be reached.
    """
    from distributed import Client

    scheduler, n_workers = options["scheduler"], options["wait_for_workers"]
    # Dask waits for a file that does not exist yet.
    is_file = os.path.exists(scheduler) or (n_workers is not None and scheduler.endswith(".json"))
    address: dict[str, Any] = {"scheduler_file": scheduler} if is_file else {"address": scheduler}
    if timeout is not None:
        address["timeout"] = timeout
    try:
        client = Client(**address, security=_make_security(options), set_as_default=False)
    except (OSError, TimeoutError, ValueError, TypeError, RuntimeError) as error:  # the last two come from its certificates
        raise ClusterError(
            f"cannot reach the scheduler {scheduler!r}: {error}. Start one with `dask scheduler`, pass --tls-ca-file and "
            "--tls-cert for one at tls://, or leave --scheduler out."
        ) from error
    if n_workers is not None:
        logging.progress_logger.info("waiting for %s to have %s workers", scheduler, n_workers)
        try:
            client.wait_for_workers(n_workers)
        except BaseException:
            client.close()
            raise
    return client


def _make_security(options: Mapping[str, Any]) -> Any:
    """Return the certificates that the options name; None if they name none, since Dask's configuration may."""
    from distributed import Security

    named = {
        "tls_ca_file": options["tls_ca_file"],
        "tls_client_cert": options["tls_cert"],
        "tls_client_key": options["tls_key"],
    }
    named = {name: path for name, path in named.items() if path}
    return Security(require_encryption=True, **named) if named else None


def check_report(path: str | None) -> None:
    """Refuse a report that could not be written, before the run starts.

    Raises
    ------
    OptionError
        If its name does not end in .html, or it cannot be written there.
    """
    if path is None:
        return
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"--report must end in .html, got {path!r}")
    folder = os.path.dirname(os.path.abspath(path))
    written = path if os.path.lexists(path) else folder
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(written, os.W_OK):
        raise OptionError(
            f"cannot write the report {path!r}; --report must be a writable file in an existing folder. Create {folder!r}, "
            "check its permissions, or choose another path."
        )
