"""Array files, opened and created by suffix; one module per format.

A source is small and picklable, and opens its file in the process that reads: each worker reads its own rows. A target is
created once, by the client, and any worker can write rows to it. A worker *writes* an attempt and returns its parts; the
client then *publishes* them under their final names. Where writing already publishes (a region of a file has no name of its
own), the worker holds the fence of its run while it writes (``staging``), and a chunk is retried only after the old process
has ended.

A format module has a class ``Source(path)`` with ``shape``, ``dtype``, ``unit_rows`` and ``__getitem__`` (what dask's
``from_array`` needs), a small frozen record ``Target(store, path, shape, dtype, unit_rows)``, and the function
``compute_stat_fingerprint(path)``.
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

if TYPE_CHECKING:  # the command line checks paths before it imports torch, which takes seconds
    from daskinfer.core.arrays import ArraySource

_FORMATS = {".npy": "daskinfer.storage.formats.npy", ".zarr": "daskinfer.storage.formats.zarr"}
_ZARR_METADATA = ("zarr.json", ".zarray")
_SUFFIX_ADVICE = {".npz": "It is a zip archive of arrays: save its arrays one by one with numpy.save."}


class Target(Protocol):
    """An output that any worker can write rows to; ``writable_path`` is the file or folder that it writes to."""

    @property
    def writable_path(self) -> str: ...

    @property
    def metadata_parts(self) -> tuple[str, ...]:
        """The names of the parts that hold no rows."""
        ...

    def create(self, path: str) -> None:
        """Create the empty output at ``path``."""
        ...

    def write(self, start: int, rows: np.ndarray[Any, Any]) -> tuple[StoredPart, ...]:
        """Write ``rows`` (n, ...) at row ``start``, a multiple of ``unit_rows``; return one part per write-unit."""
        ...

    def publish(self, parts: Sequence[StoredPart]) -> tuple[StoredPart, ...]:
        """Move written parts to their final place; return them with their final names."""
        ...

    def get_file_paths(self, parts: Sequence[StoredPart]) -> set[str]:
        """Return the paths of the files that contain these published parts."""
        ...


def open_source(path: str | os.PathLike[str]) -> ArraySource:
    """Open an array for reading.

    Raises
    ------
    SourceMissing
        If ``path`` does not exist.
    InputError
        If the suffix is unknown, or the file does not hold an array of numbers.
    """
    path = check_input_path(path)
    source: ArraySource = _load_format_module(path, "the input").Source(path)
    return source


def check_input_path(path: str | os.PathLike[str]) -> str:
    """Check that there is something at ``path`` whose suffix names a format, and return it as an absolute path.

    Raises
    ------
    SourceMissing
        If ``path`` does not exist.
    InputError
        If the suffix is unknown.
    """
    path = os.path.abspath(path)
    _find_format_module(path, "the input")
    if not os.path.exists(path):
        raise SourceMissing(f"the input {path!r} does not exist. Pass the path of a {_join_suffixes()} array.")
    return path


def check_output_path(path: str | os.PathLike[str]) -> str:
    """Check that an output could be created at ``path``, and return it as an absolute path; existing files do not matter.

    Raises
    ------
    SourceMissing
        If its folder does not exist.
    InputError
        If the suffix is unknown.
    """
    path = os.path.abspath(path)
    _find_format_module(path, "the output")
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        state = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise SourceMissing(f"the output's folder {folder!r} {state}. Create the folder, or choose another path.")
    return path


def make_target(
    path: str, store: str, run_folder: str, shape: tuple[int, ...], dtype: np.dtype[Any], unit_rows: int
) -> Target:
    """Make the target of the output ``path``: it is written at ``store``, unpublished parts go to ``run_folder``."""
    target: Target = _load_format_module(path, "the output").Target(
        store, run_folder, shape, dtype, max(1, min(unit_rows, shape[0]))
    )
    return target


def is_array_path(path: str) -> bool:
    """Whether ``path`` holds an array of the format that its suffix names."""
    try:
        open_source(path)
    except InputError:
        return False
    return True


def compute_stat_fingerprint(path: str) -> dict[str, Any]:
    """Fingerprint the array at ``path`` by file metadata, without reading it; used by ``compute_input_fingerprint``."""
    fingerprint: dict[str, Any] = _load_format_module(path, "the input").compute_stat_fingerprint(path)
    return fingerprint


def _load_format_module(path: str, role: str) -> Any:
    return importlib.import_module(_find_format_module(path, role))


def _find_format_module(path: str, role: str) -> str:
    """Return the name of the module for a path; importing Zarr's takes a third of a second."""
    suffix = Path(path).suffix.lower()
    if not suffix and any(os.path.exists(os.path.join(path, name)) for name in _ZARR_METADATA):
        suffix = ".zarr"  # an array in a group, as xarray writes it
    if suffix not in _FORMATS:
        advice = _SUFFIX_ADVICE.get(suffix, "Rename or convert it.")
        raise InputError(f"{role} {path!r} must end in {_join_suffixes()}, got {suffix!r}. {advice}")
    return _FORMATS[suffix]


def _join_suffixes() -> str:
    return " or ".join(_FORMATS)
