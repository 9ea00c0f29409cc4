"""The types of the command's options: how a value is parsed, from text on the command line or from TOML."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import click
from click.shell_completion import CompletionItem

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
            raise ValueError(f"must be a path or name=path,name=path, got {value!r}")
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
    toml_types = ((str, list), "text, or a list of texts")

    def parse(self, value: Any) -> Any:
        return value  # checked when the call is planned

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
            raise ValueError(f"must be auto, even, or weights such as 1,1,8 or cuda=8,cpu=1, got {value!r}") from None


class CountType(OptionType):
    """A number, or a word."""

    name = "number"
    toml_types = ((int, str), "a whole number, or text")

    def parse(self, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.lstrip("-").isdecimal() else value


class ShardType(OptionType):
    """``3/64``."""

    name = "i/n"
    toml_types = ((str, list), "text such as '3/64', or a list of two numbers")

    def parse(self, value: Any) -> tuple[int, int]:
        numbers = value.split("/") if isinstance(value, str) else value
        if len(numbers) != 2 or not all(str(n).isdecimal() for n in numbers):
            raise ValueError(f"must be i/n such as 3/64, got {value!r}")
        return int(numbers[0]), int(numbers[1])


class KeywordsType(OptionType):
    """A JSON object, or a table."""

    name = "json"
    toml_types = ((str, dict), "a table, or text that is a JSON object")

    def parse(self, value: Any) -> Any:
        try:
            found = json.loads(value) if isinstance(value, str) else value
        except json.JSONDecodeError as error:
            raise ValueError(f"must be a JSON object, got {value!r} ({error})") from None
        if not isinstance(found, dict):
            raise ValueError(f"must be a JSON object, got {value!r}")
        return found
