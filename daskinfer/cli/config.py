"""The job file of ``--config``: a command's options as TOML, under their long names, with ``-`` or ``_``.

A flag goes over the file, the file over the default; click does that (``default_map``). Values are natural ones: a list, a
table, a number; as text they are read as on the command line. Relative paths are relative to where the command is run.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

import click
import tomli_w

from daskinfer.errors import OptionError

_COMMAND_LINE_ONLY = frozenset({"config", "print_config", "help"})  # what a file cannot say

# By click's type: the TOML types it may have, and how these are called. Our own types say it themselves (``natural``).
_TOML_TYPES: Mapping[type, tuple[tuple[type, ...], str]] = {
    type(click.BOOL): ((bool,), "true or false"),
    type(click.INT): ((int,), "a whole number"),
    type(click.FLOAT): ((float, int), "a number"),
    type(click.STRING): ((str,), "text"),
    click.Path: ((str,), "text"),
    click.Choice: ((str,), "text"),
}


def read_config(path: str, parameters: Iterable[click.Parameter], context: click.Context) -> dict[str, Any]:
    """The values of a job file, by the parameters' names.

    Raises
    ------
    OptionError
        Where the file cannot be read, or a key or value is not of this command.
    """
    keys = _collect_keys(parameters)
    found: dict[str, Any] = {}
    said: dict[str, str] = {}
    for key, value in _load_toml(path).items():
        name = key.replace("_", "-")
        if name not in keys:
            raise OptionError(
                f"the job file {path!r} has the key {key!r}; allowed are {', '.join(keys)}. {_suggest_key(name, keys)}"
            )
        parameter, negated = keys[name]
        assert parameter.name is not None
        if parameter.name in said:
            raise OptionError(
                f"the job file {path!r} has both {said[parameter.name]!r} and {key!r}, which say the same; one is allowed. "
                "Take the other out."
            )
        said[parameter.name] = key
        _check_value(path, key, value, parameter, context)
        found[parameter.name] = not value if negated else value
    return found


def dump_config(values: Mapping[str, Any], parameters: Iterable[click.Parameter]) -> str:
    """The job file that says what a command was given, defaults included; what nobody gave and has no default is not in it.

    Raises
    ------
    OptionError
        Where TOML has no way to say it.
    """
    told = {
        key: values[parameter.name]
        for key, (parameter, negated) in _collect_keys(parameters).items()
        if not negated and parameter.name is not None and values.get(parameter.name) is not None
    }
    try:
        return tomli_w.dumps(told)
    except TypeError as error:
        raise OptionError(
            f"the configuration holds what TOML cannot say ({error}); allowed are text, numbers, true, false, lists and "
            "tables. Leave the null out of --kwargs."
        ) from error


def _collect_keys(parameters: Iterable[click.Parameter]) -> dict[str, tuple[click.Parameter, bool]]:
    """By key: what it stands for, and whether it says the opposite (``no-pad``)."""
    found: dict[str, tuple[click.Parameter, bool]] = {}
    for parameter in parameters:
        if parameter.name in _COMMAND_LINE_ONLY:
            continue
        if isinstance(parameter, click.Argument):
            found[str(parameter.name)] = (parameter, False)
        for names, negated in ((parameter.opts, False), (parameter.secondary_opts, True)):
            found |= {name[2:]: (parameter, negated) for name in names if name.startswith("--")}
    return found


def _load_toml(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise OptionError(
            f"the job file {path!r} cannot be read: {error.strerror}; a TOML file is needed. Name one that is there."
        ) from error
    except ValueError as error:  # TOML's and UTF-8's
        raise OptionError(f"the job file {path!r} is no TOML: {error}; every line has to be. Mend it there.") from error


def _suggest_key(name: str, keys: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, keys, n=1)
    return f"Did you mean {near[0]!r}?" if near else "Take it out."


def _check_value(path: str, key: str, value: Any, parameter: click.Parameter, context: click.Context) -> None:
    """Refuse what click would turn into text, or what it cannot read, naming the file."""
    kinds, allowed = getattr(parameter.type, "toml_types", None) or _TOML_TYPES[type(parameter.type)]
    why = f"it may be {allowed}"
    if type(value) in kinds:
        try:
            parameter.type.convert(value, parameter, context)
            return
        except click.BadParameter as error:
            why = error.message.removesuffix(".")
        except ValueError as error:  # a path with a null character, which no command line can hold
            why = str(error)
    raise OptionError(f"the job file {path!r} has {key} = {value!r}; {why}. Change it there.")
