"""The functions that users call for storage: ``run`` from files to files, and ``plan``, which says what a call would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

from distributed import Client

from daskinfer.core.scratch import remove_stale_scratch
from daskinfer.diagnostics.progress import Progress, make_event_bus
from daskinfer.diagnostics.report import RunReport
from daskinfer.execution.results import ChunkResult
from daskinfer.execution.run import Run, measure_throughput
from daskinfer.execution.sinks import build_complete_report, compute_chunks
from daskinfer.options import OptionFields, Options
from daskinfer.planning.build_job import DeviceWeights, PreparedJob, StrPath, build_job, build_storage_job
from daskinfer.planning.plan import Plan
from daskinfer.planning.resume import count_missing_rows, resume_notes
from daskinfer.storage.outputs import open_outputs


def run(
    model: Any,
    source: Any,
    target: StrPath | Mapping[str, StrPath],
    *,
    devices: str | Sequence[str] = "auto",
    device_weights: DeviceWeights = "auto",
    batch_size: int | str = "auto",
    client: Client | None = None,
    progress: Progress = None,
    overwrite: bool = False,
    shard: tuple[int, int] | None = None,
    options: Options | None = None,
    **fields: Unpack[OptionFields],
) -> RunReport:
    """Apply a network from storage to storage: workers read their rows and write their answers.

    Repeating the call continues it: whatever ended it, and whenever, the answer is the same array in the end. Beside the
    output a folder ``….daskinfer`` says what it is made of, and what of it is done; ``daskinfer verify`` reads the output
    against it.

    Parameters
    ----------
    model, devices, device_weights, batch_size, client, progress, options, **fields
        As for :func:`predict`.
    source
        The path of a ``.npy`` or ``.zarr`` array, (n, ...), or anything else that :func:`predict` takes.
    target
        The path of the answer, ``.npy`` or ``.zarr``; a mapping from output name to path where the network has several. It
        appears under its name once it is complete. What lies there already has to be of the same call.
    overwrite
        True: what lies there already is removed first. False: it is continued, or refused.
    shard
        (i, n): compute part i of n, counted from 1, as one of n calls that write one output; whichever ends last completes
        it. None: all of it.

    Returns
    -------
    RunReport
        Rows, seconds, and each device's part in this call; ``rows_before`` were done before it.

    Raises
    ------
    DaskInferError
        Before anything starts: whatever cannot work, all reasons at once; an output of another network, input or options;
        one that another run holds. Later: a chunk that failed, with its rows; what is done is kept for the next call.

    Examples
    --------
    >>> import daskinfer as di, numpy as np, tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     x, y = os.path.join(folder, "x.npy"), os.path.join(folder, "y.zarr")
    ...     np.save(x, np.arange(10.0))
    ...     di.run(np.sqrt, x, y, devices="inline").rows
    10
    """
    assembled = partial(
        build_storage_job,
        model,
        source,
        target,
        devices=devices,
        device_weights=device_weights,
        batch_size=batch_size,
        client=client,
        overwrite=overwrite,
        shard=shard,
        options=options,
        fields=fields,
    )
    return _complete_outputs(assembled, progress, overwrite=overwrite)


def _complete_outputs(make_job: Callable[..., PreparedJob], progress: Progress, *, overwrite: bool) -> RunReport:
    """Compute what is missing of a run's outputs, and mark them complete."""
    work = make_job()
    assert work.output_request is not None  # a run's
    remove_stale_scratch()  # perhaps of the run that is repeated; workers may not be needed any more
    with open_outputs(work.output_request, overwrite=overwrite) as outputs:
        if outputs.header.inherited_config != work.output_request.headers[0].inherited_config:
            work = make_job(overwrite=False)  # another shard was the first, and chose the micro-batch and the write-units
        done = outputs.done, outputs.n_failed, outputs.row_range
        call = Run(work.make_job(outputs.targets, *done), make_event_bus(progress))

        def keep(finished: ChunkResult) -> None:
            outputs.commit(finished, call.batch_config)

        report = (
            compute_chunks(work, keep, call, outputs.row_range) if outputs.has_missing_rows else build_complete_report(work)
        )
        outputs.finish()
    return replace(report, rows_before=outputs.n_rows_before, **outputs.failure_fields)


def plan(
    model: Any,
    x: Any,
    *,
    target: StrPath | Mapping[str, StrPath] | None = None,
    probe: bool = False,
    overwrite: bool = False,
    shard: tuple[int, int] | None = None,
    devices: str | Sequence[str] = "auto",
    device_weights: DeviceWeights = "auto",
    batch_size: int | str = "auto",
    client: Client | None = None,
    options: Options | None = None,
    **fields: Unpack[OptionFields],
) -> Plan:
    """What would run where, in which chunks, with how many bytes; refuses here what cannot work, all reasons at once.

    Parameters
    ----------
    model, x, devices, device_weights, batch_size, client, options, **fields
        As for :func:`predict`.
    target
        As for :func:`run`: plan a run to storage, which is not touched; notes say what is there already. None: plan a
        predict.
    probe
        True: run the network on the first rows on every device, for rows/s and the time to expect; starts workers where
        there are none. False: nothing starts; speeds show where an earlier call of this process measured them.
    overwrite, shard
        As for :func:`run`; without a target of no effect.

    Returns
    -------
    Plan
        A table when printed, in a notebook as HTML.

    Raises
    ------
    DaskInferError
        Whatever cannot work, all reasons at once.

    Examples
    --------
    >>> import daskinfer as di, numpy as np
    >>> plan = di.plan(np.sqrt, np.ones(100), devices=["cpu", "cpu"], device_weights=[3, 1], batch_size=5)
    >>> [(d.device, d.n_rows) for d in plan.devices]
    [('cpu:0', 75), ('cpu:1', 25)]
    """
    arguments: dict[str, Any] = {
        "devices": devices,
        "device_weights": device_weights,
        "batch_size": batch_size,
        "client": client,
        "options": options,
        "fields": fields,
    }
    how = partial(build_job, model, x)
    if target is not None:
        how = partial(build_storage_job, model, x, target, overwrite=overwrite, shard=shard)
    work = how(**arguments)
    if probe and (
        count_missing_rows(work.output_request, overwrite=overwrite) if work.output_request else work.layout.n_rows
    ):
        measure_throughput(work.make_job())
        work = how(**arguments)  # with the weights that were measured
    found = work.make_plan()
    said = resume_notes(work.output_request, found, overwrite=overwrite) if work.output_request else ()
    return replace(found, notes=(*found.notes, *said))
