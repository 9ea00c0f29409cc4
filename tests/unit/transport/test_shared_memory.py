"""Pools of shared memory: slots, what other processes see of them, and that nothing of them is left behind."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from daskinfer.core.chunks import ChunkStats
from daskinfer.scheduling.balancer import MAX_CHUNKS_PER_TASK
from daskinfer.transport import shared_memory
from daskinfer.transport.shared_memory import (
    ALIGN,
    MAX_ATTACHED_POOLS,
    POOL_HEADER_NBYTES,
    RESULT_HEADER_NBYTES,
    PoolRef,
    SharedMemoryPool,
    attach_pool,
    borrow_pool,
    can_attach,
    close_cached_pool,
    compute_slot_nbytes,
    detach_all_pools,
    read_result_header,
    write_result_header,
)

DTYPES = ("bool", "uint8", "float16", "float32", ">f4", "int64", "complex64", "complex128")
SMALL = compute_slot_nbytes(1000)

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="what is left is counted in /proc")


class Owner:
    """Stand in for a client, for which a pool may be kept."""


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test see files of other programs, and no other program see its files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # found again from TMPDIR


@pytest.fixture(autouse=True)
def _unmapped() -> Iterator[None]:
    """Let no test see what another one mapped, or has not collected yet."""
    gc.collect()
    yield
    detach_all_pools()


@pytest.fixture
def pool() -> Iterator[SharedMemoryPool]:
    """Make a pool of two slots."""
    made = SharedMemoryPool(SMALL, 2)
    yield made
    made.close()


@pytest.fixture
def without_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for a system without memory files."""
    monkeypatch.delattr(os, "memfd_create", raising=False)


def shared() -> tuple[int, int]:
    """Count the pools that this process has open, and its maps of them."""
    opened = {p.stat().st_ino for p in Path("/proc/self/fd").iterdir() if p.is_symlink() and "daskinfer" in os.readlink(p)}
    return len(opened), Path("/proc/self/maps").read_text().count("daskinfer")


def files() -> set[Path]:
    """List the pools that are files."""
    return set(Path(tempfile.gettempdir()).glob("daskinfer-arena-*"))


def run_in_another_process(code: str, value: Any = None) -> str:
    """Return what a second Python prints; ``value`` is unpickled there."""
    code = f"import os, pickle, sys\nvalue = pickle.loads(bytes.fromhex(sys.argv[1]))\n{code}"
    command = [sys.executable, "-c", code, pickle.dumps(value).hex()]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


WORKER = """
from daskinfer.transport.shared_memory import MAX_ATTACHED_POOLS, attach_pool, can_attach, write_result_header

refs, rows_ref, output_ref, header_offset = value
memory = attach_pool(refs[0])
output_ref.get_array(memory)[...] = rows_ref.get_array(memory).sum(axis=0)
write_result_header(memory, header_offset, os.getpid())
print(os.getpid(), all(can_attach(ref) for ref in refs))
print(MAX_ATTACHED_POOLS, open("/proc/self/maps").read().count("daskinfer"), output_ref.get_array(memory).tolist())
del memory
print(MAX_ATTACHED_POOLS, open("/proc/self/maps").read().count("daskinfer"))
"""


def test_another_process_reads_and_writes(pool: SharedMemoryPool) -> None:
    """Worker and client read what the other one wrote, and the worker keeps few pools mapped."""
    slot = pool.free_slots.pop()
    rows_ref, output_ref = (slot.allocate(shape, np.dtype("f4")) for shape in ((5, 3), (3,)))
    assert rows_ref is not None
    assert output_ref is not None
    rows_ref.get_array(pool.memory)[...] = np.arange(15).reshape(5, 3)
    others = [SharedMemoryPool(SMALL, 1) for _ in range(MAX_ATTACHED_POOLS)]
    refs = [pool.ref, *(other.ref for other in others)]
    printed = run_in_another_process(WORKER, (refs, rows_ref, output_ref, slot.header_offset))
    (pid, attached), (most, n_held, *sums), (_, n_kept) = (line.split(maxsplit=2) for line in printed.splitlines())
    assert output_ref.get_array(pool.memory).tolist() == [30, 35, 40]
    assert (slot.read_header(), attached, sums) == (int(pid), "True", ["[30.0, 35.0, 40.0]"])
    assert (int(n_held), int(n_kept)) == (int(most) + 1, int(most))  # one more while an array still uses it
    for other in others:
        other.close()


OWNER = """
from daskinfer.transport.shared_memory import SharedMemoryPool

pool = SharedMemoryPool(1 << 20, 2)
pool.memory[-4:] = b"here"
print(pickle.dumps(pool.ref).hex(), flush=True)
sys.stdin.read()
"""


