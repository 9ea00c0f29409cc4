"""``python -m tests.docs.run_pages PAGE ...``: run the code of pages, each in a folder of its own, in this one process.

A process for all of them, since torch and the workers are loaded once for all. Prints one line for each block that failed,
or whose output is not the one that its page shows, and exits with 1 if there is any.
"""

from __future__ import annotations

import contextlib
import doctest
import functools
import io
import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.docs.pages import Block, get_label, list_blocks, pair_with_output

_ECHO_CODE = "; echo $?"
_SHOWN_PROCESSOR = "AMD EPYC"  # what the pages show as the name of a CPU, whatever it is here


def run_page(path: Path) -> list[str]:
    """Run a page's blocks in its order; return what went wrong. After a block that raised, the rest is not run."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    blocks, problems = list_blocks(path), []
    if any(block.file_name for block in blocks):
        import daskinfer

        daskinfer.close()  # workers that run already would not find the page's modules
    with _work_in_new_folder():
        for block, shown in pair_with_output(blocks):
            place = f"{get_label(path)}:{block.line}"
            if block.file_name is not None:
                Path(block.file_name).write_text(block.text)
            elif block.language == "python":
                try:
                    printed = _run_python(block, path, namespace)
                except BaseException:
                    problems.append(f"{place} raised\n{traceback.format_exc()}")
                    break
                problems += _compare(place, shown.text, printed, varies=shown.varies)
            elif block.language == "console":
                for command, expected in split_console(block.text):
                    problems += _compare(f"{place} $ {command}", expected, _run_command(command), varies=block.varies)
    return problems


@contextlib.contextmanager
def _work_in_new_folder() -> Iterator[None]:
    """Work in an empty folder, from which modules can be imported, as a reader would."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="page-") as folder:
        os.chdir(folder)
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            os.chdir(before)
            sys.path[:] = [entry for entry in sys.path if entry != folder]


def _run_python(block: Block, path: Path, namespace: dict[str, Any]) -> str:
    code = compile("\n" * (block.line - 1) + block.text, os.fspath(path), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue()


def split_console(text: str) -> Iterator[tuple[str, str]]:
    r"""Yield each command of a session in a terminal, with the output that follows it.

    Examples
    --------
    >>> list(split_console("$ daskinfer run a \\\n    b\ndone\n$ daskinfer verify b\n"))
    [('daskinfer run a     b', 'done\n'), ('daskinfer verify b', '')]
    """
    command, output = "", ""
    for line in text.replace("\\\n", "").splitlines(keepends=True):
        if line.startswith("$ "):
            if command:
                yield command, output
            command, output = line.removeprefix("$ ").strip(), ""
        else:
            output += line
    yield command, output


def _run_command(command: str) -> str:
    """Run ``daskinfer …`` in this process; return what it prints on stdout."""
    from daskinfer.cli.main import main

    name, *words = shlex.split(command.removesuffix(_ECHO_CODE))
    assert name == "daskinfer", f"only daskinfer's commands run here, not {command!r}"
    printed, code = io.StringIO(), 0
    with contextlib.redirect_stdout(printed):
        try:
            main.main(words, prog_name="daskinfer")
        except SystemExit as ended:
            code = int(ended.code or 0)
    if command.endswith(_ECHO_CODE):
        return f"{printed.getvalue()}{code}\n"
    return printed.getvalue() if code == 0 else f"{printed.getvalue()}(exit code {code})\n"


def _compare(place: str, shown: str, printed: str, *, varies: bool) -> list[str]:
    flags = doctest.NORMALIZE_WHITESPACE
    expected, got = shown, printed.replace(_get_processor(), _SHOWN_PROCESSOR)
    if varies:
        flags |= doctest.ELLIPSIS
        expected, got = (re.sub(r"\d[\d,.]*", "0", text) for text in (expected, got))
    if doctest.OutputChecker().check_output(expected, got, flags):
        return []
    return [f"{place} prints\n{printed or '(nothing)'}\nbut the page shows\n{shown or '(nothing)'}"]


@functools.cache
def _get_processor() -> str:
    import daskinfer

    return str(daskinfer.devices()[-1].label).partition(",")[0]


def main(paths: list[str]) -> int:
    """Run the pages; return the exit code."""
    import daskinfer

    problems = [problem for path in paths for problem in run_page(Path(path).resolve())]
    daskinfer.close()
    print("\n\n".join(problems) or f"{len(paths)} pages: all blocks ran")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
