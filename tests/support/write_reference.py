"""``python -m tests.support.write_reference``: write ``notebooks/guides/reference.md`` from the code.

Functions and classes come from their docstrings, options from their declarations (``daskinfer/options.py``), commands from
click, exit codes and errors from the docstrings of ``cli.main`` and ``errors``. A test fails if the page differs.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import click

import daskinfer
from daskinfer import errors
from daskinfer.cli import main as commands
from daskinfer.core.declarations import ALL, Declaration, Section
from daskinfer.diagnostics import events
from daskinfer.options import get_all_declarations, make_reference_rows

PAGE = Path(__file__).parents[2] / "notebooks/guides/reference.md"
WIDTH = 118  # of lines of text; those of tables and code are as long as they are
FUNCTIONS = (*ALL, "devices", "close")
CLASSES = ("Model", "Options", "LocalDeviceCluster", "RunReport")
RUNNING = ("run", "plan")  # the commands that take the options of the functions
MAX_CALL_WIDTH = 110
_FLAGS_IN_COMMON = {
    "run": "It takes the flags of the [options](#all-options), and:\n",
    "plan": "It takes the same flags as `daskinfer run`, and `--probe`.\n",
}
_NO_WRAP = "\b\n"  # click's mark of a paragraph that it leaves as it is

HEADER = """\
# Reference

Every function, option, command, exit code and error. This page is written from the code by
`python -m tests.support.write_reference`: change the docstring or the declaration, not this page.

