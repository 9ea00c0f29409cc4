"""Where the files of networks that were shipped lie on a host, and how they are removed."""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
from pathlib import Path

from daskinfer.core import env


def get_broadcast_path(name: str) -> str:
    """Where a shipped file lies on this host: with our own cluster, which removes it at the latest, else per user."""
    folder = os.environ.get(env.SCRATCH) or os.path.join(tempfile.gettempdir(), f"daskinfer-{os.getuid()}")
    return os.path.join(folder, name)


def make_client_suffix(client_id: str) -> str:
    """How the names end of what a client has shipped to workers of others."""
    return f"-{client_id}.safetensors"


def remove_broadcast_file(name: str) -> None:
    """Remove a shipped file from this host, and its folder with the last of them."""
    path = get_broadcast_path(name)
    with contextlib.suppress(OSError):
        os.unlink(path)
        os.rmdir(os.path.dirname(path))  # refused while others' files, or the rest of our own cluster's, lie there


def remove_client_files(client_id: str) -> None:
    """Remove from this host what a client has shipped to workers of others and could not remove, killed for example."""
    with contextlib.suppress(OSError):  # another worker of this host removes them, too
        for path in Path(get_broadcast_path("")).glob(f"model-*{glob.escape(make_client_suffix(client_id))}*"):
            remove_broadcast_file(path.name)
