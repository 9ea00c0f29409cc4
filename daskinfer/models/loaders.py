"""What recipes have in common, and the recipes of files that hold a network with its code.

Such files are loaded only where they are trusted: ``Model`` makes no recipe of another.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from daskinfer.errors import ModelError
from daskinfer.models import fingerprint as fingerprints
from daskinfer.models.files import EXPORTED_PROGRAM, PICKLE, TORCHSCRIPT, ModelFile
from daskinfer.worker.loaded import LoadedModel


@dataclass(frozen=True)
class BaseLoader(ABC):
    """Loads, or reads for the fingerprint, what ``_load_content`` gives, new at each call; ``_description`` names it in messages."""

    version: str | None = field(default=None, kw_only=True)

    def load(self, device: torch.device) -> LoadedModel:
        with annotate_load_errors(self._description):
            return LoadedModel.from_model(self._load_content(), device)

    def compute_fingerprint(self) -> str:
        if self.version is not None:
            return compute_digest("version", str(self.version))
        with annotate_load_errors(self._description):
            return fingerprints.compute_fingerprint(self._load_content())

    @abstractmethod
    def _load_content(self) -> Any: ...

    @property
    @abstractmethod
    def _description(self) -> str: ...


@dataclass(frozen=True)
class CodeFileLoader(BaseLoader):
    """A file that holds the network with its code, and is trusted: ``Model`` makes none of another."""

    file: ModelFile

    @property
    def key(self) -> str:
        return compute_digest(type(self).__name__, self.file.identity)

    @property
    def nbytes(self) -> int:
        return self.file.nbytes

    @property
    def _description(self) -> str:
        return f"the network in {self.file.path}"


class ExportedProgramLoader(CodeFileLoader):
    """A program of ``torch.export``."""

    def load(self, device: torch.device) -> LoadedModel:
        with annotate_load_errors(self._description):
            # An exported module has no eval(): what it does was fixed when it was exported.
            network = move_to_device_pass(self._load_program(), device).module().requires_grad_(False)
            return LoadedModel(network, device, takes_tensors=True)

    def _load_content(self) -> list[Any]:
        """What the fingerprint reads: the file's bytes differ from save to save."""
        program = self._load_program()
        return [program.graph_module.code, str(program.graph_signature), program.state_dict, program.constants]

    def _load_program(self) -> torch.export.ExportedProgram:
        with self.file.open_verified() as path, open(path, "rb") as file:
            return torch.export.load(file)


class TorchScriptLoader(CodeFileLoader):
    """A TorchScript program; its fingerprint is the file's."""

    def load(self, device: torch.device) -> LoadedModel:
        # It has no requires_grad_(), and needs none: networks run in inference mode.
        with annotate_load_errors(self._description), self.file.open_verified() as path, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the user's to heed when the file was made
            load: Callable[..., Any] = torch.jit.load
            return LoadedModel(load(path, map_location=device).eval(), device, takes_tensors=True)

    def _load_content(self) -> str:
        return self.file.content_sha256


class PickledModuleLoader(CodeFileLoader):
    """A module that was pickled whole."""

    def _load_content(self) -> torch.nn.Module:
        with self.file.open_verified() as path:
            network = torch.load(path, map_location="cpu", weights_only=False)
        if not isinstance(network, torch.nn.Module):
            raise ModelError(
                f"the file {self.file.path!r} holds a {type(network).__name__}; it has to hold an nn.Module, or a state "
                "dict (with factory=, --factory). Save one of these."
            )
        return network


LOADERS_BY_FORMAT: dict[str, type[CodeFileLoader]] = {
    EXPORTED_PROGRAM: ExportedProgramLoader,
    TORCHSCRIPT: TorchScriptLoader,
    PICKLE: PickledModuleLoader,
}


@contextlib.contextmanager
def annotate_load_errors(description: str) -> Iterator[None]:
    """Add the name of what was being loaded to whatever goes wrong meanwhile."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{description} cannot be loaded: {type(error).__name__}: {error}. It has to load on every worker. "
            "Correct the file, or what makes the network."
        ) from error


def compute_digest(*words: str) -> str:
    """A key of several words."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()
