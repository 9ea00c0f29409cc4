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
    """Stands for a client: whatever an arena may be kept for."""


@pytest.fixture(autouse=True)
def _unmapped() -> Iterator[None]:
    """No test finds what another one mapped, or has not collected yet."""
    gc.collect()
    yield
    detach_all_pools()


@pytest.fixture
def arena() -> Iterator[SharedMemoryPool]:
    """An arena of two slots."""
    made = SharedMemoryPool(SMALL, 2)
    yield made
    made.close()


@pytest.fixture
def without_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without memory files."""
    monkeypatch.delattr(os, "memfd_create", raising=False)


def shared() -> tuple[int, int]:
    """How many arenas this process has open, and how many maps of them."""
    opened = {p.stat().st_ino for p in Path("/proc/self/fd").iterdir() if p.is_symlink() and "daskinfer" in os.readlink(p)}
    return len(opened), Path("/proc/self/maps").read_text().count("daskinfer")


def files() -> set[Path]:
    """Arenas that are files."""
    return set(Path(tempfile.gettempdir()).glob("daskinfer-arena-*"))


def in_another_process(code: str, value: Any = None) -> str:
    """What a second Python prints; ``value`` is unpickled there."""
    code = f"import os, pickle, sys\nvalue = pickle.loads(bytes.fromhex(sys.argv[1]))\n{code}"
    command = [sys.executable, "-c", code, pickle.dumps(value).hex()]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


WORKER = """
from daskinfer.transport.shared_memory import MAX_MAPPED, mapped, reaches, write_note

refs, given, wanted, note_offset = value
seen = mapped(refs[0])
wanted.array(seen)[...] = given.array(seen).sum(axis=0)
write_note(seen, note_offset, os.getpid())
print(os.getpid(), all(reaches(ref) for ref in refs))
print(MAX_MAPPED, open("/proc/self/maps").read().count("daskinfer"), wanted.array(seen).tolist())
del seen
print(MAX_MAPPED, open("/proc/self/maps").read().count("daskinfer"))
"""


def test_another_process_reads_and_writes(arena: SharedMemoryPool) -> None:
    """A worker reads what the client wrote and the client what the worker wrote; it keeps few arenas mapped."""
    slot = arena.free_slots.pop()
    given, wanted = (slot.allocate(shape, np.dtype("f4")) for shape in ((5, 3), (3,)))
    assert given is not None and wanted is not None
    given.get_array(arena.memory)[...] = np.arange(15).reshape(5, 3)
    others = [SharedMemoryPool(SMALL, 1) for _ in range(MAX_ATTACHED_POOLS)]
    refs = [arena.ref, *(other.ref for other in others)]
    (pid, reached), (most, n_held, *sums), (_, n_kept) = (
        line.split(maxsplit=2) for line in in_another_process(WORKER, (refs, given, wanted, slot.header_offset)).splitlines()
    )
    assert wanted.get_array(arena.memory).tolist() == [30, 35, 40]
    assert (slot.read_header(), reached, sums) == (int(pid), "True", ["[30.0, 35.0, 40.0]"])
    assert (int(n_held), int(n_kept)) == (int(most) + 1, int(most))  # one more while an array still lies in it
    for other in others:
        other.close()


OWNER = """
from daskinfer.transport.shared_memory import Arena

arena = Arena(1 << 20, 2)
arena.memory[-4:] = b"here"
print(pickle.dumps(arena.ref).hex(), flush=True)
sys.stdin.read()
"""


def test_a_killed_owner_leaves_nothing() -> None:
    """After ``kill -9`` of the client its memory has no name anywhere, and a worker that maps it can go on."""
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
from daskinfer.transport.shared_memory import Arena

del os.memfd_create
arena, left = Arena(4096, 1), Arena(4096, 1)
if not (child := os.fork()):
    arena.close()
    os._exit(0)
os.waitpid(child, 0)
print(os.path.exists(arena.ref.path))
arena.close()
print(os.path.exists(arena.ref.path), os.path.exists(left.ref.path))
"""


def test_a_forked_child_leaves_its_parents_file() -> None:
    """An arena that is a file outlives a forked child, and goes with its owner, who need not close it."""
    assert in_another_process(FORKED).split() == ["True", "False", "True"]
    assert not files()


