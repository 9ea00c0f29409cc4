"""The words that users read are spelled as a dictionary has them, or are in a list of our own."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docs.pages import DEVELOPER_PAGES, NOTEBOOKS, PAGES, get_label, read_page, remove_blocks

WORDS = Path(__file__).with_name("words.txt")
LANGUAGE = "en_US"


def read_words() -> list[str]:
    """Return the words that are right although no dictionary has them."""
    return WORDS.read_text(encoding="utf-8").split()


def extract_prose(text: str) -> str:
    """Return the words of a page: no code, no addresses, no names of files.

    Examples
    --------
    >>> extract_prose("See `di.run` in [the guide](guides/jobs.md), or job.toml.").split()
    ['See', 'in', 'the', 'guide', ',', 'or']
    """
    text = remove_blocks(text)
    text = re.sub(r"`[^`]*`", " ", text)
    text = re.sub(r"\]\([^)]*\)|(?m:^\[[^\]]+\]: .*$)|\]\[[^\]]*\]|<[^>]+>", " ", text)
    text = re.sub(r"[\w./-]*\w[./_]\w[\w./-]*|--?\w[\w-]*", " ", text)
    return text.replace("[", " ").replace("*", " ")


def find_unknown_words(text: str) -> set[str]:
    """Return the words of a text that aspell does not know."""
    done = subprocess.run(
        ["aspell", f"--lang={LANGUAGE}", "--encoding=utf-8", "list"], input=text, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("path", [*PAGES, *DEVELOPER_PAGES, *NOTEBOOKS], ids=get_label)
def test_spelling(path: Path) -> None:
    """aspell knows every word, or our list has it; without aspell this fails, since CI installs it."""
    assert shutil.which("aspell"), "aspell is missing; install it: apt-get install aspell aspell-en"
    assert find_unknown_words("teh model") == {"teh"}, "aspell has no English dictionary: apt-get install aspell-en"
    unknown = find_unknown_words(extract_prose(read_page(path))) - set(read_words())
    assert not unknown, f"misspelled, or new and right: then add it to {WORDS.name}"


def test_the_list_is_sorted() -> None:
    """The list has each word once, in order, so that two changes of it seldom meet."""
    assert read_words() == sorted(set(read_words()), key=lambda word: (word.casefold(), word))
