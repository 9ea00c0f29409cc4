"""The functions that users call: each resolves the devices, builds a job and passes it to a run.

``map_blocks`` is in ``lazy``: it passes a graph to Dask instead of a job to a run.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any, Literal, Unpack, overload

import numpy as np
from distributed import Client

from daskinfer._keywords import PlanKeywords, PredictKeywords, RunKeywords, StreamKeywords
from daskinfer.cluster.placement import resolve_placement
from daskinfer.cluster.process_cluster import default_cluster
from daskinfer.core.files import remove_stale_scratch
from daskinfer.diagnostics.events import EventBus
from daskinfer.diagnostics.progress import Progress, make_event_bus
from daskinfer.diagnostics.provenance import describe_call
from daskinfer.diagnostics.report import RunReport
from daskinfer.errors import DaskInferError, ErrorCollector, shorten_traceback
from daskinfer.execution.result_buffers import result_pool
from daskinfer.execution.run import Run, make_complete_report, measure_throughput
from daskinfer.execution.sinks import ArraySink, StorageSink, StreamSink, warn_of_failed_rows
from daskinfer.execution.worker_setup import get_device_ids
from daskinfer.hardware.device_spec import DeviceTable, find_local_devices
from daskinfer.options import CallKeywords, read_keywords, with_options
from daskinfer.planning.build_job import ModelLike, RunArguments, StrPath, build_job, build_storage_job
from daskinfer.planning.inputs import InputLike
from daskinfer.planning.job import InferenceJob, ResumeState
from daskinfer.planning.plan import Plan
from daskinfer.planning.resume import count_missing_rows, make_resume_notes
from daskinfer.storage.outputs import open_outputs


# Written by python -m tests.support.write_types:
@overload
def predict(
    model: ModelLike,
    x: InputLike,
    *,
    return_report: Literal[True],
    **keywords: Unpack[PredictKeywords],
) -> tuple[Any, RunReport]: ...
@overload
def predict(
    model: ModelLike,
    x: InputLike,
    *,
    return_report: Literal[False] = False,
    **keywords: Unpack[PredictKeywords],
) -> Any: ...
@overload
def predict(
    model: ModelLike,
    x: InputLike,
    *,
    return_report: bool,
    **keywords: Unpack[PredictKeywords],
) -> Any: ...
# (end of what is written)
@with_options
def predict(model: ModelLike, x: InputLike, **keywords: Any) -> Any:
    """Apply a model to an array on all devices and return its outputs in the order of the input.

    Parameters
    ----------
    model
        A torch module, a function of ndarrays, an object with ``load(device)`` and ``__call__(batch)``, a :class:`Model`,
        the path of a ``.pt2`` program (with ``trust=True``), or ``"pkg.mod:make"``, a factory that workers import.
    x
        The input, (n, ...): a numpy array, list of numbers, torch tensor, memmap, dask array or path (``.npy``, ``.zarr``).
        A dict gives named ports (``model(image=…, meta=…)``), a tuple positional ones, each with the same n rows.

    Returns
    -------
    ndarray, or ndarrays in the structure of the model's output
        (n, ...), in the order of the input; torch tensors on the CPU if an input was a tensor. bfloat16 outputs are returned
        as float32.

    Raises
    ------
    DaskInferError
        Before anything starts: everything that cannot work, in one error. Later: a chunk that failed, with its rows, or
        ``Interrupted``, a KeyboardInterrupt. Rows computed until then are in ``error.partial.output``, wherever
        ``error.partial.done`` is True.

    Examples
    --------
    >>> import daskinfer as di, torch
    >>> model = torch.nn.Linear(3, 2)
    >>> x = torch.ones(1000, 3)
    >>> bool(torch.allclose(di.predict(model, x, devices=["cpu", "cpu"], device_weights=[1, 3]), model(x)))
    True
    >>> di.close()
    """
    given = read_keywords("predict", keywords)
    call = _Call(given)
    job = call.build(model, x)
    sink = ArraySink(job, _choose_allocator(job))
    report = Run(job, call.client, _make_event_bus(job, given.progress)).into(sink)
    if given.return_report:
        return sink.output, replace(report, facts={**describe_call("predict", given), **report.facts})
    warn_of_failed_rows(report.failed_rows)
    return sink.output


@with_options
def stream(model: ModelLike, x: InputLike, **keywords: Unpack[StreamKeywords]) -> Generator[Any, None, None]:
    """Apply a model to an array on all devices and yield its outputs block by block, in the order of the input.

    A block is yielded as soon as it and all blocks before it are computed. The devices work ahead by a bounded number of
    rows, and pause while no further block is requested. Closing the iterator, or leaving its loop, cancels the remaining
    chunks and frees everything.

    Parameters
    ----------
    model, x
        As for :func:`predict`.

    Returns
    -------
    generator of ndarrays, or of ndarrays in the structure of the model's output
        Blocks (m, ...) that together hold all rows of the input; torch tensors on the CPU if an input was a tensor.

    Raises
    ------
    DaskInferError
        When it is called: everything that cannot work, in one error. While it runs: a chunk that failed, with its rows.

    Examples
    --------
    >>> import daskinfer as di, numpy as np
    >>> sum(len(block) for block in di.stream(np.sqrt, np.arange(1000.0), devices="inline"))
    1000
    """
    given = read_keywords("stream", keywords)
    call = _Call(given)
    job = call.build(model, x)
    sink = StreamSink(job.max_rows_ahead)
    blocks = Run(job, call.client, _make_event_bus(job, given.progress), sink.get_row_limit).stream(sink)
    return _build_blocks(job, blocks)


@with_options
def run(
    model: ModelLike, source: InputLike, target: StrPath | Mapping[str, StrPath], **keywords: Unpack[RunKeywords]
) -> RunReport:
    """Apply a model from storage to storage: workers read their rows and write their outputs.

    Repeating the call resumes it: however and whenever a run ended, the final output is the same array. A folder
    ``….daskinfer`` beside the output records what it is computed from, and which rows are done with which checksum;
    ``daskinfer verify`` checks the output against it.

    Parameters
    ----------
    model
        As for :func:`predict`.
    source
        The path of a ``.npy`` or ``.zarr`` array, (n, ...), or anything else that :func:`predict` takes.
    target
        The path of the output, ``.npy`` or ``.zarr``; a mapping from output name to path if the model has several outputs.
        An output appears under its path once it is complete. An existing one is resumed if it belongs to the same call, and
        refused otherwise.

    Returns
    -------
    RunReport
        Rows, seconds and the statistics of each device in this call; ``rows_before`` counts rows of earlier calls.

    Raises
    ------
    DaskInferError
        Before anything starts: everything that cannot work, in one error; an existing output of another model, input or
        options; an output that another run is writing. Later: a chunk that failed, with its rows; the rows done until then
        stay stored for the next call.

    Examples
    --------
    >>> import daskinfer as di, numpy as np, tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     x, y = os.path.join(folder, "x.npy"), os.path.join(folder, "y.zarr")
    ...     np.save(x, np.arange(10.0))
    ...     di.run(np.sqrt, x, y, devices="inline").rows
    10
    """
    given = read_keywords("run", keywords)
    call = _Call(given)
    job = call.build_storage(model, source, target, overwrite=given.overwrite)
    assert job.output_request is not None  # a run's
    remove_stale_scratch()  # an earlier attempt may have left it, and this call may need no workers, which remove it too
    with open_outputs(job.output_request, overwrite=given.overwrite) as outputs:
        if outputs.header.inherited_config != job.output_request.headers[0].inherited_config:
            # Another shard created the output, and with it chose the batch size and the write-units.
            job = call.build_storage(model, source, target, overwrite=False)
        job = replace(job, resume=ResumeState(outputs.targets, outputs.done, outputs.n_failed, outputs.row_range))
        if outputs.has_missing_rows:
            computing = Run(job, call.client, _make_event_bus(job, given.progress))
            report = computing.into(StorageSink(outputs, lambda: computing.batch))
        else:
            report = make_complete_report(job)
        outputs.finish()
    facts = {**describe_call("run", given), **report.facts}
    return replace(report, rows_before=outputs.n_rows_before, facts=facts, **outputs.failure_fields)


@with_options
def plan(
    model: ModelLike,
    x: InputLike,
    *,
    target: StrPath | Mapping[str, StrPath] | None = None,
    **keywords: Unpack[PlanKeywords],
) -> Plan:
    """Return what a call would compute on which device, in which chunks and with how many bytes, without computing it.

    Parameters
    ----------
    model, x
        As for :func:`predict`.
    target
        As for :func:`run`: plan a run to storage, where nothing is changed; notes say what is already stored. None: plan
        a predict.

    Returns
    -------
    Plan
        Prints as a table, and displays as HTML in a notebook.

    Raises
    ------
    DaskInferError
        Everything that cannot work, in one error.

    Examples
    --------
    >>> import daskinfer as di, numpy as np
    >>> plan = di.plan(np.sqrt, np.ones(100), devices=["cpu", "cpu"], device_weights=[3, 1], batch_size=5)
    >>> [(d.device, d.n_rows) for d in plan.devices]
    [('cpu:0', 75), ('cpu:1', 25)]
    """

    def build() -> InferenceJob:
        if target is None:
            return call.build(model, x)
        return call.build_storage(model, x, target, overwrite=given.overwrite)

    given = read_keywords("plan", keywords)
    call = _Call(given)
    job = build()
    request = job.output_request
    if given.probe and (count_missing_rows(request, overwrite=given.overwrite) if request else job.n_rows):
        measure_throughput(job, call.client)
        job = build()  # again, with the measured weights
    found = job.plan
    notes = make_resume_notes(request, found, overwrite=given.overwrite) if request else ()
    return replace(found, notes=(*found.notes, *notes))


def devices() -> DeviceTable:
    """Return the devices of this machine: its GPUs as NVML reports them, and the CPU.

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
    """Shut down the local cluster of this process, and free everything else that is kept for the next call.

    A call that is still running in another thread is not disturbed; the cluster shuts down after it.

    Examples
    --------
    >>> import daskinfer as di
    >>> di.close()
    """
    default_cluster.close()


