"""Rows and device weights in, chunks out; pure numbers, no Dask and no device.

Three steps: ``resolve_weights`` makes one number per device of whatever was typed, ``choose_batch_size`` chooses
the micro-batch, ``make_chunks`` cuts the rows. Chunks are whole cells of a grid that is anchored at global row 0, so the
bytes of an answer do not depend on how many devices share the work. A cell is a micro-batch, or a write-unit of the
output store.

All devices share one number of rounds. In a round each device gets a chunk in proportion to its weight, so the chunks
of a round end at about the same time, and whoever reads the answer in order does not wait for a device that lags rounds
behind. The last round is cut into a half and two quarters: when a weight was wrong, little is left to wait for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from math import isfinite
from numbers import Real

from daskinfer.core.chunks import Chunk
from daskinfer.errors import OptionError

CHUNK_NBYTES = 64 << 20  # bytes of rows in a chunk; measured: with 32 MiB a CNN over 0.5 GB takes 4 % longer
MIN_ROUNDS = 4  # rounds even where everything fits in one, so that there is something to move; arbitrary
KIND_SPEED_PRIORS = {
    "cuda": 8.0,
    "cpu": 1.0,
    "inline": 1.0,
}  # rows per unit of time; arbitrary prior until a run measured it

_LAST_ROUND_ENDS = (2, 3, 4)  # where the parts of the last round end, in quarters of a round: a half and two quarters
_MAX_SHOWN_NAMES = 8  # device names that a message lists before it counts the rest


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """Which rows form which chunk: contiguous, in row order, each starting on a cell of the grid.

    ``cell_rows`` is a multiple of ``batch_size``; the two are equal unless a store's write-unit is larger.
    """

    n_rows: int
    batch_size: int
    cell_rows: int
    chunks: tuple[Chunk, ...]

    @property
    def row_chunks(self) -> tuple[int, ...]:
        """Rows of each chunk, as dask's ``chunks`` wants them for the first axis; ``(0,)`` where there is no row."""
        return tuple(chunk.n_rows for chunk in self.chunks) or (0,)

    def rows_per_device(self, n_devices: int) -> tuple[int, ...]:
        """Rows that each of ``n_devices`` devices gets."""
        rows = [0] * n_devices
        for chunk in self.chunks:
            rows[chunk.device_index] += chunk.n_rows
        return tuple(rows)

    def largest_chunks(self, n_devices: int) -> tuple[Chunk | None, ...]:
        """The first of each device's largest chunks; None for a device without any."""
        largest: list[Chunk | None] = [None] * n_devices
        for chunk in self.chunks:
            known = largest[chunk.device_index]
            if known is None or chunk.n_rows > known.n_rows:
                largest[chunk.device_index] = chunk
        return tuple(largest)

    def padded_rows(self, chunk: Chunk) -> int:
        """Rows that the network sees of a chunk: its last micro-batch is padded to the full shape."""
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
    Layout
        Chunks round by round, within a round in the devices' order.

    Raises
    ------
    OptionError
        If ``cell_rows`` is no multiple of ``batch_size``.

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
    for index, (_, device, n_cells) in enumerate(parts):
        stop = min(start + n_cells * cell_rows, n_rows)
        chunks.append(Chunk(index, start, stop, device))
        start = stop
    return ChunkLayout(n_rows, batch_size, cell_rows, tuple(chunks))


def assign_chunks(row_chunks: Sequence[int], weights: Sequence[float], *, batch_size: int) -> ChunkLayout:
    """Keep chunks that are cut already, and give each to the device that is furthest behind its share.

    Chunks need not start on the grid; a row keeps its place in its micro-batch all the same, at the price of a
    micro-batch more where a cell is cut in two.

    Examples
    --------
    >>> [chunk.device for chunk in assign_chunks((10, 10, 10, 10), [3.0, 1.0], batch_size=5).chunks]
    [0, 0, 0, 1]
    """
    given = [0] * len(weights)
    chunks, start = [], 0
    for index, n_rows in enumerate(row_chunks):
        # Who would be done first with this chunk on top; lighter devices therefore start late and never finish last.
        device = min(
            (d for d, weight in enumerate(weights) if weight > 0),
            key=lambda d: (given[d] + max(1, n_rows)) / weights[d],
        )
        given[device] += n_rows
        chunks.append(Chunk(index, start, start + n_rows, device))
        start += n_rows
    return ChunkLayout(start, batch_size, batch_size, tuple(chunks))


