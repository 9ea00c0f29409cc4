"""Dask arrays as inputs, block by block: what has to be computed for the rows of one chunk.

The window gives each worker only the few tasks that lead to its chunk, so neither the scheduler nor a worker ever holds the
whole graph. That is correct only if the blocks are independent. The first rule that matches decides:

1. Tasks without dependencies, usually loads, are reached from the blocks at most ``MAX_REPEATS`` times each on average:
   the workers compute block by block, all ports of a chunk at once.
2. Otherwise (``x - x.mean(0)``: 1,679 loads block by block, 80 in one graph) the upstream is first computed on the cluster
   as one plain graph, and the chunks start from its results.

Arrays in memory at the leaves of a graph travel like all arrays in memory (``transport.row_sources``); one that many blocks
read is sent to the cluster once, and again if it was lost with its worker. A memmap is kept whole by Dask and cut inside the
tasks, so each block of it is cut here instead: the file may be larger than a worker's memory.
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
from daskinfer.transport.row_sources import GraphRows, RowRouter, RowSource, RowTransferError

logger = logging.getLogger(__name__)

MAX_REPEATS = 1.5  # times that a load may run on average; arbitrary, below 2, as two chunks may share the load at their cut
SHARED_NBYTES = 1 << 20  # an array at a leaf that is larger and that several chunks read is sent once; arbitrary

_GETTERS = (getter, getter_inline, getter_nofancy)


class DaskBlocks:
    """The blocks of several dask arrays with the same chunks on axis 0; a chunk has one block of each.

    Parameters
    ----------
    arrays
        One per port; chunks on later axes are merged.
    client
        Computes an upstream whose blocks are not independent. None: Dask's threads compute it in this process.
    """

    def __init__(self, arrays: Sequence[da.Array], client: Client | None) -> None:
        arrays = [array.rechunk(dict.fromkeys(range(1, array.ndim), -1)) for array in arrays]
        self._client = client
        self._index_graph(arrays)
        if not self._has_independent_blocks():
            logger.debug("the blocks of the dask array depend on each other; computing its upstream as one graph")
            arrays = client.persist(arrays) if client else list(dask.persist(*arrays, scheduler="threads"))
            self._index_graph(arrays)
        self._shared = self._scatter_shared_arrays()

    def make_row_sources(self, index: int, router: RowRouter) -> list[RowSource]:
        """Return where a worker finds block ``index`` of each port."""
        keys = [self._make_key(name, ndim, index) for name, ndim in self._names]
        nodes: dict[Hashable, Any] = {}
        for key in keys:
            nodes |= self._find_reachable(key)
        leaves = {key: leaf for key in nodes if (leaf := self._make_leaf_source(key, router)) is not None}
        graph = {key: node for key, node in nodes.items() if key not in leaves}
        computed = tuple(key for key in keys if key in graph)
        return [leaves[key] if key in leaves else GraphRows(graph, key, leaves, computed) for key in keys]

    def compute_leaf_sizes(self) -> tuple[int, int]:
        """Count the arrays of this process that the first chunk with rows starts from, and sum their bytes per row."""
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
        """Return the nodes of the graph that a block needs, itself included."""
        nodes, unvisited = {}, [key]
        while unvisited:
            key = unvisited.pop()
            if key not in nodes:
                node = nodes[key] = self._graph[key]
                is_leaf = isinstance(node, Future) or self._find_array(key) is not None
                unvisited += () if is_leaf else get_dependencies(self._graph, key)
        return nodes

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
        assert self._client is not None  # without a client no array is shared
        return self._client.scatter(self._find_array(key), hash=False)

    def _make_leaf_source(self, key: Hashable, router: RowRouter) -> RowSource | None:
        if key in self._shared:
            if self._shared[key].status != "finished":
                try:
                    self._shared[key] = self._scatter_array(key)
                except (KeyError, OSError, TimeoutError) as error:  # there is no worker, or the chosen one just died
                    raise RowTransferError from error
            return router.add_dependency(self._shared[key])
        if isinstance(node := self._graph[key], Future):
            return router.add_dependency(node)
        array = self._find_array(key)
        return None if array is None else router.send_rows(array)

    def _find_array(self, key: Hashable) -> Array | None:
        """Return the array of this process that a node is, or that it cuts out of a memmap; None if it is neither."""
        node = self._graph[key]
        if not isinstance(node, Task) or node.func not in _GETTERS:
            return _unwrap_array(node)
        source, index = node.args[:2]
        is_slice = isinstance(source, TaskRef) and isinstance(index, DataNode)
        whole = _unwrap_array(self._graph[source.key]) if is_slice else None
        return node.func(whole, index.value) if type(whole) is np.memmap else None


def _unwrap_array(node: Any) -> Array | None:
    value = node.value if isinstance(node, DataNode) else node
    # Others travel as they are: a masked array is more than its bytes, and those of objects are addresses in this process.
    return value if type(value) in (np.ndarray, np.memmap) and not value.dtype.hasobject else None
