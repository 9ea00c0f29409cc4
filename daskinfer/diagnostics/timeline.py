"""When each device read, computed and wrote: the chunks of a run as spans of time, boundedly many.

A run of millions of chunks has no picture with millions of bars: once there are ``MAX_SPANS``, neighbours on a device are
drawn as one.
"""

from __future__ import annotations

from dataclasses import dataclass

from daskinfer.core.chunks import ChunkStats

MAX_SPANS = 4000  # some 1 MB of them; two thousand bars per device are more than a screen has columns

Interval = tuple[float, float]  # when something began and ended, in seconds since 1970 by the worker's clock


@dataclass(frozen=True, slots=True)
class Span:
    """``n_rows`` of rows ``start:stop``, in ``n_chunks`` chunks on one device: when they were read, computed and written.

    Rows between chunks that are drawn as one may be another device's. What took no time, such as the writing of an answer
    that stays in memory, begins as it ends.
    """

    device: str
    start: int
    stop: int
    n_chunks: int
    n_rows: int
    read: Interval
    computed: Interval
    wrote: Interval

    @staticmethod
    def from_chunk_stats(stats: ChunkStats) -> Span:
        """The span of one chunk.

        Examples
        --------
        >>> Span.from_chunk_stats(Receipt(0, 8, "cpu:0", "", 4, 1.5, "", 0.5, 0.25, read_began=10.0, began=11.0, ended=13.0))
        Span(device='cpu:0', start=0, stop=8, n_chunks=1, n_rows=8,
             read=(10.0, 10.5), computed=(11.0, 12.5), wrote=(12.75, 13.0))
        """
        return Span(
            stats.device,
            stats.start,
            stats.stop,
            1,
            stats.stop - stats.start,
            (stats.read_began, stats.read_began + stats.read_seconds),
            (stats.began, stats.began + stats.seconds),
            (stats.ended - stats.write_seconds, stats.ended),
        )

    def merge(self, later: Span) -> Span:
        """Both as one."""
        return Span(
            self.device,
            min(self.start, later.start),
            max(self.stop, later.stop),
            self.n_chunks + later.n_chunks,
            self.n_rows + later.n_rows,
            _merge_intervals(self.read, later.read),
            _merge_intervals(self.computed, later.computed),
            _merge_intervals(self.wrote, later.wrote),
        )


class Timeline:
    """Collects spans as chunks end."""

    def __init__(self) -> None:
        self._by_device: dict[str, list[Span]] = {}
        self._n_spans = 0

    def add(self, stats: ChunkStats) -> None:
        """One more chunk is done; one that was given up took no time that is known."""
        if stats.is_abandoned:
            return
        self._by_device.setdefault(stats.device, []).append(Span.from_chunk_stats(stats))
        self._n_spans += 1
        if self._n_spans > MAX_SPANS:
            self._by_device = {device: _merge_neighbors(spans) for device, spans in self._by_device.items()}
            self._n_spans = sum(map(len, self._by_device.values()))

    @property
    def spans(self) -> tuple[Span, ...]:
        """All spans, device by device, in the order in which they ended."""
        return tuple(span for spans in self._by_device.values() for span in spans)


def _merge_neighbors(spans: list[Span]) -> list[Span]:
    """Every two neighbours as one."""
    pairs = [first.merge(second) for first, second in zip(spans[::2], spans[1::2], strict=False)]
    return [*pairs, *spans[len(pairs) * 2 :]]


def _merge_intervals(first: Interval, second: Interval) -> Interval:
    return min(first[0], second[0]), max(first[1], second[1])
