"""A network in memory as bytes: its tensors in one safetensors block, everything else pickled beside them.

Tensors are taken out of the pickle one by one and copied, so that a later change of the network does not reach what was
packed: a host maps the block once for all its workers, and the key is read off the content. The form never leaves a run:
it is no file format for keeping models.

The key holds for one client process (the class object and the tensors' content, decision 7): a class that is defined
again is another network, the same network packed twice is the same key. What must hold between processes is in
``fingerprint``.

In the process that packed it, a network is copied with its classes and functions as they are: unpickling a class by value
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
# Tensors lie in the block as integers of their size, so that every dtype has a place there.
_STORAGE_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)  # exactly these: a subclass may hold more than its bytes
_by_value_lock = threading.RLock()  # cloudpickle's registry is the process's; held while something is pickled by value


@dataclass(frozen=True)
class SerializedModel:
    """A network as a skeleton (pickle) and its tensors; ``key`` is read off both."""

    key: str
    skeleton: bytes
    tensors: dict[str, torch.Tensor]
    local_pickle: tuple[bytes, list[Any]] | None = None  # a skeleton whose classes are this process's; it never travels

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors and the skeleton."""
        return len(self.skeleton) + sum(t.nbytes for t in self.tensors.values())

    def to_bytes(self) -> bytes:
        """One block of bytes, which :func:`deserialize_file` reads back."""
        skeleton = torch.frombuffer(bytearray(self.skeleton), dtype=torch.uint8)
        return safetensors.torch.save({**self.tensors, _SKELETON: skeleton})

    def __reduce__(self) -> tuple[Any, ...]:
        return _deserialize_bytes, (self.to_bytes(),)

    def deserialize(self) -> Any:
        """A network of its own, whose tensors share nothing with the one that was packed."""
        skeleton, live = self.local_pickle or (self.skeleton, [])
        return _Unpickler(skeleton, {name: t.clone() for name, t in self.tensors.items()}, live).load()


def serialize_object(obj: Any, name: str = "the model") -> SerializedModel:
    """Take ``network`` (a module, a function, any object) apart; it stays as it is.

    Classes and functions of files that are not installed (a notebook, a script, a file beside it) travel by value.

    Raises
    ------
    ModelError
        Where something in it cannot be pickled; ``name`` says in the message what was packed.

    Examples
    --------
    >>> packed = serialize_object(torch.nn.Linear(2, 3))
    >>> packed.deserialize()
    Linear(in_features=2, out_features=3, bias=True)
    """
    pickler = _Pickler()
    try:
        pickler.dump(obj)
        local = _pickle_locally(pickler, obj) if pickler.pickled_by_value else None
    except Exception as error:
        raise ModelError(
            f"{name} ({type(obj).__name__}) cannot be sent to workers: {error}. It has to be picklable. "
            "Keep open files, locks and other handles out of its attributes, export it by torch.export to a .pt2 file, "
            "or pass a factory as 'pkg.mod:make'."
        ) from error
    skeleton = pickler.buffer.getvalue()
    return SerializedModel(_compute_key(skeleton, pickler.tensors), skeleton, pickler.tensors, local)


def _pickle_locally(pickler: _Pickler, obj: Any) -> tuple[bytes, list[Any]]:
    """The skeleton for this process, of what ``pickler`` has taken the tensors from."""
    local = _LocalPickler(pickler)
    local.dump(obj)
    return local.buffer.getvalue(), list(local.live_objects.values())


def deserialize_file(path: str | os.PathLike[str]) -> Any:
    """The network in the block at ``path``; its tensors are mapped from the file, copied only where written to."""
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
    """Where a tensor's bytes lie in the block, and what they were; the pickle holds it in the tensor's place."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # as it lies there: the tensor's axes from the largest stride to the smallest
    axes: tuple[int, ...]  # which of the tensor's axes each of them is
    is_parameter: bool
    requires_grad: bool

    def restore(self, stored: torch.Tensor) -> torch.Tensor:
        """The tensor again, in the memory that ``stored`` lies in."""
        order = [self.axes.index(axis) for axis in range(len(self.axes))]
        tensor = stored.view(self.dtype).reshape(self.shape).permute(order)
        if self.is_parameter:
            return torch.nn.Parameter(tensor, self.requires_grad)
        return tensor.requires_grad_(self.requires_grad)


class _ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle ships no annotations
    """Pickles what is defined in modules that a worker may not be able to import by value.

    Each such module is registered when the first thing of it comes by: to look through all that are loaded beforehand took
    20 ms and left 2,400 tuples behind, which made Python look through all its objects (0.25 s) within a first short call.
    """

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=5)
        self.pickled_by_value = False  # whether a class or a function was, or a module may have been
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
    """Puts tensors aside under a number; the same tensor twice (tied weights) keeps one number."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        super().__init__(self.buffer)
        self.tensors: dict[str, torch.Tensor] = {}
        self._tensor_refs: dict[int, _TensorRef] = {}
        self._keep_alive: list[torch.Tensor] = []  # an id is a tensor's own only while the tensor lives

    def persistent_id(self, obj: Any) -> _TensorRef | int | None:
        if type(obj) not in _TENSOR_TYPES or not _is_plain_tensor(obj):
            return None
        if id(obj) not in self._tensor_refs:
            self._keep_alive.append(obj)
            self._tensor_refs[id(obj)] = self._store_tensor(obj)
        return self._tensor_refs[id(obj)]

    def _store_tensor(self, tensor: torch.Tensor) -> _TensorRef:
        name = str(len(self.tensors))
        # The order of the axes in memory is kept: a channels-last network computes other last bits, and faster.
        axes = tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
        # A copy: safetensors refuses tensors that share memory, and a later change must not reach a packed network.
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
        if isinstance(obj, torch.nn.Module) and is_parametrized(obj):  # its own way refuses, though all of it can
            return copyreg.__newobj__, (type(obj),), vars(obj)  # type: ignore[attr-defined]  # not in typeshed
        if isinstance(obj, functools.cached_property):  # it holds a lock up to Python 3.11
            return _make_cached_property, (obj.func, obj.attrname)
        if isinstance(obj, io.IOBase) and not isinstance(obj, io.BytesIO | io.StringIO):
            raise pickle.PicklingError(f"it holds an open file ({obj!r})")  # cloudpickle would send what is in it
        return super().reducer_override(obj)


class _LocalPickler(_Pickler):
    """Names the tensors that another pickler put aside, and leaves classes, functions and modules as they are."""

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
    """Puts the tensors back; each number is made once, so tied weights stay tied."""

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
    """Where it is defined; a function knows that too where it does not say so."""
    return sys.modules.get(obj.__module__ or getattr(obj, "__globals__", {}).get("__name__", ""))


def _is_plain_tensor(tensor: torch.Tensor) -> bool:
    """Whether its bytes say all: the others (sparse, quantised, without data, with attributes) are taken apart by pickle."""
    dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
    return dense and tensor.device.type != "meta" and not vars(tensor)


def _make_cached_property(function: Callable[[Any], Any], name: str) -> functools.cached_property[Any]:
    made = functools.cached_property(function)
    made.__set_name__(object, name)
    return made


def _set_attributes(tensor: torch.Tensor, attributes: dict[str, Any]) -> torch.Tensor:
    vars(tensor).update(attributes)
    return tensor


def _compute_key(skeleton: bytes, tensors: dict[str, torch.Tensor]) -> str:
    """Read off the bytes; names, dtypes and shapes stand in the skeleton."""
    digest = hashlib.sha256(skeleton)
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()
