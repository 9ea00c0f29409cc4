"""Builds tasks in the client: where the rows of a task come from, and where its outputs go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from distributed import Client, Future

from daskinfer.core.arrays import Array, RemoteArray, is_dask_array
from daskinfer.core.chunks import Chunk
from daskinfer.planning.inputs import Inputs
from daskinfer.transport.row_sources import ChunkInput, FileRows, RowRouter, RowSource, Task, TaskResources
from daskinfer.transport.shared_memory import ALIGN, Slot, compute_slot_nbytes

if TYPE_CHECKING:
    from daskinfer.execution.dask_inputs import DaskBlocks

MAX_INLINE_SPEC_NBYTES = 1 << 20  # a larger spec is sent to the cluster once instead of with each task; arbitrary


class SpecPublisher:
    """Returns the spec of a call as a task takes it: inline, or a future of it if it is large.

    A large spec is sent to the cluster once, and again if the workers that held it have died.
    """

    def __init__(self, client: Client, spec: bytes) -> None:
        self._client, self._spec = client, spec
        self._future: Future | None = None

    def __call__(self) -> Any:
        if len(self._spec) <= MAX_INLINE_SPEC_NBYTES:
            return self._spec
        if self._future is None or self._future.status != "finished":
            self._future = self._client.scatter(self._spec, broadcast=True, hash=False)
        return self._future


def _make_blocks(arrays: Sequence[Any], client: Client | None) -> DaskBlocks:
    from daskinfer.execution.dask_inputs import DaskBlocks  # imports dask.array

    return DaskBlocks(arrays, client)


class TaskBuilder:
    """Turns chunks into tasks.

    Parameters
    ----------
    inputs
        The ports and their arrays.
    outputs
        One empty array (0, *shape) per output that comes back; empty if workers write the outputs to files.
    row_chunks
        Rows of each chunk if any input is a dask array: the ``index`` of a chunk counts these.
    client
        Computes dask arrays that cannot be computed block by block. None: this process computes them.
    """

    def __init__(self, inputs: Inputs, outputs: Sequence[Array], row_chunks: Sequence[int], client: Client | None) -> None:
        self._arrays, self._client = inputs.arrays, client
        self._outputs = outputs
        lazy = [inputs.make_dask_array(array, row_chunks) for array in inputs.arrays if is_dask_array(array)]
        self._blocks = _make_blocks(lazy, client) if lazy else None

    def compute_slot_nbytes(self, n_rows: int, n_chunks: int) -> int:
        """Return the most bytes of shared memory that a task of so many rows in so many chunks needs."""
        inputs = [array for array in self._arrays if isinstance(array, np.ndarray)]
        n_leaves, row_nbytes = self._blocks.compute_leaf_sizes() if self._blocks else (0, 0)
        arrays = [*inputs, *self._outputs]
        row_nbytes += sum(int(np.prod(a.shape[1:], dtype=np.int64)) * a.dtype.itemsize for a in arrays)
        return compute_slot_nbytes(n_rows * row_nbytes + n_chunks * (n_leaves + len(arrays)) * ALIGN)

    def build_task(
        self, chunks: Sequence[Chunk], slot: Slot | None, workers: Sequence[str] = (), *, reads_process_memory: bool = False
    ) -> tuple[Task, list[Future]]:
        """Build a task of these chunks; return it with the futures that Dask has to bring with it.

        Rows in memory stay there if the worker ``reads_process_memory``, else they are copied into the slot; without a slot
        they are sent to one of ``workers`` (addresses; empty: to any).
        """
        router = RowRouter(self._client, slot, workers, reads_process_memory)
        chunk_inputs = tuple(
            ChunkInput(chunk, tuple(self._make_row_sources(chunk, router)), self._reserve_outputs(chunk, slot))
            for chunk in chunks
        )
        if slot is None:
            return Task(chunk_inputs), router.dependencies
        return Task(chunk_inputs, slot.pool.ref, slot.header_offset), router.dependencies

    def read_rows(self, chunk: Chunk) -> list[Array | RemoteArray]:
        """Read the rows of each port, (n, ...), in this process."""
        if self._blocks is None:
            return [array[chunk.start : chunk.stop] for array in self._arrays]
        router = RowRouter()
        sources = self._make_row_sources(chunk, router)
        resources = TaskResources(dependency_results=[future.result() for future in router.dependencies])
        return [source.read_rows(resources) for source in sources]

    def _make_row_sources(self, chunk: Chunk, router: RowRouter) -> list[RowSource]:
        blocks = iter(self._blocks.make_row_sources(chunk.index, router) if self._blocks else ())
        return [next(blocks) if is_dask_array(a) else _make_row_source(a, chunk, router) for a in self._arrays]

    def _reserve_outputs(self, chunk: Chunk, slot: Slot | None) -> Any:
        if slot is None or not self._outputs:
            return None
        refs = tuple(slot.allocate((chunk.n_rows, *o.shape[1:]), o.dtype) for o in self._outputs)
        return None if None in refs else refs


def _make_row_source(array: Any, chunk: Chunk, router: RowRouter) -> RowSource:
    if hasattr(array, "path"):
        return FileRows(array, chunk.start, chunk.stop)
    return router.send_rows(array[chunk.start : chunk.stop])
