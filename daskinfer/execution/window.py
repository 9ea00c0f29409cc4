"""The bounded window: which tasks are in flight on which device, and what happens when they end.

Neither the scheduler nor this process ever holds more than ``max_in_flight`` tasks per device; the docstring of
``daskinfer.execution`` says why. The balancer decides which chunk goes to which device. On a managed cluster, a task is
placed by its device's resource, which a restarted worker has again, otherwise by address. Each kind of device has its own
key prefix, because Dask estimates the duration of a task by its prefix.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any

from distributed import Client, Future
from distributed.scheduler import KilledWorker

from daskinfer.cluster.placement import fetch_workers
from daskinfer.cluster.restart import WorkerRestarter
from daskinfer.core.chunks import Chunk, ChunkResult
from daskinfer.diagnostics.events import ChunkFailed, ChunkStarted, DeviceChanged, EventBus
from daskinfer.errors import ChunkError, ClusterError, DaskInferError, SchedulerLost
from daskinfer.execution.device_queue import DeviceQueue
from daskinfer.execution.results import DependencyLostError, InFlightTask, ResultNotReadyError, fetch_results
from daskinfer.execution.signals import StopNow
from daskinfer.scheduling.balancer import LoadBalancer
from daskinfer.scheduling.retry import ErrorKind, RetryQueue, is_fatal_error, make_lost_chunk_error
from daskinfer.transport.row_sources import RowTransferError, Task
from daskinfer.worker.error_kinds import classify_error

logger = logging.getLogger(__name__)

EXIT_WAIT_SECONDS = 10.0  # for tasks of half a second each; arbitrary
WORKER_CHECK_SECONDS = 5.0  # between checks that all workers are alive; arbitrary
MISSING_WORKER_CHECK_SECONDS = 0.5  # the same while a worker is missing; arbitrary
CHECKS_PER_TIMEOUT = 4  # so that a hung chunk is noticed at most a quarter of its timeout late
DEATH_NOTICE_SECONDS = 2.0  # that the scheduler may take to notice that a process has ended; measured: 0.02
MAX_MISSING_SECONDS = 60.0  # that a worker may take to restart; arbitrary, measured: 5 on an idle machine


@dataclass(frozen=True)
class FailurePolicy:
    """What is done about tasks that fail; the rules are in ``scheduling.retry``.

    Parameters
    ----------
    retries, chunk_timeout
        As in ``Options``.
    restarter
        Restarts workers that hang.
    give_up
        Called with a chunk that is not retried any more, the name of its device and the last error; returns a result that
        takes its place, or raises the error.
    on_worker_restart
        Called with the address of a worker that replaces one that died, before it gets a task.
    events
        Gets the events of chunks and devices.
    """

    retries: int
    chunk_timeout: float | None
    restarter: WorkerRestarter
    give_up: Callable[[Chunk, str, ChunkError], ChunkResult]
    on_worker_restart: Callable[[str], None] = lambda address: None
    events: EventBus = field(default_factory=EventBus)


class TaskWindow:
    """The tasks in flight of one call; a context manager that cancels those that are left.

    Note: one thread uses it. A thread of Dask's puts each future that is done into a queue.

    Parameters
    ----------
    client
        Submits the tasks.
    task_function
        Called on a worker with the spec of the call, a serialized task and the results of its dependencies.
    get_spec
        Returns what is the same for all tasks of the call: the serialized spec, or a future of it.
    device_queues
        One per device.
    build_task
        Makes a task of chunks; returns it with the futures that Dask has to bring with it.
    policy
        What is done about tasks that fail.
    wait_on_exit
        Whether to wait for tasks in flight, ``EXIT_WAIT_SECONDS`` at most, when the window is left early: they write to
        files, and a task that runs cannot be stopped.
    """

    def __init__(
        self,
        client: Client,
        task_function: Callable[..., Any],
        get_spec: Callable[[], Any],
        device_queues: Sequence[DeviceQueue],
        build_task: Callable[..., tuple[Task, list[Future]]],
        policy: FailurePolicy,
        *,
        wait_on_exit: bool = False,
    ) -> None:
        self._client, self._device_queues = client, device_queues
        self._task_function, self._get_spec, self._build_task = task_function, get_spec, build_task
        self._policy, self._wait_on_exit = policy, wait_on_exit
        self._retry_queue = RetryQueue(policy.retries)
        self._done_futures: SimpleQueue[tuple[DeviceQueue, Future]] = SimpleQueue()
        self._run_id = uuid.uuid4().hex
        self._n_submitted = 0
        self._last_check = time.monotonic()

    def __enter__(self) -> TaskWindow:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Cancel the tasks in flight; their slots are never used again."""
        in_flight = [future for device_queue in self._device_queues for future in device_queue.tasks]
        if in_flight and self._client.status == "running":
            if self._wait_on_exit and kind is not StopNow:
                _wait_until_done(in_flight, EXIT_WAIT_SECONDS)
            self._client.cancel(in_flight, force=True)

    def run(
        self,
        balancer: LoadBalancer,
        get_row_limit: Callable[[], int | None],
        is_draining: Callable[[], bool] = lambda: False,
    ) -> Iterator[ChunkResult]:
        """Keep every device queue full and yield the results as they come, until the balancer has no chunk left.

        No chunk is submitted that starts at or after row ``get_row_limit()``; None: no limit. While ``is_draining()``, none
        is submitted at all, and those in flight finish.
        """

        def fill_queues() -> bool:
            return self._fill_queues(balancer, get_row_limit(), draining=is_draining())

        while fill_queues():
            if time.monotonic() - self._last_check > self._check_seconds:
                yield from self._check_workers(balancer)
            try:
                device_queue, future = self._done_futures.get(timeout=self._wait_seconds)
            except Empty:
                continue
            if future not in device_queue.tasks:
                continue  # it was requeued meanwhile
            if future.status in ("pending", "lost"):
                self._watch_future(device_queue, future)  # its worker died before its result was requested: it runs again
            else:
                yield from self._handle_done(device_queue, future, balancer, fill_queues)

    @property
    def _check_seconds(self) -> float:
        """Seconds between checks of workers and hung chunks."""
        timeout = self._policy.chunk_timeout
        is_any_missing = any(
            (queue.away or queue.missing_since is not None) and not queue.lost for queue in self._device_queues
        )
        seconds = MISSING_WORKER_CHECK_SECONDS if is_any_missing else WORKER_CHECK_SECONDS
        return seconds if timeout is None else min(seconds, timeout / CHECKS_PER_TIMEOUT)

    @property
    def _wait_seconds(self) -> float:
        retry_seconds = self._retry_queue.wait_seconds
        return self._check_seconds if retry_seconds is None else min(self._check_seconds, retry_seconds)

    def _handle_done(
        self, device_queue: DeviceQueue, future: Future, balancer: LoadBalancer, fill_queues: Callable[[], bool]
    ) -> Iterator[ChunkResult]:
        """Yield the results of a task that ended, or schedule its chunks to run again."""
        task = device_queue.tasks[future]
        try:
            results = fetch_results(future, task)
        except ResultNotReadyError:
            self._watch_future(device_queue, future)
        except KilledWorker as error:
            del device_queue.tasks[future]  # its slot must not be used again: its process may still be ending
            # Otherwise the client keeps it, with all that its error's traceback refers to: this frame, the pool, so itself.
            future.release()
            self._mark_away(device_queue)
            yield from self._handle_worker_death(device_queue, task, _get_worker_address(error.last_worker), balancer)
        except DependencyLostError:
            del device_queue.tasks[future]
            yield from self._handle_worker_death(device_queue, task, device_queue.name, balancer)
        except Exception as error:
            del device_queue.tasks[future]
            if future.status == "error":  # its attempt has responded
                _free_slot(task)
            future.release()
            if isinstance(error, DaskInferError):
                error.__traceback__ = None  # it names lines of the worker and of Dask; the cause keeps its own
            yield from self._handle_error(device_queue, task, error, balancer)
        else:
            del device_queue.tasks[future]
            # Otherwise, if its worker died before the results are used, it would be computed again, into a slot that another
            # task has by then.
            future.release()
            device_queue.last_response = time.monotonic()
            busy_seconds = sum(result.stats.seconds + result.stats.waited_seconds for result in results)
            balancer.record(device_queue.device, task.chunks, busy_seconds)
            attempts = [self._retry_queue.on_done(chunk) for chunk in task.chunks]
            fill_queues()  # before the results are used: no worker has to wait for that
            yield from (replace(result, attempts=n) for result, n in zip(results, attempts, strict=True))
            _free_slot(task)

    def _handle_error(
        self, device_queue: DeviceQueue, task: InFlightTask, error: Exception, balancer: LoadBalancer
    ) -> Iterator[ChunkResult]:
        if is_fatal_error(error):
            raise error
        # One warning per chunk: a retry mostly fails as before.
        level = logging.WARNING if self._retry_queue.has_no_failures(task.chunks) else logging.DEBUG
        logger.log(level, "%s failed on %s: %s", task.row_label, device_queue.name, error)
        self._emit_chunk_failed(device_queue, task, f"{type(error).__name__}: {error}")
        kind = classify_error(error)
        if len(task.chunks) > 1:  # only one of them failed
            self._retry_queue.split(task.chunks)
        elif not self._retry_queue.on_error(task.chunks[0], kind):
            assert isinstance(error, ChunkError)  # any other error is fatal
            yield self._give_up(task.chunks[0], device_queue, error, balancer)
        # An error of the process that was killed says nothing about the one that replaced it.
        if kind is ErrorKind.STICKY and task.submitted_at > device_queue.restarted_at and not device_queue.lost:
            address = device_queue.find_worker(_get_live_workers(self._client))
            yield from self._restart_worker(device_queue, address, balancer)

    def _handle_worker_death(
        self, device_queue: DeviceQueue, task: InFlightTask, worker: str, balancer: LoadBalancer
    ) -> Iterator[ChunkResult]:
        logger.warning(
            "worker for %s died while computing %s; retrying them in isolation", device_queue.name, task.row_label
        )
        self._emit_chunk_failed(device_queue, task, "its worker died")
        for chunk in task.chunks:
            if not self._retry_queue.on_worker_death(chunk, alone=task.alone):
                error = make_lost_chunk_error(chunk, worker, hung=task.hung, timeout_seconds=self._policy.chunk_timeout)
                yield self._give_up(chunk, device_queue, error, balancer)

    def _emit_chunk_failed(self, device_queue: DeviceQueue, task: InFlightTask, reason: str) -> None:
        for chunk in task.chunks:
            self._policy.events(
                ChunkFailed(self._policy.events.run, time.time(), chunk.start, chunk.stop, device_queue.name, reason)
            )

    def _mark_away(self, device_queue: DeviceQueue) -> None:
        """Tell the listeners, once, that a worker has died and is expected back."""
        if not device_queue.away and not device_queue.lost:
            device_queue.away = True
            self._emit_device_changed(device_queue, "restarting")

    def _emit_device_changed(self, device_queue: DeviceQueue, state: str) -> None:
        self._policy.events(DeviceChanged(self._policy.events.run, time.time(), device_queue.name, state))

    def _give_up(self, chunk: Chunk, device_queue: DeviceQueue, error: ChunkError, balancer: LoadBalancer) -> ChunkResult:
        result = self._policy.give_up(chunk, device_queue.name, error)
        balancer.discard(chunk)
        return replace(result, attempts=self._retry_queue.on_done(chunk))

    def _fill_queues(self, balancer: LoadBalancer, row_limit: int | None, *, draining: bool) -> bool:
        """Fill the device queues in turn, so that all begin as soon as possible.

        Return whether any task is in flight, or waits to be submitted.
        """
        while not draining and sum(self._submit_next(queue, balancer, row_limit) for queue in self._device_queues):
            pass
        is_worker_awaited = any(queue.is_waiting_for_worker for queue in self._device_queues)
        is_work_waiting = self._retry_queue.n_waiting > 0 or (balancer.n_rows_left > 0 and is_worker_awaited)
        return any(queue.tasks for queue in self._device_queues) or (is_work_waiting and not draining)

    def _submit_next(self, device_queue: DeviceQueue, balancer: LoadBalancer, row_limit: int | None) -> bool:
        if device_queue.is_full:
            return False
        if (chunk := self._retry_queue.get_due_chunk(alone=True)) and device_queue is self._find_emptiest_queue():
            # A chunk that may have killed a worker runs with nothing else in flight there: the queue empties first.
            return not device_queue.tasks and self._submit(device_queue, (chunk,), alone=True)
        if chunk := self._retry_queue.get_due_chunk(alone=False):
            return self._submit(device_queue, (chunk,))
        for device in (device_queue.device, *(other.device for other in self._device_queues if other.lost)):
            next_chunks = balancer.next_task(device, row_limit)
            if chunks := tuple(chunk for chunk in next_chunks if chunk.n_rows):
                return self._submit(device_queue, chunks)
            if next_chunks:
                return True
        return False

    def _find_emptiest_queue(self) -> DeviceQueue:
        free = (queue for queue in self._device_queues if not queue.is_full)
        return min(free, key=lambda queue: (queue.missing_since is not None, len(queue.tasks)))

    def _submit(self, device_queue: DeviceQueue, chunks: tuple[Chunk, ...], *, alone: bool = False) -> bool:
        # Slots of lost tasks are never used again; without one the results come back through Dask's comms.
        slot = device_queue.pool.free_slots.pop() if device_queue.pool is not None and device_queue.pool.free_slots else None
        for chunk in chunks:
            self._retry_queue.on_start(chunk)
        try:
            task, dependencies = self._build_task(
                chunks, slot, device_queue.workers, reads_process_memory=device_queue.reads_process_memory
            )
        except RowTransferError:
            self._retry_queue.split(chunks)
            device_queue.missing_since = time.monotonic()
            if slot is not None:
                slot.release()
            return False
        task = replace(task, alone=alone)
        key, spec = f"infer-{device_queue.kind}-{self._run_id}-{self._n_submitted}", self._get_spec()
        future = self._client.submit(
            self._task_function, spec, task.serialize(), dependencies, key=key, pure=False, **device_queue.restriction
        )
        self._n_submitted += 1
        output_refs = tuple(chunk_input.output_refs for chunk_input in task.chunk_inputs)
        needed = (*dependencies, spec) if isinstance(spec, Future) else tuple(dependencies)
        device_queue.tasks[future] = InFlightTask(chunks, slot, output_refs, alone, time.monotonic(), needed)
        self._watch_future(device_queue, future)
        events, now = self._policy.events, time.time()
        for chunk in chunks:
            events(ChunkStarted(events.run, now, chunk.start, chunk.stop, device_queue.name))
        return True

    def _watch_future(self, device_queue: DeviceQueue, future: Future) -> None:
        future.add_done_callback(lambda future: self._done_futures.put((device_queue, future)))

    def _check_workers(self, balancer: LoadBalancer) -> Iterator[ChunkResult]:
        """Check which workers are alive, and which of them take too long."""
        self._last_check = now = time.monotonic()
        live_workers = _get_live_workers(self._client)
        for device_queue in self._device_queues:
            address = device_queue.find_worker(live_workers)
            if device_queue.lost:
                yield from self._requeue_pending(device_queue, balancer)
            elif address is None:
                yield from self._handle_missing(device_queue, now, balancer)
            else:
                yield from self._check_worker(device_queue, address, now, balancer)

    def _check_worker(
        self, device_queue: DeviceQueue, address: str, now: float, balancer: LoadBalancer
    ) -> Iterator[ChunkResult]:
        """Check a device whose worker is alive: it may be a new one, or take too long."""
        if device_queue.missing_since is not None:
            device_queue.missing_since, device_queue.last_response = None, now
        if device_queue.workers and address not in device_queue.workers:  # its nanny restarted it
            self._mark_away(device_queue)
            self._policy.on_worker_restart(address)
            device_queue.restriction = {"workers": [address]}
            yield from self._requeue_pending(device_queue, balancer)
        if device_queue.away:
            device_queue.away = False
            self._emit_device_changed(device_queue, "replaced")
        if task := device_queue.find_hung_task(self._policy.chunk_timeout, now):
            logger.warning(
                "%s timed out on %s (chunk_timeout=%g s); restarting its worker",
                task.row_label,
                device_queue.name,
                self._policy.chunk_timeout,
            )
            task.hung = True
            yield from self._restart_worker(device_queue, address, balancer)

    def _handle_missing(self, device_queue: DeviceQueue, now: float, balancer: LoadBalancer) -> Iterator[ChunkResult]:
        """Handle a device whose worker is missing: wait if it may be restarted, else continue without the device."""
        if device_queue.missing_since is None:
            device_queue.missing_since = now
        if device_queue.workers:  # it returns under another address, and tasks that wait for this one would wait forever
            yield from self._requeue_pending(device_queue, balancer)
        may_return = device_queue.nanny or not device_queue.workers
        if not may_return or now - device_queue.missing_since > MAX_MISSING_SECONDS:
            yield from self._drop_device(device_queue, balancer)
        else:
            self._mark_away(device_queue)

    def _requeue_pending(self, device_queue: DeviceQueue, balancer: LoadBalancer) -> Iterator[ChunkResult]:
        """Cancel the pending tasks of a device, and schedule their chunks to run again."""
        tasks = {future: device_queue.tasks.pop(future) for future in device_queue.get_pending_futures()}
        self._client.cancel(list(tasks), force=True)
        for task in tasks.values():
            yield from self._handle_worker_death(device_queue, task, device_queue.name, balancer)

    def _restart_worker(
        self, device_queue: DeviceQueue, address: str | None, balancer: LoadBalancer
    ) -> Iterator[ChunkResult]:
        """Restart the worker of a device; if that is not possible, continue without the device."""
        if self._policy.restarter.restart_worker(device_queue.name, address):
            device_queue.restarted_at = time.monotonic()
            self._mark_away(device_queue)
            _wait_until_removed(self._client, address)
        else:
            yield from self._drop_device(device_queue, balancer)

    def _drop_device(self, device_queue: DeviceQueue, balancer: LoadBalancer) -> Iterator[ChunkResult]:
        """Give the chunks of a lost device to the others."""
        device_queue.lost = True
        if all(other.lost for other in self._device_queues):
            names = ", ".join(queue.name for queue in self._device_queues)
            raise ClusterError(
                f"lost all workers ({names}) while rows were still to be computed; at least one must be running. "
                "Check the workers' logs, and repeat the call."
            )
        logger.warning("lost device %s; continuing on the remaining devices", device_queue.name)
        self._emit_device_changed(device_queue, "gone")
        balancer.remove_device(device_queue.device)
        yield from self._requeue_pending(device_queue, balancer)