[Functions](#functions) · [Classes](#classes) · [Options](#all-options) · [Command line](#command-line) ·
[Exit codes and JSON](#exit-codes-and-json) · [Errors](#errors) · [Events](#events)
"""


def make_reference() -> str:
    """Return the page."""
    parts = [
        HEADER,
        "## Functions\n",
        "All names are in `daskinfer`, here imported as `di`. Options are keywords; a [table](#all-options) says which\n"
        "function takes which.\n",
        *(_describe(name, _format_call(name)) for name in FUNCTIONS),
        "## Classes\n",
        *(_describe(name, _format_long_call(name)) for name in CLASSES),
        _describe_options(),
        _describe_commands(),
        _describe_exit_codes(),
        _describe_errors(),
        _describe_events(),
    ]
    return "\n".join(parts)


def to_markdown(text: str) -> str:
    """Return a docstring's text as Markdown.

    Examples
    --------
    >>> to_markdown("As for :func:`predict`, with ``x``; see ``map_blocks``.")
    'As for `predict`, with `x`; see `map_blocks`.'
    """
    text = re.sub(r":(?:func|class|mod):`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def split_sections(docstring: str) -> dict[str, str]:
    """Return the sections of a numpy-style docstring by heading; what comes before the first has the heading "".

    Examples
    --------
    >>> split_sections("Do it.\\n\\nReturns\\n-------\\nint\\n    How many.")
    {'': 'Do it.', 'Returns': 'int\\n    How many.'}
    """
    pieces = re.split(r"(?m)^([A-Z][a-z]+)\n-{3,}\n", inspect.cleandoc(docstring))
    return {"": pieces[0].strip()} | {h: body.strip("\n") for h, body in zip(pieces[1::2], pieces[2::2], strict=True)}


def split_entries(section: str) -> list[tuple[str, str]]:
    """Return the entries of a section: what is not indented, and the indented text below it as one line.

    Examples
    --------
    >>> split_entries("model, x\\n    As for\\n    predict.\\ny\\n    Output.")
    [('model, x', 'As for predict.'), ('y', 'Output.')]
    """
    found = re.findall(r"(?m)^(\S.*)\n((?:(?:[ ]+.*)?\n?)*?)(?=^\S|\Z)", section + "\n")
    return [(name, " ".join(body.split())) for name, body in found]


def _describe(name: str, call: str) -> str:
    """Return the entry of a public function or class."""
    sections = split_sections(getattr(daskinfer, name).__doc__)
    options = {option.name for option in get_all_declarations().values()} if name in (*ALL, "Options") else set()
    own = [entry for entry in split_entries(sections.get("Parameters", "")) if entry[0].partition(" :")[0] not in options]
    lines = [f"### `di.{name}`\n", f"```py\n{call}\n```\n", *(f"{_fill(p)}\n" for p in sections[""].split("\n\n"))]
    lines += _make_list("Fields" if name == "RunReport" else "Parameters", own)
    for heading in ("Returns", "Raises"):
        lines += _make_list(heading, split_entries(sections.get(heading, "")))
    if "Examples" in sections:
        lines.append(f"```pycon\n{sections['Examples']}\n```\n")
    return "\n".join(lines)


def _fill(text: str, indent: str = "") -> str:
    """Wrap a paragraph of a docstring; a table or a list in it stays as it is."""
    return textwrap.fill(
        to_markdown(" ".join(text.split())), WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _make_list(heading: str, entries: Iterable[tuple[str, str]]) -> list[str]:
    items = [_fill(f"- **{name}**: {text}", "  ") for name, text in entries]
    return [f"**{heading}**\n", "\n".join(items) + "\n"] if items else []


def _format_call(function: str) -> str:
    """Return how a function is called, with ``**options`` in place of the options."""
    return f"di.{function}{_format_parameters(function, list(get_all_declarations()))}"


def _format_long_call(name: str) -> str:
    """Return how a class is called, over several lines if it is long."""
    call = f"di.{name}{_format_parameters(name)}"
    return "\n    ".join(textwrap.wrap(call, MAX_CALL_WIDTH, break_on_hyphens=False))


def _format_parameters(name: str, options: Sequence[str] = ()) -> str:
    if name in ("Options", "RunReport"):
        return "(**fields)" if name == "Options" else ""
    signature = inspect.signature(getattr(daskinfer, name))
    own = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name not in options]
    text = str(signature.replace(parameters=own, return_annotation=signature.empty))
    has_options = len(own) < len(signature.parameters)
    return text.replace(")", ", **options)") if has_options else text


def _describe_options() -> str:
    """Return the table of all options, and an entry for each, by section."""
    rows = [
        [
            f"[`{row['name']}`](#{row['name']})",
            f"`{row['default']}`",
            " ".join(f"`{flag}`" for flag in _list_flags(row["flag"])),
            f"`{row['key']}`" if row["key"] else "",
            *("x" if function in row["functions"].split(", ") else "" for function in ALL),
        ]
        for row in make_reference_rows()
    ]
    heads = ["keyword", "default", "flag", "job file", *(f"`{function}`" for function in ALL)]
    parts = [
        "## All options\n",
        "Each is a keyword of the functions marked in its row, and perhaps a flag of `daskinfer run` and `daskinfer plan`\n"
        "and a key of their job file. Those that say how the model is run are also fields of `di.Options`.\n",
        _make_table(heads, rows),
    ]
    for section in get_args(Section):
        parts.append(f"### {section.capitalize()}\n")
        parts += [_describe_option(option) for option in get_all_declarations().values() if option.section == section]
    return "\n".join(parts)


def _list_flags(flag: str) -> list[str]:
    """Return a flag and, of a switch, its opposite; nothing for the empty flag."""
    parameters = [parameter for name in RUNNING for parameter in commands.main.commands[name].params]
    found = [[*p.opts, *p.secondary_opts] for p in parameters if flag and flag in p.opts]
    return found[0] if found else []


def _describe_option(option: Declaration) -> str:
    formerly = f" It was called `{option.formerly}` in 0.1.0." if option.formerly else ""
    facts = f"Default `{option.default!r}`; allowed: {option.describe_allowed()}.{formerly}"
    return f"#### `{option.name}`\n\n{_fill(option.help)}\n\n{_fill(facts)}\n"


def _make_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _describe_commands() -> str:
    """Return an entry for each command, with the flags that are no option of a function."""
    group = commands.main
    parts = ["## Command line\n", f"{_fill(group.help or '')}\n", _make_flag_table(group, ())]
    left_out = {f"--{option.key}" for option in get_all_declarations().values() if option.key}
    for name in (*RUNNING, *(name for name in group.list_commands(click.Context(group)) if name not in RUNNING)):
        command = group.commands[name]
        usage = " ".join([name, "[OPTIONS]", *_list_arguments(command)])
        parts += [f"### `daskinfer {name}`\n", f"```sh\ndaskinfer {usage}\n```\n", *_describe_help(command)]
        if name in RUNNING:
            parts.append(_FLAGS_IN_COMMON[name])
        parts.append(_make_flag_table(command, left_out if name in RUNNING else ()))
        if name in RUNNING:
            left_out |= {flag for parameter in command.params for flag in parameter.opts}
    return "\n".join(part for part in parts if part)


def _describe_help(command: click.Command) -> list[str]:
    """Return the paragraphs of a command's help; what click does not wrap (after ``\\b``) is a block of text."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    return [
        f"```text\n{paragraph.removeprefix(_NO_WRAP).strip()}\n```\n"
        if paragraph.startswith(_NO_WRAP)
        else f"{_fill(paragraph)}\n"
        for paragraph in paragraphs
    ]


def _list_arguments(command: click.Command) -> list[str]:
    return [p.make_metavar(click.Context(command)) for p in command.params if isinstance(p, click.Argument)]


def _make_flag_table(command: click.Command, left_out: Iterable[str]) -> str:
    rows = [
        [f"`{' / '.join([*p.opts, *p.secondary_opts])}`", to_markdown(" ".join((p.help or "").split()))]
        for p in command.params
        if isinstance(p, click.Option) and not p.hidden and not set(left_out).intersection(p.opts)
    ]
    return _make_table(["flag", "meaning"], rows) if rows else ""


def _describe_exit_codes() -> str:
    """Return what the docstring of ``cli.main`` says about exit codes and output, below its first paragraph."""
    _, *blocks = inspect.cleandoc(commands.__doc__ or "").split("\n\n")
    return "\n".join(
        ["## Exit codes and JSON\n", *(_convert_block(block, ["code", "status", "meaning"]) for block in blocks)]
    )


def _convert_block(block: str, heads: Sequence[str]) -> str:
    """Return a paragraph or a simple table of reStructuredText as Markdown; a table's last column is the last head's."""
    rule, *lines = block.splitlines()
    if not re.fullmatch(r"=+(  +=+)+", rule):
        return f"{_fill(block)}\n"
    starts = [match.start() for match in re.finditer(r"=+", rule)]
    ends = [*starts[1:], None]
    rows = [[to_markdown(line[start:end].strip()) for start, end in zip(starts, ends, strict=True)] for line in lines[:-1]]
    first = heads[0] if rows[0][0].isdigit() else "command"
    return _make_table([first, *heads[len(heads) - len(starts) + 1 :]], rows)


def _describe_errors() -> str:
    """Return a row for each error, with the builtin that it also is."""
    names = [name for name in re.findall(r"(?m)^ +[│├└─ ]*(\w+)", errors.__doc__ or "") if hasattr(errors, name)]
    rows = [[f"`{name}`", _name_bases(getattr(errors, name)), _get_first_paragraph(getattr(errors, name))] for name in names]
    text = "All are in `daskinfer.errors`; `DaskInferError` and `Interrupted` are in `daskinfer`, too."
    return f"## Errors\n\n{_fill(text)}\n\n{_make_table(['error', 'is also', 'meaning'], rows)}"


def _name_bases(error: type) -> str:
    return ", ".join(f"`{base.__name__}`" for base in error.__bases__)


def _get_first_paragraph(thing: Any) -> str:
    return to_markdown(" ".join(split_sections(thing.__doc__)[""].partition("\n\n")[0].split()))


def _describe_events() -> str:
    """Return a row for each event that ``progress=`` passes to a function."""
    found = [event for event in vars(events).values() if inspect.isclass(event) and issubclass(event, events.Event)]
    rows = [[f"`{e.__name__}`", ", ".join(f"`{f}`" for f in _list_own(e)), _get_first_paragraph(e)] for e in found]
    text = "What a function passed as `progress=` is called with; in `daskinfer.diagnostics.events`."
    return f"## Events\n\n{_fill(text)}\n\n{_make_table(['event', 'fields', 'meaning'], rows)}"


def _list_own(event: type) -> list[str]:
    return list(inspect.get_annotations(event))


def main() -> None:
    """Write the page."""
    PAGE.write_text(make_reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
