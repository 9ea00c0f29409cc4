"""The blocks of dask arrays, one by one: what has to be computed for the rows of one chunk.

The driver computes through a window and hands each worker the few tasks that lead to its chunk, so neither the scheduler
nor a worker ever holds the whole graph. That is only right where the blocks are independent. Which way is taken, first
match wins:

1. Tasks that depend on no other, as a rule loads, are reached from the blocks at most ``MAX_REPEATS`` times each on
   average: block by block, in the workers; all ports of a chunk at once.
2. Otherwise (``x - x.mean(0)``: 1,679 loads block by block, 80 in one graph) the upstream is computed as one plain graph
   on the cluster first, and the chunks begin with its results.

In-memory arrays at the leaves of a graph go the way of every in-memory array (``ways``); one that many blocks read
goes to the cluster once, and again where it ended with the worker that had it. Of a memmap, which Dask keeps whole and
cuts in the tasks, each block is cut here: the file may be larger than a worker's memory.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask._task_spec import DataNode, Task, TaskRef  # Dask's own module for graphs; it has no public name for it
from dask.array.core import getter, getter_inline, getter_nofancy
from dask.core import get_dependencies
from distributed import Client, Future

from daskinfer.core.arrays import Array
from daskinfer.transport.row_sources import GraphRows, RowSender, RowSource, RowTransferError

logger = logging.getLogger(__name__)

MAX_REPEATS = 1.5  # times that a load may be done on average; arbitrary, below 2: a cut between two chunks shares one
SHARED_NBYTES = 1 << 20  # an array at a leaf that several chunks read and that is larger goes to the cluster once; arbitrary

_GETTERS = (getter, getter_inline, getter_nofancy)


class DaskBlocks:
    """The chunks of several dask arrays that are cut alike on axis 0, one block of each per chunk.

    Parameters
    ----------
    arrays
        One per port; chunks on later axes are put together.
    client
        Who computes an upstream whose blocks are not independent. None: Dask's threads, in this process.
    """

    def __init__(self, arrays: Sequence[da.Array], client: Client | None) -> None:
        arrays = [array.rechunk(dict.fromkeys(range(1, array.ndim), -1)) for array in arrays]
        self._client = client
        self._index_graph(arrays)
        if not self._has_independent_blocks():
            logger.debug("the blocks of the dask array depend on each other: its upstream is computed as one graph")
            arrays = client.persist(arrays) if client else list(dask.persist(*arrays, scheduler="threads"))
            self._index_graph(arrays)
        self._shared = self._scatter_shared_arrays()

    def make_row_sources(self, index: int, router: RowSender) -> list[RowSource]:
        """Where a worker finds block ``index`` of each port."""
        keys = [self._make_key(name, ndim, index) for name, ndim in self._names]
        nodes: dict[Hashable, Any] = {}
        for key in keys:
            nodes |= self._find_reachable(key)
        leaves = {k: leaf for k in nodes if (leaf := self._make_leaf_source(k, router)) is not None}
        graph = {k: node for k, node in nodes.items() if k not in leaves}
        computed = tuple(key for key in keys if key in graph)
        return [leaves[key] if key in leaves else GraphRows(graph, key, leaves, computed) for key in keys]

    def compute_leaf_sizes(self) -> tuple[int, int]:
        """How many arrays of this process a chunk begins with, and their bytes per row, read off the first that has rows."""
        index = next((index for index, n_rows in enumerate(self._row_chunks) if n_rows), 0)
        keys = self._find_chunk_keys(index) - self._shared.keys()
        arrays = [array for key in keys if (array := self._find_array(key)) is not None]
        return len(arrays), -(-sum(array.nbytes for array in arrays) // max(1, self._row_chunks[index]))

    def _index_graph(self, arrays: Sequence[da.Array]) -> None:
        self._names = [(array.name, array.ndim) for array in arrays]
        self._row_chunks = arrays[0].chunks[0]
        self._graph: dict[Hashable, Any] = {}
        for array in arrays:
            self._graph |= dict(array.__dask_graph__())

    def _make_key(self, name: str, ndim: int, index: int) -> Hashable:
        return (name, index, *(0,) * (ndim - 1))

    def _iter_chunk_keys(self) -> Iterator[set[Hashable]]:
        return (self._find_chunk_keys(index) for index in range(len(self._row_chunks)))

    def _find_chunk_keys(self, index: int) -> set[Hashable]:
        return set().union(*(self._find_reachable(self._make_key(name, ndim, index)) for name, ndim in self._names))

    def _find_reachable(self, key: Hashable) -> dict[Hashable, Any]:
        """The nodes of the graph that a block needs, itself included."""
        found, left = {}, [key]
        while left:
            key = left.pop()
            if key not in found:
                node = found[key] = self._graph[key]
                is_leaf = isinstance(node, Future) or self._find_array(key) is not None
                left += () if is_leaf else get_dependencies(self._graph, key)
        return found

    def _has_independent_blocks(self) -> bool:
        loads = {key for key in self._graph if self._is_load(key)}
        n_loads = 0
        for keys in self._iter_chunk_keys():
            n_loads += len(keys & loads)
            if n_loads > MAX_REPEATS * len(loads):
                return False
        return True

    def _is_load(self, key: Hashable) -> bool:
        node = self._graph[key]
        return not isinstance(node, Future | DataNode | np.ndarray) and not get_dependencies(self._graph, key)

    def _scatter_shared_arrays(self) -> dict[Hashable, Future]:
        if self._client is None:
            return {}
        large = {key for key in self._graph if (a := self._find_array(key)) is not None and a.nbytes > SHARED_NBYTES}
        if not large:
            return {}
        n_readers = Counter(key for keys in self._iter_chunk_keys() for key in keys if key in large)
        return {key: self._scatter_array(key) for key, n in n_readers.items() if n > 1}

    def _scatter_array(self, key: Hashable) -> Future:
        assert self._client is not None  # nothing is shared without one
        return self._client.scatter(self._find_array(key), hash=False)

    def _make_leaf_source(self, key: Hashable, router: RowSender) -> RowSource | None:
        if key in self._shared:
            if self._shared[key].status != "finished":
                try:
                    self._shared[key] = self._scatter_array(key)
                except (KeyError, OSError, TimeoutError) as error:  # no worker is there, or the chosen one has just ended
                    raise RowTransferError from error
            return router.add_dependency(self._shared[key])
        if isinstance(node := self._graph[key], Future):
            return router.add_dependency(node)
        array = self._find_array(key)
        return None if array is None else router.send_rows(array)

    def _find_array(self, key: Hashable) -> Array | None:
        """The array of this process that a node is, or is cut out of a memmap."""
        node = self._graph[key]
        if not isinstance(node, Task) or node.func not in _GETTERS:
            return _unwrap_array(node)
        source, cut = node.args[:2]
        whole = _unwrap_array(self._graph[source.key]) if isinstance(source, TaskRef) and isinstance(cut, DataNode) else None
        return node.func(whole, cut.value) if type(whole) is np.memmap else None


def _unwrap_array(node: Any) -> Array | None:
    value = node.value if isinstance(node, DataNode) else node
    # Others travel as they are: of a masked array the bytes are not all, of objects they are addresses in this process.
    return value if type(value) in (np.ndarray, np.memmap) and not value.dtype.hasobject else None
