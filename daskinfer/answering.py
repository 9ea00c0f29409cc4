"""What a call that computes does with its chunks as they end: keeps them, sums their receipts up, gives them on in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, Protocol

import numpy as np

from daskinfer.assembly import Work
from daskinfer.errors import DaskInferError, Partial
from daskinfer.fetching import Finished
from daskinfer.in_order import InOrder
from daskinfer.records import RunReport, Tally
from daskinfer.stopping import drained


class Runs(Protocol):
    """``driver.Run``: a call that computes while it is iterated over."""

    began: float | None
    draining: bool

    @property
    def batch_size(self) -> int: ...

    def __iter__(self) -> Generator[Finished, None, None]: ...


def compute(work: Work, keep: Callable[[Finished], None], run: Runs | None) -> RunReport:
    """Compute every chunk, give each to ``keep``, and sum the receipts up; None: there is nothing to do."""
    tally = Tally({part.device: part.share for part in work.plan().devices})
    if run is None:
        return tally.report(seconds=0.0, batch_size=work.job.batch_size)
    began = time.perf_counter()
    with drained(run), closing(iter(run)) as found:
        for finished in found:
            keep(finished)
            tally.add(finished.receipt, finished.failures)
    return tally.report(seconds=time.perf_counter() - (run.began or began), batch_size=run.batch_size)


def answered(work: Work, run: Runs) -> tuple[Any, RunReport]:
    """The whole answer, in memory; what ends it early carries what was done."""
    arrays = [np.empty((work.inputs.n_rows, *o.shape[1:]), o.dtype) for o in work.promise.outputs]
    done = np.zeros(work.inputs.n_rows, bool)

    def keep(finished: Finished) -> None:
        rows = slice(finished.chunk.start, finished.chunk.stop)
        for array, found in zip(arrays, finished.arrays, strict=True):
            array[rows] = found
        done[rows] = True
        for failure in finished.failures:
            done[failure.start : failure.stop] = False

    try:
        report = compute(work, keep, run)
    except DaskInferError as error:
        error.partial = Partial(work.answer(arrays), done)
        raise
    return work.answer(arrays), report


def streamed(work: Work, run: Runs, order: InOrder) -> Generator[Any, None, None]:
    """The answer block by block, in order."""
    with closing(iter(run)) as finished:
        for arrays in order.blocks(finished):
            yield work.answer(arrays)
