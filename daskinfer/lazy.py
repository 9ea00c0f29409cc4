"""The lazy array that ``map_blocks`` gives: plain Dask, which computes chunks by the same ``task.compute`` as the driver.

Per chunk there is one private block, a :class:`ComputedChunk` with every output and the receipt; each public output picks its own
part of it. Dask fuses reading, block and pick into one task where one output is asked for, and where several are computed
together they share the block, so the network runs once.

A module in memory is one node of the graph, whatever the number of chunks (decision 7: as a keyword of 64 tasks 100 MB
took 28 s, as a node 1 s). Files and factories need none: their recipe is a few words in each task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask.layers import ArraySliceDep

from daskinfer.core.arrays import Array
from daskinfer.core.pytree import PyTreeSpec
from daskinfer.models.model import InMemoryLoader, ModelLoader
from daskinfer.worker.current_device import current_device
from daskinfer.worker.model_runner import ModelRunConfig
from daskinfer.worker.task import ComputedChunk, compute_chunk, make_portable


def compute_block(*args: Any, loader: ModelLoader, run_config: ModelRunConfig) -> ComputedChunk:
    """Compute one chunk here.

    ``args`` are the rows of each port, (n, ...), and the slice of the whole input that they are, as a 1-tuple.
    """
    *rows, (where,) = args
    return compute_chunk(rows, where.start, where.stop, loader, run_config, current_device())


def build_blocks(ports: Sequence[da.Array], loader: ModelLoader, run_config: ModelRunConfig) -> da.Array:
    """The private array of blocks: 1-d, dtype object, one element per chunk of the ports' first axis.

    Parameters
    ----------
    ports
        One dask array per port, all with the same chunks on axis 0; chunks on later axes are put together. A 1-d array of
        dtype object holds whole rows.
    recipe, job
        The network and how it is run.
    """
    row_chunks = ports[0].chunks[0]
    # Ports of unlike ndim would be aligned by their last axes: as one element per chunk they are all alike.
    packed = [_pack_chunks(port) for port in ports]
    return da.map_blocks(
        compute_block,
        *packed,
        ArraySliceDep((row_chunks,)),
        loader=_make_model_node(loader),
        run_config=make_portable(run_config),
        dtype=object,
        meta=np.empty(0, dtype=object),
        token="infer",
    )


def build_outputs(blocks: da.Array, structure: PyTreeSpec, like: Sequence[Array]) -> Any:
    """The public arrays, each (n, *shape) with the shape and dtype of its ``like``, in the network's structure."""
    return structure.rebuild([_build_output(blocks, i, output) for i, output in enumerate(like)])


def _build_output(blocks: da.Array, i: int, like: Array) -> da.Array:
    later = like.shape[1:]
    return da.map_blocks(
        _select_output,
        blocks,
        i,
        chunks=(blocks.chunks[0], *((size,) for size in later)),
        new_axis=list(range(1, 1 + len(later))) or None,
        dtype=like.dtype,
        meta=np.empty((0,) * like.ndim, like.dtype),
        token="output",
    )


def _select_output(computed: ComputedChunk, i: int) -> Array:
    return computed.arrays[i]


def _pack_chunks(port: da.Array) -> da.Array:
    if port.ndim == 1:
        return port
    whole = port.rechunk(dict.fromkeys(range(1, port.ndim), -1))
    return da.map_blocks(
        _return_rows, whole, drop_axis=list(range(1, port.ndim)), dtype=object, meta=np.empty(0, dtype=object), token="rows"
    )


def _return_rows(rows: Array) -> Array:
    return rows


def _make_model_node(loader: ModelLoader) -> Any:
    if not isinstance(loader, InMemoryLoader):
        return loader
    make: Callable[..., Any] = dask.delayed
    return make(loader, name=f"model-{loader.key}", traverse=False)
