"""Files of broadcast models on a host: their paths, and how they are removed."""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
from pathlib import Path

from daskinfer.core import env


def get_broadcast_path(name: str) -> str:
    """Return a broadcast file's path on this host: in the managed cluster's folder (removed with it), else in the user's."""
    folder = os.environ.get(env.SCRATCH) or os.path.join(tempfile.gettempdir(), f"daskinfer-{os.getuid()}")
    return os.path.join(folder, name)


def make_client_suffix(client_id: str) -> str:
    """Return the ending of the names of files that a client broadcasts to external workers."""
    return f"-{client_id}.safetensors"


def remove_broadcast_file(name: str) -> None:
    """Remove a broadcast file from this host, and its folder once that is empty."""
    path = get_broadcast_path(name)
    with contextlib.suppress(OSError):
        os.unlink(path)
        os.rmdir(os.path.dirname(path))  # fails while other files are in it, the managed cluster's for example


def remove_client_files(client_id: str) -> None:
    """Remove from this host what a client broadcast to external workers and left behind, for example when it was killed."""
    with contextlib.suppress(OSError):  # another worker of this host removes them, too
        for path in Path(get_broadcast_path("")).glob(f"model-*{glob.escape(make_client_suffix(client_id))}*"):
            remove_broadcast_file(path.name)
