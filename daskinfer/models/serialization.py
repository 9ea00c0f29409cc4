"""Serialization of a model in memory: its tensors in one safetensors block, everything else pickled beside them.

Tensors are taken out of the pickle one by one and copied, so that a later change of the model does not reach the serialized
one. A host maps the block once for all its workers, and the key is computed from the content. The format never outlives a
run: it is not a file format for keeping models.

The key is valid within one client process; it depends on the class object and the tensors' content: a class that is defined
again makes another model, and the same model serialized twice has the same key. What must be equal between processes is in
``fingerprint``.

In the process that serialized it, a model is copied with its classes and functions as they are: unpickling a class by value
would give the user's own class the functions of its copy, and the next key would be another.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import io
import os
import pickle
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, TypeVar

import cloudpickle
import safetensors.torch
import torch
from torch.nn.utils.parametrize import is_parametrized

from daskinfer.errors import ModelError
from daskinfer.models.user_code import is_user_module

_SKELETON = "skeleton"  # the tensor that holds the pickle
# The block stores tensors as integers of their item size, so that every dtype fits.
_STORAGE_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)  # exactly these: a subclass may hold more than its bytes
_by_value_lock = threading.RLock()  # cloudpickle's registry is global; held while something is pickled by value


@dataclass(frozen=True)
class SerializedModel:
    """A model as a skeleton (pickle) and its tensors; ``key`` is computed from both."""

    key: str
    skeleton: bytes
    tensors: dict[str, torch.Tensor]
    local_pickle: tuple[bytes, list[Any]] | None = None  # a skeleton with this process's classes; it never travels

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors and of the skeleton."""
        return len(self.skeleton) + sum(t.nbytes for t in self.tensors.values())

    def to_bytes(self) -> bytes:
        """Return one block of bytes, which :func:`deserialize_file` reads back."""
        skeleton = torch.frombuffer(bytearray(self.skeleton), dtype=torch.uint8)
        return safetensors.torch.save({**self.tensors, _SKELETON: skeleton})

    def __reduce__(self) -> tuple[Any, ...]:
        return _deserialize_bytes, (self.to_bytes(),)

    def deserialize(self) -> Any:
        """Make a new model, whose tensors share nothing with the one that was serialized."""
        skeleton, live = self.local_pickle or (self.skeleton, [])
        return _Unpickler(skeleton, {name: t.clone() for name, t in self.tensors.items()}, live).load()


def serialize_object(obj: Any, name: str = "the model") -> SerializedModel:
    """Serialize ``obj`` (a module, a function, any object), without changing it.

    Classes and functions of files that are not installed (a notebook, a script, a file beside it) travel by value.

    Raises
    ------
    ModelError
        If something in it cannot be pickled; the message calls the object ``name``.

    Examples
    --------
    >>> serialized = serialize_object(torch.nn.Linear(2, 3))
    >>> serialized.deserialize()
    Linear(in_features=2, out_features=3, bias=True)
    """
    pickler = _Pickler()
    try:
        pickler.dump(obj)
        local = _pickle_locally(pickler, obj) if pickler.pickled_by_value else None
    except Exception as error:
        raise ModelError(
            f"{name} ({type(obj).__name__}) cannot be pickled for the workers: {error}. Keep open files, locks and other "
            "handles out of its attributes, save it with torch.export as .pt2, or pass a factory 'pkg.mod:make'"
        ) from error
    skeleton = pickler.buffer.getvalue()
    return SerializedModel(_compute_key(skeleton, pickler.tensors), skeleton, pickler.tensors, local)


def _pickle_locally(pickler: _Pickler, obj: Any) -> tuple[bytes, list[Any]]:
    """Pickle the skeleton for this process; ``pickler`` has already stored the tensors."""
    local = _LocalPickler(pickler)
    local.dump(obj)
    return local.buffer.getvalue(), list(local.live_objects.values())


