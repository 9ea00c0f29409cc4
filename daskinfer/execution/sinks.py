"""What a call that computes does with its chunks as they end: keeps them, sums their receipts up, gives them on in order."""

from __future__ import annotations

import functools
import logging
import platform
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from importlib import metadata
from typing import Any, Protocol

import numpy as np

from daskinfer.cluster.process_cluster import kept
from daskinfer.core.row_ranges import Range, Ranges, left_over
from daskinfer.diagnostics.events import Asked, Listeners, RunEnded, RunStarted
from daskinfer.diagnostics.report import RunReport, Tally
from daskinfer.errors import DaskInferError, Partial
from daskinfer.execution.ordering import InOrder
from daskinfer.execution.result_buffers import results
from daskinfer.execution.results import Finished
from daskinfer.execution.signals import as_interrupted, drained
from daskinfer.execution.worker_setup import asked
from daskinfer.options import Options
from daskinfer.planning.build_job import Work

logger = logging.getLogger(__name__)

_SHOWN = 5  # rows that a warning names; arbitrary


class Runs(Protocol):
    """``driver.Run``: a call that computes while it is iterated over."""

    began: float | None
    draining: bool
    tell: Listeners

    @property
    def missing(self) -> Ranges: ...

    def __iter__(self) -> Generator[Finished, None, None]: ...


def compute(work: Work, keep: Callable[[Finished], None], run: Runs, rows: Range | None = None) -> RunReport:
    """Compute every chunk, give each to ``keep``, and sum the events up; ``rows`` are the call's part, None: all."""
    tally = Tally()
    run.tell.add(tally)
    called = time.perf_counter()
    with _told(work, run, rows), drained(run), closing(iter(run)) as found:
        for finished in found:
            keep(finished)
    began = run.began or called
    return tally.report(seconds=time.perf_counter() - began, start_seconds=began - called, facts=_facts(work))


def nothing_to_do(work: Work) -> RunReport:
    """The report of a run whose output is complete."""
    tally = Tally()
    tally(_started(work, "", everything := (0, work.layout.n_rows), [everything]))
    return tally.report(seconds=0.0, facts=_facts(work))


def answered(work: Work, run: Runs) -> tuple[Any, RunReport]:
    """The whole answer, in memory; what ends it early carries what was done."""
    # Memory is kept as long as the cluster is.
    empty = results.empty if work.placement.client is None and kept.has(asked(work.placement)) else np.empty
    arrays = [empty((work.inputs.n_rows, *o.shape[1:]), o.dtype) for o in work.promise.outputs]
    done = np.zeros(work.inputs.n_rows, bool)

    def keep(finished: Finished) -> None:
        rows = slice(finished.chunk.start, finished.chunk.stop)
        for array, found in zip(arrays, finished.arrays, strict=True):
            array[rows] = found
        done[rows] = True
        for failure in finished.failures:
            done[failure.start : failure.stop] = False

    try:
        report = compute(work, keep, run)
    except DaskInferError as error:
        for array in arrays:  # what is there is nobody's answer
            array[~done] = _nothing(array.dtype, work.job.options)
        error.partial = Partial(work.answer(arrays), done)
        error.add_note(f"{int(done.sum()):,} of {len(done):,} rows have an answer: .partial.answer, where .partial.done.")
        raise
    return work.answer(arrays), report


def _nothing(dtype: np.dtype[Any], options: Options) -> float:
    """What stands where there is no answer: as for rows that are skipped, else NaN, or 0 where a dtype has no NaN."""
    if options.on_error == "skip" and options.fill_value is not None:  # which every output can hold
        return options.fill_value
    return np.nan if dtype.kind in "fc" else 0


def streamed(work: Work, run: Runs, order: InOrder) -> Generator[Any, None, None]:
    """The answer block by block, in order."""
    tally = Tally()
    run.tell.add(tally)
    with _told(work, run, None), as_interrupted(), closing(iter(run)) as finished:
        for arrays in order.blocks(finished):
            yield work.answer(arrays)
    warn_of_rows(tally.report(seconds=0.0, facts={}).failed_rows)


def warn_of_rows(failed: Sequence[int]) -> None:
    """Say in the log which rows have no answer, where nobody gets a report."""
    if failed:
        named = ", ".join(f"{row:,}" for row in failed[:_SHOWN]) + (", …" if len(failed) > _SHOWN else "")
        logger.warning("%s rows have no answer (%s); predict(…, return_report=True) says why", f"{len(failed):,}", named)


@contextmanager
def _told(work: Work, run: Runs, rows: Range | None) -> Iterator[None]:
    """Tell when the run begins, and how it ends."""
    tell, error = run.tell, ""
    part = (0, work.layout.n_rows) if rows is None else rows
    tell(_started(work, tell.run, part, list(left_over(part, run.missing))))
    try:
        yield
    except GeneratorExit:
        error = "closed before its end"
        raise
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
        raise
    finally:
        tell(RunEnded(tell.run, time.time(), error))


def _started(work: Work, run: str, rows: Range, done: Ranges) -> RunStarted:
    plan, kinds = work.plan(), [device.kind for device in work.placement.devices]
    devices = tuple(Asked(d.device, d.label, kind, d.share) for d, kind in zip(plan.devices, kinds, strict=True))
    return RunStarted(
        run,
        time.time(),
        plan.model,
        plan.inputs,
        plan.outputs,
        rows,
        tuple(done),
        plan.batch_size,
        devices,
        dict(work.job.by_kind),
        work.job.channels_last,
    )


def _facts(work: Work) -> dict[str, str]:
    """What a report says of what was computed, beside what the events say."""
    facts = dict(_surroundings())
    if work.wanted is not None:
        header = work.wanted.headers[0]
        facts["stored in"] = ", ".join(work.wanted.paths)
        facts["network's fingerprint"] = header.model
        facts["input's fingerprint"] = "; ".join(f"{port}: {dict(mark)}" for port, mark in header.input.items())
    return facts


@functools.cache
def _surroundings() -> Mapping[str, str]:
    """Versions and machine, which reading takes milliseconds."""
    versions = [f"{name} {_version(name)}" for name in ("daskinfer", "torch", "dask", "distributed", "numpy")]
    # Not platform.platform(), which starts a process.
    machine = f"{platform.node()}, {platform.system()} {platform.release()} {platform.machine()}"
    return {"versions": ", ".join([*versions, f"Python {platform.python_version()}"]), "machine": machine}


def _version(name: str) -> str:
    """As the loaded package says it; to read what was installed takes 3 ms."""
    return str(getattr(sys.modules.get(name), "__version__", None) or metadata.version(name))
