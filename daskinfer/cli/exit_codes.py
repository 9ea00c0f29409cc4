"""Commands that report in one line on stderr why they failed, and exit with the code for it (a table in ``cli.main``)."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import click

from daskinfer.cli.logging import configure_logging, is_json_format, log_error
from daskinfer.errors import ChunkError, ClusterError, DaskInferError, OutputLocked
from daskinfer.options import get_renamed_key

FAILED, REFUSED, ROWS_MISSING, LOCKED = 1, 2, 3, 4  # exit codes

_RUN_ERRORS = (ChunkError, ClusterError)


class Command(click.Command):
    """Turns an error, also one of its arguments, into one line and an exit code, whatever group it is called from."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if extra.get("resilient_parsing"):  # a shell completes a word
            return super().make_context(info_name, args, parent, **extra)
        debug = parent is not None and parent.find_root().params.get("debug", False)
        # Before click parses the arguments, since it may refuse them.
        configure_logging("json" if "--log-format=json" in "=".join(args) else "text", debug=debug)
        with _report_errors(debug):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _report_errors(ctx.find_root().params.get("debug", False)):
            return super().invoke(ctx)


class Group(click.Group):
    """A group of such commands."""

    command_class = Command


@contextlib.contextmanager
def _report_errors(debug: bool) -> Iterator[None]:
    reason: BaseException
    message = ""
    try:
        yield
        return
    except click.exceptions.Exit:
        raise
    except click.ClickException as error:
        reason = _suggest_renamed_flag(error)
        if not is_json_format():
            raise reason from error.__cause__  # click shows it with the command's usage
        code, message = reason.exit_code, reason.format_message()
    except KeyboardInterrupt as error:
        reason, code = error, 128 + getattr(error, "signal_number", signal.SIGINT)
    except Exception as error:
        reason, code = error, _get_exit_code(error)
    log_error(reason, code, message=message, with_traceback=debug)
    raise click.exceptions.Exit(code)


def _suggest_renamed_flag(error: click.ClickException) -> click.ClickException:
    """Return an error about a flag's old name with its new one, and any other error unchanged."""
    if isinstance(error, click.NoSuchOption) and (renamed := get_renamed_key(error.option_name.removeprefix("--"))):
        message = f"No such option {error.option_name!r}. Did you mean '--{renamed}'?"
        return click.NoSuchOption(error.option_name, message, ctx=error.ctx)
    return error


def _get_exit_code(error: Exception) -> int:
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
