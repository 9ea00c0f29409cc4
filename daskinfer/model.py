"""Where a network comes from, and how it gets onto a device.

::

    what the user has                 what travels            loaded by
    module, function, object          Packed (packed.py)      unpickling, tensors mapped from one block per host
    weights file + factory            WeightsFile             factory(**kwargs), then load_state_dict(strict)
    program file (.pt2)               ProgramFile             torch.export.load
    "pkg.mod:make"                    FactoryCall             importing and calling it

Files and factories travel by reference: every worker reads the file and imports the factory by itself. Whatever the
source, a loaded model is one object that the runner calls; modules get tensors on their device, all else gets ndarrays.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from daskinfer import fingerprint as fingerprints
from daskinfer import packed
from daskinfer.errors import ModelError

SCRATCH_VARIABLE = "DASKINFER_SCRATCH"  # a worker's environment names the folder of our own cluster here


@dataclass
class LoadedModel:
    """A network on a device, ready to be called.

    Note: ``lock`` is held while a chunk runs, since networks and users' objects need not be safe for threads.
    """

    run: Callable[..., Any]
    device: torch.device
    takes_tensors: bool
    on_close: Callable[[], None] | None = None
    max_batch_size: int | None = None  # remembered by the out-of-memory ladder, in rows
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, network: Any, device: torch.device) -> LoadedModel:
        """Put a network that nobody else uses onto ``device``."""
        if isinstance(network, torch.nn.Module):
            return cls(network.eval().requires_grad_(False).to(device), device, takes_tensors=True)
        if hasattr(network, "load"):
            network.load(str(device))
        return cls(network, device, takes_tensors=False, on_close=getattr(network, "close", None))

    def close(self) -> None:
        """Tell the model that it is needed no more."""
        if self.on_close is not None:
            self.on_close()


class Recipe(Protocol):
    """How a worker gets a model: small, picklable, hashable by ``key``."""

    @property
    def key(self) -> str:
        """Equal for the same model within one client process; the worker's cache goes by it."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the weights take, 0 where that is not known without loading."""
        ...

    def load(self, device: torch.device) -> LoadedModel:
        """Load the model onto ``device``, sharing nothing with the caller's."""
        ...

    def fingerprint(self) -> str:
        """What a later process compares before it continues this one's work."""
        ...


@dataclass(frozen=True)
class Model:
    """Where a network comes from, for those that are not an object in memory.

    Parameters
    ----------
    source
        A module, a function of ndarrays, an object with ``load(device)``, ``__call__(batch)`` and optionally
        ``close()``; a path to weights (``.safetensors``, or a state dict in ``.pt``/``.pth``), which needs ``factory``;
        a path to a ``.pt2`` program of ``torch.export``; or ``"pkg.mod:make"``, a factory that is called for it.
    factory
        Makes the network that the weights of ``source`` are loaded into: ``"pkg.mod:make"`` or the function itself.
    kwargs
        Keywords for the factory. None: none.
    version
        Says which network this is, in place of reading its content; for those whose content cannot be read stably.
        None: the content is read.

    Raises
    ------
    ModelError
        When it is used, if it cannot be found, imported or loaded. Making a Model touches nothing.

    Examples
    --------
    >>> Model("net.safetensors", factory="my_pkg.nets:resnet", kwargs={"depth": 18})
    Model('net.safetensors', factory='my_pkg.nets:resnet', kwargs={'depth': 18})
    """

    source: Any
    factory: str | Callable[..., Any] | None = field(default=None, kw_only=True)
    kwargs: Mapping[str, Any] | None = field(default=None, kw_only=True)
    version: str | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        given = {name: getattr(self, name) for name in ("factory", "kwargs", "version")}
        parts = [repr(self.source), *(f"{name}={value!r}" for name, value in given.items() if value is not None)]
        return f"Model({', '.join(parts)})"

    @property
    def name(self) -> str:
        """A short name for tables and logs."""
        if isinstance(self.source, str | os.PathLike):
            return Path(self.source).name
        return getattr(self.source, "__name__", type(self.source).__name__)

    def recipe(self) -> Recipe:
        """What travels to the workers."""
        if isinstance(self.source, str | os.PathLike):
            return self._from_reference(os.fspath(self.source))
        if not callable(self.source):
            raise ModelError(
                f"the model is a {type(self.source).__name__}, which cannot be called; allowed are an nn.Module, a "
                "function of arrays, an object with load(device) and __call__(batch), a path, and 'pkg.mod:make'. "
                "Pass one of these."
            )
        return PackedModel(packed.pack(self.source), self.version)

    def _from_reference(self, source: str) -> Recipe:
        suffix = Path(source).suffix.lower()
        kwargs = dict(self.kwargs or {})
        if suffix in _WEIGHTS_READERS:
            if self.factory is None:
                raise ModelError(
                    f"{source} holds weights only; a factory has to make the network that takes them. "
                    "Pass Model(…, factory='pkg.mod:make'), or --factory pkg.mod:make."
                )
            factory = self.factory if isinstance(self.factory, str) else packed.pack(self.factory)
            return WeightsFile(_existing(source), FactoryCall(factory, kwargs), self.version)
        if suffix == ".pt2":
            return ProgramFile(_existing(source), self.version)
        if ":" in source:
            return FactoryCall(source, kwargs, self.version)
        raise ModelError(
            f"the model {source!r} is neither a file ending in {', '.join([*_WEIGHTS_READERS, '.pt2'])} nor a factory as "
            "'pkg.mod:make'. Pass one of these."
        )


