"""Model files: which of them can run code when loaded, and whether they are still the ones that were planned.

=================================  ========================  =======================================================
file                               content                   what loading it can do
=================================  ========================  =======================================================
``.safetensors``                   tensors                   read tensors, nothing else
``.pt``, ``.pth``, with a factory  a state dict              read tensors; anything else in the file is refused
``.pt2``                           a torch.export program    run any code; needs consent
``.pt``, ``.pth``, ``.ts``         TorchScript               run any code; needs consent
``.pt``, ``.pth``                  a pickled model           run any code; needs consent
=================================  ========================  =======================================================

Consent is ``trust=True`` or ``--trust-model``. Without it the planner refuses such a file after reading no more than its
table of contents, and no loader for it is ever sent to a worker.

A file's expected SHA-256 is the one that the user gave, or the one that the client computes when it plans; for that it reads
files up to ``MAX_HASHED_NBYTES``. Every worker compares it before the first chunk, and again on the very bytes that it
loads: it first copies them into memory that has no name, so that a write to the file meanwhile changes nothing. For a larger
file without a given SHA-256 only the size is compared.

Cost (measured, one core): hashing 1 GB takes 0.5 to 1 s. Loading 300 MiB of safetensors takes 0.8 s instead of 0.1 to 0.3,
once per worker, and the copy takes as much memory as the file.
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

_READ_NBYTES = 1 << 20


@dataclass(frozen=True)
class ModelFile:
    """A file as it was when the call was planned; ``sha256`` is empty if it is too large to be hashed."""

    path: str
    nbytes: int
    identity: str
    sha256: str

    @classmethod
    def from_path(cls, path: str, sha256: str | None = None) -> ModelFile:
        """Record the state of a file; ``sha256`` (64 hexadecimal digits), if given, must be the file's.

        Raises
        ------
        ModelError
            If ``sha256`` is malformed, or not the file's.
        OSError
            If there is no such file.
        """
        if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-fA-F]{64}", sha256)):
            raise ModelError(f"sha256 must be 64 hexadecimal digits as printed by sha256sum, got {sha256!r}")
        path, stat_result = os.path.abspath(path), os.stat(path)
        size, mtime_ns = stat_result.st_size, stat_result.st_mtime_ns
        actual_sha256 = ""
        if sha256 is not None or size <= MAX_HASHED_NBYTES:
            actual_sha256 = _compute_sha256_cached(path, size, mtime_ns, stat_result.st_ino)
        identity = actual_sha256 or f"{path} {size} {mtime_ns}"
        file = cls(path, size, identity, (sha256 or actual_sha256).lower())
        file._check_sha256(actual_sha256)
        return file

    @property
    def content_sha256(self) -> str:
        """The SHA-256 of its content; computed now if it was too large for the plan."""
        return self.sha256 or _compute_sha256(self.path)

    def check_unchanged(self) -> None:
        """Read the file and check that it is still the same.

        Raises
        ------
        ModelError
            If it has changed.
        OSError
            If it cannot be read.
        """
        self._check_size()
        if self.sha256:
            self._check_sha256(_compute_sha256(self.path))

    @contextlib.contextmanager
    def open_verified(self) -> Iterator[str]:
        """Yield a path at which exactly the bytes that were compared can be read.

        Raises
        ------
        ModelError
            If the file has changed.
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
        """Load the file's state dict, without running any code.

        Raises
        ------
        ModelError
            If the file holds more than a state dict.
        """
        with self.open_verified() as path:
            return STATE_DICT_LOADERS[Path(self.path).suffix.lower()](path, self.path)

    def is_torchscript(self) -> bool:
        """Check whether it holds TorchScript, without running any code."""
        return _is_torchscript(self.path)

    def is_state_dict(self) -> bool:
        """Check whether it holds a pickled state dict, without running any code."""
        with contextlib.suppress(Exception):
            return isinstance(_unpickle_weights(self.path, "meta"), dict)
        return False

    def check_trust(self, format_name: str, *, trust: bool) -> None:
        """Refuse a file that can run code, unless its user trusts it.

        Raises
        ------
        ModelError
            If ``trust`` is False; it says how to consent, and what to use instead.
        """
        if not trust:
            raise ModelError(
                f"model file {self.path!r} holds {format_name}, which can run code when loaded. If you trust its author, "
                "pass trust=True (--trust-model); otherwise load only weights, with factory='pkg.mod:make'"
            )

    def _check_size(self) -> None:
        if (nbytes := os.stat(self.path).st_size) != self.nbytes:
            raise ModelError(f"model file {self.path!r} has {nbytes} bytes, expected {self.nbytes}. {_ADVICE}")

    def _check_sha256(self, actual_sha256: str) -> None:
        if actual_sha256 != self.sha256:
            raise ModelError(f"model file {self.path!r} has SHA-256 {actual_sha256}, expected {self.sha256}. {_ADVICE}")


