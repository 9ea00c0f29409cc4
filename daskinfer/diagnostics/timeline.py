"""Record when each device read, computed and wrote: a run's chunks as spans of time, in bounded number.

No picture shows the bars of millions of chunks: beyond ``MAX_SPANS``, neighbours on a device are merged. What went wrong
meanwhile is marked, up to ``MAX_MARKS`` times.
"""

from __future__ import annotations

from dataclasses import dataclass

from daskinfer.core.chunks import ChunkStats
from daskinfer.diagnostics.events import ChunkFailed, DeviceChanged

MAX_SPANS = 4000  # about 1 MB; two thousand bars per device are more than a screen has columns
MAX_MARKS = 500  # more would cover the bars; arbitrary

Interval = tuple[float, float]  # begin and end, in seconds since 1970 by the worker's clock


@dataclass(frozen=True, slots=True)
class Span:
    """``n_rows`` of rows ``start:stop``, in ``n_chunks`` chunks on one device: when they were read, computed and written.

    ``loaded`` is when the device waited for the model to load, before it computed; ``first_call``, the first part of
    ``computed``, the model's first micro-batch in the process. Between merged chunks there may be rows of other devices. A
    stage that took no time, such as writing a result that stays in memory, ends when it begins.
    """

    device: str
    start: int
    stop: int
    n_chunks: int
    n_rows: int
    read: Interval
    computed: Interval
    wrote: Interval
    loaded: Interval = (0.0, 0.0)
    first_call: Interval = (0.0, 0.0)

    @staticmethod
    def from_chunk_stats(stats: ChunkStats) -> Span:
        """Make the span of one chunk.

        Examples
        --------
        >>> stats = ChunkStats(0, 8, "cpu:0", "", 4, 1.5, "", 0.5, 0.25, read_began=10.0, began=11.0, ended=13.0)
        >>> Span.from_chunk_stats(stats)
        Span(device='cpu:0', start=0, stop=8, n_chunks=1, n_rows=8,
             read=(10.0, 10.5), computed=(11.0, 12.5), wrote=(12.75, 13.0), loaded=(11.0, 11.0), first_call=(11.0, 11.0))
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
            (stats.began - stats.load_seconds, stats.began),
            (stats.began, stats.began + stats.first_call_seconds),
        )

    def merge(self, later: Span) -> Span:
        """Return both as one."""
        return Span(
            self.device,
            min(self.start, later.start),
            max(self.stop, later.stop),
            self.n_chunks + later.n_chunks,
            self.n_rows + later.n_rows,
            _merge_intervals(self.read, later.read),
            _merge_intervals(self.computed, later.computed),
            _merge_intervals(self.wrote, later.wrote),
            _keep_longer(self.loaded, later.loaded),
            _keep_longer(self.first_call, later.first_call),
        )


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened to a device ``at`` this time, in seconds since 1970 by the client's clock.

    ``kind`` is "failed attempt", "worker died", "worker restarted" or "device lost"; ``text`` says more.
    """

    device: str
    at: float
    kind: str
    text: str

    @staticmethod
    def from_event(event: ChunkFailed | DeviceChanged) -> Mark:
        """Make the mark of an event.

        Examples
        --------
        >>> Mark.from_event(ChunkFailed("a", 12.0, 0, 8, "cpu:0", "OSError: 5"))
        Mark(device='cpu:0', at=12.0, kind='failed attempt', text='rows 0:8: OSError: 5')
        """
        if isinstance(event, ChunkFailed):
            text = f"rows {event.start:,}:{event.stop:,}: {event.exception}"
            return Mark(event.device, event.at, "failed attempt", text[:MAX_MARK_CHARACTERS])
        return Mark(event.device, event.at, *_CHANGES.get(event.state, (event.state, "")))


MAX_MARK_CHARACTERS = 200  # of its text; arbitrary
_CHANGES = {
    "restarting": ("worker died", "it is being restarted"),
    "replaced": ("worker restarted", "it computes again"),
    "gone": ("device lost", "the other devices continue"),
}


class Timeline:
    """Collects a span per chunk, and merges neighbours if they become too many."""

    def __init__(self) -> None:
        self._by_device: dict[str, list[Span]] = {}
        self._n_spans = 0
        self.marks: list[Mark] = []

    def mark(self, event: ChunkFailed | DeviceChanged) -> None:
        """Add what went wrong."""
        if len(self.marks) < MAX_MARKS:
            self.marks.append(Mark.from_event(event))

    def add(self, stats: ChunkStats) -> None:
        """Add a finished chunk; for one that was given up no times are known, so it has no span."""
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
    """Merge every two neighbours into one."""
    pairs = [first.merge(second) for first, second in zip(spans[::2], spans[1::2], strict=False)]
    return [*pairs, *spans[len(pairs) * 2 :]]


def _merge_intervals(first: Interval, second: Interval) -> Interval:
    return min(first[0], second[0]), max(first[1], second[1])


def _keep_longer(first: Interval, second: Interval) -> Interval:
    """Return the longer one: a model loads once per process, and a merged interval would cover what was computed since."""
    return max(first, second, key=lambda interval: interval[1] - interval[0])
