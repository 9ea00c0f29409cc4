"""Arrays in another process's memory: read from a second process, refused if they cannot be, cast on their way."""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context, resource_tracker
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daskinfer.core.arrays import copy_rows
from daskinfer.transport import process_memory
from daskinfer.transport.process_memory import (
    ProcessMemoryArray,
    advertise_process_memory,
    can_read_memory,
    is_readable_by_peers,
)
from tests.unit.transport.test_row_sources import FORMS

X = np.arange(24, dtype="float32").reshape(6, 4)


@pytest.fixture(scope="module")
def child() -> Iterator[ProcessPoolExecutor]:
    """Start a process that has nothing of this one's memory."""
    resource_tracker.ensure_running()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(advertise_process_memory).result()  # it starts with its first task
        yield pool


@pytest.fixture
def ended() -> int:
    """Return the pid of a process that has ended."""
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.mark.parametrize("form", FORMS)
def test_another_process_reads_an_array(form: str, child: ProcessPoolExecutor) -> None:
    """A process reads arrays of every dtype and shape in this one's memory, given only their address."""
    array = np.array(FORMS[form], order="C")
    remote = ProcessMemoryArray.from_array(array)
    assert len(pickle.dumps(remote)) < 400
    native = array.astype(array.dtype.newbyteorder("="))  # as NumPy's pickles are, on the way back
    np.testing.assert_array_equal(child.submit(np.asarray, remote).result(), native, strict=True)


def test_rows_are_read_when_they_are_used(child: ProcessPoolExecutor) -> None:
    """Nothing is copied before: what is read is what the memory holds then."""
    array = X.copy()
    remote = ProcessMemoryArray.from_array(array)
    array[:] = 7
    assert (child.submit(np.asarray, remote).result() == 7).all()


def test_another_process_knows_this_one(child: ProcessPoolExecutor) -> None:
    """A process can read this one's memory if it finds the token, not with another token or another address."""
    own = advertise_process_memory()
    others = [own, replace(own, token=own.token[::-1]), replace(own, address=own.address + 1), replace(own, address=1)]
    assert [child.submit(can_read_memory, ref).result() for ref in others] == [True, False, False, False]


def test_each_process_has_a_token_of_its_own(child: ProcessPoolExecutor) -> None:
    """So a process with the same pid in another container is not taken for it."""
    assert child.submit(advertise_process_memory).result().token != advertise_process_memory().token


def test_a_process_that_has_ended(ended: int) -> None:
    """Reading from a process that has ended is an error that names it, and the check beforehand fails."""
    with pytest.raises(OSError, match=f"the memory of process {ended} cannot be read: No such process"):
        np.asarray(replace(ProcessMemoryArray.from_array(X), pid=ended))
    assert not can_read_memory(replace(advertise_process_memory(), pid=ended))


def test_an_address_without_memory() -> None:
    """Reading where nothing is mapped is an error, not a crash."""
    with pytest.raises(OSError, match=f"the memory of process {os.getpid()} cannot be read: Bad address"):
        np.asarray(replace(ProcessMemoryArray.from_array(X), address=1))


def test_memory_that_nobody_may_read() -> None:
    """Memory that other processes may not read, a driver's or this page, is recognized beforehand."""
    private = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE, prot=0), np.uint8)
    assert [is_readable_by_peers(array) for array in (private, X, X[:0], X[:, :0], np.array(1.0))] == [
        False,
        True,
        True,
        True,
        True,
    ]


BOUND = st.none() | st.integers(-9, 9)


@given(first=st.tuples(BOUND, BOUND), second=st.tuples(BOUND, BOUND), n_columns=st.integers(0, 3))
def test_slices(first: tuple[Any, Any], second: tuple[Any, Any], n_columns: int) -> None:
    """A slice, and a slice of it, holds the same rows as NumPy's, even if these are none or have no bytes."""
    array = X[:, :n_columns].copy()
    found, expected = (
        ProcessMemoryArray.from_array(array)[slice(*first)][slice(*second)],
        array[slice(*first)][slice(*second)],
    )
    assert len(found) == len(expected)
    np.testing.assert_array_equal(np.asarray(found), expected, strict=True)


def test_a_slice_reads_nothing(ended: int) -> None:
    """Slicing is arithmetic and needs no process."""
    assert replace(ProcessMemoryArray.from_array(X), pid=ended)[2:4].shape == (2, 4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cast", [None, "complex128"])
@pytest.mark.parametrize("remote", [True, False])
def test_copying_rows(form: str, cast: str | None, remote: bool) -> None:
    """Rows are copied into a buffer in the buffer's dtype, from another process's memory as from this one's."""
    array = np.array(FORMS[form], order="C")
    out = np.full(array.shape, 9, cast or array.dtype.newbyteorder("="))
    copy_rows(ProcessMemoryArray.from_array(array) if remote else array, out)
    np.testing.assert_array_equal(out, array.astype(out.dtype), strict=True)


def test_as_an_array_of_another_dtype() -> None:
    """NumPy converts it to an array of the requested dtype, in memory of its own."""
    remote = ProcessMemoryArray.from_array(X)
    np.testing.assert_array_equal(np.asarray(remote, dtype=">f8"), X.astype(">f8"), strict=True)
    np.array(remote)[:] = 0
    assert X.sum() == 276


def test_a_system_that_reads_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may copy less than requested at a time."""
    reader, n_calls = process_memory._get_process_vm_readv(), []

    def reads_five(pid: int, local: Any, n: int, remote: Any, m: int, flags: int) -> int:
        n_calls.append(1)
        iovecs = local._obj
        iovecs[1] = iovecs[3] = min(5, iovecs[1])
        return reader(pid, local, n, remote, m, flags)

    monkeypatch.setattr(process_memory, "_get_process_vm_readv", lambda: reads_five)
    np.testing.assert_array_equal(np.asarray(ProcessMemoryArray.from_array(X)), X)
    assert len(n_calls) == -(-X.nbytes // 5)


def test_a_system_that_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that copies no byte and names no reason is an error, not a loop."""
    monkeypatch.setattr(process_memory, "_get_process_vm_readv", lambda: lambda *_: 0)
    with pytest.raises(OSError, match="cannot be read"):
        np.asarray(ProcessMemoryArray.from_array(X))


def test_a_system_without_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the system has no such call, nothing counts as readable, and reading is an error."""
    monkeypatch.setattr(process_memory, "_load_libc", object)
    process_memory._get_process_vm_readv.cache_clear()
    assert (can_read_memory(advertise_process_memory()), is_readable_by_peers(X)) == (False, False)
    with pytest.raises(OSError, match="this system cannot read another process's memory"):
        np.asarray(ProcessMemoryArray.from_array(X))


@pytest.mark.parametrize(("scope", "n_calls"), [("1\n", 1), ("0\n", 0), ("2\n", 0), (None, 0)])
def test_descendants_are_admitted(scope: str | None, n_calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If Yama restricts reading to admitted processes, this process admits its descendants, and only then."""
    if scope is not None:
        (tmp_path / "scope").write_text(scope)
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(process_memory, "_PTRACE_SCOPE_PATH", tmp_path / "scope")
    monkeypatch.setattr(process_memory, "_load_libc", lambda: SimpleNamespace(prctl=lambda *words: calls.append(words)))
    assert advertise_process_memory().pid == os.getpid()
    admitted = [(option, process.value, *rest) for option, process, *rest in calls]
    assert admitted == [(int.from_bytes(b"Yama", "big"), os.getpid(), 0, 0, 0)] * n_calls
    assert all(isinstance(process, ctypes.c_ulong) for _, process, *_ in calls)
