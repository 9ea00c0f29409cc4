"""A network in memory as bytes: its tensors in one safetensors block, everything else pickled beside them.

Tensors are taken out of the pickle one by one and copied, so that a later change of the network does not reach what was
packed: a host maps the block once for all its workers, and the key is read off the content. The form never leaves a run:
it is no file format for keeping models.

The key holds for one client process (the class object and the tensors' content, decision 7): a class that is defined
again is another network, the same network packed twice is the same key. What must hold between processes is in
``fingerprint``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import cloudpickle
import safetensors.torch
import torch

from daskinfer.errors import ModelError

_SKELETON = "skeleton"  # the tensor that holds the pickle
# What safetensors can hold; other tensors stay in the pickle, at the price of a copy.
_BLOCK_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8}
    | {torch.uint8, torch.bool}
)


@dataclass(frozen=True)
class Packed:
    """A network as a skeleton (pickle) and its tensors; ``key`` is read off both."""

    key: str
    skeleton: bytes
    tensors: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors and the skeleton."""
        return len(self.skeleton) + sum(t.nbytes for t in self.tensors.values())

    def to_bytes(self) -> bytes:
        """One block of bytes, which :func:`from_file` reads back."""
        skeleton = torch.frombuffer(bytearray(self.skeleton), dtype=torch.uint8)
        return safetensors.torch.save({**self.tensors, _SKELETON: skeleton}, metadata={"key": self.key})

    def __reduce__(self) -> tuple[Any, ...]:
        return _unblock, (self.to_bytes(),)

    def unpack(self) -> Any:
        """A network of its own, whose tensors share nothing with the one that was packed."""
        return _Unpickler(self.skeleton, {name: t.clone() for name, t in self.tensors.items()}).load()


def pack(network: Any) -> Packed:
    """Take ``network`` (a module, a function, any object) apart; it stays as it is.

    Classes and functions of files that are not installed (a notebook, a script, a file beside it) travel by value.

    Raises
    ------
    ModelError
        Where something in it cannot be pickled.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    try:
        with _own_modules_by_value():
            pickler.dump(network)
    except Exception as error:
        raise ModelError(
            f"the model ({type(network).__name__}) cannot be sent to workers: {error}. It has to be picklable. "
            "Keep handles, locks and lambdas out of its attributes, export it by torch.export to a .pt2 file, "
            "or pass a factory as 'pkg.mod:make'."
        ) from error
    skeleton = buffer.getvalue()
    return Packed(_key(skeleton, pickler.tensors), skeleton, pickler.tensors)


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
        with _own_modules_by_value():
            return _unpickle_function, (cloudpickle.dumps(self._function),)


def _unpickle_function(pickled: bytes) -> ByValue:
    return ByValue(cloudpickle.loads(pickled))


def _unblock(block: bytes) -> Packed:
    tensors = safetensors.torch.load(block)
    skeleton = tensors.pop(_SKELETON).numpy().tobytes()
    return Packed(_key(skeleton, tensors), skeleton, tensors)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle ships no annotations
    """Puts tensors aside under a number; the same tensor twice (tied weights) keeps one number."""

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=5)
        self.tensors: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}
        self._kept: list[torch.Tensor] = []  # an id is a tensor's own only while the tensor lives

    def persistent_id(self, thing: Any) -> tuple[str, bool, bool] | None:
        if type(thing) not in (torch.Tensor, torch.nn.Parameter) or not _fits_block(thing):
            return None
        if id(thing) not in self._names:
            self._kept.append(thing)
            self._names[id(thing)] = str(len(self._names))
            # A copy: safetensors refuses tensors that share memory, and a later change must not reach a packed network.
            self.tensors[self._names[id(thing)]] = thing.detach().to("cpu", copy=True).contiguous()
        return self._names[id(thing)], isinstance(thing, torch.nn.Parameter), thing.requires_grad


class _Unpickler(pickle.Unpickler):
    """Puts the tensors back; each number is made once, so tied weights stay tied."""

    def __init__(self, skeleton: bytes, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(io.BytesIO(skeleton))
        self._tensors = tensors
        self._made: dict[str, torch.Tensor] = {}

    def persistent_load(self, pid: tuple[str, bool, bool]) -> torch.Tensor:
        name, is_parameter, requires_grad = pid
        if name not in self._made:
            tensor = self._tensors[name]
            self._made[name] = (
                torch.nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)
            )
        return self._made[name]


def _fits_block(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.dtype in _BLOCK_DTYPES and tensor.device.type != "meta"


def _key(skeleton: bytes, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(skeleton)
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _own_modules_by_value() -> Iterator[None]:
    """While packing, pickle the classes of modules that a worker may not be able to import by value."""
    modules = [m for m in list(sys.modules.values()) if is_own(m)]
    fresh = [m for m in modules if m.__name__ not in cloudpickle.list_registry_pickle_by_value()]
    for module in fresh:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in fresh:
            cloudpickle.unregister_pickle_by_value(module)


def is_own(module: object) -> bool:
    """Whether a module is a user's file: not installed, not the standard library, not this package."""
    if not isinstance(module, ModuleType) or module.__name__.partition(".")[0] in (
        "__main__",
        "__mp_main__",
        "daskinfer",
    ):
        return False
    path = getattr(module, "__file__", None)
    if not path or sys.modules.get(module.__name__) is not module:
        return False
    return not path.startswith(_INSTALLED) and not os.path.realpath(path).startswith(_INSTALLED)


def _installed_roots() -> tuple[str, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    roots = {sysconfig.get_path(name) for name in names} | {sys.prefix, sys.base_prefix, sys.exec_prefix}
    return tuple(os.path.join(os.path.realpath(root), "") for root in roots)


_INSTALLED = _installed_roots()
