"""The job file of ``--config``: a command's options as TOML, under their long names, with ``-`` or ``_``.

A flag overrides the file, and the file overrides the default; click does that (``default_map``). Values have TOML's own
types: a list, a table, a number; text is parsed as on the command line. Paths are relative to the working directory.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import click
import tomli_w

from daskinfer.cli.messages import format_value
from daskinfer.errors import OptionError
from daskinfer.options import WORKER_COUNT_KEYWORDS, get_all_declarations, get_renamed_key

_COMMAND_LINE_ONLY = frozenset({"config", "print_config", "help", "verbose", "debug"})  # not in a file

# By click's type: the TOML types that a value may have, in words. The types in ``cli.types`` have them as ``toml_types``.
_TOML_TYPES: Mapping[type, tuple[tuple[type, ...], str]] = {
    type(click.BOOL): ((bool,), "true or false"),
    type(click.INT): ((int,), "a whole number"),
    type(click.STRING): ((str,), "text"),
    click.Path: ((str,), "text"),
    click.Choice: ((str,), "text"),
}
_SIMILARITY = 0.5  # from which on a key may have been meant; arbitrary, difflib's own 0.6 misses "worker_count"


@dataclass
class JobFile:
    """What a job file says: its good values by parameter name; all that is wrong, and the parameters concerned."""

    values: dict[str, Any] = field(default_factory=dict)
    errors: list[OptionError] = field(default_factory=list)
    faulty: set[str] = field(default_factory=set)


def read_config(path: str, parameters: Iterable[click.Parameter], context: click.Context) -> JobFile:
    """Read a job file; what is wrong with one key does not hide what is wrong with another.

    Raises
    ------
    OptionError
        If the file cannot be read, or is not TOML.
    """
    keys = _collect_keys(parameters)
    job, seen = JobFile(), dict[str, str]()
    for key, value in _load_toml(path).items():
        name = key.replace("_", "-")
        if name not in keys:
            job.errors.append(
                OptionError(f"unknown key {key!r} in the job file {path!r}; {_suggest_key(name, value, keys)}")
            )
            continue
        parameter, negated = keys[name]
        assert parameter.name is not None
        if parameter.name in seen:
            twice = f"{seen[parameter.name]!r} and {key!r}"
            job.errors.append(OptionError(f"the job file {path!r} sets one option twice, as {twice}. Remove one of them."))
        elif why := _find_problem(value, parameter, context):
            job.errors.append(OptionError(f"{key} in the job file {path!r}: {why}"))
            job.faulty.add(parameter.name)
        else:
            job.values[parameter.name] = not value if negated else value
        seen.setdefault(parameter.name, key)
    return job


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


def _suggest_key(name: str, value: Any, keys: Iterable[str]) -> str:
    """Return what to do about a key that does not exist: use the nearest one, if one is near."""
    if (renamed := get_renamed_key(name)) is not None:
        return f"did you mean {renamed!r}?"
    if isinstance(value, dict):
        return "write the keys of this table at the top of the file, without its heading"
    if (keyword := name.replace("-", "_")) in get_all_declarations():
        return "it takes an object of Python: use it there, or in what --factory makes"
    if keyword in WORKER_COUNT_KEYWORDS:
        return "devices sets the number of workers, as in devices = 'cpu*2'"
    negation = "no-" if name.startswith("no-") else ""
    known = [key for key in keys if key.startswith("no-") == bool(negation)]
    alike = difflib.get_close_matches(name, known, n=3, cutoff=_SIMILARITY)
    if not alike:
        return "`daskinfer run --help` lists them: a key is an option without its dashes"
    return f"did you mean {' or '.join(map(repr, alike))}?"


def _find_problem(value: Any, parameter: click.Parameter, context: click.Context) -> str:
    """Return why a value is not allowed; click would turn some into text. Empty if it is."""
    toml_types, allowed = getattr(parameter.type, "toml_types", None) or _TOML_TYPES[type(parameter.type)]
    if type(value) not in toml_types:
        return f"must be {allowed}, got {format_value(value)}"
    try:
        parameter.type.convert(value, parameter, context)
    except click.BadParameter as error:
        return error.message.removesuffix(".")
    except ValueError as error:  # a path with a null character, which no command line can hold
        return str(error)
    return ""
