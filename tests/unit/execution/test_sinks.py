"""Sinks: what they keep of a result, in which order they yield it, and that they copy memory that they do not own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daskinfer.cluster.placement import resolve_placement
from daskinfer.core.chunks import Chunk, ChunkResult, ChunkStats, RowFailure
from daskinfer.core.row_ranges import Range
from daskinfer.errors import ChunkError
from daskinfer.execution.sinks import ArraySink, StreamSink
from daskinfer.planning.build_job import RunArguments, build_job


def make_result(start: int, stop: int) -> ChunkResult:
    """Make the result of a chunk with two outputs: the number of each row, and its negative."""
    rows = np.arange(start, stop)
    return ChunkResult(Chunk(0, start, stop), [rows, -rows], ChunkStats(start, stop, "cpu:0", "a CPU", 1, 0.1, "tcp://a"))


def stream(sink: StreamSink, results: Iterable[ChunkResult]) -> Iterator[list[np.ndarray]]:
    """Write each result, and yield the blocks that are ready then."""
    for result in results:
        sink.write(result)
        yield from sink.pop_ready()


@given(sizes=st.lists(st.integers(1, 9), max_size=12), data=st.data())
def test_any_order_becomes_row_order(sizes: list[int], data: st.DataObject) -> None:
    """In whatever order chunks finish, each block is yielded once, whole, in the order of its rows."""
    ends = itertools.pairwise(itertools.accumulate(sizes, initial=0))
    chunks = data.draw(st.permutations([make_result(*rows) for rows in ends]))
    blocks = list(stream(StreamSink(10), chunks))
    assert [len(rows) for rows, _ in blocks] == sizes
    assert [row for rows, _ in blocks for row in rows] == list(range(sum(sizes)))
    assert all((rows == -negative).all() for rows, negative in blocks)


def test_a_block_comes_as_soon_as_it_can() -> None:
    """A block whose turn it is is yielded before the next result is requested, followed by those that waited for it."""
    requested: list[int] = []

    def iter_results() -> Iterator[ChunkResult]:
        for start in (4, 0, 2, 6):
            requested.append(start)
            yield make_result(start, start + 2)

    seen = [(rows[0], list(requested)) for rows, _ in stream(StreamSink(10), iter_results())]
    assert seen == [(0, [4, 0]), (2, [4, 0, 2]), (4, [4, 0, 2]), (6, [4, 0, 2, 6])]


def test_blocks_are_copies() -> None:
    """Memory that is overwritten later changes neither a block that was yielded nor one that is held back."""
    late, early = make_result(2, 4), make_result(0, 2)

    def iter_results() -> Iterator[ChunkResult]:
        yield late
        late.arrays[0][:] = 99
        yield early
        early.arrays[0][:] = 99

    assert [rows.tolist() for rows, _ in stream(StreamSink(10), iter_results())] == [[0, 1], [2, 3]]


def test_outputs_in_files_make_blocks_without_arrays() -> None:
    """A chunk whose outputs went into a file is a block without arrays."""
    chunk = make_result(0, 2)
    assert list(stream(StreamSink(10), [ChunkResult(chunk.chunk, (), chunk.stats)])) == [[]]


def test_the_limit_moves_with_the_first_missing_row() -> None:
    """Chunks may start up to ``max_rows_ahead`` rows after the first row that was not yielded yet."""
    sink = StreamSink(10)
    blocks = stream(sink, (make_result(start, start + 2) for start in (2, 0, 4)))
    assert sink.get_row_limit() == 10
    assert [(next(blocks)[0][0], sink.get_row_limit()) for _ in range(3)] == [(0, 12), (2, 14), (4, 16)]


def make_array_sink(n_rows: int) -> ArraySink:
    """Make the sink of a call that negates numbers in this process."""
    placement, _ = resolve_placement("inline", None)
    return ArraySink(build_job(np.negative, np.arange(float(n_rows)), RunArguments(placement)))


def write_negatives(sink: ArraySink, rows: Range, failures: tuple[RowFailure, ...] = ()) -> np.ndarray:
    """Write the result of some rows; return the array that it was given, as a slot that the next task overwrites."""
    slot = -np.arange(*map(float, rows))
    stats = ChunkStats(*rows, "inline", "", 1, 0.1, "")
    sink.write(ChunkResult(Chunk(0, *rows), [slot], stats, failures=failures))
    return slot


@given(cut=st.integers(1, 9))
def test_an_array_sink_copies(cut: int) -> None:
    """The memory of a result may be another task's as soon as write has returned."""
    sink = make_array_sink(10)
    for rows in ((cut, 10), (0, cut)):
        write_negatives(sink, rows)[:] = np.nan
    np.testing.assert_array_equal(sink.output, -np.arange(10.0))


def test_an_aborted_call_keeps_what_was_done() -> None:
    """The error holds the rows that were computed; those that failed or never ran are NaN, and not marked as done."""
    sink, error = make_array_sink(6), ChunkError("it broke")
    write_negatives(sink, (0, 4), (RowFailure(1, 2, "inline", "ValueError: a row"),))
    sink.abort(error)
    assert error.partial is not None
    assert error.partial.done.tolist() == [True, False, True, True, False, False]
    np.testing.assert_array_equal(error.partial.output, [0, np.nan, -2, -3, np.nan, np.nan])
    assert error.__notes__ == ["3 of 6 rows have an output: .partial.output, where .partial.done is True."]


@pytest.mark.parametrize("n_rows", [0, 1])
def test_an_empty_call_has_an_output(n_rows: int) -> None:
    """Without a result the output has its shape and dtype all the same."""
    output = make_array_sink(n_rows).output
    assert (output.shape, output.dtype) == ((n_rows,), np.float64)