def test_a_killed_owner_leaves_nothing() -> None:
    """After ``kill -9`` of the client its memory has no name anywhere, and a worker that has mapped it can continue."""
    command = [sys.executable, "-c", f"import pickle, sys\n{OWNER}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        ref = pickle.loads(bytes.fromhex(owner.stdout.readline()))
        memory = attach_pool(ref)
        owner.kill()
    detach_all_pools()
    assert memory[-4:] == b"here"
    assert not can_attach(ref)
    assert not files()


FORKED = """
from daskinfer.transport.shared_memory import SharedMemoryPool

del os.memfd_create
pool, left = SharedMemoryPool(4096, 1), SharedMemoryPool(4096, 1)
if not (child := os.fork()):
    pool.close()
    os._exit(0)
os.waitpid(child, 0)
print(os.path.exists(pool.ref.path))
pool.close()
print(os.path.exists(pool.ref.path), os.path.exists(left.ref.path))
"""


def test_a_forked_child_leaves_its_parents_file() -> None:
    """A pool in a file outlives a forked child, and is removed with its owner, which need not close it."""
    assert run_in_another_process(FORKED).split() == ["True", "False", "True"]
    assert not files()


def test_a_ref_is_small(pool: SharedMemoryPool) -> None:
    """What travels with every task is a path, a token and a size."""
    assert len(pickle.dumps(pool.ref)) < 300
    assert pickle.loads(pickle.dumps(pool.ref)) == pool.ref


def test_a_pool_is_mapped_once(pool: SharedMemoryPool) -> None:
    """However many threads attach to it, a pool is mapped once per process."""
    before = shared()
    with ThreadPoolExecutor(8) as threads:
        maps = list(threads.map(attach_pool, [pool.ref] * 50))
    assert len({id(memory) for memory in maps}) == 1
    assert shared()[1] == before[1] + 1


def test_the_pools_used_last_stay_mapped() -> None:
    """Beyond the limit, the least recently used pool is unmapped."""
    pools = [SharedMemoryPool(SMALL, 1) for _ in range(MAX_ATTACHED_POOLS + 1)]
    first = attach_pool(pools[0].ref)
    for pool in pools[1:-1]:
        attach_pool(pool.ref)
    attach_pool(pools[0].ref)
    attach_pool(pools[-1].ref)
    assert attach_pool(pools[0].ref) is first
    assert pools[1].ref.token not in shared_memory._attached_pools
    for pool in pools:
        pool.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token": "0" * 32}, "belongs to another process"),
        ({"token": "1", "nbytes": 1 << 30}, "must have 1073741824 bytes, got "),
        ({"token": "2", "nbytes": 4096}, "must have 4096 bytes, got "),
        ({"token": "3", "path": "/proc/1/fd/no"}, "No such file|Permission denied"),
        ({"token": "4", "path": "/nowhere"}, "No such file"),
    ],
)
def test_what_is_not_the_pool_is_refused(change: dict[str, Any], message: str, pool: SharedMemoryPool) -> None:
    """Another file, another size and another token are noticed, and leave nothing open."""
    wrong, before = replace(pool.ref, **change), shared()
    assert not can_attach(wrong)
    with pytest.raises(OSError, match=message):
        attach_pool(wrong)
    gc.collect()
    assert shared() == before


def test_a_path_that_leads_to_another_file(pool: SharedMemoryPool, tmp_path: Path) -> None:
    """A file of the same size at a pool's path is not taken for it."""
    (tmp_path / "x").write_bytes(bytes(pool.ref.nbytes))
    assert not can_attach(PoolRef(str(tmp_path / "x"), pool.ref.token, pool.ref.nbytes))
    assert can_attach(pool.ref)


