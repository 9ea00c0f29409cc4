"""Arrays in files: open and create them by suffix; one module per format.

A source is small and picklable and opens its file where it is read: a worker reads its own rows. A target is created once,
by the client, and written by rows from anywhere. A worker *writes* an attempt and says what it wrote; the client, once it
has heard of it, *publishes* it under the names that it keeps. Where these two are one (a region of a file has no name),
an attempt holds the fence of its run meanwhile (``staging``), and a chunk is not run again before its process has ended.

A format module has two classes: ``Source(path)`` with ``shape``, ``dtype``, ``unit_rows`` and ``__getitem__`` (what dask's
``from_array`` asks for), and ``Target(store, path, shape, dtype, unit_rows)``, a small frozen record.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from daskinfer.core.chunks import Written
from daskinfer.errors import InputError, SourceMissing

if TYPE_CHECKING:  # the command looks at paths before torch is imported, which takes seconds
    from daskinfer.core.arrays import Source

_FORMATS = {".npy": "daskinfer.storage.formats.npy", ".zarr": "daskinfer.storage.formats.zarr"}
_ZARR_METADATA = ("zarr.json", ".zarray")
_ADVICE = {".npz": "It is a zip that would have to be unpacked whole: save its arrays one by one with numpy.save."}


class Target(Protocol):
    """An output of which any worker writes rows; ``path`` is what it has to be able to write to."""

    @property
    def path(self) -> str: ...

    @property
    def metadata(self) -> tuple[str, ...]:
        """Names of the parts that hold no rows."""
        ...

    def create(self, path: str) -> None:
        """Make the empty output at ``path``."""
        ...

    def write(self, start: int, rows: np.ndarray[Any, Any]) -> tuple[Written, ...]:
        """Write ``rows`` (n, ...) at ``start``, a multiple of ``unit_rows``; what was written, one part per write-unit."""
        ...

    def publish(self, written: Sequence[Written]) -> tuple[Written, ...]:
        """Put what was written where it stays; it with the names that it has there."""
        ...

    def files(self, written: Sequence[Written]) -> set[str]:
        """Paths of the files that published parts lie in."""
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


def check_path(path: str | os.PathLike[str]) -> str:
    """The absolute path of an output that could be created there; what lies there is not looked at.

    Raises
    ------
    SourceMissing
        Where its folder does not exist.
    InputError
        Where its suffix is unknown.
    """
    path = os.path.abspath(path)
    _format(path, "the output")
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        state = "is a file" if os.path.exists(folder) else "does not exist"
        raise SourceMissing(f"the output's folder {folder!r} {state}; a folder is needed. Create it, or correct the path.")
    return path


def target(path: str, store: str, run_folder: str, shape: tuple[int, ...], dtype: np.dtype[Any], unit_rows: int) -> Target:
    """The output ``path``, while it lies at ``store`` and a run has ``run_folder`` for what is not published yet."""
    made: Target = _format(path, "the output").Target(store, run_folder, shape, dtype, max(1, min(unit_rows, shape[0])))
    return made


def is_array(path: str) -> bool:
    """Whether what lies there is an array of the format that its suffix names."""
    try:
        open_source(path)
    except InputError:
        return False
    return True


def state(path: str) -> dict[str, Any]:
    """What changes when the array at ``path`` does, cheaply: see ``input_mark``."""
    found: dict[str, Any] = _format(path, "the input").state(path)
    return found


def _format(path: str, what: str) -> Any:
    suffix = Path(path).suffix.lower()
    if not suffix and any(os.path.exists(os.path.join(path, name)) for name in _ZARR_METADATA):
        suffix = ".zarr"  # an array within a group, as xarray writes them
    if suffix not in _FORMATS:
        advice = _ADVICE.get(suffix, "Rename or convert it.")
        raise InputError(f"{what} {path!r} ends in {suffix!r}; it may end in {_suffixes()}. {advice}")
    return importlib.import_module(_FORMATS[suffix])


def _suffixes() -> str:
    return " or ".join(_FORMATS)
