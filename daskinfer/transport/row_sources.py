"""What travels to a worker: a task's chunks, and where the rows of each port of each are; small and picklable.

One class per place where rows may be.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import dask
import numpy as np
from distributed import Future
from distributed.protocol.pickle import dumps, loads

from daskinfer.core.arrays import Array, ArraySource, RemoteArray
from daskinfer.core.chunks import Chunk
from daskinfer.transport.process_memory import ProcessMemoryArray
from daskinfer.transport.shared_memory import ArrayRef, PoolRef


@dataclass(frozen=True)
class TaskResources:
    """What a chunk has at hand: memory shared with the client, if any, what Dask brought, graphs that are computed."""

    shared_memory: mmap.mmap | None = None
    dependency_results: Sequence[Any] = ()
    graph_results: dict[int, dict[Hashable, Array]] = field(default_factory=dict)


class RowSource(Protocol):
    """Rows, (n, ...), that are fetched where they are needed."""

    def read_rows(self, resources: TaskResources) -> Array | RemoteArray: ...


class RowTransferError(Exception):
    """Rows have no way to their worker: it has just ended."""


class RowSender(Protocol):
    """How rows of this process get to a worker (``ways``)."""

    def send_rows(self, array: Array) -> RowSource: ...

    def add_dependency(self, future: Future) -> RowSource: ...


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
    """Rows that the client has put into shared memory; not copied."""

    array_ref: ArrayRef

    def read_rows(self, resources: TaskResources) -> Array:
        assert resources.shared_memory is not None  # the client asked for it before
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
    """Rows that are the result of another Dask task; ``position`` counts within what Dask brings."""

    position: int

    def read_rows(self, resources: TaskResources) -> Array:
        found: Array = resources.dependency_results[self.position]
        return found


@dataclass(frozen=True)
class GraphRows:
    """A block of a dask array: the tasks that lead to it, computed one after the other; ``leaves`` are where they begin.

    Ports of a chunk share one graph, which is computed once for all of their ``keys``; none: for this one alone.
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
        given, keys = (
            {key: _read_remote_rows(part.read_rows(resources)) for key, part in self.leaves.items()},
            list(self.keys or (self.key,)),
        )
        found = dask.get({**self.graph, **given}, keys)  # Dask's own scheduler, without threads
        return dict(zip(keys, found, strict=True))


def _read_remote_rows(rows: Array | RemoteArray) -> Array:
    """Rows as a graph takes them: what Dask brought as it is, which may be masked, or no array at all."""
    return np.asarray(rows) if isinstance(rows, RemoteArray) else rows


@dataclass(frozen=True)
class ChunkInput:
    """One chunk of a task: where its rows are, and where its answer goes in shared memory (None: it comes back)."""

    chunk: Chunk
    row_sources: tuple[RowSource, ...]
    output_refs: tuple[ArrayRef, ...] | None


@dataclass(frozen=True)
class Task:
    """Chunks for one worker; ``pool_ref`` and ``header_offset`` say where the receipts go. None: they come back.

    ``alone``: nothing else of its call is in flight on that device.
    """

    chunk_inputs: tuple[ChunkInput, ...]
    pool_ref: PoolRef | None = None
    header_offset: int = 0
    alone: bool = False

    def serialize(self) -> bytes:
        """As it travels: Dask keeps the last 1,000 messages; 64 chunks are 110 KB as objects and 3 KB so (measured)."""
        return zlib.compress(dumps(self), level=1)

    @classmethod
    def deserialize(cls, data: bytes) -> Task:
        """What :meth:`serialize` made bytes of."""
        task: Task = loads(zlib.decompress(data))
        return task
