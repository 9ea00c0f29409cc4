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

from daskinfer.cluster.process_cluster import default_cluster
from daskinfer.core.row_ranges import Range, Ranges, subtract_ranges
from daskinfer.diagnostics.events import EventBus, PlannedDevice, RunEnded, RunStarted
from daskinfer.diagnostics.report import RunAggregator, RunReport
from daskinfer.errors import DaskInferError, Partial
from daskinfer.execution.ordering import ReorderBuffer
from daskinfer.execution.result_buffers import result_pool
from daskinfer.execution.results import ChunkResult
from daskinfer.execution.signals import convert_keyboard_interrupt, drain_on_signal
from daskinfer.execution.worker_setup import device_ids
from daskinfer.options import Options
from daskinfer.planning.build_job import PreparedJob

logger = logging.getLogger(__name__)

_MAX_SHOWN_ROWS = 5  # rows that a warning names; arbitrary


class RunLike(Protocol):
    """``driver.Run``: a call that computes while it is iterated over."""

    started_at: float | None
    draining: bool
    events: EventBus

    @property
    def missing(self) -> Ranges: ...

    def __iter__(self) -> Generator[ChunkResult, None, None]: ...


def compute_chunks(
    work: PreparedJob, write: Callable[[ChunkResult], None], run: RunLike, row_range: Range | None = None
) -> RunReport:
    """Compute every chunk, give each to ``copy_result``, and sum the events up; ``rows`` are the call's part, None: all."""
    tally = RunAggregator()
    run.events.add(tally)
    called = time.perf_counter()
    with _emit_run_events(work, run, row_range), drain_on_signal(run), closing(iter(run)) as found:
        for finished in found:
            write(finished)
    began = run.started_at or called
    return tally.make_report(seconds=time.perf_counter() - began, start_seconds=began - called, facts=_collect_facts(work))


def build_complete_report(work: PreparedJob) -> RunReport:
    """The report of a run whose output is complete."""
    tally = RunAggregator()
    tally(_make_run_started(work, "", everything := (0, work.layout.n_rows), [everything]))
    return tally.make_report(seconds=0.0, facts=_collect_facts(work))


def collect_output(work: PreparedJob, run: RunLike) -> tuple[Any, RunReport]:
    """The whole answer, in memory; what ends it early carries what was done."""
    # Memory is kept as long as the cluster is.
    empty = (
        result_pool.empty
        if work.placement.client is None and default_cluster.is_running(device_ids(work.placement))
        else np.empty
    )
    arrays = [empty((work.inputs.n_rows, *o.shape[1:]), o.dtype) for o in work.output_spec.outputs]
    done = np.zeros(work.inputs.n_rows, bool)

    def copy_result(finished: ChunkResult) -> None:
        rows = slice(finished.chunk.start, finished.chunk.stop)
        for array, found in zip(arrays, finished.arrays, strict=True):
            array[rows] = found
        done[rows] = True
        for failure in finished.failures:
            done[failure.start : failure.stop] = False

    try:
        report = compute_chunks(work, copy_result, run)
    except DaskInferError as error:
        for array in arrays:  # what is there is nobody's answer
            array[~done] = _choose_fill_value(array.dtype, work.run_config.options)
        error.partial = Partial(work.build_result(arrays), done)
        error.add_note(f"{int(done.sum()):,} of {len(done):,} rows have an answer: .partial.answer, where .partial.done.")
        raise
    return work.build_result(arrays), report


def _choose_fill_value(dtype: np.dtype[Any], options: Options) -> float:
    """What stands where there is no answer: as for rows that are skipped, else NaN, or 0 where a dtype has no NaN."""
    if options.on_error == "skip" and options.fill_value is not None:  # which every output can hold
        return options.fill_value
    return np.nan if dtype.kind in "fc" else 0


def stream_output(work: PreparedJob, run: RunLike, reorder_buffer: ReorderBuffer) -> Generator[Any, None, None]:
    """The answer block by block, in order."""
    tally = RunAggregator()
    run.events.add(tally)
    with _emit_run_events(work, run, None), convert_keyboard_interrupt(), closing(iter(run)) as finished:
        for arrays in reorder_buffer.iter_blocks(finished):
            yield work.build_result(arrays)
    warn_of_failed_rows(tally.make_report(seconds=0.0, facts={}).failed_rows)


def warn_of_failed_rows(failed_rows: Sequence[int]) -> None:
    """Say in the log which rows have no answer, where nobody gets a report."""
    if failed_rows:
        named = ", ".join(f"{row:,}" for row in failed_rows[:_MAX_SHOWN_ROWS]) + (
            ", …" if len(failed_rows) > _MAX_SHOWN_ROWS else ""
        )
        logger.warning(
            "%s rows have no answer (%s); predict(…, return_report=True) says why", f"{len(failed_rows):,}", named
        )


@contextmanager
def _emit_run_events(work: PreparedJob, run: RunLike, row_range: Range | None) -> Iterator[None]:
    """Tell when the run begins, and how it ends."""
    tell, error = run.events, ""
    part = (0, work.layout.n_rows) if row_range is None else row_range
    tell(_make_run_started(work, tell.run, part, list(subtract_ranges(part, run.missing))))
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


def _make_run_started(work: PreparedJob, run_id: str, row_range: Range, done: Ranges) -> RunStarted:
    plan, kinds = work.make_plan(), [device.kind for device in work.placement.devices]
    devices = tuple(PlannedDevice(d.device, d.label, kind, d.share) for d, kind in zip(plan.devices, kinds, strict=True))
    return RunStarted(
        run_id,
        time.time(),
        plan.model,
        plan.inputs,
        plan.outputs,
        row_range,
        tuple(done),
        plan.batch_size,
        devices,
        dict(work.run_config.by_kind),
        work.run_config.channels_last,
    )


def _collect_facts(work: PreparedJob) -> dict[str, str]:
    """What a report says of what was computed, beside what the events say."""
    facts = dict(_collect_environment())
    if work.output_request is not None:
        header = work.output_request.headers[0]
        facts["stored in"] = ", ".join(work.output_request.paths)
        facts["network's fingerprint"] = header.model
        facts["input's fingerprint"] = "; ".join(f"{port}: {dict(mark)}" for port, mark in header.input.items())
    return facts


@functools.cache
def _collect_environment() -> Mapping[str, str]:
    """Versions and machine, which reading takes milliseconds."""
    versions = [f"{name} {_get_version(name)}" for name in ("daskinfer", "torch", "dask", "distributed", "numpy")]
    # Not platform.platform(), which starts a process.
    machine = f"{platform.node()}, {platform.system()} {platform.release()} {platform.machine()}"
    return {"versions": ", ".join([*versions, f"Python {platform.python_version()}"]), "machine": machine}


def _get_version(name: str) -> str:
    """As the loaded package says it; to read what was installed takes 3 ms."""
    return str(getattr(sys.modules.get(name), "__version__", None) or metadata.version(name))
