"""Count the states of a run's rows in a bounded number of cells.

A run may have a million chunks and a screen has a thousand columns: rows are counted in ``N_CELLS`` cells of equal width,
so that each chunk costs two or three additions, and the whole map some kilobytes for any run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from daskinfer.core.row_ranges import Range, Ranges
from daskinfer.diagnostics.events import ChunkDone, ChunkFailed, ChunkStarted

N_CELLS = 400  # half of a screen's columns; arbitrary
UNKNOWN_DEVICE = 255  # of a cell without a device: its rows are pending, or earlier calls computed them
_FULL_PERCENT = 100  # the states of a cell are percentages of its rows


@dataclass(frozen=True, slots=True)
class CellStates:
    """The states of ``n_rows`` rows from ``start``: cell i stands for an even share of them; each field has a byte per cell.

    ``done``, ``in_flight`` and ``failed`` are percentages of the cell's rows, the rest is pending; ``retrying`` is the
    percentage whose last attempt failed and that are retried. ``device`` is the number of the last device that worked on
    the cell, ``UNKNOWN_DEVICE`` if none did.
    """

    start: int = 0
    n_rows: int = 0
    done: bytes = b""
    in_flight: bytes = b""
    failed: bytes = b""
    retrying: bytes = b""
    device: bytes = b""


class ChunkMap:
    """Counts ``rows`` (start, stop) by cell and state as chunks begin and end; ``computed`` are those of earlier calls.

    Devices are numbers from 0; those from ``UNKNOWN_DEVICE`` on are not told apart. Not thread-safe.
    """

    def __init__(self, rows: Range, computed: Ranges = ()) -> None:
        self.start = rows[0]
        self.n_rows = n_rows = rows[1] - rows[0]
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
        """Count a chunk as in flight."""
        for cell, n_rows in self._iter_cells(event.start, event.stop):
            self._in_flight[cell] += n_rows
            self._device[cell] = min(device, UNKNOWN_DEVICE)

    def mark_failed(self, event: ChunkFailed) -> None:
        """Count a chunk whose attempt failed as retrying."""
        for cell, n_rows in self._iter_cells(event.start, event.stop):
            self._in_flight[cell] -= n_rows
            self._retrying[cell] += n_rows

    def mark_done(self, event: ChunkDone, device: int) -> None:
        """Count a chunk as finished: its rows have their result, or failed for good."""
        given_up = event.stats.is_abandoned  # so its last attempt has been counted as failed
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
        """The run is over: nothing is in flight any more."""
        self._in_flight = [0] * len(self._in_flight)

    def get_cells(self) -> CellStates:
        """Return the states as they are now."""
        return CellStates(
            self.start,
            self.n_rows,
            done=self._encode_percent(self._done),
            in_flight=self._encode_percent(self._in_flight),
            failed=self._encode_percent(self._failed),
            retrying=self._encode_percent(self._retrying),
            device=bytes(self._device),
        )

    def _iter_cells(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the cells that contain rows ``start:stop``, and how many of the rows each contains."""
        edges, start, stop = self._edges, start - self.start, min(stop - self.start, self.n_rows)
        cell = bisect_right(edges, start) - 1
        while start < stop:
            end = min(stop, edges[cell + 1])
            yield cell, end - start
            start, cell = end, cell + 1

    def _encode_percent(self, counts: list[int]) -> bytes:
        """Convert counts to percentages of each cell's rows; 0 only if there are none, 100 only if it is all of them."""
        widths = (after - before for before, after in zip(self._edges, self._edges[1:], strict=False))
        return bytes(_compute_percent(count, width) for count, width in zip(counts, widths, strict=True))


def _compute_percent(count: int, width: int) -> int:
    if count <= 0:
        return 0
    return _FULL_PERCENT if count >= width else min(_FULL_PERCENT - 1, max(1, count * _FULL_PERCENT // width))
