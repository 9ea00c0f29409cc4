"""The fingerprint of a network: the same in every process and after every save, another for every change that counts.

It is a SHA-256 over a canonical reading: each tensor (non-persistent buffers too) by name, dtype, shape and bytes; each
submodule's class by its qualified name; plain attributes by value; and the byte code of whatever is not installed, since a
notebook's edited ``forward`` keeps its name. ``sha256(cloudpickle)``, ``dask.tokenize`` and ``torch.save`` all differ
between processes or saves, and a state dict alone misses the code (measured). Byte code differs between minor versions of
Python, and the fingerprint of a network defined in a notebook with it.

What cannot be read stably (an open file, a lock) is refused by name: ``Model(…, version=)`` then says it instead.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import pathlib
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from daskinfer.errors import ModelError
from daskinfer.packed import is_own

_MODULE_STATE = frozenset(torch.nn.Module().__dict__)  # what every module has: parameters, hooks, flags
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), range, torch.dtype, torch.device, torch.Size)
_SHARED = (types.FunctionType, type, torch.nn.Module)


def fingerprint(network: Any) -> str:
    """The SHA-256 (64 hexadecimal digits) of a module, a function or any object made of plain parts.

    Raises
    ------
    ModelError
        Where a part cannot be read stably; the message names its path.

    Examples
    --------
    >>> import torch
    >>> fingerprint(torch.nn.ReLU()) == fingerprint(torch.nn.ReLU())
    True
    """
    reader = _Reader()
    reader.read(network, "model")
    return reader.digest.hexdigest()


class _Reader:
    """Feeds one digest; remembers what it has read, so that cycles end."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # an id is an object's own only while the object lives

    def read(self, thing: Any, path: str) -> None:
        """Feed ``thing``; the first reading that matches wins."""
        if isinstance(thing, _PLAIN):
            self._feed("plain", type(thing).__name__, repr(thing))
        elif id(thing) in self._seen:
            self._feed("again", str(self._seen[id(thing)]))
        else:
            self._seen[id(thing)] = len(self._seen)
            self._reading(thing)(self, thing, path)
            if isinstance(thing, _SHARED):
                self._kept.append(thing)
            else:  # whether two equal containers are one object is an accident of the process
                del self._seen[id(thing)]

    def _reading(self, thing: Any) -> Callable[[_Reader, Any, str], None]:
        return next((reading for kinds, reading in _READINGS if isinstance(thing, kinds)), _Reader._object)

    def _feed(self, *words: str) -> None:
        for word in words:
            data = word.encode()
            self.digest.update(len(data).to_bytes(8, "little") + data)

    def _items(self, items: Iterable[tuple[str, Any]], path: str) -> None:
        for name, value in items:
            self._feed("item", name)
            self.read(value, f"{path}.{name}")

    def _sequence(self, thing: tuple[Any, ...] | list[Any], path: str) -> None:
        self._feed(type(thing).__name__, str(len(thing)))
        self._items(((str(i), value) for i, value in enumerate(thing)), path)

    def _mapping(self, thing: Mapping[Any, Any], path: str) -> None:
        self._feed("mapping", str(len(thing)))
        for key, value in thing.items():
            self.read(key, f"{path}[key]")
            self.read(value, f"{path}[{key!r}]")

    def _set(self, thing: Iterable[Any], path: str) -> None:
        # Strings hash differently in every process: order by content, not by the set's own order.
        self._feed("set", *sorted(fingerprint(value) for value in thing))

    def _tensor(self, thing: torch.Tensor, path: str) -> None:
        self._feed("tensor", str(thing.dtype), str(tuple(thing.shape)))
        flat = thing.detach().cpu().contiguous().reshape(-1)
        self.digest.update(flat.view(torch.uint8).numpy().data)

    def _array(self, thing: np.ndarray[Any, Any] | np.generic, path: str) -> None:
        array = np.ascontiguousarray(thing)
        if array.dtype.hasobject:
            raise _unstable(thing, path)
        self._feed("array", array.dtype.str, str(array.shape))
        self.digest.update(array.reshape(-1).view(np.uint8).data)

    def _module(self, thing: torch.nn.Module, path: str) -> None:
        self._class(type(thing), path)
        tensors = [*thing._parameters.items(), *thing._buffers.items()]
        self._items(sorted((name, t) for name, t in tensors if t is not None), path)
        self._items(sorted((k, v) for k, v in thing.__dict__.items() if k not in _MODULE_STATE), path)
        self._items(((name, list(hooks.values())) for name in _HOOKS if (hooks := getattr(thing, name))), path)
        self._items(((name, child) for name, child in thing._modules.items()), path)

    def _function(self, thing: types.FunctionType, path: str) -> None:
        self._feed("function", thing.__module__, thing.__qualname__)
        if _by_value(thing.__module__):
            self._code(thing.__code__, path)
            self._items(_numbered(thing.__defaults__ or ()), path)
            self._items(sorted((thing.__kwdefaults__ or {}).items()), path)
            self._items(_numbered(c.cell_contents for c in thing.__closure__ or ()), path)
            used = sorted(name for name in _names(thing.__code__) if name in thing.__globals__)
            self._items(((name, thing.__globals__[name]) for name in used), path)

    def _method(self, thing: types.MethodType, path: str) -> None:
        self._feed("method", thing.__func__.__qualname__)
        self.read(thing.__self__, path)

    def _code(self, thing: types.CodeType, path: str) -> None:
        self._feed("code", thing.co_name, *thing.co_names)
        self.digest.update(thing.co_code)
        self._items(_numbered(thing.co_consts), path)

    def _class(self, thing: type, path: str) -> None:
        self._feed("class", thing.__module__, thing.__qualname__)
        if _by_value(thing.__module__):
            members = ((name, value) for name, value in vars(thing).items() if name not in _CLASS_STATE)
            self._items(sorted((name, _underlying(value)) for name, value in members), path)
            self._items(_numbered(base for base in thing.__bases__), path)

    def _partial(self, thing: functools.partial[Any], path: str) -> None:
        self._items([("func", thing.func), ("args", thing.args), ("keywords", thing.keywords)], path)

    def _named(self, thing: Any, path: str) -> None:
        name = getattr(thing, "__qualname__", None) or getattr(thing, "__name__", None) or thing.name
        self._feed(type(thing).__name__, str(getattr(thing, "__module__", "")), str(name))

    def _path(self, thing: pathlib.PurePath | enum.Enum, path: str) -> None:
        self._feed(type(thing).__qualname__, str(thing))

    def _object(self, thing: Any, path: str) -> None:
        if not hasattr(thing, "__dict__"):
            raise _unstable(thing, path)
        self._class(type(thing), path)
        self._items(sorted(vars(thing).items()), path)


