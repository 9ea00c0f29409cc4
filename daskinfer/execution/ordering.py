"""Blocks in the order of their rows, from chunks that end in any order.

Early blocks are held back, as many as the devices are ahead. How far they may be is bounded: no chunk begins that starts
``max_rows_ahead`` or more after the first row that is still missing. Whoever stops asking stops the devices too, once their
windows are full.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from daskinfer.core.arrays import Array
from daskinfer.execution.results import ChunkResult


class ReorderBuffer:
    """Puts finished chunks in order.

    Parameters
    ----------
    ahead_rows
        How many rows the devices may be ahead of the first that is missing.
    """

    def __init__(self, ahead_rows: int) -> None:
        self._ahead_rows = ahead_rows
        self._next_row = 0
        self._early: dict[int, tuple[int, list[Array]]] = {}  # by first row: the row after the last, and the arrays

    def get_row_limit(self) -> int:
        """The row at which no chunk may start yet."""
        return self._next_row + self._ahead_rows

    def iter_blocks(self, results: Iterable[ChunkResult]) -> Iterator[list[Array]]:
        """Each chunk's arrays, (n, *shape), as soon as all rows before them were given."""
        for one in results:
            # Copies: the memory that they lie in serves the next task.
            self._early[one.chunk.start] = one.chunk.stop, [np.array(array) for array in one.arrays]
            while self._next_row in self._early:
                self._next_row, arrays = self._early.pop(self._next_row)
                yield arrays
