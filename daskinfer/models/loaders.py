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
from daskinfer.models.files import PICKLE, PROGRAM, SCRIPT, ModelFile
from daskinfer.worker.loaded import LoadedModel


@dataclass(frozen=True)
class Loading(ABC):
    """Loads, or reads for the fingerprint, what ``_network`` gives, new at each call; ``_what`` names it in messages."""

    version: str | None = field(default=None, kw_only=True)

    def load(self, device: torch.device) -> LoadedModel:
        with said_of(self._what):
            return LoadedModel.of(self._network(), device)

    def fingerprint(self) -> str:
        if self.version is not None:
            return digest("version", str(self.version))
        with said_of(self._what):
            return fingerprints.fingerprint(self._network())

    @abstractmethod
    def _network(self) -> Any: ...

    @property
    @abstractmethod
    def _what(self) -> str: ...


@dataclass(frozen=True)
class CodeFile(Loading):
    """A file that holds the network with its code, and is trusted: ``Model`` makes none of another."""

    file: ModelFile

    @property
    def key(self) -> str:
        return digest(type(self).__name__, self.file.state)

    @property
    def nbytes(self) -> int:
        return self.file.nbytes

    @property
    def _what(self) -> str:
        return f"the network in {self.file.path}"


class ProgramFile(CodeFile):
    """A program of ``torch.export``."""

    def load(self, device: torch.device) -> LoadedModel:
        with said_of(self._what):
            # An exported module has no eval(): what it does was fixed when it was exported.
            network = move_to_device_pass(self._program(), device).module().requires_grad_(False)
            return LoadedModel(network, device, takes_tensors=True)

    def _network(self) -> list[Any]:
        """What the fingerprint reads: the file's bytes differ from save to save."""
        program = self._program()
        return [program.graph_module.code, str(program.graph_signature), program.state_dict, program.constants]

    def _program(self) -> torch.export.ExportedProgram:
        with self.file.checked() as path, open(path, "rb") as file:
            return torch.export.load(file)


class ScriptFile(CodeFile):
    """A TorchScript program; its fingerprint is the file's."""

    def load(self, device: torch.device) -> LoadedModel:
        # It has no requires_grad_(), and needs none: networks run in inference mode.
        with said_of(self._what), self.file.checked() as path, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the user's to heed when the file was made
            load: Callable[..., Any] = torch.jit.load
            return LoadedModel(load(path, map_location=device).eval(), device, takes_tensors=True)

    def _network(self) -> str:
        return self.file.content


class PickledFile(CodeFile):
    """A module that was pickled whole."""

    def _network(self) -> torch.nn.Module:
        with self.file.checked() as path:
            network = torch.load(path, map_location="cpu", weights_only=False)
        if not isinstance(network, torch.nn.Module):
            raise ModelError(
                f"the file {self.file.path!r} holds a {type(network).__name__}; it has to hold an nn.Module, or a state "
                "dict (with factory=, --factory). Save one of these."
            )
        return network


PROGRAMS: dict[str, type[CodeFile]] = {PROGRAM: ProgramFile, SCRIPT: ScriptFile, PICKLE: PickledFile}


@contextlib.contextmanager
def said_of(thing: str) -> Iterator[None]:
    """Add the name of what was being loaded to whatever goes wrong meanwhile."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{thing} cannot be loaded: {type(error).__name__}: {error}. It has to load on every worker. "
            "Correct the file, or what makes the network."
        ) from error


def digest(*words: str) -> str:
    """A key of several words."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()
