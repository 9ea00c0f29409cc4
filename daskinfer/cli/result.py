"""The one JSON object that a command prints with ``--json``, whatever its outcome; ``cli.main`` documents it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import click

from daskinfer.cli.messages import describe_error, list_reasons
from daskinfer.errors import ErrorCollector

SCHEMA = 1  # raised when a key changes its meaning or goes; a new key does not raise it
FAILED, REFUSED, ROWS_MISSING, LOCKED, INTERRUPTED, TERMINATED = 1, 2, 3, 4, 130, 143  # exit codes
STATUSES = {
    0: "done",
    FAILED: "failed",
    REFUSED: "refused",
    ROWS_MISSING: "rows_missing",
    LOCKED: "locked",
    INTERRUPTED: "interrupted",
    TERMINATED: "terminated",
}


@dataclass
class CommandState:
    """What is known about a command while it is parsed: ``obj`` of its context.

    ``as_json`` is whether it prints JSON; ``errors`` holds what is wrong with the job file, ``faulty`` the names of the
    parameters concerned.
    """

    as_json: bool
    errors: ErrorCollector = field(default_factory=ErrorCollector)
    faulty: set[str] = field(default_factory=set)


def print_result(text: str, fields: Mapping[str, Any], exit_code: int = 0) -> None:
    """Print what the current command found: the text, or with ``--json`` the object with these fields."""
    context = click.get_current_context()
    click.echo(_format_object(context.command.name, exit_code, None, fields) if context.obj.as_json else text)


def print_error(command: str | None, error: BaseException, exit_code: int) -> None:
    """Print the object of a command that ends with an error."""
    described = {"type": type(error).__name__, "message": describe_error(error), "reasons": list_reasons(error)}
    click.echo(_format_object(command, exit_code, described, {}))


def _format_object(command: str | None, exit_code: int, error: Mapping[str, Any] | None, fields: Mapping[str, Any]) -> str:
    status = STATUSES.get(exit_code, STATUSES[FAILED])
    head = {"schema": SCHEMA, "command": command, "status": status, "exit_code": exit_code, "error": error}
    return json.dumps(head | dict(fields), default=str)
