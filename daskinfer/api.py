"""The functions that users call: each validates, assembles and hands over, nothing else."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Unpack

from distributed import Client

from daskinfer import lazy
from daskinfer.cluster import process_cluster
from daskinfer.diagnostics.progress import Progress, make_event_bus
from daskinfer.errors import ErrorCollector, OptionError
from daskinfer.execution.ordering import ReorderBuffer
from daskinfer.execution.run import Run
from daskinfer.execution.sinks import collect_output, stream_output, warn_of_failed_rows
from daskinfer.hardware.device_spec import DeviceTable, find_local_devices
from daskinfer.hardware.discovery import inspect_machine
from daskinfer.models.model import as_model
from daskinfer.options import OptionFields, Options, is_trusted, merge_options
from daskinfer.planning.build_job import (
    DeviceWeights,
    build_job,
    get_output_spec,
    keep_bfloat16,
    make_even_chunks,
)
from daskinfer.planning.inputs import Inputs
from daskinfer.scheduling.batching import check_batch_size, choose_batch_size
from daskinfer.worker.model_runner import ModelRunConfig

# Options that are followed while daskinfer computes.
_EXECUTION_OPTIONS = ("on_error", "fill_value", "max_failed_rows", "prefetch", "retries", "chunk_timeout", "restart_workers")


def predict(
    model: Any,
    x: Any,
    *,
    devices: str | Sequence[str] = "auto",
    device_weights: DeviceWeights = "auto",
    batch_size: int | str = "auto",
    client: Client | None = None,
    progress: Progress = None,
    return_report: bool = False,
    options: Options | None = None,
    **fields: Unpack[OptionFields],
) -> Any:
    """Apply a network to an array on every device, and give the answers in the input's order.

    Parameters
    ----------
    model
        A module, a function of ndarrays, an object with ``load(device)`` and ``__call__(batch)``, a :class:`Model`, the
        path of a ``.pt2`` program (with ``trust=True``), or ``"pkg.mod:make"``.
    x
        The input, (n, ...): a numpy array, list of numbers, torch tensor, memmap, dask array or path (``.npy``, ``.zarr``).
        A dict gives named ports (``net(image=…, meta=…)``), a tuple positional ones, each of the same length n.
    devices
        A string or list: "auto" (every GPU, or where there is none one CPU worker per core), "cuda", "cuda:1",
        "GPU-<uuid>", "MIG-<uuid>", "cpu", "cpu*4", comma-joined; "inline" computes in this process.
    device_weights
        The share of rows that each device gets: a list in the devices' order, a mapping by device or kind, "even", or
        "auto": measured while it runs, from a prior by kind on, which the plan shows as assumed. 0 leaves a device out.
    batch_size
        Rows of a micro-batch; "auto" begins with what the size of a row and the smallest share say, and where there is
        enough to do measures which one pays on each kind of device.
    client
        A Dask client, whose workers are then the devices. None: the current client if there is one and ``devices`` is
        "auto", else a local cluster that is started once per process and kept for the next call (see :func:`close_device_thread`).
    progress
        What is shown while it runs: None: a bar where a person looks on (a terminal, a notebook); True: always, without a
        terminal as a line every few seconds; False: nothing; a function: it is called with each event (``events``).
    return_report
        True: return (answer, :class:`RunReport`).
    options, **fields
        How the network is run: an :class:`Options`, or its fields as keywords.

    Returns
    -------
    ndarray, or the network's structure of them
        (n, ...), in the input's order; torch tensors on the CPU where an input was a tensor. bfloat16 answers come back
        as float32.

    Raises
    ------
    DaskInferError
        Before anything starts: whatever cannot work, all reasons at once. Later: a chunk that failed, with its rows, or
        ``Interrupted``, a KeyboardInterrupt; what is done then is in ``error.partial.answer`` where ``error.partial.done``.

    Examples
    --------
    >>> import daskinfer as di, torch
    >>> net = torch.nn.Linear(3, 2)
    >>> x = torch.ones(1000, 3)
    >>> bool(torch.allclose(di.predict(net, x, devices=["cpu", "cpu"], device_weights=[1, 3]), net(x)))
    True
    >>> di.close()
    """
    work = build_job(
        model,
        x,
        devices=devices,
        device_weights=device_weights,
        batch_size=batch_size,
        client=client,
        options=options,
        fields=fields,
    )
    answer, report = collect_output(work, Run(work.make_job(), make_event_bus(progress)))
    if return_report:
        return answer, report
    warn_of_failed_rows(report.failed_rows)
    return answer


def stream(
    model: Any,
    x: Any,
    *,
    devices: str | Sequence[str] = "auto",
    device_weights: DeviceWeights = "auto",
    batch_size: int | str = "auto",
    client: Client | None = None,
    progress: Progress = None,
    options: Options | None = None,
    **fields: Unpack[OptionFields],
) -> Generator[Any, None, None]:
    """Apply a network to an array on every device, and give the answers block by block, in the input's order.

    A block comes as soon as it and all before it are there. The devices work ahead, by a bounded number of rows, and stand
    still while nobody asks for the next block. Closing the iterator, or leaving its loop, cancels the rest and frees
    everything.

    Parameters
    ----------
    model, x, devices, device_weights, batch_size, client, progress, options, **fields
        As for :func:`predict`.

    Returns
    -------
    generator of ndarrays, or of the network's structure of them
        (n, ...) each, one after the other all rows of the input; torch tensors on the CPU where an input was a tensor.

    Raises
    ------
    DaskInferError
        At once: whatever cannot work, all reasons at once. While it runs: a chunk that failed, with its rows.

    Examples
    --------
    >>> import daskinfer as di, numpy as np
    >>> sum(len(block) for block in di.stream(np.sqrt, np.arange(1000.0), devices="inline"))
    1000
    """
    work = build_job(
        model,
        x,
        devices=devices,
        device_weights=device_weights,
        batch_size=batch_size,
        client=client,
        options=options,
        fields=fields,
    )
    call = work.make_job()
    order = ReorderBuffer(call.max_rows_ahead)
    return stream_output(work, Run(call, make_event_bus(progress), order.get_row_limit), order)


def map_blocks(
    model: Any,
    x: Any,
    *,
    batch_size: int | str = "auto",
    options: Options | None = None,
    **fields: Unpack[OptionFields],
) -> Any:
    """Apply a network lazily: dask arrays in, dask arrays out; nothing is computed and no row is read.

    The result is plain Dask: slice it, reduce it, store it, compute it on any scheduler or none. Several outputs share one
    hidden block per chunk: ``dask.compute(y["a"], y["b"])`` runs the network once, two separate ``.compute()`` twice.

    Parameters
    ----------
    model
        As for :func:`predict`.
    x
        As for :func:`predict`; a dask array keeps its chunks on axis 0, and may have several chunks on later axes.
    batch_size
        Rows of a micro-batch; "auto" goes by the size of a row.
    options, **fields
        As for :func:`predict`, but for those on faults and reading ahead, which are refused: Dask computes this one.

    Returns
    -------
    dask array, or the network's structure of them
        (n, ...), with the input's chunks on axis 0.

    Raises
    ------
    DaskInferError
        Whatever cannot work, all reasons at once.

    Examples
    --------
    >>> import dask.array as da, daskinfer as di, torch
    >>> lazy = di.map_blocks(torch.nn.Linear(3, 2), da.ones((1000, 3), chunks=(100, 3), dtype="float32"))
    >>> lazy
    dask.array<output, shape=(1000, 2), dtype=float32, chunksize=(100, 2), chunktype=numpy.ndarray>
    >>> lazy.mean(axis=0).compute().shape
    (2,)
    """
    refusals = ErrorCollector()
    with refusals.collect():
        inputs = Inputs.from_value(x)
        inputs.check_sizes(inspect_machine().memory_nbytes)
    with refusals.collect():
        given = merge_options(options, fields)
    with refusals.collect():
        asked = check_batch_size(batch_size)
    with refusals.collect():
        recipe = as_model(model, trust=is_trusted(options, fields)).make_loader()
    refusals.raise_if_any()
    _refuse_execution_options(given)
    given = keep_bfloat16(given, inputs)
    promise = get_output_spec(recipe, inputs, given)
    size = asked or choose_batch_size(inputs.n_rows, inputs.row_nbytes, [1.0])
    row_chunks = inputs.row_chunks or make_even_chunks(inputs, promise.row_nbytes, size)
    blocks = lazy.build_blocks(
        inputs.make_dask_arrays(row_chunks), recipe, ModelRunConfig(inputs.ports, size, given, promise.outputs)
    )
    return lazy.build_outputs(blocks, promise.structure, promise.outputs)


def _refuse_execution_options(options: Options) -> None:
    """Refuse what would have no effect: options that are followed while daskinfer computes, where Dask does."""
    usual = Options()
    for name in _EXECUTION_OPTIONS:
        if (asked := getattr(options, name)) != getattr(usual, name):
            raise OptionError(
                f"{name}={asked!r} was given to map_blocks, whose chunks Dask computes, without a report; it may be "
                f"{getattr(usual, name)!r}. Leave it out, or use predict, stream or run."
            )


def devices() -> DeviceTable:
    """What this machine has: its GPUs as NVML sees them, and the CPU.

    Returns
    -------
    DeviceTable
        A tuple of devices that prints as a table.

    Examples
    --------
    >>> import daskinfer as di
    >>> di.devices()[-1].name
    'cpu:0'
    """
    return find_local_devices()


def close() -> None:
    """End the cluster that ``predict`` kept for this process, with what else is kept for the next call.

    A call that still runs in another thread is not disturbed; the cluster ends with it.

    Examples
    --------
    >>> import daskinfer as di
    >>> di.close()
    """
    process_cluster.default_cluster.close()
