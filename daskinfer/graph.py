"""The lazy array: one definition of the work, for both ways of computing it.

Per chunk there is one private block, a :class:`Block` with every output and the receipt; each public output picks its own
part of it. Dask fuses reading, block and pick into one task where one output is asked for, and where several are computed
together they share the block, so the network runs once.

A module in memory is one node of the graph, whatever the number of chunks (decision 7: as a keyword of 64 tasks 100 MB
took 28 s, as a node 1 s). Files and factories need none: their recipe is a few words in each task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask.layers import ArraySliceDep

from daskinfer.cache import models
from daskinfer.errors import ChunkError
from daskinfer.io import Target
from daskinfer.model import PackedModel, Recipe
from daskinfer.options import Options
from daskinfer.packed import ByValue
from daskinfer.records import Receipt
from daskinfer.runner import Array, Job, run_chunk
from daskinfer.structure import Structure
from daskinfer.worker import seat


@dataclass(frozen=True)
class Block:
    """A chunk's outputs, each (n, *shape); ``receipt`` is None for a chunk without rows."""

    arrays: list[Array]
    receipt: Receipt | None


def block(*args: Any, recipe: Recipe, job: Job) -> Block:
    """Compute one chunk here: the one function that every way of computing calls.

    ``args`` are the rows of each port, (n, ...), and the slice of the whole input that they are, as a 1-tuple.
    """
    *rows, (where,) = args
    if where.start == where.stop:
        assert job.outputs is not None  # found out before a graph is built
        return Block([output.copy() for output in job.outputs], None)
    _check_rows(job, rows, where)
    here = seat()
    with here.threads():
        model = models.get((recipe.key, str(here.torch_device)), lambda: recipe.load(here.torch_device))
        answer = run_chunk(model, rows, where.start, job)
    receipt = Receipt(where.start, where.stop, here.device, here.device_name, answer.batch_size, answer.seconds, here.worker)
    return Block(answer.arrays, receipt)


def _check_rows(job: Job, rows: Sequence[Array], where: slice) -> None:
    for name, port in zip(job.ports.names, rows, strict=True):
        if len(port) != where.stop - where.start:
            raise ChunkError(
                f"rows {where.start}:{where.stop}: the dask array of {name} computed {len(port)} rows there; its chunks "
                "have to say what they hold. Mend them, or call .compute_chunk_sizes() on it."
            )


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
        job=replace(job, options=_to_travel(job.options)),
        dtype=object,
        meta=np.empty(0, dtype=object),
        token="infer",
    )


def outputs(blocks: da.Array, structure: Structure, like: Sequence[Array]) -> Any:
    """The public arrays, each (n, *shape) with the shape and dtype of its ``like``, in the network's structure."""
    return structure.rebuild([_output(blocks, i, output) for i, output in enumerate(like)])


def written(blocks: da.Array, targets: Sequence[Target]) -> da.Array:
    """Blocks that write their outputs, each to its target, and keep only the receipt."""
    return da.map_blocks(
        _write,
        blocks,
        ArraySliceDep((blocks.chunks[0],)),
        targets=tuple(targets),
        dtype=object,
        meta=np.empty(0, dtype=object),
        token="write",
    )


def tasks(blocks: da.Array) -> list[Any]:
    """Each chunk's block as a delayed value, on one graph that is optimised once."""
    return list(blocks.to_delayed(optimize_graph=True).ravel())


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


def _write(computed: Block, where: tuple[slice], targets: tuple[Target, ...]) -> Block:
    for target, rows in zip(targets, computed.arrays, strict=True):
        target.write(where[0].start, rows)
    return Block([], computed.receipt)


def _one_per_chunk(port: da.Array) -> da.Array:
    if port.ndim == 1:
        return port
    whole = port.rechunk(dict.fromkeys(range(1, port.ndim), -1))
    return da.map_blocks(
        _whole, whole, drop_axis=list(range(1, port.ndim)), dtype=object, meta=np.empty(0, dtype=object), token="rows"
    )


def _whole(rows: Array) -> Array:
    return rows


def _to_travel(options: Options) -> Options:
    """Let the functions among the options reach workers that cannot import them, and no row of ``output`` travel."""
    before, after = options.preprocess, options.postprocess
    return replace(
        options,
        preprocess=before and ByValue(before),
        postprocess=after and ByValue(after),
        output=None,  # the job's outputs say it, without the rows that it may have
    )


def _as_node(recipe: Recipe) -> Any:
    if not isinstance(recipe, PackedModel):
        return recipe
    make: Callable[..., Any] = dask.delayed
    return make(recipe, name=f"model-{recipe.key}", traverse=False)
