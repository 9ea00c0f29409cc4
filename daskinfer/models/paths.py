"""Checks of the text that names a model, and the registry of file formats; needs no torch, which takes seconds to import.

The command line imports this module before torch, to refuse a mistyped path at once. For that it stays apart from
``files``, which reads model files and needs torch.
"""

from __future__ import annotations

import os
from pathlib import Path

from daskinfer.errors import ModelError

# Suffix -> subclasses of ``loaders.FileLoader`` that may load such a file; the first that accepts it does. By name, since
# importing the classes imports torch.
FILE_LOADERS: dict[str, tuple[str, ...]] = {
    ".pt2": ("daskinfer.models.loaders:ExportedProgramLoader",),
    **dict.fromkeys(
        (".ts", ".pt", ".pth"),
        ("daskinfer.models.loaders:TorchScriptLoader", "daskinfer.models.loaders:PickledModuleLoader"),
    ),
}


def check_is_file(path: str) -> None:
    """Check that there is a file at ``path``.

    Raises
    ------
    ModelError
        If there is none.
    """
    if not os.path.isfile(path):
        raise ModelError(f"model file {path!r} does not exist; correct the path")


def check_reference(source: str, *, has_factory: bool = False) -> None:
    """Check that ``source`` names an existing file or has the form of a factory's name; imports no factory.

    ``has_factory``: there is a factory for the weights in ``source``; without one, a ``.safetensors`` file is refused.

    Raises
    ------
    ModelError
        If it names neither.

    Examples
    --------
    >>> check_reference("my_pkg.nets:make")
    """
    suffix = Path(source).suffix.lower()
    if suffix == ".safetensors" and not has_factory:
        raise missing_factory_error(source)
    if suffix in (".safetensors", *FILE_LOADERS):
        check_is_file(source)
    elif ":" not in source:
        raise ModelError(
            f"model must be a file ending in .safetensors, {', '.join(FILE_LOADERS)} or a factory 'pkg.mod:make', "
            f"got {source!r}"
        )


def missing_factory_error(source: str) -> ModelError:
    """Return the error for weights without a factory."""
    return ModelError(
        f"{source} holds only weights, and needs a factory to make their model. "
        f"Pass Model({source!r}, factory='pkg.mod:make') (--factory pkg.mod:make)."
    )
