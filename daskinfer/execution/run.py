"""Run one call: compute its chunks (``executor_choice``), pass the results to a sink, and tell the listeners about it."""

from __future__ import annotations

import functools
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager

from distributed import Client

from daskinfer.core.arrays import Array
from daskinfer.core.chunks import ChunkResult, RowFailure
from daskinfer.core.row_ranges import Ranges, subtract_ranges
from daskinfer.diagnostics.events import PlannedDevice, RunEnded, RunStarted
from daskinfer.diagnostics.report import RunAggregator, RunReport
from daskinfer.errors import ChunkError, DaskInferError, TooManyFailures
from daskinfer.execution.executor_choice import iter_results
from daskinfer.execution.executors import RunState
from daskinfer.execution.signals import convert_keyboard_interrupt, drain_on_signal
from daskinfer.execution.sinks import Sink, StreamSink, collect_facts, warn_of_failed_rows
from daskinfer.execution.tuning import benchmark_devices, benchmark_inline
from daskinfer.execution.worker_setup import make_task_builder, open_client, prepare_workers
from daskinfer.hardware.host import count_cores
from daskinfer.planning.job import InferenceJob
from daskinfer.scheduling.throughput_history import PerformanceRecord
from daskinfer.worker.current_device import current_device


class Run(RunState):
    """Computes the chunks of a call: iterate over the results as they come, or pass them all to a sink.

    Closing the iterator cancels the tasks in flight.

    Raises
    ------
    ChunkError, ModelError
        While iterating: the error of the first chunk that fails for good; the others are cancelled.
    ClusterError
        While iterating: if a worker cannot run the call, or all of them are lost.
    """

    def into(self, sink: Sink) -> RunReport:
        """Compute every chunk, pass each result to the sink, and return the report of the call."""
        aggregator = RunAggregator()
        self.events.add(aggregator)
        called = time.perf_counter()
        try:
            with self._emit_run_events(), drain_on_signal(self), closing(iter(self)) as results:
                for result in results:
                    sink.write(result)
        except DaskInferError as error:
            sink.abort(error)
            raise
        started = self.started_at or called
        seconds = time.perf_counter() - started
        return aggregator.make_report(seconds=seconds, start_seconds=started - called, facts=collect_facts(self.job))

    def stream(self, sink: StreamSink) -> Generator[list[Array], None, None]:
        """Compute every chunk, and yield the arrays of each in the order of the rows."""
        aggregator = RunAggregator()
        self.events.add(aggregator)
        with self._emit_run_events(), convert_keyboard_interrupt(), closing(iter(self)) as results:
            for result in results:
                sink.write(result)
                yield from sink.pop_ready()
        warn_of_failed_rows(aggregator.make_report(seconds=0.0, facts={}).failed_rows)

    def __iter__(self) -> Generator[ChunkResult, None, None]:
        self._check_failed_rows(())
        n_missing = sum(stop - start for start, stop in self.missing)
        record = self.job.record if n_missing else PerformanceRecord()
        for result in iter_results(self):
            if result.failures:
                self._check_failed_rows(result.failures)
            n_rows = result.chunk.n_rows
            n_missing -= n_rows
            record.n_rows += n_rows
            self.emit_done(result)
            yield result
        if n_missing > 0 and not self.draining:  # no output is better than one with holes
            raise ChunkError(f"internal error: {n_missing:,} rows were never computed. Please report this bug")
        self.draining = self.draining and n_missing > 0  # otherwise the run was complete before it could be interrupted

    def _check_failed_rows(self, failures: Sequence[RowFailure]) -> None:
        """Count failed rows, those of earlier attempts at the run included; raise if there are more than allowed."""
        options = self.job.run_config.options
        self.n_failed += sum(failure.stop - failure.start for failure in failures)
        start, stop = self.job.row_range
        if self.n_failed > (allowed := options.compute_max_failed_rows(stop - start)):
            last = f" The last: {failures[-1].exception}." if failures else ""
            raise TooManyFailures(
                f"{self.n_failed:,} rows failed; max_failed_rows={options.max_failed_rows!r} allows {allowed:,}.{last} "
                "Fix the rows, or allow more (--max-failed-rows)."
            )

    @contextmanager
    def _emit_run_events(self) -> Iterator[None]:
        """Tell the listeners that the run began, and how it ended."""
        error = ""
        done = list(subtract_ranges(self.job.row_range, self.missing))
        self.events(make_run_started(self.job, self.events.run, done))
        try:
            yield
        except GeneratorExit:
            error = "closed before its end"
            raise
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
            raise
        finally:
            self.events(RunEnded(self.events.run, time.time(), error))


def make_run_started(job: InferenceJob, run_id: str, done: Ranges) -> RunStarted:
    """Make the event that starts a run; ``done`` are the rows that earlier calls computed."""
    plan, kinds = job.plan, [device.kind for device in job.placement.devices]
    devices = tuple(
        PlannedDevice(d.device, d.label, kind, None if job.balanced else d.share)
        for d, kind in zip(plan.devices, kinds, strict=True)
    )
    return RunStarted(
        run_id,
        time.time(),
        plan.model,
        plan.inputs,
        plan.outputs,
        job.row_range,
        tuple(done),
        job.run_config.batch,
        devices,
        _get_n_cores(),
    )


@functools.cache
def _get_n_cores() -> int:
    """Return the cores of this process; cached, since counting them takes a tenth of a millisecond."""
    return count_cores()


def make_complete_report(job: InferenceJob) -> RunReport:
    """Make the report of a run whose output was complete already."""
    aggregator = RunAggregator()
    aggregator(make_run_started(job, "", [job.row_range]))
    return aggregator.make_report(seconds=0.0, facts=collect_facts(job))


def measure_throughput(job: InferenceJob, client: Client | None) -> dict[str, float]:
    """Measure the rows/s of each device on the first rows, on all devices at once; start workers if there are none.

    The result is remembered, so that the next call starts with it.
    """
    candidates = job.batch_size_candidates
    n_rows = job.n_rows if job.has_tuning_candidates else 0  # to choose a batch size for; 0: none to choose
    devices = job.placement.devices
    if job.placement.is_inline:
        read_rows = make_task_builder(job, None).read_rows
        choice = benchmark_inline(job, read_rows, current_device(), candidates, n_rows, sustained=True)
        speeds = {devices[0].name: choice.speed}
    else:
        with open_client(job.placement, client) as opened, prepare_workers(job, opened) as workers:
            queues = workers.device_queues
            choices = benchmark_devices(job, workers, queues, candidates, n_rows // len(queues), sustained=True)
            speeds = {devices[i].name: choice.speed for i, choice in choices.items()}
    job.record.speeds.update(speeds)
    return speeds