def deserialize_file(path: str | os.PathLike[str]) -> Any:
    """Load the model in the block at ``path``; its tensors are mapped from the file, and copied only if written to."""
    tensors = safetensors.torch.load_file(path)
    return _Unpickler(tensors.pop(_SKELETON).numpy().tobytes(), tensors).load()


class ByValueFunction:
    """A function that is pickled by value if it comes from a file that is not installed; called like the function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        buffer = io.BytesIO()
        _ByValuePickler(buffer).dump(self._function)
        return _unpickle_function, (buffer.getvalue(),)


def _unpickle_function(pickled: bytes) -> ByValueFunction:
    return ByValueFunction(cloudpickle.loads(pickled))


def _deserialize_bytes(block: bytes) -> SerializedModel:
    tensors = safetensors.torch.load(block)
    skeleton = tensors.pop(_SKELETON).numpy().tobytes()
    return SerializedModel(_compute_key(skeleton, tensors), skeleton, tensors)


class _TensorRef(NamedTuple):
    """Where a tensor's bytes are in the block, and how to restore it; it stands for the tensor in the pickle."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # as stored: the tensor's axes from the largest stride to the smallest
    axes: tuple[int, ...]  # which of the tensor's axes each stored axis is
    is_parameter: bool
    requires_grad: bool

    def restore(self, stored: torch.Tensor) -> torch.Tensor:
        """Restore the tensor, in the memory of ``stored``."""
        order = [self.axes.index(axis) for axis in range(len(self.axes))]
        tensor = stored.view(self.dtype).reshape(self.shape).permute(order)
        if self.is_parameter:
            return torch.nn.Parameter(tensor, self.requires_grad)
        return tensor.requires_grad_(self.requires_grad)


class _ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle ships no annotations
    """Pickles by value what is defined in modules that a worker may not be able to import.

    Each such module is registered when the first object from it is pickled: searching all loaded modules beforehand took
    20 ms and left 2,400 tuples behind, which triggered a full garbage collection (0.25 s) within a first short call.
    """

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=5)
        self.pickled_by_value = False  # a class or a function was, or a module may have been
        self._registered: dict[str, ModuleType] = {}

    def dump(self, obj: Any) -> None:
        with _by_value_lock:
            try:
                super().dump(obj)
            finally:
                for module in self._registered.values():
                    cloudpickle.unregister_pickle_by_value(module)
                self._registered.clear()

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, ModuleType | FunctionType | type | TypeVar):
            return super().reducer_override(obj)
        self._register_module(obj if isinstance(obj, ModuleType) else _find_module(obj))
        reduced = super().reducer_override(obj)
        self.pickled_by_value |= not isinstance(obj, FunctionType | type) or reduced is not NotImplemented
        return reduced

    def _register_module(self, module: ModuleType | None) -> None:
        if module is None or module.__name__ in cloudpickle.list_registry_pickle_by_value() or not is_user_module(module):
            return
        cloudpickle.register_pickle_by_value(module)
        self._registered[module.__name__] = module


