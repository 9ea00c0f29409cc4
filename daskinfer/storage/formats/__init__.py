"""Arrays in files: open and create them by suffix; one module per format.

A source is small and picklable and opens its file where it is read: a worker reads its own rows. A target is created once,
by the client, and written by rows from anywhere. A worker *writes* an attempt and says what it wrote; the client, once it
has heard of it, *publishes* it under the names that it keeps. Where these two are one (a region of a file has no name),
an attempt holds the fence of its run meanwhile (``staging``), and a chunk is not run again before its process has ended.

A format module has two classes: ``ArraySource(path)`` with ``shape``, ``dtype``, ``unit_rows`` and ``__getitem__`` (what dask's
``from_array`` asks for), and ``Target(store, path, shape, dtype, unit_rows)``, a small frozen record.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from daskinfer.core.chunks import StoredPart
from daskinfer.errors import InputError, SourceMissing

if TYPE_CHECKING:  # the command looks at paths before torch is imported, which takes seconds
    from daskinfer.core.arrays import ArraySource

_FORMATS = {".npy": "daskinfer.storage.formats.npy", ".zarr": "daskinfer.storage.formats.zarr"}
_ZARR_METADATA = ("zarr.json", ".zarray")
_SUFFIX_ADVICE = {".npz": "It is a zip that would have to be unpacked whole: save its arrays one by one with numpy.save."}


class Target(Protocol):
    """An output of which any worker writes rows; ``writable_path`` is what it has to be able to write to."""

    @property
    def writable_path(self) -> str: ...

    @property
    def metadata_parts(self) -> tuple[str, ...]:
        """Names of the parts that hold no rows."""
        ...

    def create(self, path: str) -> None:
        """Make the empty output at ``writable_path``."""
        ...

    def write(self, start: int, rows: np.ndarray[Any, Any]) -> tuple[StoredPart, ...]:
        """Write ``rows`` (n, ...) at ``start``, a multiple of ``unit_rows``; what was written, one part per write-unit."""
        ...

    def publish(self, parts: Sequence[StoredPart]) -> tuple[StoredPart, ...]:
        """Put what was written where it stays; it with the names that it has there."""
        ...

    def get_file_paths(self, parts: Sequence[StoredPart]) -> set[str]:
        """Paths of the files that published parts lie in."""
        ...


def open_source(path: str | os.PathLike[str]) -> ArraySource:
    """Open an array for reading.

    Raises
    ------
    SourceMissing
        Where there is nothing at ``writable_path``.
    InputError
        Where its suffix is unknown, or what lies there is no array of numbers.
    """
    path = os.path.abspath(path)
    module = _load_format_module(path, "the input")
    if not os.path.exists(path):
        raise SourceMissing(f"the input {path!r} does not exist; a {_join_suffixes()} array is needed. Correct the path.")
    source: ArraySource = module.Source(path)
    return source


def check_output_path(path: str | os.PathLike[str]) -> str:
    """The absolute path of an output that could be created there; what lies there is not looked at.

    Raises
    ------
    SourceMissing
        Where its folder does not exist.
    InputError
        Where its suffix is unknown.
    """
    path = os.path.abspath(path)
    _load_format_module(path, "the output")
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        state = "is a file" if os.path.exists(folder) else "does not exist"
        raise SourceMissing(f"the output's folder {folder!r} {state}; a folder is needed. Create it, or correct the path.")
    return path


def make_target(
    path: str, store: str, run_folder: str, shape: tuple[int, ...], dtype: np.dtype[Any], unit_rows: int
) -> Target:
    """The output ``writable_path``, while it lies at ``store`` and a run has ``run_folder`` for what is not published yet."""
    made: Target = _load_format_module(path, "the output").Target(
        store, run_folder, shape, dtype, max(1, min(unit_rows, shape[0]))
    )
    return made


def is_array_path(path: str) -> bool:
    """Whether what lies there is an array of the format that its suffix names."""
    try:
        open_source(path)
    except InputError:
        return False
    return True


def compute_stat_fingerprint(path: str) -> dict[str, Any]:
    """What changes when the array at ``writable_path`` does, cheaply: see ``compute_input_fingerprint``."""
    found: dict[str, Any] = _load_format_module(path, "the input").compute_stat_fingerprint(path)
    return found


def _load_format_module(path: str, role: str) -> Any:
    suffix = Path(path).suffix.lower()
    if not suffix and any(os.path.exists(os.path.join(path, name)) for name in _ZARR_METADATA):
        suffix = ".zarr"  # an array within a group, as xarray writes them
    if suffix not in _FORMATS:
        advice = _SUFFIX_ADVICE.get(suffix, "Rename or convert it.")
        raise InputError(f"{role} {path!r} ends in {suffix!r}; it may end in {_join_suffixes()}. {advice}")
    return importlib.import_module(_FORMATS[suffix])


def _join_suffixes() -> str:
    return " or ".join(_FORMATS)
