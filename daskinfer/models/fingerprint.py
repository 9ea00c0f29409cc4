"""The fingerprint of a network: the same in every process and after every save, another for every change that counts.

It is a SHA-256 over a canonical reading: each tensor (non-persistent buffers too) by name, dtype, shape and bytes; each
submodule's class by its qualified name; plain attributes by value, other objects by what pickle would take of them; and the
byte code of whatever is not installed, since a notebook's edited ``forward`` keeps its name, with the functions, classes
and values that this code names. ``sha256(cloudpickle)``, ``dask.tokenize`` and ``torch.save`` all differ between processes
or saves, and a state dict alone misses the code (measured). Byte code differs between minor versions of Python, and the
fingerprint of a network defined in a notebook with it.

What says nothing about the answers is left out: train or eval mode, ``requires_grad``, the device, the order of tensors.
What a function imports inside its body, or looks up by a name it computes, is not seen. What cannot be read stably (an open
file, a lock) is refused by name: ``Model(…, version=)`` then says it instead.
"""

from __future__ import annotations

import copyreg
import dis
import enum
import functools
import hashlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch.nn.utils.parametrize import is_parametrized

from daskinfer.errors import ModelError
from daskinfer.models.user_code import is_own

# What every module has (parameters, hooks, flags), and what torch.fx keeps beside the code of a traced one.
_MODULE_STATE = frozenset(vars(torch.nn.Module()))
_GRAPH_STATE = frozenset(vars(torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())))
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_PLAIN = frozenset(
    {type(None), type(...), type(NotImplemented), bool, int, float, complex, str, bytes, range}
    | {torch.dtype, torch.Size, torch.layout, torch.memory_format, torch.qscheme}
)
_SHARED = (types.FunctionType, type, torch.nn.Module)
_NOT_READ = (types.MemberDescriptorType, types.GetSetDescriptorType)  # of a class: where slots lie
_GLOBAL_OPS = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})


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
    reader = _Reader({})
    reader.read(network, "model")
    return reader.digest.hexdigest()


