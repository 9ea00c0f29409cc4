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
from daskinfer.models.user_code import is_own

_SKELETON = "skeleton"  # the tensor that holds the pickle
# Tensors lie in the block as integers of their size, so that every dtype has a place there.
_STAND_INS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_TENSORS = (torch.Tensor, torch.nn.Parameter)  # exactly these: a subclass may hold more than its bytes
_by_value_lock = threading.RLock()  # cloudpickle's registry is the process's; held while something is pickled by value


@dataclass(frozen=True)
class Packed:
    """A network as a skeleton (pickle) and its tensors; ``key`` is read off both."""

    key: str
    skeleton: bytes
    tensors: dict[str, torch.Tensor]
    local: tuple[bytes, list[Any]] | None = None  # a skeleton whose classes are this process's; it never travels

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors and the skeleton."""
        return len(self.skeleton) + sum(t.nbytes for t in self.tensors.values())

    def to_bytes(self) -> bytes:
        """One block of bytes, which :func:`from_file` reads back."""
        skeleton = torch.frombuffer(bytearray(self.skeleton), dtype=torch.uint8)
        return safetensors.torch.save({**self.tensors, _SKELETON: skeleton})

    def __reduce__(self) -> tuple[Any, ...]:
        return _unblock, (self.to_bytes(),)

    def unpack(self) -> Any:
        """A network of its own, whose tensors share nothing with the one that was packed."""
        skeleton, live = self.local or (self.skeleton, [])
        return _Unpickler(skeleton, {name: t.clone() for name, t in self.tensors.items()}, live).load()


def pack(network: Any, name: str = "the model") -> Packed:
    """Take ``network`` (a module, a function, any object) apart; it stays as it is.

    Classes and functions of files that are not installed (a notebook, a script, a file beside it) travel by value.

    Raises
    ------
    ModelError
        Where something in it cannot be pickled; ``name`` says in the message what was packed.

    Examples
    --------
    >>> packed = pack(torch.nn.Linear(2, 3))
    >>> packed.unpack()
    Linear(in_features=2, out_features=3, bias=True)
    """
    pickler = _Pickler()
    try:
        pickler.dump(network)
        local = _local(pickler, network) if pickler.by_value else None
    except Exception as error:
        raise ModelError(
            f"{name} ({type(network).__name__}) cannot be sent to workers: {error}. It has to be picklable. "
            "Keep open files, locks and other handles out of its attributes, export it by torch.export to a .pt2 file, "
            "or pass a factory as 'pkg.mod:make'."
        ) from error
    skeleton = pickler.buffer.getvalue()
    return Packed(_key(skeleton, pickler.tensors), skeleton, pickler.tensors, local)


def _local(pickler: _Pickler, network: Any) -> tuple[bytes, list[Any]]:
    """The skeleton for this process, of what ``pickler`` has taken the tensors from."""
    local = _LocalPickler(pickler)
    local.dump(network)
    return local.buffer.getvalue(), list(local.live.values())


def from_file(path: str | os.PathLike[str]) -> Any:
    """The network in the block at ``path``; its tensors are mapped from the file, copied only where written to."""
    tensors = safetensors.torch.load_file(path)
    return _Unpickler(tensors.pop(_SKELETON).numpy().tobytes(), tensors).load()


class ByValue:
    """A function that is pickled by value if it comes from a file that is not installed; called like the function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        buffer = io.BytesIO()
        _ByValuePickler(buffer).dump(self._function)
        return _unpickle_function, (buffer.getvalue(),)


def _unpickle_function(pickled: bytes) -> ByValue:
    return ByValue(cloudpickle.loads(pickled))


def _unblock(block: bytes) -> Packed:
    tensors = safetensors.torch.load(block)
    skeleton = tensors.pop(_SKELETON).numpy().tobytes()
    return Packed(_key(skeleton, tensors), skeleton, tensors)