def _iter_round_cells(n_cells: int, n_rounds: int) -> Iterator[tuple[int, int]]:
    """One device's chunks as (part, cells): sizes differ by rounding only and the first part is the largest."""
    if n_cells < n_rounds:  # a cell is indivisible: spread them, and spend no time on rounds without one
        yield from ((n_rounds * cell // n_cells, 1) for cell in range(n_cells))
        return
    quarters = 4 * n_rounds
    ends = chain(range(4, quarters - 3, 4), (quarters - 4 + end for end in _LAST_ROUND_ENDS))
    done = 0
    for part, end in enumerate(ends):
        upto = -(-n_cells * end // quarters)  # rounded up, so that no later part can be larger than the first
        if upto > done:
            yield part, upto - done
        done = upto


def apportion(n_cells: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Share whole cells out by weight, exactly, by the method of largest remainders (Hamilton's).

    Each device gets its quota ``n_cells * weight / sum(weights)`` rounded down; cells left over go to the largest
    remainders, ties to the earlier device. A weight of 0 gets 0. One departure from Hamilton: where there are as many
    cells as devices of positive weight, none of these goes without; its cell comes from the device that is most over
    its quota and keeps one.

    Examples
    --------
    >>> apportion(10, [8.0, 1.0, 1.0]), apportion(10, [1e9, 1e-9]), apportion(1, [1.0, 2.0])
    ((8, 1, 1), (9, 1), (0, 1))
    """
    exact = [Fraction(weight) for weight in weights]  # floats would lose the light devices beside the heavy ones
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


def resolve_weights(
    weights: str | Sequence[float] | Mapping[str, float], names: Sequence[str], kinds: Sequence[str]
) -> tuple[float, ...]:
    """Make one weight per device of what was typed as ``device_weights``.

    Parameters
    ----------
    weights
        A list in the devices' order; a mapping by device (``"cuda:0"``) or kind (``"cuda"``, also called ``"gpu"``), in
        any letter case, where a device's own entry wins over its kind's; ``"even"``; or ``"auto"``: ``KIND_SPEED_PRIORS``.
    names, kinds
        Of each device, in order.

    Returns
    -------
    tuple of float
        Finite, none below 0, at least one above.

    Raises
    ------
    OptionError
        If a device gets no weight or no valid one, if an entry belongs to no device, or if all weights are 0.

    Examples
    --------
    >>> resolve_weights({"GPU": 8, "cuda:1": 4, "cpu": 1}, ["cuda:0", "cuda:1", "cpu:0"], ["cuda", "cuda", "cpu"])
    (8.0, 4.0, 1.0)
    """
    plain = getattr(weights, "tolist", lambda: weights)()  # arrays and tensors
    if isinstance(plain, str) and plain in ("even", "auto"):
        found: list[object] = [1.0 if plain == "even" else KIND_SPEED_PRIORS[kind] for kind in kinds]
    elif isinstance(plain, Mapping):
        found = _resolve_weight_mapping(plain, names, kinds)
    elif isinstance(plain, Sequence) and not isinstance(plain, str | bytes):
        found = list(plain)
    else:
        raise OptionError(
            f"device_weights is {weights!r}; allowed are 'auto', 'even', a list in the devices' order "
            f"and a mapping by device or kind. Give one number for each of {_format_names(names)}."
        )
    if len(found) != len(names):
        raise OptionError(
            f"device_weights has {len(found)} entries for {len(names)} devices ({_format_names(names)}). "
            "Give one per device, in this order; 0 leaves a device out."
        )
    checked = tuple(_check_weight(name, weight) for name, weight in zip(names, found, strict=True))
    if not any(checked):
        raise OptionError(
            f"device_weights are all 0 ({_format_names(names)}); at least one must be above 0. Give one a weight of 1."
        )
    return checked


def _resolve_weight_mapping(weights: Mapping[str, float], names: Sequence[str], kinds: Sequence[str]) -> list[object]:
    known = {_normalize_device_name(word) for word in (*names, *kinds)}
    by_word: dict[str, object] = {}
    for key, weight in weights.items():
        word = _normalize_device_name(key)
        if word not in known:
            raise OptionError(
                f"device_weights has an entry {key!r} that matches no device; the devices are {_format_names(names)}. "
                "Take the entry out, or add the device to devices."
            )
        if word in by_word:
            raise OptionError(f"device_weights has two entries for {word!r}, {key!r} is one; allowed is one. Take one out.")
        by_word[word] = weight
    for name, kind in zip(names, kinds, strict=True):
        if _normalize_device_name(name) not in by_word and _normalize_device_name(kind) not in by_word:
            raise OptionError(
                f"device_weights has no entry for {name}; every device needs one. Add {name!r} or {kind!r}; 0 leaves it out."
            )
    return [
        by_word.get(_normalize_device_name(name), by_word.get(_normalize_device_name(kind)))
        for name, kind in zip(names, kinds, strict=True)
    ]


def _normalize_device_name(name: object) -> str:
    folded = str(name).strip().lower()
    kind, colon, number = folded.partition(":")
    return f"cuda{colon}{number}" if kind == "gpu" else folded


def _check_weight(name: str, weight: object) -> float:
    if isinstance(weight, Real) and not isinstance(weight, bool):
        try:
            value = float(weight)
        except OverflowError:
            value = float("inf")
        if isfinite(value) and value >= 0:
            return value
    raise OptionError(f"the weight of {name} is {weight!r}; allowed are finite numbers from 0. Use 0 to leave {name} out.")


def _format_names(names: Sequence[str]) -> str:
    rest = len(names) - _MAX_SHOWN_NAMES
    return ", ".join(names[:_MAX_SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _check_cell_rows(cell_rows: int, batch_size: int) -> int:
    if cell_rows % batch_size:
        divisor = next(rows for rows in range(min(batch_size, cell_rows), 0, -1) if cell_rows % rows == 0)
        raise OptionError(
            f"the output's write-units (its chunks or shards) hold {cell_rows} rows at batch_size={batch_size}; "
            f"they must hold whole micro-batches. Use batch_size={divisor} (--batch-size)."
        )
    return cell_rows


def fit_chunk_nbytes(memory_limits: Sequence[int], model_nbytes: int) -> int:
    """Bytes that a chunk may take on the device with the least memory: ``CHUNK_NBYTES``, or less where that is short.

    ``limits`` are free bytes per device, 0 where unknown. With this as ``make_chunks``'s ``chunk_nbytes``, what is still
    too large is a single cell, and only a smaller batch size or write-unit helps.

    Examples
    --------
    >>> fit_chunk_nbytes([0, 5000], model_nbytes=1000), fit_chunk_nbytes([0], model_nbytes=1000) == CHUNK_NBYTES
    (4000, True)
    """
    return max(1, min([CHUNK_NBYTES, *(limit - model_nbytes for limit in memory_limits if limit)]))
