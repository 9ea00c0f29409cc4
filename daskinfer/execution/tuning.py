"""Measuring before a run: which micro-batch pays on each kind of device, and how fast each device is.

A measurement is a task like any other, on the first rows of the input; what was found is remembered for this process
(``pace``), so that a network is measured once.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from typing import Any

from distributed import Client, Future
from distributed.scheduler import KilledWorker

from daskinfer.cluster.placement import workers_of
from daskinfer.core.arrays import Array, Elsewhere
from daskinfer.core.chunks import Chunk
from daskinfer.errors import ChunkError
from daskinfer.execution.device_queue import Feed, Lane
from daskinfer.planning.job import Call
from daskinfer.scheduling.autotune import WORTH_SECONDS, Best
from daskinfer.scheduling.throughput_history import Known, memory
from daskinfer.transport.row_sources import UnsentError
from daskinfer.worker.current_device import Seat
from daskinfer.worker.task import channels_last_pays_at_once, measure, measure_task, read

logger = logging.getLogger(__name__)

WORTH_BATCHES = 24  # left, from which on three are spent to see whether the other memory format pays; arbitrary
LOOK_SECONDS = 1.0  # between looks whether a worker that measures is still there; arbitrary

Rows = Callable[[Chunk], Sequence[Array | Elsewhere]]


def tuned(
    call: Call,
    client: Client,
    order: Any,
    lanes: Sequence[Lane],
    feed: Feed,
    begin: Callable[[], None],
    *,
    settled: bool = False,
) -> Call:
    """The call with the micro-batch of each kind of device: known, or what the first device of its kind measures.

    The others of this host measure beside it, as they will compute beside it: cores share their caches (on one core a
    CNN was faster with 256 images than with 64, on both at once slower).

    As it is where the micro-batch was given, where there is not enough to do, or where measuring fails: what to do about a
    worker that ends or rows that fail is the window's to say. ``begin()`` is called where measuring begins. ``settled``:
    some rows are done, and only the memory format may still be another.
    """
    known, by_kind = memory.of(call.key), {lane.kind: lane for lane in reversed(lanes)}
    if not call.has_choice or (settled and not call.has_images):
        return call
    if settled and "inline" in known.channels_last:
        known.channels_last.setdefault("cpu", known.channels_last["inline"])
    tried = (call.job.batch_size,) if settled else call.tried_sizes
    asked = [lane for kind, lane in by_kind.items() if kind not in (known.channels_last if settled else known.batch_sizes)]
    if asked and not _is_short(call, known):
        begin()
        n_rows = (known.n_rows + call.layout.n_rows) // len(lanes)
        try:
            found = measured(call, client, order, _busy(asked, lanes), feed, tried, n_rows)
        except (ChunkError, KilledWorker, UnsentError, _UnmeasuredError) as error:
            logger.warning("the micro-batch stays as it is, since measuring failed: %s", error)
            return call
        for lane in asked:
            best = found[lane.device]
            known.pays(lane.kind, best._replace(short=best.short or settled))
    call = call.in_channels_last(known.in_channels_last(by_kind))
    if settled or not by_kind.keys() <= known.batch_sizes.keys():
        return call  # measured again where there is more to do
    return call.with_batch_sizes({kind: _at_most(known.batch_sizes[kind], tried) for kind in by_kind})


def _busy(asked: Sequence[Lane], lanes: Sequence[Lane]) -> list[Lane]:
    """These, and those of their kinds that share this host."""
    kinds = {lane.kind: lane.device for lane in asked}
    return [*asked, *(n for n in lanes if n.arena is not None and kinds.get(n.kind, n.device) != n.device)]


def _is_short(call: Call, known: Known) -> bool:
    """Whether the speeds of an earlier run say that this one, and all before it, are not enough to do."""
    devices = zip(call.placement.devices, call.weights, strict=True)
    speeds = [known.speeds.get(device.name, 0.0) for device, weight in devices if weight]
    return all(speeds) and (known.n_rows + call.layout.n_rows) / sum(speeds) < WORTH_SECONDS


def tuned_here(call: Call, rows: Rows, here: Seat, n_rows_left: int, speed: float) -> Call:
    """The same in this process, once its first rows have shown, at ``speed`` rows/s, that there is enough to do.

    Where there is too little for that, one micro-batch tells whether the other memory format pays.
    """
    known = memory.of(call.key)
    try:
        if "inline" not in known.batch_sizes:
            _look_here(call, known, rows, here, n_rows_left, speed)
    except ChunkError as error:  # what to do about it is said where the rows are computed
        logger.warning("the micro-batch stays as it is, since measuring failed: %s", error)
        return replace(call, tunable=False)
    call = formatted_here(call, here)
    if size := known.batch_sizes.get("inline"):
        return replace(call, job=replace(call.job, batch_size=_at_most(size, call.tried_sizes)), tunable=False)
    return call


def _look_here(call: Call, known: Known, rows: Rows, here: Seat, n_rows_left: int, speed: float) -> None:
    n_rows = known.n_rows + n_rows_left
    if n_rows >= WORTH_SECONDS * speed:
        known.pays("inline", measure_here(call, rows, here, call.tried_sizes, n_rows))
    elif call.has_images and "inline" not in known.channels_last and n_rows_left >= WORTH_BATCHES * call.job.batch_size:
        first = _first(call, call.job.batch_size)
        there = read(lambda: rows(first), first)
        known.channels_last["inline"] = channels_last_pays_at_once(there, call.recipe, call.job, here)


def formatted_here(call: Call, here: Seat) -> Call:
    """The call with images in channels_last, or not, as was found to pay in this process so far."""
    if not call.tunable:
        return call
    pays = memory.of(call.key).channels_last.get("inline")
    return call.in_channels_last([here.torch_device.type] if pays else [])


def measured(
    call: Call,
    client: Client,
    order: Any,
    lanes: Sequence[Lane],
    feed: Feed,
    tried: Sequence[int],
    n_rows: int,
    *,
    usual: bool = False,
) -> dict[int, Best]:
    """By device, which of these micro-batches pays there for so many rows, and its rows/s; on all lanes at once.

    ``usual``: with its usual speed, not that of the fastest.
    """
    chunk, slots, futures = _first(call, tried[-1]), [], {}
    until = time.monotonic() + (call.job.options.chunk_timeout or inf) * len(tried)
    for lane in lanes:
        slot = lane.arena.free.pop() if lane.arena is not None and lane.arena.free else None
        task, brought = feed([chunk], slot, lane.workers, reads=lane.reads)
        key = f"measure-{lane.kind}-{uuid.uuid4().hex}"
        futures[lane.device] = client.submit(
            measure_task, order, task, brought, tried, n_rows, usual=usual, key=key, pure=False, **lane.restriction
        )
        slots.append(slot)
    try:
        found = {lane.device: _result(futures[lane.device], lane, client, until) for lane in lanes}
    except BaseException:
        client.cancel(list(futures.values()), force=True)
        raise
    for slot in slots:
        if slot is not None:
            slot.free()
    return found


def _result(future: Future, lane: Lane, client: Client, until: float) -> Best:
    while True:
        try:
            found: Best = future.result(timeout=LOOK_SECONDS)
            return found
        except TimeoutError:
            if future.status == "error":  # the network's own
                raise
            if lane.worker_of(workers_of(client)) is None or time.monotonic() > until:
                raise _UnmeasuredError(f"{lane.name} gives no answer") from None


class _UnmeasuredError(Exception):
    """A device did not say how fast it is."""


def measure_here(call: Call, rows: Rows, here: Seat, tried: Sequence[int], n_rows: int, *, usual: bool = False) -> Best:
    """The same in this process."""
    first = _first(call, tried[-1])
    return measure(read(lambda: rows(first), first), call.recipe, call.job, here, tried, n_rows, usual=usual)


def _at_most(known: int, tried: Sequence[int]) -> int:
    """Of the sizes that this call may have, the largest up to what paid before; sizes of one call divide one another."""
    return max((size for size in tried if size <= known), default=tried[0])


def _first(call: Call, max_rows: int) -> Chunk:
    """Rows from 0 on to measure with; of dask arrays the first chunk that has rows."""
    if call.inputs.row_chunks is not None:
        return next(chunk for chunk in call.layout.chunks if chunk.n_rows)
    return Chunk(0, 0, min(call.layout.n_rows, max_rows), 0)
