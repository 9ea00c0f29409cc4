"""Memory of outputs: the next call reuses it, and it never holds two arrays at once."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st

import daskinfer as di
from daskinfer.execution.result_buffers import MAX_FREE_BLOCKS, MAX_NBYTES, MAX_WASTE, MIN_NBYTES, ResultBufferPool

N = MIN_NBYTES // 4  # float32 of the smallest block
F32 = np.dtype("float32")
Array = np.ndarray[Any, Any]

# All that a caller may keep of an array.
VIEWS: dict[str, Callable[[Array], Any]] = {
    "a slice": lambda a: a[3:],
    "a column": lambda a: a[:, 1],
    "its transpose": lambda a: a.T[1:],
    "another shape": lambda a: a.reshape(-1)[::7],
    "another dtype": lambda a: a.view(np.int32),
    "a view of a view": lambda a: np.asarray(a[2:][:, :2])[1:],
    "a tensor": torch.from_numpy,
    "a tensor's part": lambda a: torch.from_numpy(a)[1:].t(),
    "a buffer": memoryview,
}


def allocate(pool: ResultBufferPool, n_items: int = N) -> Array:
    """Allocate an array of four columns."""
    return pool.empty((n_items // 4, 4), F32)


def get_address(array: Any) -> int:
    """Return the address of an array's first byte."""
    return int(np.asarray(array).__array_interface__["data"][0])


def get_block(array: Array) -> weakref.ref[Array]:
    """Return a weak reference to the block that an array is in."""
    base: Any = array.base
    return weakref.ref(base.base.obj)


def test_memory_is_reused() -> None:
    """The memory of an array that was dropped holds the next one, even of another shape and dtype."""
    pool = ResultBufferPool()
    first = allocate(pool)
    address = get_address(first)
    del first
    assert get_address(pool.empty((N // 2,), np.dtype("float64"))) == address


def test_an_array_is_like_any_other() -> None:
    """It can be written and pickled, and has the requested shape and dtype."""
    array = allocate(ResultBufferPool())
    array[...] = 3
    assert (array.shape, array.dtype, array.flags.c_contiguous, array.flags.writeable) == ((N // 4, 4), F32, True, True)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(array)), array)


@given(names=st.lists(st.sampled_from([*VIEWS]), min_size=1, max_size=3))
def test_memory_in_use_is_not_reused(names: list[str]) -> None:
    """As long as any view of an array is left, its memory is not given to another."""
    pool = ResultBufferPool()
    array: Any = allocate(pool)
    array[...] = 7
    address = get_address(array)
    views = [VIEWS[name](array) for name in names]
    before = [np.asarray(view).copy() for view in views]
    del array
    while views:
        other = allocate(pool)
        other[...] = -1
        assert get_address(other) != address
        for view, expected in zip(views, before, strict=True):
            np.testing.assert_array_equal(np.asarray(view), expected)
        views.pop(0)
        before.pop(0)
        del view
    assert address in {get_address(allocate(pool)) for _ in range(MAX_FREE_BLOCKS)}


def test_arrays_that_live_at_once_do_not_overlap() -> None:
    """Every live array has its own block."""
    pool = ResultBufferPool()
    arrays = [allocate(pool) for _ in range(4)]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


@pytest.mark.parametrize("nbytes", [0, 4, MIN_NBYTES - 4, MAX_NBYTES + 4])
def test_small_and_huge_arrays_are_plain(nbytes: int) -> None:
    """Arrays that are too small or too large for the pool are NumPy's own."""
    assert ResultBufferPool().empty((nbytes // 4,), F32).flags.owndata


def test_a_block_is_not_wasted() -> None:
    """A block is reused for arrays that fill a good part of it; larger arrays get a new one."""
    pool = ResultBufferPool()
    array = allocate(pool, MAX_WASTE * N)
    address = get_address(array)
    del array
    assert get_address(allocate(pool, MAX_WASTE * N + 4)) != address
    assert get_address(allocate(pool, N)) == address
    pool = ResultBufferPool()
    array = allocate(pool, 2 * MAX_WASTE * N)
    address, block = get_address(array), get_block(array)
    del array
    assert get_address(allocate(pool, N)) != address
    assert block() is not None  # it is kept for one of its size


def test_few_blocks_are_kept() -> None:
    """Of many blocks that return, the last ones are kept."""
    pool = ResultBufferPool()
    arrays = [allocate(pool) for _ in range(MAX_FREE_BLOCKS + 2)]
    blocks = [get_block(array) for array in arrays]
    while arrays:
        arrays.pop(0)
    assert [block() is not None for block in blocks] == [False] * 2 + [True] * MAX_FREE_BLOCKS


def test_released_memory_is_gone() -> None:
    """Free blocks are freed at once, others with their arrays."""
    pool = ResultBufferPool()
    free, kept = allocate(pool), allocate(pool)
    blocks = get_block(free), get_block(kept)
    del free
    pool.release()
    assert [block() is not None for block in blocks] == [False, True]
    del kept
    assert blocks[1]() is None


def make_wide_model() -> torch.nn.Module:
    """Make a model whose output for 2,000 rows takes 2 MB."""
    torch.manual_seed(5)
    return torch.nn.Linear(4, 256)


def test_calls_share_memory_while_the_cluster_is_kept(two_cpus: list[str]) -> None:
    """The next output uses the memory of the last one unless a view is left, and ``close`` frees it."""
    model, x = make_wide_model(), np.random.default_rng(1).standard_normal((2000, 4), np.float32)
    di.predict(model, x, devices=two_cpus)  # from here on the cluster runs
    first = di.predict(model, x, devices=two_cpus)
    block = get_block(first)
    assert block() is not None
    address, kept, expected = get_address(first), first[::3], np.array(first[::3])
    del first
    second = di.predict(model, -x, devices=two_cpus)
    assert get_address(second) != address
    np.testing.assert_array_equal(kept, expected)
    del kept
    third = di.predict(model, x, devices=two_cpus)
    assert get_address(third) == address
    np.testing.assert_array_equal(third[::3], expected)
    del third
    di.close()
    assert block() is None
    with torch.inference_mode():
        np.testing.assert_allclose(second, model(torch.from_numpy(-x)).numpy(), rtol=1e-5, atol=1e-6)


def test_calls_on_external_clusters_keep_nothing(cluster_client: Client) -> None:
    """Without a managed cluster, whose end frees the blocks, outputs are NumPy's own arrays."""
    x = np.ones((2000, 4), np.float32)
    for _ in range(2):
        assert di.predict(make_wide_model(), x, client=cluster_client).flags.owndata
    assert di.predict(make_wide_model(), x, devices="inline").flags.owndata
