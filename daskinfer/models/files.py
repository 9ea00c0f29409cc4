"""Files that networks are loaded from: what can run when they are, and whether they are still those that were planned.

=================================  ========================  =======================================================
file                               what is in it             what loading it can do
=================================  ========================  =======================================================
``.safetensors``                   tensors                   nothing but that
``.pt``, ``.pth``, with a factory  a state dict              nothing but that: anything else in it is refused
``.pt2``                           a torch.export program    run any code; needs consent
``.pt``, ``.pth``, ``.ts``         TorchScript               run any code; needs consent
``.pt``, ``.pth``                  a pickled network         run any code; needs consent
=================================  ========================  =======================================================

Consent is ``trust=True`` or ``--trust-model``. Without it such a file is refused where the plan is made, before anything but
its table of contents was read, so no recipe that could load it ever travels.

The SHA-256 of a file is the one that the user gave, or the client's of when it planned; for that the client reads files up
to ``MAX_HASHED_NBYTES``. Every worker compares it before the first chunk, and again in the very bytes that it loads: these are
copied first, into memory that has no name, so that whoever writes into the file meanwhile changes nothing. Of a larger file
without a SHA-256 only the size is compared.

What that costs (measured, one core): hashing 1 GB takes 0.5 to 1 s, and loading 300 MiB of safetensors 0.8 s instead of 0.1
to 0.3, once per worker, while the copy takes as much memory as the file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import safetensors.torch
import torch

from daskinfer.errors import ModelError

MAX_HASHED_NBYTES = 1 << 30
EXPORTED_PROGRAM, TORCHSCRIPT, PICKLE, WEIGHTS = (
    "a program of torch.export",
    "a TorchScript program",
    "a pickled network",
    "weights",
)

_READ_NBYTES = 1 << 20


@dataclass(frozen=True)
class ModelFile:
    """A file as it was when it was found; ``sha256`` is empty where it is too large to be read for that."""

    path: str
    nbytes: int
    identity: str
    sha256: str

    @classmethod
    def from_path(cls, path: str, sha256: str | None = None) -> ModelFile:
        """Look at a file; where ``sha256`` (64 hexadecimal digits) is given, it has to be the file's.

        Raises
        ------
        ModelError
            Where ``sha256`` is none, or another file's.
        OSError
            Where there is no such file.
        """
        if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-fA-F]{64}", sha256)):
            raise ModelError(f"sha256 is {sha256!r}; it has to be 64 hexadecimal digits, as sha256sum prints. Pass these.")
        path, found = os.path.abspath(path), os.stat(path)
        state = f"{path} {found.st_size} {found.st_mtime_ns}"
        known = ""
        if sha256 is not None or found.st_size <= MAX_HASHED_NBYTES:
            known = _compute_sha256_cached(path, found.st_size, found.st_mtime_ns, found.st_ino)
        file = cls(path, found.st_size, known or state, (sha256 or known).lower())
        file._check_sha256(known)
        return file

    @property
    def content_sha256(self) -> str:
        """The SHA-256 of what is in it, read now where it is not known."""
        return self.sha256 or _compute_sha256(self.path)

    def check_unchanged(self) -> None:
        """Read the file and see that it is still the same.

        Raises
        ------
        ModelError
            Where it is not.
        OSError
            Where it cannot be read.
        """
        self._check_size()
        if self.sha256:
            self._check_sha256(_compute_sha256(self.path))

    @contextlib.contextmanager
    def open_verified(self) -> Iterator[str]:
        """A path under which exactly the bytes that were compared can be read, while inside.

        Raises
        ------
        ModelError
            Where the file is another by now.
        """
        if not self.sha256:
            self._check_size()
            yield self.path
            return
        with _create_private_file() as (copy, path):
            self._check_sha256(_compute_sha256(self.path, copy))
            copy.flush()
            yield path

    def load_weights(self) -> dict[str, torch.Tensor]:
        """The state dict in it; never runs anything.

        Raises
        ------
        ModelError
            Where there is more in it than a state dict.
        """
        with self.open_verified() as path:
            return STATE_DICT_LOADERS[Path(self.path).suffix.lower()](path, self.path)

    def detect_format(self) -> str:
        """What is in it, as far as that can be found out without running anything: one of the four names above."""
        if self.path.lower().endswith(".pt2"):
            return EXPORTED_PROGRAM
        if _is_torchscript(self.path):
            return TORCHSCRIPT
        with contextlib.suppress(Exception):
            if isinstance(_unpickle_weights(self.path, "meta"), dict):
                return WEIGHTS
        return PICKLE

    def check_trust(self, file_format: str, *, trust: bool) -> None:
        """Refuse a file that can run code, unless its user trusts it.

        Raises
        ------
        ModelError
            Which says how to consent, and what to use instead.
        """
        if not trust:
            raise ModelError(
                f"the model file {self.path!r} holds {file_format}, or something else that can run code when it is loaded; without "
                "consent only weights (.safetensors, or a state dict) are loaded. If you trust whoever made the file, pass "
                "trust=True (--trust-model); otherwise ask for its weights, and pass them with factory='pkg.mod:make'."
            )

    def _check_size(self) -> None:
        if (nbytes := os.stat(self.path).st_size) != self.nbytes:
            raise ModelError(f"the model file {self.path!r} has {nbytes} bytes; {self.nbytes} {_ADVICE}")

    def _check_sha256(self, actual_sha256: str) -> None:
        if actual_sha256 != self.sha256:
            raise ModelError(f"the model file {self.path!r} has the SHA-256 {actual_sha256}; {self.sha256} {_ADVICE}")


_ADVICE = (
    "is what this call asks for, and nothing is run with another. Restore the file; or, if it is meant to be this one, "
    "correct sha256= (--model-sha256) where it was given, and start again."
)


def check_folder_is_private(path: str) -> None:
    """Refuse a file that networks travel in where somebody else could have put it there: it is unpickled.

    Raises
    ------
    ModelError
        Where the folder is another user's, or others may write into it.
    """
    folder = os.path.dirname(path)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ModelError(
            f"the folder {folder!r}, through which networks come to the workers of this host, has the mode "
            f"{stat.filemode(found.st_mode)} and the owner {found.st_uid}; it has to be a folder of user {os.geteuid()} "
            "that nobody else may write into. Remove it, or set TMPDIR to a folder of your own."
        )


def _read_safetensors(path: str, original_path: str) -> dict[str, torch.Tensor]:
    return dict(safetensors.torch.load_file(path))


def _read_state_dict(path: str, original_path: str) -> dict[str, torch.Tensor]:
    found = TORCHSCRIPT if _is_torchscript(path) else ""
    if not found:
        try:
            return dict(_unpickle_weights(path, "cpu"))
        except Exception as error:
            refused = re.search(r"(?i)unsupported (?:global: )?global ([\w.]+)", str(error))
            if refused is None:
                raise
            found = refused[1]
    raise ModelError(
        f"the weights file {original_path!r} holds more than tensors ({found}), which can run code when it is loaded; with a factory "
        "only a state dict is. Save net.state_dict(), best as .safetensors; or, if you trust whoever made the file and it "
        "holds the whole network, leave the factory out and pass trust=True (--trust-model)."
    )


STATE_DICT_LOADERS: dict[str, Callable[[str, str], dict[str, torch.Tensor]]] = {
    ".safetensors": _read_safetensors,
    **dict.fromkeys((".pt", ".pth"), _read_state_dict),
}


def _unpickle_weights(path: str, map_location: str) -> dict[str, torch.Tensor]:
    # Files from before torch 1.6 are no zip archives, and cannot be mapped.
    found: dict[str, torch.Tensor] = torch.load(
        path, map_location=map_location, weights_only=True, mmap=zipfile.is_zipfile(path)
    )
    return found


def _is_torchscript(path: str) -> bool:
    """As torch itself tells TorchScript from what torch.save wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


@functools.lru_cache(maxsize=16)
def _compute_sha256_cached(path: str, nbytes: int, mtime_ns: int, inode: int) -> str:
    """A file that was changed and looks the same is found out when it is loaded."""
    return _compute_sha256(path)


def _compute_sha256(path: str, copy_to: IO[bytes] | None = None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while part := file.read(_READ_NBYTES):
            digest.update(part)
            if copy_to is not None:
                copy_to.write(part)
    return digest.hexdigest()


@contextlib.contextmanager
def _create_private_file() -> Iterator[tuple[IO[bytes], str]]:
    """A file that is nobody else's, and its path: in memory where the system has that, else in the temporary folder."""
    if not hasattr(os, "memfd_create"):
        with tempfile.NamedTemporaryFile(prefix="daskinfer-model-") as file:
            yield file, file.name
        return
    with os.fdopen(os.memfd_create("daskinfer-model"), "w+b") as copy:
        yield copy, f"/proc/self/fd/{copy.fileno()}"
