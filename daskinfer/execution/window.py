"""The bounded window: which tasks are in flight on which device, and what they bring back.

Neither the scheduler nor this process ever holds more than ``max_in_flight`` tasks per device (decision 1: one large restricted
graph is never queued by the scheduler, and blames every waiting chunk for a worker that dies). Which chunks go where is the
dealer's to say. Placement is by the resource of each device on our own clusters, which comes back with a restarted worker,
else by address. Each kind of device has a key prefix of its own, since Dask estimates a task's duration by its prefix.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from distributed import Client, Future
from distributed.scheduler import KilledWorker

from daskinfer.cluster.placement import fetch_workers
from daskinfer.cluster.restart import WorkerRestarter
from daskinfer.core.chunks import Chunk
from daskinfer.diagnostics.events import ChunkFailed, ChunkStarted, DeviceChanged, EventBus
from daskinfer.errors import ChunkError, ClusterError, DaskInferError, SchedulerLost
from daskinfer.execution.device_queue import DeviceQueue, TaskFactory
from daskinfer.execution.results import ChunkResult, DependencyLostError, InFlightTask, ResultNotReadyError, fetch_results
from daskinfer.execution.signals import StopNow
from daskinfer.scheduling.balancer import LoadBalancer
from daskinfer.scheduling.retry import RetryQueue, is_fatal_error, make_lost_chunk_error
from daskinfer.transport.row_sources import RowTransferError
from daskinfer.worker.error_kinds import is_sticky

logger = logging.getLogger(__name__)

EXIT_WAIT_SECONDS = 10.0  # for tasks of half a second each; arbitrary
WORKER_CHECK_SECONDS = 5.0  # between looks whether all workers are still there; arbitrary
MISSING_WORKER_CHECK_SECONDS = 0.5  # the same while one is awaited; arbitrary
CHECKS_PER_TIMEOUT = 4  # so that a chunk that hangs is noticed a quarter of its timeout late at most
DEATH_NOTICE_SECONDS = 2.0  # that the scheduler may take to notice that a process has ended; 0.02 here
MAX_MISSING_SECONDS = 60.0  # that a worker may take to come back; arbitrary, 5 on an idle machine


@dataclass(frozen=True)
class FailurePolicy:
    """What is done about tasks that do not end well (``faults``).

    Parameters
    ----------
    retries, chunk_timeout
        As in ``Options``.
    replacer
        Ends workers that hang.
    give_up
        Called with a chunk that will not be tried again, the name of its device and why: what stands in for its answer, or
        the error is raised.
    back
        Called with the address of a worker in place of one that died, before it gets a task.
    tell
        Gets the events of tasks and devices.
    """

    retries: int
    chunk_timeout: float | None
    restarter: WorkerRestarter
    give_up: Callable[[Chunk, str, ChunkError], ChunkResult]
    on_worker_restart: Callable[[str], None] = lambda address: None
    events: EventBus = field(default_factory=EventBus)


class TaskWindow:
    """The tasks in flight of one call; a context manager that cancels what is left.

    Note: one thread uses it. Futures tell their end to a queue from a thread of Dask's.

    Parameters
    ----------
    client
        Who submits.
    work
        The function of a task: called on a worker with the order, a task and what Dask brings for it.
    order
        Gives what is the same for all tasks, itself or a future of it.
    lanes
        One per device.
    feed
        Makes a task of chunks, and names the futures that Dask has to bring.
    policy
        What is done about tasks that do not end well.
    settles
        Whether tasks in flight are waited for when the window is left early, for ``EXIT_WAIT_SECONDS`` at most: they write to
        files. A task that runs cannot be stopped.
    """

    def __init__(
        self,
        client: Client,
        task_function: Callable[..., Any],
        get_context: Callable[[], Any],
        device_queues: Sequence[DeviceQueue],
        build_task: TaskFactory,
        policy: FailurePolicy,
        *,
        wait_on_exit: bool = False,
    ) -> None:
        self._client, self._task_function, self._get_context, self._device_queues, self._build_task = (
            client,
            task_function,
            get_context,
            device_queues,
            build_task,
        )
        self._policy, self._wait_on_exit = policy, wait_on_exit
        self._retry_queue = RetryQueue(policy.retries)
        self._done_futures: queue.SimpleQueue[tuple[DeviceQueue, Future]] = queue.SimpleQueue()
        self._run_id = uuid.uuid4().hex
        self._n_submitted = 0
        self._last_check = time.monotonic()

    def __enter__(self) -> TaskWindow:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Cancel what is in flight; its slots are never used again."""
        left = [future for lane in self._device_queues for future in lane.tasks]
        if left and self._client.status == "running":
            if self._wait_on_exit and kind is not StopNow:
                _wait_until_done(left, EXIT_WAIT_SECONDS)
            self._client.cancel(left, force=True)

    def run(
        self,
        balancer: LoadBalancer,
        get_row_limit: Callable[[], int | None],
        is_draining: Callable[[], bool] = lambda: False,
    ) -> Iterator[ChunkResult]:
        """Keep every lane full, and give the chunks as they end, until the dealer deals no more.

        No chunk is begun that starts at or after row ``before()``; None: no limit. While ``draining()`` none is begun at
        all, and what is in flight ends.
        """

        def fill_queues() -> bool:
            return self._fill_queues(balancer, get_row_limit(), draining=is_draining())

        while fill_queues():
            if time.monotonic() - self._last_check > self._check_seconds:
                yield from self._check_workers(balancer)
            try:
                lane, future = self._done_futures.get(timeout=self._wait_seconds)
            except queue.Empty:
                continue
            if future not in lane.tasks:
                continue  # it was taken back meanwhile
            if future.status in ("pending", "lost"):
                self._watch_future(
                    lane, future
                )  # its worker ended before its answer was asked for; now it is computed again
            else:
                yield from self._handle_done(lane, future, balancer, fill_queues)

    @property
    def _check_seconds(self) -> float:
        """Seconds between looks at what gives no answer."""
        timeout = self._policy.chunk_timeout
        awaited = any(lane.missing_since is not None and not lane.lost for lane in self._device_queues)
        patience = MISSING_WORKER_CHECK_SECONDS if awaited else WORKER_CHECK_SECONDS
        return patience if timeout is None else min(patience, timeout / CHECKS_PER_TIMEOUT)

    @property
    def _wait_seconds(self) -> float:
        due = self._retry_queue.wait_seconds
        return self._check_seconds if due is None else min(self._check_seconds, due)

    def _handle_done(
        self, device_queue: DeviceQueue, future: Future, balancer: LoadBalancer, fill_queues: Callable[[], bool]
    ) -> Iterator[ChunkResult]:
        """Use what a task brought back, or see to it that its chunks are run again."""
        task = device_queue.tasks[future]
        try:
            finished = fetch_results(future, task)
        except ResultNotReadyError:
            self._watch_future(device_queue, future)
        except KilledWorker as error:
            del device_queue.tasks[future]  # its slot is not to be used again: its process may still be ending
            # Or the client keeps it, with all that its error's traceback names: this frame, the arena, and so itself.
            future.release()
            yield from self._handle_worker_death(device_queue, task, _get_worker_address(error.last_worker), balancer)
        except DependencyLostError:
            del device_queue.tasks[future]
            yield from self._handle_worker_death(device_queue, task, device_queue.name, balancer)
        except Exception as error:
            del device_queue.tasks[future]
            if future.status == "error":  # its attempt has answered
                _free_slot(task)
            future.release()
            if isinstance(error, DaskInferError):
                error.__traceback__ = None  # where in the worker and in Dask; its cause keeps its own
            yield from self._handle_error(device_queue, task, error, balancer)
        else:
            del device_queue.tasks[future]
            # Or it would be computed again where its worker ends before the answers are used: into a slot that is another's
            # by then.
            future.release()
            device_queue.last_response = time.monotonic()
            balancer.record(
                device_queue.device, task.chunks, sum(f.stats.seconds + f.stats.waited_seconds for f in finished)
            )
            attempts = [self._retry_queue.on_done(chunk) for chunk in task.chunks]
            fill_queues()  # before the answers are used: no worker need wait for that
            yield from (replace(one, attempts=n) for one, n in zip(finished, attempts, strict=True))
            _free_slot(task)

    def _handle_error(
        self, device_queue: DeviceQueue, task: InFlightTask, error: Exception, balancer: LoadBalancer
    ) -> Iterator[ChunkResult]:
        if is_fatal_error(error):
            raise error
        # Once per chunk: what is tried again mostly fails as before.
        level = logging.WARNING if self._retry_queue.has_no_failures(task.chunks) else logging.DEBUG
        logger.log(level, "%s on %s: %s", task.row_label, device_queue.name, error)
        self._emit_chunk_failed(device_queue, task, f"{type(error).__name__}: {error}")
        if len(task.chunks) > 1:  # one of them is at fault
            self._retry_queue.split(task.chunks)
        elif not self._retry_queue.on_error(task.chunks[0], error):
            assert isinstance(error, ChunkError)  # all else ends the call
            yield self._give_up(task.chunks[0], device_queue, error, balancer)
        # What comes from the process that was ended says nothing of the one after it.
        if is_sticky(error) and task.submitted_at > device_queue.restarted_at and not device_queue.lost:
            yield from self._restart_worker(
                device_queue, device_queue.find_worker(_get_live_workers(self._client)), balancer
            )

    def _handle_worker_death(
        self, device_queue: DeviceQueue, task: InFlightTask, worker: str, balancer: LoadBalancer
    ) -> Iterator[ChunkResult]:
        logger.warning(
            "the worker of %s ended with %s in flight; they are run again alone", device_queue.name, task.row_label
        )
        self._emit_chunk_failed(device_queue, task, "its worker ended")
        for chunk in task.chunks:
            if not self._retry_queue.on_worker_death(chunk, alone=task.alone):
                error = make_lost_chunk_error(chunk, worker, hung=task.hung, timeout_seconds=self._policy.chunk_timeout)
                yield self._give_up(chunk, device_queue, error, balancer)

    def _emit_chunk_failed(self, device_queue: DeviceQueue, task: InFlightTask, reason: str) -> None:
        for chunk in task.chunks:
            self._policy.events(
                ChunkFailed(self._policy.events.run, time.time(), chunk.start, chunk.stop, device_queue.name, reason)
            )

    def _emit_device_changed(self, device_queue: DeviceQueue, state: str) -> None:
        self._policy.events(DeviceChanged(self._policy.events.run, time.time(), device_queue.name, state))

    def _give_up(self, chunk: Chunk, device_queue: DeviceQueue, error: ChunkError, balancer: LoadBalancer) -> ChunkResult:
        finished = self._policy.give_up(chunk, device_queue.name, error)
        balancer.discard(chunk)
        return replace(finished, attempts=self._retry_queue.on_done(chunk))

    def _fill_queues(self, balancer: LoadBalancer, row_limit: int | None, *, draining: bool) -> bool:
        """Fill the lanes in turn, so that all begin as soon as can be; whether anything is in flight or waits for it."""
        while not draining and sum(self._submit_next(lane, balancer, row_limit) for lane in self._device_queues):
            pass
        waits = self._retry_queue.n_waiting > 0 or (
            balancer.n_rows_left > 0 and any(lane.is_waiting_for_worker for lane in self._device_queues)
        )
        return any(lane.tasks for lane in self._device_queues) or (waits and not draining)

    def _submit_next(self, device_queue: DeviceQueue, balancer: LoadBalancer, row_limit: int | None) -> bool:
        if device_queue.is_full:
            return False
        if (chunk := self._retry_queue.get_due_chunk(alone=True)) and device_queue is self._find_emptiest_queue():
            # What ended a worker runs with nothing beside it: the lane is emptied first.
            return not device_queue.tasks and self._submit(device_queue, (chunk,), alone=True)
        if chunk := self._retry_queue.get_due_chunk(alone=False):
            return self._submit(device_queue, (chunk,))
        for device in (device_queue.device, *(other.device for other in self._device_queues if other.lost)):
            dealt = balancer.next_task(device, row_limit)
            if chunks := tuple(chunk for chunk in dealt if chunk.n_rows):
                return self._submit(device_queue, chunks)
            if dealt:
                return True
        return False

    def _find_emptiest_queue(self) -> DeviceQueue:
        free = (lane for lane in self._device_queues if not lane.is_full)
        return min(free, key=lambda lane: (lane.missing_since is not None, len(lane.tasks)))

    def _submit(self, device_queue: DeviceQueue, chunks: tuple[Chunk, ...], *, alone: bool = False) -> bool:
        # Without a slot, those of lost tasks are never used again, the answer comes back by Dask's comms.
        slot = device_queue.pool.free_slots.pop() if device_queue.pool is not None and device_queue.pool.free_slots else None
        for chunk in chunks:
            self._retry_queue.on_start(chunk)
        try:
            task, brought = self._build_task(chunks, slot, device_queue.workers, reads_process_memory=device_queue.reads_process_memory)
        except RowTransferError:
            self._retry_queue.split(chunks)
            device_queue.missing_since = time.monotonic()
            if slot is not None:
                slot.release()
            return False
        task = replace(task, alone=alone)
        key, order = f"infer-{device_queue.kind}-{self._run_id}-{self._n_submitted}", self._get_context()
        future = self._client.submit(
            self._task_function, order, task.serialize(), brought, key=key, pure=False, **device_queue.restriction
        )
        self._n_submitted += 1
        places = tuple(piece.output_refs for piece in task.chunk_inputs)
        needs = [*brought, order] if isinstance(order, Future) else brought
        device_queue.tasks[future] = InFlightTask(chunks, slot, places, alone, time.monotonic(), tuple(needs))
        self._watch_future(device_queue, future)
        tell, now = self._policy.events, time.time()
        for chunk in chunks:
            tell(ChunkStarted(tell.run, now, chunk.start, chunk.stop, device_queue.name))
        return True

    def _watch_future(self, device_queue: DeviceQueue, future: Future) -> None:
        future.add_done_callback(lambda future: self._done_futures.put((device_queue, future)))

    def _check_workers(self, balancer: LoadBalancer) -> Iterator[ChunkResult]:
        """See which workers are there, and which of them take too long."""
        self._last_check = now = time.monotonic()
        there = _get_live_workers(self._client)
        for lane in self._device_queues:
            address = lane.find_worker(there)
            if lane.lost:
                yield from self._requeue_pending(lane, balancer)
            elif address is None:
                yield from self._handle_missing(lane, now, balancer)
            else:
                yield from self._check_worker(lane, address, now, balancer)

    def _check_worker(
        self, device_queue: DeviceQueue, address: str, now: float, balancer: LoadBalancer
    ) -> Iterator[ChunkResult]:
        """See to a device whose worker is there: does it answer?"""
        if device_queue.missing_since is not None:
            device_queue.missing_since, device_queue.last_response = None, now
        if device_queue.workers and address not in device_queue.workers:  # its nanny brought it back
            self._policy.on_worker_restart(address)
            device_queue.restriction = {"workers": [address]}
            yield from self._requeue_pending(device_queue, balancer)
        if task := device_queue.find_hung_task(self._policy.chunk_timeout, now):
            logger.warning(
                "%s gives no answer within chunk_timeout on %s; its worker is replaced", task.row_label, device_queue.name
            )
            task.hung = True
            yield from self._restart_worker(device_queue, address, balancer)

    def _handle_missing(self, device_queue: DeviceQueue, now: float, balancer: LoadBalancer) -> Iterator[ChunkResult]:
        """See to a device whose worker is away: is somebody about to bring it back?"""
        if device_queue.missing_since is None:
            device_queue.missing_since = now
        if device_queue.workers:  # it comes back under another address, and what waits for this one would do so for good
            yield from self._requeue_pending(device_queue, balancer)
        comes_back = device_queue.nanny or not device_queue.workers
        if not comes_back or now - device_queue.missing_since > MAX_MISSING_SECONDS:
            yield from self._drop_device(device_queue, balancer)

    def _requeue_pending(self, device_queue: DeviceQueue, balancer: LoadBalancer) -> Iterator[ChunkResult]:
        """Have all that a device has not answered yet run again."""
        tasks = {future: device_queue.tasks.pop(future) for future in device_queue.get_pending_futures()}
        self._client.cancel(list(tasks), force=True)
        for task in tasks.values():
            yield from self._handle_worker_death(device_queue, task, device_queue.name, balancer)

    def _restart_worker(
        self, device_queue: DeviceQueue, address: str | None, balancer: LoadBalancer
    ) -> Iterator[ChunkResult]:
        """Have a device's worker replaced, or go on without it."""
        if self._policy.restarter.restart_worker(device_queue.name, address):
            device_queue.restarted_at = time.monotonic()
            self._emit_device_changed(device_queue, "replaced")
            _wait_until_removed(self._client, address)
        else:
            yield from self._drop_device(device_queue, balancer)

    def _drop_device(self, device_queue: DeviceQueue, balancer: LoadBalancer) -> Iterator[ChunkResult]:
        """Hand what a device has to the others."""
        device_queue.lost = True
        if all(other.lost for other in self._device_queues):
            raise ClusterError(
                f"no worker is left of {', '.join(other.name for other in self._device_queues)}, with rows still to compute; at "
                "least one has to be there, or to come back. Look into their logs, and repeat the call."
            )
        logger.warning("%s is gone; the others go on without it", device_queue.name)
        self._emit_device_changed(device_queue, "gone")
        balancer.remove_device(device_queue.device)
        yield from self._requeue_pending(device_queue, balancer)


