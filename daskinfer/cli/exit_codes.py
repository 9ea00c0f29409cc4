"""Commands that say why they failed, in one line on stderr and with ``--json`` on stdout, and exit with the code for it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click

from daskinfer.cli.help import HelpPage
from daskinfer.cli.logging import configure_logging, is_debugging, is_json_format, log_error, reset_verbosity
from daskinfer.cli.result import (
    FAILED,
    INTERRUPTED,
    LOCKED,
    REFUSED,
    ROWS_MISSING,
    TERMINATED,
    CommandState,
    print_error,
)
from daskinfer.errors import ChunkError, ClusterError, DaskInferError, OptionError, OutputLocked
from daskinfer.options import get_renamed_key

_RUN_ERRORS = (ChunkError, ClusterError)

EXIT_CODES = {
    0: "done, also if nothing was left to do",
    FAILED: "failed, or the workers did not start; the same command again continues",
    REFUSED: "refused: the command, the model or an existing OUTPUT has to change",
    ROWS_MISSING: "done, but rows failed: OUTPUT.daskinfer/failed_rows.json lists them",
    LOCKED: "another run is writing OUTPUT",
    INTERRUPTED: "interrupted by Ctrl-C",
    TERMINATED: "terminated",
}


def select_exit_codes(*codes: int, **meanings: str) -> Mapping[int, str]:
    """Return the meaning of some exit codes; ``done`` and ``failed`` give those two another one."""
    named = {0: meanings.get("done"), FAILED: meanings.get("failed")}
    return {code: named.get(code) or EXIT_CODES[code] for code in codes}


class Command(HelpPage):
    """Turns an error, also one of its arguments, into one line and an exit code, whatever group it is called from."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        # Before click parses the arguments, since it may refuse them.
        state = CommandState(as_json=_is_switched_on("json", args))
        extra["obj"] = state
        if extra.get("resilient_parsing"):  # a shell completes a word
            return super().make_context(info_name, args, parent, **extra)
        if parent is None or not isinstance(parent.command, Group):
            reset_verbosity()
        configure_logging("json" if "--log-format=json" in "=".join(args) else "text")
        with self._report_errors(state):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with self._report_errors(ctx.obj):
            return super().invoke(ctx)

    @contextlib.contextmanager
    def _report_errors(self, state: CommandState) -> Iterator[None]:
        try:
            yield
            return
        except click.exceptions.Exit:
            raise
        except (Exception, KeyboardInterrupt) as error:
            reason = _add_job_file_errors(_suggest_renamed_flag(error), state)
        code = _get_exit_code(reason)
        if state.as_json:
            print_error(self.name, reason, code)
        if isinstance(reason, click.ClickException) and not is_json_format():
            raise reason  # click shows it with the command's usage
        log_error(reason, code, with_traceback=is_debugging())
        raise click.exceptions.Exit(code)


class Group(HelpPage, click.Group):
    """A group of such commands, which are listed in the order of ``order``."""

    command_class = Command

    def __init__(self, *args: Any, order: tuple[str, ...] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.order = order

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        reset_verbosity()
        return super().make_context(info_name, args, parent, **extra)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.commands, key=lambda name: self.order.index(name) if name in self.order else len(self.order))


def _is_switched_on(name: str, args: list[str]) -> bool:
    """Return whether a switch is on the command line; the last one counts."""
    given = [argument for argument in args if argument in (f"--{name}", f"--no-{name}")]
    return given[-1:] == [f"--{name}"]


def _suggest_renamed_flag(error: BaseException) -> BaseException:
    """Return an error about a flag's old name with its new one, and any other error unchanged."""
    if isinstance(error, click.NoSuchOption) and (renamed := get_renamed_key(error.option_name.removeprefix("--"))):
        message = f"No such option {error.option_name!r}. Did you mean '--{renamed}'?"
        return click.NoSuchOption(error.option_name, message, ctx=error.ctx)
    return error


def _add_job_file_errors(error: BaseException, state: CommandState) -> BaseException:
    """Return an error of the arguments together with those of the job file: what is missing may be wrong in the file."""
    if not isinstance(error, click.ClickException) or not state.errors:
        return error
    parameter = error.param if isinstance(error, click.BadParameter) else None
    if parameter is None or parameter.name not in state.faulty:
        state.errors.add(OptionError(error.format_message().removesuffix(".")))
    try:
        state.errors.raise_if_any()
    except DaskInferError as all_errors:
        return all_errors
    return error


def _get_exit_code(error: BaseException) -> int:
    if isinstance(error, click.ClickException):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 128 + int(getattr(error, "signal_number", signal.SIGINT))
    if isinstance(error, OutputLocked):
        return LOCKED
    refused = isinstance(error, DaskInferError) and not isinstance(error, _RUN_ERRORS)
    return REFUSED if refused else FAILED


@contextlib.contextmanager
def reserve_stdout() -> Iterator[None]:
    """Keep stdout for the result: what a model, or a worker that starts meanwhile, prints goes to stderr."""
    if sys.stdout is None or sys.stderr is None:  # the caller closed it: its number belongs to another file by now
        yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
