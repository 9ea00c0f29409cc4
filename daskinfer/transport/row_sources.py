"""What travels to a worker: the chunks of a task, and where the rows of each port are. All of it is small and picklable.

There is one class per place where rows may be, and :class:`RowRouter`, which chooses among them for rows in the client.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import dask
import numpy as np
from distributed import Client, Future
from distributed.protocol.pickle import dumps, loads

from daskinfer.core.arrays import Array, ArraySource, RemoteArray
from daskinfer.core.chunks import Chunk
from daskinfer.transport.process_memory import ProcessMemoryArray, is_readable_by_peers
from daskinfer.transport.shared_memory import ArrayRef, PoolRef, Slot

MAX_INLINE_NBYTES = 64 << 10  # most bytes of rows that travel inside a task if no memory is shared; arbitrary


@dataclass(frozen=True)
class TaskResources:
    """What row sources read from on a worker.

    ``shared_memory`` is the client's pool, if the worker can attach to it; ``dependency_results`` are results of other Dask
    tasks; ``graph_results`` holds graphs that were computed for this chunk already, by the graph's id.
    """

    shared_memory: mmap.mmap | None = None
    dependency_results: Sequence[Any] = ()
    graph_results: dict[int, dict[Hashable, Array]] = field(default_factory=dict)


class RowSource(Protocol):
    """Where rows, (n, ...), are; they are read where they are needed."""

    def read_rows(self, resources: TaskResources) -> Array | RemoteArray:
        """Read the rows, or return an array that is read later."""


class RowTransferError(Exception):
    """Rows cannot be sent to their worker, which has just ended."""


@dataclass(frozen=True)
class FileRows:
    """Rows of a file, read by the worker."""

    source: ArraySource
    start: int
    stop: int

    def read_rows(self, resources: TaskResources) -> Array:
        return self.source[self.start : self.stop]


@dataclass(frozen=True)
class SharedMemoryRows:
    """Rows that the client has copied into shared memory; the worker does not copy them."""

    array_ref: ArrayRef

    def read_rows(self, resources: TaskResources) -> Array:
        assert resources.shared_memory is not None  # the client checked beforehand that the worker can attach
        return self.array_ref.get_array(resources.shared_memory)


@dataclass(frozen=True)
class ProcessMemoryRows:
    """Rows that stay in the client's memory until they are computed."""

    array: ProcessMemoryArray

    def read_rows(self, resources: TaskResources) -> RemoteArray:
        return self.array


@dataclass(frozen=True)
class InlineRows:
    """Rows that travel in the task, to workers that share no memory with the client."""

    array: Array

    def read_rows(self, resources: TaskResources) -> Array:
        return self.array


@dataclass(frozen=True)
class ScatteredRows:
    """Rows that are the result of another Dask task, at ``position`` among the task's dependencies."""

    position: int

    def read_rows(self, resources: TaskResources) -> Array:
        rows: Array = resources.dependency_results[self.position]
        return rows


@dataclass(frozen=True)
class GraphRows:
    """A block of a dask array: the tasks that lead to it, computed one after the other from the rows of ``leaves``.

    The ports of a chunk share one graph, which is computed once for all of their ``keys``; empty: for ``key`` only.
    """

    graph: Mapping[Hashable, Any]
    key: Hashable
    leaves: Mapping[Hashable, RowSource] = field(default_factory=dict)
    keys: tuple[Hashable, ...] = ()

    def read_rows(self, resources: TaskResources) -> Array:
        if id(self.graph) not in resources.graph_results:
            resources.graph_results[id(self.graph)] = self._compute_graph(resources)
        return resources.graph_results[id(self.graph)][self.key]

    def _compute_graph(self, resources: TaskResources) -> dict[Hashable, Array]:
        leaves = {key: _read_remote_rows(source.read_rows(resources)) for key, source in self.leaves.items()}
        keys = list(self.keys or (self.key,))
        blocks = dask.get({**self.graph, **leaves}, keys)  # Dask's synchronous scheduler
        return dict(zip(keys, blocks, strict=True))


def _read_remote_rows(rows: Array | RemoteArray) -> Array:
    """Return rows as a graph takes them; a dependency's result stays as it is, as it may be masked, or no array at all."""
    return np.asarray(rows) if isinstance(rows, RemoteArray) else rows


def is_shareable(array: Any) -> bool:
    """Return whether a worker that reads this process's memory can read the array in place."""
    return isinstance(array, np.ndarray) and array.flags.c_contiguous and is_readable_by_peers(array)


@dataclass(frozen=True)
class RowRouter:
    """How rows of this process reach one worker. First match wins:

    1. The worker reads this process's memory (``reads_process_memory``), and the rows are contiguous and readable by
       others: they stay where they are.
    2. The ``slot`` has room: they are copied into it.
    3. There is a ``client`` and the rows are large: Dask's comms send them to one of ``workers`` (addresses; empty: to any),
       through the scheduler unless the client reaches workers directly. The futures are in ``dependencies`` of the task.
    4. They travel inside the task.
    """

    client: Client | None = None
    slot: Slot | None = None
    workers: Sequence[str] = ()
    reads_process_memory: bool = False
    dependencies: list[Future] = field(default_factory=list)

    def send_rows(self, array: Array) -> RowSource:
        """Make rows available to the worker; an array that stays in place must not be freed before its task has ended."""
        if self.reads_process_memory and is_shareable(array):
            return ProcessMemoryRows(ProcessMemoryArray.from_array(array))
        if self.slot is not None and (ref := self.slot.allocate(array.shape, array.dtype)) is not None:
            ref.get_array(self.slot.pool.memory)[...] = array
            return SharedMemoryRows(ref)
        array = np.asarray(array, order="C")  # np.ascontiguousarray would make a 0-d array 1-d
        if self.client is None or array.nbytes <= MAX_INLINE_NBYTES:
            return InlineRows(array)
        try:
            return self.add_dependency(self.client.scatter(array, workers=list(self.workers) or None, hash=False))
        except (KeyError, OSError, TimeoutError) as error:  # the worker is gone, whether the scheduler has noticed or not
            raise RowTransferError(self.workers) from error

    def add_dependency(self, future: Future) -> RowSource:
        """Add a dependency of the task, once however many row sources refer to it."""
        if future not in self.dependencies:
            self.dependencies.append(future)
        return ScatteredRows(self.dependencies.index(future))


@dataclass(frozen=True)
class ChunkInput:
    """One chunk of a task: where its rows are, and where its outputs go in shared memory (None: they come back)."""

    chunk: Chunk
    row_sources: tuple[RowSource, ...]
    output_refs: tuple[ArrayRef, ...] | None


@dataclass(frozen=True)
class Task:
    """Chunks for one worker. ``pool_ref`` and ``header_offset`` say where the result headers go; None: they come back.

    ``alone``: nothing else of the call is in flight on that device.
    """

    chunk_inputs: tuple[ChunkInput, ...]
    pool_ref: PoolRef | None = None
    header_offset: int = 0
    alone: bool = False

    def serialize(self) -> bytes:
        """Return the bytes that travel: Dask keeps 1,000 messages; 64 chunks are 110 KB as objects, 3 KB so (measured)."""
        return zlib.compress(dumps(self), level=1)

    @classmethod
    def deserialize(cls, data: bytes) -> Task:
        """Restore a task from the bytes of :meth:`serialize`."""
        task: Task = loads(zlib.decompress(data))
        return task
