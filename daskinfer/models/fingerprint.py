"""The fingerprint of a model: equal in every process and after every save, different after every change that matters.

It is a SHA-256 over a canonical reading of the model: each tensor (non-persistent buffers too) by name, dtype, shape and
bytes; each submodule's class by its qualified name; plain attributes by value, other objects by what pickle would take of
them; and the byte code of whatever is not installed, since a ``forward`` edited in a notebook keeps its name, together with
the functions, classes and values that this code names. ``sha256(cloudpickle)``, ``dask.tokenize`` and ``torch.save`` all
differ between processes or saves, and a state dict alone misses the code (measured). Byte code differs between minor
versions of Python, and with it the fingerprint of a model defined in a notebook.

What does not affect the output is left out: train or eval mode, ``requires_grad``, the device, the order of tensors. What a
function imports inside its body, or looks up by a computed name, is not seen. What has no reproducible reading (an open
file, a lock) is refused with its path; ``Model(…, version=)`` then identifies the model instead.

Outputs on disk store the fingerprint: the labels that are hashed ("plain", "item", "end" and so on) and their order must
not change, or outputs of older versions could not be continued.
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
from daskinfer.models.user_code import is_user_module

# What every module has (parameters, hooks, flags), and what torch.fx keeps besides the code of a traced module.
_MODULE_STATE = frozenset(vars(torch.nn.Module()))
_GRAPH_STATE = frozenset(vars(torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())))
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_PLAIN_TYPES = frozenset(
    {type(None), type(...), type(NotImplemented), bool, int, float, complex, str, bytes, range}
    | {torch.dtype, torch.Size, torch.layout, torch.memory_format, torch.qscheme}
)
_SHARED_TYPES = (types.FunctionType, type, torch.nn.Module)
_SLOT_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)  # members of a class with __slots__
_GLOBAL_OPS = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})


def compute_fingerprint(model: Any) -> str:
    """Compute the SHA-256 (64 hexadecimal digits) of a module, a function or any object made of plain parts.

    Raises
    ------
    ModelError
        If a part has no reproducible reading; the message names its path.

    Examples
    --------
    >>> import torch
    >>> compute_fingerprint(torch.nn.ReLU()) == compute_fingerprint(torch.nn.ReLU())
    True
    """
    hasher = _Hasher({})
    hasher.update(model, "model")
    return hasher.digest.hexdigest()


class _Hasher:
    """Feeds objects to one digest; remembers those it has read, so that cycles end."""

    def __init__(self, seen: dict[int, int]) -> None:
        self.digest = hashlib.sha256()
        self._seen = seen
        self._n_seen = 0
        self._keep_alive: list[Any] = []  # an id is unique only while its object lives

    def update(self, obj: Any, path: str) -> None:
        """Feed ``obj`` to the digest by the first method that matches it."""
        if type(obj) in _PLAIN_TYPES:
            self._hash_strings("plain", type(obj).__name__, repr(obj))
        elif id(obj) in self._seen:
            self._hash_strings("again", str(self._seen[id(obj)]))
        else:
            self._n_seen += 1
            self._seen[id(obj)] = self._n_seen
            self._find_hash_method(obj)(self, obj, path)
            if isinstance(obj, _SHARED_TYPES):
                self._keep_alive.append(obj)
            else:  # whether two equal containers are one object may differ between processes
                del self._seen[id(obj)]

    def _find_hash_method(self, obj: Any) -> Callable[[_Hasher, Any, str], None]:
        exact = _METHODS_BY_TYPE.get(type(obj))
        return exact or next(
            (method for types_, method in _METHODS_BY_BASE if isinstance(obj, types_)), _Hasher._hash_pickle_state
        )

    def _hash_strings(self, *strings: str) -> None:
        for string in strings:
            data = string.encode("utf-8", "surrogatepass")
            self.digest.update(len(data).to_bytes(8, "little") + data)

    def _hash_items(self, items: Iterable[tuple[str, Any]], path: str) -> None:
        for name, value in items:
            self._hash_strings("item", name)
            self.update(value, f"{path}.{name}")
        self._hash_strings("end")

    def _hash_sequence(self, obj: tuple[Any, ...] | list[Any], path: str) -> None:
        self._hash_strings(type(obj).__name__)
        self._hash_items(_enumerate_items(obj), path)

    def _hash_mapping(self, obj: dict[Any, Any], path: str) -> None:
        self._hash_strings("mapping", str(len(obj)))
        for key, value in obj.items():
            self.update(key, f"{path}[key]")
            self.update(value, f"{path}[{key!r}]")

    def _hash_set(self, obj: Iterable[Any], path: str) -> None:
        # Strings hash differently in every process: sort by content instead of taking the set's own order.
        self._hash_strings("set", type(obj).__name__, *sorted(self._compute_member_digest(value, path) for value in obj))

    def _compute_member_digest(self, value: Any, path: str) -> str:
        hasher = _Hasher(dict(self._seen))
        hasher.update(value, f"{path}.member")
        return hasher.digest.hexdigest()

    def _hash_tensor(self, obj: torch.Tensor, path: str) -> None:
        try:
            self._hash_strings("tensor", str(obj.dtype), str(tuple(obj.shape)))
            self._hash_tensor_content(obj, path)
        except RuntimeError as error:  # meta, lazy and nested tensors have no bytes
            raise _unstable_value_error(obj, path) from error
        # "persistent" and private names are flags of torch and others, set by some ways of loading and not by others.
        attributes = ((name, value) for name, value in vars(obj).items() if name != "persistent" and name[0] != "_")
        self._hash_items(sorted(attributes), path)

    def _hash_tensor_content(self, obj: torch.Tensor, path: str) -> None:
        if obj.is_quantized:
            self._hash_strings(str(obj.qscheme()))
            self._hash_tensor_content(obj.dequantize(), path)
        elif hasattr(obj, "__tensor_flatten__"):
            names, context = obj.__tensor_flatten__()
            self._hash_items([(name, getattr(obj, name)) for name in names], path)
            self.update([type(obj), context], path)
        elif obj.layout != torch.strided:
            self._hash_pickle_state(obj, path)
        else:
            flat = obj.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            self.digest.update(flat.view(torch.uint8).numpy().data)

    def _hash_array(self, obj: np.ndarray[Any, Any], path: str) -> None:
        self._hash_strings("array", str(np.lib.format.dtype_to_descr(obj.dtype)), str(obj.shape))
        if obj.dtype.hasobject:
            self._hash_items(_enumerate_items(obj.ravel().tolist()), path)
        else:
            self.digest.update(np.ascontiguousarray(obj).reshape(-1).view(np.uint8).data)

    def _hash_nn_module(self, obj: torch.nn.Module, path: str) -> None:
        if "_orig_mod" in obj._modules:  # torch.compile's wrapper
            return self.update(obj._orig_mod, path)
        if isinstance(obj, torch.fx.GraphModule):
            self._hash_strings("graph", obj.code)
        else:
            # A parametrized module (weight_norm) has its own class, which holds the module itself in a closure.
            self.update(type(obj).__base__ if is_parametrized(obj) else type(obj), path)
        tensors = [*obj._parameters.items(), *obj._buffers.items()]
        self._hash_items(sorted((name, tensor) for name, tensor in tensors if tensor is not None), path)
        skipped = _MODULE_STATE | _GRAPH_STATE if isinstance(obj, torch.fx.GraphModule) else _MODULE_STATE
        self._hash_items(
            sorted((name, value) for name, value in _get_module_state(obj).items() if name not in skipped), path
        )
        self._hash_items(((name, list(getattr(obj, name).values())) for name in _HOOKS), path)
        return self._hash_items(obj._modules.items(), path)

    def _hash_function(self, obj: types.FunctionType, path: str) -> None:
        self._hash_strings("function", str(obj.__module__), obj.__qualname__)
        if _is_importable_by_name(obj):
            return
        self._hash_code(obj.__code__, path)
        self._hash_items(_enumerate_items(obj.__defaults__ or ()), path)
        self._hash_items(sorted((obj.__kwdefaults__ or {}).items()), path)
        filled = [cell for cell in obj.__closure__ or () if cell != types.CellType()]
        self._hash_items(_enumerate_items(cell.cell_contents for cell in filled), path)
        if _is_user_module_name(obj.__module__):  # what an installed function uses is installed with it
            self._hash_items(_iter_used_globals(obj), path)

    def _hash_code(self, obj: types.CodeType, path: str) -> None:
        self._hash_strings("code", obj.co_name, *obj.co_names)
        self.digest.update(obj.co_code)
        self._hash_items(_enumerate_items(obj.co_consts), path)

    def _hash_method(self, obj: types.MethodType, path: str) -> None:
        self._hash_items([("function", obj.__func__), ("self", obj.__self__)], path)

    def _hash_builtin(self, obj: types.BuiltinFunctionType, path: str) -> None:
        self._hash_strings("builtin", str(obj.__module__), obj.__qualname__)
        if not isinstance(obj.__self__, type | types.ModuleType | None):
            self.update(obj.__self__, path)

    def _hash_python_module(self, obj: types.ModuleType, path: str) -> None:
        self._hash_strings("module", obj.__name__)

    def _hash_class(self, obj: type, path: str) -> None:
        self._hash_strings("class", str(obj.__module__), obj.__qualname__)
        if not _is_importable_by_name(obj):
            self._hash_items(sorted(_iter_class_members(obj)), path)
            self._hash_items(_enumerate_items(obj.__bases__), path)

    def _hash_enum(self, obj: enum.Enum, path: str) -> None:
        self._hash_strings("enum", str(obj.name))
        self._hash_items([("class", type(obj)), ("value", obj.value)], path)

    def _hash_pickle_state(self, obj: Any, path: str) -> None:
        """Feed what pickle would take of ``obj``."""
        try:
            reduce = copyreg.dispatch_table.get(type(obj))
            reduced: str | tuple[Any, ...] = reduce(obj) if reduce else obj.__reduce_ex__(4)
        except Exception as error:
            raise _unstable_value_error(obj, path) from error
        if isinstance(reduced, str):
            self._hash_strings("global", str(getattr(obj, "__module__", "")), reduced)
            return self.update(getattr(obj, "__wrapped__", None), path)  # functools.cache
        make, arguments, state, listed, paired = (*reduced, None, None, None)[:5]
        self._hash_items([("make", make), *_enumerate_items(arguments)], path)
        self._hash_items(_sort_items(state) if isinstance(state, dict) else [("state", state)], path)
        return self._hash_items([*_enumerate_items(listed or ()), *_enumerate_items(paired or ())], path)


_METHODS_BY_TYPE: dict[type, Callable[[_Hasher, Any, str], None]] = {
    tuple: _Hasher._hash_sequence,
    list: _Hasher._hash_sequence,
    dict: _Hasher._hash_mapping,
    np.ndarray: _Hasher._hash_array,
    types.CodeType: _Hasher._hash_code,
    types.MappingProxyType: lambda hasher, obj, path: hasher._hash_mapping(dict(obj), path),
    torch.device: lambda hasher, obj, path: hasher._hash_strings("device"),  # daskinfer decides where a model runs
}
_METHODS_BY_BASE: tuple[tuple[Any, Callable[[_Hasher, Any, str], None]], ...] = (
    (torch.nn.Module, _Hasher._hash_nn_module),
    (torch.Tensor, _Hasher._hash_tensor),
    (enum.Enum, _Hasher._hash_enum),
    ((set, frozenset), _Hasher._hash_set),
    (type, _Hasher._hash_class),
    (types.FunctionType, _Hasher._hash_function),
    (types.MethodType, _Hasher._hash_method),
    (types.BuiltinFunctionType, _Hasher._hash_builtin),
    (types.ModuleType, _Hasher._hash_python_module),
)


def _enumerate_items(values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Label values by their position."""
    return ((str(i), value) for i, value in enumerate(values))


