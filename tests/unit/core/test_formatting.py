import tomllib
from pathlib import Path
from xml.etree import ElementTree

import jinja2
import pytest

import daskinfer
from daskinfer.core.formatting import format_html_table, format_nbytes, format_text_table, render_template


def test_numbers_stand_to_the_right():
    """A column of numbers is right-aligned, any other left-aligned, and no line ends in blanks."""
    assert format_text_table(("a", "n"), [["x", "1,000"], ["longer", "9.5%"]]) == (
        "a           n\nx       1,000\nlonger   9.5%"
    )
    assert format_text_table(("n", "a"), [["1", "x"], ["22", ""]]) == " n  a\n 1  x\n22"


def test_a_table_without_rows_is_its_headers():
    """No row leaves the headers, in text and in HTML."""
    assert format_text_table(("a", "b"), []) == "a  b"
    assert "<tbody></tbody>" in format_html_table(("a", "b"), [])


def test_a_row_of_another_length_is_refused():
    """A row with more cells than there are headers is an error, not a crooked table."""
    for make in (format_text_table, format_html_table):
        with pytest.raises(ValueError, match=r"zip\(\) argument 2 is"):
            make(("a",), [["x", "y"]])


def test_html_says_what_was_put_in():
    """Headers and cells that look like HTML are escaped; the result parses and has the same text."""
    page = format_html_table(("<h>", "n"), [["<b>&\"'", "1"]])
    assert "<b>" not in page
    assert list(ElementTree.fromstring(page).itertext()) == ["<h>", "n", "<b>&\"'", "1"]


def test_html_aligns_numbers_only():
    """Only a column of numbers carries the alignment, its header too."""
    assert format_html_table(("a", "n"), [["x", "1"]]).count("text-align:right") == 2


def test_html_keeps_lines():
    """A cell of several lines is shown as such."""
    assert '<td style="white-space:pre-wrap">x\ny</td>' in format_html_table(("a",), [["x\ny"]])


def test_templates_escape_values_and_need_all_of_them():
    """A value that looks like HTML is escaped, in a table within a template too; a missing one is an error."""
    values = {"headers": ["<h>"], "rows": [["<b>"]], "svg": "", "lines": ["<i>"]}
    page = render_template("diagnostics/report.html.j2", **values)
    assert page.endswith("<tr><td>&lt;b&gt;</td></tr></tbody></table><p>&lt;i&gt;</p>")
    with pytest.raises(jinja2.UndefinedError, match="'lines' is undefined"):
        render_template("diagnostics/report.html.j2", **{name: values[name] for name in values if name != "lines"})


def test_templates_are_packaged():
    """Every template of the package is covered by the patterns of its package data."""
    package = Path(daskinfer.__file__).parent
    settings = tomllib.loads((package.parent / "pyproject.toml").read_text())
    packaged = {path for glob in settings["tool"]["setuptools"]["package-data"]["daskinfer"] for path in package.glob(glob)}
    templates = set(package.rglob("*.j2"))
    assert len(templates) >= 8
    assert templates <= packaged


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1 << 20, "1.0 MiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 40, "1.0 TiB"),
        (1 << 52, "4,096.0 TiB"),
        (-5, "-5 B"),
    ],
)
def test_bytes_are_said_in_binary_units(nbytes, expected):
    """Bytes get the largest unit, up to TiB, that fits at least once."""
    assert format_nbytes(nbytes) == expected
