"""Where a network comes from, and how it gets onto a device.

::

    what the user has                 what travels            loaded by
    module, function, object          Packed (packed.py)      unpickling, tensors mapped from one block per host
    weights file + factory            WeightsFile             factory(**kwargs), then load_state_dict(strict)
    program file (.pt2)               ProgramFile             torch.export.load; only with trust
    TorchScript (.pt, .pth, .ts)      ScriptFile              torch.jit.load; only with trust
    pickled module (.pt, .pth)        PickledFile             torch.load; only with trust
    "pkg.mod:make"                    FactoryCall             importing and calling it

Files and factories travel by reference: every worker reads the file (``model_file`` says what of it is checked) and imports
the factory by itself. Whatever the source, a loaded model is one object that the runner calls; modules get tensors on their
device, all else gets ndarrays.
"""

from __future__ import annotations

import os
import pkgutil
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from daskinfer.core.formatting import format_html_table
from daskinfer.errors import ModelError
from daskinfer.models import serialization
from daskinfer.models.files import STATE_DICT_LOADERS, ModelFile, check_folder_is_private
from daskinfer.models.loaders import LOADERS_BY_FORMAT, BaseLoader, annotate_load_errors, compute_digest
from daskinfer.models.paths import CODE_SUFFIXES, check_is_file, check_reference, missing_factory_error
from daskinfer.models.shared_files import get_broadcast_path
from daskinfer.worker.loaded import LoadedModel


class ModelLoader(Protocol):
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

    def compute_fingerprint(self) -> str:
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
        with ``trust``, a path to a ``.pt2`` program of ``torch.export``, to TorchScript (``.pt``, ``.pth``, ``.ts``) or to a
        pickled module (``.pt``, ``.pth``); or ``"pkg.mod:make"``, a factory that is called for it.
    factory
        Makes the network that the weights of ``source`` are loaded into, a new one at each call: ``"pkg.mod:make"`` or
        the function itself. None: ``source`` is no weights file.
    kwargs
        Keywords for the factory. None: none.
    version
        Says which network this is, for those whose content cannot be read stably. None: the content is read.
    trust
        True: the file of ``source`` may run code when it is loaded; needed for programs, TorchScript and pickled modules,
        of no effect on weights. False: such a file is refused before any of it runs.
    sha256
        The SHA-256 (64 hexadecimal digits) that the file of ``source`` has to have, wherever it is loaded. None: that which
        it has when the call is planned; of files above 1 GiB only the size.

    Raises
    ------
    ModelError
        When it is used, if it cannot be found, imported or loaded, is not trusted or not the file that it has to be, or if
        ``factory``, ``kwargs`` or ``sha256`` are given to a source that has no use for them. Making a Model touches nothing.

    Examples
    --------
    >>> Model("net.safetensors", factory="my_pkg.nets:resnet", kwargs={"depth": 18})
    Model('net.safetensors', factory='my_pkg.nets:resnet', kwargs={'depth': 18})
    """

    source: Any
    factory: str | Callable[..., Any] | None = field(default=None, kw_only=True)
    kwargs: Mapping[str, Any] | None = field(default=None, kw_only=True)
    version: str | None = field(default=None, kw_only=True)
    trust: bool = field(default=False, kw_only=True)
    sha256: str | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        source, *others = self._format_arguments().items()
        return f"Model({', '.join([source[1], *(f'{name}={said}' for name, said in others)])})"

    def _repr_html_(self) -> str:
        return format_html_table(("Model", self.name), list(self._format_arguments().items()))

    def _format_arguments(self) -> dict[str, str]:
        """What it was made with, in the words that would make it again."""
        given = {name: getattr(self, name) for name in ("source", "factory", "kwargs", "version", "sha256")}
        given["trust"] = self.trust or None
        return {name: repr(value) for name, value in given.items() if value is not None or name == "source"}

    @property
    def name(self) -> str:
        """A short name for tables and logs."""
        is_path = isinstance(self.source, str | os.PathLike)
        return Path(self.source).name if is_path else getattr(self.source, "__name__", type(self.source).__name__)

    def make_loader(self) -> ModelLoader:
        """What travels to the workers; nothing that could run code is made of a file that is not trusted."""
        if not isinstance(self.trust, bool):
            raise ModelError(f"trust is {self.trust!r}; it may be True or False. Pass one of these.")
        if isinstance(self.source, str | os.PathLike):
            return self._make_loader_from_reference(os.fspath(self.source))
        self._reject_arguments("factory", "kwargs", "sha256")
        if not callable(self.source) or isinstance(self.source, type | torch.export.ExportedProgram):
            what = f"class {self.name}" if isinstance(self.source, type) else self.name
            raise ModelError(
                f"the model is a {what}, which cannot be called on arrays; allowed are an nn.Module, a function, an "
                "object with load(device) and __call__(batch), a path (a program's is .pt2), and 'pkg.mod:make'. Pass one."
            )
        return InMemoryLoader(serialization.serialize_object(self.source), version=self.version)

    def _make_loader_from_reference(self, source: str) -> ModelLoader:
        suffix = Path(source).suffix.lower()
        if self.factory is not None and suffix in STATE_DICT_LOADERS:
            file = self._find_file(source)
            return WeightsLoader(file, FactoryLoader.from_factory(self, self.factory), version=self.version)
        if suffix in CODE_SUFFIXES:
            return self._make_code_file_loader(source)
        check_reference(source)
        self._reject_arguments("factory", "sha256")
        return FactoryLoader.from_factory(self, source)

    def _make_code_file_loader(self, source: str) -> ModelLoader:
        self._reject_arguments("factory", "kwargs")
        file = self._find_file(source)
        form = file.detect_format()
        if form not in LOADERS_BY_FORMAT:
            raise missing_factory_error(source)
        file.check_trust(form, trust=self.trust)
        return LOADERS_BY_FORMAT[form](file, version=self.version)

    def _find_file(self, source: str) -> ModelFile:
        check_is_file(source)
        return ModelFile.from_path(source, self.sha256)

    def _reject_arguments(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                flag = "--model-sha256" if name == "sha256" else f"--{name}"
                allowed = "factory= goes with a file of weights, kwargs= with a factory, sha256= with a file"
                raise ModelError(f"the model {self.name} was given {name}=; {allowed}. Leave {name}= ({flag}) out.")


@dataclass(frozen=True)
class InMemoryLoader(BaseLoader):
    """A network in memory, packed; it carries its own bytes until it is shipped as a file."""

    serialized: serialization.SerializedModel
    _description = "the model"

    @property
    def key(self) -> str:
        return self.serialized.key

    @property
    def nbytes(self) -> int:
        return self.serialized.nbytes

    def _load_content(self) -> Any:
        return self.serialized.deserialize()


@dataclass(frozen=True)
class BroadcastLoader:
    """A packed network whose file ``file_name`` lies on the worker's host."""

    key: str
    file_name: str
    nbytes: int

    def load(self, device: torch.device) -> LoadedModel:
        path = get_broadcast_path(self.file_name)
        with annotate_load_errors(f"the model shipped to {path}"):
            check_folder_is_private(path)
            return LoadedModel.from_model(serialization.deserialize_file(path), device)

    def compute_fingerprint(self) -> str:
        raise NotImplementedError("the client reads the fingerprint before it ships a model")


