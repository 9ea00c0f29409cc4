"""One record of what a call computes: :class:`InferenceJob`, made by ``build_job`` and carried out by ``execution``.

The job stays in the client. It refers to the caller's arrays, which may be dask graphs or memory of this process, so it
never travels; what a worker needs from it is in the call's ``RunSpec`` and in each task.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from daskinfer.core.arrays import Array
from daskinfer.core.chunks import BatchConfig
from daskinfer.core.row_ranges import Range, Ranges
from daskinfer.hardware.discovery import Device
from daskinfer.models.loaders import ModelLoader
from daskinfer.options import Options
from daskinfer.planning.inputs import Inputs
from daskinfer.planning.output_spec import OutputSpec
from daskinfer.planning.plan import Plan, find_memory_problems, make_device_plans
from daskinfer.scheduling.batching import MIN_BATCHES, make_batch_size_candidates
from daskinfer.scheduling.chunking import ChunkLayout, assign_chunks, make_chunks
from daskinfer.scheduling.throughput_history import PerformanceRecord, history
from daskinfer.storage.formats import Target
from daskinfer.storage.output_request import OutputRequest
from daskinfer.worker.batch_buffers import CHANNELS_LAST_FORMATS
from daskinfer.worker.model_runner import ModelRunConfig, RunSpec


def make_history_key(loader: ModelLoader, inputs: Inputs, options: Options) -> Hashable:
    """Make the key of a model's history: the model, its ports, the shape and dtype of a row, and how it is run."""
    rows = tuple((tuple(a.shape[1:]), str(a.dtype)) for a in inputs.arrays)
    how = (str(options.dtype), options.autocast, options.memory_format, id(options.preprocess), id(options.postprocess))
    return (loader.key, inputs.ports, rows, how)


@dataclass(frozen=True)
class Placement:
    """The devices of a call, in the plan's order, as plain data; ``cluster.placement`` knows the workers behind them.

    ``addresses`` are those of an external cluster's workers, empty if daskinfer starts the workers. ``nannies`` are the
    addresses of the nannies that restart such a worker: empty if it has none, None for a worker of a managed cluster.
    ``can_choose_executor``: the user named no devices and the machine has only CPUs, so this process may compute as well.
    """

    devices: tuple[Device, ...]
    addresses: tuple[str, ...] = ()
    nannies: tuple[str | None, ...] = ()
    can_choose_executor: bool = False

    @property
    def is_inline(self) -> bool:
        """Whether this process computes everything."""
        return self.devices[0].kind == "inline"

    @property
    def is_external(self) -> bool:
        """Whether the workers belong to an external cluster."""
        return bool(self.addresses)

    @property
    def memory_limits(self) -> tuple[int, ...]:
        """Bytes that a chunk and the model may take together on each device; 0 if unknown."""
        return tuple(d.free_nbytes or d.memory_nbytes for d in self.devices)


@dataclass(frozen=True)
class ResumeState:
    """What is already stored of a run's outputs.

    ``targets`` are what the workers write to. ``done`` lists ranges (start, stop) of whole cells, in order, that need not be
    computed again; rows of other shards count as done. ``n_failed`` of those rows failed in earlier attempts and have no
    output. ``row_range`` is the rows (start, stop) that this run and earlier attempts at it compute; None means all.
    """

    targets: tuple[Target, ...] = ()
    done: Ranges = ()
    n_failed: int = 0
    row_range: Range | None = None