def _free_slot(task: InFlightTask) -> None:
    if task.slot is not None:
        task.slot.release()


def _wait_until_removed(client: Client, address: str | None) -> None:
    """Wait until the scheduler has noticed that a worker ended: it would blame any task that it still sent there."""
    deadline = time.monotonic() + DEATH_NOTICE_SECONDS
    while address in _get_live_workers(client) and time.monotonic() < deadline:
        time.sleep(DEATH_NOTICE_SECONDS / 100)


def _get_live_workers(client: Client) -> dict[str, dict[str, Any]]:
    """Return the scheduler's record of each worker, by address."""
    if client.status == "running":
        with contextlib.suppress(OSError, TimeoutError, RuntimeError):
            return fetch_workers(client)
    raise SchedulerLost(
        f"lost the connection to the scheduler (the client is {client.status}), which must run until the call ends. "
        "Start the cluster again, and repeat the call."
    )


def _get_worker_address(worker: Any) -> str:
    """Return the address in the record of a worker that an error of Dask's holds, if it holds one."""
    return str(getattr(worker, "address", "")) or "(unknown)"


def _wait_until_done(futures: Sequence[Future], seconds: float) -> None:
    """Wait until tasks have ended, whether they succeeded or not."""
    deadline = time.monotonic() + seconds
    for future in futures:
        with contextlib.suppress(Exception):
            future.exception(timeout=max(0.0, deadline - time.monotonic()))
