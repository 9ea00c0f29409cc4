"""From a number of rows and device weights to chunks; pure numbers, no Dask and no device.

Three steps lead to chunks: ``resolve_weights`` gives one number per device, ``choose_batch_size`` the batch size, and
``make_chunks`` cuts the rows. Chunks are whole cells of a grid that is anchored at global row 0, so the bytes of the output
do not depend on how many devices share the work. A cell is a micro-batch, or a write unit of the output store.

All devices have the same number of rounds. In a round each device gets one chunk in proportion to its weight, so the
chunks of a round finish at about the same time, and a caller that reads the output in order does not wait for a device that
is rounds behind. The last round is cut into a half and two quarters: if a weight is wrong, little is left to wait for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain

from daskinfer.core.chunks import Chunk
from daskinfer.errors import OptionError

CHUNK_NBYTES = 64 << 20  # bytes of rows in a chunk; measured: with 32 MiB a CNN over 0.5 GB takes 4 % longer
MIN_ROUNDS = 4  # rounds even if everything fits in one, so that there is something to rebalance; arbitrary

_LAST_ROUND_ENDS = (2, 3, 4)  # where the parts of the last round end, in quarters of a round: a half and two quarters


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """Which rows form which chunk, and which device each chunk is assigned to.

    Chunks are contiguous, in row order, and start on a cell of the grid. ``devices`` is parallel to ``chunks`` and holds
    positions in the plan's list of devices. ``cell_rows`` is a multiple of ``batch_size``; the two are equal unless the
    write unit of an output store is larger.
    """

    n_rows: int
    batch_size: int
    cell_rows: int
    chunks: tuple[Chunk, ...]
    devices: tuple[int, ...]

    @classmethod
    def concatenate(cls, parts: Sequence[ChunkLayout]) -> ChunkLayout:
        """Join layouts of the same grid, one after the other, into one."""
        chunks: list[Chunk] = []
        start = 0
        for part in parts:
            chunks += [Chunk(len(chunks) + i, start + c.start, start + c.stop) for i, c in enumerate(part.chunks)]
            start += part.n_rows
        devices = tuple(chain.from_iterable(part.devices for part in parts))
        return cls(start, parts[0].batch_size, parts[0].cell_rows, tuple(chunks), devices)

    @property
    def row_chunks(self) -> tuple[int, ...]:
        """Rows of each chunk, in the form of dask's ``chunks`` for the first axis; ``(0,)`` if there are no rows."""
        return tuple(chunk.stop - chunk.start for chunk in self.chunks) or (0,)

    def rows_per_device(self, n_devices: int) -> tuple[int, ...]:
        """Return the rows that each of ``n_devices`` devices gets."""
        rows = [0] * n_devices
        for chunk, device in zip(self.chunks, self.devices, strict=True):
            rows[device] += chunk.stop - chunk.start
        return tuple(rows)

    def largest_chunks(self, n_devices: int) -> tuple[Chunk | None, ...]:
        """Return the first of each device's largest chunks; None for a device without any."""
        largest: list[Chunk | None] = [None] * n_devices
        for chunk, device in zip(self.chunks, self.devices, strict=True):
            previous = largest[device]
            if previous is None or chunk.stop - chunk.start > previous.stop - previous.start:
                largest[device] = chunk
        return tuple(largest)

    def padded_rows(self, chunk: Chunk) -> int:
        """Return the rows that the model computes for a chunk: its last micro-batch is padded to the full shape."""
        return -(-chunk.n_rows // self.batch_size) * self.batch_size


def make_chunks(
    n_rows: int,
    weights: Sequence[float],
    *,
    batch_size: int,
    cell_rows: int | None = None,
    row_nbytes: int = 0,
    chunk_nbytes: int = CHUNK_NBYTES,
) -> ChunkLayout:
    """Cut ``n_rows`` rows into chunks for devices of the given weights.

    Parameters
    ----------
    n_rows
        Rows of the input; 0 gives no chunks.
    weights
        One per device, as ``resolve_weights`` returns them.
    batch_size
        Rows of a micro-batch.
    cell_rows
        Rows of a grid cell, a multiple of ``batch_size``; None means ``batch_size``.
    row_nbytes
        Bytes that a row takes, input and output together; 0 means that bytes do not limit a chunk.
    chunk_nbytes
        Bytes that a chunk may hold; a chunk is never less than one cell.

    Returns
    -------
    ChunkLayout
        Chunks round by round, within a round in the order of the devices.

    Raises
    ------
    OptionError
        If ``cell_rows`` is not a multiple of ``batch_size``.

    Examples
    --------
    >>> layout = make_chunks(100, [3.0, 1.0], batch_size=5)
    >>> layout.row_chunks, layout.rows_per_device(2)
    ((20, 10, 20, 5, 20, 5, 10, 5, 5), (75, 25))
    """
    cell_rows = batch_size if cell_rows is None else _check_cell_rows(cell_rows, batch_size)
    cells = apportion(-(-n_rows // cell_rows), weights)
    cells_per_chunk = max(1, chunk_nbytes // (cell_rows * row_nbytes) if row_nbytes else max(cells))
    n_rounds = max(MIN_ROUNDS, -(-max(cells) // cells_per_chunk))
    parts = sorted((part, device, n) for device, c in enumerate(cells) for part, n in _iter_round_cells(c, n_rounds))
    chunks, start = [], 0
    for index, (_, _, n_cells) in enumerate(parts):
        stop = min(start + n_cells * cell_rows, n_rows)
        chunks.append(Chunk(index, start, stop))
        start = stop
    return ChunkLayout(n_rows, batch_size, cell_rows, tuple(chunks), tuple(device for _, device, _ in parts))


def assign_chunks(row_chunks: Sequence[int], weights: Sequence[float], *, batch_size: int) -> ChunkLayout:
    """Keep chunks that are cut already, and assign each to the device that is furthest behind its share.

    Chunks need not start on the grid. A row keeps its place in its micro-batch all the same, at the cost of one more
    micro-batch for each cell that is cut in two.

    Examples
    --------
    >>> assign_chunks((10, 10, 10, 10), [3.0, 1.0], batch_size=5).devices
    (0, 0, 0, 1)
    """
    assigned_rows = [0] * len(weights)
    chunks, devices, start = [], [], 0
    for index, n_rows in enumerate(row_chunks):
        # The device that would finish first with this chunk added; so lighter devices start late and never finish last.
        device = min(
            (d for d, weight in enumerate(weights) if weight > 0),
            key=lambda d: (assigned_rows[d] + max(1, n_rows)) / weights[d],
        )
        assigned_rows[device] += n_rows
        devices.append(device)
        chunks.append(Chunk(index, start, start + n_rows))
        start += n_rows
    return ChunkLayout(start, batch_size, batch_size, tuple(chunks), tuple(devices))


def _iter_round_cells(n_cells: int, n_rounds: int) -> Iterator[tuple[int, int]]:
    """Yield one device's chunks as (part, cells): sizes differ by rounding only, and the first part is the largest."""
    if n_cells < n_rounds:  # a cell is indivisible: spread them over the rounds, some of which get none
        yield from ((n_rounds * cell // n_cells, 1) for cell in range(n_cells))
        return
    quarters = 4 * n_rounds
    ends = chain(range(4, quarters - 3, 4), (quarters - 4 + end for end in _LAST_ROUND_ENDS))
    n_done = 0
    for part, end in enumerate(ends):
        upto = -(-n_cells * end // quarters)  # rounded up, so that no later part can be larger than the first
        if upto > n_done:
            yield part, upto - n_done
        n_done = upto


def apportion(n_cells: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Divide whole cells among devices by weight, exactly, by the method of largest remainders (Hamilton's).

    Each device gets its quota ``n_cells * weight / sum(weights)`` rounded down; remaining cells go to the largest
    remainders, ties to the earlier device. A weight of 0 gets 0. One departure from Hamilton: if there are at least as many
    cells as devices of positive weight, each of these gets one; it comes from the device that exceeds its quota most and
    keeps at least one.

    Examples
    --------
    >>> apportion(10, [8.0, 1.0, 1.0]), apportion(10, [1e9, 1e-9]), apportion(1, [1.0, 2.0])
    ((8, 1, 1), (9, 1), (0, 1))
    """
    exact = [Fraction(weight) for weight in weights]  # with floats, light devices would vanish beside heavy ones
    per_weight = n_cells / sum(exact, Fraction())
    quotas = [weight * per_weight for weight in exact]
    cells = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(cells)), key=lambda i: cells[i] - quotas[i])
    for i in by_remainder[: n_cells - sum(cells)]:
        cells[i] += 1
    if n_cells >= sum(weight > 0 for weight in exact):
        for i in [i for i, weight in enumerate(exact) if weight and not cells[i]]:
            giver = max((j for j, n in enumerate(cells) if n > 1), key=lambda j: cells[j] - quotas[j])
            cells[giver] -= 1
            cells[i] += 1
    return tuple(cells)


def _check_cell_rows(cell_rows: int, batch_size: int) -> int:
    if cell_rows % batch_size:
        divisor = next(rows for rows in range(min(batch_size, cell_rows), 0, -1) if cell_rows % rows == 0)
        raise OptionError(
            f"the rows of the output's write units (chunks or shards) must be a multiple of batch_size={batch_size}, "
            f"got {cell_rows}. Use batch_size={divisor} (--batch-size)."
        )
    return cell_rows


def fit_chunk_nbytes(memory_limits: Sequence[int], model_nbytes: int) -> int:
    """Return the bytes that a chunk may take on the device with the least memory, at most ``CHUNK_NBYTES``.

    ``memory_limits`` are free bytes per device, 0 if unknown. If ``make_chunks`` is called with the result as
    ``chunk_nbytes`` and a chunk is still too large, it is a single cell, and only a smaller batch size or write unit helps.

    Examples
    --------
    >>> fit_chunk_nbytes([0, 5000], model_nbytes=1000), fit_chunk_nbytes([0], model_nbytes=1000) == CHUNK_NBYTES
    (4000, True)
    """
    return max(1, min([CHUNK_NBYTES, *(limit - model_nbytes for limit in memory_limits if limit)]))
