"""Memory of answers, kept for the next call once the caller has let go of it.

Fresh memory is dear: the system empties every page of it, and under a virtual machine the host may have to find it first. To
fill 80 MB took 13 to 205 ms, 10 where the pages had been used before (measured, 2 cores); meanwhile the workers wait for the
core. So the larger arrays that ``predict`` gives lie in blocks that come back here when the last view of one is gone, as
long as our cluster is kept; what a worker frees is kept as well (``allocator``).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from daskinfer.core.arrays import Array

MIN_NBYTES = 1 << 20  # smaller ones come from the heap, whose pages are warm; arbitrary
MAX_NBYTES = 512 << 20  # of a block that is kept; arbitrary, who frees more means to have it back
MAX_FREE_BLOCKS = 2  # blocks: a network of two outputs is common; arbitrary
MAX_WASTE = 2  # a block serves an array of half its size, not of less; arbitrary


class ResultBufferPool:
    """Blocks of memory for arrays that a caller gets, and gives back by letting go of them.

    Note: threads share it. A block comes back in whichever thread drops the last reference, at any instant, so there is no
    lock: all that is done with the blocks here is one operation of a deque.

    Examples
    --------
    >>> memory = ResultBufferPool()
    >>> first = memory.empty((1 << 20,), np.dtype("float32"))
    >>> place = first.ctypes.data
    >>> del first
    >>> memory.empty((1 << 19, 2), np.dtype("float32")).ctypes.data == place
    True
    """

    def __init__(self) -> None:
        self._free: deque[Array] = deque(maxlen=MAX_FREE_BLOCKS)
        self._n_releases = 0

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
        """An array of this shape and dtype with any content; numbers only."""
        n_items = prod(shape)
        nbytes = n_items * dtype.itemsize
        if not MIN_NBYTES <= nbytes <= MAX_NBYTES:
            return np.empty(shape, dtype)
        block = self._take_block(nbytes)
        # Through a memoryview: NumPy lets a view of a view name what lies below both, unless that is no array. So every
        # view keeps this one alive.
        array = np.frombuffer(memoryview(block), dtype, n_items)  # type: ignore[arg-type]  # any array is a buffer
        weakref.finalize(array, self._return_block, block, self._n_releases).atexit = False
        return array.reshape(shape)

    def release(self) -> None:
        """Let go of every block, now or once its array is gone."""
        self._n_releases += 1
        self._free.clear()

    def _return_block(self, block: Array, n_releases: int) -> None:
        """Take a block back that was lent after so many releases."""
        if n_releases == self._n_releases:
            self._free.append(block)

    def _take_block(self, nbytes: int) -> Array:
        """A block of at least so many bytes, of those that came back or a new one."""
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
