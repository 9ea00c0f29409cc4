"""What the driver is asked to compute, in one record."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from daskinfer.cluster.placement import Placement
from daskinfer.models.model import ModelLoader
from daskinfer.options import Options
from daskinfer.planning.inputs import Inputs
from daskinfer.scheduling.batching import MIN_BATCHES, make_batch_size_candidates
from daskinfer.scheduling.chunking import ChunkLayout, assign_chunks, make_chunks
from daskinfer.storage.formats import Target
from daskinfer.worker.batch_buffers import CHANNELS_LAST_FORMATS
from daskinfer.worker.model_runner import ModelRunConfig


def make_history_key(loader: ModelLoader, inputs: Inputs, options: Options) -> Hashable:
    """Under which speeds are remembered: the network, its ports, the rows' shapes and dtypes, and how it is run."""
    looks = tuple((tuple(a.shape[1:]), str(a.dtype)) for a in inputs.arrays)
    how = (str(options.dtype), options.autocast, options.memory_format, id(options.preprocess), id(options.postprocess))
    return (loader.key, inputs.ports, looks, how)


@dataclass(frozen=True)
class InferenceJob:
    """What is to be computed, and how.

    ``balanced``: devices get rows by their measured speed; else exactly the layout's chunks. ``row_nbytes`` are a row's of
    all inputs and outputs, ``chunk_nbytes`` those that a task may hold. ``targets`` is empty where answers come back.
    ``tunable``: the micro-batch is a prior, and may be another once one was measured. ``done``: row ranges (start, stop) of
    whole cells, in order, that need not be computed again. ``n_failed``: rows of these without an answer, as found by
    earlier attempts; ``part_rows``: how many rows they and this call are to compute.
    """

    inputs: Inputs
    loader: ModelLoader
    run_config: ModelRunConfig
    placement: Placement
    weights: tuple[float, ...]
    layout: ChunkLayout
    balanced: bool
    prefetch: int
    row_nbytes: int
    chunk_nbytes: int
    part_rows: int
    targets: tuple[Target, ...] = ()
    tunable: bool = False
    done: tuple[tuple[int, int], ...] = ()
    n_failed: int = 0

    def with_channels_last(self, kinds: Sequence[str]) -> InferenceJob:
        """The same with images in that memory format on these kinds of device."""
        return replace(self, run_config=replace(self.run_config, channels_last=tuple(kinds)))

    def with_batch_sizes(self, sizes: Mapping[str, int]) -> InferenceJob:
        """The same with other micro-batches per kind of device; the grid's is the largest, which the others divide."""
        largest = max(sizes.values())
        job = replace(self.run_config, batch_size=largest, by_kind=dict(sizes))
        return replace(self, run_config=job, layout=self._make_layout(largest), tunable=False)

    def _make_layout(self, batch_size: int) -> ChunkLayout:
        if self._fixed_cell_rows:
            return replace(self.layout, batch_size=batch_size)
        if self.inputs.row_chunks is not None:
            return assign_chunks(self.layout.row_chunks, self.weights, batch_size=batch_size)
        limits = {"row_nbytes": self.row_nbytes, "chunk_nbytes": self.chunk_nbytes}
        return make_chunks(self.layout.n_rows, self.weights, batch_size=batch_size, **limits)

    @property
    def has_tuning_candidates(self) -> bool:
        """Whether there is anything to measure: several micro-batches, or two memory formats."""
        return self.tunable and (len(self.batch_size_candidates) > 1 or self.has_images)

    @property
    def has_images(self) -> bool:
        """Whether rows are images or volumes, for which torch has two memory formats."""
        return any(array.ndim in CHANNELS_LAST_FORMATS for array in self.inputs.arrays)

    @property
    def batch_size_candidates(self) -> tuple[int, ...]:
        """Micro-batches that may pay: twice in a chunk, and ``MIN_BATCHES`` times in the smallest share.

        Balanced devices count as even: a light one is not asked for a share.
        """
        positive = [1.0 if self.balanced else weight for weight in self.weights if weight]
        by_share = int(self.layout.n_rows * min(positive) / sum(positive)) // MIN_BATCHES
        by_bytes = self.chunk_nbytes // max(1, self.row_nbytes) // 2
        return make_batch_size_candidates(self.run_config.batch_size, min(by_share, by_bytes), self._fixed_cell_rows)

    @property
    def _fixed_cell_rows(self) -> int | None:
        """Rows of a cell that stays as it is, for a store's sake, and that the micro-batch therefore divides."""
        fixed = self.targets or self.layout.cell_rows != self.layout.batch_size
        return self.layout.cell_rows if fixed else None

    @property
    def history_key(self) -> Hashable:
        """Under which speeds are remembered."""
        return make_history_key(self.loader, self.inputs, self.run_config.options)

    @property
    def max_rows_ahead(self) -> int:
        """How far the devices may be ahead of whoever reads the answer in order: twice what the windows may hold."""
        return 2 * (self.prefetch + 2) * len(self.weights) * self.max_task_rows

    @property
    def max_task_rows(self) -> int:
        """Rows of the largest task that the dealer may deal."""
        by_bytes = max(self.layout.cell_rows, self.chunk_nbytes // max(1, self.row_nbytes))
        return min(self.layout.n_rows, max(by_bytes, *self.layout.row_chunks))
