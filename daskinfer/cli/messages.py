"""An error's message in the command's words.

A message of the api names what to change as Python spells it, and the command's spelling after it in brackets:
``pass overwrite=True (--overwrite)``. Here only the latter stays: ``pass --overwrite``.
"""

from __future__ import annotations

import json
import re
from typing import Any

import click

from daskinfer.errors import DaskInferError, PlanError

_KEYWORD = re.compile(
    r"""(?:Model\([^()=]*,\ )?                    # Model('w.safetensors',
        \b(?P<name>[\w.]+)
        (?P<given>=(?P<value>'[^']*'|"[^"]*"|\([\d, ]*\)|[\w.]+)?)?   # factory='pkg.mod:make'
        \)?(?P<bound>\ or\ (?:less|more))?
        \ \((?P<flag>--[a-z0-9-]+)(?P<typed>\ [^()]*)?\)  # (--factory pkg.mod:make)""",
    re.VERBOSE,
)
_SWITCH_VALUES = ("True", "False")


def use_flags(text: str) -> str:
    """Replace each keyword that is followed by its flag in brackets by that flag, and the call by the command.

    Examples
    --------
    >>> use_flags("Use batch_size=200 or less (--batch-size), or pass overwrite=True (--overwrite).")
    'Use --batch-size 200 or less, or pass --overwrite.'
    """
    text = re.sub(r"\b([Rr]epeat the )((?:original )?)call\b", r"\1\2command", _KEYWORD.sub(_spell_flag, text))
    return re.sub(r"(?<=[\w)'\"])\.\.(?=\s|$)", ".", text)  # a full stop that was quoted, and the sentence's own


def _spell_flag(match: re.Match[str]) -> str:
    name, flag, value = match["name"], match["flag"], match["value"] or ""
    if match["given"] is None and name.replace("_", "-") != flag[2:]:  # the brackets explain another word
        return match[0]
    typed = match["typed"] or (f" {value.strip(chr(39) + chr(34))}" if value and value not in _SWITCH_VALUES else "")
    return f"{flag}{typed}{match['bound'] or ''}"


def describe_error(error: BaseException) -> str:
    """Return why a command ends, with the error's notes on how to continue."""
    if isinstance(error, click.ClickException):
        return error.format_message()
    known = isinstance(error, DaskInferError | KeyboardInterrupt)
    message = str(error) or "interrupted"
    return use_flags(" ".join([message if known else f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]))


def list_reasons(error: BaseException) -> list[str]:
    """Return each thing that is wrong, in the order found."""
    return [use_flags(reason) for reason in error.reasons] if isinstance(error, PlanError) else [describe_error(error)]


def format_value(value: Any) -> str:
    """Format a value as it was typed: text in quotes, everything else as in a job file.

    Examples
    --------
    >>> format_value("three"), format_value(True), format_value([0, 4])
    ("'three'", 'true', '[0, 4]')
    """
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
