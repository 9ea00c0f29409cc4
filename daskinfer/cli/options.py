"""The options that commands share, and what is called with them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from daskinfer.cli import config, logging
from daskinfer.cli.exit_codes import reserve_stdout
from daskinfer.cli.types import CountType, DevicesType, DtypesType, KeywordsType, PathsType, ShardType, WeightsType
from daskinfer.errors import ClusterError, ErrorCollector, OptionError

if TYPE_CHECKING:
    from daskinfer.diagnostics.status import Status


def _read_config(context: click.Context, parameter: click.Parameter, path: str | None) -> None:
    if path is not None:
        # ``run`` and ``plan`` read the same file: what only the other has is no mistake.
        context.default_map = config.read_config(path, [*context.command.params, PROBE], context)


def _choose_format(context: click.Context, parameter: click.Parameter, log_format: str) -> str:
    logging.configure_logging(log_format)
    return log_format


PROBE = click.Option(
    ["--probe/--no-probe"],
    default=True,
    show_default=True,
    help="Measure every device on the first rows: rows/s, and the time to expect.",
)

MODEL = click.argument("model", type=click.Path())
PATHS_TYPE = PathsType()
INPUT = click.argument("input", type=PATHS_TYPE)

_RUN_OPTIONS = (
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
    click.option(
        "--devices", type=DevicesType(), default="auto", show_default=True, help="auto, cuda, cuda:1, cpu, cpu*4, …"
    ),
    click.option(
        "--device-weights",
        type=WeightsType(),
        default="auto",
        show_default=True,
        help="Share of rows per device: even, 1,1,8 or cuda=8,cpu=1.",
    ),
    click.option("--batch-size", type=CountType(), default="auto", show_default=True, help="Rows of a micro-batch."),
    click.option("--factory", help="pkg.mod:make, which makes the network for a file of weights."),
    click.option("--kwargs", type=KeywordsType(), help="Keywords of the factory, as a JSON object."),
    click.option("--dtype", type=DtypesType(), help="Cast the input: float32, or image=float32,meta=int64 per port."),
    click.option("--prefetch", type=int, default=1, show_default=True, help="Chunks read ahead for each device, 1 to 6."),
    click.option(
        "--on-error",
        type=click.Choice(["raise", "skip"]),
        default="raise",
        show_default=True,
        help="What a row that fails does: end the run, or be filled and listed (exit code 3).",
    ),
    click.option("--fill-value", type=float, help="With --on-error skip: what stands where rows failed. [default: NaN]"),
    click.option(
        "--max-failed-rows", type=CountType(), help="With --on-error skip: how many rows may fail, a number or 1%."
    ),
    click.option("--nan-is-failure/--no-nan-is-failure", help="A row whose answer holds a NaN has failed."),
    click.option("--retries", type=int, default=2, show_default=True, help="How often what raised is tried again."),
    click.option("--chunk-timeout", type=float, metavar="SECONDS", help="Replace a worker whose chunk takes longer."),
    click.option("--restart-workers/--no-restart-workers", help="Workers of --scheduler may be restarted where they hang."),
    click.option("--autocast", type=click.Choice(["bf16", "fp16"]), help="Run under automatic mixed precision."),
    click.option(
        "--memory-format",
        type=click.Choice(["auto", "contiguous", "channels_last"]),
        default="auto",
        show_default=True,
        help="How images lie in memory; auto: as is measured to be faster, where the micro-batch is auto.",
    ),
    click.option("--pad/--no-pad", default=True, help="Fill micro-batches up to one shape, or not."),
    click.option(
        "--trust-model/--no-trust-model",
        help="The model file may run code when it is loaded (.pt2, TorchScript, …).",
    ),
    click.option("--model-sha256", metavar="HEX", help="The SHA-256 that the model file has to have, on every worker."),
    click.option(
        "--model-version",
        metavar="TEXT",
        help="Which network this is, for those whose content cannot be read stably; change it when the network changes.",
    ),
    click.option("--overwrite/--no-overwrite", help="Remove what lies at OUTPUT already, and start over."),
    click.option("--shard", type=ShardType(), help="3/64: compute the third of 64 parts, counted from 1, of one OUTPUT."),
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

_SCHEDULER_OPTIONS = (
    click.option("--scheduler", type=click.Path(), help="Address of a running Dask scheduler, or its scheduler file."),
    click.option(
        "--tls-ca-file", type=click.Path(), help="Certificate authority of a scheduler at tls://, as for `dask worker`."
    ),
    click.option("--tls-cert", type=click.Path(), help="Own certificate for such a scheduler."),
    click.option("--tls-key", type=click.Path(), help="Key of the own certificate, where it is a file of its own."),
    click.option(
        "--wait-for-workers",
        type=int,
        metavar="N",
        help="Wait until --scheduler, and its file, are there and have N workers. [default: take those that are there]",
    ),
)

_OUTPUT_OPTIONS = (
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

_API_KEYWORDS = (
    *("device_weights", "batch_size", "dtype", "autocast", "prefetch", "on_error", "fill_value", "max_failed_rows"),
    *("nan_is_failure", "retries", "chunk_timeout", "restart_workers", "pad", "memory_format"),
)

CommandFunction = Callable[..., Any]


def add_output_options(command: CommandFunction) -> CommandFunction:
    """The options on how results and lines are printed."""
    return _add_options(_OUTPUT_OPTIONS, command)


def add_scheduler_options(command: CommandFunction) -> CommandFunction:
    """The options that name a scheduler."""
    return _add_options(_SCHEDULER_OPTIONS, command)


def add_run_options(command: CommandFunction) -> CommandFunction:
    """The options that ``run`` and ``plan`` share."""
    return _add_options(_RUN_OPTIONS, add_scheduler_options(add_output_options(command)))


def _add_options(
    options: tuple[Callable[[CommandFunction], CommandFunction], ...], command: CommandFunction
) -> CommandFunction:
    for option in reversed(options):
        command = option(command)
    return command


def call_api(function: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """Call a function of the api with the network and the keywords that the options say."""
    _validate_early(options)
    # A factory "my_nets:make" is meant to be found where the command is given, as with python -m.
    sys.path.insert(0, os.getcwd())
    from daskinfer import Model

    logging.adopt_dask_loggers()
    source = Model(
        options["model"],
        factory=options["factory"],
        kwargs=options["kwargs"] or None,
        trust=options["trust_model"],
        sha256=options["model_sha256"],
        version=options["model_version"],
    )
    keywords = {name: options[name] for name in _API_KEYWORDS}
    with reserve_stdout(), ExitStack() as stack:
        if options["scheduler"]:
            keywords["client"] = stack.enter_context(connect_client(options))
        return function(source, devices=options["devices"], **keywords)


def _validate_early(options: Mapping[str, Any]) -> None:
    """Say what is most often mistyped, all of it, before torch is imported, which takes seconds."""
    from daskinfer.hardware.device_spec import parse_devices
    from daskinfer.hardware.discovery import inspect_machine
    from daskinfer.models.paths import check_reference
    from daskinfer.storage.formats import check_output_path, open_source

    refusals = ErrorCollector()
    with refusals.collect():
        check_reference(options["model"], has_factory=options["factory"] is not None)
    for path in list_paths(options["input"]):
        with refusals.collect():
            open_source(path)
    for path in list_paths(options["output"]):
        with refusals.collect():
            check_output_path(path)
    with refusals.collect():
        if not options["scheduler"]:
            parse_devices(options["devices"], inspect_machine())
    with refusals.collect():
        check_wait(options)
    refusals.raise_if_any()


def check_wait(options: Mapping[str, Any]) -> None:
    """Refuse to wait for workers of no scheduler, or for less than one.

    Raises
    ------
    OptionError
        Which it is.
    """
    asked = options["wait_for_workers"]
    if asked is not None and asked < 1:
        raise OptionError(f"--wait-for-workers is {asked}; it may be a number from 1. Pass one, or leave it out.")
    if asked is not None and not options["scheduler"]:
        raise OptionError(
            f"--wait-for-workers {asked} was given without --scheduler, whose workers it is for; daskinfer's own are waited "
            "for anyhow. Leave it out, or name a scheduler."
        )


def list_paths(ports: str | Mapping[str, str] | None) -> list[str]:
    """The paths of INPUT or OUTPUT, none where it was not given."""
    if ports is None:
        return []
    return [ports] if isinstance(ports, str) else list(ports.values())


def make_progress(progress: bool | None) -> Any:
    """What ``progress=`` is to be: False, a bar where a terminal shows it, else lines of the log every few seconds."""
    from daskinfer.diagnostics.progress import make_line_listener
    from daskinfer.diagnostics.status_text import format_status

    def log_status(status: Status) -> None:
        if status.ended and status.seconds is None and status.error:
            return  # the command's own last line says it
        logging.progress_logger.info("%s", format_status(status), extra={"fields": asdict(status)})

    if progress is False:
        return False
    if not logging.is_json_format() and sys.stderr is not None and sys.stderr.isatty():
        return progress
    return make_line_listener(log_status)


def connect_client(options: Mapping[str, Any], timeout: float | None = None) -> Any:
    """A client of the scheduler that the options name, once it has the workers that they ask for.

    ``timeout`` in seconds for the scheduler; None: Dask's own.

    Raises
    ------
    ClusterError
        Where it cannot be reached.
    """
    from distributed import Client

    scheduler, n_workers = options["scheduler"], options["wait_for_workers"]
    # Dask waits for a file that is to come.
    is_file = os.path.exists(scheduler) or (n_workers is not None and scheduler.endswith(".json"))
    where: dict[str, Any] = {"scheduler_file": scheduler} if is_file else {"address": scheduler}
    if timeout is not None:
        where["timeout"] = timeout
    try:
        client = Client(**where, security=_make_security(options), set_as_default=False)
    except (OSError, TimeoutError, ValueError, TypeError, RuntimeError) as error:  # the last two: of its certificates
        raise ClusterError(
            f"the scheduler {scheduler!r} cannot be reached ({error}); the address of a running one, or its file, is "
            "needed, and for one at tls:// --tls-ca-file and --tls-cert. Start one with `dask scheduler`, or leave "
            "--scheduler out."
        ) from error
    if n_workers is not None:
        logging.progress_logger.info("waiting until %s has %s workers", scheduler, n_workers)
        try:
            client.wait_for_workers(n_workers)
        except BaseException:
            client.close()
            raise
    return client


def _make_security(options: Mapping[str, Any]) -> Any:
    """Certificates where they were named, else None: Dask's configuration may name some."""
    from distributed import Security

    named = {
        "tls_ca_file": options["tls_ca_file"],
        "tls_client_cert": options["tls_cert"],
        "tls_client_key": options["tls_key"],
    }
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
