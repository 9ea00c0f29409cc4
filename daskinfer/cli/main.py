"""``daskinfer`` on the command line: parse, call the api, print. ``dask infer`` is the same as ``daskinfer run``.

Results go to stdout, everything else to stderr: where a command fails there is nothing on stdout, also with ``--json``. Exit
codes:

====  ==============================================================
0     done, also where nothing was left to do
1     failed, or the workers could not be had; of verify and doctor: something is wrong
2     refused: the command, the network or what lies at OUTPUT has to change; mostly before anything started
3     done, but rows are missing: the report counts them, ``….daskinfer/failed_rows.json`` beside the output lists them
4     another run holds the output
130   interrupted by Ctrl-C
143   terminated
====  ==============================================================
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
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
    make_progress,
)
from daskinfer.errors import StorageError
from daskinfer.storage.paths import Shard, format_shard_suffix

_SHELLS = ("bash", "zsh", "fish")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="daskinfer", prog_name="daskinfer")
@click.option("--debug", is_flag=True, help="Show the whole traceback of an error, and debug lines of the log.")
def main(debug: bool) -> None:
    """Apply a trained network to a large array on every device, in order."""


@main.command()
@MODEL
@INPUT
@click.argument("output", type=PATHS_TYPE)
@add_run_options
@click.pass_context
def run(context: click.Context, /, print_config: bool, report: str | None, as_json: bool, **options: Any) -> None:
    """Apply MODEL to INPUT and write the answer to OUTPUT; the same command again goes on where it was left.

    MODEL is weights (.safetensors, .pt, .pth) with --factory, a .pt2 program with --trust-model, or a factory pkg.mod:make.
    INPUT and OUTPUT are .npy or .zarr arrays; several ports are named: image=a.npy,meta=b.npy. What lies at OUTPUT already
    has to be of the same command.
    """
    if print_config:
        click.echo(config.dump_config(context.params, context.command.params), nl=False)
        return
    check_report(report)

    def run_stored(source: Any, **keywords: Any) -> Any:
        from daskinfer import run

        where = {"overwrite": options["overwrite"], "shard": options["shard"], "progress": make_progress(options["progress"])}
        return run(source, options["input"], options["output"], **where, **keywords)

    done = call_api(run_stored, options)
    if report is not None:
        _write_report(done, report, options["shard"])
    click.echo(json.dumps(done.to_dict()) if as_json else str(done))
    if done.failed_rows:
        log_missing_rows(
            len(done.failed_rows), ROWS_MISSING, list_paths(options["output"])[0], sharded=options["shard"] is not None
        )
        context.exit(ROWS_MISSING)


def _write_report(run_report: Any, report_path: str, shard: Shard | None) -> None:
    """Write the report, each shard its own; that of the run that did the work is not replaced by one of nothing done."""
    path = Path(report_path)
    path = path.with_stem(f"{path.stem}{format_shard_suffix(shard)}")
    if not run_report.rows and path.exists():
        return
    try:
        run_report.to_html(path)
    except OSError as error:
        raise StorageError(
            f"the report {str(path)!r} cannot be written: {error.strerror}; the output itself is stored. Make room, or "
            "choose another path; repeating the command computes nothing again."
        ) from error


# ``dask infer`` is the same command.
infer = Command("infer", params=run.params, callback=run.callback, help=run.help, context_settings=main.context_settings)


@main.command()
@MODEL
@INPUT
@click.argument("output", type=PATHS_TYPE, required=False)
@add_run_options
@click.pass_context
def plan(context: click.Context, /, print_config: bool, report: str | None, as_json: bool, **options: Any) -> None:
    """Show what `run` would do with the same arguments, and refuse what cannot work; OUTPUT stays as it is.

    The first rows are computed on every device, to tell the time to expect; --no-probe starts nothing.
    """
    if print_config:
        click.echo(config.dump_config(context.params, context.command.params), nl=False)
        return
    check_report(report)

    def make_plan(source: Any, **keywords: Any) -> Any:
        from daskinfer import plan

        where = {name: options[name] for name in ("overwrite", "shard", "probe")}
        return plan(source, options["input"], target=options["output"], **where, **keywords)

    found = call_api(make_plan, options)
    click.echo(json.dumps(found.to_dict()) if as_json else str(found))


plan.params.append(PROBE)


@main.command()
@click.argument("output", type=click.Path())
@add_output_options
def verify(output: str, as_json: bool, log_format: str) -> None:
    """Read OUTPUT, which `run` wrote, again, and say what is not as it was written."""
    from daskinfer.storage.verify import verify as verified

    found = verified(output)
    click.echo(json.dumps(asdict(found)) if as_json else str(found))
    if found.wrong:
        click.get_current_context().exit(FAILED)


@main.command()
@add_output_options
def devices(as_json: bool, log_format: str) -> None:
    """List the devices of this machine."""
    from daskinfer.hardware.device_spec import find_local_devices

    found = find_local_devices()
    click.echo(json.dumps(found.to_dicts()) if as_json else str(found))


@main.command()
@add_scheduler_options
@add_output_options
def doctor(as_json: bool, log_format: str, **options: Any) -> None:
    """Say what works here, and on each worker of --scheduler, and how to mend what does not.

    Ends with 1 where a run would fail.
    """
    from daskinfer.cli.doctor import CONNECT_SECONDS, examine, is_healthy

    check_wait(options)
    adopt_dask_loggers()
    found = []
    for finding in examine(partial(connect_client, options, CONNECT_SECONDS) if options["scheduler"] else None):
        found.append(finding)
        if not as_json:
            click.echo(str(finding))
    well = is_healthy(found)
    if as_json:
        click.echo(json.dumps({"well": well, "findings": [asdict(finding) for finding in found]}))
    else:
        click.echo("a run works here" if well else "a run does not work here: mend what is wrong first")
    if not well:
        click.get_current_context().exit(FAILED)


@main.command()
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> None:
    """Print what makes SHELL complete this command's words.

    In ~/.bashrc or ~/.zshrc: eval "$(daskinfer completion bash)"; in fish: daskinfer completion fish | source.
    """
    script = get_completion_class(shell)
    assert script is not None  # of click's own
    click.echo(script(main, {}, "daskinfer", "_DASKINFER_COMPLETE").source())


@main.command()
@click.option("--rows", default=200_000, show_default=True, type=click.IntRange(1), help="How many images.")
@click.option("--devices", default="auto", show_default=True, help="As for run.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="A new folder for images and answers. [default: a temporary one]"
)
def demo(rows: int, devices: str, folder: Path | None) -> None:
    """Watch a trained network classify handwritten digits on all devices of this machine."""
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
        raise click.BadParameter(f"{str(folder)!r} exists; a new folder is needed", param_hint="--folder") from None


if __name__ == "__main__":
    main()
