"""Loaders: how a worker gets a model, one class per kind of source.

======================  =========================  ========================================================
source                  loader                     how it loads
======================  =========================  ========================================================
object in memory        ``InMemoryLoader``         unpickles bytes that travel with it
object sent to a host   ``BroadcastLoader``        unpickles a file, which the host's workers map
``"pkg.mod:make"``      ``FactoryLoader``          imports the factory and calls it
weights and a factory   ``WeightsLoader``          calls the factory, then ``load_state_dict(strict=True)``
``.pt2`` program        ``ExportedProgramLoader``  ``torch.export.load``
TorchScript             ``TorchScriptLoader``      ``torch.jit.load``
pickled module          ``PickledModuleLoader``    ``torch.load``
======================  =========================  ========================================================

Files and factories travel by reference: each worker reads the file itself (``files`` says what is checked) and imports the
factory itself.

To add a file format, write a subclass of ``FileLoader`` and name it under its suffix in ``paths.FILE_LOADERS``.
"""

from __future__ import annotations

import contextlib
import hashlib
import pkgutil
import reprlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch.export.passes import move_to_device_pass

from daskinfer.errors import ModelError
from daskinfer.models import fingerprint as fingerprints
from daskinfer.models import serialization
from daskinfer.models.files import ModelFile, check_folder_is_private
from daskinfer.models.loaded_model import LoadedModel
from daskinfer.models.paths import FILE_LOADERS
from daskinfer.models.shared_files import get_broadcast_path


class ModelLoader(Protocol):
    """How a worker gets a model: small, picklable, identified by ``key``."""

    @property
    def key(self) -> str:
        """Equal for the same model within one client process; the worker's cache goes by it."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the weights; 0 if that is unknown before loading."""
        ...

    def load(self, device: torch.device) -> LoadedModel:
        """Load a new model onto ``device``; it shares nothing with the caller's."""
        ...

    def compute_fingerprint(self) -> str:
        """Compute what a later process compares before it continues this process's output."""
        ...


@dataclass(frozen=True)
class BaseLoader(ABC):
    """Base of loaders: errors name the model, and ``version``, if given, replaces the content in the fingerprint."""

    version: str | None = field(default=None, kw_only=True)

    def load(self, device: torch.device) -> LoadedModel:
        with annotate_load_errors(self._description):
            return self._load_model(device)

    def compute_fingerprint(self) -> str:
        if self.version is not None:
            return compute_digest("version", str(self.version))
        with annotate_load_errors(self._description):
            return fingerprints.compute_fingerprint(self._read_fingerprint_source())

    @property
    @abstractmethod
    def _description(self) -> str:
        """The model's name in error messages."""

    @abstractmethod
    def _load_model(self, device: torch.device) -> LoadedModel:
        """Load a new model onto ``device``."""

    @abstractmethod
    def _read_fingerprint_source(self) -> Any:
        """Read what the fingerprint is computed from; outputs on disk store it, so it must never change."""


@dataclass(frozen=True)
class ObjectLoader(BaseLoader):
    """Base of loaders whose model is a Python object made on the CPU; the fingerprint is that object's."""

    @abstractmethod
    def make_model(self) -> Any:
        """Make the model on the CPU, a new object at each call."""

    def _load_model(self, device: torch.device) -> LoadedModel:
        return LoadedModel.from_model(self.make_model(), device)

    def _read_fingerprint_source(self) -> Any:
        return self.make_model()


@dataclass(frozen=True)
class InMemoryLoader(ObjectLoader):
    """Loader of a serialized model; it carries the bytes itself until they are broadcast as a file."""

    serialized: serialization.SerializedModel
    _description = "the model"

    @property
    def key(self) -> str:
        return self.serialized.key

    @property
    def nbytes(self) -> int:
        return self.serialized.nbytes

    def make_model(self) -> Any:
        return self.serialized.deserialize()