class _Reader:
    """Feeds one digest; remembers what it has read, so that cycles end."""

    def __init__(self, seen: dict[int, int]) -> None:
        self.digest = hashlib.sha256()
        self._seen = seen
        self._n_read = 0
        self._kept: list[Any] = []  # an id is an object's own only while the object lives

    def read(self, thing: Any, path: str) -> None:
        """Feed ``thing``; the first reading that matches wins."""
        if type(thing) in _PLAIN:
            self._feed("plain", type(thing).__name__, repr(thing))
        elif id(thing) in self._seen:
            self._feed("again", str(self._seen[id(thing)]))
        else:
            self._n_read += 1
            self._seen[id(thing)] = self._n_read
            self._reading(thing)(self, thing, path)
            if isinstance(thing, _SHARED):
                self._kept.append(thing)
            else:  # whether two equal containers are one object is an accident of the process
                del self._seen[id(thing)]

    def _reading(self, thing: Any) -> Callable[[_Reader, Any, str], None]:
        exact = _EXACT.get(type(thing))
        return exact or next((reading for kinds, reading in _READINGS if isinstance(thing, kinds)), _Reader._object)

    def _feed(self, *words: str) -> None:
        for word in words:
            data = word.encode("utf-8", "surrogatepass")
            self.digest.update(len(data).to_bytes(8, "little") + data)

    def _items(self, items: Iterable[tuple[str, Any]], path: str) -> None:
        for name, value in items:
            self._feed("item", name)
            self.read(value, f"{path}.{name}")
        self._feed("end")

    def _sequence(self, thing: tuple[Any, ...] | list[Any], path: str) -> None:
        self._feed(type(thing).__name__)
        self._items(_numbered(thing), path)

    def _mapping(self, thing: dict[Any, Any], path: str) -> None:
        self._feed("mapping", str(len(thing)))
        for key, value in thing.items():
            self.read(key, f"{path}[key]")
            self.read(value, f"{path}[{key!r}]")

    def _set(self, thing: Iterable[Any], path: str) -> None:
        # Strings hash differently in every process: order by content, not by the set's own order.
        self._feed("set", type(thing).__name__, *sorted(self._member(value, path) for value in thing))

    def _member(self, value: Any, path: str) -> str:
        reader = _Reader(dict(self._seen))
        reader.read(value, f"{path}.member")
        return reader.digest.hexdigest()

    def _tensor(self, thing: torch.Tensor, path: str) -> None:
        try:
            self._feed("tensor", str(thing.dtype), str(tuple(thing.shape)))
            self._tensor_content(thing, path)
        except RuntimeError as error:  # on "meta", lazy, nested: there are no bytes
            raise _unstable(thing, path) from error
        # "persistent" and private names are torch's and others' flags, here after one way of loading and not another.
        said = ((name, value) for name, value in vars(thing).items() if name != "persistent" and name[0] != "_")
        self._items(sorted(said), path)

    def _tensor_content(self, thing: torch.Tensor, path: str) -> None:
        if thing.is_quantized:
            self._feed(str(thing.qscheme()))
            self._tensor_content(thing.dequantize(), path)
        elif hasattr(thing, "__tensor_flatten__"):
            names, context = thing.__tensor_flatten__()
            self._items([(name, getattr(thing, name)) for name in names], path)
            self.read([type(thing), context], path)
        elif thing.layout != torch.strided:
            self._object(thing, path)
        else:
            flat = thing.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            self.digest.update(flat.view(torch.uint8).numpy().data)

    def _array(self, thing: np.ndarray[Any, Any], path: str) -> None:
        self._feed("array", str(np.lib.format.dtype_to_descr(thing.dtype)), str(thing.shape))
        if thing.dtype.hasobject:
            self._items(_numbered(thing.ravel().tolist()), path)
        else:
            self.digest.update(np.ascontiguousarray(thing).reshape(-1).view(np.uint8).data)

    def _module(self, thing: torch.nn.Module, path: str) -> None:
        if "_orig_mod" in thing._modules:  # torch.compile's wrapper
            return self.read(thing._orig_mod, path)
        if isinstance(thing, torch.fx.GraphModule):
            self._feed("graph", thing.code)
        else:
            # A parametrized module (weight_norm) has a class of its own, which holds the module itself in a closure.
            self.read(type(thing).__base__ if is_parametrized(thing) else type(thing), path)
        tensors = [*thing._parameters.items(), *thing._buffers.items()]
        self._items(sorted((name, tensor) for name, tensor in tensors if tensor is not None), path)
        skipped = _MODULE_STATE | _GRAPH_STATE if isinstance(thing, torch.fx.GraphModule) else _MODULE_STATE
        self._items(sorted((name, value) for name, value in _state(thing).items() if name not in skipped), path)
        self._items(((name, list(getattr(thing, name).values())) for name in _HOOKS), path)
        return self._items(thing._modules.items(), path)

    def _function(self, thing: types.FunctionType, path: str) -> None:
        self._feed("function", str(thing.__module__), thing.__qualname__)
        if _is_named(thing):
            return
        self._code(thing.__code__, path)
        self._items(_numbered(thing.__defaults__ or ()), path)
        self._items(sorted((thing.__kwdefaults__ or {}).items()), path)
        filled = [cell for cell in thing.__closure__ or () if cell != types.CellType()]
        self._items(_numbered(cell.cell_contents for cell in filled), path)
        if _is_own_name(thing.__module__):  # what an installed one uses is installed with it
            self._items(_used(thing), path)

    def _code(self, thing: types.CodeType, path: str) -> None:
        self._feed("code", thing.co_name, *thing.co_names)
        self.digest.update(thing.co_code)
        self._items(_numbered(thing.co_consts), path)

    def _method(self, thing: types.MethodType, path: str) -> None:
        self._items([("function", thing.__func__), ("self", thing.__self__)], path)

    def _builtin(self, thing: types.BuiltinFunctionType, path: str) -> None:
        self._feed("builtin", str(thing.__module__), thing.__qualname__)
        if not isinstance(thing.__self__, type | types.ModuleType | None):
            self.read(thing.__self__, path)

    def _named(self, thing: types.ModuleType, path: str) -> None:
        self._feed("module", thing.__name__)

    def _class(self, thing: type, path: str) -> None:
        self._feed("class", str(thing.__module__), thing.__qualname__)
        if not _is_named(thing):
            self._items(sorted(_members(thing)), path)
            self._items(_numbered(thing.__bases__), path)

    def _enum(self, thing: enum.Enum, path: str) -> None:
        self._feed("enum", str(thing.name))
        self._items([("class", type(thing)), ("value", thing.value)], path)

    def _object(self, thing: Any, path: str) -> None:
        """What pickle would take of it."""
        try:
            reduce = copyreg.dispatch_table.get(type(thing))
            reduced: str | tuple[Any, ...] = reduce(thing) if reduce else thing.__reduce_ex__(4)
        except Exception as error:
            raise _unstable(thing, path) from error
        if isinstance(reduced, str):
            self._feed("global", str(getattr(thing, "__module__", "")), reduced)
            return self.read(getattr(thing, "__wrapped__", None), path)  # functools.cache
        make, arguments, state, listed, paired = (*reduced, None, None, None)[:5]
        self._items([("make", make), *_numbered(arguments)], path)
        self._items(_sorted(state) if isinstance(state, dict) else [("state", state)], path)
        return self._items([*_numbered(listed or ()), *_numbered(paired or ())], path)


