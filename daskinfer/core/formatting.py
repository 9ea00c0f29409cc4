"""Small tables for people: aligned text for terminals and logs, HTML for notebooks.

Plain strings in, one string out; every cell is escaped in HTML. Terminal colours and live displays are not made here.
"""

from __future__ import annotations

import html
from collections.abc import Sequence


def format_text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns under their headers; a column whose cells are all numbers stands to the right.

    Examples
    --------
    >>> print(format_text_table(("device", "rows"), [["cpu:0", "1,000"], ["cuda:0", "9"]]))
    device   rows
    cpu:0   1,000
    cuda:0      9
    """
    columns = list(zip(headers, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [_is_numeric(column[1:]) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in (headers, *rows)
    )


def format_html_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table as one HTML element."""
    right = [_is_numeric([row[i] for row in rows]) for i in range(len(headers))]
    head = "".join(_format_html_cell(h, numeric, "th") for h, numeric in zip(headers, right, strict=True))
    body = "".join(
        "<tr>" + "".join(_format_html_cell(c, numeric) for c, numeric in zip(row, right, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def format_nbytes(nbytes: int) -> str:
    """A number of bytes for people, in binary units.

    Examples
    --------
    >>> format_nbytes(0), format_nbytes(1536), format_nbytes(3 << 30)
    ('0 B', '1.5 KiB', '3.0 GiB')
    """
    unit, size = find_byte_unit(nbytes)
    return f"{nbytes} B" if unit == "B" else f"{nbytes / size:,.1f} {unit}"


def find_byte_unit(nbytes: int) -> tuple[str, int]:
    """The largest binary unit of which there is at least one, up to TiB, and its bytes.

    Examples
    --------
    >>> find_byte_unit(3 << 20)
    ('MiB', 1048576)
    """
    power = min(max(0, int(nbytes).bit_length() - 1) // 10, len(_UNITS) - 1)
    return _UNITS[power], 1 << (10 * power)


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_seconds(seconds: float) -> str:
    """A time for people, to the second.

    Examples
    --------
    >>> format_seconds(9.4), format_seconds(3725)
    ('0:09', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _format_html_cell(cell: str, numeric: bool, tag: str = "td") -> str:
    style = ' style="text-align:right"' if numeric else ' style="white-space:pre-wrap"' if "\n" in cell else ""
    return f"<{tag}{style}>{html.escape(cell)}</{tag}>"


def _is_numeric(cells: Sequence[str]) -> bool:
    return all(cell[:1].isdigit() for cell in cells if cell)
