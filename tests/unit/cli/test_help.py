"""``--help``: whole lines at 80 columns, groups, an example and the exit codes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest

from daskinfer.cli.exit_codes import EXIT_CODES
from daskinfer.cli.main import infer, main
from tests.support.command_line import invoke

SECTIONS = ["What", "Where", "How fast", "When it fails", "What is shown"]
COMMANDS = ["run", "plan", "verify", "devices", "doctor", "demo", "completion"]
OWN = ["run", "plan", "verify", "devices", "doctor", "completion"]  # those with examples and exit codes


def show_help(*command: str) -> str:
    """Return the help of a command as a terminal of 80 columns shows it."""
    done = invoke(*command, "--help")
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout


def split_sections(text: str) -> dict[str, str]:
    """Return what stands below each heading."""
    parts = re.split(r"^([A-Z][a-z ]*):\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_lines_are_whole(command: str) -> None:
    """No line is longer than the terminal, no sentence is cut, and no flag is split at a hyphen."""
    text = show_help(*filter(None, [command]))
    assert max(map(len, text.splitlines())) <= 80
    assert "..." not in text.replace("[ARGS]...", "")
    assert not re.search(r"\w-$", text, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_shown_once_in_a_group(command: str) -> None:
    """Each option stands under exactly one heading, and --help with the others."""
    sections = split_sections(show_help(command))
    groups = {name: text for name, text in sections.items() if name in [*SECTIONS, "Options"]}
    shown = re.findall(r"^  (?:-\w, )?(--[a-z0-9-]+)", "\n".join(groups.values()), re.MULTILINE)
    declared = [p.opts[-1] for p in main.commands[command].params if isinstance(p, click.Option)]
    assert sorted(shown) == sorted([*declared, "--help"])
    assert groups.keys() != {"Options"} or not any(hasattr(p, "section") for p in main.commands[command].params)


@pytest.mark.parametrize("command", ["run", "plan"])
def test_the_groups_of_a_run(command: str) -> None:
    """The options of a run stand in five groups, each under the heading that its declaration names."""
    sections = split_sections(show_help(command))
    assert list(sections) == [*SECTIONS, "Examples", "Exit codes"]
    for option in main.commands[command].params:
        if declaration := getattr(option, "declaration", None):
            assert f"  --{declaration.key}" in sections[declaration.section.capitalize()]
    assert ("--probe" in sections["What is shown"]) == (command == "plan")


def test_the_list_of_commands() -> None:
    """Commands stand in the order of use; those of this package fit on one line each, with a sentence."""
    text = split_sections(show_help())["Commands"]
    assert re.findall(r"^  (\w+)  ", text, re.MULTILINE) == COMMANDS
    for command in OWN:
        assert re.search(rf"^  {command} +[A-Z].*\.$", text, re.MULTILINE), command


@pytest.mark.parametrize("command", OWN)
def test_the_end_of_each_help(command: str) -> None:
    """Examples and exit codes come last; each code's meaning is there."""
    *_, examples, codes = split_sections(show_help(command)).items()
    assert (examples[0].rstrip("s"), codes[0]) == ("Example", "Exit codes")
    meanings = main.commands[command].exit_codes
    assert [int(code) for code in re.findall(r"^  (\d+) ", codes[1], re.MULTILINE)] == list(meanings)
    assert all(meaning in " ".join(codes[1].split()) for meaning in meanings.values())
    assert meanings.keys() <= EXIT_CODES.keys()


def test_examples_are_commands(folder: Path) -> None:
    """Each example, with the files that it names, is a command line that can be parsed."""
    Path("job.toml").write_text('model = "m:n"\ninput = "x.npy"\noutput = "y.npy"\n')
    examples = [shlex.split(e) for name in OWN for e in main.commands[name].examples if "$(" not in e]
    assert {words[1] for words in examples} == {"run", "plan", "verify", "devices", "doctor"}
    for program, name, *arguments in examples:
        with main.commands[name].make_context(name, arguments, click.Context(main)) as context:
            assert program == "daskinfer"
            assert context.params
    assert all(example.startswith("dask infer ") for example in infer.examples)


def test_a_narrow_terminal() -> None:
    """At 60 columns lines are whole too."""
    with main.commands["run"].make_context("run", [], resilient_parsing=True, terminal_width=60) as context:
        text = context.get_help()
    assert max(map(len, text.splitlines())) <= 76  # the longest example is copied as it is
    assert max(map(len, text.partition("Examples:")[0].splitlines())) <= 60


def test_what_a_flag_refuses_names_the_flag(folder: Path) -> None:
    """An error that Python would tell in its own words names the flag, and typing the cure works."""
    np.save("big.npy", np.ones((10, 5), np.float64))
    how = ("plan", "cli_nets:linear", "big.npy", "--no-probe", "--devices", "inline")
    done = invoke(*how, "--json")
    (cure,) = re.findall(r"Pass (--dtype \w+)\.", json.loads(done.stdout)["error"]["message"])
    assert (done.exit_code, "dtype=" in done.stderr) == (2, False)
    assert invoke(*how, *cure.split()).exit_code == 0
