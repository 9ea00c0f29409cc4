"""``daskinfer`` on the command line: parse, call the api, print. ``dask infer`` is the same as ``daskinfer run``.

Results go to stdout, everything else to stderr. A command that fails prints nothing on stdout, unless ``--json`` asks for an
object that says so. Exit codes, and the ``status`` of that object:

====  ============  ==============================================================
0     done          done, also if nothing was left to do
1     failed        failed, or the workers did not start; verify and doctor: something is wrong
2     refused       the command, the model or the existing OUTPUT has to change; mostly before anything started
3     rows_missing  done, but rows failed: the report counts them, ``OUTPUT.daskinfer/failed_rows.json`` lists them
4     locked        another run is writing the output
130   interrupted   interrupted by Ctrl-C
143   terminated    terminated
====  ============  ==============================================================

With ``--json`` a command prints one line on stdout, whatever its outcome: an object with keys in snake_case. ``schema`` is
1; it is raised when a key goes or changes its meaning, and new keys may come at any time. ``command`` is the command's
name; ``status`` and ``exit_code`` are those above; ``error`` is null, or an object with the error's ``type``, its
``message`` (the last line on stderr) and ``reasons``, a list with each thing that is wrong. The result stands beside them,
and is left out if there is an ``error``:

========  ========================================================================
run       the report: ``rows``, ``seconds``, ``rows_before``, ``failed_rows``, ``devices``, …; ``output_paths``
plan      ``n_rows``, ``batch_size``, ``devices``, ``chunks``, ``seconds`` (null if it was not measured), ``notes``, …
verify    ``output_path``, ``n_rows``, ``n_parts``, ``nbytes``, ``n_failed``, ``wrong`` (what does not match)
devices   ``devices``: ``name``, ``kind``, ``label``, ``memory_nbytes``, ``free_nbytes``, ``uuid``; null is unknown
doctor    ``healthy``; ``findings``: ``what``, ``state``, ``found``, ``cure``, ``where``
========  ========================================================================

A command that is killed, or terminated before its run has begun, prints nothing.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import get_completion_class

from daskinfer.cli import config
from daskinfer.cli.exit_codes import EXIT_CODES, Command, Group, select_exit_codes
from daskinfer.cli.logging import adopt_dask_loggers, log_missing_rows
from daskinfer.cli.options import (
    INPUT,
    LOG_OPTIONS,
    MODEL,
    PATHS_TYPE,
    PROBE,
    VERIFY_PROGRESS,
    add_output_options,
    add_run_options,
    add_scheduler_options,
    call_api,
    check_scheduler,
    connect_client,
    list_paths,
    log_start,
)
from daskinfer.cli.result import FAILED, ROWS_MISSING, print_result
from daskinfer.errors import StorageError
from daskinfer.storage.paths import Shard, format_shard_suffix

if TYPE_CHECKING:
    from daskinfer.diagnostics.report import RunReport

_SHELLS = ("bash", "zsh", "fish")


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    order=("run", "plan", "verify", "devices", "doctor", "demo", "completion"),
    examples=("daskinfer run my_nets:make images.zarr scores.zarr", "daskinfer run --help"),
    exit_codes=EXIT_CODES,
)
@click.version_option(package_name="daskinfer", prog_name="daskinfer")
def main() -> None:
    """Apply a trained model to a large array on every device, in order."""


main.params += LOG_OPTIONS


_RUN_EXAMPLES = (
    'daskinfer run my_nets:make images.zarr scores.zarr --devices "cuda,cpu*2"',
    "daskinfer run net.safetensors images.npy out.npy --factory my_nets:make",
    "daskinfer run --config job.toml --shard 3/64 --json",
)


@add_run_options
@main.command(
    short_help="Apply MODEL to INPUT and write OUTPUT, or continue it.",
    examples=_RUN_EXAMPLES,
    exit_codes=EXIT_CODES,
)
@MODEL
@INPUT
@click.argument("output", type=PATHS_TYPE)
@click.pass_context
def run(context: click.Context, /, print_config: bool, as_json: bool, **options: Any) -> None:
    """Apply MODEL to INPUT and write the output to OUTPUT; the same command again continues it.

    MODEL is weights (.safetensors, .pt, .pth) with --factory, a .pt2 program with --trust-model, or a factory pkg.mod:make.
    INPUT and OUTPUT are .npy or .zarr arrays; several ports are named: image=a.npy,meta=b.npy. An existing OUTPUT must be of
    the same command.
    """
    if print_config:
        _print_config(context)
        return
    report: RunReport = call_api("run", options, options["input"], options["output"])
    report = replace(report, facts={"command": _format_command(context), **report.facts})
    if options["report"] is not None:
        _write_report(report, options["report"], options["shard"])
    outputs = list_paths(options["output"])
    text = f"{report} ({_list_checks(outputs)})" if report.found_all_done else str(report)
    exit_code = ROWS_MISSING if report.failed_rows else 0
    print_result(text, _make_run_fields(report, outputs), exit_code)
    if report.failed_rows:
        log_missing_rows(len(report.failed_rows), exit_code, outputs[0], sharded=options["shard"] is not None)
    context.exit(exit_code)


def _print_config(context: click.Context) -> None:
    context.obj.errors.raise_if_any()
    click.echo(config.dump_config(context.params, context.command.params), nl=False)


def _list_checks(outputs: Sequence[str]) -> str:
    """Say which outputs are there, and the commands that check them."""
    commands = " && ".join(f"daskinfer verify {shlex.quote(output)}" for output in outputs)
    return f"{', '.join(outputs)}; to check: {commands}"


def _make_run_fields(report: RunReport, outputs: Sequence[str]) -> dict[str, Any]:
    """Return a report's fields, whose facts have titles for people, with keys for programs."""
    fields = report.to_dict()
    facts = {re.sub(r"\W+", "_", title).lower(): fact for title, fact in fields["facts"].items()}
    return fields | {"facts": facts, "output_paths": [os.path.abspath(output) for output in outputs]}


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
infer = Command(
    "infer",
    params=run.params,
    callback=run.callback,
    help=run.help,
    short_help=run.short_help,
    context_settings=main.context_settings,
    examples=[example.replace("daskinfer run", "dask infer") for example in _RUN_EXAMPLES],
    exit_codes=EXIT_CODES,
)