@dataclass(frozen=True)
class FactoryLoader(BaseLoader):
    """A factory as ``"pkg.mod:make"``, or packed, and its packed keywords; ``call_repr`` is how messages show it."""

    factory: str | serialization.SerializedModel
    kwargs: serialization.SerializedModel
    call_repr: str
    nbytes = 0

    @classmethod
    def from_factory(cls, model: Model, factory: str | Callable[..., Any]) -> FactoryLoader:
        """Pack what cannot travel by name, so that no call sees what the caller or another call did to it."""
        kwargs = dict(model.kwargs or {})
        name = factory if isinstance(factory, str) else getattr(factory, "__qualname__", type(factory).__name__)
        given = ", ".join(f"{key}={reprlib.repr(value)}" for key, value in kwargs.items())
        if isinstance(factory, str):
            _import_factory(factory)  # so that a plan can say at once that it cannot be
        by_name = factory if isinstance(factory, str) else serialization.serialize_object(factory, "the factory")
        return cls(
            by_name,
            serialization.serialize_object(kwargs, "the factory's kwargs"),
            f"{name}({given})",
            version=model.version,
        )

    @property
    def key(self) -> str:
        made_by = self.factory if isinstance(self.factory, str) else self.factory.key
        return compute_digest("factory", made_by, self.kwargs.key)

    @property
    def _description(self) -> str:
        return f"the network of the factory {self.call_repr}"

    def _load_content(self) -> Any:
        factory = _import_factory(self.factory) if isinstance(self.factory, str) else self.factory.deserialize()
        made = factory(**self.kwargs.deserialize())
        if not callable(made):
            raise ModelError(
                f"the factory {self.call_repr} returned a {type(made).__name__}; it has to return an nn.Module, a "
                "function of arrays or an object with load(device) and __call__(batch). Change what it returns."
            )
        return made


@dataclass(frozen=True)
class WeightsLoader(BaseLoader):
    """A state dict in a file, and the factory of the network that takes it."""

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
        return f"the network of the factory {self.factory.call_repr} with the weights in {self.file.path}"

    def _load_content(self) -> torch.nn.Module:
        network = self.factory._load_content()
        if not isinstance(network, torch.nn.Module):
            raise ModelError(
                f"the factory {self.factory.call_repr} returned a {type(network).__name__}; weights can only be loaded "
                "into an nn.Module. Change what it returns, or drop the weights file."
            )
        network.load_state_dict(_add_tied_weights(self.file.load_weights(), network), strict=True)
        return network


def as_model(model: Any, *, trust: bool = False) -> Model:
    """``model`` itself where it is a Model, else one made of it; trusted where it is, or ``trust`` says so."""
    made = model if isinstance(model, Model) else Model(model)
    return replace(made, trust=True) if trust else made


def _add_tied_weights(weights: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Add the second names of tied weights: safetensors stores one of them only."""
    own = model.state_dict(keep_vars=True)
    known = {id(own[name]): tensor for name, tensor in weights.items() if name in own}
    return {**{name: known[id(tensor)] for name, tensor in own.items() if id(tensor) in known}, **weights}


def _import_factory(reference: str) -> Any:
    try:
        return pkgutil.resolve_name(reference)
    except Exception as error:  # importing runs the module, which may raise anything
        raise ModelError(
            f"the factory {reference!r} cannot be imported ({type(error).__name__}: {error}); it has to be "
            "'package.module:name' of what every worker can import. Correct the name, or put its folder on PYTHONPATH."
        ) from error