def test_a_ref_is_small(arena: SharedMemoryPool) -> None:
    """What travels with every task is a path, a token and a size."""
    assert len(pickle.dumps(arena.ref)) < 300
    assert pickle.loads(pickle.dumps(arena.ref)) == arena.ref


def test_an_arena_is_mapped_once(arena: SharedMemoryPool) -> None:
    """However many threads ask for it, an arena has one map in a process."""
    before = shared()
    with ThreadPoolExecutor(8) as pool:
        maps = list(pool.map(attach_pool, [arena.ref] * 50))
    assert len({id(memory) for memory in maps}) == 1
    assert shared()[1] == before[1] + 1


def test_the_arenas_used_last_stay_mapped() -> None:
    """Of more arenas than stay mapped, the one that was used longest ago goes."""
    arenas = [SharedMemoryPool(SMALL, 1) for _ in range(MAX_ATTACHED_POOLS + 1)]
    first = attach_pool(arenas[0].ref)
    for arena in arenas[1:-1]:
        attach_pool(arena.ref)
    attach_pool(arenas[0].ref)
    attach_pool(arenas[-1].ref)
    assert attach_pool(arenas[0].ref) is first
    assert arenas[1].ref.token not in shared_memory._attached_pools
    for arena in arenas:
        arena.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token": "0" * 32}, "is another process's"),
        ({"token": "1", "nbytes": 1 << 30}, "is no arena of 1073741824 bytes"),
        ({"token": "2", "nbytes": 4096}, "is no arena of 4096 bytes"),
        ({"token": "3", "path": "/proc/1/fd/no"}, "No such file|Permission denied"),
        ({"token": "4", "path": "/nowhere"}, "No such file"),
    ],
)
def test_what_is_not_the_arena_is_refused(change: dict[str, Any], said: str, arena: SharedMemoryPool) -> None:
    """Another file, another size and another token are noticed, and leave nothing open."""
    wrong, before = replace(arena.ref, **change), shared()
    assert not can_attach(wrong)
    with pytest.raises(OSError, match=said):
        attach_pool(wrong)
    gc.collect()
    assert shared() == before


def test_a_number_that_was_given_to_another_file(arena: SharedMemoryPool, tmp_path: Path) -> None:
    """A file of the same size where an arena was is not taken for it."""
    (tmp_path / "x").write_bytes(bytes(arena.ref.nbytes))
    assert not can_attach(PoolRef(str(tmp_path / "x"), arena.ref.token, arena.ref.nbytes))
    assert can_attach(arena.ref)


@given(
    arrays=st.lists(
        hnp.arrays(st.sampled_from(DTYPES).map(np.dtype), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)),
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_arrays_do_not_overlap(arrays: list[np.ndarray[Any, Any]]) -> None:
    """Arrays of any shape and dtype lie side by side, aligned, beside the note and the other slots, until a slot is full."""
    arena = SharedMemoryPool(SMALL, 3)
    left, slot, right = arena.free_slots
    for other in (left, right):
        arena.memory[other.start : other.start + SMALL] = b"\xa5" * SMALL
    write_result_header(arena.memory, slot.header_offset, "noted")
    placed = [(array, slot.allocate(array.shape, array.dtype)) for array in arrays]
    there = [(array, place) for array, place in placed if place is not None]
    for array, place in there:
        place.get_array(arena.memory)[...] = array
        assert place.offset % ALIGN == 0
        assert slot.start <= place.offset <= slot.header_offset - array.nbytes
    assert [place.get_array(arena.memory).tobytes() for _, place in there] == [array.tobytes() for array, _ in there]
    assert slot.read_header() == "noted"
    for other in (left, right):
        assert arena.memory[other.start : other.start + SMALL] == b"\xa5" * SMALL
    arena.close()


def test_a_full_slot(arena: SharedMemoryPool) -> None:
    """An array that does not fit gets no place, and takes none from the next one that does."""
    slot = arena.free_slots.pop()
    room = slot.header_offset - slot.start
    assert slot.allocate((room + 1,), np.dtype("u1")) is None
    assert slot.allocate((room - ALIGN,), np.dtype("u1")) is not None
    assert slot.allocate((ALIGN + 1,), np.dtype("u1")) is None
    assert slot.allocate((ALIGN,), np.dtype("u1")) is not None
    assert slot.allocate((1,), np.dtype("u1")) is None
    assert slot.allocate((0, 3), np.dtype("f8")) is not None


def test_a_slot_is_empty_when_it_comes_back(arena: SharedMemoryPool) -> None:
    """A slot that was given back has room again, from its first byte on."""
    slot = arena.free_slots.pop()
    first = slot.allocate((1000,), np.dtype("u1"))
    slot.release()
    assert arena.is_idle
    assert arena.free_slots.pop().allocate((1000,), np.dtype("u1")) == first


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 10**6])
def test_slots_hold_what_is_asked(nbytes: int) -> None:
    """A slot of so many bytes holds an array of as many and the note, in whole pages, after the token's page."""
    arena = SharedMemoryPool(compute_slot_nbytes(nbytes), 2)
    for slot in arena.free_slots:
        assert slot.start >= POOL_HEADER_NBYTES
        assert slot.allocate((nbytes,), np.dtype("u1")) is not None
    assert arena.slot_nbytes % os.sysconf("SC_PAGESIZE") == 0
    arena.close()