@add_run_options
@main.command(
    short_help="Show what run would do, and refuse what cannot work.",
    examples=(
        "daskinfer plan my_nets:make images.zarr scores.zarr --devices cuda",
        "daskinfer plan --config job.toml --no-probe",
    ),
    exit_codes=select_exit_codes(0, 1, 2, 130, done="the run can work"),
)
@MODEL
@INPUT
@click.argument("output", type=PATHS_TYPE, required=False)
@click.pass_context
def plan(context: click.Context, /, print_config: bool, as_json: bool, **options: Any) -> None:
    """Show what `run` would do with the same arguments, and refuse what cannot work; OUTPUT is not touched.

    The first rows are computed on every device to estimate the time; --no-probe starts nothing.
    """
    if print_config:
        _print_config(context)
        return
    found = call_api("plan", options, options["input"], target=options["output"])
    paths = [os.path.abspath(output) for output in list_paths(options["output"])]
    print_result(str(found), {**found.to_dict(), "output_paths": paths})


plan.params.append(PROBE)


@add_output_options
@main.command(
    short_help="Check what run wrote against its checksums.",
    examples=("daskinfer verify scores.zarr",),
    exit_codes=select_exit_codes(
        0, 1, 2, 130, done="every chunk is there and as it was written", failed="chunks are missing or changed"
    ),
)
@click.argument("output", type=click.Path())
@click.pass_context
def verify(context: click.Context, output: str, as_json: bool, log_format: str, progress: bool) -> None:
    """Re-read OUTPUT, which `run` wrote, and check every chunk against its recorded checksum."""
    log_start(f"{output}: reading all of it", progress)
    from daskinfer.storage.verify import verify as verified

    found = verified(output)
    exit_code = FAILED if found.wrong else 0
    print_result(str(found), {"output_path": os.path.abspath(output), **asdict(found)}, exit_code)
    context.exit(exit_code)


