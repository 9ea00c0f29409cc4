"""``daskinfer`` on the command line: parse, call the api, print.

Results go to stdout, everything else to stderr. Exit codes:

====  ==============================================================
0     done
1     failed while running
2     wrong usage: refused before anything started
130   interrupted by Ctrl-C
====  ==============================================================
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from daskinfer.errors import ChunkError, ClusterError, DaskInferError

_FAILED_WHILE_RUNNING = (ChunkError, ClusterError)


class _Group(click.Group):
    """Turns what goes wrong into one line on stderr and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except KeyboardInterrupt:
            click.echo("daskinfer: interrupted", err=True)
            context.exit(130)
        except Exception as error:
            _explain(error, debug=context.params["debug"])
            refused = isinstance(error, DaskInferError) and not isinstance(error, _FAILED_WHILE_RUNNING)
            context.exit(2 if refused else 1)


def _explain(error: Exception, *, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    else:
        name = "" if isinstance(error, DaskInferError) else f"{type(error).__name__}: "
        click.echo(f"daskinfer: error: {name}{error}", err=True)


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


def _batch_size(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _dtype(text: str | None) -> Any:
    return _ports(text) if text else None


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
    click.option("--autocast", type=click.Choice(["bf16", "fp16"]), help="Run under automatic mixed precision."),
    click.option("--no-pad", is_flag=True, help="Do not fill micro-batches up to one shape."),
    click.option("--scheduler", help="Address of a running Dask scheduler, or its scheduler file."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON."),
)


def _how(command: Callable[..., None]) -> Callable[..., None]:
    """The options that ``run`` and ``plan`` share."""
    for option in reversed(_HOW):
        command = option(command)
    return command


def _call(function: Callable[..., Any], model: str, *arguments: Any, how: dict[str, Any]) -> Any:
    """Call a function of the api as the options say."""
    from daskinfer import Model

    given = {name: how[name] for name in ("device_weights", "batch_size", "dtype", "autocast", "readers")}
    given["pad"] = not how["no_pad"]
    if how["factory"] or how["kwargs"]:
        source: Any = Model(model, factory=how["factory"], kwargs=how["kwargs"])
    else:
        source = model
    with ExitStack() as stack:
        if how["scheduler"]:
            given["client"] = stack.enter_context(_client(how["scheduler"]))
        return function(source, *arguments, devices=how["devices"], **given)


def _client(scheduler: str) -> Any:
    from distributed import Client

    address = {"scheduler_file": scheduler} if os.path.exists(scheduler) else {"address": scheduler}
    try:
        return Client(**address, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(
            f"the scheduler {scheduler!r} cannot be reached ({error}); the address of a running one, or its file, is "
            "needed. Start one with `dask scheduler`, or leave --scheduler out."
        ) from error


@main.command()
@click.argument("model")
@click.argument("input")
@click.argument("output")
@_how
def run(model: str, input: str, output: str, as_json: bool, **how: Any) -> None:
    """Apply MODEL to INPUT and write the answer to OUTPUT.

    MODEL is weights (.safetensors, .pt, .pth) with --factory, a .pt2 program, or a factory pkg.mod:make. INPUT and OUTPUT
    are .npy or .zarr arrays; several ports are named: image=a.npy,meta=b.npy. OUTPUT must not exist.
    """
    from dataclasses import asdict

    import daskinfer

    report = _call(daskinfer.run, model, _ports(input), _ports(output), how=how)
    click.echo(json.dumps(asdict(report)) if as_json else str(report))


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
