"""What has become of the rows of a run, as a picture of boundedly many cells.

A run may have a million chunks and a screen has a thousand columns: rows are counted in ``N_CELLS`` cells of equal width,
so that one chunk more costs two or three additions, and the whole picture some kilobytes whatever the run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from daskinfer.core.row_ranges import Range, Ranges
from daskinfer.diagnostics.events import ChunkDone, ChunkFailed, ChunkStarted

N_CELLS = 400  # half a screen's columns; arbitrary
UNKNOWN_DEVICE = 255  # the device of a cell where none was: its rows wait, or earlier calls computed them
_FULL_PERCENT = 100  # what a cell's parts are told in: percent of its rows


@dataclass(frozen=True, slots=True)
class CellStates:
    """A picture of ``n_rows`` rows from ``start``: cell i stands for an even share of them; the fields have a byte per cell.

    ``mark_done``, ``in_flight`` and ``failed`` are percent of the cell's rows, what is left of them waits; ``retrying`` is percent
    of rows that came back without an answer and are tried again. ``device`` is the number of the last device that was
    there, ``UNKNOWN_DEVICE`` where none was.
    """

    start: int = 0
    n_rows: int = 0
    done: bytes = b""
    in_flight: bytes = b""
    failed: bytes = b""
    retrying: bytes = b""
    device: bytes = b""


class ChunkMap:
    """Counts ``rows`` (start, stop) by cell and state as chunks begin and end; earlier calls have ``computed`` some.

    Devices are numbers from 0; from ``UNKNOWN_DEVICE`` on they are not told apart. Not for several threads at a time.
    """

    def __init__(self, rows: Range, computed: Ranges = ()) -> None:
        self.start, n_rows = rows[0], rows[1] - rows[0]
        self.n_rows = n_rows
        n_cells = min(N_CELLS, n_rows)
        self._edges = [i * n_rows // n_cells for i in range(n_cells + 1)] if n_cells else [0]
        self._done = [0] * n_cells
        self._in_flight = [0] * n_cells
        self._failed = [0] * n_cells
        self._retrying = [0] * n_cells
        self._device = bytearray([UNKNOWN_DEVICE]) * n_cells
        for start, stop in computed:
            for cell, n_done in self._iter_cells(start, stop):
                self._done[cell] += n_done

    def mark_started(self, event: ChunkStarted, device: int) -> None:
        """A chunk is on its way."""
        for cell, n_rows in self._iter_cells(event.start, event.stop):
            self._in_flight[cell] += n_rows
            self._device[cell] = min(device, UNKNOWN_DEVICE)

    def mark_failed(self, event: ChunkFailed) -> None:
        """It came back without an answer."""
        for cell, n_rows in self._iter_cells(event.start, event.stop):
            self._in_flight[cell] -= n_rows
            self._retrying[cell] += n_rows

    def mark_done(self, event: ChunkDone, device: int) -> None:
        """It needs nothing more: its rows have their answer, or failed for good."""
        given_up = event.stats.is_abandoned  # and so has come back before
        for cell, n_rows in self._iter_cells(event.start, event.stop):
            self._in_flight[cell] -= 0 if given_up else n_rows
            self._done[cell] += n_rows
            self._device[cell] = min(device, UNKNOWN_DEVICE)
            if given_up or event.attempts > 1:
                self._retrying[cell] = max(0, self._retrying[cell] - n_rows)
        for failure in event.failures:
            for cell, n_rows in self._iter_cells(failure.start, failure.stop):
                self._done[cell] -= n_rows
                self._failed[cell] += n_rows

    def mark_ended(self) -> None:
        """Nothing is on its way any more."""
        self._in_flight = [0] * len(self._in_flight)

    def get_cells(self) -> CellStates:
        """The picture as it is now."""
        done, in_flight, failed, again = map(
            self._encode_percent, (self._done, self._in_flight, self._failed, self._retrying)
        )
        return CellStates(self.start, self.n_rows, done, in_flight, failed, again, bytes(self._device))

    def _iter_cells(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The cells that rows ``start:stop`` lie in, and how many rows in each."""
        edges, start, stop = self._edges, start - self.start, min(stop - self.start, self.n_rows)
        cell = bisect_right(edges, start) - 1
        while start < stop:
            end = min(stop, edges[cell + 1])
            yield cell, end - start
            start, cell = end, cell + 1

    def _encode_percent(self, counts: list[int]) -> bytes:
        """Percent of each cell's rows; what is there is never nothing, and what is missing is never all."""
        widths = (after - before for before, after in zip(self._edges, self._edges[1:], strict=False))
        return bytes(_compute_percent(count, width) for count, width in zip(counts, widths, strict=True))


def _compute_percent(count: int, width: int) -> int:
    if count <= 0:
        return 0
    return _FULL_PERCENT if count >= width else min(_FULL_PERCENT - 1, max(1, count * _FULL_PERCENT // width))
