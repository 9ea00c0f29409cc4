"""The functions that users call for storage: ``run`` from files to files, and ``plan``, which says what a call would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

from distributed import Client

from daskinfer.core.scratch import remove_ownerless_scratch
from daskinfer.diagnostics.progress import Progress, listeners
from daskinfer.diagnostics.report import RunReport
from daskinfer.execution.results import Finished
from daskinfer.execution.run import Run, speeds
from daskinfer.execution.sinks import compute, nothing_to_do
from daskinfer.options import OptionFields, Options
from daskinfer.planning.build_job import Path, Weights, Work, assemble, assemble_run
from daskinfer.planning.plan import Plan
from daskinfer.planning.resume import n_missing, notes
from daskinfer.storage.outputs import opened


def run(
    model: Any,
    source: Any,
    target: Path | Mapping[str, Path],
    *,
    devices: str | Sequence[str] = "auto",
    device_weights: Weights = "auto",
    batch_size: int | str = "auto",
    client: Client | None = None,
    progress: Progress = None,
    fresh: bool = False,
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
    fresh
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
        assemble_run,
        model,
        source,
        target,
        devices=devices,
        device_weights=device_weights,
        batch_size=batch_size,
        client=client,
        fresh=fresh,
        shard=shard,
        options=options,
        fields=fields,
    )
    return _complete(assembled, progress, fresh=fresh)


def _complete(assembled: Callable[..., Work], progress: Progress, *, fresh: bool) -> RunReport:
    """Compute what is missing of a run's outputs, and mark them complete."""
    work = assembled()
    assert work.wanted is not None  # a run's
    remove_ownerless_scratch()  # perhaps of the run that is repeated; workers may not be needed any more
    with opened(work.wanted, fresh=fresh) as outputs:
        if outputs.header.sizes != work.wanted.headers[0].sizes:
            work = assembled(fresh=False)  # another shard was the first, and chose the micro-batch and the write-units
        done = outputs.done, outputs.n_failed, outputs.rows
        call = Run(work.call(outputs.targets, *done), listeners(progress))

        def keep(finished: Finished) -> None:
            outputs.keep(finished, call.micro_batches)

        report = compute(work, keep, call, outputs.rows) if outputs.missing else nothing_to_do(work)
        outputs.finish()
    return replace(report, rows_before=outputs.n_before, **outputs.without_answer)


def plan(
    model: Any,
    x: Any,
    *,
    target: Path | Mapping[str, Path] | None = None,
    probe: bool = False,
    fresh: bool = False,
    shard: tuple[int, int] | None = None,
    devices: str | Sequence[str] = "auto",
    device_weights: Weights = "auto",
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
    fresh, shard
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
    how = partial(assemble, model, x)
    if target is not None:
        how = partial(assemble_run, model, x, target, fresh=fresh, shard=shard)
    work = how(**arguments)
    if probe and (n_missing(work.wanted, fresh=fresh) if work.wanted else work.layout.n_rows):
        speeds(work.call())
        work = how(**arguments)  # with the weights that were measured
    found = work.plan()
    said = notes(work.wanted, found, fresh=fresh) if work.wanted else ()
    return replace(found, notes=(*found.notes, *said))