_ADVICE = "Restore the file; or, to use it as it is now, correct sha256= (--model-sha256) if you passed it, and run again"


def check_folder_is_private(path: str) -> None:
    """Refuse a broadcast file that another user could have put into its folder: it is unpickled.

    Raises
    ------
    ModelError
        If the folder is another user's, or others may write into it.
    """
    folder = os.path.dirname(path)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ModelError(
            f"folder {folder!r} for broadcast models must be a folder of user {os.geteuid()} that only they can write to, "
            f"got {stat.filemode(status.st_mode)} of user {status.st_uid}. Remove it, or set TMPDIR to a private folder"
        )


def _read_safetensors(path: str, original_path: str) -> dict[str, torch.Tensor]:
    return dict(safetensors.torch.load_file(path))


def _read_state_dict(path: str, original_path: str) -> dict[str, torch.Tensor]:
    code = "TorchScript" if _is_torchscript(path) else ""
    if not code:
        try:
            return dict(_unpickle_weights(path, "cpu"))
        except Exception as error:
            refused = re.search(r"(?i)unsupported (?:global: )?global ([\w.]+)", str(error))
            if refused is None:
                raise
            code = refused[1]
    raise ModelError(
        f"weights file {original_path!r} holds more than tensors ({code}), which can run code when loaded. Save "
        "model.state_dict(), best as .safetensors; or, for a whole model you trust, replace factory= by trust=True "
        "(--trust-model)"
    )


STATE_DICT_LOADERS: dict[str, Callable[[str, str], dict[str, torch.Tensor]]] = {
    ".safetensors": _read_safetensors,
    **dict.fromkeys((".pt", ".pth"), _read_state_dict),
}


def _unpickle_weights(path: str, map_location: str) -> dict[str, torch.Tensor]:
    # Files written before torch 1.6 are not zip archives, and cannot be mapped.
    weights: dict[str, torch.Tensor] = torch.load(
        path, map_location=map_location, weights_only=True, mmap=zipfile.is_zipfile(path)
    )
    return weights


def _is_torchscript(path: str) -> bool:
    """Check for TorchScript as torch itself does, to tell it from what torch.save wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


@functools.lru_cache(maxsize=16)
def _compute_sha256_cached(path: str, nbytes: int, mtime_ns: int, inode: int) -> str:
    """Compute it once per state of the file; a change that leaves the state equal is detected when the file is loaded."""
    return _compute_sha256(path)


def _compute_sha256(path: str, copy_to: IO[bytes] | None = None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_READ_NBYTES):
            digest.update(block)
            if copy_to is not None:
                copy_to.write(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _create_private_file() -> Iterator[tuple[IO[bytes], str]]:
    """Yield a file that nobody else can write to, and its path: in memory if possible, else in the temporary folder."""
    if not hasattr(os, "memfd_create"):
        with tempfile.NamedTemporaryFile(prefix="daskinfer-model-") as file:
            yield file, file.name
        return
    with os.fdopen(os.memfd_create("daskinfer-model"), "w+b") as copy:
        yield copy, f"/proc/self/fd/{copy.fileno()}"
