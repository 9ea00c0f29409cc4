"""Memory of outputs, reused by the next call once the caller has dropped them.

Allocating fresh pages is expensive: the system clears each of them, and in a virtual machine the host may have to find it
first. Filling 80 MB took 13 to 205 ms with fresh pages, and 10 ms with used ones (measured, 2 cores), while the workers
wait for the core. So the larger arrays that ``predict`` returns are allocated in blocks, which return to this pool when the
last view is dropped, as long as the managed cluster is kept. Workers keep freed memory too (``worker.allocator``).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from daskinfer.cluster.process_cluster import default_cluster
from daskinfer.core.arrays import Array

MIN_NBYTES = 1 << 20  # smaller arrays come from the heap, whose pages are in use already; arbitrary
MAX_NBYTES = 512 << 20  # of a block that is kept; arbitrary, a caller who drops more wants it freed
MAX_FREE_BLOCKS = 2  # arbitrary, models with two outputs are common
MAX_WASTE = 2  # a block is used for arrays of at least half its size; arbitrary


class ResultBufferPool:
    """Blocks of memory for arrays that a caller gets, and returns by dropping them.

    Note: threads share it. A block returns in whichever thread drops the last reference, at any moment, so there is no lock:
    every access to the blocks is a single operation of a deque.

    Examples
    --------
    >>> pool = ResultBufferPool()
    >>> first = pool.empty((1 << 20,), np.dtype("float32"))
    >>> address = first.ctypes.data
    >>> del first
    >>> pool.empty((1 << 19, 2), np.dtype("float32")).ctypes.data == address
    True
    """

    def __init__(self) -> None:
        self._free: deque[Array] = deque(maxlen=MAX_FREE_BLOCKS)
        self._n_releases = 0

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
        """Return an array of this shape and dtype, of numbers, with arbitrary content."""
        n_items = prod(shape)
        nbytes = n_items * dtype.itemsize
        if not MIN_NBYTES <= nbytes <= MAX_NBYTES:
            return np.empty(shape, dtype)
        block = self._take_block(nbytes)
        # Through a memoryview: NumPy makes the array at the bottom the base of a view of a view, unless the bottom is no
        # array. So every view keeps this array alive, not only the block.
        array = np.frombuffer(memoryview(block), dtype, n_items)  # type: ignore[arg-type]  # any array is a buffer
        weakref.finalize(array, self._return_block, block, self._n_releases).atexit = False
        return array.reshape(shape)

    def release(self) -> None:
        """Free every block, now or once its array is dropped."""
        self._n_releases += 1
        self._free.clear()

    def _return_block(self, block: Array, n_releases: int) -> None:
        """Keep a block for the next array, unless the pool was released since the block was given out."""
        if n_releases == self._n_releases:
            self._free.append(block)

    def _take_block(self, nbytes: int) -> Array:
        """Return a block of at least so many bytes: one that was returned, or a new one."""
        for _ in range(MAX_FREE_BLOCKS):
            try:
                block = self._free.popleft()
            except IndexError:
                break
            if nbytes <= block.nbytes <= MAX_WASTE * nbytes:
                return block
            self._free.append(block)
        return np.empty(nbytes, np.uint8)


result_pool = ResultBufferPool()
default_cluster.add_release_callback(result_pool.release)
