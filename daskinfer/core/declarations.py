"""What the field of a dataclass declares about an option: its values, its help text, and where it can be given.

``options`` holds the declarations. Here is what follows from one: whether a value is allowed, in which words an error
says so, the name in a job file and on the command line, and the entry in a docstring.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from daskinfer.errors import OptionError

Section = Literal["what", "where", "how fast", "when it fails", "what is shown"]

# The public functions that take options.
STORING = ("run", "plan")
COMPUTING = ("predict", "stream", *STORING)
ALL = (*COMPUTING, "map_blocks")

DOC_WIDTH = 100  # columns of an entry in a docstring; arbitrary


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """One option, as its field declares it.

    Parameters
    ----------
    name, type, default
        The field's; ``type`` as text.
    hint
        The type of the field, evaluated.
    help
        What it does, in sentences; the first alone is for the command line. Double backticks enclose other options' names.
    flag_help
        What the command line says after that sentence.
    section, functions
        Its heading in the reference, and the functions that take it.
    flag
        Whether the command has a flag for it, or the flag's name if it is another.
    allowed
        The allowed values in words, if the type does not say them.
    minimum, maximum, above
        The range of a number; ``above`` is exclusive.
    check
        Whether a value is allowed, if the type does not say so. An option with ``allowed`` but no ``check`` is checked by
        the module that uses it.
    unit
        Of a number.
    formerly
        Its name before it was renamed.
    """

    name: str
    type: str
    hint: Any
    default: Any
    help: str
    section: Section
    functions: tuple[str, ...] = ALL
    flag_help: str = ""
    flag: bool | str = True
    allowed: str = ""
    minimum: int | None = None
    maximum: int | None = None
    above: float | None = None
    check: Callable[[Any], bool] | None = None
    unit: str = ""
    formerly: str = ""

    @property
    def key(self) -> str | None:
        """Its name in a job file, and on the command line after ``--``; None if there it has none."""
        if self.flag is False:
            return None
        return self.flag if isinstance(self.flag, str) else self.name.replace("_", "-")

    @property
    def summary(self) -> str:
        """The first sentence of its help."""
        return re.split(r"(?<=\.) ", self.help, maxsplit=1)[0]

    @property
    def kind(self) -> Any:
        """The type of its values other than None: bool, int, float, Literal, or another that other modules read."""
        return get_origin(self._bare_hint) or self._bare_hint

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a Literal."""
        return get_args(self._bare_hint)

    @property
    def _bare_hint(self) -> Any:
        members = get_args(self.hint) if get_origin(self.hint) in (Union, types.UnionType) else (self.hint,)
        others = [member for member in members if member is not type(None)]
        return others[0] if len(others) == 1 else None

    def describe_allowed(self) -> str:
        """Return the allowed values in words."""
        if self.allowed:
            return self.allowed
        words = [repr(choice) for choice in self.choices] if self.kind is Literal else [self._describe_kind()]
        words += ["None"] if self.default is None else []
        return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))

    def describe_allowed_flag(self) -> str:
        """Return in words what a flag or a job file may say: None is to leave it out."""
        words = re.sub(r"(.*), (.*), or None$", r"\1 or \2", self.describe_allowed())
        return re.sub(r",? or None$", "", words)

    def _describe_kind(self) -> str:
        if self.kind is bool:
            return "True or False"
        if self.kind is Callable:
            return "a function"
        name = "an integer" if self.kind is int else f"a number of {self.unit}" if self.unit else "a number"
        if self.maximum is not None:
            return f"{name} between {self.minimum} and {self.maximum}"
        if self.minimum is not None:
            return f"{name} >= {self.minimum}"
        return f"{name} > {self.above}" if self.above is not None else name

    def validate(self, value: Any) -> None:
        """Refuse a value that is not allowed.

        Raises
        ------
        OptionError
            With the name, what was got, and what is allowed.
        """
        if not (value is None and self.default is None) and not self.is_allowed(value):
            raise OptionError(f"{self.name} must be {self.describe_allowed()}, got {value!r}")

    def is_allowed(self, value: Any) -> bool:
        """Return whether a value other than None is allowed, as far as the declaration says."""
        if self.check is not None:
            return self.check(value)
        is_of_kind = _KIND_CHECKS.get(self.kind)
        if self.allowed or is_of_kind is None:
            return True
        return is_of_kind(value) and (self.kind is not Literal or value in self.choices) and self._is_in_range(value)

    def _is_in_range(self, value: Any) -> bool:
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
        )


# By kind: whether a value is of it. True is no number here, and 2.0 no integer.
_KIND_CHECKS: Mapping[Any, Callable[[Any], bool]] = {
    bool: lambda value: isinstance(value, bool),
    int: lambda value: type(value) is int,
    float: lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    Literal: lambda value: isinstance(value, str),
    Callable: callable,
}


def declare(default: Any, help: str, *, section: Section, **rest: Any) -> Any:
    """Make the field of an option; the keywords are those of :class:`Declaration`.

    ``type`` is the type as text, if the field's own annotation cannot say it: this module does not import Dask.
    """
    return dataclasses.field(default=default, metadata={"section": section, "help": help, **rest})


@cache
def get_declarations(holder: type) -> Mapping[str, Declaration]:
    """Return the declarations of a dataclass by name, in the order of its fields."""
    hints = get_type_hints(holder)
    return {
        field.name: Declaration(
            **{"name": field.name, "type": field.type, "hint": hints[field.name], "default": field.default, **field.metadata}
        )
        for field in dataclasses.fields(holder)
        if field.metadata
    }


def add_parameters(docstring: str | None, options: Sequence[Declaration]) -> str | None:
    """Insert an entry for each option at the end of a numpy-style docstring's Parameters, before Returns or Raises."""
    match = re.search(r"\n( *)(?:Returns|Raises)\n *---", docstring or "")
    if docstring is None or match is None:  # python -OO removes docstrings
        return docstring
    before, after = docstring[: match.start()], docstring[match.start() :]
    heading = "" if "Parameters\n" in before else "\nParameters\n----------\n"
    return before + textwrap.indent(heading + "\n".join(map(_format_parameter, options)), match[1]) + "\n" + after


def _format_parameter(option: Declaration) -> str:
    says_range = option.allowed or option.minimum is not None or option.above is not None
    text = f"{option.help} Must be {option.describe_allowed()}." if says_range else option.help
    body = textwrap.fill(text, DOC_WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return f"{option.name} : {option.type}, default {option.default!r}\n{body}"
