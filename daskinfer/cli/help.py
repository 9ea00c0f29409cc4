"""How ``--help`` is laid out: options in groups, then an example and the exit codes.

No sentence is cut, and no flag is split at a hyphen. An option says in which group it stands (``section``), a command
which examples and exit codes it has.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import click

from daskinfer.core.declarations import Declaration, Section

_OTHER = "options"  # the heading of options without a section, if no option of the command has one


class Flag(click.Option):
    """An option of a command: ``section`` is its heading in the help, ``declaration`` that of the api's option."""

    def __init__(
        self, names: Sequence[str], *, section: Section, declaration: Declaration | None = None, **settings: Any
    ) -> None:
        super().__init__(names, **settings)
        self.section = section
        self.declaration = declaration


class _Formatter(click.HelpFormatter):
    """Click's formatter with lines that break only at blanks."""

    def write_text(self, text: str) -> None:
        for position, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
            self.write("\n" if position else "")
            self.write_lines(self._wrap(paragraph, self.width - self.current_indent))

    def write_lines(self, lines: Iterable[str]) -> None:
        """Write lines as they are, indented."""
        for line in lines:
            self.write(f"{'':{self.current_indent}}{line}\n")

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        rows = list(rows)
        column = min(max(len(term) for term, _ in rows), col_max) + col_spacing
        for term, text in rows:
            lines = self._wrap(text, self.width - self.current_indent - column)
            if len(term) + col_spacing > column:
                self.write_lines([term])
                term = ""
            self.write_lines(f"{head:{column}}{line}" for head, line in zip([term, *[""] * len(lines)], lines, strict=False))

    def _wrap(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False) or [""]


class _Context(click.Context):
    formatter_class = _Formatter


class HelpPage(click.Command):
    """A command whose help ends with its ``examples``, and its ``exit_codes`` with their meaning."""

    context_class = _Context

    def __init__(
        self, *args: Any, examples: Sequence[str] = (), exit_codes: Mapping[int, str] | None = None, **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        self.examples, self.exit_codes = examples, exit_codes or {}

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the line of a list of commands: all of it, however long."""
        return self.short_help or (self.help or "").partition("\n\n")[0]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {section: [] for section in get_args(Section)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(parameter, "section", _OTHER), []).append(record)
        if any(groups[section] for section in get_args(Section)):  # --help, which click adds, has no group of its own
            groups["what is shown"] += groups.pop(_OTHER, [])
        for section, records in groups.items():
            if records:
                with formatter.section(section.capitalize()):
                    formatter.write_dl(records)
        if isinstance(self, click.Group):
            self.format_commands(ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples" if len(self.examples) > 1 else "Example"):
                for example in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{example}\n")
        if self.exit_codes:
            with formatter.section("Exit codes"):
                formatter.write_dl([(str(code), meaning) for code, meaning in self.exit_codes.items()])
