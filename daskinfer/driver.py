"""Computes the blocks of a lazy array on the devices that the plan gave them to.

For now each device's chunks are handed to Dask at once, kept on their device by a restriction, and collected as they end;
what is submitted therefore holds the whole of an in-memory input. The bounded window per device takes this room over.

A network in memory is shipped before: one file per host, mapped by every worker there, so it rides in no task; it is not
sent where all workers have it loaded already, and not at all where the client can write the file itself.
"""

from __future__ import annotations

import contextlib
import os
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import dask
import dask.array as da
from distributed import Client, as_completed
from distributed.scheduler import KilledWorker

from daskinfer import graph, variables
from daskinfer.cache import models
from daskinfer.errors import ChunkError
from daskinfer.graph import Block
from daskinfer.kept import kept
from daskinfer.model import PackedModel, Recipe, ShippedModel, shipped_path
from daskinfer.placement import Placement, workers_of
from daskinfer.planner import Layout
from daskinfer.worker import seat_of


@contextlib.contextmanager
def opened(placement: Placement) -> Iterator[Client | None]:
    """The client that computes; None for this process. A cluster is started only here."""
    if placement.client is not None or placement.inline:
        yield placement.client
        return
    with kept.client([d.uuid or d.kind for d in placement.devices]) as client:
        yield client


@contextlib.contextmanager
def shipped(client: Client | None, recipe: Recipe) -> Iterator[Recipe]:
    """While inside, every host of the cluster has the network's file; what is yielded travels in tasks instead of it."""
    if client is None or not isinstance(recipe, PackedModel):
        yield recipe
        return
    # A name of its own for each call: another one with the same network may end first.
    name = f"model-{recipe.key}-{uuid.uuid4().hex}.safetensors"
    receivers = _receivers(client, recipe.key)
    here = {folder for folder in receivers.values() if os.path.isdir(folder)}
    elsewhere = [address for address, folder in receivers.items() if folder not in here]
    if receivers:
        content = recipe.packed.to_bytes()
        for folder in here:
            _receive(folder, name, content)
        if elsewhere:
            client.run(_receive, None, name, content, workers=elsewhere)
        del content
    try:
        yield ShippedModel(recipe.key, name, recipe.nbytes)
    finally:
        for folder in here:
            _forget(folder, name)
        if elsewhere and client.status == "running":
            client.run(_forget, None, name, workers=_reachable(client, elsewhere), on_error="ignore")


def compute(blocks: da.Array, layout: Layout, placement: Placement, client: Client | None) -> Iterator[tuple[int, Block]]:
    """Compute every block and yield (chunk index, block) as they end, in no particular order.

    Raises
    ------
    ChunkError, ModelError
        What the first chunk that fails raised; the others are cancelled.
    """
    tasks = graph.tasks(blocks)
    if client is None:
        yield from enumerate(dask.compute(*tasks, scheduler="synchronous", optimize_graph=False))
        return
    futures: dict[Any, int] = {}
    try:
        for device in range(len(placement.devices)):
            mine = [chunk.index for chunk in layout.chunks if chunk.device == device]
            futures |= zip(_submit(client, [tasks[i] for i in mine], placement.restriction(device)), mine, strict=True)
        for future in as_completed(list(futures), loop=client.loop):
            yield futures[future], _result(future, layout, futures[future])
            future.release()
    finally:
        if pending := [future for future in futures if future.status == "pending"]:
            client.cancel(pending)


def _submit(client: Client, tasks: list[Any], restriction: dict[str, Any]) -> list[Any]:
    with warnings.catch_warnings():
        # An in-memory input is in the graph until it has a data plane of its own.
        warnings.filterwarnings("ignore", message="Sending large graph")
        futures: list[Any] = client.compute(tasks, optimize_graph=False, **restriction)
    return futures


def _result(future: Any, layout: Layout, index: int) -> Block:
    try:
        block: Block = future.result()
    except KilledWorker as error:
        chunk = layout.chunks[index]
        raise ChunkError(
            f"chunk {index} (rows {chunk.start}:{chunk.stop}) ended its worker {error.last_worker}; a worker has to outlive "
            "its chunks. Look for an out-of-memory kill or a crash of the network, and use a smaller batch_size or leave "
            "the rows out."
        ) from error
    return block


def _receivers(client: Client, key: str) -> dict[str, str]:
    """One worker of each host where a worker has not loaded the model yet, and the folder of our own cluster there."""
    hosts = {address: info["host"] for address, info in workers_of(client).items()}
    asked = client.run(_asked, key)
    lacking = {hosts[address]: address for address, (loaded, _) in asked.items() if not loaded and address in hosts}
    return {address: asked[address][1] for address in lacking.values()}


def _reachable(client: Client, addresses: list[str]) -> list[str]:
    there = workers_of(client)
    return [address for address in addresses if address in there]


def _asked(key: str, dask_worker: Any) -> tuple[bool, str]:
    """Whether a worker has loaded the model, and the folder of our own cluster, empty on clusters of others."""
    loaded = (key, str(seat_of(dask_worker).torch_device)) in models
    return loaded, os.environ.get(variables.SCRATCH, "")


def _receive(folder: str | None, name: str, content: bytes) -> None:
    """Write a shipped file: into the folder of our own cluster where the client can, else where a worker looks for it."""
    path = shipped_path(name) if folder is None else os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(content)
    os.rename(temporary, path)


def _forget(folder: str | None, name: str) -> None:
    path = shipped_path(name) if folder is None else os.path.join(folder, name)
    with contextlib.suppress(OSError):
        os.unlink(path)
        os.rmdir(os.path.dirname(path))  # refused while others' files, or the rest of our own cluster's, lie there
