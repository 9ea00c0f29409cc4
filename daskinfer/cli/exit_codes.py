"""Commands that say in one line on stderr what ended them, and end with the exit code for it (a table in ``cli``)."""

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

FAILED, REFUSED, ROWS_MISSING, LOCKED = 1, 2, 3, 4  # exit codes

_RUN_ERRORS = (ChunkError, ClusterError)


class Command(click.Command):
    """Turns what goes wrong, in its arguments too, into one line and an exit code, whatever group it is called from."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if extra.get("resilient_parsing"):  # a shell asks how a word may end
            return super().make_context(info_name, args, parent, **extra)
        debug = parent is not None and parent.find_root().params.get("debug", False)
        # Before click reads them, since it may refuse what it reads.
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
    ended: BaseException
    said = ""
    try:
        yield
        return
    except click.exceptions.Exit:
        raise
    except click.ClickException as error:
        if not is_json_format():
            raise  # click shows it with the command's usage
        ended, code, said = error, error.exit_code, error.format_message()
    except KeyboardInterrupt as error:
        ended, code = error, 128 + getattr(error, "signal_number", signal.SIGINT)
    except Exception as error:
        ended, code = error, _get_exit_code(error)
    log_error(ended, code, message=said, with_traceback=debug)
    raise click.exceptions.Exit(code)


def _get_exit_code(error: Exception) -> int:
    if isinstance(error, OutputLocked):
        return LOCKED
    refused = isinstance(error, DaskInferError) and not isinstance(error, _RUN_ERRORS)
    return REFUSED if refused else FAILED


@contextlib.contextmanager
def reserve_stdout() -> Iterator[None]:
    """Keep stdout for the result: what a network prints meanwhile, or a worker that starts now, goes to stderr."""
    if sys.stdout is None or sys.stderr is None:  # the caller closed it: its number is another file's by now
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
