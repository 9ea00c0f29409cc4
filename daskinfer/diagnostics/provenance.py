"""Say where a result comes from: the call and its options, when it ran, and on which hosts; never what is in an array."""

from __future__ import annotations

import platform
import reprlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any

from daskinfer.core.chunks import ChunkStats
from daskinfer.options import CallKeywords, list_options

MAX_LISTED_DEVICES = 8  # of a host; arbitrary
_POSITIONAL = {"predict": "model, x", "stream": "model, x", "run": "model, source, target"}
_LOOPBACK = ("127.", "localhost", "[::1]")


class _ValueRepr(reprlib.Repr):
    """Shows plain values in short, and of anything else its type or name: an array's or a client's content stays out."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 120
        self.maxlist = self.maxtuple = self.maxdict = 16

    def repr_instance(self, x: Any, level: int) -> str:
        if x is None or isinstance(x, bool | float | complex):
            return repr(x)
        if is_dataclass(x) and not isinstance(x, type):
            given = ", ".join(f"{name}={self.repr1(value, level - 1)}" for name, value in _get_changed_fields(x).items())
            return f"{type(x).__name__}({given})"
        name = getattr(x, "__qualname__", None)
        return f"<{name if isinstance(name, str) else type(x).__name__}>"

    repr_array = repr_instance


def _get_changed_fields(record: Any) -> dict[str, Any]:
    return {one.name: value for one in fields(record) if not _is_same(value := getattr(record, one.name), one.default)}


def _is_same(value: Any, default: Any) -> bool:
    """Return whether a value is the default; arrays, whose comparison is an array, never are."""
    return value is default or (type(value) is type(default) and bool(isinstance(value, _PLAIN_TYPES) and value == default))


_PLAIN_TYPES = (str, int, float, tuple, dict)


def describe_call(function: str, given: CallKeywords) -> dict[str, str]:
    """Describe a call as it would be typed, and its options apart: those that differ from the defaults.

    Examples
    --------
    >>> describe_call("run", CallKeywords(devices="cpu*2", fields={"prefetch": 2, "retries": 2}))
    {'call': "daskinfer.run(model, source, target, devices='cpu*2', prefetch=2)", 'options': "devices='cpu*2', prefetch=2"}
    """
    values = {one.name: getattr(given, one.name) for one in fields(given) if one.name != "fields"} | dict(given.fields)
    shown = _ValueRepr()
    options = [
        f"{option.name}={shown.repr(values[option.name])}"
        for option in list_options(function)
        if option.name in values and option.section != "what is shown" and not _is_same(values[option.name], option.default)
    ]
    call = ", ".join([_POSITIONAL[function], *options])
    return {"call": f"daskinfer.{function}({call})", "options": ", ".join(options) or "all as by default"}


def format_period(began: float, ended: float) -> str:
    """Format when something began and ended, in local time with its zone.

    Examples
    --------
    >>> import re
    >>> re.sub(r"\\d\\d:\\d\\d:", "…", format_period(86410, 86412)).split()[1:4]
    ['…10', 'to', '…12']
    """
    first, last = (datetime.fromtimestamp(at).astimezone() for at in (began, ended))
    same_day = first.date() == last.date()
    end = last.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M:%S")
    offset = last.strftime("%z")
    return f"{first:%Y-%m-%d %H:%M:%S} to {end} {last:%Z} (UTC{offset[:3]}:{offset[3:5]})"


class Hosts:
    """Collects which devices computed on which host."""

    def __init__(self) -> None:
        self._devices: dict[str, dict[str, None]] = {}

    def add(self, stats: ChunkStats) -> None:
        """Add the worker of a chunk."""
        if stats.worker:
            self._devices.setdefault(_get_host(stats.worker), {})[stats.device] = None

    def describe(self) -> Mapping[str, str]:
        """Describe them as a fact; none if nothing was computed.

        Examples
        --------
        >>> hosts = Hosts()
        >>> hosts.add(ChunkStats(0, 8, "cpu:0", "EPYC", 8, 1.0, "tcp://10.0.0.7:4321"))
        >>> dict(hosts.describe())
        {'hosts': '10.0.0.7 (cpu:0)'}
        """
        hosts = [f"{host} ({_list_names(list(devices))})" for host, devices in self._devices.items()]
        return {"hosts": "; ".join(hosts)} if hosts else {}


def _list_names(names: list[str]) -> str:
    rest = len(names) - MAX_LISTED_DEVICES
    shown = ["this process" if name == "inline" else name for name in names[:MAX_LISTED_DEVICES]]
    return ", ".join(shown) + (f" and {rest:,} more" if rest > 0 else "")


def _get_host(worker: str) -> str:
    """Return the host in a worker's address, or this one: its own processes have no host in theirs."""
    host = worker.partition("://")[2].rpartition(":")[0]
    return host if host and not host.startswith(_LOOPBACK) else platform.node()
