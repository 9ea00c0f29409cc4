"""Memory of answers: it serves the next call, and never two arrays at once."""

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


def lent(memory: ResultBufferPool, n_items: int = N) -> Array:
    """An array of four columns."""
    return memory.empty((n_items // 4, 4), F32)


def address(array: Any) -> int:
    """Where an array begins."""
    return int(np.asarray(array).__array_interface__["data"][0])


def block_of(array: Array) -> weakref.ref[Array]:
    """The block that an array lies in, as long as somebody holds it."""
    base: Any = array.base
    return weakref.ref(base.base.obj)


def test_memory_comes_back() -> None:
    """What was let go serves the next array, of another shape and dtype too."""
    memory = ResultBufferPool()
    first = lent(memory)
    place = address(first)
    del first
    assert address(memory.empty((N // 2,), np.dtype("float64"))) == place


def test_an_array_is_as_any_other() -> None:
    """It can be written, pickled and stored, and has the shape and dtype that were asked for."""
    array = lent(ResultBufferPool())
    array[...] = 3
    assert (array.shape, array.dtype, array.flags.c_contiguous, array.flags.writeable) == ((N // 4, 4), F32, True, True)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(array)), array)


@given(names=st.lists(st.sampled_from([*VIEWS]), min_size=1, max_size=3))
def test_what_is_seen_is_not_lent_again(names: list[str]) -> None:
    """As long as anything of an array is left, its memory is nobody else's."""
    memory = ResultBufferPool()
    array: Any = lent(memory)
    array[...] = 7
    place = address(array)
    views = [VIEWS[name](array) for name in names]
    before = [np.asarray(view).copy() for view in views]
    del array
    while views:
        other = lent(memory)
        other[...] = -1
        assert address(other) != place
        for view, expected in zip(views, before, strict=True):
            np.testing.assert_array_equal(np.asarray(view), expected)
        views.pop(0)
        before.pop(0)
        del view
    assert place in {address(lent(memory)) for _ in range(MAX_FREE_BLOCKS)}


def test_arrays_that_live_at_once_do_not_overlap() -> None:
    """Each array that is alive has its own block."""
    memory = ResultBufferPool()
    arrays = [lent(memory) for _ in range(4)]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


@pytest.mark.parametrize("nbytes", [0, 4, MIN_NBYTES - 4, MAX_NBYTES + 4])
def test_small_and_huge_arrays_are_plain(nbytes: int) -> None:
    """What the heap has ready, and what is too much to keep, is NumPy's."""
    assert ResultBufferPool().empty((nbytes // 4,), F32).flags.owndata


def test_a_block_is_not_wasted() -> None:
    """A block serves arrays that fill a good part of it, and larger ones get their own."""
    memory = ResultBufferPool()
    array = lent(memory, MAX_WASTE * N)
    place = address(array)
    del array
    assert address(lent(memory, MAX_WASTE * N + 4)) != place
    assert address(lent(memory, N)) == place
    memory = ResultBufferPool()
    array = lent(memory, 2 * MAX_WASTE * N)
    place, block = address(array), block_of(array)
    del array
    assert address(lent(memory, N)) != place
    assert block() is not None  # it waits for one of its size


def test_few_blocks_are_kept() -> None:
    """Of many that come back the last are kept."""
    memory = ResultBufferPool()
    arrays = [lent(memory) for _ in range(MAX_FREE_BLOCKS + 2)]
    blocks = [block_of(array) for array in arrays]
    while arrays:
        arrays.pop(0)
    assert [block() is not None for block in blocks] == [False] * 2 + [True] * MAX_FREE_BLOCKS


def test_released_memory_is_gone() -> None:
    """Blocks that are free go at once, those that are lent with their arrays."""
    memory = ResultBufferPool()
    free, kept = lent(memory), lent(memory)
    blocks = block_of(free), block_of(kept)
    del free
    memory.release()
    assert [block() is not None for block in blocks] == [False, True]
    del kept
    assert blocks[1]() is None


def wide() -> torch.nn.Module:
    """A network whose answer to 2,000 rows takes 2 MB."""
    torch.manual_seed(5)
    return torch.nn.Linear(4, 256)


def test_calls_share_memory_where_the_cluster_is_kept(two_cpus: list[str]) -> None:
    """The next answer lies where the last one did, a part of an answer stays what it is, and ``close`` lets go of all."""
    net, x = wide(), np.random.default_rng(1).standard_normal((2000, 4), np.float32)
    di.predict(net, x, devices=two_cpus)  # the cluster is there from here on
    first = di.predict(net, x, devices=two_cpus)
    block = block_of(first)
    assert block() is not None
    place, kept, expected = address(first), first[::3], np.array(first[::3])
    del first
    second = di.predict(net, -x, devices=two_cpus)
    assert address(second) != place
    np.testing.assert_array_equal(kept, expected)
    del kept
    third = di.predict(net, x, devices=two_cpus)
    assert address(third) == place
    np.testing.assert_array_equal(third[::3], expected)
    del third
    di.close()
    assert block() is None
    with torch.inference_mode():
        np.testing.assert_allclose(second, net(torch.from_numpy(-x)).numpy(), rtol=1e-5, atol=1e-6)


def test_calls_on_clusters_of_others_keep_nothing(cluster_client: Client) -> None:
    """Where nobody says when it is over, answers are NumPy's own."""
    x = np.ones((2000, 4), np.float32)
    for _ in range(2):
        assert di.predict(wide(), x, client=cluster_client).flags.owndata
    assert di.predict(wide(), x, devices="inline").flags.owndata