@given(
    arrays=st.lists(
        hnp.arrays(st.sampled_from(DTYPES).map(np.dtype), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)),
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_arrays_do_not_overlap(arrays: list[np.ndarray[Any, Any]]) -> None:
    """Arrays of any shape and dtype are aligned and overlap neither each other, nor the header, nor other slots."""
    pool = SharedMemoryPool(SMALL, 3)
    left, slot, right = pool.free_slots
    for other in (left, right):
        pool.memory[other.start : other.start + SMALL] = b"\xa5" * SMALL
    write_result_header(pool.memory, slot.header_offset, "header")
    placed = [(array, slot.allocate(array.shape, array.dtype)) for array in arrays]
    fitting = [(array, ref) for array, ref in placed if ref is not None]
    for array, ref in fitting:
        ref.get_array(pool.memory)[...] = array
        assert ref.offset % ALIGN == 0
        assert slot.start <= ref.offset <= slot.header_offset - array.nbytes
    assert [ref.get_array(pool.memory).tobytes() for _, ref in fitting] == [array.tobytes() for array, _ in fitting]
    assert slot.read_header() == "header"
    for other in (left, right):
        assert pool.memory[other.start : other.start + SMALL] == b"\xa5" * SMALL
    pool.close()


def test_a_full_slot(pool: SharedMemoryPool) -> None:
    """An array that does not fit gets no memory, and takes none from the next one that does."""
    slot = pool.free_slots.pop()
    room = slot.header_offset - slot.start
    assert slot.allocate((room + 1,), np.dtype("u1")) is None
    assert slot.allocate((room - ALIGN,), np.dtype("u1")) is not None
    assert slot.allocate((ALIGN + 1,), np.dtype("u1")) is None
    assert slot.allocate((ALIGN,), np.dtype("u1")) is not None
    assert slot.allocate((1,), np.dtype("u1")) is None
    assert slot.allocate((0, 3), np.dtype("f8")) is not None


def test_a_released_slot_is_empty(pool: SharedMemoryPool) -> None:
    """A slot that was released has room again, from its first byte on."""
    slot = pool.free_slots.pop()
    first = slot.allocate((1000,), np.dtype("u1"))
    slot.release()
    assert pool.is_idle
    assert pool.free_slots.pop().allocate((1000,), np.dtype("u1")) == first


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 10**6])
def test_slots_hold_what_is_asked(nbytes: int) -> None:
    """A slot for n bytes holds an array of n bytes and the header, in whole pages, after the token's page."""
    pool = SharedMemoryPool(compute_slot_nbytes(nbytes), 2)
    for slot in pool.free_slots:
        assert slot.start >= POOL_HEADER_NBYTES
        assert slot.allocate((nbytes,), np.dtype("u1")) is not None
    assert pool.slot_nbytes % os.sysconf("SC_PAGESIZE") == 0
    pool.close()


def test_a_header_holds_the_statistics_of_the_largest_task(pool: SharedMemoryPool) -> None:
    """The statistics of as many chunks as a task may have fit, with the longest names, and stay in their own slot."""
    name = "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition MIG 1g.24gb "
    receipts = [
        ChunkStats(
            10**11 + i, 10**12 + i, f"{i} MIG-{'c6d4f1ef' * 5}", f"{name}{i}", 10**6, 0.1, f"tcp://[{'fe80:' * 8}]:{i}"
        )
        for i in range(MAX_CHUNKS_PER_TASK)
    ]
    assert len(pickle.dumps(receipts)) + 4 <= RESULT_HEADER_NBYTES
    first, second = pool.free_slots
    write_result_header(pool.memory, second.header_offset, "the other's")
    write_result_header(pool.memory, first.header_offset, receipts)
    assert (first.read_header(), second.read_header()) == (receipts, "the other's")


def test_a_shorter_header_hides_the_longer(pool: SharedMemoryPool) -> None:
    """A header that is overwritten by a shorter one is read as the shorter one."""
    for header in ("long" * 100, "short"):
        write_result_header(pool.memory, pool.free_slots[0].header_offset, header)
        assert read_result_header(pool.memory, pool.free_slots[0].header_offset) == header


def test_a_pool_is_kept_for_the_next_call() -> None:
    """The same owner gets the same memory again, even if it needs less; another owner gets other memory."""
    owner, other = Owner(), Owner()
    with borrow_pool(owner, SMALL, 3) as first:
        first.free_slots.pop().release()
    with borrow_pool(owner, compute_slot_nbytes(10), 1) as again, borrow_pool(other, SMALL, 3) as others:
        assert again is first
        assert others.ref.token != first.ref.token
    close_cached_pool(owner)
    close_cached_pool(other)


@pytest.mark.parametrize(("nbytes", "n_slots"), [(SMALL + 4096, 2), (SMALL, 3)])
def test_more_memory_is_needed_than_is_kept(nbytes: int, n_slots: int) -> None:
    """If the kept pool is too small, it is closed first, and a new one is made."""
    owner = Owner()
    with borrow_pool(owner, SMALL, 2) as small:
        pass
    with borrow_pool(owner, nbytes, n_slots) as large:
        assert large.ref.token != small.ref.token
        assert (large.slot_nbytes, large.n_slots) == (nbytes, n_slots)
        assert (can_attach(large.ref), can_attach(small.ref)) == (True, False)
    close_cached_pool(owner)


def test_two_calls_at_once() -> None:
    """Two calls of one owner at a time have a pool each, and one of the two is kept."""
    owner = Owner()
    with borrow_pool(owner, SMALL, 2) as first, borrow_pool(owner, SMALL, 2) as second:
        assert first.ref.token != second.ref.token
    assert [can_attach(first.ref), can_attach(second.ref)].count(True) == 1
    with borrow_pool(owner, SMALL, 2) as third:
        assert third.ref.token in {first.ref.token, second.ref.token}
    close_cached_pool(owner)


