"""The choice of where the chunks of a call are computed. The first rule that matches decides, and logs one DEBUG line:

1. No rows: nowhere.
2. ``devices="inline"``: in this process.
3. A client, named devices, a GPU, or ``chunk_timeout``, which restarts workers: on the workers.
4. ``devices="auto"`` with CPUs only, as in all rules below. Both were measured for this model by this process: whichever
   finishes sooner, including the startup of workers that are not running.
5. The managed cluster is running: on the workers, unless they turn out slower than this process was.
6. The first rows are computed in this process, with all of torch's threads. If the rest would finish before workers could
   start: everything in this process.
7. Otherwise workers start in the background and take over once they are ready; whichever turns out slower stops.

So a short call costs what a plain loop costs, and a long one gets the workers. Outputs computed with different numbers of
threads agree within rounding; name the devices to get the same bytes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

import torch

from daskinfer.cluster.process_cluster import default_cluster
from daskinfer.core.chunks import ChunkResult
from daskinfer.execution.executors import (
    ClusterExecutor,
    InlineExecutor,
    RunState,
    make_balancer,
    make_dynamic_balancer,
    record_speeds,
)
from daskinfer.execution.worker_setup import get_device_ids, open_client
from daskinfer.planning.job import InferenceJob, Placement

logger = logging.getLogger(__name__)

CLUSTER_START_SECONDS = 4.0  # until two workers have started and imported torch, on 2 cores (measured: 3.6 to 4.3)
WARMUP_CHUNKS = 3  # before the speed of this process is meaningful: the first allocates and loads kernels; arbitrary
MAX_CALLER_SHARE = 0.5  # of the time, spent by the caller on the outputs, up to which speeds are compared; arbitrary
MIN_COMPARE_SECONDS = 0.5  # that workers compute before they are compared with this process; arbitrary
MIN_WORKER_SPEED_RATIO = 0.9  # of the speed of this process; slower workers stop; arbitrary, a tenth is noise


def iter_results(state: RunState) -> Iterator[ChunkResult]:
    """Compute every chunk of a call where the rules of this module say, and yield the results as they come."""
    job = state.job
    if job.n_rows == 0:
        logger.debug("rule 1: no rows")
    elif job.placement.is_inline:
        logger.debug("rule 2: in this process")
        balancer = make_balancer(job, job.weights)
        yield from InlineExecutor(state).run(balancer, 0)
        record_speeds(state.job, balancer)
    elif _must_use_workers(job):
        logger.debug("rule 3: on the workers")
        with open_client(job.placement, state.client) as client:
            yield from ClusterExecutor(state).run(client)
    else:
        yield from AutoExecutor(state).run()


def _must_use_workers(job: InferenceJob) -> bool:
    has_timeout = job.run_config.options.chunk_timeout is not None
    return not job.placement.can_choose_executor or not job.balanced or has_timeout


class AutoExecutor:
    """Applies rules 4 to 7. This process is the last device of the balancer; either it or the workers have a weight."""

    def __init__(self, state: RunState) -> None:
        self._state, self._job = state, state.job
        self._inline_device = len(self._job.weights)
        self._balancer = make_dynamic_balancer(self._job, [*self._job.weights, 0.0])
        self._record = self._job.record
        self._inline = InlineExecutor(state)

    def run(self) -> Iterator[ChunkResult]:
        """Compute every chunk."""
        speeds, n_rows = self._record.speeds, self._job.n_rows
        is_running = default_cluster.is_running(get_device_ids(self._job.placement))
        if {"inline", "workers"} <= speeds.keys():
            logger.debug("rule 4: measured before, %s", speeds)
            startup = 0.0 if is_running else CLUSTER_START_SECONDS
            are_workers_sooner = n_rows / speeds["workers"] + startup < n_rows / speeds["inline"]
            yield from self._run_on_workers() if are_workers_sooner else self._run_inline()
        elif is_running:
            logger.debug("rule 5: the workers are running")
            yield from self._run_on_workers()
        else:
            yield from self._run_until_workers_start()

    def _run_until_workers_start(self) -> Iterator[ChunkResult]:
        starting: _BackgroundClusterStart | None = None
        for n_chunks, result in enumerate(self._run_inline()):
            yield result
            if starting is None and n_chunks >= WARMUP_CHUNKS:
                starting = self._start_workers_if_worth()
            if starting is not None and starting.is_ready:
                self._balancer.set_weight(self._inline_device, 0.0)  # its current task is finished first
        self._inline.n_threads = None
        if self._state.draining:
            return
        if starting is None:
            logger.debug("rule 6: all of it in this process")
            self._record_speed("inline", self._balancer.speeds[self._inline_device])
        if self._balancer.n_rows_left:
            yield from self._run_on_workers()

    def _start_workers_if_worth(self) -> _BackgroundClusterStart | None:
        n_rows_left, speed = self._balancer.n_rows_left, self._balancer.speeds[self._inline_device]
        if not speed or n_rows_left / speed <= CLUSTER_START_SECONDS:
            return None
        logger.debug("rule 7: %d rows left at %.0f rows/s, starting workers", n_rows_left, speed)
        self._record_speed("inline", speed)
        # With all threads, each would wait for those whose cores the starting workers use.
        self._inline.n_threads = max(1, torch.get_num_threads() // 2)
        return _BackgroundClusterStart(self._job.placement)

    def _run_inline(self) -> Iterator[ChunkResult]:
        self._enable(workers=False, inline=True)
        if speed := self._record.speeds.get("inline"):
            self._balancer.seed_speed(self._inline_device, speed)
        yield from self._inline.run(self._balancer, self._inline_device)

    def _run_on_workers(self) -> Iterator[ChunkResult]:
        """Compute on the workers, until they turn out slower than this process."""
        inline_speed = self._record.speeds.get("inline", 0.0)
        self._enable(workers=True, inline=False)
        started_at, n_done, caller_seconds = None, 0, 0.0
        with open_client(self._job.placement, self._state.client) as client:
            for result in ClusterExecutor(self._state).run(client, self._balancer):
                started_at = started_at or time.perf_counter()
                yielded_at = time.perf_counter()
                yield result
                n_done += result.chunk.n_rows
                seconds = time.perf_counter() - started_at
                caller_seconds += time.perf_counter() - yielded_at
                # Workers that wait for the caller do not show how fast they are.
                is_comparable = caller_seconds < MAX_CALLER_SHARE * seconds and seconds > MIN_COMPARE_SECONDS
                if is_comparable and n_done / seconds < MIN_WORKER_SPEED_RATIO * inline_speed:
                    logger.debug("workers: %.0f rows/s, this process: %.0f; continuing here", n_done / seconds, inline_speed)
                    self._enable(workers=False, inline=False)
            if started_at is not None and caller_seconds < MAX_CALLER_SHARE * (time.perf_counter() - started_at):
                self._record_speed("workers", n_done / max(1e-6, time.perf_counter() - started_at))
        if self._balancer.n_rows_left and not self._state.draining:
            yield from self._run_inline()

    def _enable(self, *, workers: bool, inline: bool) -> None:
        for device, weight in enumerate(self._job.weights):
            self._balancer.set_weight(device, weight if workers else 0.0)
        self._balancer.set_weight(self._inline_device, 1.0 if inline else 0.0)

    def _record_speed(self, executor: str, speed: float | None) -> None:
        if speed:
            self._record.speeds[executor] = speed


class _BackgroundClusterStart:
    """Starts the managed cluster in a thread, and keeps it for later calls; logs a warning if it does not start."""

    def __init__(self, placement: Placement) -> None:
        self.is_ready = False
        self._placement = placement
        threading.Thread(target=self._start, name="daskinfer-start", daemon=True).start()

    def _start(self) -> None:
        try:
            with open_client(self._placement, None):
                self.is_ready = True
        except Exception as error:
            logger.warning("workers failed to start; continuing in this process: %s", error)
