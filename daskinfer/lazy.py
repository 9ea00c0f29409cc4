"""``map_blocks`` and the graph that it builds: plain Dask, which computes chunks with the same function as workers do.

Each chunk is one private block, a :class:`ChunkResult` with every output and the statistics; each public output selects its
array from it. Dask fuses reading, block and selection into one task if one output is computed; outputs that are computed
together share the block, so that the model runs once.

A module in memory is one node of the graph, whatever the number of chunks: 100 MB as a keyword of 64 tasks took 28 s, as a
node 1 s (measured). Files and factories need no node, since their loader is a few words in each task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import dask
import dask.array as da
import numpy as np
from dask.layers import ArraySliceDep

from daskinfer._keywords import MapBlocksKeywords
from daskinfer.core.arrays import Array
from daskinfer.core.chunks import BatchConfig, Chunk, ChunkResult
from daskinfer.core.declarations import get_declarations
from daskinfer.core.pytree import PyTreeSpec
from daskinfer.errors import ErrorCollector, OptionError
from daskinfer.hardware.discovery import inspect_machine
from daskinfer.models.loaders import InMemoryLoader, ModelLoader
from daskinfer.models.model import as_model
from daskinfer.options import Options, is_trusted, merge_options, read_keywords, with_options
from daskinfer.planning.build_job import ModelLike, get_output_spec, keep_bfloat16, make_even_chunks
from daskinfer.planning.inputs import InputLike, Inputs
from daskinfer.scheduling.batching import check_batch_size, choose_batch_size
from daskinfer.worker.current_device import current_device
from daskinfer.worker.model_runner import ModelRunConfig, RunSpec, make_portable
from daskinfer.worker.task import compute_chunk


@with_options
def map_blocks(model: ModelLike, x: InputLike, **keywords: Unpack[MapBlocksKeywords]) -> Any:
    """Apply a model lazily: dask arrays in, dask arrays out; nothing is computed and no row is read.

    The result is plain Dask: slice it, reduce it, store it, compute it with any scheduler or none. Several outputs share one
    hidden block per chunk: ``dask.compute(y["a"], y["b"])`` runs the model once, two separate ``.compute()`` run it twice.

    Parameters
    ----------
    model
        As for :func:`predict`.
    x
        As for :func:`predict`; a dask array keeps its chunks on axis 0, and may have several chunks on later axes.

    Returns
    -------
    dask array, or dask arrays in the structure of the model's output
        (n, ...), with the chunks of the input on axis 0.

    Raises
    ------
    DaskInferError
        Everything that cannot work, in one error.

    Examples
    --------
    >>> import dask.array as da, daskinfer as di, torch
    >>> lazy = di.map_blocks(torch.nn.Linear(3, 2), da.ones((1000, 3), chunks=(100, 3), dtype="float32"))
    >>> lazy
    dask.array<output, shape=(1000, 2), dtype=float32, chunksize=(100, 2), chunktype=numpy.ndarray>
    >>> lazy.mean(axis=0).compute().shape
    (2,)
    """
    given, errors = read_keywords("map_blocks", keywords), ErrorCollector()
    inputs = errors.attempt(Inputs.from_value, x)
    if inputs is not None:
        errors.attempt(inputs.check_sizes, inspect_machine().memory_nbytes)
    run_options = errors.attempt(merge_options, given.options, given.fields)
    size = errors.attempt(check_batch_size, given.batch_size)
    loader = errors.attempt(lambda: as_model(model, trust=is_trusted(given.options, given.fields)).make_loader())
    errors.raise_if_any()
    assert inputs is not None and run_options is not None and loader is not None  # no error was collected
    _refuse_execution_options(run_options)
    run_options = keep_bfloat16(run_options, inputs)
    spec = get_output_spec(loader, inputs, run_options)
    size = size or choose_batch_size(inputs.n_rows, inputs.row_nbytes, [1.0])
    row_chunks = inputs.row_chunks or make_even_chunks(inputs, spec.row_nbytes, size)
    run_config = ModelRunConfig(inputs.ports, BatchConfig(size), run_options, spec.outputs)
    blocks = build_blocks(inputs.make_dask_arrays(row_chunks), loader, run_config)
    return build_outputs(blocks, spec.structure, spec.outputs)


def _refuse_execution_options(options: Options) -> None:
    """Refuse options that only daskinfer's own execution follows: here Dask computes, so they would have no effect."""
    for name, option in get_declarations(Options).items():
        if "map_blocks" not in option.functions and (value := getattr(options, name)) != option.default:
            raise OptionError(
                f"map_blocks takes no {name}, got {name}={value!r}: Dask computes its chunks. "
                "Leave it out, or use predict, stream or run."
            )


def compute_block(*args: Any, loader: ModelLoader, run_config: ModelRunConfig) -> ChunkResult:
    """Compute one chunk in the process and thread that Dask chose.

    ``args`` are the rows of each port, (n, ...), and their slice of the whole input, as a 1-tuple.
    """
    *rows, (row_slice,) = args
    return compute_chunk(rows, Chunk(0, row_slice.start, row_slice.stop), RunSpec(loader, run_config), current_device())


def build_blocks(ports: Sequence[da.Array], loader: ModelLoader, run_config: ModelRunConfig) -> da.Array:
    """Build the private array of blocks: 1-d, of dtype object, one element per chunk of the ports' first axis.

    Parameters
    ----------
    ports
        One dask array per port, all with the same chunks on axis 0; chunks on later axes are merged. A 1-d array of dtype
        object holds whole rows.
    loader, run_config
        The model and how it is run.
    """
    row_chunks = ports[0].chunks[0]
    # Dask would align ports of different ndim by their last axes; with one element per chunk, all are 1-d.
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
    """Build the public arrays, (n, *shape) with the shape and dtype of ``like``, in the structure of the model's output."""
    return structure.rebuild([_build_output(blocks, i, output) for i, output in enumerate(like)])


def _build_output(blocks: da.Array, i: int, like: Array) -> da.Array:
    row_shape = like.shape[1:]
    return da.map_blocks(
        _select_output,
        blocks,
        i,
        chunks=(blocks.chunks[0], *((size,) for size in row_shape)),
        new_axis=list(range(1, 1 + len(row_shape))) or None,
        dtype=like.dtype,
        meta=np.empty((0,) * like.ndim, like.dtype),
        token="output",
    )


def _select_output(block: ChunkResult, i: int) -> Array:
    return block.arrays[i]


def _pack_chunks(port: da.Array) -> da.Array:
    if port.ndim == 1:
        return port
    merged = port.rechunk(dict.fromkeys(range(1, port.ndim), -1))
    return da.map_blocks(
        _return_rows, merged, drop_axis=list(range(1, port.ndim)), dtype=object, meta=np.empty(0, dtype=object), token="rows"
    )


def _return_rows(rows: Array) -> Array:
    return rows


def _make_model_node(loader: ModelLoader) -> Any:
    if not isinstance(loader, InMemoryLoader):
        return loader
    make_node: Callable[..., Any] = dask.delayed
    return make_node(loader, name=f"model-{loader.key}", traverse=False)
