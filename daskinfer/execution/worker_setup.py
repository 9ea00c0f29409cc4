"""Prepare workers for the first task of a call: a client, the model on every worker, shared memory, a queue per device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from distributed import Client

from daskinfer.cluster import plugin, preflight
from daskinfer.cluster.broadcast import ModelBroadcast, broadcast_model
from daskinfer.cluster.placement import get_task_restriction
from daskinfer.cluster.preflight import WorkerInfo, WorkerRequirements
from daskinfer.cluster.process_cluster import default_cluster
from daskinfer.execution.device_queue import DeviceQueue
from daskinfer.execution.task_builder import TaskBuilder
from daskinfer.execution.window import MAX_MISSING_SECONDS
from daskinfer.planning.job import InferenceJob, Placement
from daskinfer.scheduling.balancer import MAX_CHUNKS_PER_TASK
from daskinfer.transport import shared_memory
from daskinfer.transport.row_sources import is_shareable
from daskinfer.transport.shared_memory import SharedMemoryPool

MAX_IN_FLIGHT_IN_PLACE = 2  # tasks per device if none reads ahead or writes: one computes, and the next is ready
RECHECK_SECONDS = 0.2  # between checks of workers that are restarting; arbitrary


@dataclass(frozen=True)
class PreparedWorkers:
    """Workers that are ready for the tasks of a call.

    ``scratch_paths`` holds, by device, the folder of its managed cluster; empty for a worker of an external one.
    """

    client: Client
    device_queues: list[DeviceQueue]
    builder: TaskBuilder
    broadcast: ModelBroadcast
    scratch_paths: Mapping[str, str]

    def serialize_spec(self, job: InferenceJob) -> bytes:
        """Serialize what is the same for all tasks of a call, with the loader that workers use."""
        return replace(job.spec, loader=self.broadcast.loader).serialize()


@contextlib.contextmanager
def open_client(placement: Placement, client: Client | None) -> Iterator[Client]:
    """Yield the client that computes: the caller's, or that of the managed cluster, which starts only here."""
    if client is not None:
        yield client
        return
    with default_cluster.acquire_client(get_device_ids(placement)) as managed:
        yield managed


def get_device_ids(placement: Placement) -> list[str]:
    """Return the devices of the managed cluster that a placement needs."""
    return [d.uuid or d.kind for d in placement.devices]


def can_read_inputs_in_place(job: InferenceJob, *, reads_process_memory: bool) -> bool:
    """Return whether tasks hold outputs only: a worker that reads this process's memory gets the rows batch by batch."""
    return reads_process_memory and all(map(is_shareable, job.inputs.arrays))


def make_task_builder(job: InferenceJob, client: Client | None) -> TaskBuilder:
    """Make the builder that turns chunks into tasks; no outputs come back if workers write them to targets."""
    outputs = () if job.resume.targets else job.run_config.outputs or ()
    return TaskBuilder(job.inputs, outputs, job.layout.row_chunks, client)


@contextlib.contextmanager
def prepare_workers(job: InferenceJob, client: Client) -> Iterator[PreparedWorkers]:
    """Check the workers and give them the plugin, shared memory and the model, for as long as the context lasts."""
    placement = job.placement
    if not placement.is_external:  # one that died in an earlier call may still be restarting
        with contextlib.suppress(TimeoutError):
            client.wait_for_workers(len(placement.devices), timeout=MAX_MISSING_SECONDS)
    plugin.register_plugins(client)
    builder = make_task_builder(job, client)
    n_tasks = job.prefetch + 2
    # One more than there are tasks: the next task is submitted before the outputs of the last are used.
    n_slots = (n_tasks + 1) * sum(weight > 0 for weight in job.weights)
    with ExitStack() as stack:
        nbytes = builder.compute_slot_nbytes(job.max_task_rows, MAX_CHUNKS_PER_TASK)
        pool = stack.enter_context(shared_memory.borrow_pool(client, nbytes, n_slots))
        paths = [target.writable_path for target in job.resume.targets]
        requirements = preflight.build_requirements(job.loader, job.inputs.paths, paths, pool.ref)
        are_restarted = not placement.is_external or any(placement.nannies)
        infos = _wait_for_worker_infos(client, requirements, MAX_MISSING_SECONDS if are_restarted else 0.0)
        folders = {address: info.scratch_path for address, info in infos.items()}
        loaded = {address for address, info in infos.items() if info.model_loaded}
        broadcast = stack.enter_context(broadcast_model(client, job.loader, folders, loaded))
        queues = _make_device_queues(job, infos, pool, n_tasks)
        yield PreparedWorkers(client, queues, builder, broadcast, {i.device: i.scratch_path for i in infos.values()})


def _wait_for_worker_infos(
    client: Client, requirements: WorkerRequirements, timeout_seconds: float
) -> dict[str, WorkerInfo]:
    """Check the workers; if all of them have died, wait up to ``timeout_seconds`` for those that replace them.

    Without a worker it is unknown where the model's file must be.
    """
    deadline = time.monotonic() + timeout_seconds
    while not (infos := preflight.check_workers(client, requirements)) and time.monotonic() < deadline:
        time.sleep(RECHECK_SECONDS)
    return infos


def _make_device_queues(
    job: InferenceJob, worker_infos: Mapping[str, WorkerInfo], pool: SharedMemoryPool, n_tasks: int
) -> list[DeviceQueue]:
    placement = job.placement
    by_name = {info.device: info for info in worker_infos.values()}
    queues = []
    for i, (device, weight) in enumerate(zip(placement.devices, job.weights, strict=True)):
        info = worker_infos.get(placement.addresses[i]) if placement.is_external else by_name.get(device.name)
        if weight > 0:
            shares, reads = (info.can_attach_pool, info.can_read_client_memory) if info is not None else (False, False)
            in_place = job.balanced and not job.resume.targets and can_read_inputs_in_place(job, reads_process_memory=reads)
            queues.append(
                DeviceQueue(
                    i,
                    device.name,
                    device.kind,
                    get_task_restriction(placement, i),
                    MAX_IN_FLIGHT_IN_PLACE if in_place else n_tasks,
                    pool if shares else None,
                    reads,
                    (placement.nannies[i] or "") if placement.nannies else "",
                )
            )
    return queues
