"""What has to be there before the first chunk of a call: a client, a dealer, a feeder, and on every worker the network."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from distributed import Client

from daskinfer.cluster import plugin, preflight
from daskinfer.cluster.broadcast import ModelBroadcast, broadcast_model
from daskinfer.cluster.placement import Placement
from daskinfer.cluster.preflight import WorkerInfo, WorkerRequirements
from daskinfer.cluster.process_cluster import default_cluster
from daskinfer.execution.device_queue import DeviceQueue
from daskinfer.execution.task_builder import TaskBuilder
from daskinfer.execution.window import MAX_MISSING_SECONDS
from daskinfer.models.model import ModelLoader
from daskinfer.planning.job import InferenceJob
from daskinfer.scheduling.balancer import MAX_CHUNKS_PER_TASK, DynamicBalancer, StaticBalancer
from daskinfer.scheduling.throughput_history import history
from daskinfer.transport import shared_memory
from daskinfer.transport.routing import is_shareable
from daskinfer.transport.shared_memory import SharedMemoryPool
from daskinfer.worker.task import TaskContext

MAX_IN_FLIGHT_IN_PLACE = (
    2  # tasks in flight where none reads ahead or writes: one computes, and the next is there when it ends
)
RECHECK_SECONDS = 0.2  # between two questions to workers that are on their way back; arbitrary


@contextlib.contextmanager
def open_client(placement: Placement) -> Iterator[Client]:
    """The client that computes; a cluster is started only here."""
    if placement.client is not None:
        yield placement.client
        return
    with default_cluster.acquire_client(device_ids(placement)) as client:
        yield client


def device_ids(placement: Placement) -> list[str]:
    """The devices of the cluster that is kept for such a call."""
    return [d.uuid or d.kind for d in placement.devices]


def can_read_inputs_in_place(job: InferenceJob, *, reads_process_memory: bool) -> bool:
    """Whether a task holds its answer only: a worker that ``reads`` this process's memory takes a micro-batch at a time."""
    return reads_process_memory and all(map(is_shareable, job.inputs.arrays))


def make_balancer(job: InferenceJob, weights: Sequence[float], *, outputs_only: bool = False) -> Any:
    """Who says which chunks come next; ``answers_only``: tasks hold no rows of the input, and may be the larger."""
    limits: dict[str, Any] = {"row_nbytes": job.row_nbytes, "chunk_nbytes": job.chunk_nbytes, "done": job.done}
    if outputs_only:
        limits["row_nbytes"] = job.row_nbytes - job.inputs.row_nbytes
        limits["chunk_nbytes"] = min(job.chunk_nbytes, job.max_task_rows * job.row_nbytes)  # what a slot has room for
    if not job.balanced:
        return StaticBalancer(job.layout, n_devices=len(weights), whole_chunks=job.inputs.row_chunks is not None, **limits)
    if job.inputs.row_chunks is not None:
        dealer = DynamicBalancer.from_chunks(job.layout.row_chunks, weights, **limits)
    else:
        dealer = DynamicBalancer.from_grid(job.layout.n_rows, job.layout.cell_rows, weights, **limits)
    speeds = history.get_or_create(job.history_key).speeds
    for device, placed in enumerate(job.placement.devices):
        if speed := speeds.get(placed.name):
            dealer.seed_speed(device, speed)
    return dealer


def make_task_builder(job: InferenceJob, client: Client | None) -> TaskBuilder:
    """Who turns chunks into tasks."""
    outputs = () if job.targets else job.run_config.outputs or ()
    return TaskBuilder(job.inputs, outputs, job.layout.row_chunks, client)


@contextlib.contextmanager
def prepare_workers(
    job: InferenceJob, client: Client
) -> Iterator[tuple[list[DeviceQueue], TaskBuilder, ModelBroadcast, dict[str, str]]]:
    """Everything that has to be there before the first chunk: plugin, shared memory, the preflight, the network.

    Last the folder of each device's cluster, where it is ours.
    """
    if job.placement.client is None:  # one that ended in an earlier call is on its way back
        with contextlib.suppress(TimeoutError):
            client.wait_for_workers(len(job.placement.devices), timeout=MAX_MISSING_SECONDS)
    plugin.register_plugins(client)
    feeder = make_task_builder(job, client)
    n_tasks = job.prefetch + 2
    # One more than there are tasks: the next is on its way before the answer of the last is used.
    n_slots = (n_tasks + 1) * sum(weight > 0 for weight in job.weights)
    with ExitStack() as stack:
        nbytes = feeder.compute_slot_nbytes(job.max_task_rows, MAX_CHUNKS_PER_TASK)
        arena = stack.enter_context(shared_memory.borrow_pool(client, nbytes, n_slots))
        paths = [target.writable_path for target in job.targets]
        come_back = job.placement.client is None or any(job.placement.nannies)
        patience = MAX_MISSING_SECONDS if come_back else 0.0
        answers = _wait_for_worker_infos(
            client, preflight.build_requirements(job.loader, job.inputs.paths, paths, arena.ref), patience
        )
        folders = {address: answer.scratch_path for address, answer in answers.items()}
        loaded = {address for address, answer in answers.items() if answer.model_loaded}
        shipment = stack.enter_context(broadcast_model(client, job.loader, folders, loaded))
        yield (
            _make_device_queues(job, answers, arena, n_tasks),
            feeder,
            shipment,
            {a.device: a.scratch_path for a in answers.values()},
        )


def _wait_for_worker_infos(
    client: Client, requirements: WorkerRequirements, timeout_seconds: float
) -> dict[str, WorkerInfo]:
    """What the workers say; where all of them ended meanwhile, what those say that come in their place within ``patience``.

    Without an answer nobody knows where the network's file has to lie.
    """
    deadline = time.monotonic() + timeout_seconds
    while not (answers := preflight.check_workers(client, requirements)) and time.monotonic() < deadline:
        time.sleep(RECHECK_SECONDS)
    return answers


def make_task_context(job: InferenceJob, loader: ModelLoader) -> bytes:
    """What is the same for all tasks of a call, as it travels."""
    return TaskContext(loader, job.run_config, job.targets).serialize()


def _make_device_queues(
    job: InferenceJob, worker_infos: dict[str, WorkerInfo], pool: SharedMemoryPool, n_tasks: int
) -> list[DeviceQueue]:
    placement = job.placement
    by_name = {answer.device: answer for answer in worker_infos.values()}
    lanes = []
    for i, (device, weight) in enumerate(zip(placement.devices, job.weights, strict=True)):
        answer = worker_infos.get(placement.addresses[i]) if placement.addresses else by_name.get(device.name)
        if weight > 0:
            shares, reads = (answer.can_attach_pool, answer.can_read_client_memory) if answer is not None else (False, False)
            where = placement.get_compute_kwargs(i)
            n_places = (
                MAX_IN_FLIGHT_IN_PLACE
                if job.balanced and not job.targets and can_read_inputs_in_place(job, reads_process_memory=reads)
                else n_tasks
            )
            nanny = placement.nannies[i] or "" if placement.nannies else ""
            lanes.append(DeviceQueue(i, device.name, device.kind, where, n_places, pool if shares else None, reads, nanny))
    return lanes
