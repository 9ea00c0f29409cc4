"""The client's side of a task: where its rows come from, and where its answers go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dask.array as da
import numpy as np
from distributed import Client, Future

from daskinfer.core.arrays import Array, Elsewhere
from daskinfer.core.chunks import Chunk
from daskinfer.execution.dask_inputs import Blocks
from daskinfer.planning.inputs import Inputs
from daskinfer.transport.routing import Way
from daskinfer.transport.row_sources import FromFile, Part, Piece, Task, Within
from daskinfer.transport.shared_memory import ALIGN, Slot, slot_nbytes

MAX_ORDER_NBYTES = 1 << 20  # a larger order goes to the cluster once instead of with each task; arbitrary


class Errand:
    """The order of a call as its tasks take it; a large one is sent once, and again where it ended with its workers."""

    def __init__(self, client: Client, order: bytes) -> None:
        self._client, self._order = client, order
        self._future: Future | None = None

    def __call__(self) -> Any:
        if len(self._order) <= MAX_ORDER_NBYTES:
            return self._order
        if self._future is None or self._future.status != "finished":
            self._future = self._client.scatter(self._order, broadcast=True, hash=False)
        return self._future


class Feeder:
    """Turns chunks into tasks.

    Parameters
    ----------
    inputs
        The ports and their arrays.
    outputs
        One empty array (0, *shape) per output that comes back; none where workers write them to files.
    row_chunks
        How the rows are cut, where dask arrays are among the inputs: a chunk's ``index`` counts these.
    client
        Who computes a dask array that cannot be computed block by block. None: this process.
    """

    def __init__(self, inputs: Inputs, outputs: Sequence[Array], row_chunks: Sequence[int], client: Client | None) -> None:
        self._arrays, self._client = inputs.arrays, client
        self._outputs = outputs
        lazy = [inputs.cut_one(array, row_chunks) for array in inputs.arrays if isinstance(array, da.Array)]
        self._blocks = Blocks(lazy, client) if lazy else None

    def slot_nbytes(self, n_rows: int, n_chunks: int) -> int:
        """Bytes of shared memory that a task of so many rows in so many chunks needs at most."""
        inputs = [array for array in self._arrays if isinstance(array, np.ndarray)]
        n_leaves, row_nbytes = self._blocks.leaves() if self._blocks else (0, 0)
        arrays = [*inputs, *self._outputs]
        row_nbytes += sum(int(np.prod(a.shape[1:], dtype=np.int64)) * a.dtype.itemsize for a in arrays)
        return slot_nbytes(n_rows * row_nbytes + n_chunks * (n_leaves + len(arrays)) * ALIGN)

    def task(
        self, chunks: Sequence[Chunk], slot: Slot | None, workers: Sequence[str] = (), *, reads: bool = False
    ) -> tuple[Task, list[Future]]:
        """A task of these chunks and the futures that Dask has to bring with it.

        Rows in memory stay there if the worker ``reads`` them, else they are put into the slot; without a slot they are
        sent to one of ``workers`` (addresses; none: to any).
        """
        way = Way(self._client, slot, workers, reads)
        pieces = tuple(Piece(chunk, tuple(self._parts(chunk, way)), self._places(chunk, slot)) for chunk in chunks)
        if slot is None:
            return Task(pieces), way.brought
        return Task(pieces, slot.arena.ref, slot.note_offset), way.brought

    def rows(self, chunk: Chunk) -> list[Array | Elsewhere]:
        """The rows of each port in this process, (n, ...)."""
        way = Way()
        parts = self._parts(chunk, way)
        within = Within(brought=[future.result() for future in way.brought])
        return [part.rows(within) for part in parts]

    def _parts(self, chunk: Chunk, way: Way) -> list[Part]:
        blocks = iter(self._blocks.parts(chunk.index, way) if self._blocks else ())
        return [next(blocks) if isinstance(a, da.Array) else _part(a, chunk, way) for a in self._arrays]

    def _places(self, chunk: Chunk, slot: Slot | None) -> Any:
        if slot is None or not self._outputs:
            return None
        places = tuple(slot.place((chunk.n_rows, *o.shape[1:]), o.dtype) for o in self._outputs)
        return None if None in places else places


def _part(array: Any, chunk: Chunk, way: Way) -> Part:
    if hasattr(array, "path"):
        return FromFile(array, chunk.start, chunk.stop)
    return way.take(array[chunk.start : chunk.stop])