def _free_slot(task: InFlightTask) -> None:
    if task.slot is not None:
        task.slot.release()


def _wait_until_removed(client: Client, address: str | None) -> None:
    """Wait until the scheduler has noticed that a worker ended: a task that it still sent there would be blamed for it."""
    deadline = time.monotonic() + DEATH_NOTICE_SECONDS
    while address in _get_live_workers(client) and time.monotonic() < deadline:
        time.sleep(DEATH_NOTICE_SECONDS / 100)


def _get_live_workers(client: Client) -> dict[str, dict[str, Any]]:
    """The workers that the scheduler has."""
    if client.status == "running":
        with contextlib.suppress(OSError, TimeoutError, RuntimeError):
            return fetch_workers(client)
    raise SchedulerLost(
        f"the scheduler of the client is lost (the client is {client.status}); it has to run until the call ends. Start the "
        "cluster again, and repeat the call."
    )


def _get_worker_address(worker: Any) -> str:
    """Of a worker as Dask's error has it: its record, or nothing."""
    return str(getattr(worker, "address", "")) or "(unknown)"


def _wait_until_done(futures: Sequence[Future], seconds: float) -> None:
    """Wait until tasks have ended, however they do."""
    deadline = time.monotonic() + seconds
    for future in futures:
        with contextlib.suppress(Exception):
            future.exception(timeout=max(0.0, deadline - time.monotonic()))