def _sort_items(state: dict[Any, Any]) -> list[tuple[str, Any]]:
    """Sort attributes by name: the order in which they were set does not count."""
    return sorted(((str(name), value) for name, value in state.items()), key=lambda item: item[0])


def _get_module_state(module: torch.nn.Module) -> dict[str, Any]:
    """Return a module's attributes without those that it leaves out of its pickle (an LSTM's weak references)."""
    if type(module).__getstate__ is object.__getstate__ or is_parametrized(module):
        return vars(module)
    state: Any = cast("Any", module).__getstate__()
    return state if isinstance(state, dict) else {"state": state}


def _is_user_module_name(module: str | None) -> bool:
    """Check whether what ``module`` defines may change without a new installed version."""
    return module in ("__main__", None) or module not in sys.modules or is_user_module(sys.modules[module])


def _is_importable_by_name(obj: Any) -> bool:
    """Check whether the name of a function or class is enough: importing it from an installed package gives this object."""
    if obj.__module__ == "builtins":
        return True
    if _is_user_module_name(obj.__module__):
        return False
    resolved: Any = sys.modules[obj.__module__]
    for name in obj.__qualname__.split("."):
        resolved = getattr(resolved, name, None)
    return resolved is obj


def _iter_class_members(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield what the body of a class defines; names such as ``__doc__`` and ``__slots__`` only if they are functions."""
    for name, value in vars(cls).items():
        inner = _unwrap_member(value)
        dunder = (name.startswith("__") and name.endswith("__")) or name == "_abc_impl"
        if not isinstance(inner, _SLOT_DESCRIPTORS) and (not dunder or isinstance(inner, types.FunctionType)):
            yield name, inner


def _unwrap_member(member: Any) -> Any:
    """Return the function inside a static method, class method or property."""
    if isinstance(member, staticmethod | classmethod):
        return member.__func__
    if isinstance(member, functools.cached_property):
        return member.func
    return (member.fget, member.fset) if isinstance(member, property) else member


def _iter_used_globals(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the globals that a function names, and of a user's module among them the attributes that it names."""
    codes = list(_iter_nested_code(function.__code__))
    operations = (operation for code in codes for operation in dis.get_instructions(code))
    names = {operation.argval for operation in operations if operation.opname in _GLOBAL_OPS}
    return _iter_resolved_names(function.__globals__, names, {name for code in codes for name in code.co_names}, "")


def _iter_nested_code(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _iter_nested_code(const)


def _iter_resolved_names(
    scope: dict[str, Any], names: set[str], attributes: set[str], prefix: str
) -> Iterator[tuple[str, Any]]:
    for name in sorted(names & scope.keys()):
        yield prefix + name, scope[name]
        if is_user_module(scope[name]):
            members = attributes - {name}
            yield from _iter_resolved_names(vars(scope[name]), members, members, f"{prefix}{name}.")


def _unstable_value_error(obj: Any, path: str) -> ModelError:
    return ModelError(
        f"{path} is a {type(obj).__name__}, which has no reproducible hash; use tensors, plain values, containers, "
        "functions and classes. Or pass Model(…, version='1') (--model-version 1), and change it when the model changes"
    )
