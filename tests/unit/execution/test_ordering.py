from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from daskinfer.core.chunks import Chunk, ChunkStats
from daskinfer.execution.ordering import ReorderBuffer
from daskinfer.execution.results import ChunkResult


def finished(start: int, stop: int) -> ChunkResult:
    """A chunk whose answer is the number of each row."""
    rows = np.arange(start, stop)
    return ChunkResult(Chunk(0, start, stop, 0), [rows, -rows], ChunkStats(start, stop, "cpu:0", "a CPU", 1, 0.1, "tcp://a"))


@given(sizes=st.lists(st.integers(1, 9), max_size=12), data=st.data())
def test_any_order_becomes_row_order(sizes: list[int], data: st.DataObject) -> None:
    """However chunks end, every block comes once, whole, in the order of its rows."""
    ends = itertools.pairwise(itertools.accumulate(sizes, initial=0))
    chunks = data.draw(st.permutations([finished(*rows) for rows in ends]))
    blocks = list(ReorderBuffer(10).iter_blocks(chunks))
    assert [len(rows) for rows, _ in blocks] == sizes
    assert [row for rows, _ in blocks for row in rows] == list(range(sum(sizes)))
    assert all((rows == -negative).all() for rows, negative in blocks)


def test_a_block_comes_as_soon_as_it_can() -> None:
    """A block whose turn it is comes before the next chunk is asked for, and brings those that waited for it."""
    asked: list[int] = []

    def ending() -> Iterator[ChunkResult]:
        for start in (4, 0, 2, 6):
            asked.append(start)
            yield finished(start, start + 2)

    seen = [(rows[0], list(asked)) for rows, _ in ReorderBuffer(10).iter_blocks(ending())]
    assert seen == [(0, [4, 0]), (2, [4, 0, 2]), (4, [4, 0, 2]), (6, [4, 0, 2, 6])]


def test_blocks_are_copies() -> None:
    """What is written later where an answer lay changes neither a block that was given nor one that waits."""
    late, early = finished(2, 4), finished(0, 2)

    def ending() -> Iterator[ChunkResult]:
        yield late
        late.arrays[0][:] = 99
        yield early
        early.arrays[0][:] = 99

    assert [rows.tolist() for rows, _ in ReorderBuffer(10).iter_blocks(ending())] == [[0, 1], [2, 3]]


def test_answers_in_files_make_blocks_without_arrays() -> None:
    """A chunk whose answer went into a file is a block without arrays."""
    chunk = finished(0, 2)
    assert list(ReorderBuffer(10).iter_blocks([ChunkResult(chunk.chunk, (), chunk.stats)])) == [[]]


def test_the_limit_moves_with_the_first_row_that_is_missing() -> None:
    """Chunks may begin up to so many rows after the first row that has not been given."""
    order = ReorderBuffer(10)
    blocks = order.iter_blocks(finished(start, start + 2) for start in (2, 0, 4))
    assert order.get_row_limit() == 10
    assert [(next(blocks)[0][0], order.get_row_limit()) for _ in range(3)] == [(0, 12), (2, 14), (4, 16)]
