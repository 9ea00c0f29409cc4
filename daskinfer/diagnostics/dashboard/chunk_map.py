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
UNKNOWN = 255  # the device of a cell where none was: its rows wait, or earlier calls computed them
_FULL = 100  # what a cell's parts are told in: percent of its rows


@dataclass(frozen=True, slots=True)
class Cells:
    """A picture of ``n_rows`` rows from ``start``: cell i stands for an even share of them; the fields have a byte per cell.

    ``done``, ``in_flight`` and ``failed`` are percent of the cell's rows, what is left of them waits; ``again`` is percent
    of rows that came back without an answer and are tried again. ``device`` is the number of the last device that was
    there, ``UNKNOWN`` where none was.
    """

    start: int = 0
    n_rows: int = 0
    done: bytes = b""
    in_flight: bytes = b""
    failed: bytes = b""
    again: bytes = b""
    device: bytes = b""


class ChunkMap:
    """Counts ``rows`` (start, stop) by cell and state as chunks begin and end; earlier calls have ``computed`` some.

    Devices are numbers from 0; from ``UNKNOWN`` on they are not told apart. Not for several threads at a time.
    """

    def __init__(self, rows: Range, computed: Ranges = ()) -> None:
        self.start, n_rows = rows[0], rows[1] - rows[0]
        self.n_rows = n_rows
        n_cells = min(N_CELLS, n_rows)
        self._edges = [i * n_rows // n_cells for i in range(n_cells + 1)] if n_cells else [0]
        self._done = [0] * n_cells
        self._in_flight = [0] * n_cells
        self._failed = [0] * n_cells
        self._again = [0] * n_cells
        self._device = bytearray([UNKNOWN]) * n_cells
        for start, stop in computed:
            for cell, n_done in self._parts(start, stop):
                self._done[cell] += n_done

    def began(self, event: ChunkStarted, device: int) -> None:
        """A chunk is on its way."""
        for cell, n_rows in self._parts(event.start, event.stop):
            self._in_flight[cell] += n_rows
            self._device[cell] = min(device, UNKNOWN)

    def came_back(self, event: ChunkFailed) -> None:
        """It came back without an answer."""
        for cell, n_rows in self._parts(event.start, event.stop):
            self._in_flight[cell] -= n_rows
            self._again[cell] += n_rows

    def done(self, event: ChunkDone, device: int) -> None:
        """It needs nothing more: its rows have their answer, or failed for good."""
        given_up = event.receipt.given_up  # and so has come back before
        for cell, n_rows in self._parts(event.start, event.stop):
            self._in_flight[cell] -= 0 if given_up else n_rows
            self._done[cell] += n_rows
            self._device[cell] = min(device, UNKNOWN)
            if given_up or event.attempts > 1:
                self._again[cell] = max(0, self._again[cell] - n_rows)
        for failure in event.failures:
            for cell, n_rows in self._parts(failure.start, failure.stop):
                self._done[cell] -= n_rows
                self._failed[cell] += n_rows

    def ended(self) -> None:
        """Nothing is on its way any more."""
        self._in_flight = [0] * len(self._in_flight)

    def cells(self) -> Cells:
        """The picture as it is now."""
        done, in_flight, failed, again = map(self._percent, (self._done, self._in_flight, self._failed, self._again))
        return Cells(self.start, self.n_rows, done, in_flight, failed, again, bytes(self._device))

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The cells that rows ``start:stop`` lie in, and how many rows in each."""
        edges, start, stop = self._edges, start - self.start, min(stop - self.start, self.n_rows)
        cell = bisect_right(edges, start) - 1
        while start < stop:
            end = min(stop, edges[cell + 1])
            yield cell, end - start
            start, cell = end, cell + 1

    def _percent(self, counts: list[int]) -> bytes:
        """Percent of each cell's rows; what is there is never nothing, and what is missing is never all."""
        widths = (after - before for before, after in zip(self._edges, self._edges[1:], strict=False))
        return bytes(_share(count, width) for count, width in zip(counts, widths, strict=True))


def _share(count: int, width: int) -> int:
    if count <= 0:
        return 0
    return _FULL if count >= width else min(_FULL - 1, max(1, count * _FULL // width))