class _Call:
    """The keywords that all functions share, with the devices resolved; errors are collected until the job is built."""

    def __init__(self, given: CallKeywords) -> None:
        self._errors, self._shard = ErrorCollector(), given.shard
        resolved = self._errors.attempt(resolve_placement, given.devices, given.client)
        self.client: Client | None = resolved[1] if resolved else None
        placement = resolved[0] if resolved else None
        self._arguments = RunArguments(placement, given.device_weights, given.batch_size, given.options, given.fields)

    def build(self, model: ModelLike, x: InputLike) -> InferenceJob:
        """Build the job of a call whose output is returned."""
        return build_job(model, x, self._arguments, errors=self._errors)

    def build_storage(
        self, model: ModelLike, source: InputLike, target: StrPath | Mapping[str, StrPath], *, overwrite: bool
    ) -> InferenceJob:
        """Build the job of a call whose output is stored."""
        shard, errors = self._shard, self._errors
        return build_storage_job(model, source, target, self._arguments, overwrite=overwrite, shard=shard, errors=errors)


def _make_event_bus(job: InferenceJob, progress: Progress) -> EventBus:
    return make_event_bus(progress, on_dashboard=not job.placement.is_inline)


def _choose_allocator(job: InferenceJob) -> Any:
    """Return the function that allocates the output: buffers are reused as long as the default cluster runs."""
    is_kept = not job.placement.is_external and default_cluster.is_running(get_device_ids(job.placement))
    return result_pool.empty if is_kept else np.empty


def _build_blocks(job: InferenceJob, blocks: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """Put each block into the structure of the model's output."""
    try:
        for arrays in blocks:
            yield job.build_output(arrays)
    except DaskInferError as error:
        raise shorten_traceback(error) from error.__cause__
    finally:
        blocks.close()
