"""The lazy array that ``map_blocks`` gives: plain Dask, which computes chunks by the same ``task.compute`` as the driver.

Per chunk there is one private block, a :class:`Block` with every output and the receipt; each public output picks its own
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
from daskinfer.core.pytree import Structure
from daskinfer.models.model import PackedModel, Recipe
from daskinfer.worker.current_device import seat
from daskinfer.worker.model_runner import Job
from daskinfer.worker.task import Block, compute, travelling


def block(*args: Any, recipe: Recipe, job: Job) -> Block:
    """Compute one chunk here.

    ``args`` are the rows of each port, (n, ...), and the slice of the whole input that they are, as a 1-tuple.
    """
    *rows, (where,) = args
    return compute(rows, where.start, where.stop, recipe, job, seat())


def build(ports: Sequence[da.Array], recipe: Recipe, job: Job) -> da.Array:
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
    packed = [_one_per_chunk(port) for port in ports]
    return da.map_blocks(
        block,
        *packed,
        ArraySliceDep((row_chunks,)),
        recipe=_as_node(recipe),
        job=travelling(job),
        dtype=object,
        meta=np.empty(0, dtype=object),
        token="infer",
    )


def outputs(blocks: da.Array, structure: Structure, like: Sequence[Array]) -> Any:
    """The public arrays, each (n, *shape) with the shape and dtype of its ``like``, in the network's structure."""
    return structure.rebuild([_output(blocks, i, output) for i, output in enumerate(like)])


def _output(blocks: da.Array, i: int, like: Array) -> da.Array:
    later = like.shape[1:]
    return da.map_blocks(
        _pick,
        blocks,
        i,
        chunks=(blocks.chunks[0], *((size,) for size in later)),
        new_axis=list(range(1, 1 + len(later))) or None,
        dtype=like.dtype,
        meta=np.empty((0,) * like.ndim, like.dtype),
        token="output",
    )


def _pick(computed: Block, i: int) -> Array:
    return computed.arrays[i]


def _one_per_chunk(port: da.Array) -> da.Array:
    if port.ndim == 1:
        return port
    whole = port.rechunk(dict.fromkeys(range(1, port.ndim), -1))
    return da.map_blocks(
        _whole, whole, drop_axis=list(range(1, port.ndim)), dtype=object, meta=np.empty(0, dtype=object), token="rows"
    )


def _whole(rows: Array) -> Array:
    return rows


def _as_node(recipe: Recipe) -> Any:
    if not isinstance(recipe, PackedModel):
        return recipe
    make: Callable[..., Any] = dask.delayed
    return make(recipe, name=f"model-{recipe.key}", traverse=False)