@dataclass(frozen=True)
class BroadcastLoader:
    """Loader of a serialized model whose file ``file_name`` is already on the worker's host."""

    key: str
    file_name: str
    nbytes: int

    def load(self, device: torch.device) -> LoadedModel:
        path = get_broadcast_path(self.file_name)
        with annotate_load_errors(f"the model broadcast to {path}"):
            check_folder_is_private(path)
            return LoadedModel.from_model(serialization.deserialize_file(path), device)

    def compute_fingerprint(self) -> str:
        raise NotImplementedError("compute the fingerprint on the client, before the model is broadcast")


@dataclass(frozen=True)
class FactoryLoader(ObjectLoader):
    """Loader that calls a factory, ``"pkg.mod:make"`` or a serialized function; messages show the call as ``call_repr``."""

    factory: str | serialization.SerializedModel
    kwargs: serialization.SerializedModel
    call_repr: str
    nbytes = 0

    @classmethod
    def from_factory(
        cls, factory: str | Callable[..., Any], kwargs: Mapping[str, Any] | None = None, *, version: str | None = None
    ) -> FactoryLoader:
        """Serialize what cannot travel by name, so that no call sees changes made by the caller or by another call.

        Raises
        ------
        ModelError
            If the factory cannot be imported, or if it or ``kwargs`` cannot be pickled.
        """
        kwargs = dict(kwargs or {})
        name = factory if isinstance(factory, str) else getattr(factory, "__qualname__", type(factory).__name__)
        arguments = ", ".join(f"{key}={reprlib.repr(value)}" for key, value in kwargs.items())
        if isinstance(factory, str):
            _import_factory(factory)  # so that a plan already reports a wrong name
        reference = factory if isinstance(factory, str) else serialization.serialize_object(factory, "the factory")
        return cls(
            reference,
            serialization.serialize_object(kwargs, "the factory's kwargs"),
            f"{name}({arguments})",
            version=version,
        )

    @property
    def key(self) -> str:
        factory_key = self.factory if isinstance(self.factory, str) else self.factory.key
        return compute_digest("factory", factory_key, self.kwargs.key)

    @property
    def _description(self) -> str:
        return f"the model of factory {self.call_repr}"

    def make_model(self) -> Any:
        factory = _import_factory(self.factory) if isinstance(self.factory, str) else self.factory.deserialize()
        model = factory(**self.kwargs.deserialize())
        if not callable(model):
            raise ModelError(
                f"factory {self.call_repr} must return an nn.Module, a function of arrays or an object with load(device) "
                f"and __call__(batch), got {type(model).__name__}"
            )
        return model


@dataclass(frozen=True)
class WeightsLoader(ObjectLoader):
    """Loader of a state dict in a file, into the module that a factory makes."""

    file: ModelFile
    factory: FactoryLoader

    @property
    def key(self) -> str:
        return compute_digest("weights", self.file.identity, self.factory.key)

    @property
    def nbytes(self) -> int:
        return self.file.nbytes

    @property
    def _description(self) -> str:
        return f"the model of factory {self.factory.call_repr} with the weights in {self.file.path}"

    def make_model(self) -> torch.nn.Module:
        model = self.factory.make_model()
        if not isinstance(model, torch.nn.Module):
            raise ModelError(
                f"factory {self.factory.call_repr} must return an nn.Module to load weights into, "
                f"got {type(model).__name__}. Change the factory, or drop the weights file"
            )
        model.load_state_dict(_add_tied_weights(self.file.load_weights(), model), strict=True)
        return model


@dataclass(frozen=True)
class FileLoader(BaseLoader):
    """Base of loaders of a file that holds a whole model; messages call its format ``format_name``."""

    file: ModelFile
    format_name: ClassVar[str]
    can_run_code: ClassVar[bool] = True  # if so, ``Model`` makes a loader only for a file that its user trusts

    @classmethod
    def accepts(cls, file: ModelFile) -> bool:
        """Check whether a file with one of this format's suffixes is of this format; runs nothing in it."""
        return True

    @property
    def key(self) -> str:
        return compute_digest(type(self).__name__, self.file.identity)

    @property
    def nbytes(self) -> int:
        return self.file.nbytes

    @property
    def _description(self) -> str:
        return f"the model in {self.file.path}"


