"""The types of the command's options: how a value is parsed, from text on the command line or from TOML."""

from __future__ import annotations

import contextlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import click
from click.shell_completion import CompletionItem

from daskinfer.cli.messages import format_value
from daskinfer.core.declarations import Declaration

_TomlTypes = tuple[tuple[type, ...], str]


class OptionType(click.ParamType, ABC):  # type: ignore[type-arg]  # click 8.1 has no type argument
    """A value that has one of ``toml_types`` in TOML, or is text; :meth:`parse` parses text and checks the rest."""

    toml_types: ClassVar[_TomlTypes]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.parse(value)
        except ValueError as error:
            return self.fail(str(error), param, ctx)

    @abstractmethod
    def parse(self, value: Any) -> Any:
        """Return the value; raise a ValueError that says what it must be."""


class PathsType(OptionType):
    """A path, or ``image=a.npy,meta=b.npy`` as a dict."""

    name = "path"
    toml_types = ((str, dict), "a path, or a table of paths by port")

    def parse(self, value: Any) -> Any:
        found = value
        # A folder's name may contain "=": /data/date=2026-11-27/images.zarr.
        if isinstance(value, str) and "=" in value and "/" not in value.partition("=")[0]:
            pairs = [part.partition("=") for part in value.split(",")]
            found = {name: path for name, _, path in pairs}
        if isinstance(found, dict) and not (found and all(n and isinstance(p, str) and p for n, p in found.items())):
            raise ValueError(f"must be a path or name=path,name=path, got {format_value(value)}")
        return found

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        return [CompletionItem(incomplete, type="file")]


class DtypesType(PathsType):
    """A dtype, or ``image=float32,meta=int64`` as a dict."""

    name = "text"
    toml_types = ((str, dict), "a dtype, or a table of dtypes by port")

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        return []


class DevicesType(OptionType):
    """``cuda,cpu*2``, or a list."""

    name = "text"
    toml_types = ((str, list, int), "text, or a list of texts")

    def parse(self, value: Any) -> Any:
        from daskinfer.hardware.device_spec import explain_number

        for item in value if isinstance(value, list) else [value]:
            if type(item) is int or (isinstance(item, str) and re.fullmatch("[0-9]{1,9}", item)):
                raise ValueError(f"must name devices, got {format_value(value)}: {explain_number(int(item))}")
            if not isinstance(item, str):
                raise ValueError(f"must be text, or a list of texts, got {format_value(value)}")
        return value  # the rest is checked when the call is planned

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        """Return this machine's devices, each after those that were typed before it."""
        from daskinfer.hardware.device_spec import find_local_devices

        before, comma, last = incomplete.rpartition(",")
        found = {"auto": "every GPU, else CPUs", "cuda": "every GPU", "cpu": "a CPU worker", "inline": "this process"}
        found |= {device.name: device.label for device in find_local_devices() if device.kind == "cuda"}
        return [CompletionItem(f"{before}{comma}{n}", help=label) for n, label in found.items() if n.startswith(last)]


class WeightsType(OptionType):
    """``auto``, ``even``, ``1,1,8`` or ``cuda=8,cpu=1``."""

    name = "text"
    toml_types = ((str, list, dict), "auto, even, a list of numbers, or a table of numbers by device")

    def parse(self, value: Any) -> Any:
        if value in ("auto", "even"):
            return value
        try:
            if isinstance(value, str) and "=" in value:
                value = {name: weight for name, _, weight in (part.partition("=") for part in value.split(","))}
            if isinstance(value, Mapping):
                return {name: float(weight) for name, weight in value.items()}
            return [float(weight) for weight in (value.split(",") if isinstance(value, str) else value)]
        except (ValueError, TypeError):
            raise ValueError(
                f"must be auto, even, or weights such as 1,1,8 or cuda=8,cpu=1, got {format_value(value)}"
            ) from None


class DeclaredType(OptionType):
    """A value that its option's declaration allows, as the function ``is_allowed`` says; text is converted first."""

    def __init__(
        self,
        option: Declaration,
        name: str,
        toml_types: _TomlTypes,
        convert_text: Callable[[str], Any],
        is_allowed: Callable[[Any], bool] | None = None,
    ) -> None:
        self.name = name
        self.toml_types = toml_types  # type: ignore[misc]  # of this instance
        self._allowed = option.describe_allowed_flag()
        self._convert_text, self._is_allowed = convert_text, is_allowed or option.is_allowed

    def parse(self, value: Any) -> Any:
        found = value
        with contextlib.suppress(ValueError):
            found = self._convert_text(value) if isinstance(value, str) else value
        if not self._is_allowed(found):
            raise ValueError(f"must be {self._allowed}, got {format_value(value)}")
        return found


def make_count_type(option: Declaration, is_allowed: Callable[[Any], bool] | None = None) -> DeclaredType:
    """Make the type of a number, or a word."""
    return DeclaredType(option, "number", ((int, str), "a whole number, or text"), _convert_count, is_allowed)


def make_number_type(option: Declaration) -> DeclaredType:
    """Make the type of a number."""
    if option.kind is int:
        return DeclaredType(option, "integer", ((int,), "a whole number"), int)
    return DeclaredType(option, "float", ((int, float), "a number"), float)


def is_batch_size(value: Any) -> bool:
    """Return whether a value is a batch size; its declaration leaves that to the planner."""
    return value == "auto" or (type(value) is int and value >= 1)


def _convert_count(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


class ShardType(OptionType):
    """``3/64``."""

    name = "i/n"
    toml_types = ((str, list), "text such as '3/64', or a list of two numbers")

    def parse(self, value: Any) -> tuple[int, int]:
        numbers = value.split("/") if isinstance(value, str) else value
        if len(numbers) != 2 or not all(str(n).isdecimal() for n in numbers) or not 1 <= int(numbers[0]) <= int(numbers[1]):
            raise ValueError(f"must be i/n, part i of n counted from 1, such as 3/64, got {format_value(value)}")
        return int(numbers[0]), int(numbers[1])


class KeywordsType(OptionType):
    """A JSON object, or a table."""

    name = "json"
    toml_types = ((str, dict), "a table, or text that is a JSON object")

    def parse(self, value: Any) -> Any:
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except json.JSONDecodeError as error:
            raise ValueError(f"must be a JSON object, got {format_value(value)} ({error})") from None
        if not isinstance(found, dict):
            raise ValueError(f"must be a JSON object, got {format_value(value)}")
        return found
