"""Arrays in files: open and create them by suffix; one module per format.

A source is small and picklable and opens its file where it is read: a worker reads its own rows. A target is created once,
by the client, under a temporary name, written by rows from anywhere, and published by a rename when all is written.

A format module has two classes: ``Source(path)`` with ``shape``, ``dtype``, ``unit_rows`` and ``__getitem__`` (what dask's
``from_array`` asks for), and ``Target.create(path, shape, dtype, unit_rows)`` with ``write(start, rows)``.
"""

from __future__ import annotations

import importlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from daskinfer.errors import InputError, OutputExists, SourceMissing

_FORMATS = {".npy": "daskinfer.io.npy", ".zarr": "daskinfer.io.zarr"}


class Source(Protocol):
    """Rows in a file; ``unit_rows`` of them are decoded in one go, None where any can be read alone."""

    unit_rows: int | None
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    ndim: int

    def __getitem__(self, index: Any) -> np.ndarray[Any, Any]:
        """Read rows."""
        ...


class Target(Protocol):
    """A file of which any worker writes rows."""

    path: str

    def write(self, start: int, rows: np.ndarray[Any, Any]) -> None:
        """Write ``rows`` (n, ...) at ``start``, a multiple of the ``unit_rows`` that it was created with."""
        ...


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open an array for reading.

    Raises
    ------
    SourceMissing
        Where there is nothing at ``path``.
    InputError
        Where its suffix is unknown, or what lies there is no array of numbers.
    """
    path = os.path.abspath(path)
    module = _format(path, "the input")
    if not os.path.exists(path):
        raise SourceMissing(f"the input {path!r} does not exist; a {_suffixes()} array is needed. Correct the path.")
    source: Source = module.Source(path)
    return source


def check_free(path: str | os.PathLike[str]) -> str:
    """The absolute path of an output that can be created there.

    Raises
    ------
    OutputExists
        Where something lies there already.
    SourceMissing
        Where its folder does not exist.
    InputError
        Where its suffix is unknown.
    """
    path = os.path.abspath(path)
    _format(path, "the output")
    if os.path.lexists(path):
        raise OutputExists(
            f"the output {path!r} exists already; nothing is ever overwritten. Choose another path, or remove it."
        )
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise SourceMissing(f"the output's folder {folder!r} does not exist; a folder is needed. Create it first.")
    return path


class Draft:
    """An output that is being written under a temporary name beside its own; a context manager.

    Leaving it well publishes the output by a rename; leaving it by an error removes what was written.

    Raises
    ------
    OutputExists
        On leaving, where something has appeared at ``path`` meanwhile; what was written then stays where it is.
    """

    def __init__(self, path: str, shape: tuple[int, ...], dtype: np.dtype[Any], unit_rows: int) -> None:
        self.path = path
        self._temporary = f"{path}.{uuid.uuid4().hex[:8]}.partial"
        self._created = (shape, dtype, unit_rows)

    def __enter__(self) -> Target:
        try:
            target: Target = _format(self.path, "the output").Target.create(self._temporary, *self._created)
        except BaseException:
            self._remove()  # a disk that is full leaves half a file
            raise
        return target

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._publish()
        else:
            self._remove()

    def _publish(self) -> None:
        if os.path.lexists(self.path):
            raise OutputExists(
                f"the output {self.path!r} appeared while it was being computed; nothing is ever overwritten. "
                f"The whole answer lies at {self._temporary!r}: move it where you want it."
            )
        os.rename(self._temporary, self.path)

    def _remove(self) -> None:
        if os.path.isdir(self._temporary):
            shutil.rmtree(self._temporary, ignore_errors=True)
        elif os.path.exists(self._temporary):
            os.unlink(self._temporary)


def _format(path: str, what: str) -> Any:
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise InputError(f"{what} {path!r} ends in {suffix!r}; it may end in {_suffixes()}. Rename or convert it.")
    return importlib.import_module(_FORMATS[suffix])


def _suffixes() -> str:
    return " or ".join(_FORMATS)
