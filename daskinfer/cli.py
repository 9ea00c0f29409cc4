"""``daskinfer`` on the command line: parse, call the api, print.

Results go to stdout, everything else to stderr. Exit codes:

====  ==============================================================
0     done, also where nothing was left to do
1     failed while running; of verify: something is wrong
2     wrong usage: refused before anything started
3     done, but rows are missing: the report counts them, ``….daskinfer/failed_rows.json`` beside the output lists them
4     another run holds the output
130   interrupted by Ctrl-C
143   terminated
====  ==============================================================
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click

from daskinfer.errors import ChunkError, ClusterError, DaskInferError, OutputLocked

_FAILED_WHILE_RUNNING = (ChunkError, ClusterError)
_ROWS_MISSING, _LOCKED = 3, 4  # exit codes


class _Group(click.Group):
    """Turns what goes wrong into one line on stderr and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except KeyboardInterrupt as error:
            _explain(error, debug=False)
            context.exit(128 + getattr(error, "signal_number", signal.SIGINT))
        except Exception as error:
            _explain(error, debug=context.params["debug"])
            context.exit(_exit_code(error))


def _exit_code(error: Exception) -> int:
    if isinstance(error, OutputLocked):
        return _LOCKED
    refused = isinstance(error, DaskInferError) and not isinstance(error, _FAILED_WHILE_RUNNING)
    return 2 if refused else 1


def _explain(error: BaseException, *, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
        return
    if isinstance(error, KeyboardInterrupt):
        said = str(error) or "interrupted"
    else:
        said = f"error: {'' if isinstance(error, DaskInferError) else f'{type(error).__name__}: '}{error}"
    # The notes say how to go on.
    click.echo(" ".join([f"daskinfer: {said}", *getattr(error, "__notes__", ())]), err=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="daskinfer", prog_name="daskinfer")
@click.option("--debug", is_flag=True, help="Show the whole traceback of an error, and debug lines of the log.")
def main(debug: bool) -> None:
    """Apply a trained network to a large array on every device, in order."""
    _log_to_stderr(logging.DEBUG if debug else logging.WARNING)
    # A factory "my_nets:make" is meant to be found where the command is given, as with python -m.
    sys.path.insert(0, os.getcwd())


def _log_to_stderr(level: int) -> None:
    """Show our own log; the root logger stays as it is, or Dask's lines would come too."""
    logger = logging.getLogger("daskinfer")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(level)


def _ports(text: str) -> Any:
    """A path, or ``image=a.npy,meta=b.npy`` as a dict."""
    if "=" not in text:
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not name or not path for name, _, path in pairs):
        raise click.BadParameter(f"{text!r} is neither a path nor name=path,name=path")
    return {name: path for name, _, path in pairs}