@dataclass(frozen=True)
class PackedModel:
    """A network in memory, packed; it carries its own bytes until it is shipped as a file."""

    packed: packed.Packed
    version: str | None = None

    @property
    def key(self) -> str:
        return self.packed.key

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def load(self, device: torch.device) -> LoadedModel:
        return LoadedModel.of(self.packed.unpack(), device)

    def fingerprint(self) -> str:
        return _versioned(self.version) or fingerprints.fingerprint(self.packed.unpack())


@dataclass(frozen=True)
class ShippedModel:
    """A packed network whose file ``name`` lies on the worker's host."""

    key: str
    name: str
    nbytes: int

    def load(self, device: torch.device) -> LoadedModel:
        path = shipped_path(self.name)
        with _said_of(f"the model shipped to {path}"):
            return LoadedModel.of(packed.from_file(path), device)

    def fingerprint(self) -> str:
        raise NotImplementedError("the client reads the fingerprint before it ships a model")


@dataclass(frozen=True)
class FactoryCall:
    """A factory as ``"pkg.mod:make"``, or packed, and its keywords."""

    factory: str | packed.Packed
    kwargs: dict[str, Any]
    version: str | None = None

    @property
    def key(self) -> str:
        made_by = self.factory if isinstance(self.factory, str) else self.factory.key
        return _digest("factory", made_by, repr(sorted(self.kwargs.items())))

    @property
    def nbytes(self) -> int:
        return 0

    def make(self) -> Any:
        """Import the factory and call it."""
        factory = _import(self.factory) if isinstance(self.factory, str) else self.factory.unpack()
        with _said_of(f"what {self._name} makes of {self.kwargs}"):
            return factory(**self.kwargs)

    @property
    def _name(self) -> str:
        return f"the factory {self.factory!r}" if isinstance(self.factory, str) else "the factory"

    def load(self, device: torch.device) -> LoadedModel:
        made = self.make()
        if not callable(made):
            raise ModelError(
                f"{self._name} returned a {type(made).__name__}; it has to return an nn.Module, a "
                "function of arrays or an object with load(device) and __call__(batch). Change what it returns."
            )
        return LoadedModel.of(made, device)

    def fingerprint(self) -> str:
        return _versioned(self.version) or fingerprints.fingerprint(self.make())


