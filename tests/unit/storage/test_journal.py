"""The lock of an output: one run holds it whatever other runs do, and it is removed if nothing was stored."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daskinfer.errors import OutputLocked
from daskinfer.storage.journal import OutputJournal
from daskinfer.storage.manifest import Header

HEADER = Header(output="y", model="m", input={}, options={}, shape=(4,), dtype="float32", unit_rows=1, batch_size=1)


@given(leaves=st.lists(st.booleans(), max_size=12))
@settings(max_examples=20, deadline=None)
def test_one_run_holds_an_output_that_others_withdraw(leaves: list[bool]) -> None:
    """However runs take the lock and leave with nothing stored, one at a time holds it, and the last leaves no files."""
    with tempfile.TemporaryDirectory() as folder:
        holder: OutputJournal | None = None
        for leave in [*leaves, True]:
            if holder is None:
                holder = OutputJournal(f"{folder}/y.npy", HEADER)
                holder.lock()
            with (
                OutputJournal(f"{folder}/y.npy", HEADER) as other,
                pytest.raises(OutputLocked, match="is locked by another run"),
            ):
                other.lock()
            assert os.listdir(folder) == ["y.npy.daskinfer"]
            if leave:
                holder.__exit__()
                holder = None
                assert os.listdir(folder) == []


def test_a_lock_that_is_removed_while_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that opens a lock file just before its owner removes it locks the next file, not the removed one."""
    first, second, third = (OutputJournal(str(tmp_path / "y.npy"), HEADER) for _ in range(3))
    first.lock()
    flock, n_calls = fcntl.flock, []

    def late(descriptor: int, kind: int) -> None:
        if not n_calls:
            first.__exit__()
        n_calls.append(kind)
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    second.lock()
    assert len(n_calls) == 2
    with third, pytest.raises(OutputLocked, match="is locked by another run"):
        third.lock()
    second.__exit__()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_that_is_held_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lock files that shards left are removed too, before the lock that protects them."""
    gone: list[str] = []
    unlink = Path.unlink

    def noting(path: Path, *, missing_ok: bool = False) -> None:
        gone.append(path.name)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", noting)
    with OutputJournal(str(tmp_path / "y.npy"), HEADER) as held:
        held.lock()
        for name in ("lock-1-of-2", "lock-2-of-2", "creating"):
            (held.folder / name).touch()
    assert gone[-1] == "lock"
    assert len(gone) == 4
    assert list(tmp_path.iterdir()) == []
