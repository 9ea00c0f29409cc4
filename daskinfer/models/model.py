"""The public ``Model``: a source, and the choice of the loader that takes it to the workers (``loaders``).

Whatever the source, a loaded model is one object that the model runner calls: an ``nn.Module`` gets tensors on its device,
everything else gets ndarrays.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from daskinfer.core.formatting import format_html_table
from daskinfer.errors import ModelError
from daskinfer.models import serialization
from daskinfer.models.files import STATE_DICT_LOADERS, ModelFile
from daskinfer.models.loaders import FactoryLoader, InMemoryLoader, ModelLoader, WeightsLoader, find_loader_class
from daskinfer.models.paths import FILE_LOADERS, check_is_file, check_reference, missing_factory_error


@dataclass(frozen=True)
class Model:
    """Describe where a model comes from, if it is not simply an object in memory.

    Parameters
    ----------
    source
        A module, a function of ndarrays, or an object with ``load(device)``, ``__call__(batch)`` and optionally
        ``close()``; a path to weights (``.safetensors``, or a state dict in ``.pt``/``.pth``), which needs ``factory``;
        with ``trust``, a path to a ``.pt2`` program of ``torch.export``, to TorchScript (``.pt``, ``.pth``, ``.ts``) or to a
        pickled module (``.pt``, ``.pth``); or ``"pkg.mod:make"``, a factory that returns the model.
    factory
        Makes the model that the weights in ``source`` are loaded into, a new one at each call: ``"pkg.mod:make"`` or
        the function itself. None: ``source`` is not a weights file.
    kwargs
        Keywords for the factory. None: no keywords.
    version
        Identifies the model in stored outputs instead of its content, for models whose content has no reproducible hash.
        None: the content is hashed.
    trust
        True: the file ``source`` may run code when it is loaded; needed for programs, TorchScript and pickled modules, no
        effect on weights. False: such a file is refused before any of its code runs.
    sha256
        The SHA-256 (64 hexadecimal digits) that the file ``source`` must have, wherever it is loaded. None: the one that
        it has when the call is planned; above 1 GiB only the size is compared.

    Raises
    ------
    ModelError
        On use, if the model cannot be found, imported or loaded, if its file is not trusted or has another SHA-256, or if
        ``factory``, ``kwargs`` or ``sha256`` do not apply to ``source``. Creating a Model reads and imports nothing.

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
        source, *keywords = self._format_arguments().items()
        return f"Model({', '.join([source[1], *(f'{name}={text}' for name, text in keywords)])})"

    def _repr_html_(self) -> str:
        return format_html_table(("Model", self.name), list(self._format_arguments().items()))

    def _format_arguments(self) -> dict[str, str]:
        """Format the arguments that would make this Model again."""
        arguments = {name: getattr(self, name) for name in ("source", "factory", "kwargs", "version", "sha256")}
        arguments["trust"] = self.trust or None
        return {name: repr(value) for name, value in arguments.items() if value is not None or name == "source"}

    @property
    def name(self) -> str:
        """A short name for tables and logs."""
        is_path = isinstance(self.source, str | os.PathLike)
        return Path(self.source).name if is_path else getattr(self.source, "__name__", type(self.source).__name__)

    def make_loader(self) -> ModelLoader:
        """Make what travels to the workers; refuse a file that can run code and is not trusted."""
        if not isinstance(self.trust, bool):
            raise ModelError(f"trust must be True or False, got {self.trust!r}")
        if isinstance(self.source, str | os.PathLike):
            return self._make_loader_from_reference(os.fspath(self.source))
        self._reject_arguments("factory", "kwargs", "sha256")
        if not callable(self.source) or isinstance(self.source, type | torch.export.ExportedProgram):
            raise self._make_type_error()
        return InMemoryLoader(serialization.serialize_object(self.source), version=self.version)

    def _make_type_error(self) -> ModelError:
        is_class = isinstance(self.source, type)
        methods = [name for name in ("predict_proba", "predict", "transform") if hasattr(self.source, name)]
        if methods and not is_class:  # an estimator of scikit-learn
            advice = f"model.{methods[0]}" + (f" or model.{methods[1]}" if len(methods) > 1 else "")
            return ModelError(f"model must be a function of arrays, got the object {self.name}. Pass its method {advice}.")
        if isinstance(self.source, Mapping) and any(isinstance(value, torch.Tensor) for value in self.source.values()):
            return ModelError(
                f"model must be a module, got its weights ({self.name}). Pass the module after module.load_state_dict(…)."
            )
        return ModelError(
            "model must be an nn.Module, a function of arrays, an object with load(device) and __call__(batch), a path "
            f"(.pt2 for an exported program) or 'pkg.mod:make', got {'class ' if is_class else ''}{self.name}"
        )

    def _make_loader_from_reference(self, source: str) -> ModelLoader:
        suffix = Path(source).suffix.lower()
        if self.factory is not None and suffix in STATE_DICT_LOADERS:
            file = self._find_file(source)
            return WeightsLoader(file, FactoryLoader.from_factory(self.factory, self.kwargs), version=self.version)
        if suffix in FILE_LOADERS:
            return self._make_file_loader(source)
        check_reference(source)
        self._reject_arguments("factory", "sha256")
        return FactoryLoader.from_factory(source, self.kwargs, version=self.version)

    def _make_file_loader(self, source: str) -> ModelLoader:
        self._reject_arguments("factory", "kwargs")
        file = self._find_file(source)
        loader_class = find_loader_class(file)
        if loader_class is None:
            raise missing_factory_error(source)
        if loader_class.can_run_code:
            file.check_trust(loader_class.format_name, trust=self.trust)
        return loader_class(file, version=self.version)

    def _find_file(self, source: str) -> ModelFile:
        check_is_file(source)
        return ModelFile.from_path(source, self.sha256)

    def _reject_arguments(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                flag = "--model-sha256" if name == "sha256" else f"--{name}"
                raise ModelError(
                    f"{name}= goes only with {_ARGUMENT_SOURCES[name]}, got the model {self.name}. Remove {name}= ({flag})"
                )


_ARGUMENT_SOURCES = {"factory": "a weights file", "kwargs": "a factory", "sha256": "a model file"}


def as_model(model: Any, *, trust: bool = False) -> Model:
    """Return ``model`` as a Model; ``trust=True`` makes it trusted, False leaves it as it is."""
    wrapped = model if isinstance(model, Model) else Model(model)
    return replace(wrapped, trust=True) if trust else wrapped