class _Place(NamedTuple):
    """Where a tensor's bytes lie in the block, and what they were; the pickle holds it in the tensor's place."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # as it lies there: the tensor's axes from the largest stride to the smallest
    axes: tuple[int, ...]  # which of the tensor's axes each of them is
    is_parameter: bool
    requires_grad: bool

    def tensor(self, stored: torch.Tensor) -> torch.Tensor:
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
        self.by_value = False  # whether a class or a function was, or a module may have been
        self._registered: dict[str, ModuleType] = {}

    def dump(self, thing: Any) -> None:
        with _by_value_lock:
            try:
                super().dump(thing)
            finally:
                for module in self._registered.values():
                    cloudpickle.unregister_pickle_by_value(module)
                self._registered.clear()

    def reducer_override(self, thing: Any) -> Any:
        if not isinstance(thing, ModuleType | FunctionType | type | TypeVar):
            return super().reducer_override(thing)
        self._register(thing if isinstance(thing, ModuleType) else _module_of(thing))
        reduced = super().reducer_override(thing)
        self.by_value |= not isinstance(thing, FunctionType | type) or reduced is not NotImplemented
        return reduced

    def _register(self, module: ModuleType | None) -> None:
        if module is None or module.__name__ in cloudpickle.list_registry_pickle_by_value() or not is_own(module):
            return
        cloudpickle.register_pickle_by_value(module)
        self._registered[module.__name__] = module


class _Pickler(_ByValuePickler):
    """Puts tensors aside under a number; the same tensor twice (tied weights) keeps one number."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        super().__init__(self.buffer)
        self.tensors: dict[str, torch.Tensor] = {}
        self._places: dict[int, _Place] = {}
        self._kept: list[torch.Tensor] = []  # an id is a tensor's own only while the tensor lives

    def persistent_id(self, thing: Any) -> _Place | int | None:
        if type(thing) not in _TENSORS or not _fits_block(thing):
            return None
        if id(thing) not in self._places:
            self._kept.append(thing)
            self._places[id(thing)] = self._put(thing)
        return self._places[id(thing)]

    def _put(self, thing: torch.Tensor) -> _Place:
        name = str(len(self.tensors))
        # The order of the axes in memory is kept: a channels-last network computes other last bits, and faster.
        axes = tuple(sorted(range(thing.dim()), key=thing.stride, reverse=True))
        # A copy: safetensors refuses tensors that share memory, and a later change must not reach a packed network.
        stored = thing.detach().permute(axes).to("cpu", copy=True).contiguous().resolve_conj().resolve_neg()
        self.tensors[name] = stored.reshape(-1).view(_STAND_INS[thing.itemsize])
        is_parameter = isinstance(thing, torch.nn.Parameter)
        return _Place(name, thing.dtype, tuple(stored.shape), axes, is_parameter, thing.requires_grad)

    def reducer_override(self, thing: Any) -> Any:
        if type(thing) in _TENSORS and vars(thing):
            plain = thing.detach()
            if isinstance(thing, torch.nn.Parameter):
                plain = torch.nn.Parameter(plain, thing.requires_grad)
            return _with_attributes, (plain, vars(thing))
        if isinstance(thing, torch.nn.Module) and is_parametrized(thing):  # its own way refuses, though all of it can
            return copyreg.__newobj__, (type(thing),), vars(thing)  # type: ignore[attr-defined]  # not in typeshed
        if isinstance(thing, functools.cached_property):  # it holds a lock up to Python 3.11
            return _cached_property, (thing.func, thing.attrname)
        if isinstance(thing, io.IOBase) and not isinstance(thing, io.BytesIO | io.StringIO):
            raise pickle.PicklingError(f"it holds an open file ({thing!r})")  # cloudpickle would send what is in it
        return super().reducer_override(thing)


class _LocalPickler(_Pickler):
    """Names the tensors that another pickler put aside, and leaves classes, functions and modules as they are."""

    def __init__(self, pickler: _Pickler) -> None:
        super().__init__()
        self.tensors, self._places, self._kept = pickler.tensors, pickler._places, pickler._kept
        self.live: dict[int, Any] = {}
        self._positions: dict[int, int] = {}

    def persistent_id(self, thing: Any) -> _Place | int | None:
        if not isinstance(thing, type | FunctionType | ModuleType):
            return super().persistent_id(thing)
        position = self._positions.setdefault(id(thing), len(self._positions))
        self.live[position] = thing
        return position


class _Unpickler(pickle.Unpickler):
    """Puts the tensors back; each number is made once, so tied weights stay tied."""

    def __init__(self, skeleton: bytes, tensors: dict[str, torch.Tensor], live: Sequence[Any] = ()) -> None:
        super().__init__(io.BytesIO(skeleton))
        self._tensors = tensors
        self._live = live
        self._made: dict[str, torch.Tensor] = {}

    def persistent_load(self, place: _Place | int) -> Any:
        if isinstance(place, int):
            return self._live[place]
        if place.name not in self._made:
            self._made[place.name] = place.tensor(self._tensors[place.name])
        return self._made[place.name]


def _module_of(thing: FunctionType | type | TypeVar) -> ModuleType | None:
    """Where it is defined; a function knows that too where it does not say so."""
    return sys.modules.get(thing.__module__ or getattr(thing, "__globals__", {}).get("__name__", ""))


def _fits_block(tensor: torch.Tensor) -> bool:
    """Whether its bytes say all: the others (sparse, quantised, without data, with attributes) are taken apart by pickle."""
    dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
    return dense and tensor.device.type != "meta" and not vars(tensor)


def _cached_property(function: Callable[[Any], Any], name: str) -> functools.cached_property[Any]:
    made = functools.cached_property(function)
    made.__set_name__(object, name)
    return made


def _with_attributes(tensor: torch.Tensor, attributes: dict[str, Any]) -> torch.Tensor:
    vars(tensor).update(attributes)
    return tensor


def _key(skeleton: bytes, tensors: dict[str, torch.Tensor]) -> str:
    """Read off the bytes; names, dtypes and shapes stand in the skeleton."""
    digest = hashlib.sha256(skeleton)
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()
