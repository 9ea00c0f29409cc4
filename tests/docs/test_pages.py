"""What users read is short, its links lead somewhere, and its pictures are of today."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from urllib.parse import urlparse

import pytest
from PIL import Image, ImageColor

from tests.docs.pages import (
    DEVELOPER_PAGES,
    GUIDES,
    INDEX,
    NOTEBOOKS,
    PAGES,
    README,
    REFERENCE,
    ROOT,
    get_label,
    read_page,
    remove_blocks,
)
from tests.support import draw_pictures, pictures
from tests.support.write_reference import make_reference

MAX_README_LINES, MAX_README_WORDS, MAX_WIDTH, MAX_PROSE_LINES, MAX_CHANGES = 200, 1600, 120, 12, 10
RESULT_BEFORE_LINE = 45
GUIDE_NAMES = {
    *("models", "arrays", "devices", "clusters", "jobs", "faults-and-resume", "memory", "performance", "security"),
    "reference",
}
ALL_PAGES = [*PAGES, *DEVELOPER_PAGES, *NOTEBOOKS]

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_DEFINITION = re.compile(r"(?m)^\[([^\]]+)\]: (\S+)$")
_PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")


def test_the_readme_is_short() -> None:
    """A reader gets through the README in minutes: few lines, none of them wide, and few words."""
    text = README.read_text()
    assert text.count("\n") <= MAX_README_LINES
    assert [line for line in text.splitlines() if len(line) > MAX_WIDTH] == []
    assert len(text.split()) <= MAX_README_WORDS


def test_a_result_comes_early() -> None:
    """The first picture, and the first lines of Python with their output, come at the top of the README."""
    text = README.read_text()
    assert text.index("](notebooks/pictures/demo.png)") < text.index("\n## ")
    assert text[: text.index("```text")].count("\n") < RESULT_BEFORE_LINE


def test_changes_are_few() -> None:
    """Changes are a list of at most ten bullets."""
    changes = README.read_text().partition("\n## Changes")[2].partition("\n[")[0]
    assert 1 <= len(re.findall(r"(?m)^- ", changes)) <= MAX_CHANGES


@pytest.mark.parametrize("path", [README, INDEX, *GUIDES], ids=get_label)
def test_prose_comes_in_small_blocks(path: Path) -> None:
    """No paragraph or item is longer than twelve lines, and none is wide; tables and code are as wide as they must."""
    text = remove_blocks(read_page(path))
    prose = re.sub(r"(?m)^(\||#|!\[|\[[^\]]+\]: ).*$", "", text)
    paragraphs = re.split(r"\n[ \t]*\n|\n(?= *(?:- |\d+\. ))", prose)
    assert max(paragraph.strip().count("\n") + 1 for paragraph in paragraphs) <= MAX_PROSE_LINES
    assert [line for line in prose.splitlines() if len(line) > MAX_WIDTH] == []


def test_the_guides_are_all_there_and_in_the_index() -> None:
    """Each guide and notebook is linked from the index."""
    assert {path.stem for path in GUIDES} == GUIDE_NAMES
    targets = {
        (INDEX.parent / link.partition("#")[0]).resolve() for link in list_links(read_page(INDEX)) if not is_web(link)
    }
    assert {*GUIDES, *NOTEBOOKS, README} <= targets


def test_the_reference_is_up_to_date() -> None:
    """What ``python -m tests.support.write_reference`` writes is what the page holds."""
    assert REFERENCE.read_text(encoding="utf-8") == make_reference(), "run python -m tests.support.write_reference"


def list_links(text: str) -> list[str]:
    """List what a page links to, without code."""
    text = re.sub(r"`[^`\n]*`", "`code`", remove_blocks(text))
    return [*_LINK.findall(text), *(target for _, target in _DEFINITION.findall(text))]


def is_web(link: str) -> bool:
    """Whether a link leads out of the repository."""
    return ":" in link.partition("/")[0]


def list_anchors(path: Path) -> set[str]:
    """List the anchors of a page's headings, as GitHub makes them."""
    seen: Counter[str] = Counter()
    anchors = set()
    for heading in re.findall(r"(?m)^#+ +(.*)$", remove_blocks(read_page(path))):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).strip().replace(" ", "-")
        anchors.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return anchors


