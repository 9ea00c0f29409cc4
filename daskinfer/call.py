"""What the driver is asked to compute, in one record."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from daskinfer.inputs import Inputs
from daskinfer.io import Target
from daskinfer.model import Recipe
from daskinfer.placement import Placement
from daskinfer.planner import Layout
from daskinfer.runner import Job


@dataclass(frozen=True)
class Call:
    """What is to be computed, and how.

    ``balanced``: devices get rows by their measured speed; else exactly the layout's chunks. ``row_nbytes`` are a row's of
    all inputs and outputs, ``chunk_nbytes`` those that a task may hold. ``targets`` is empty where answers come back.
    """

    inputs: Inputs
    recipe: Recipe
    job: Job
    placement: Placement
    weights: tuple[float, ...]
    layout: Layout
    balanced: bool
    readers: int
    row_nbytes: int
    chunk_nbytes: int
    targets: tuple[Target, ...] = ()

    @property
    def key(self) -> Hashable:
        """Under which speeds are remembered: the network, the rows' shapes and dtypes, and how it is run."""
        looks = tuple((tuple(a.shape[1:]), str(a.dtype)) for a in self.inputs.arrays)
        options = self.job.options
        return (
            self.recipe.key,
            looks,
            str(options.dtype),
            options.autocast,
            id(options.preprocess),
            id(options.postprocess),
        )

    @property
    def max_task_rows(self) -> int:
        """Rows of the largest task that the dealer may deal."""
        by_bytes = max(self.layout.cell_rows, self.chunk_nbytes // max(1, self.row_nbytes))
        return min(self.layout.n_rows, max(by_bytes, *self.layout.row_chunks))
