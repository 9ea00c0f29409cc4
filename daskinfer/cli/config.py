"""The job file of ``--config``: a command's options as TOML, under their long names, with ``-`` or ``_``.

A flag overrides the file, and the file overrides the default; click does that (``default_map``). Values have TOML's own
types: a list, a table, a number; text is parsed as on the command line. Paths are relative to the working directory.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

import click
import tomli_w

from daskinfer.errors import OptionError
from daskinfer.options import get_renamed_key

_COMMAND_LINE_ONLY = frozenset({"config", "print_config", "help"})  # not in a file

# By click's type: the TOML types that a value may have, in words. The types in ``cli.types`` have them as ``toml_types``.
_TOML_TYPES: Mapping[type, tuple[tuple[type, ...], str]] = {
    type(click.BOOL): ((bool,), "true or false"),
    type(click.INT): ((int,), "a whole number"),
    type(click.FLOAT): ((float, int), "a number"),
    type(click.STRING): ((str,), "text"),
    click.Path: ((str,), "text"),
    click.Choice: ((str,), "text"),
}


def read_config(path: str, parameters: Iterable[click.Parameter], context: click.Context) -> dict[str, Any]:
    """Return the values of a job file, by the parameters' names.

    Raises
    ------
    OptionError
        If the file cannot be read, or the command has no such key or value.
    """
    keys = _collect_keys(parameters)
    values: dict[str, Any] = {}
    seen: dict[str, str] = {}
    for key, value in _load_toml(path).items():
        name = key.replace("_", "-")
        if name not in keys:
            raise OptionError(f"unknown key {key!r} in the job file {path!r}; {_suggest_key(name, keys)}")
        parameter, negated = keys[name]
        assert parameter.name is not None
        if parameter.name in seen:
            raise OptionError(
                f"the job file {path!r} sets one option twice, as {seen[parameter.name]!r} and {key!r}. Remove one of them."
            )
        seen[parameter.name] = key
        _check_value(path, key, value, parameter, context)
        values[parameter.name] = not value if negated else value
    return values


def dump_config(values: Mapping[str, Any], parameters: Iterable[click.Parameter]) -> str:
    """Return the job file that repeats a command, defaults included; an option without value and default is not in it.

    Raises
    ------
    OptionError
        If TOML cannot express a value.
    """
    effective = {
        key: values[parameter.name]
        for key, (parameter, negated) in _collect_keys(parameters).items()
        if not negated and parameter.name is not None and values.get(parameter.name) is not None
    }
    try:
        return tomli_w.dumps(effective)
    except TypeError as error:
        raise OptionError(
            f"TOML cannot express the configuration ({error}); allowed are text, numbers, true, false, lists and tables. "
            "Leave the null out of --kwargs."
        ) from error


def _collect_keys(parameters: Iterable[click.Parameter]) -> dict[str, tuple[click.Parameter, bool]]:
    """Return for each key its parameter, and whether it negates it (``no-pad``)."""
    keys: dict[str, tuple[click.Parameter, bool]] = {}
    for parameter in parameters:
        if parameter.name in _COMMAND_LINE_ONLY:
            continue
        if isinstance(parameter, click.Argument):
            keys[str(parameter.name)] = (parameter, False)
        for names, negated in ((parameter.opts, False), (parameter.secondary_opts, True)):
            keys |= {name[2:]: (parameter, negated) for name in names if name.startswith("--")}
    return keys


def _load_toml(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise OptionError(f"cannot read the job file {path!r}: {error.strerror}. Name an existing TOML file.") from error
    except ValueError as error:  # TOML's and UTF-8's
        raise OptionError(f"the job file {path!r} is not valid TOML: {error}") from error


def _suggest_key(name: str, keys: Iterable[str]) -> str:
    renamed = get_renamed_key(name)
    alike = [renamed] if renamed else difflib.get_close_matches(name, keys, n=1)
    return f"did you mean {alike[0]!r}?" if alike else f"allowed are {', '.join(keys)}"


def _check_value(path: str, key: str, value: Any, parameter: click.Parameter, context: click.Context) -> None:
    """Refuse a value that click would turn into text, or cannot convert, and name the file."""
    toml_types, allowed = getattr(parameter.type, "toml_types", None) or _TOML_TYPES[type(parameter.type)]
    why = f"must be {allowed}, got {value!r}"
    if type(value) in toml_types:
        try:
            parameter.type.convert(value, parameter, context)
            return
        except click.BadParameter as error:
            why = error.message.removesuffix(".")
        except ValueError as error:  # a path with a null character, which no command line can hold
            why = str(error)
    raise OptionError(f"{key} in the job file {path!r}: {why}")
