"""``daskinfer`` on the command line: parse, call the api, print. ``dask infer`` is the same as ``daskinfer run``.

Results go to stdout, everything else to stderr: a command that fails prints nothing on stdout, also with ``--json``. Exit
codes:

====  ==============================================================
0     done, also if nothing was left to do
1     failed, or the workers did not start; verify and doctor: something is wrong
2     refused: the command, the model or the existing OUTPUT has to change; mostly before anything started
3     done, but rows are missing: the report counts them, ``….daskinfer/failed_rows.json`` beside the output lists them
4     another run has locked the output
130   interrupted by Ctrl-C
143   terminated
====  ==============================================================
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from daskinfer.cli import config
from daskinfer.cli.exit_codes import FAILED, ROWS_MISSING, Command, Group
from daskinfer.cli.logging import adopt_dask_loggers, log_missing_rows
from daskinfer.cli.options import (
    INPUT,
    MODEL,
    PATHS_TYPE,
    PROBE,
    add_output_options,
    add_run_options,
    add_scheduler_options,
    call_api,
    check_report,
    check_wait,
    connect_client,
    list_paths,
)
from daskinfer.errors import StorageError
from daskinfer.storage.paths import Shard, format_shard_suffix

_SHELLS = ("bash", "zsh", "fish")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="daskinfer", prog_name="daskinfer")
@click.option("--debug", is_flag=True, help="Show an error's traceback, and the log's debug lines.")
def main(debug: bool) -> None:
    """Apply a trained model to a large array on every device, in order."""


@add_run_options
@main.command()
@MODEL
@INPUT
@click.argument("output", type=PATHS_TYPE)
@click.pass_context
def run(context: click.Context, /, print_config: bool, report: str | None, as_json: bool, **options: Any) -> None:
    """Apply MODEL to INPUT and write the output to OUTPUT; the same command again continues it.

    MODEL is weights (.safetensors, .pt, .pth) with --factory, a .pt2 program with --trust-model, or a factory pkg.mod:make.
    INPUT and OUTPUT are .npy or .zarr arrays; several ports are named: image=a.npy,meta=b.npy. An existing OUTPUT must be of
    the same command.
    """
    if print_config:
        click.echo(config.dump_config(context.params, context.command.params), nl=False)
        return
    check_report(report)
    done = call_api("run", options, options["input"], options["output"])
    done = replace(done, facts={"command": _format_command(context), **done.facts})
    if report is not None:
        _write_report(done, report, options["shard"])
    click.echo(json.dumps(done.to_dict()) if as_json else str(done))
    if done.failed_rows:
        log_missing_rows(
            len(done.failed_rows), ROWS_MISSING, list_paths(options["output"])[0], sharded=options["shard"] is not None
        )
        context.exit(ROWS_MISSING)


def _format_command(context: click.Context) -> str:
    """Return the command as it was typed."""
    return shlex.join([context.find_root().info_name or "daskinfer", *sys.argv[1:]])


def _write_report(run_report: Any, report_path: str, shard: Shard | None) -> None:
    """Write the report, one for each shard; a run that found everything done keeps the report of the run that did it."""
    path = Path(report_path)
    path = path.with_stem(f"{path.stem}{format_shard_suffix(shard)}")
    if not run_report.rows and path.exists():
        return
    try:
        run_report.to_html(path)
    except OSError as error:
        raise StorageError(
            f"cannot write the report {str(path)!r}: {error.strerror}; the output itself is stored. Free some space or "
            "choose another path, then repeat the command: it computes nothing again."
        ) from error


# ``dask infer`` is the same command.
infer = Command("infer", params=run.params, callback=run.callback, help=run.help, context_settings=main.context_settings)


@add_run_options
@main.command()
@MODEL
@INPUT
@click.argument("output", type=PATHS_TYPE, required=False)
@click.pass_context
def plan(context: click.Context, /, print_config: bool, report: str | None, as_json: bool, **options: Any) -> None:
    """Show what `run` would do with the same arguments, and refuse what cannot work; OUTPUT is not touched.

    The first rows are computed on every device to estimate the time; --no-probe starts nothing.
    """
    if print_config:
        click.echo(config.dump_config(context.params, context.command.params), nl=False)
        return
    check_report(report)
    found = call_api("plan", options, options["input"], target=options["output"])
    click.echo(json.dumps(found.to_dict()) if as_json else str(found))


plan.params.append(PROBE)


@add_output_options
@main.command()
@click.argument("output", type=click.Path())
def verify(output: str, as_json: bool, log_format: str) -> None:
    """Re-read OUTPUT, which `run` wrote, and check every chunk against its recorded checksum."""
    from daskinfer.storage.verify import verify as verified

    found = verified(output)
    click.echo(json.dumps(asdict(found)) if as_json else str(found))
    if found.wrong:
        click.get_current_context().exit(FAILED)


@add_output_options
@main.command()
def devices(as_json: bool, log_format: str) -> None:
    """List the devices of this machine."""
    from daskinfer.hardware.device_spec import find_local_devices

    found = find_local_devices()
    click.echo(json.dumps(found.to_dicts()) if as_json else str(found))


@add_output_options
@add_scheduler_options
@main.command()
def doctor(as_json: bool, log_format: str, **options: Any) -> None:
    """Check what works here, and on each worker of --scheduler, and say how to fix what does not.

    Exits with 1 if a run would fail.
    """
    from daskinfer.cli.doctor import CONNECT_SECONDS, examine, is_healthy

    check_wait(options)
    adopt_dask_loggers()
    findings = []
    for finding in examine(partial(connect_client, options, CONNECT_SECONDS) if options["scheduler"] else None):
        findings.append(finding)
        if not as_json:
            click.echo(str(finding))
    healthy = is_healthy(findings)
    if as_json:
        click.echo(json.dumps({"well": healthy, "findings": [asdict(finding) for finding in findings]}))
    else:
        click.echo("a run works here" if healthy else "some checks failed; fix the errors above first")
    if not healthy:
        click.get_current_context().exit(FAILED)


@main.command()
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> None:
    """Print the script that makes SHELL complete this command.

    In ~/.bashrc or ~/.zshrc: eval "$(daskinfer completion bash)"; in fish: daskinfer completion fish | source.
    """
    script = get_completion_class(shell)
    assert script is not None  # click has one for each of _SHELLS
    click.echo(script(main, {}, "daskinfer", "_DASKINFER_COMPLETE").source())


@main.command()
@click.option("--rows", default=200_000, show_default=True, type=click.IntRange(1), help="How many images.")
@click.option("--devices", default="auto", show_default=True, help="As for run.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="A new folder for images and outputs. [default: a temporary one]"
)
def demo(rows: int, devices: str, folder: Path | None) -> None:
    """Watch a trained model classify handwritten digits on all devices of this machine."""
    from daskinfer.demo.show import run_demo

    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="daskinfer-demo-"))
    else:
        _make_folder(folder)
    for line in run_demo(folder, rows, devices):
        click.echo(line)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise click.BadParameter(f"must be a new folder, got {str(folder)!r}, which exists", param_hint="--folder") from None


if __name__ == "__main__":
    main()
