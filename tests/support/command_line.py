"""Run the command in the test's process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from daskinfer.cli.main import main

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"  # a line of the log begins with it


def invoke(*arguments: str) -> Result:
    """Run the command in this process, on a terminal of 80 columns."""
    return CliRunner().invoke(main, arguments, terminal_width=80)