class _Pickler(_ByValuePickler):
    """Stores tensors under a number each; the same tensor twice (tied weights) keeps one number."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        super().__init__(self.buffer)
        self.tensors: dict[str, torch.Tensor] = {}
        self._tensor_refs: dict[int, _TensorRef] = {}
        self._keep_alive: list[torch.Tensor] = []  # an id is unique only while its tensor lives

    def persistent_id(self, obj: Any) -> _TensorRef | int | None:
        if type(obj) not in _TENSOR_TYPES or not _is_plain_tensor(obj):
            return None
        if id(obj) not in self._tensor_refs:
            self._keep_alive.append(obj)
            self._tensor_refs[id(obj)] = self._store_tensor(obj)
        return self._tensor_refs[id(obj)]

    def _store_tensor(self, tensor: torch.Tensor) -> _TensorRef:
        name = str(len(self.tensors))
        # Keep the order of the axes in memory: a channels-last model computes other last bits, and faster.
        axes = tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
        # A copy: safetensors refuses tensors that share memory, and a later change must not reach the serialized model.
        stored = tensor.detach().permute(axes).to("cpu", copy=True).contiguous().resolve_conj().resolve_neg()
        self.tensors[name] = stored.reshape(-1).view(_STORAGE_DTYPES[tensor.itemsize])
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        return _TensorRef(name, tensor.dtype, tuple(stored.shape), axes, is_parameter, tensor.requires_grad)

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) in _TENSOR_TYPES and vars(obj):
            plain = obj.detach()
            if isinstance(obj, torch.nn.Parameter):
                plain = torch.nn.Parameter(plain, obj.requires_grad)
            return _set_attributes, (plain, vars(obj))
        # A parametrized module refuses to be pickled, though all its parts can be.
        if isinstance(obj, torch.nn.Module) and is_parametrized(obj):
            return copyreg.__newobj__, (type(obj),), vars(obj)  # type: ignore[attr-defined]  # not in typeshed
        if isinstance(obj, functools.cached_property):  # it holds a lock up to Python 3.11
            return _make_cached_property, (obj.func, obj.attrname)
        if isinstance(obj, io.IOBase) and not isinstance(obj, io.BytesIO | io.StringIO):
            raise pickle.PicklingError(f"it holds an open file ({obj!r})")  # cloudpickle would send its content
        return super().reducer_override(obj)


class _LocalPickler(_Pickler):
    """Refers to the tensors that another pickler stored, and leaves classes, functions and modules as they are."""

    def __init__(self, pickler: _Pickler) -> None:
        super().__init__()
        self.tensors, self._tensor_refs, self._keep_alive = pickler.tensors, pickler._tensor_refs, pickler._keep_alive
        self.live_objects: dict[int, Any] = {}
        self._positions: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> _TensorRef | int | None:
        if not isinstance(obj, type | FunctionType | ModuleType):
            return super().persistent_id(obj)
        position = self._positions.setdefault(id(obj), len(self._positions))
        self.live_objects[position] = obj
        return position


class _Unpickler(pickle.Unpickler):
    """Puts the tensors back; each number is restored once, so tied weights stay tied."""

    def __init__(self, skeleton: bytes, tensors: dict[str, torch.Tensor], live_objects: Sequence[Any] = ()) -> None:
        super().__init__(io.BytesIO(skeleton))
        self._tensors = tensors
        self._live_objects = live_objects
        self._restored: dict[str, torch.Tensor] = {}

    def persistent_load(self, ref: _TensorRef | int) -> Any:
        if isinstance(ref, int):
            return self._live_objects[ref]
        if ref.name not in self._restored:
            self._restored[ref.name] = ref.restore(self._tensors[ref.name])
        return self._restored[ref.name]


def _find_module(obj: FunctionType | type | TypeVar) -> ModuleType | None:
    """Find the module that defines ``obj``; a function without a ``__module__`` still has its globals."""
    return sys.modules.get(obj.__module__ or getattr(obj, "__globals__", {}).get("__name__", ""))


def _is_plain_tensor(tensor: torch.Tensor) -> bool:
    """Check whether its bytes are all of it; pickle takes the others apart (sparse, quantised, meta, with attributes)."""
    dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
    return dense and tensor.device.type != "meta" and not vars(tensor)


def _make_cached_property(function: Callable[[Any], Any], name: str) -> functools.cached_property[Any]:
    cached = functools.cached_property(function)
    cached.__set_name__(object, name)
    return cached


def _set_attributes(tensor: torch.Tensor, attributes: dict[str, Any]) -> torch.Tensor:
    vars(tensor).update(attributes)
    return tensor


def _compute_key(skeleton: bytes, tensors: dict[str, torch.Tensor]) -> str:
    """Compute the key from the bytes alone: the skeleton already holds names, dtypes and shapes."""
    digest = hashlib.sha256(skeleton)
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()