class ExportedProgramLoader(FileLoader):
    """Loader of a program saved by ``torch.export``."""

    format_name = "a torch.export program"

    def _load_model(self, device: torch.device) -> LoadedModel:
        # An exported module has no eval(): its mode was fixed when it was exported.
        module = move_to_device_pass(self._load_program(), device).module().requires_grad_(False)
        return LoadedModel(module, device, takes_tensors=True)

    def _read_fingerprint_source(self) -> list[Any]:
        """Read the parts that stay equal: the file's bytes differ from save to save."""
        program = self._load_program()
        return [program.graph_module.code, str(program.graph_signature), program.state_dict, program.constants]

    def _load_program(self) -> torch.export.ExportedProgram:
        with self.file.open_verified() as path, open(path, "rb") as file:
            return torch.export.load(file)


class TorchScriptLoader(FileLoader):
    """Loader of a TorchScript program; its fingerprint is that of the file's bytes."""

    format_name = "a TorchScript program"

    @classmethod
    def accepts(cls, file: ModelFile) -> bool:
        return file.is_torchscript()

    def _load_model(self, device: torch.device) -> LoadedModel:
        # It has no requires_grad_(), and needs none: models run in inference mode.
        with self.file.open_verified() as path, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it concerned the user when the file was made
            load: Callable[..., Any] = torch.jit.load
            return LoadedModel(load(path, map_location=device).eval(), device, takes_tensors=True)

    def _read_fingerprint_source(self) -> str:
        return self.file.content_sha256


class PickledModuleLoader(FileLoader, ObjectLoader):
    """Loader of a module that was pickled whole."""

    format_name = "a pickled object"

    @classmethod
    def accepts(cls, file: ModelFile) -> bool:
        return not file.is_state_dict()

    def make_model(self) -> torch.nn.Module:
        with self.file.open_verified() as path:
            model = torch.load(path, map_location="cpu", weights_only=False)
        if not isinstance(model, torch.nn.Module):
            raise ModelError(
                f"model file {self.file.path!r} must hold an nn.Module, got {type(model).__name__}. "
                "Save the module itself, or save its state dict and pass factory= (--factory)"
            )
        return model


def find_loader_class(file: ModelFile) -> type[FileLoader] | None:
    """Find the loader of a model file by its suffix and content; None if the file holds only weights."""
    names = FILE_LOADERS[Path(file.path).suffix.lower()]
    candidates: Iterator[type[FileLoader]] = (pkgutil.resolve_name(name) for name in names)
    return next((loader_class for loader_class in candidates if loader_class.accepts(file)), None)


@contextlib.contextmanager
def annotate_load_errors(description: str) -> Iterator[None]:
    """Turn any error raised inside into a ``ModelError`` that names what was being loaded."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"cannot load {description}: {type(error).__name__}: {error}. "
            "It must load on every worker; fix the file, or the code that makes the model"
        ) from error


def compute_digest(*words: str) -> str:
    """Compute one SHA-256 of several words."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def _add_tied_weights(weights: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Add the second names of tied weights: safetensors stores only one of them."""
    parameters = model.state_dict(keep_vars=True)
    stored = {id(parameters[name]): tensor for name, tensor in weights.items() if name in parameters}
    return {**{name: stored[id(tensor)] for name, tensor in parameters.items() if id(tensor) in stored}, **weights}


def _import_factory(reference: str) -> Any:
    try:
        return pkgutil.resolve_name(reference)
    except Exception as error:  # importing runs the module, which may raise anything
        raise ModelError(
            f"cannot import factory {reference!r} ({type(error).__name__}: {error}); it must be 'package.module:name', "
            "importable on every worker. Correct the name, or add its folder to PYTHONPATH"
        ) from error
