"""What has to be there before the first chunk of a call: a client, a dealer, a feeder, and on every worker the network."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from distributed import Client

from daskinfer.cluster import plugin, preflight
from daskinfer.cluster.broadcast import Shipment, shipped
from daskinfer.cluster.placement import Placement
from daskinfer.cluster.preflight import Answer, Question
from daskinfer.cluster.process_cluster import kept
from daskinfer.execution.device_queue import Lane
from daskinfer.execution.task_builder import Feeder
from daskinfer.execution.window import AWAY_SECONDS
from daskinfer.models.model import Recipe
from daskinfer.planning.job import Call
from daskinfer.scheduling.balancer import MAX_CHUNKS_PER_TASK, Balanced, Planned
from daskinfer.scheduling.throughput_history import memory
from daskinfer.transport import shared_memory
from daskinfer.transport.routing import can_stay
from daskinfer.transport.shared_memory import Arena
from daskinfer.worker.task import Order

N_IN_PLACE = 2  # tasks in flight where none reads ahead or writes: one computes, and the next is there when it ends
ASK_SECONDS = 0.2  # between two questions to workers that are on their way back; arbitrary


@contextlib.contextmanager
def opened(placement: Placement) -> Iterator[Client]:
    """The client that computes; a cluster is started only here."""
    if placement.client is not None:
        yield placement.client
        return
    with kept.client(asked(placement)) as client:
        yield client


def asked(placement: Placement) -> list[str]:
    """The devices of the cluster that is kept for such a call."""
    return [d.uuid or d.kind for d in placement.devices]


def in_place(call: Call, *, reads: bool) -> bool:
    """Whether a task holds its answer only: a worker that ``reads`` this process's memory takes a micro-batch at a time."""
    return reads and all(map(can_stay, call.inputs.arrays))


def dealer_of(call: Call, weights: Sequence[float], *, answers_only: bool = False) -> Any:
    """Who says which chunks come next; ``answers_only``: tasks hold no rows of the input, and may be the larger."""
    limits: dict[str, Any] = {"row_nbytes": call.row_nbytes, "chunk_nbytes": call.chunk_nbytes, "done": call.done}
    if answers_only:
        limits["row_nbytes"] = call.row_nbytes - call.inputs.row_nbytes
        limits["chunk_nbytes"] = min(call.chunk_nbytes, call.max_task_rows * call.row_nbytes)  # what a slot has room for
    if not call.balanced:
        return Planned(call.layout, n_devices=len(weights), whole=call.inputs.row_chunks is not None, **limits)
    if call.inputs.row_chunks is not None:
        dealer = Balanced.of_chunks(call.layout.row_chunks, weights, **limits)
    else:
        dealer = Balanced.of_grid(call.layout.n_rows, call.layout.cell_rows, weights, **limits)
    speeds = memory.of(call.key).speeds
    for device, placed in enumerate(call.placement.devices):
        if speed := speeds.get(placed.name):
            dealer.expect(device, speed)
    return dealer


def feeder_of(call: Call, client: Client | None) -> Feeder:
    """Who turns chunks into tasks."""
    outputs = () if call.targets else call.job.outputs or ()
    return Feeder(call.inputs, outputs, call.layout.row_chunks, client)


@contextlib.contextmanager
def ready(call: Call, client: Client) -> Iterator[tuple[list[Lane], Feeder, Shipment, dict[str, str]]]:
    """Everything that has to be there before the first chunk: plugin, shared memory, the preflight, the network.

    Last the folder of each device's cluster, where it is ours.
    """
    if call.placement.client is None:  # one that ended in an earlier call is on its way back
        with contextlib.suppress(TimeoutError):
            client.wait_for_workers(len(call.placement.devices), timeout=AWAY_SECONDS)
    plugin.register(client)
    feeder = feeder_of(call, client)
    n_tasks = call.readers + 2
    # One more than there are tasks: the next is on its way before the answer of the last is used.
    n_slots = (n_tasks + 1) * sum(weight > 0 for weight in call.weights)
    with ExitStack() as stack:
        nbytes = feeder.slot_nbytes(call.max_task_rows, MAX_CHUNKS_PER_TASK)
        arena = stack.enter_context(shared_memory.lent(client, nbytes, n_slots))
        paths = [target.path for target in call.targets]
        come_back = call.placement.client is None or any(call.placement.nannies)
        patience = AWAY_SECONDS if come_back else 0.0
        answers = _answers(client, preflight.question_of(call.recipe, call.inputs.paths, paths, arena.ref), patience)
        folders = {address: answer.scratch for address, answer in answers.items()}
        loaded = {address for address, answer in answers.items() if answer.loaded}
        shipment = stack.enter_context(shipped(client, call.recipe, folders, loaded))
        yield _lanes(call, answers, arena, n_tasks), feeder, shipment, {a.device: a.scratch for a in answers.values()}


def _answers(client: Client, question: Question, patience: float) -> dict[str, Answer]:
    """What the workers say; where all of them ended meanwhile, what those say that come in their place within ``patience``.

    Without an answer nobody knows where the network's file has to lie.
    """
    deadline = time.monotonic() + patience
    while not (answers := preflight.ask(client, question)) and time.monotonic() < deadline:
        time.sleep(ASK_SECONDS)
    return answers


def order_of(call: Call, recipe: Recipe) -> bytes:
    """What is the same for all tasks of a call, as it travels."""
    return Order(recipe, call.job, call.targets).sealed()


def _lanes(call: Call, answers: dict[str, Answer], arena: Arena, n_tasks: int) -> list[Lane]:
    placement = call.placement
    by_name = {answer.device: answer for answer in answers.values()}
    lanes = []
    for i, (device, weight) in enumerate(zip(placement.devices, call.weights, strict=True)):
        answer = answers.get(placement.addresses[i]) if placement.addresses else by_name.get(device.name)
        if weight > 0:
            shares, reads = (answer.shares_memory, answer.reads_memory) if answer is not None else (False, False)
            where = placement.restriction(i)
            n_places = N_IN_PLACE if call.balanced and not call.targets and in_place(call, reads=reads) else n_tasks
            nanny = placement.nannies[i] or "" if placement.nannies else ""
            lanes.append(Lane(i, device.name, device.kind, where, n_places, arena if shares else None, reads, nanny))
    return lanes
