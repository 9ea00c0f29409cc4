"""The pages that users read, and the blocks of code in them.

What the language of a fence means here:

=============  ===================================================================================
``python``     runs, in the page's order, in one namespace; with ``# name.py`` as its first line it is written to that file
``console``    the ``$ daskinfer`` lines run, and print what follows them; ``; echo $?`` adds the exit code
``text``       what the block before it prints; as ``text varies``, numbers may be others and ``...`` is anything
``py``         needs Slurm, Kubernetes, GPUs or files that are not here: it compiles, and its calls fit the signatures
``sh``         is shell, and its ``daskinfer`` commands and options exist; not run
``crontab``    the same for a line of a crontab
``toml``       is a job file; with ``# name.toml`` as its first line it is also written to that file
=============  ===================================================================================
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
INDEX = ROOT / "notebooks/README.md"
GUIDES = sorted((ROOT / "notebooks/guides").glob("*.md"))
REFERENCE = ROOT / "notebooks/guides/reference.md"
PAGES = [README, INDEX, *GUIDES]  # with code that is checked
DEVELOPER_PAGES = [ROOT / "daskinfer/README.md", ROOT / ".github/CONTRIBUTING.md"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

LANGUAGES = ("python", "py", "console", "text", "sh", "crontab", "toml")

_FENCE = re.compile(r"^```(.*)$")
_FILE_NAME = re.compile(r"^# ([\w-]+\.(?:py|toml))$")


@dataclass(frozen=True)
class Block:
    """A block of code: the number of its first line, its language, its text, and whether the numbers in it vary."""

    line: int
    language: str
    text: str
    varies: bool = False

    @property
    def file_name(self) -> str | None:
        """The file that it is the content of; None if it is none."""
        match = _FILE_NAME.match(self.text.partition("\n")[0])
        return match[1] if match else None


def get_label(path: Path) -> str:
    """Return a page's path within the repository."""
    return str(path.relative_to(ROOT))


def read_page(path: Path) -> str:
    """Return a page's Markdown; of a notebook, that of its Markdown cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def list_blocks(path: Path) -> list[Block]:
    """List the blocks of code of a page."""
    found: list[Block] = []
    info, first, lines = "", 0, None
    for number, line in enumerate(read_page(path).splitlines(), 1):
        fence = _FENCE.match(line)
        if fence and lines is None:
            info, first, lines = fence[1], number + 1, []
        elif fence and lines is not None:
            language, _, rest = info.strip().partition(" ")
            found.append(Block(first, language, "".join(f"{one}\n" for one in lines), varies=rest == "varies"))
            lines = None
        elif lines is not None:
            lines.append(line)
    assert lines is None, f"{get_label(path)}: the block of line {first} does not end"
    return found


def remove_blocks(text: str) -> str:
    """Return Markdown with an empty line in place of each line of code, so that lines keep their numbers."""
    kept, is_code = [], False
    for line in text.splitlines():
        is_fence = bool(_FENCE.match(line))
        kept.append("" if is_code or is_fence else line)
        is_code ^= is_fence
    return "\n".join(kept)


def pair_with_output(blocks: list[Block]) -> Iterator[tuple[Block, Block]]:
    """Yield each block with the text that it prints, as the page shows it directly after it; empty if it shows none."""
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language == "text":
            continue
        shown = following is not None and following.language == "text" and _is_adjacent(block, following)
        yield block, following if shown and following else Block(block.line, "text", "")


def _is_adjacent(block: Block, following: Block) -> bool:
    end = block.line + block.text.count("\n")  # the line of its closing fence
    return following.line - end <= 3  # perhaps one empty line, then the opening fence
