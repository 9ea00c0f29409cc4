"""The code that users read runs, or at least is what it seems to be."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import daskinfer
from daskinfer.cli import main as commands
from daskinfer.cli.main import main
from tests.docs.pages import GUIDES, LANGUAGES, PAGES, REFERENCE, ROOT, Block, get_label, list_blocks

WRITTEN_PAGES = [path for path in PAGES if path != REFERENCE]  # by hand


def list_blocks_in(*languages: str) -> list[Block]:
    """List the blocks of these languages on all pages that are written by hand."""
    return [block for path in WRITTEN_PAGES for block in list_blocks(path) if block.language in languages]


def has_modules(path: Path) -> bool:
    """Whether a page writes modules of its own."""
    return any(block.file_name for block in list_blocks(path))


def closes_workers(path: Path) -> bool:
    """Whether a page shuts the workers down."""
    return any("di.close()" in block.text for block in list_blocks(path) if block.language == "python")


@pytest.mark.slow
def test_code_runs_and_prints_what_the_pages_show(tmp_path: Path) -> None:
    """The code of README and guides runs, block after block, and prints what they show; one process runs all of them.

    Pages with modules of their own come first, since those need new workers; the one that shuts the workers down is last.
    """
    pages = sorted(WRITTEN_PAGES, key=lambda path: (not has_modules(path), closes_workers(path)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs.run_pages", *pages],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{len(pages)} pages: all blocks ran\n"


@pytest.mark.parametrize("path", PAGES, ids=get_label)
def test_languages(path: Path) -> None:
    """Each block says its language, and it is one of those that are checked here; a reference has examples, too."""
    allowed = {*LANGUAGES, "pycon"} if path == REFERENCE else set(LANGUAGES)
    assert {block.language for block in list_blocks(path)} <= allowed


def test_the_guides_show_their_output() -> None:
    """Most guides run code, and some show sessions of the command."""
    assert sum(any(block.language == "python" for block in list_blocks(path)) for path in GUIDES) >= 8
    assert list_blocks_in("console")


@pytest.mark.parametrize("block", list_blocks_in("py"), ids=lambda block: f"line-{block.line}")
def test_code_that_does_not_run_here_is_python(block: Block) -> None:
    """Code that needs Slurm, Kubernetes, a cloud or a GPU compiles, and its calls fit the signatures."""
    calls = [call for call in ast.walk(ast.parse(block.text)) if isinstance(call, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func)
        if name.startswith("di."):
            keywords = {str(word.arg): None for word in call.keywords}
            inspect.signature(getattr(daskinfer, name.removeprefix("di."))).bind(*call.args, **keywords)


def list_commands() -> list[str]:
    """List each daskinfer command in the pages' shell blocks, with its continuation lines."""
    text = "".join(block.text for block in list_blocks_in("sh", "console", "crontab"))
    lines = text.replace("\\\n", " ").splitlines()
    matches = [re.search(r"(?:^|[$/(] ?|exec )daskinfer ([a-z].*)", line) for line in lines]
    return sorted({re.sub(r" +#.*| 2?>>?.*|; .*|\)\".*", "", match[1]) for match in matches if match})


@pytest.mark.parametrize("command", list_commands())
def test_commands_exist(command: str) -> None:
    """Each command in the pages exists, and has the options and arguments that the pages give it."""
    name, *words = shlex.split(command)
    subcommand = main.commands[name]
    options = {option for parameter in subcommand.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options
    n_arguments = sum(isinstance(parameter, click.Argument) for parameter in subcommand.params)
    with subcommand.make_context(name, words, resilient_parsing=True) as context:
        assert len(context.args) <= n_arguments


def test_exit_codes_agree() -> None:
    """The guide explains each exit code that the command documents, and no other."""
    guide = (ROOT / "notebooks/guides/jobs.md").read_text()
    assert re.findall(r"(?m)^\| (\d+) \|", guide) == re.findall(r"(?m)^(\d+) ", commands.__doc__ or "")


def test_verdicts_are_explained() -> None:
    """Each verdict that a report can end with is a row of the guide on performance."""
    source = "".join(path.read_text() for path in (ROOT / "daskinfer/diagnostics").glob("*.py"))
    verdicts = set(re.findall(r'f"([a-z-]+-bound|unbalanced): ', source))
    assert len(verdicts) >= 4
    guide = (ROOT / "notebooks/guides/performance.md").read_text()
    table = "".join(re.findall(r"(?m)^\| (?:.*-bound|unbalanced) \|", guide))
    assert {verdict for verdict in verdicts if verdict not in table} == set()


def test_flags_in_the_text_exist() -> None:
    """Each flag that the pages mention is one of daskinfer, of Dask, of pip, of Slurm or of the benchmarks."""
    flags = {
        flag for command in [main, *main.commands.values()] for p in command.params for flag in (*p.opts, *p.secondary_opts)
    }
    others = {"--array", "--preload", "--no-deps"}
    for path in WRITTEN_PAGES:
        mentioned = set(re.findall(r"`(--[a-z][a-z0-9-]+)", path.read_text()))
        assert mentioned <= flags | others, get_label(path)


def test_shell_is_shell() -> None:
    """A shell can parse the shell blocks."""
    script = "\n".join(block.text for block in list_blocks_in("sh"))
    read = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (read.returncode, read.stderr) == (0, "")


@pytest.mark.parametrize("block", list_blocks_in("toml"), ids=lambda block: f"line-{block.line}")
def test_job_files_are_read(block: Block, in_folder: Path) -> None:
    """``run`` takes every key and value of a job file that the pages show."""
    (in_folder / "job.toml").write_text(block.text)
    done = CliRunner().invoke(main, ["run", "--config", "job.toml", "--print-config"])
    assert done.exit_code == 0, done.output
    assert tomllib.loads(block.text).keys() <= tomllib.loads(done.stdout).keys()