def test_notes_hold_the_receipts_of_the_largest_task(arena: SharedMemoryPool) -> None:
    """The receipts of a task's most chunks fit, with names as long as they get, and stay in their own slot."""
    name = "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition MIG 1g.24gb "
    receipts = [
        ChunkStats(
            10**11 + i, 10**12 + i, f"{i} MIG-{'c6d4f1ef' * 5}", f"{name}{i}", 10**6, 0.1, f"tcp://[{'fe80:' * 8}]:{i}"
        )
        for i in range(MAX_CHUNKS_PER_TASK)
    ]
    assert len(pickle.dumps(receipts)) + 4 <= RESULT_HEADER_NBYTES
    first, second = arena.free_slots
    write_result_header(arena.memory, second.header_offset, "the other's")
    write_result_header(arena.memory, first.header_offset, receipts)
    assert (first.read_header(), second.read_header()) == (receipts, "the other's")


def test_a_shorter_note_hides_the_longer(arena: SharedMemoryPool) -> None:
    """A note that was overwritten by a shorter one is read as the shorter one."""
    for note in ("long" * 100, "short"):
        write_result_header(arena.memory, arena.free_slots[0].header_offset, note)
        assert read_result_header(arena.memory, arena.free_slots[0].header_offset) == note


def test_an_arena_is_kept_for_the_next_call() -> None:
    """The same owner gets the same memory again, also for less; another owner gets other memory."""
    owner, other = Owner(), Owner()
    with borrow_pool(owner, SMALL, 3) as first:
        first.free_slots.pop().release()
    with borrow_pool(owner, compute_slot_nbytes(10), 1) as again, borrow_pool(other, SMALL, 3) as others:
        assert again is first
        assert others.ref.token != first.ref.token
    close_cached_pool(owner)
    close_cached_pool(other)


@pytest.mark.parametrize(("nbytes", "n_slots"), [(SMALL + 4096, 2), (SMALL, 3)])
def test_more_is_asked_for(nbytes: int, n_slots: int) -> None:
    """Where more is needed than was kept, the kept memory is let go first and there is a new one."""
    owner = Owner()
    with borrow_pool(owner, SMALL, 2) as small:
        pass
    with borrow_pool(owner, nbytes, n_slots) as large:
        assert large.ref.token != small.ref.token
        assert (large.slot_nbytes, large.n_slots) == (nbytes, n_slots)
        assert (can_attach(large.ref), can_attach(small.ref)) == (True, False)
    close_cached_pool(owner)


def test_two_calls_at_once() -> None:
    """Two calls of one owner at one time have memory of their own, and one of the two is kept."""
    owner = Owner()
    with borrow_pool(owner, SMALL, 2) as first, borrow_pool(owner, SMALL, 2) as second:
        assert first.ref.token != second.ref.token
    assert [can_attach(first.ref), can_attach(second.ref)].count(True) == 1
    with borrow_pool(owner, SMALL, 2) as third:
        assert third.ref.token in {first.ref.token, second.ref.token}
    close_cached_pool(owner)


