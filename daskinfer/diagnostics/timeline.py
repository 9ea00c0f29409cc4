"""When each device read, computed and wrote: the chunks of a run as spans of time, boundedly many.

A run of millions of chunks has no picture with millions of bars: once there are ``MAX_SPANS``, neighbours on a device are
drawn as one.
"""

from __future__ import annotations

from dataclasses import dataclass

from daskinfer.core.chunks import Receipt

MAX_SPANS = 4000  # some 1 MB of them; two thousand bars per device are more than a screen has columns

Stretch = tuple[float, float]  # when something began and ended, in seconds since 1970 by the worker's clock


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
    read: Stretch
    computed: Stretch
    wrote: Stretch

    @staticmethod
    def of(receipt: Receipt) -> Span:
        """The span of one chunk.

        Examples
        --------
        >>> Span.of(Receipt(0, 8, "cpu:0", "", 4, 1.5, "", 0.5, 0.25, read_began=10.0, began=11.0, ended=13.0))
        Span(device='cpu:0', start=0, stop=8, n_chunks=1, n_rows=8,
             read=(10.0, 10.5), computed=(11.0, 12.5), wrote=(12.75, 13.0))
        """
        return Span(
            receipt.device,
            receipt.start,
            receipt.stop,
            1,
            receipt.stop - receipt.start,
            (receipt.read_began, receipt.read_began + receipt.read_seconds),
            (receipt.began, receipt.began + receipt.seconds),
            (receipt.ended - receipt.write_seconds, receipt.ended),
        )

    def joined(self, later: Span) -> Span:
        """Both as one."""
        return Span(
            self.device,
            min(self.start, later.start),
            max(self.stop, later.stop),
            self.n_chunks + later.n_chunks,
            self.n_rows + later.n_rows,
            _hull(self.read, later.read),
            _hull(self.computed, later.computed),
            _hull(self.wrote, later.wrote),
        )


class Timeline:
    """Collects spans as chunks end."""

    def __init__(self) -> None:
        self._by_device: dict[str, list[Span]] = {}
        self._n_spans = 0

    def add(self, receipt: Receipt) -> None:
        """One more chunk is done; one that was given up took no time that is known."""
        if receipt.given_up:
            return
        self._by_device.setdefault(receipt.device, []).append(Span.of(receipt))
        self._n_spans += 1
        if self._n_spans > MAX_SPANS:
            self._by_device = {device: _halved(spans) for device, spans in self._by_device.items()}
            self._n_spans = sum(map(len, self._by_device.values()))

    @property
    def spans(self) -> tuple[Span, ...]:
        """All spans, device by device, in the order in which they ended."""
        return tuple(span for spans in self._by_device.values() for span in spans)


def _halved(spans: list[Span]) -> list[Span]:
    """Every two neighbours as one."""
    pairs = [first.joined(second) for first, second in zip(spans[::2], spans[1::2], strict=False)]
    return [*pairs, *spans[len(pairs) * 2 :]]


def _hull(first: Stretch, second: Stretch) -> Stretch:
    return min(first[0], second[0]), max(first[1], second[1])
