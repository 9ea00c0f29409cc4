"""NumPy's ``.npy``: one header, then the rows; read and written through memory maps, never unpickled."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from daskinfer.errors import InputError


class Source:
    """Rows of a ``.npy`` file."""

    def __init__(self, path: str) -> None:
        self.path = path
        mapped = self._map()
        self.shape, self.dtype, self.ndim = mapped.shape, mapped.dtype, mapped.ndim

    def _map(self) -> np.ndarray[Any, Any]:
        try:
            mapped: np.ndarray[Any, Any] = np.lib.format.open_memmap(self.path, mode="r")
        except (ValueError, OSError) as error:
            raise InputError(
                f"the input {self.path!r} cannot be read: {error}; a .npy file of numbers is needed. "
                "Save it with numpy.save(…, allow_pickle=False)."
            ) from error
        return mapped

    def __getitem__(self, index: Any) -> np.ndarray[Any, Any]:
        return np.asarray(self._map()[index])  # a view: a memmap itself would be pickled as one


class Target:
    """A ``.npy`` file that is being written."""

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def create(cls, path: str, shape: tuple[int, ...], dtype: np.dtype[Any], unit_rows: int) -> Target:
        """Make a file of zeros; ``unit_rows`` means nothing here, since rows lie one after the other."""
        mapped = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        nbytes = mapped.offset + mapped.nbytes
        del mapped
        # A map beyond a full disk succeeds and kills the writer later (SIGBUS): take the space now.
        _reserve(path, nbytes)
        return cls(path)

    def write(self, start: int, rows: np.ndarray[Any, Any]) -> None:
        """Write rows and flush them to the file."""
        mapped = np.lib.format.open_memmap(self.path, mode="r+")
        mapped[start : start + len(rows)] = rows
        mapped.flush()


def _reserve(path: str, nbytes: int) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        raise OSError(error.errno, f"{nbytes} bytes for the output cannot be reserved ({error.strerror})", path) from error
    finally:
        os.close(descriptor)