_CLASS_STATE = frozenset(
    {"__dict__", "__weakref__", "__module__", "__doc__", "__qualname__", "__annotations__", "__firstlineno__"}
    | {"__static_attributes__", "__slotnames__", "__abstractmethods__", "_abc_impl"}
)

_READINGS: tuple[tuple[Any, Callable[[_Reader, Any, str], None]], ...] = (
    (torch.nn.Module, _Reader._module),
    (torch.Tensor, _Reader._tensor),
    ((np.ndarray, np.generic), _Reader._array),
    ((tuple, list), _Reader._sequence),
    (Mapping, _Reader._mapping),
    ((set, frozenset), _Reader._set),
    (type, _Reader._class),
    (types.FunctionType, _Reader._function),
    (types.MethodType, _Reader._method),
    (types.CodeType, _Reader._code),
    (functools.partial, _Reader._partial),
    ((pathlib.PurePath, enum.Enum), _Reader._path),
    ((types.BuiltinFunctionType, types.ModuleType, np.ufunc, logging.Logger, np.dtype), _Reader._named),
)


def _numbered(values: Iterable[Any]) -> Iterable[tuple[str, Any]]:
    """Label values by their position."""
    return ((str(i), value) for i, value in enumerate(values))


def _by_value(module: str) -> bool:
    """Whether what is defined in ``module`` may change without an installed version that says so."""
    return module in ("__main__", "__mp_main__") or module not in sys.modules or is_own(sys.modules[module])


def _underlying(member: Any) -> Any:
    """The function inside a static method, class method or property."""
    if isinstance(member, staticmethod | classmethod):
        return member.__func__
    return (member.fget, member.fset) if isinstance(member, property) else member


def _names(code: types.CodeType) -> set[str]:
    """Every global or attribute name that ``code`` and the code inside it mentions."""
    nested = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*(_names(inner) for inner in nested))


def _unstable(thing: Any, path: str) -> ModelError:
    return ModelError(
        f"{path} is a {type(thing).__name__}, which cannot be hashed the same way in another process; tensors, numbers, "
        "text, containers, functions and classes can. Pass Model(…, version='…') and change the version when it changes."
    )