def test_a_slot_that_was_not_released() -> None:
    """Memory that an attempt may still write to is not reused, whether the call succeeded or not."""
    owner = Owner()
    with borrow_pool(owner, SMALL, 2) as first:
        slot = first.free_slots.pop()
    with pytest.raises(ZeroDivisionError, match="division"), borrow_pool(owner, SMALL, 2) as second:
        second.free_slots.pop().start / 0
    with borrow_pool(owner, SMALL, 2) as third:
        assert len({first.ref.token, second.ref.token, third.ref.token}) == 3
    assert (slot.pool.is_idle, can_attach(first.ref), can_attach(second.ref)) == (False, False, False)
    close_cached_pool(owner)


def test_an_error_keeps_a_pool_that_was_returned() -> None:
    """After an error, the pool is kept if every slot was released."""
    owner = Owner()
    with pytest.raises(ValueError, match="broken"), borrow_pool(owner, SMALL, 2) as first:
        raise ValueError("broken")
    with borrow_pool(owner, SMALL, 2) as second:
        assert second is first
    close_cached_pool(owner)


def test_memory_is_freed_when_its_pool_is_closed() -> None:
    """After closing, this process neither holds nor maps the memory, without waiting for the garbage collector."""
    owner, before = Owner(), shared()
    gc.disable()
    try:
        with borrow_pool(owner, SMALL, 2) as pool:
            pool.free_slots.pop().release()
        del pool
        close_cached_pool(owner)
        close_cached_pool(owner)
        assert shared() == before
    finally:
        gc.enable()


def test_an_owner_that_is_gone() -> None:
    """A kept pool is freed with its owner."""
    owner, before = Owner(), shared()
    with borrow_pool(owner, SMALL, 2):
        pass
    del owner
    gc.collect()
    assert shared() == before


def test_arrays_outlive_their_pool(pool: SharedMemoryPool) -> None:
    """An array in a pool can be read after the pool was closed, and closing twice does nothing."""
    ref = pool.free_slots[0].allocate((3,), np.dtype("f4"))
    assert ref is not None
    array = ref.get_array(pool.memory)
    array[:] = 7
    pool.close()
    pool.close()
    assert array.tolist() == [7, 7, 7]


def test_memory_that_cannot_be_mapped() -> None:
    """A pool larger than any address space is an error that leaves nothing open."""
    before = shared()
    with pytest.raises(OSError, match="Cannot allocate memory"):
        SharedMemoryPool(1 << 50, 1 << 11)
    gc.collect()
    assert shared() == before


@pytest.mark.usefixtures("without_memfd")
def test_without_memory_files() -> None:
    """If the system has no memory files, a pool is a file, allocated at once and removed with the pool."""
    pool = SharedMemoryPool(1 << 20, 1)
    (path,) = files()
    assert (path, path.stat().st_blocks * 512 >= 1 << 20) == (Path(pool.ref.path), True)
    attach_pool(pool.ref)[-4:] = b"here"
    assert pool.memory[-4:] == b"here"
    pool.close()
    assert not files()


@pytest.mark.usefixtures("without_memfd")
def test_without_a_way_to_take_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """If space cannot be allocated beforehand, the file still has its size."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    pool = SharedMemoryPool(SMALL, 1)
    assert Path(pool.ref.path).stat().st_size == pool.ref.nbytes
    pool.close()


@pytest.mark.usefixtures("without_memfd")
def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is an error at once, not a killed process later, and leaves no file."""

    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        SharedMemoryPool(SMALL, 1)
    assert not files()


@pytest.mark.usefixtures("without_memfd")
def test_a_file_that_cannot_be_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose space was allocated is removed if it cannot be mapped."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(shared_memory.mmap, "mmap", refuse)
    with pytest.raises(OSError, match="Cannot allocate"):
        SharedMemoryPool(SMALL, 1)
    left = files()
    for path in left:
        path.unlink()
    assert not left


def test_a_file_whose_owner_was_killed_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without memfd, the next pool removes files that nobody has locked, and keeps those of living owners."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delattr(os, "memfd_create")
    (tmp_path / "daskinfer-arena-orphan").touch()
    first = SharedMemoryPool(shared_memory.compute_slot_nbytes(100), 1)
    second = SharedMemoryPool(shared_memory.compute_slot_nbytes(100), 1)
    assert {path.name for path in tmp_path.iterdir()} == {Path(pool.ref.path).name for pool in (first, second)}
    first.close()
    second.close()
    assert not list(tmp_path.iterdir())
