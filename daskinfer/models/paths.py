"""What can be said of the text that names a network without torch, which takes seconds to import."""

from __future__ import annotations

import os
from pathlib import Path

from daskinfer.errors import ModelError

CODE_SUFFIXES = (".pt2", ".ts", ".pt", ".pth")


def check_is_file(path: str) -> None:
    """Refuse a path at which no file lies.

    Raises
    ------
    ModelError
        Where there is none.
    """
    if not os.path.isfile(path):
        raise ModelError(f"the model file {path!r} does not exist; a readable file is needed. Correct the path.")


def check_reference(source: str, *, has_factory: bool = False) -> None:
    """Refuse what names neither a file that is there nor a factory, of which only the form is looked at.

    ``has_factory`` says whether there is one for the weights of ``source``, without which a ``.safetensors`` is refused.

    Raises
    ------
    ModelError
        Which it is.

    Examples
    --------
    >>> check_reference("my_pkg.nets:make")
    """
    suffix = Path(source).suffix.lower()
    if suffix == ".safetensors" and not has_factory:
        raise missing_factory_error(source)
    if suffix in (".safetensors", *CODE_SUFFIXES):
        check_is_file(source)
    elif ":" not in source:
        raise ModelError(
            f"the model {source!r} is neither a file ending in .safetensors, {', '.join(CODE_SUFFIXES)} nor a factory as "
            "'pkg.mod:make'. Pass one of these."
        )


def missing_factory_error(source: str) -> ModelError:
    """The refusal of weights alone."""
    return ModelError(
        f"{source} holds weights only; a factory has to make the network that takes them. "
        "Pass Model(…, factory='pkg.mod:make'), or --factory pkg.mod:make."
    )