@dataclass(frozen=True)
class InferenceJob:
    """A call that can run: what is computed, where, and in which chunks.

    ``balanced``: devices get rows according to their measured throughput, otherwise exactly the layout's chunks.
    ``tunable``: the batch size is a prior, which tuning may replace by a measured one. ``chunk_nbytes`` is the most bytes
    that a task may hold. ``output_request`` says where the output is stored, None if it is returned; ``resume`` is what is
    already stored.
    """

    model_name: str
    inputs: Inputs
    loader: ModelLoader
    output_spec: OutputSpec
    run_config: ModelRunConfig
    placement: Placement
    weights: tuple[float, ...]
    layout: ChunkLayout
    balanced: bool
    tunable: bool
    chunk_nbytes: int
    output_request: OutputRequest | None = None
    resume: ResumeState = field(default_factory=ResumeState)

    # ------------------------------------------------------------------ sizes

    @property
    def n_rows(self) -> int:
        """Rows of the input."""
        return self.layout.n_rows

    @cached_property
    def row_nbytes(self) -> int:
        """Bytes of one row of all inputs and outputs."""
        return self.inputs.row_nbytes + self.output_spec.row_nbytes

    @property
    def prefetch(self) -> int:
        """Chunks to read ahead on each device."""
        return self.run_config.options.prefetch

    @property
    def row_range(self) -> Range:
        """Rows (start, stop) that this call and earlier attempts at it compute: all rows, or those of its shard."""
        return self.resume.row_range or (0, self.n_rows)

    @cached_property
    def max_task_rows(self) -> int:
        """Rows of the largest task that the balancer may hand out."""
        by_bytes = max(self.layout.cell_rows, self.chunk_nbytes // max(1, self.row_nbytes))
        return min(self.layout.n_rows, max(by_bytes, *self.layout.row_chunks))

    @property
    def max_rows_ahead(self) -> int:
        """Rows that devices may be ahead of a consumer who takes the output in order: twice what the windows may hold."""
        return 2 * (self.prefetch + 2) * len(self.weights) * self.max_task_rows

    @cached_property
    def spec(self) -> RunSpec:
        """The part of the job that travels to workers, the same for every task."""
        return RunSpec(self.loader, self.run_config, self.resume.targets)

    # ------------------------------------------------------------------ tuning

    @cached_property
    def history_key(self) -> Hashable:
        """The key of this model's history (see :func:`make_history_key`)."""
        return make_history_key(self.loader, self.inputs, self.run_config.options)

    @cached_property
    def record(self) -> PerformanceRecord:
        """What was measured of this model in earlier calls, which this one adds to."""
        return history.get_or_create(self.history_key)

    @cached_property
    def has_images(self) -> bool:
        """Whether any port holds images or volumes, for which torch has two memory formats."""
        return any(array.ndim in CHANNELS_LAST_FORMATS for array in self.inputs.arrays)

    @property
    def has_tuning_candidates(self) -> bool:
        """Whether tuning has anything to compare: several batch sizes, or two memory formats."""
        return self.tunable and (len(self.batch_size_candidates) > 1 or self.has_images)

    @property
    def batch_size_candidates(self) -> tuple[int, ...]:
        """Batch sizes worth measuring: at least two batches in a chunk, and ``MIN_BATCHES`` in the smallest share.

        Balanced devices count as equal, since a slow one has no share assigned in advance.
        """
        positive = [1.0 if self.balanced else weight for weight in self.weights if weight]
        by_share = int(self.layout.n_rows * min(positive) / sum(positive)) // MIN_BATCHES
        by_bytes = self.chunk_nbytes // max(1, self.row_nbytes) // 2
        return make_batch_size_candidates(self.run_config.batch.batch_size, min(by_share, by_bytes), self._fixed_cell_rows)

    def with_channels_last(self, kinds: Sequence[str]) -> InferenceJob:
        """Return the job with images in channels_last on these kinds of device."""
        return self.with_batch_config(replace(self.run_config.batch, channels_last=tuple(kinds)))

    def with_batch_sizes(self, sizes: Mapping[str, int]) -> InferenceJob:
        """Return the job with a batch size for each kind of device; the largest sets the cells, and the others divide it."""
        largest = max(sizes.values())
        batch = BatchConfig(largest, dict(sizes), self.run_config.batch.channels_last)
        return replace(self.with_batch_config(batch), layout=self._make_layout(largest), tunable=False)

    def with_batch_config(self, batch: BatchConfig) -> InferenceJob:
        """Return the job with this batch configuration and unchanged chunks."""
        return replace(self, run_config=replace(self.run_config, batch=batch))

    def _make_layout(self, batch_size: int) -> ChunkLayout:
        if self._fixed_cell_rows:
            return replace(self.layout, batch_size=batch_size)
        if self.inputs.row_chunks is not None:
            return assign_chunks(self.layout.row_chunks, self.weights, batch_size=batch_size)
        limits = {"row_nbytes": self.row_nbytes, "chunk_nbytes": self.chunk_nbytes}
        return make_chunks(self.layout.n_rows, self.weights, batch_size=batch_size, **limits)

    @property
    def _fixed_cell_rows(self) -> int | None:
        """Rows of a cell if a store fixes them, so that every batch size must divide them; else None."""
        fixed = self.resume.targets or self.layout.cell_rows != self.layout.batch_size
        return self.layout.cell_rows if fixed else None

    # ------------------------------------------------------------------ the plan, and the output

    @cached_property
    def plan(self) -> Plan:
        """Make the plan that people read, with the throughput measured so far."""
        speeds = self.record.speeds
        devices = self.placement.devices
        outputs = zip(self.output_spec.structure.names, self.output_spec.outputs, strict=True)
        return Plan(
            devices=make_device_plans(
                self.layout,
                names=[d.name for d in devices],
                labels=[d.label for d in devices],
                weights=self.weights,
                row_in_nbytes=self.inputs.row_nbytes,
                row_out_nbytes=self.output_spec.row_nbytes,
                model_nbytes=self.loader.nbytes,
                speeds=[speeds.get(d.name, 0.0) for d in devices],
            ),
            layout=self.layout,
            weights_assumed=self.balanced and len(self.weights) > 1 and not all(speeds.get(d.name) for d in devices),
            balanced=self.balanced,
            notes=self._make_notes(),
            model=self.model_name,
            inputs=self.inputs.describe(),
            outputs=tuple(f"{name}: {(self.inputs.n_rows, *o.shape[1:])} {o.dtype}" for name, o in outputs),
        )

    def _make_notes(self) -> tuple[str, ...]:
        if not self.placement.can_choose_executor:
            return ()
        n_workers = len(self.placement.devices)
        return (f"runs on {n_workers} single-threaded CPU workers or in this process, whichever measures faster",)

    def find_problems(self) -> list[str]:
        """Return a sentence for each device on which the job does not fit into memory."""
        return find_memory_problems(
            self.plan.devices,
            self.layout,
            self.placement.memory_limits,
            row_nbytes=self.row_nbytes,
            model_nbytes=self.loader.nbytes,
        )

    def build_output(self, arrays: Sequence[Array]) -> Any:
        """Put the arrays into the structure of the model's output, as torch tensors if an input was one."""
        leaves = [torch.from_numpy(a) for a in arrays] if self.inputs.has_tensors else arrays
        return self.output_spec.structure.rebuild(leaves)
