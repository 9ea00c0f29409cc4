"""Format tables, sizes and durations for people: aligned text for terminals and logs, HTML for notebooks.

Plain strings in, one string out; every HTML cell is escaped. Terminal colours and live displays are made elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def format_text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format aligned columns under their headers; a column that holds only numbers is right-aligned.

    Examples
    --------
    >>> print(format_text_table(("device", "rows"), [["cpu:0", "1,000"], ["cuda:0", "9"]]))
    device   rows
    cpu:0   1,000
    cuda:0      9
    """
    columns = list(zip(headers, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right_aligned = [_is_numeric(column[1:]) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(line, widths, right_aligned, strict=True)
        ).rstrip()
        for line in (headers, *rows)
    )


def format_html_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format the same table as one HTML element."""
    columns = zip(headers, *rows, strict=True)
    return render_template(
        "core/table.html.j2", headers=headers, rows=rows, numeric=[_is_numeric(column[1:]) for column in columns]
    )


def render_template(name: str, **values: Any) -> str:
    """Fill in an HTML template of this package, named by its path within it; values are escaped.

    In a template, ``rows | table(headers) | safe`` is the table of :func:`format_html_table`, whose cells are escaped.
    """
    return _load_templates().get_template(name).render(values)


@functools.cache
def _load_templates() -> Environment:
    templates = Environment(
        loader=PackageLoader("daskinfer", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    templates.filters["table"] = lambda rows, headers: format_html_table(headers, rows)
    templates.filters["zip"] = zip
    return templates


def format_nbytes(nbytes: int) -> str:
    """Format a number of bytes in binary units.

    Examples
    --------
    >>> format_nbytes(0), format_nbytes(1536), format_nbytes(3 << 30)
    ('0 B', '1.5 KiB', '3.0 GiB')
    """
    unit, size = find_byte_unit(nbytes)
    return f"{nbytes} B" if unit == "B" else f"{nbytes / size:,.1f} {unit}"


def find_byte_unit(nbytes: int) -> tuple[str, int]:
    """Find the largest binary unit, up to TiB, that fits at least once; return it and its size in bytes.

    Examples
    --------
    >>> find_byte_unit(3 << 20)
    ('MiB', 1048576)
    """
    power = min(max(0, int(nbytes).bit_length() - 1) // 10, len(_UNITS) - 1)
    return _UNITS[power], 1 << (10 * power)


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_seconds(seconds: float) -> str:
    """Format a duration to the second.

    Examples
    --------
    >>> format_seconds(9.4), format_seconds(3725)
    ('0:09', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _is_numeric(cells: Sequence[str]) -> bool:
    return all(cell[:1].isdigit() for cell in cells if cell)
