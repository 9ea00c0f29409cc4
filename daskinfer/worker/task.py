"""What the driver hands to a worker, and what the worker does with it: read, compute, write.

A task is one chunk, or several small ones, since a task costs the scheduler 2 to 3 ms. Several tasks are on a worker at a
time, each in a thread of its own: while one reads, another computes (``device_thread``), and a third writes.

What is the same for all tasks of a call, the :class:`Order`, is pickled once and unpickled once per worker.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import cloudpickle

from daskinfer.core.arrays import Array, Elsewhere
from daskinfer.core.chunks import Chunk, Failure, Receipt, Written
from daskinfer.errors import ChunkError, StorageError
from daskinfer.models.model import Recipe
from daskinfer.models.serialization import ByValue
from daskinfer.scheduling.autotune import Best, best, pays_at_once, usual_speed
from daskinfer.storage.formats import Target
from daskinfer.transport.row_sources import Piece, Task, Within
from daskinfer.transport.shared_memory import mapped, write_note
from daskinfer.worker import device_thread
from daskinfer.worker.benchmark import Trial
from daskinfer.worker.current_device import Seat, seat
from daskinfer.worker.loaded import LoadedModel
from daskinfer.worker.loaded_models import models
from daskinfer.worker.model_runner import Answer, Job, run_chunk

T = TypeVar("T")

# What is unpickled may import packages. With dask-cuda installed Dask's own are imported by a loader that stops the whole
# worker where one thread imports dask.array and another uses what there is of it (seen in Python 3.11, 2 runs of 3).
_unpickling = threading.Lock()


@dataclass(frozen=True)
class Block:
    """A chunk's outputs, each (n, *shape); ``receipt`` is None for a chunk without rows.

    ``written`` is what was written of each target, ``failures`` the rows without an answer, in order.
    """

    arrays: list[Array]
    receipt: Receipt | None
    written: tuple[tuple[Written, ...], ...] = ()
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True)
class Order:
    """What is the same for every task of a call; ``targets`` is empty where the answers come back."""

    recipe: Recipe
    job: Job
    targets: tuple[Target, ...] = ()

    def sealed(self) -> bytes:
        """As it travels."""
        return bytes(cloudpickle.dumps(replace(self, job=travelling(self.job))))


def travelling(job: Job) -> Job:
    """A job whose functions reach workers that cannot import them, and without the rows that ``output=`` may have."""
    before, after = job.options.preprocess, job.options.postprocess
    options = replace(job.options, preprocess=before and ByValue(before), postprocess=after and ByValue(after), output=None)
    return replace(job, options=options)


def run_task(sealed: bytes, task: Task | bytes, brought: Sequence[Any] = ()) -> list[Block] | None:
    """Do a task on this worker; None where all of the answer is in shared memory or in files.

    Parameters
    ----------
    sealed
        The call's :class:`Order`, as :meth:`Order.sealed` gives it.
    task
        The chunks, as :meth:`Task.sealed` gives them or as they are.
    brought
        Results of other Dask tasks that parts ask for by position.
    """
    with _unpickling:
        order, task = _opened(sealed), Task.opened(task) if isinstance(task, bytes) else task
    order = replace(order, job=replace(order.job, alone=task.alone))
    memory = mapped(task.arena) if task.arena else None
    blocks = [_run_piece(piece, order, Within(memory, brought)) for piece in task.pieces]
    if memory is None:
        return blocks
    fits = write_note(memory, task.note_offset, [replace(block, arrays=[]) for block in blocks])
    return None if fits and not any(block.arrays for block in blocks) else blocks


def measure_task(
    sealed: bytes, task: Task, brought: Sequence[Any], tried: Sequence[int], n_rows: int, *, usual: bool = False
) -> Best:
    """Which micro-batch pays on this worker, as ``ladder.best`` finds it on the first chunk of a task."""
    order, (piece, *_), here = _opened(sealed), task.pieces, seat()
    within = Within(mapped(task.arena) if task.arena else None, brought)
    rows = read(lambda: [part.rows(within) for part in piece.parts], piece.chunk)
    measured, _ = device_thread.of_worker(here.worker).run(
        lambda: measure(rows, order.recipe, order.job, here, tried, n_rows, usual=usual), time.perf_counter()
    )
    return measured


def measure(
    rows: Sequence[Array | Elsewhere],
    recipe: Recipe,
    job: Job,
    here: Seat,
    tried: Sequence[int],
    n_rows: int,
    *,
    usual: bool = False,
) -> Best:
    """Which micro-batch pays, in this thread, of those that there are rows for, and its rows/s.

    ``rows`` begin with the input's first. ``usual``: its speed is the usual one, for whoever wants to know what to expect.
    """
    trial = Trial(_model(recipe, here), rows, job)
    with here.threads():
        first = job.batch_size
        there = [size for size in tried if size <= max(first, len(rows[0]))]
        channels_last = trial.run_channels_last if trial.may_be_channels_last else None
        found = best(trial.run, there, n_rows, channels_last, first=first)
        if not usual:
            return found
        return found._replace(speed=usual_speed(trial.run_channels_last if found.channels_last else trial.run, found.size))


def channels_last_pays_at_once(rows: Sequence[Array | Elsewhere], recipe: Recipe, job: Job, here: Seat) -> bool:
    """Whether that memory format pays in this thread, as one micro-batch says."""
    trial = Trial(_model(recipe, here), rows, job)
    with here.threads():
        return trial.may_be_channels_last and pays_at_once(trial.run, trial.run_channels_last, job.batch_size)


@functools.lru_cache(maxsize=4)
def _opened(sealed: bytes) -> Order:
    order: Order = cloudpickle.loads(sealed)
    return order


def _run_piece(piece: Piece, order: Order, within: Within) -> Block:
    there_since, read_began, chunk = time.perf_counter(), time.time(), piece.chunk
    rows = read(lambda: [part.rows(within) for part in piece.parts], chunk)
    read_seconds = time.perf_counter() - there_since
    out = None
    if piece.places is not None and within.memory is not None:
        out = [place.array(within.memory) for place in piece.places]
    here = seat()
    block, waited_seconds = device_thread.of_worker(here.worker).run(
        lambda: compute(rows, chunk.start, chunk.stop, order.recipe, order.job, here, out), there_since
    )
    block, write_seconds = store(block, chunk, order.targets)
    receipt = block.receipt and block.receipt.timed(
        read_began=read_began,
        ended=time.time(),
        read_seconds=read_seconds,
        write_seconds=write_seconds,
        waited_seconds=waited_seconds,
    )
    return replace(block, arrays=[] if out is not None else block.arrays, receipt=receipt)


def read(rows: Callable[[], T], chunk: Chunk) -> T:
    """The rows of a chunk; what goes wrong with them is said of the chunk."""
    try:
        return rows()
    except Exception as error:
        raise StorageError(
            f"chunk {chunk.index} (rows {chunk.start}:{chunk.stop}) cannot be read: {type(error).__name__}: {error}. Look "
            "at the input there; on_error='skip' (--on-error) goes on without these rows.",
            getattr(error, "errno", None) or 0,
        ) from error


def store(block: Block, chunk: Chunk, targets: Sequence[Target]) -> tuple[Block, float]:
    """Write each output to its target: the block with what was written instead of its arrays, and the seconds it took."""
    if not targets:
        return block, 0.0
    began = time.perf_counter()
    try:
        written = tuple(target.write(chunk.start, rows) for target, rows in zip(targets, block.arrays, strict=True))
    except Exception as error:
        raise StorageError(
            f"chunk {chunk.index} (rows {chunk.start}:{chunk.stop}) cannot be written: {type(error).__name__}: {error}. "
            "Look at the output's disk.",
            getattr(error, "errno", None) or 0,
        ) from error
    return replace(block, arrays=[], written=written), time.perf_counter() - began


def compute(
    rows: Sequence[Array | Elsewhere],
    start: int,
    stop: int,
    recipe: Recipe,
    job: Job,
    here: Seat,
    out: Sequence[Array] | None = None,
) -> Block:
    """Compute one chunk in this thread: what every way of computing calls in the end.

    Parameters
    ----------
    rows
        The rows of each port, (n, ...).
    start, stop
        The rows of the whole input that they are.
    recipe, job
        The network and how it is run.
    here
        The device.
    out
        Where the answer goes, as for ``run_chunk``. None: into new arrays.
    """
    if start == stop:
        assert job.outputs is not None  # found out before any chunk is computed
        return Block([output.copy() for output in job.outputs], None)
    _check_rows(job, rows, start, stop)
    with here.threads():
        model = _model(recipe, here)
        began = time.time()
        answer = run_chunk(model, rows, start, job, out)
    return Block(answer.arrays, _receipt(start, stop, here, answer, began), failures=_failures(start, here, answer))


def _failures(start: int, here: Seat, answer: Answer) -> tuple[Failure, ...]:
    return tuple(Failure(start + row, start + row + 1, here.device, why) for row, why in sorted(answer.failed.items()))


def _model(recipe: Recipe, here: Seat) -> LoadedModel:
    return models.get((recipe.key, str(here.torch_device)), lambda: recipe.load(here.torch_device))


def _receipt(start: int, stop: int, here: Seat, answer: Answer, began: float) -> Receipt:
    return Receipt(
        start,
        stop,
        here.device,
        here.device_name,
        answer.batch_size,
        answer.seconds,
        here.worker,
        began=began,
        peak_nbytes=here.peak_nbytes(),
        channels_last=answer.channels_last,
    )


def _check_rows(job: Job, rows: Sequence[Array | Elsewhere], start: int, stop: int) -> None:
    for name, port in zip(job.ports.names, rows, strict=True):
        if len(port) != stop - start:
            raise ChunkError(
                f"rows {start}:{stop}: the dask array of {name} computed {len(port)} rows there; its chunks "
                "have to say what they hold. Mend them, or call .compute_chunk_sizes() on it."
            )
