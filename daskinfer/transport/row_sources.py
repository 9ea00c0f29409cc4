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

from daskinfer.core.arrays import Array, Elsewhere, Source
from daskinfer.core.chunks import Chunk
from daskinfer.transport.process_memory import Borrowed
from daskinfer.transport.shared_memory import ArenaRef, Place


@dataclass(frozen=True)
class Within:
    """What a chunk has at hand: memory shared with the client, if any, what Dask brought, graphs that are computed."""

    memory: mmap.mmap | None = None
    brought: Sequence[Any] = ()
    computed: dict[int, dict[Hashable, Array]] = field(default_factory=dict)


class Part(Protocol):
    """Rows, (n, ...), that are fetched where they are needed."""

    def rows(self, within: Within) -> Array | Elsewhere: ...


class UnsentError(Exception):
    """Rows have no way to their worker: it has just ended."""


class Taking(Protocol):
    """How rows of this process get to a worker (``ways``)."""

    def take(self, array: Array) -> Part: ...

    def bring(self, future: Future) -> Part: ...


@dataclass(frozen=True)
class FromFile:
    """Rows of a file, read by the worker."""

    source: Source
    start: int
    stop: int

    def rows(self, within: Within) -> Array:
        return self.source[self.start : self.stop]


@dataclass(frozen=True)
class FromSlot:
    """Rows that the client has put into shared memory; not copied."""

    place: Place

    def rows(self, within: Within) -> Array:
        assert within.memory is not None  # the client asked for it before
        return self.place.array(within.memory)


@dataclass(frozen=True)
class FromClient:
    """Rows that stay in the client's memory until they are computed."""

    borrowed: Borrowed

    def rows(self, within: Within) -> Elsewhere:
        return self.borrowed


@dataclass(frozen=True)
class Sent:
    """Rows that travel in the task, to workers that share no memory with the client."""

    array: Array

    def rows(self, within: Within) -> Array:
        return self.array


@dataclass(frozen=True)
class Brought:
    """Rows that are the result of another Dask task; ``position`` counts within what Dask brings."""

    position: int

    def rows(self, within: Within) -> Array:
        found: Array = within.brought[self.position]
        return found


@dataclass(frozen=True)
class FromGraph:
    """A block of a dask array: the tasks that lead to it, computed one after the other; ``leaves`` are where they begin.

    Ports of a chunk share one graph, which is computed once for all of their ``keys``; none: for this one alone.
    """

    graph: Mapping[Hashable, Any]
    key: Hashable
    leaves: Mapping[Hashable, Part] = field(default_factory=dict)
    keys: tuple[Hashable, ...] = ()

    def rows(self, within: Within) -> Array:
        if id(self.graph) not in within.computed:
            within.computed[id(self.graph)] = self._computed(within)
        return within.computed[id(self.graph)][self.key]

    def _computed(self, within: Within) -> dict[Hashable, Array]:
        given, keys = {key: _here(part.rows(within)) for key, part in self.leaves.items()}, list(self.keys or (self.key,))
        found = dask.get({**self.graph, **given}, keys)  # Dask's own scheduler, without threads
        return dict(zip(keys, found, strict=True))


def _here(rows: Array | Elsewhere) -> Array:
    """Rows as a graph takes them: what Dask brought as it is, which may be masked, or no array at all."""
    return np.asarray(rows) if isinstance(rows, Elsewhere) else rows


@dataclass(frozen=True)
class Piece:
    """One chunk of a task: where its rows are, and where its answer goes in shared memory (None: it comes back)."""

    chunk: Chunk
    parts: tuple[Part, ...]
    places: tuple[Place, ...] | None


@dataclass(frozen=True)
class Task:
    """Chunks for one worker; ``arena`` and ``note_offset`` say where the receipts go. None: they come back.

    ``alone``: nothing else of its call is in flight on that device.
    """

    pieces: tuple[Piece, ...]
    arena: ArenaRef | None = None
    note_offset: int = 0
    alone: bool = False

    def sealed(self) -> bytes:
        """As it travels: Dask keeps the last 1,000 messages; 64 chunks are 110 KB as objects and 3 KB so (measured)."""
        return zlib.compress(dumps(self), level=1)

    @classmethod
    def opened(cls, sealed: bytes) -> Task:
        """What :meth:`sealed` made bytes of."""
        task: Task = loads(zlib.decompress(sealed))
        return task