verify.params.append(VERIFY_PROGRESS)


@add_output_options
@main.command(
    short_help="List the devices of this machine.",
    examples=("daskinfer devices",),
    exit_codes=select_exit_codes(0, 2, done="done"),
)
def devices(as_json: bool, log_format: str) -> None:
    """List the devices of this machine, by the names that --devices takes."""
    from daskinfer.hardware.device_spec import find_local_devices

    found = find_local_devices()
    unknown_if_empty = ("uuid", "memory_nbytes", "free_nbytes")
    fields = [device | {name: device[name] or None for name in unknown_if_empty} for device in found.to_dicts()]
    print_result(str(found), {"devices": fields})


@add_output_options
@add_scheduler_options
@main.command(
    short_help="Check whether a run works here, and say how to fix it.",
    examples=("daskinfer doctor", "daskinfer doctor --scheduler tcp://host:8786"),
    exit_codes=select_exit_codes(0, 1, 2, 130, done="a run works", failed="a run would fail"),
)
@click.pass_context
def doctor(context: click.Context, /, as_json: bool, log_format: str, **options: Any) -> None:
    """Check what works here, and on each worker of --scheduler, and say how to fix what does not."""
    check_scheduler(options)
    from daskinfer.cli.doctor import CONNECT_SECONDS, examine, is_healthy

    adopt_dask_loggers()
    findings = []
    for finding in examine(partial(connect_client, options, CONNECT_SECONDS) if options["scheduler"] else None):
        findings.append(finding)
        if not as_json:
            click.echo(str(finding))
    healthy = is_healthy(findings)
    exit_code = 0 if healthy else FAILED
    text = "a run works here" if healthy else "some checks failed; fix the errors above first"
    print_result(text, {"healthy": healthy, "findings": [asdict(finding) for finding in findings]}, exit_code)
    context.exit(exit_code)


@main.command(
    short_help="Print the script that makes a shell complete commands.",
    examples=('eval "$(daskinfer completion bash)"',),
    exit_codes=select_exit_codes(0, 2, done="done"),
)
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> None:
    """Print the script that makes SHELL complete this command.

    In ~/.bashrc or ~/.zshrc: eval "$(daskinfer completion bash)"; in fish: daskinfer completion fish | source.
    """
    script = get_completion_class(shell)
    assert script is not None  # click has one for each of _SHELLS
    click.echo(script(main, {}, "daskinfer", "_DASKINFER_COMPLETE").source())


@main.command(
    short_help="Classify digits on every device, beside a plain loop.",
    examples=("daskinfer demo", "daskinfer demo --devices cpu*2 --folder digits"),
    exit_codes=select_exit_codes(0, 1, 2, 130, done="done"),
)
@click.option("--rows", type=click.IntRange(1), help="How many images. [default: enough for every device]")
@click.option("--devices", default="auto", show_default=True, help="As for run.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default="daskinfer-demo",
    show_default=True,
    help="Where images, scores, a report and a picture are written; those of an earlier demo are replaced.",
)
def demo(rows: int | None, devices: str, folder: Path) -> None:
    """Watch a trained model classify handwritten digits on all devices of this machine."""
    from daskinfer.demo.show import run_demo

    for line in run_demo(folder, rows, devices, shutil.get_terminal_size().columns, _show_waiting):
        click.echo(line)


def _show_waiting(text: str) -> None:
    """Show what takes time on a terminal, in a line that the next one replaces."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{text and f'{text} ...'}", err=True, nl=False)


if __name__ == "__main__":
    main()
