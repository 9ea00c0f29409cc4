"""Sinks take the results of a call: into arrays, into stored outputs, or to a caller who consumes them in order.

The arrays of a result may be views of shared memory that the next task overwrites, so a sink copies what it needs before
``write`` returns.
"""

from __future__ import annotations

import functools
import logging
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol

import numpy as np

from daskinfer.core.arrays import Array
from daskinfer.core.chunks import BatchConfig, ChunkResult
from daskinfer.errors import DaskInferError, PartialOutput
from daskinfer.options import Options
from daskinfer.planning.job import InferenceJob
from daskinfer.storage.outputs import OutputSet

logger = logging.getLogger(__name__)

_MAX_SHOWN_ROWS = 5  # that a warning lists; arbitrary


class Sink(Protocol):
    """Takes the results of a call, in any order."""

    def write(self, result: ChunkResult) -> None:
        """Store or copy a result; its arrays are not valid afterwards."""

    def abort(self, error: DaskInferError) -> None:
        """Add to the error that ends the call what was done before it."""


class ArraySink:
    """Collects the whole output in memory.

    Parameters
    ----------
    job
        The call.
    empty
        Allocates an array of a shape and dtype.
    """

    def __init__(self, job: InferenceJob, empty: Callable[[Sequence[int], np.dtype[Any]], Array] = np.empty) -> None:
        self._job = job
        self._arrays = [empty((job.n_rows, *o.shape[1:]), o.dtype) for o in job.output_spec.outputs]
        self._done = np.zeros(job.n_rows, bool)

    @property
    def output(self) -> Any:
        """The output, in the structure of the model's output."""
        return self._job.build_output(self._arrays)

    def write(self, result: ChunkResult) -> None:
        rows = slice(result.chunk.start, result.chunk.stop)
        for array, computed in zip(self._arrays, result.arrays, strict=True):
            array[rows] = computed
        self._done[rows] = True
        for failure in result.failures:
            self._done[failure.start : failure.stop] = False

    def abort(self, error: DaskInferError) -> None:
        for array in self._arrays:  # rows that were not computed hold arbitrary values
            array[~self._done] = _choose_fill_value(array.dtype, self._job.run_config.options)
        error.partial = PartialOutput(self.output, self._done)
        n_done, n_rows = int(self._done.sum()), len(self._done)
        error.add_note(f"{n_done:,} of {n_rows:,} rows have an output: .partial.output, where .partial.done is True.")


class StorageSink:
    """Commits to stored outputs the results that workers, or this process, have written.

    Parameters
    ----------
    outputs
        The open outputs, locked by this run.
    get_batch
        Returns the batch configuration in use, which is recorded with the results.
    """

    def __init__(self, outputs: OutputSet, get_batch: Callable[[], BatchConfig]) -> None:
        self._outputs, self._get_batch = outputs, get_batch

    def write(self, result: ChunkResult) -> None:
        self._outputs.commit(result, self._get_batch())

    def abort(self, error: DaskInferError) -> None:
        """Do nothing: committed rows are kept, and ``open_outputs`` adds to the error how to continue."""


class StreamSink:
    """Puts results into the order of their rows; early ones are held back.

    How many is bounded: no chunk starts ``max_rows_ahead`` rows or more after the first missing row. If the caller stops
    consuming blocks, the devices stop once their windows are full.

    Parameters
    ----------
    max_rows_ahead
        Rows that devices may be ahead of the first missing row.
    """

    def __init__(self, max_rows_ahead: int) -> None:
        self._max_rows_ahead = max_rows_ahead
        self._next_row = 0
        self._early: dict[int, tuple[int, list[Array]]] = {}  # by first row: the row after the last, and the arrays

    def get_row_limit(self) -> int:
        """Return the first row at which no chunk may start yet."""
        return self._next_row + self._max_rows_ahead

    def write(self, result: ChunkResult) -> None:
        self._early[result.chunk.start] = result.chunk.stop, [np.array(array) for array in result.arrays]

    def pop_ready(self) -> Iterator[list[Array]]:
        """Yield each chunk's arrays, (n, *shape), whose earlier rows have all been yielded."""
        while self._next_row in self._early:
            self._next_row, arrays = self._early.pop(self._next_row)
            yield arrays

    def abort(self, error: DaskInferError) -> None:
        """Do nothing: the caller has received every block before the one that failed."""


def _choose_fill_value(dtype: np.dtype[Any], options: Options) -> float:
    """Return the value of rows without output: that of skipped rows, else NaN, or 0 if the dtype has no NaN."""
    if options.on_error == "skip" and options.fill_value is not None:  # every output can hold it
        return options.fill_value
    return np.nan if dtype.kind in "fc" else 0


def warn_of_failed_rows(failed_rows: Sequence[int]) -> None:
    """Warn which rows have no output; for callers who get no report."""
    if failed_rows:
        named = ", ".join(f"{row:,}" for row in failed_rows[:_MAX_SHOWN_ROWS])
        named += ", …" if len(failed_rows) > _MAX_SHOWN_ROWS else ""
        n_failed = f"{len(failed_rows):,}"
        logger.warning("%s rows have no output (%s); predict(…, return_report=True) says why", n_failed, named)


def collect_facts(job: InferenceJob) -> dict[str, str]:
    """Collect what a report says about the computation beyond what the events say."""
    facts = dict(_collect_environment())
    if job.output_request is not None:
        header = job.output_request.headers[0]
        facts["stored in"] = ", ".join(job.output_request.paths)
        facts["model fingerprint"] = header.model
        facts["input fingerprint"] = "; ".join(
            f"{port}: {', '.join(f'{name} {value}' for name, value in mark.items())}" for port, mark in header.input.items()
        )
    return facts


@functools.cache
def _collect_environment() -> Mapping[str, str]:
    """Collect the versions and the machine; cached, since it takes milliseconds."""
    versions = [f"{name} {_get_version(name)}" for name in ("daskinfer", "torch", "dask", "distributed", "numpy")]
    # Not platform.platform(), which starts a process.
    machine = f"{platform.node()}, {platform.system()} {platform.release()} {platform.machine()}"
    return {"versions": ", ".join([*versions, f"Python {platform.python_version()}"]), "machine": machine}


def _get_version(name: str) -> str:
    """Return the version that the loaded package states; reading the installed metadata takes 3 ms."""
    return str(getattr(sys.modules.get(name), "__version__", None) or metadata.version(name))