_EXACT: dict[type, Callable[[_Reader, Any, str], None]] = {
    tuple: _Reader._sequence,
    list: _Reader._sequence,
    dict: _Reader._mapping,
    np.ndarray: _Reader._array,
    types.CodeType: _Reader._code,
    types.MappingProxyType: lambda reader, thing, path: reader._mapping(dict(thing), path),
    torch.device: lambda reader, thing, path: reader._feed("device"),  # daskinfer says where a network runs
}
_READINGS: tuple[tuple[Any, Callable[[_Reader, Any, str], None]], ...] = (
    (torch.nn.Module, _Reader._module),
    (torch.Tensor, _Reader._tensor),
    (enum.Enum, _Reader._enum),
    ((set, frozenset), _Reader._set),
    (type, _Reader._class),
    (types.FunctionType, _Reader._function),
    (types.MethodType, _Reader._method),
    (types.BuiltinFunctionType, _Reader._builtin),
    (types.ModuleType, _Reader._named),
)


def _numbered(values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Label values by their position."""
    return ((str(i), value) for i, value in enumerate(values))


def _sorted(state: dict[Any, Any]) -> list[tuple[str, Any]]:
    """The order in which attributes were set is an accident."""
    return sorted(((str(name), value) for name, value in state.items()), key=lambda item: item[0])


def _state(module: torch.nn.Module) -> dict[str, Any]:
    """A module's attributes, less what it leaves out itself when it is pickled (an LSTM's weak references)."""
    if type(module).__getstate__ is object.__getstate__ or is_parametrized(module):
        return vars(module)
    state: Any = cast("Any", module).__getstate__()
    return state if isinstance(state, dict) else {"state": state}


def _is_own_name(module: str | None) -> bool:
    """Whether what is defined in ``module`` may change without an installed version that says so."""
    return module in ("__main__", None) or module not in sys.modules or is_own(sys.modules[module])


def _is_named(thing: Any) -> bool:
    """Whether the name of a function or class says all: an installed package gives this very object for it."""
    if thing.__module__ == "builtins":
        return True
    if _is_own_name(thing.__module__):
        return False
    found: Any = sys.modules[thing.__module__]
    for part in thing.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is thing


def _members(owner: type) -> Iterator[tuple[str, Any]]:
    """What the body of a class defines; names such as ``__doc__`` and ``__slots__`` only where they are functions."""
    for name, value in vars(owner).items():
        inner = _underlying(value)
        dunder = (name.startswith("__") and name.endswith("__")) or name == "_abc_impl"
        if not isinstance(inner, _NOT_READ) and (not dunder or isinstance(inner, types.FunctionType)):
            yield name, inner


def _underlying(member: Any) -> Any:
    """The function inside a static method, class method or property."""
    if isinstance(member, staticmethod | classmethod):
        return member.__func__
    if isinstance(member, functools.cached_property):
        return member.func
    return (member.fget, member.fset) if isinstance(member, property) else member


def _used(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals that a function names, and of a user's module among them the parts that it names."""
    inside = list(_nested(function.__code__))
    operations = (operation for code in inside for operation in dis.get_instructions(code))
    names = {operation.argval for operation in operations if operation.opname in _GLOBAL_OPS}
    return _looked_up(function.__globals__, names, {name for code in inside for name in code.co_names}, "")


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _nested(const)


def _looked_up(scope: dict[str, Any], names: set[str], attributes: set[str], prefix: str) -> Iterator[tuple[str, Any]]:
    for name in sorted(names & scope.keys()):
        yield prefix + name, scope[name]
        if is_own(scope[name]):
            parts = attributes - {name}
            yield from _looked_up(vars(scope[name]), parts, parts, f"{prefix}{name}.")


def _unstable(thing: Any, path: str) -> ModelError:
    return ModelError(
        f"{path} is a {type(thing).__name__}, which cannot be hashed the same way in another process; tensors, numbers, "
        "text, containers, functions, classes and objects that pickle as these can. Pass Model(…, version='…') "
        "(--model-version) and change the version when it changes."
    )