def test_a_slot_that_was_not_given_back() -> None:
    """Memory that an attempt may still write to is not used again, whether the call ended well or not."""
    owner = Owner()
    with borrow_pool(owner, SMALL, 2) as first:
        slot = first.free_slots.pop()
    with pytest.raises(ZeroDivisionError, match="division"), borrow_pool(owner, SMALL, 2) as second:
        second.free_slots.pop().start / 0
    with borrow_pool(owner, SMALL, 2) as third:
        assert len({first.ref.token, second.ref.token, third.ref.token}) == 3
    assert (slot.pool.is_idle, can_attach(first.ref), can_attach(second.ref)) == (False, False, False)
    close_cached_pool(owner)


def test_an_error_keeps_what_was_given_back() -> None:
    """After an error with every slot given back the memory is kept."""
    owner = Owner()
    with pytest.raises(ValueError, match="broken"), borrow_pool(owner, SMALL, 2) as first:
        raise ValueError("broken")
    with borrow_pool(owner, SMALL, 2) as second:
        assert second is first
    close_cached_pool(owner)


def test_memory_is_back_when_it_is_let_go() -> None:
    """After ``release`` this process neither holds nor maps the memory, without waiting for the garbage collector."""
    owner, before = Owner(), shared()
    gc.disable()
    try:
        with borrow_pool(owner, SMALL, 2) as arena:
            arena.free_slots.pop().release()
        del arena
        close_cached_pool(owner)
        close_cached_pool(owner)
        assert shared() == before
    finally:
        gc.enable()


def test_an_owner_that_is_gone() -> None:
    """Memory that was kept goes with its owner."""
    owner, before = Owner(), shared()
    with borrow_pool(owner, SMALL, 2):
        pass
    del owner
    gc.collect()
    assert shared() == before


def test_arrays_outlive_their_arena(arena: SharedMemoryPool) -> None:
    """An array that lies in an arena can be read after the arena was closed, and the arena is closed once."""
    place = arena.free_slots[0].allocate((3,), np.dtype("f4"))
    assert place is not None
    array = place.get_array(arena.memory)
    array[:] = 7
    arena.close()
    arena.close()
    assert array.tolist() == [7, 7, 7]


def test_memory_that_cannot_be_mapped() -> None:
    """An arena larger than any address space is an error that leaves nothing open."""
    before = shared()
    with pytest.raises(OSError, match="Cannot allocate memory"):
        SharedMemoryPool(1 << 50, 1 << 11)
    gc.collect()
    assert shared() == before


@pytest.mark.usefixtures("without_memfd")
def test_without_memory_files() -> None:
    """Where the system has no memory files an arena is a file, its space taken at once, that goes with the arena."""
    arena = SharedMemoryPool(1 << 20, 1)
    (path,) = files()
    assert (path, path.stat().st_blocks * 512 >= 1 << 20) == (Path(arena.ref.path), True)
    attach_pool(arena.ref)[-4:] = b"here"
    assert arena.memory[-4:] == b"here"
    arena.close()
    assert not files()


@pytest.mark.usefixtures("without_memfd")
def test_without_a_way_to_take_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where space cannot be taken beforehand the file has its size all the same."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    arena = SharedMemoryPool(SMALL, 1)
    assert Path(arena.ref.path).stat().st_size == arena.ref.nbytes
    arena.close()


@pytest.mark.usefixtures("without_memfd")
def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk is full there is an error now, not a killed process later, and no file."""

    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        SharedMemoryPool(SMALL, 1)
    assert not files()


@pytest.mark.usefixtures("without_memfd")
def test_a_file_that_cannot_be_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file's space is there and it cannot be mapped, the file goes."""

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
    """Without memfd, files that nobody holds a lock on are removed by the next arena; a living owner's stay."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delattr(os, "memfd_create")
    (tmp_path / "daskinfer-arena-orphan").touch()
    first = SharedMemoryPool(shared_memory.compute_slot_nbytes(100), 1)
    second = SharedMemoryPool(shared_memory.compute_slot_nbytes(100), 1)
    assert {path.name for path in tmp_path.iterdir()} == {Path(arena.ref.path).name for arena in (first, second)}
    first.close()
    second.close()
    assert not list(tmp_path.iterdir())
