"""``python -m tests.faults``: one line per fault, with its figure and the one asked for; exit code 1 if one fails."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from tests.benchmarks.judging import Verdict, failed, skipped
from tests.benchmarks.processes import Failed, Unavailable
from tests.faults import crashes, network, rows, soak, storage, trust, workers
from tests.faults.effort import Effort

SCENARIOS: dict[str, Callable[[Effort], Verdict]] = {
    "killed": workers.killed,
    "memory": workers.out_of_memory,
    "poison": workers.poison,
    "hung": workers.hung,
    "instants": crashes.at_every_instant,
    "full": storage.disk_full,
    "stale": storage.stale_writer,
    "output": storage.output_corrupted,
    "input": storage.input_corrupted,
    "cut": network.cut,
    "scheduler": network.scheduler_lost,
    "listeners": network.listeners,
    "tls": network.tls,
    "tampered": trust.tampered,
    "code": trust.code_in_files,
    "declared": trust.declared,
    "rows": rows.bad_rows,
    "soak": soak.soak,
}


def proved(name: str, effort: str) -> Verdict:
    """The line of a scenario; what goes wrong in one does not end the others."""
    with tempfile.TemporaryDirectory(prefix=f"chaos-{name}-", ignore_cleanup_errors=True) as folder:
        try:
            return SCENARIOS[name](Effort(effort, Path(folder)))
        except Unavailable as error:
            return skipped(name, str(error))
        except Failed as error:
            return failed(name, str(error))
        except Exception as error:
            return failed(name, f"{type(error).__name__}: {error}")


def line(verdict: Verdict) -> str:
    """As it is printed."""
    word = {True: "pass", False: "FAIL", None: "skipped"}[verdict.passed]
    asked = f"  [asked: {verdict.bound}]" if verdict.bound else ""
    return f"{verdict.target:<48} {word:<8} {verdict.figure}{asked}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", multiple=True, type=click.Choice(list(SCENARIOS)), help="This scenario; may be repeated.")
@click.option("--short", "effort", flag_value="short", help="Fewer seeds and points: a few minutes in all, for CI.")
@click.option("--long", "effort", flag_value="long", help="With the soak of half an hour.")
@click.option("--seconds", "timed", is_flag=True, help="Say how long each took.")
def main(only: Sequence[str], effort: str | None, timed: bool) -> None:
    """Break things, and see what daskinfer promises kept."""
    verdicts = []
    for name in [name for name in SCENARIOS if not only or name in only]:
        began = time.monotonic()
        verdicts.append(proved(name, effort or "usual"))
        click.echo(line(verdicts[-1]) + (f"  ({time.monotonic() - began:.0f} s)" if timed else ""))
    sys.exit(any(verdict.passed is False for verdict in verdicts))


if __name__ == "__main__":
    main()
