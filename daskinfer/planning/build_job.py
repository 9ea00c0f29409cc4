"""Build a job from what a user typed: check every argument, and report all problems at once.

Nothing starts here: no cluster and no task, and no row is read. Devices are resolved beforehand (``cluster.placement``),
since that may ask the workers of a cluster.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from daskinfer.core.chunks import BatchConfig
from daskinfer.errors import ErrorCollector, InputError, OutputExists, PlanError
from daskinfer.hardware.discovery import inspect_machine
from daskinfer.models.fingerprint import compute_fingerprint
from daskinfer.models.loaders import ModelLoader
from daskinfer.models.model import Model, as_model
from daskinfer.options import Options, is_trusted, merge_options
from daskinfer.planning.input_fingerprint import compute_input_fingerprint
from daskinfer.planning.inputs import InputLike, Inputs
from daskinfer.planning.job import InferenceJob, Placement, make_history_key
from daskinfer.planning.output_spec import OutputSpec, check_fill_value, infer_output_spec, output_specs
from daskinfer.scheduling.batching import align_batch_size, check_batch_size, choose_batch_size, read_cell_rows
from daskinfer.scheduling.chunking import ChunkLayout, assign_chunks, fit_chunk_nbytes, make_chunks
from daskinfer.scheduling.throughput_history import history
from daskinfer.scheduling.weights import resolve_weights
from daskinfer.storage.formats import check_output_path
from daskinfer.storage.manifest import RESULT_OPTIONS, Header, compute_shard_rows
from daskinfer.storage.output_request import ExistingOutput, OutputRequest, check_shard
from daskinfer.storage.paths import make_unmanaged_output_error, read_header
from daskinfer.worker.model_runner import ModelRunConfig

StrPath = str | os.PathLike[str]
DeviceWeights = str | Sequence[float] | Mapping[str, float]
ModelLike = Model | torch.nn.Module | Callable[..., Any] | StrPath

# Bytes of output in a write-unit (a chunk of a store): large enough for a disk, small enough to balance; arbitrary.
WRITE_UNIT_NBYTES = 1 << 20
# Write-units in the smallest share: each device's rows differ from its share by at most 1/64 of it; arbitrary.
MIN_WRITE_UNITS = 32


@dataclass(frozen=True)
class RunArguments:
    """How a call is to run, as typed by the user; each public function takes these as keywords.

    ``options`` are merged with ``fields``, which win. ``placement`` is None if the devices cannot be used; the caller's
    error collector then holds the reason.
    """

    placement: Placement | None
    device_weights: DeviceWeights = "auto"
    batch_size: int | str = "auto"
    options: Options | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_balanced(self) -> bool:
        """Whether the devices get rows according to their measured throughput."""
        return isinstance(self.device_weights, str) and self.device_weights == "auto"


def build_job(
    model: ModelLike,
    x: InputLike,
    arguments: RunArguments,
    *,
    errors: ErrorCollector | None = None,
    existing_output: ExistingOutput | None = None,
) -> InferenceJob:
    """Check every argument, infer what the output looks like, and cut the rows into chunks.

    ``errors`` may already hold errors that the caller collected. With ``existing_output``, every chunk is made of whole
    write-units of the store.

    Raises
    ------
    DaskInferError
        The only problem, or a PlanError that lists all of them.
    """
    errors, fields = errors or ErrorCollector(), arguments.fields
    inputs = errors.attempt(Inputs.from_value, x)
    options = errors.attempt(merge_options, arguments.options, fields)
    batch_size = errors.attempt(check_batch_size, arguments.batch_size)
    weights = errors.attempt(_resolve_weights, arguments)
    if inputs is not None and not errors.succeeds(inputs.check_sizes, _get_memory_budget(arguments.placement, weights)):
        inputs = None  # never try the model on rows of the size that a file merely declares
    checked = errors.attempt(as_model, model, trust=is_trusted(arguments.options, fields))
    loader = errors.attempt(checked.make_loader) if checked is not None else None
    if inputs is not None and options is not None and loader is not None:
        options = keep_bfloat16(options, inputs)
        output_spec = errors.attempt(_check_output, loader, inputs, options)
    errors.raise_if_any()
    # No error was collected, so every attempt above returned its value.
    assert inputs is not None and options is not None and loader is not None and checked is not None
    assert output_spec is not None and arguments.placement is not None and weights is not None
    builder = _LayoutBuilder(inputs, output_spec, loader, options, arguments.placement, weights, batch_size, existing_output)
    job = builder.build(checked.name, balanced=arguments.is_balanced)
    if problems := job.find_problems():
        raise PlanError(problems)
    return job


def _resolve_weights(arguments: RunArguments) -> tuple[float, ...] | None:
    if arguments.placement is None:
        return None
    devices = arguments.placement.devices
    return resolve_weights(arguments.device_weights, [d.name for d in devices], [d.kind for d in devices])


def _get_memory_budget(placement: Placement | None, weights: Sequence[float] | None) -> int:
    """Return the memory in bytes of the smallest device that gets rows; that of this machine if none is known."""
    shares = zip(placement.memory_limits, weights, strict=True) if placement and weights else ()
    return min((limit for limit, weight in shares if limit and weight), default=0) or inspect_machine().memory_nbytes


def _check_output(loader: ModelLoader, inputs: Inputs, options: Options) -> OutputSpec:
    spec = get_output_spec(loader, inputs, options)
    check_fill_value(options, spec)
    return spec


@dataclass(frozen=True)
class _LayoutBuilder:
    """Chooses the batch size and cuts the rows, once every argument has been checked.

    ``batch_size`` is None for "auto". An output that is continued determines both, unless the user asked for another batch
    size: that is refused when the output is opened.
    """

    inputs: Inputs
    output_spec: OutputSpec
    loader: ModelLoader
    options: Options
    placement: Placement
    weights: tuple[float, ...]
    batch_size: int | None
    existing_output: ExistingOutput | None

    def build(self, model_name: str, *, balanced: bool) -> InferenceJob:
        batch = self._choose_batch_config()
        # After the batch size: it must not depend on measurements, or it would change from call to call.
        weights = (self._get_measured_weights() if balanced else None) or self.weights
        chunk_nbytes = fit_chunk_nbytes(self.placement.memory_limits, self.loader.nbytes)
        return InferenceJob(
            model_name=model_name,
            inputs=self.inputs,
            loader=self.loader,
            output_spec=self.output_spec,
            run_config=ModelRunConfig(self.inputs.ports, batch, self.options, self.output_spec.outputs),
            placement=self.placement,
            weights=weights,
            layout=self._make_layout(weights, batch.batch_size, chunk_nbytes),
            balanced=balanced,
            tunable=self._is_tunable(),
            chunk_nbytes=chunk_nbytes,
        )

    @property
    def _header(self) -> Header | None:
        """The header of an output that is continued, else None."""
        header = self.existing_output and self.existing_output.header
        return header if header and self.batch_size in (None, header.batch_size) else None

    @property
    def _is_sharded(self) -> bool:
        return self.existing_output is not None and self.existing_output.shard is not None

    def _is_tunable(self) -> bool:
        """Return whether the batch size may be tuned.

        Shards do not know each other's measurements, and a run that resumes must compute the same bytes.
        """
        return self.batch_size is None and self._header is None and not self._is_sharded

    def _choose_batch_config(self) -> BatchConfig:
        if header := self._header:
            return BatchConfig(self.batch_size or header.batch_size, dict(header.by_kind), header.channels_last)
        inputs = self.inputs
        automatic = choose_batch_size(inputs.n_rows, inputs.row_nbytes, self.weights)
        return BatchConfig(self.batch_size or align_batch_size(inputs.unit_rows or 1, automatic))

    def _get_measured_weights(self) -> tuple[float, ...] | None:
        """Return each device's throughput as its weight, the slowest 1, if all were measured for this model."""
        speeds = history.get_or_create(make_history_key(self.loader, self.inputs, self.options)).speeds
        known = tuple(speeds.get(device.name, 0.0) for device in self.placement.devices)
        return tuple(speed / min(known) for speed in known) if all(known) else None

    def _make_layout(self, weights: Sequence[float], batch_size: int, chunk_nbytes: int) -> ChunkLayout:
        """Cut the rows at cells, so that no unit that is read at once is split, nor, for a store, one that is written."""
        inputs, existing, n_rows = self.inputs, self.existing_output, self.inputs.n_rows
        # A dask array that goes to a store is cut again: two chunks in one write-unit would overwrite each other.
        if inputs.row_chunks is not None and existing is None:
            return assign_chunks(inputs.row_chunks, weights, batch_size=batch_size)
        row_nbytes = inputs.row_nbytes + self.output_spec.row_nbytes
        limits = {"row_nbytes": row_nbytes, "chunk_nbytes": chunk_nbytes}
        cell_rows = read_cell_rows(batch_size, inputs.unit_rows or 1, n_rows, **limits)
        if existing is not None:
            n_shards = existing.shard[1] if existing.shard else 1
            max_rows = chunk_nbytes // max(1, row_nbytes)
            cell_rows = _choose_write_unit_rows(n_rows // n_shards, cell_rows, self.output_spec, weights, max_rows)
            cell_rows = self._header.unit_rows if self._header else cell_rows
        if existing is None or existing.shard is None:
            return make_chunks(n_rows, weights, batch_size=batch_size, cell_rows=cell_rows, **limits)
        # The devices share the rows of this shard, not just the rows of all shards: cut each part on its own.
        start, stop = compute_shard_rows(n_rows, cell_rows, existing.shard)
        parts = [
            make_chunks(last - first, weights, batch_size=batch_size, cell_rows=cell_rows, **limits)
            for first, last in ((0, start), (start, stop), (stop, n_rows))
        ]
        return ChunkLayout.concatenate(parts)


def keep_bfloat16(options: Options, inputs: Inputs) -> Options:
    """Have workers cast ports that were bfloat16 tensors back to bfloat16, unless ``dtype`` is set."""
    if not inputs.bfloat16_ports or options.dtype is not None:
        return options
    return replace(options, dtype=dict.fromkeys(inputs.bfloat16_ports, "bfloat16"))


def get_output_spec(loader: ModelLoader, inputs: Inputs, options: Options) -> OutputSpec:
    """Return the output spec for these inputs, from a cache unless ``output``, ``preprocess`` or ``postprocess`` is set."""

    def infer() -> OutputSpec:
        return infer_output_spec(loader, inputs.ports, inputs.make_empty_arrays(), options, inputs.forms)

    if options.output is not None or options.preprocess is not None or options.postprocess is not None:
        return infer()
    return output_specs.get_or_infer(make_history_key(loader, inputs, options), infer)


def _choose_write_unit_rows(
    n_rows: int, cell_rows: int, output_spec: OutputSpec, weights: Sequence[float], max_rows: int
) -> int:
    """Return the rows of a store's chunk: whole cells of about ``WRITE_UNIT_NBYTES``, few enough to meet every share.

    ``max_rows`` is the limit of one task, since a unit is computed in one task.
    """
    by_size = WRITE_UNIT_NBYTES // max(1, output_spec.row_nbytes)
    smallest = min(weight for weight in weights if weight > 0) / sum(weights)
    by_share = int(n_rows * smallest / MIN_WRITE_UNITS)
    return max(1, min(by_size, by_share, max_rows) // cell_rows) * cell_rows


def build_storage_job(
    model: ModelLike,
    source: InputLike,
    target: StrPath | Mapping[str, StrPath],
    arguments: RunArguments,
    *,
    overwrite: bool = False,
    shard: tuple[int, int] | None = None,
    errors: ErrorCollector | None = None,
) -> InferenceJob:
    """Build the job of a run to storage; its ``output_request`` lists the paths in the order of the model's outputs.

    An existing output determines the batch size and the write-units, unless it is overwritten.

    Raises
    ------
    DaskInferError
        As for :func:`build_job`; also if a path cannot be used, or an output has no path.
    """
    errors = errors or ErrorCollector()
    part = errors.attempt(check_shard, shard, overwrite=overwrite)
    by_name = target if isinstance(target, Mapping) else {"": target}
    paths: dict[str, str] = {}
    for name, path in by_name.items():
        if (checked := errors.attempt(_check_output_path, path, source, overwrite=overwrite)) is not None:
            paths[name] = checked
    existing = ExistingOutput.from_paths([] if overwrite else list(paths.values()), part)
    job = build_job(model, source, arguments, errors=errors, existing_output=existing)
    names = job.output_spec.structure.names
    ordered = _order_paths(target, paths, names)
    retry_failed_rows = job.run_config.options.on_error == "raise"
    batch_size = check_batch_size(arguments.batch_size)
    request = OutputRequest(ordered, _make_headers(job, part), batch_size, part, retry_failed_rows)
    if not overwrite:
        request.check_existing_outputs()
    return replace(job, output_request=request)


def _order_paths(target: StrPath | Mapping[str, StrPath], paths: Mapping[str, str], names: Sequence[str]) -> tuple[str, ...]:
    """Return the outputs' paths in the order of the model's outputs."""
    if isinstance(target, Mapping):
        if set(paths) != set(names):
            raise InputError(
                f"target must have one path for each output of the model ({', '.join(names)}), got paths for "
                f"{', '.join(map(str, target)) or 'none'}."
            )
        return tuple(paths[name] for name in names)
    if len(names) != 1:
        raise InputError(
            f"the model has {len(names)} outputs ({', '.join(names)}), got one path. "
            f"Pass a path for each: {{{', '.join(f'{n!r}: …' for n in names)}}}."
        )
    return (paths[""],)


def _make_headers(job: InferenceJob, shard: tuple[int, int] | None) -> tuple[Header, ...]:
    """Make the header of each output: which model, input and options it is computed from, and in which units."""
    same: dict[str, Any] = {
        "model": job.loader.compute_fingerprint(),
        "input": compute_input_fingerprint(job.inputs),
        "options": collect_result_options(job.run_config.options),
        "unit_rows": job.layout.cell_rows,
        **job.run_config.batch.to_dict(),
        "shards": shard[1] if shard else 0,
    }
    outputs = zip(job.output_spec.structure.names, job.output_spec.outputs, strict=True)
    return tuple(Header(output=name, shape=(job.n_rows, *o.shape[1:]), dtype=o.dtype.str, **same) for name, o in outputs)


def collect_result_options(options: Options) -> dict[str, Any]:
    """Return the options that change the result, as a manifest stores them."""
    return {name: _serialize_option(getattr(options, name)) for name in RESULT_OPTIONS}


def _serialize_option(value: Any) -> Any:
    if callable(value):
        return compute_fingerprint(value)
    if isinstance(value, Mapping):
        return {str(key): _serialize_option(item) for key, item in value.items()}
    # As text, since NaN is not equal to itself.
    return repr(value) if isinstance(value, float) else value


def _check_output_path(path: StrPath, source: InputLike, *, overwrite: bool) -> str:
    for source_path in _get_source_paths(source):
        if os.path.commonpath([os.path.abspath(path), os.path.abspath(source_path)]) == os.path.abspath(source_path):
            raise OutputExists(
                f"output path {os.fspath(path)!r} is inside the input {os.fspath(source_path)!r}, which is never modified. "
                "Choose another path."
            )
    path = check_output_path(path)
    if os.path.lexists(path) and not overwrite and read_header(path) is None:
        raise make_unmanaged_output_error(path)
    return path


def _get_source_paths(source: InputLike) -> list[StrPath]:
    ports = source.values() if isinstance(source, Mapping) else source if isinstance(source, tuple) else [source]
    return [port for port in ports if isinstance(port, str | os.PathLike)]


def make_even_chunks(inputs: Inputs, row_out_nbytes: int, batch_size: int) -> tuple[int, ...]:
    """Return the row chunks for a lazy array that has none yet: of equal size, in whole batches."""
    layout = make_chunks(inputs.n_rows, [1.0], batch_size=batch_size, row_nbytes=inputs.row_nbytes + row_out_nbytes)
    return layout.row_chunks