def _weights(text: str) -> Any:
    """``auto``, ``even``, ``1,1,8`` or ``cuda=8,cpu=1``."""
    if text in ("auto", "even"):
        return text
    try:
        if "=" in text:
            return {name: float(weight) for name, _, weight in (part.partition("=") for part in text.split(","))}
        return [float(weight) for weight in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither auto, even, 1,1,8 nor cuda=8,cpu=1") from None


def _batch_size(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.lstrip("-").isdigit() else text


def _dtype(text: str | None) -> Any:
    return _ports(text) if text else None


def _shard(text: str | None) -> tuple[int, int] | None:
    """``3/64``."""
    if text is None:
        return None
    index, _, n_shards = text.partition("/")
    if not (index.isdecimal() and n_shards.isdecimal()):
        raise click.BadParameter(f"{text!r} is no part such as 3/64")
    return int(index), int(n_shards)


def _json(text: str | None) -> Any:
    try:
        return json.loads(text) if text else None
    except json.JSONDecodeError as error:
        raise click.BadParameter(f"{text!r} is no JSON object ({error})") from None


def _parsed(parse: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda context, parameter, value: parse(value)


_HOW = (
    click.option("--devices", default="auto", show_default=True, help="auto, cuda, cuda:1, GPU-<uuid>, cpu, cpu*4, …"),
    click.option(
        "--device-weights",
        default="auto",
        show_default=True,
        callback=_parsed(_weights),
        help="Share of rows per device: even, 1,1,8 or cuda=8,cpu=1.",
    ),
    click.option(
        "--batch-size", default="auto", show_default=True, callback=_parsed(_batch_size), help="Rows of a micro-batch."
    ),
    click.option("--factory", help="pkg.mod:make, which makes the network for a file of weights."),
    click.option("--kwargs", callback=_parsed(_json), help="Keywords of the factory, as a JSON object."),
    click.option("--dtype", callback=_parsed(_dtype), help="Cast the input: float32, or image=float32,meta=int64 per port."),
    click.option("--readers", type=int, default=1, show_default=True, help="Chunks read ahead for each device, 1 to 6."),
    click.option(
        "--on-error",
        type=click.Choice(["raise", "skip"]),
        default="raise",
        show_default=True,
        help="What a row that fails does: end the run, or be filled and listed (exit code 3).",
    ),
    click.option("--fill-value", type=float, help="What stands where rows failed. [default: NaN]"),
    click.option("--max-failed-rows", callback=_parsed(_batch_size), help="Rows that may fail: a number, or 1%."),
    click.option("--nan-is-failure", is_flag=True, help="A row whose answer holds a NaN has failed."),
    click.option("--retries", type=int, default=2, show_default=True, help="How often what raised is tried again."),
    click.option("--chunk-timeout", type=float, metavar="SECONDS", help="Replace a worker whose chunk takes longer."),
    click.option("--restart-workers", is_flag=True, help="Workers of --scheduler may be restarted where they hang."),
    click.option("--autocast", type=click.Choice(["bf16", "fp16"]), help="Run under automatic mixed precision."),
    click.option("--no-pad", is_flag=True, help="Do not fill micro-batches up to one shape."),
    click.option(
        "--trust-model", is_flag=True, help="The model file may run code when it is loaded (.pt2, TorchScript, …)."
    ),
    click.option("--model-sha256", metavar="HEX", help="The SHA-256 that the model file has to have, on every worker."),
    click.option("--scheduler", help="Address of a running Dask scheduler, or its scheduler file."),
    click.option("--tls-ca-file", help="Certificate authority of a scheduler at tls://, as for `dask worker`."),
    click.option("--tls-cert", help="Own certificate for such a scheduler."),
    click.option("--tls-key", help="Key of the own certificate, where it is a file of its own."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON."),
)


_OPTIONS = (
    *("device_weights", "batch_size", "dtype", "autocast", "readers", "on_error", "fill_value", "max_failed_rows"),
    *("nan_is_failure", "retries", "chunk_timeout", "restart_workers"),
)


def _how(command: Callable[..., None]) -> Callable[..., None]:
    """The options that ``run`` and ``plan`` share."""
    for option in reversed(_HOW):
        command = option(command)
    return command


def _call(function: Callable[..., Any], model: str, *arguments: Any, how: dict[str, Any]) -> Any:
    """Call a function of the api as the options say."""
    from daskinfer import Model

    given = {name: how[name] for name in _OPTIONS}
    given["pad"] = not how["no_pad"]
    source = Model(
        model,
        factory=how["factory"],
        kwargs=how["kwargs"] or None,
        trust=how["trust_model"],
        sha256=how["model_sha256"],
    )
    with ExitStack() as stack:
        if how["scheduler"]:
            given["client"] = stack.enter_context(_client(how["scheduler"], _security(how)))
        return function(source, *arguments, devices=how["devices"], **given)


def _security(how: dict[str, Any]) -> Any:
    """Certificates where they were named, else None: Dask's configuration may name some."""
    from distributed import Security

    given = {"tls_ca_file": how["tls_ca_file"], "tls_client_cert": how["tls_cert"], "tls_client_key": how["tls_key"]}
    given = {name: path for name, path in given.items() if path}
    return Security(require_encryption=True, **given) if given else None


def _client(scheduler: str, security: Any) -> Any:
    from distributed import Client

    address = {"scheduler_file": scheduler} if os.path.exists(scheduler) else {"address": scheduler}
    try:
        return Client(**address, security=security, set_as_default=False)
    except (OSError, TimeoutError, ValueError, TypeError, RuntimeError) as error:  # the last two: of its certificates
        raise ClusterError(
            f"the scheduler {scheduler!r} cannot be reached ({error}); the address of a running one, or its file, is "
            "needed, and for one at tls:// --tls-ca-file and --tls-cert. Start one with `dask scheduler`, or leave "
            "--scheduler out."
        ) from error


@main.command()
@click.argument("model")
@click.argument("input")
@click.argument("output")
@click.option("--fresh", is_flag=True, help="Remove what lies at OUTPUT already, and start over.")
@click.option(
    "--shard", callback=_parsed(_shard), help="3/64: compute the third of 64 parts, counted from 1, of one OUTPUT."
)
@_how
def run(model: str, input: str, output: str, fresh: bool, shard: Any, as_json: bool, **how: Any) -> None:
    """Apply MODEL to INPUT and write the answer to OUTPUT; the same command again goes on where it was left.

    MODEL is weights (.safetensors, .pt, .pth) with --factory, a .pt2 program with --trust-model, or a factory pkg.mod:make.
    INPUT and OUTPUT are .npy or .zarr arrays; several ports are named: image=a.npy,meta=b.npy. What lies at OUTPUT already
    has to be of the same command.
    """
    import daskinfer

    stored = partial(daskinfer.run, fresh=fresh, shard=shard)
    report = _call(stored, model, _ports(input), _ports(output), how=how)
    click.echo(json.dumps(report.to_dict()) if as_json else str(report))
    if report.failed_rows:
        click.echo(
            f"daskinfer: {len(report.failed_rows):,} rows have no answer; failed_rows.json beside it lists them", err=True
        )
        click.get_current_context().exit(_ROWS_MISSING)


@main.command()
@click.argument("output")
def verify(output: str) -> None:
    """Read OUTPUT, which `run` wrote, again, and say what is not as it was written."""
    from daskinfer.verifying import verify as verified

    found = verified(output)
    click.echo(str(found))
    if found.wrong:
        click.get_current_context().exit(1)


@main.command()
@click.argument("model")
@click.argument("input")
@click.argument("output", required=False)
@click.option("--probe", is_flag=True, help="Measure every device on the first rows: rows/s, and the time to expect.")
@_how
def plan(model: str, input: str, output: str | None, probe: bool, as_json: bool, **how: Any) -> None:
    """Show what `run` would do with the same arguments, and refuse what cannot work."""
    import daskinfer

    def planned(source: Any, x: Any, **given: Any) -> Any:
        return daskinfer.plan(source, x, target=_ports(output) if output else None, probe=probe, **given)

    found = _call(planned, model, _ports(input), how=how)
    click.echo(json.dumps(found.to_dict()) if as_json else str(found))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def devices(as_json: bool) -> None:
    """List the devices of this machine."""
    from daskinfer.device import here

    found = here()
    click.echo(json.dumps(found.to_dicts()) if as_json else str(found))


@main.command()
@click.option("--rows", default=200_000, show_default=True, type=click.IntRange(1), help="How many images.")
@click.option("--devices", default="auto", show_default=True, help="As for run.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="A new folder for images and answers. [default: a temporary one]"
)
def demo(rows: int, devices: str, folder: Path | None) -> None:
    """Watch a trained network classify handwritten digits on all devices of this machine."""
    from daskinfer.demo.show import show

    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="daskinfer-demo-"))
    else:
        _make(folder)
    for line in show(folder, rows, devices):
        click.echo(line)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise click.BadParameter(f"{str(folder)!r} exists; a new folder is needed", param_hint="--folder") from None


if __name__ == "__main__":
    main()
