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
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from daskinfer.cli import config, logging
from daskinfer.cli.exit_codes import reserve_stdout
from daskinfer.cli.types import CountType, DevicesType, DtypesType, KeywordsType, PathsType, ShardType, WeightsType
from daskinfer.core.declarations import Declaration, Section
from daskinfer.errors import ClusterError, ErrorCollector, OptionError
from daskinfer.options import get_all_declarations, list_options

if TYPE_CHECKING:
    from daskinfer.diagnostics.status import Status


def _read_config(context: click.Context, parameter: click.Parameter, path: str | None) -> None:
    if path is not None:
        # ``run`` and ``plan`` read the same file: a key that only the other has is allowed.
        context.default_map = config.read_config(path, [*context.command.params, PROBE], context)


def _choose_format(context: click.Context, parameter: click.Parameter, log_format: str) -> str:
    logging.configure_logging(log_format)
    return log_format


# Types of values that are more than a number, a choice or a switch.
_TYPES: Mapping[str, click.ParamType[Any]] = {
    "devices": DevicesType(),
    "device_weights": WeightsType(),
    "batch_size": CountType(),
    "dtype": DtypesType(),
    "max_failed_rows": CountType(),
    "shard": ShardType(),
    "progress": click.BOOL,
}
_PLAIN_TYPES: Mapping[Any, click.ParamType[Any]] = {bool: click.BOOL, int: click.INT, float: click.FLOAT}


def make_flag(option: Declaration, **attributes: Any) -> click.Option:
    """Make the flag of an option from its declaration; ``attributes`` override those of ``click.Option``."""
    kind = _TYPES.get(option.name) or _PLAIN_TYPES.get(option.kind) or click.Choice(option.choices)
    is_switch = kind is click.BOOL
    settings: dict[str, Any] = {
        "default": option.default,
        "show_default": option.default not in (None, False),
        "help": _describe_flag(option),
        "metavar": option.unit.upper() or None,
    }
    names = [f"--{option.key}/--no-{option.key}" if is_switch else f"--{option.key}", option.name]
    return click.Option(names, type=None if is_switch else kind, **settings | attributes)


def _describe_flag(option: Declaration) -> str:
    """Return the help of a flag, which names other options by their flags."""
    keys = {name: f"--{declared.key}" for name, declared in get_all_declarations().items() if declared.key}
    text = re.sub(r"``(\w+)``", lambda match: keys.get(match[1], match[1]), option.summary)
    limits = "" if option.maximum is None else f"Between {option.minimum} and {option.maximum}."
    return " ".join(filter(None, [text, limits, option.flag_help]))


def _get_section_number(option: Declaration) -> int:
    return get_args(Section).index(option.section)


PROBE = make_flag(get_all_declarations()["probe"], default=True, show_default=True)

MODEL = click.argument("model", type=click.Path())
PATHS_TYPE = PathsType()
INPUT = click.argument("input", type=PATHS_TYPE)

_RUN_OPTIONS = (
    click.Option(
        ["--config"],
        type=click.Path(),
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="A TOML file of these options, MODEL, INPUT and OUTPUT; the command line overrides it. Relative paths in it "
        "are relative to the working directory.",
    ),
    click.Option(["--print-config"], is_flag=True, help="Print the effective configuration as TOML and exit."),
    click.Option(["--factory"], help="pkg.mod:make, which makes the model for a file of weights."),
    click.Option(["--kwargs"], type=KeywordsType(), help="Keywords of the factory, as a JSON object."),
    click.Option(["--model-sha256"], metavar="HEX", help="The SHA-256 that the model file must have, on every worker."),
    click.Option(
        ["--model-version"],
        metavar="TEXT",
        help="Which model this is, if its content cannot be read stably; change it whenever the model changes.",
    ),
    *(make_flag(option) for option in sorted(list_options("run"), key=_get_section_number) if option.key),
    click.Option(
        ["--report"],
        type=click.Path(),
        metavar="FILE.html",
        help="Write a page about the run, to open in a browser; of shard 3/64 it is FILE-3-of-64.html.",
    ),
)

_SCHEDULER_OPTIONS = (
    click.Option(["--scheduler"], type=click.Path(), help="Address of a running Dask scheduler, or its scheduler file."),
    click.Option(
        ["--tls-ca-file"], type=click.Path(), help="Certificate authority of a tls:// scheduler, as for `dask worker`."
    ),
    click.Option(["--tls-cert"], type=click.Path(), help="Own certificate for a tls:// scheduler."),
    click.Option(["--tls-key"], type=click.Path(), help="Key of the own certificate, if it is in a file of its own."),
    click.Option(
        ["--wait-for-workers"],
        type=int,
        metavar="N",
        help="Wait until --scheduler, or its file, exists and has N workers. [default: use those it has]",
    ),
)

_OUTPUT_OPTIONS = (
    click.Option(["--json/--no-json", "as_json"], help="Print the result as one line of JSON."),
    click.Option(
        ["--log-format"],
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        is_eager=True,
        callback=_choose_format,
        help="Write lines on stderr as text, or each as one JSON object.",
    ),
)


def add_output_options(command: click.Command) -> click.Command:
    """Add the options on how results and lines are printed."""
    command.params += _OUTPUT_OPTIONS
    return command


def add_scheduler_options(command: click.Command) -> click.Command:
    """Add the options that name a scheduler."""
    command.params += _SCHEDULER_OPTIONS
    return command


def add_run_options(command: click.Command) -> click.Command:
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
    from daskinfer.hardware.device_spec import parse_devices
    from daskinfer.hardware.discovery import inspect_machine
    from daskinfer.models.paths import check_reference
    from daskinfer.storage.formats import check_output_path, open_source

    errors = ErrorCollector()
    errors.attempt(check_reference, options["model"], has_factory=options["factory"] is not None)
    for path in list_paths(options["input"]):
        errors.attempt(open_source, path)
    for path in list_paths(options["output"]):
        errors.attempt(check_output_path, path)
    if not options["scheduler"]:
        errors.attempt(parse_devices, options["devices"], inspect_machine())
    errors.attempt(check_wait, options)
    errors.raise_if_any()


def check_wait(options: Mapping[str, Any]) -> None:
    """Refuse to wait for fewer workers than one, or without a scheduler.

    Raises
    ------
    OptionError
        With what was given.
    """
    n_workers = options["wait_for_workers"]
    if n_workers is None:
        return
    if n_workers < 1:
        raise OptionError(f"--wait-for-workers must be an integer >= 1, got {n_workers}")
    if not options["scheduler"]:
        raise OptionError(
            f"--wait-for-workers {n_workers} needs --scheduler: daskinfer always waits for workers that it starts itself. "
            "Leave it out, or name a scheduler."
        )


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
    if not logging.is_json_format() and sys.stderr is not None and sys.stderr.isatty():
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
