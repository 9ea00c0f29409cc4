"""When each device read, computed and wrote, in a bounded number of spans."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from daskinfer.core.chunks import ChunkStats
from daskinfer.diagnostics.timeline import MAX_SPANS, Span, Timeline


def stats_of(i: int, device: str = "cpu:0") -> ChunkStats:
    """The stats of the chunk of row ``i``: read for 1 s, computed for 2, written for 1."""
    times = {"read_began": 4.0 * i + 1, "ended": 4.0 * i + 5, "read_seconds": 1.0, "write_seconds": 1.0}
    return ChunkStats(i, i + 1, device, "", 1, 2.0, "w", began=4.0 * i + 2).with_timing(**times, waited_seconds=0.0)


def test_a_span_per_chunk() -> None:
    """As long as they are few, each chunk has a span of its own, device by device."""
    timeline = Timeline()
    for i, device in enumerate(["cpu:0", "cpu:1", "cpu:0"]):
        timeline.add(stats_of(i, device))
    assert [(span.device, span.start) for span in timeline.spans] == [("cpu:0", 0), ("cpu:0", 2), ("cpu:1", 1)]
    assert timeline.spans[1] == Span(
        "cpu:0", 2, 3, 1, 1, (9.0, 10.0), (10.0, 12.0), (12.0, 13.0), (10.0, 10.0), (10.0, 10.0)
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5 * MAX_SPANS), st.integers(1, 3))
def test_many_chunks_have_few_spans(n_chunks: int, n_devices: int) -> None:
    """However many chunks there are, the number of spans is bounded, and they contain all chunks, rows and times."""
    timeline = Timeline()
    for i in range(n_chunks):
        timeline.add(stats_of(i, f"cpu:{i % n_devices}"))
    spans = timeline.spans
    assert len(spans) <= MAX_SPANS
    assert sum(span.n_chunks for span in spans) == sum(span.n_rows for span in spans) == n_chunks
    for device in {span.device for span in spans}:
        own = [span for span in spans if span.device == device]
        assert all(before.stop <= after.start for before, after in itertools.pairwise(own))
        assert all(before.wrote[1] <= after.read[0] for before, after in itertools.pairwise(own))


def test_a_chunk_that_was_given_up_has_no_span() -> None:
    """For a chunk that was never computed, no times are known."""
    timeline = Timeline()
    timeline.add(ChunkStats(0, 1, "cpu:0", "", 0, 0.0, ""))
    assert timeline.spans == ()
