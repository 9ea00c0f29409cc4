"""Locks that end with their owner, scratch folders, atomic writes, and errors that name their file."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from daskinfer.core import files


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty folder the temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("first", "second", "excluded"), [(False, False, True), (False, True, True), (True, False, True), (True, True, False)]
)
def test_locks_exclude_each_other_unless_both_are_shared(tmp_path: Path, first: bool, second: bool, excluded: bool) -> None:
    """Of two locks on one file, the second is refused unless both are shared; it is free once the first is closed."""
    with open(tmp_path / "lock", "w+b") as one, open(tmp_path / "lock", "r+b") as other:
        files.lock_descriptor(one.fileno(), shared=first)
        if excluded:
            with pytest.raises(BlockingIOError, match="temporarily unavailable"):
                files.lock_descriptor(other.fileno(), shared=second, wait=False)
            one.close()
        files.lock_descriptor(other.fileno(), shared=second, wait=False)


def test_a_held_lock_creates_its_file_and_keeps_it(tmp_path: Path) -> None:
    """``create`` makes a missing lock file, which stays; without it a missing file is an error."""
    with pytest.raises(FileNotFoundError, match="lock"), files.hold_lock(tmp_path / "lock"):
        pytest.fail("a file that is missing was locked")
    with (
        files.hold_lock(tmp_path / "lock", create=True),
        pytest.raises(BlockingIOError, match="temporarily unavailable"),
        files.hold_lock(tmp_path / "lock", wait=False),
    ):
        pytest.fail("two hold one lock")
    with files.hold_lock(tmp_path / "lock", wait=False):
        assert (tmp_path / "lock").read_bytes() == b""


def test_scratch_is_removed_with_its_owner(temporary: Path) -> None:
    """A scratch folder stays while its owner lives; that of a killed process is removed by the next owner."""
    code = "import os; from daskinfer.core.files import *; print(ScratchDir().path, flush=True); os.kill(os.getpid(), 9)"
    env = os.environ | {"TMPDIR": str(temporary)}
    killed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert [str(path) for path in temporary.iterdir()] == [killed.stdout.strip()]
    scratch = files.ScratchDir()
    files.remove_stale_scratch()
    assert [str(path) for path in temporary.iterdir()] == [scratch.path]
    scratch.remove()
    assert list(temporary.iterdir()) == []


def test_stale_files_and_folders_are_removed(temporary: Path) -> None:
    """Files and folders with the prefix are removed if nobody holds their lock; others stay."""
    (temporary / "mine-folder" / "inner").mkdir(parents=True)
    for name in ("mine-file", "mine-locked", "other"):
        (temporary / name).touch()
    with files.hold_lock(temporary / "mine-locked"):
        files.remove_stale_files("mine-")
    assert sorted(path.name for path in temporary.iterdir()) == ["mine-locked", "other"]


def test_an_atomic_write_replaces_the_file(tmp_path: Path) -> None:
    """The new content replaces the old one, and no temporary file remains."""
    for content in (b"old", b"new"):
        files.write_atomic(tmp_path / "header.json", content)
        assert (tmp_path / "header.json").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["header.json"]


def test_write_errors_name_the_file() -> None:
    """An error of the system without a file name gets one."""
    with pytest.raises(OSError, match=r"No space left on device: 'y'"), files.add_filename_to_errors("y"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [OSError("without a number"), OSError(errno.EIO, "broken", "a name")])
def test_errors_that_need_no_name(error: OSError) -> None:
    """An error that has a file name, or no error number, is raised unchanged."""
    with pytest.raises(OSError, match=r"without a number|a name") as caught, files.add_filename_to_errors("x"):
        raise error
    assert caught.value is error
