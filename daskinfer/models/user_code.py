"""Tell the user's own modules from installed ones: they may change without a new version, and workers may lack them."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from types import ModuleType

_INSTALL_FOLDERS = frozenset({"site-packages", "dist-packages"})


def is_user_module(module: object) -> bool:
    """Check whether a module is a user's file: not installed, not the standard library, not this package.

    Examples
    --------
    >>> import json
    >>> is_user_module(json)
    False
    """
    if not issubclass(type(module), ModuleType):  # cryptography puts an object into sys.modules that only claims to be one
        return False
    # Not getattr or vars: any access loads a lazy module (CuPy's testing: 60 ms), and others then import more.
    names = object.__getattribute__(module, "__dict__")
    name, path = names.get("__name__"), names.get("__file__")
    if not isinstance(path, str) or sys.modules.get(str(name)) is not module:
        return False
    return _is_user_file(path, name)


@functools.lru_cache(maxsize=1 << 14)  # asked again for the same modules whenever a model is serialized
def _is_user_file(path: str, name: str) -> bool:
    if path.startswith(_STANDARD_LIBRARY) or _INSTALL_FOLDERS.intersection(path.split(os.sep)):
        return False
    return name.partition(".")[0] not in ("__main__", "daskinfer") and not _is_installed(os.path.abspath(path), name)


def _is_installed(path: str, name: str) -> bool:
    """Check whether the file is in a folder that an installer fills, by the folder's other content, not by its name."""
    depth = name.count(".") + os.path.basename(path).startswith("__init__.") + 1
    for _ in range(depth):
        path = os.path.dirname(path)
    return _has_distributions(path)


@functools.cache
def _has_distributions(folder: str) -> bool:
    """Check whether ``pip install --target`` or similar has installed into the folder."""
    return os.path.isdir(folder) and any(entry.endswith(".dist-info") for entry in os.listdir(folder))


def _find_standard_library() -> tuple[str, ...]:
    roots = {os.path.dirname(os.__file__), sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    return tuple(os.path.join(path, "") for root in roots for path in {root, os.path.realpath(root)})


_STANDARD_LIBRARY = _find_standard_library()