@pytest.mark.parametrize("path", ALL_PAGES, ids=get_label)
def test_links_lead_somewhere(path: Path) -> None:
    """Files that a page links to exist, and have the anchor; web addresses have a form that can be right."""
    for link in list_links(read_page(path)):
        file, _, anchor = link.partition("#")
        if is_web(link):
            parts = urlparse(link)
            assert parts.scheme == "https", link
            assert re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", parts.netloc), link
            continue
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in list_anchors(target), link


@pytest.mark.parametrize("path", ALL_PAGES, ids=get_label)
def test_labels_of_links_are_defined(path: Path) -> None:
    """Each ``[text][label]`` has its definition, and each definition is used."""
    text = re.sub(r"`[^`\n]*`", "code", remove_blocks(read_page(path)))
    defined = {label for label, _ in _DEFINITION.findall(text)}
    used = {label for _, label in re.findall(r"\[([^\]\n]+)\]\[([^\]\n]+)\]", text)}
    assert used <= defined
    assert all(f"[{label}]" in _DEFINITION.sub("", text) for label in defined)


def list_pictures() -> list[Path]:
    """List the pictures that pages and notebooks show."""
    found = {(path.parent / link).resolve() for path in ALL_PAGES for _, link in _PICTURE.findall(read_page(path))}
    return sorted(found)


@pytest.mark.parametrize("path", list_pictures(), ids=get_label)
def test_pictures_are_of_today(path: Path) -> None:
    """A picture carries the hash of the script and the figures that it was made from, and the script is unchanged."""
    assert pictures.find_problem(path) == ""


def test_pictures_have_words_in_their_place() -> None:
    """Each picture has a text for those who do not see it, and no stored picture is left unused."""
    assert all(words for path in ALL_PAGES for words, _ in _PICTURE.findall(read_page(path)))
    assert set((ROOT / "notebooks/pictures").glob("*")) <= set(list_pictures())


def test_a_picture_says_what_it_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stamp keeps the pixels and the figures; a change of the script, a missing stamp or script is found."""
    monkeypatch.setattr(pictures, "ROOT", tmp_path)
    script, picture = tmp_path / "draw.py", tmp_path / "a.png"
    script.write_text("draw()")
    Image.new("RGB", (3, 2), "orange").save(picture, dpi=(80, 80))
    assert "has no daskinfer-figures, daskinfer-script, daskinfer-source" in pictures.find_problem(picture)
    pictures.stamp_picture(picture, script=script, figures={"µs": [1.5, 2]})
    assert pictures.find_problem(picture) == ""
    assert pictures.read_figures(picture) == {"µs": [1.5, 2]}
    with Image.open(picture) as image:
        assert image.getpixel((2, 1)) == (255, 165, 0)
    script.write_text("draw(again)")
    assert pictures.find_problem(picture) == "was made by an earlier draw.py: make it again"
    script.unlink()
    assert pictures.find_problem(picture) == "was made by draw.py, which does not exist"
    assert pictures.find_problem(tmp_path / "b.png") == "does not exist"


def test_a_screen_is_drawn_with_its_text(tmp_path: Path) -> None:
    """The picture of a screen has bars in place of blocks, one of them in daskinfer's colour, and carries the text."""
    lines = ["$ daskinfer demo", "plain torch loop  ████████  2.00 s", "daskinfer         ████      1.00 s  2.0x"]
    path = tmp_path / "screen.png"
    draw_pictures.draw_screen(path, lines)
    assert pictures.find_problem(path) == ""
    assert pictures.read_figures(path) == {"screen": lines}
    with Image.open(path) as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert {ImageColor.getrgb(color) for color in (draw_pictures.INK, draw_pictures.ACCENT)} <= colors