@dataclass(frozen=True)
class WeightsFile:
    """A state dict in a file, and the factory of the network that takes it."""

    path: str
    factory: FactoryCall
    version: str | None = None

    @property
    def key(self) -> str:
        return _digest("weights", _file_state(self.path), self.factory.key)

    @property
    def nbytes(self) -> int:
        return os.stat(self.path).st_size

    def load(self, device: torch.device) -> LoadedModel:
        network = self.factory.make()
        if not isinstance(network, torch.nn.Module):
            raise ModelError(
                f"{self.factory._name} returned a {type(network).__name__}; weights can only be loaded "
                "into an nn.Module. Change what it returns, or drop the weights file."
            )
        with _said_of(f"the weights in {self.path}"):
            network.load_state_dict(_WEIGHTS_READERS[Path(self.path).suffix.lower()](self.path), strict=True)
        return LoadedModel.of(network, device)

    def fingerprint(self) -> str:
        return _versioned(self.version) or _digest("weights", _file_digest(self.path), self.factory.fingerprint())


@dataclass(frozen=True)
class ProgramFile:
    """A program of ``torch.export`` in a ``.pt2`` file."""

    path: str
    version: str | None = None

    @property
    def key(self) -> str:
        return _digest("program", _file_state(self.path))

    @property
    def nbytes(self) -> int:
        return os.stat(self.path).st_size

    def load(self, device: torch.device) -> LoadedModel:
        from torch.export.passes import move_to_device_pass

        with _said_of(f"the program in {self.path}"):
            program = move_to_device_pass(torch.export.load(self.path), device)
            # An exported module has no eval(): what it does was fixed when it was exported.
            return LoadedModel(program.module(), device, takes_tensors=True)

    def fingerprint(self) -> str:
        return _versioned(self.version) or _digest("program", _file_digest(self.path))


def shipped_path(name: str) -> str:
    """Where a shipped file lies on this host: with our own cluster, which removes it at the latest, else per user."""
    folder = os.environ.get(SCRATCH_VARIABLE) or os.path.join(tempfile.gettempdir(), f"daskinfer-{os.getuid()}")
    return os.path.join(folder, name)


def as_model(model: Any) -> Model:
    """``model`` itself where it is a Model, else one made of it."""
    return model if isinstance(model, Model) else Model(model)


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_state_dict(path: str) -> dict[str, torch.Tensor]:
    return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


_WEIGHTS_READERS: dict[str, Callable[[str], dict[str, torch.Tensor]]] = {
    ".safetensors": _read_safetensors,
    ".pt": _read_state_dict,
    ".pth": _read_state_dict,
}


def _import(reference: str) -> Callable[..., Any]:
    module, _, name = reference.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(
            f"the factory {reference!r} cannot be imported ({error}); it has to be 'package.module:name' of something "
            "that every worker can import. Correct the name, or put its folder on PYTHONPATH."
        ) from error
    if not callable(found):
        raise ModelError(
            f"the factory {reference!r} is a {type(found).__name__}; it has to be a function or a class. "
            "Name one that makes the network."
        )
    return cast("Callable[..., Any]", found)


def _existing(path: str) -> str:
    if not os.path.isfile(path):
        raise ModelError(f"the model file {path!r} does not exist; a readable file is needed. Correct the path.")
    return os.path.abspath(path)


@contextlib.contextmanager
def _said_of(thing: str) -> Iterator[None]:
    """Add the name of what was being loaded to whatever goes wrong meanwhile."""
    try:
        yield
    except Exception as error:
        raise ModelError(
            f"{thing} cannot be loaded: {type(error).__name__}: {error}. It has to load on every worker. "
            "Check that file and factory belong together."
        ) from error


def _versioned(version: str | None) -> str | None:
    return None if version is None else _digest("version", version)


def _digest(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def _file_state(path: str) -> str:
    state = os.stat(path)
    return f"{path} {state.st_size} {state.st_mtime_ns}"


def _file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
