"""From what a user typed to a plan that can run: everything is looked at, all that cannot work is said at once.

Nothing starts here: no cluster, no task, and no row is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from distributed import Client

from daskinfer.cluster.placement import Placement, resolve_placement
from daskinfer.core.arrays import Array
from daskinfer.core.chunks import Chunk
from daskinfer.errors import ErrorCollector, InputError, OutputExists, PlanError
from daskinfer.hardware.discovery import inspect_machine
from daskinfer.models.model import ModelLoader, as_model
from daskinfer.options import OptionFields, Options, is_trusted, merge_options
from daskinfer.planning.input_fingerprint import compute_input_fingerprint
from daskinfer.planning.inputs import Inputs
from daskinfer.planning.job import InferenceJob, make_history_key
from daskinfer.planning.output_spec import OutputSpec, check_fill_value, infer_output_spec
from daskinfer.planning.plan import Plan, find_memory_problems, make_device_plans
from daskinfer.scheduling.batching import align_batch_size, check_batch_size, choose_batch_size, read_cell_rows
from daskinfer.scheduling.chunking import ChunkLayout, assign_chunks, fit_chunk_nbytes, make_chunks, resolve_weights
from daskinfer.scheduling.throughput_history import history
from daskinfer.storage.formats import Target, check_output_path
from daskinfer.storage.manifest import Header, compute_shard_rows
from daskinfer.storage.output_request import ExistingOutput, OutputRequest, check_shard, collect_result_options
from daskinfer.storage.paths import not_ours_error, read_header
from daskinfer.worker.model_runner import ModelRunConfig

StrPath = str | os.PathLike[str]
DeviceWeights = str | Sequence[float] | Mapping[str, float]

# Bytes of output in a write-unit (a store's chunk): large enough for a disk, small enough to balance; arbitrary.
WRITE_UNIT_NBYTES = 1 << 20
# Write-units in the smallest share: every share is met to within 1/64 of it; arbitrary.
MIN_WRITE_UNITS = 32


@dataclass(frozen=True)
class PreparedJob:
    """A call that can run: what is computed, where, in which chunks; ``output_request`` is what it stores, where it has a target."""

    model_name: str
    inputs: Inputs
    loader: ModelLoader
    output_spec: OutputSpec
    run_config: ModelRunConfig
    placement: Placement
    weights: tuple[float, ...]
    balanced: bool
    tunable: bool
    layout: ChunkLayout
    output_request: OutputRequest | None = None

    def make_plan(self) -> Plan:
        """The plan as people read it, with the speeds that are known."""
        speeds = history.get_or_create(make_history_key(self.loader, self.inputs, self.run_config.options)).speeds
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
        return (
            f"CPUs: {len(self.placement.devices)} x 1 thread, or this process with all of torch's threads where that is "
            "faster; what is measured decides",
        )

    def make_job(
        self,
        targets: Sequence[Target] = (),
        done: Sequence[tuple[int, int]] = (),
        n_failed: int = 0,
        row_range: tuple[int, int] | None = None,
    ) -> InferenceJob:
        """What the driver computes.

        ``targets`` are files that the workers write to, ``done`` row ranges that they hold, ``n_failed`` of these rows
        without an answer, ``part`` (start, stop) the call's part of the input, None: all of it.
        """
        start, stop = row_range or (0, self.layout.n_rows)
        return InferenceJob(
            inputs=self.inputs,
            loader=self.loader,
            run_config=self.run_config,
            placement=self.placement,
            weights=self.weights,
            layout=self.layout,
            balanced=self.balanced,
            prefetch=self.run_config.options.prefetch,
            row_nbytes=self.inputs.row_nbytes + self.output_spec.row_nbytes,
            chunk_nbytes=fit_chunk_nbytes(self.placement.memory_limits, self.loader.nbytes),
            targets=tuple(targets),
            tunable=self.tunable,
            done=tuple(done),
            part_rows=stop - start,
            n_failed=n_failed,
        )

    def build_result(self, arrays: Sequence[Array]) -> Any:
        """Arrays in the form of the network's answer; tensors where the input was one."""
        return self.output_spec.structure.rebuild(
            [torch.from_numpy(a) for a in arrays] if self.inputs.has_tensors else arrays
        )

    def find_problems(self) -> list[str]:
        """Sentences on what does not fit into memory."""
        row_nbytes = self.inputs.row_nbytes + self.output_spec.row_nbytes
        limits = self.placement.memory_limits
        return find_memory_problems(
            self.make_plan().devices, self.layout, limits, row_nbytes=row_nbytes, model_nbytes=self.loader.nbytes
        )


def build_job(
    model: Any,
    x: Any,
    *,
    devices: str | Sequence[str],
    device_weights: DeviceWeights,
    batch_size: int | str,
    client: Client | None,
    options: Options | None,
    fields: OptionFields,
    refusals: ErrorCollector | None = None,
    existing_output: ExistingOutput | None = None,
) -> PreparedJob:
    """Look at every argument, find out what the answer looks like, and lay the rows out.

    ``find_problems`` may hold errors that the caller has found already. ``into`` cuts at the write-units of a store.

    Raises
    ------
    DaskInferError
        The one thing that cannot work, or a PlanError with all of them.
    """
    refusals = refusals or ErrorCollector()
    given: dict[str, Any] = {}
    with refusals.collect():
        given["inputs"] = Inputs.from_value(x)
    with refusals.collect():
        given["options"] = merge_options(options, fields)
    with refusals.collect():
        given["batch_size"] = check_batch_size(batch_size)
    with refusals.collect():
        given["placement"] = placement = resolve_placement(devices, client)
        names, kinds = [d.name for d in placement.devices], [d.kind for d in placement.devices]
        given["weights"] = resolve_weights(device_weights, names, kinds)
    with refusals.collect():
        # Before the network is tried on made-up rows: these would be as large as the file declares.
        if inputs := given.pop("inputs", None):
            inputs.check_sizes(_get_memory_budget(given))
            given["inputs"] = inputs
    with refusals.collect():
        given["model"] = as_model(model, trust=is_trusted(options, fields))
        given["recipe"] = given["model"].make_loader()
    with refusals.collect():
        _add_output_spec(given)
    refusals.raise_if_any()
    balanced = isinstance(device_weights, str) and device_weights == "auto"
    return _prepare_job(given, balanced=balanced, existing_output=existing_output)


def _add_output_spec(resolved: dict[str, Any]) -> None:
    """Find out what the answer looks like, where there is all that this takes."""
    if {"inputs", "options", "recipe"} <= resolved.keys():
        resolved["options"] = keep_bfloat16(resolved["options"], resolved["inputs"])
        resolved["promise"] = get_output_spec(resolved["recipe"], resolved["inputs"], resolved["options"])
        check_fill_value(resolved["options"], resolved["promise"])


def _prepare_job(resolved: dict[str, Any], *, balanced: bool, existing_output: ExistingOutput | None) -> PreparedJob:
    inputs: Inputs = resolved["inputs"]
    wanted: OutputSpec = resolved["promise"]
    placement: Placement = resolved["placement"]
    recipe: ModelLoader = resolved["recipe"]
    weights: tuple[float, ...] = resolved["weights"]
    automatic = align_batch_size(inputs.unit_rows or 1, choose_batch_size(inputs.n_rows, inputs.row_nbytes, weights))
    begun = existing_output.header if existing_output is not None else None
    if begun is not None and resolved["batch_size"] not in (None, begun.batch_size):
        begun = None  # which is refused when the output is opened
    batch_size = resolved["batch_size"] or (begun.batch_size if begun else automatic)
    # After the micro-batch, which must not change from call to call.
    weights = (_get_measured_weights(resolved) if balanced else None) or weights
    chunk_nbytes = fit_chunk_nbytes(placement.memory_limits, recipe.nbytes)
    # Into a store a dask array is cut anew: two chunks in one write-unit would be written over each other.
    if inputs.row_chunks is not None and existing_output is None:
        layout = assign_chunks(inputs.row_chunks, weights, batch_size=batch_size)
    else:
        layout = _make_layout(
            inputs, wanted, weights, batch_size, chunk_nbytes, existing_output and replace(existing_output, header=begun)
        )
    job = ModelRunConfig(inputs.ports, batch_size, resolved["options"], wanted.outputs)
    if begun is not None:
        job = replace(job, by_kind=dict(begun.by_kind), channels_last=begun.channels_last)
    work = PreparedJob(
        resolved["model"].name,
        inputs,
        recipe,
        wanted,
        job,
        placement,
        weights,
        balanced,
        # Shards do not know of one another's measurements, and a run that goes on computes the same bytes.
        resolved["batch_size"] is None and begun is None and (existing_output is None or existing_output.shard is None),
        layout,
    )
    if sentences := work.find_problems():
        raise PlanError(sentences)
    return work


def _make_layout(
    inputs: Inputs,
    output_spec: OutputSpec,
    weights: Sequence[float],
    batch_size: int,
    chunk_nbytes: int,
    existing_output: ExistingOutput | None,
) -> ChunkLayout:
    """Cut the rows at cells that cut neither what is read in one go nor, into a store, what is written so."""
    row_nbytes = inputs.row_nbytes + output_spec.row_nbytes
    limits = {"row_nbytes": row_nbytes, "chunk_nbytes": chunk_nbytes}
    cell_rows = read_cell_rows(batch_size, inputs.unit_rows or 1, inputs.n_rows, **limits)
    n_rows, n_shards = (
        inputs.n_rows,
        existing_output.shard[1] if existing_output is not None and existing_output.shard else 1,
    )
    if existing_output is not None:
        cell_rows = _choose_write_unit_rows(
            n_rows // n_shards, cell_rows, output_spec, weights, chunk_nbytes // max(1, row_nbytes)
        )
        cell_rows = existing_output.header.unit_rows if existing_output.header else cell_rows
    if existing_output is None or existing_output.shard is None:
        return make_chunks(n_rows, weights, batch_size=batch_size, cell_rows=cell_rows, **limits)
    # The devices share the rows of this shard, not only those of all: each part is laid out by itself.
    chunks: list[Chunk] = []
    start, stop = compute_shard_rows(n_rows, cell_rows, existing_output.shard)
    for first, last in ((0, start), (start, stop), (stop, n_rows)):
        part = make_chunks(last - first, weights, batch_size=batch_size, cell_rows=cell_rows, **limits)
        chunks += [replace(c, index=len(chunks) + c.index, start=first + c.start, stop=first + c.stop) for c in part.chunks]
    return ChunkLayout(n_rows, batch_size, cell_rows, tuple(chunks))


def _get_memory_budget(resolved: Mapping[str, Any]) -> int:
    """Bytes of the device with the least memory of those that get rows; this machine's where none is known."""
    shares = zip(resolved["placement"].memory_limits, resolved["weights"], strict=True) if "weights" in resolved else ()
    return min((limit for limit, weight in shares if limit and weight), default=0) or inspect_machine().memory_nbytes


def _get_measured_weights(resolved: dict[str, Any]) -> tuple[float, ...] | None:
    """Each device's speed as its weight, the slowest 1, where all were measured for this network."""
    known = history.get_or_create(make_history_key(resolved["recipe"], resolved["inputs"], resolved["options"])).speeds
    speeds = tuple(known.get(device.name, 0.0) for device in resolved["placement"].devices)
    return tuple(speed / min(speeds) for speed in speeds) if all(speeds) else None


def keep_bfloat16(options: Options, inputs: Inputs) -> Options:
    """Cast ports that came as bfloat16 tensors back to it in the worker, unless told otherwise."""
    if not inputs.bfloat16_ports or options.dtype is not None:
        return options
    return replace(options, dtype=dict.fromkeys(inputs.bfloat16_ports, "bfloat16"))


def get_output_spec(loader: ModelLoader, inputs: Inputs, options: Options) -> OutputSpec:
    """What the answer to these inputs looks like; found out once per network, and again where functions stand around it."""
    if options.output is not None or options.preprocess is not None or options.postprocess is not None:
        return infer_output_spec(loader, inputs.ports, inputs.make_empty_arrays(), options)
    known = history.get_or_create(make_history_key(loader, inputs, options))
    known.output_spec = found = known.output_spec or infer_output_spec(
        loader, inputs.ports, inputs.make_empty_arrays(), options
    )
    return cast(OutputSpec, found)


def _choose_write_unit_rows(
    n_rows: int, cell_rows: int, output_spec: OutputSpec, weights: Sequence[float], max_rows: int
) -> int:
    """Rows of a store's chunk: whole cells of about ``WRITE_UNIT_NBYTES``, few enough to meet every share.

    ``max_rows`` are those of a task: a unit is computed whole.
    """
    by_size = WRITE_UNIT_NBYTES // max(1, output_spec.row_nbytes)
    smallest = min(weight for weight in weights if weight > 0) / sum(weights)
    by_share = int(n_rows * smallest / MIN_WRITE_UNITS)
    return max(1, min(by_size, by_share, max_rows) // cell_rows) * cell_rows


def build_storage_job(
    model: Any,
    source: Any,
    target: StrPath | Mapping[str, StrPath],
    *,
    overwrite: bool = False,
    shard: tuple[int, int] | None = None,
    **arguments: Any,
) -> PreparedJob:
    """The work of a run to storage, with what it wants to store, in the order of the network's outputs.

    An output that was begun, unless it is to be made ``overwrite``, says the micro-batch and the write-units.

    Raises
    ------
    DaskInferError
        As :func:`build_job`; where an output's path cannot be used, or does not belong to an output.
    """
    refusals = ErrorCollector()
    part, paths = None, dict[str, str]()
    with refusals.collect():
        part = check_shard(shard, overwrite=overwrite)
    for name, path in target.items() if isinstance(target, Mapping) else [("", target)]:
        with refusals.collect():
            paths[name] = _check_output_path(path, source, overwrite=overwrite)
    into = ExistingOutput.from_paths([] if overwrite else list(paths.values()), part)
    work = build_job(model, source, refusals=refusals, existing_output=into, **arguments)
    names = work.output_spec.structure.names
    if isinstance(target, Mapping) and set(paths) != set(names):
        raise InputError(
            f"the outputs named are {', '.join(map(str, target)) or 'nothing'}; the network's are {', '.join(names)}. "
            "Give each a path."
        )
    if not isinstance(target, Mapping) and len(names) != 1:
        raise InputError(
            f"one output path was given; the network has {len(names)} outputs ({', '.join(names)}). "
            f"Give each a path: {{{', '.join(f'{n!r}: …' for n in names)}}}."
        )
    ordered = tuple(paths[name] for name in names) if isinstance(target, Mapping) else (paths[""],)
    wanted = OutputRequest(
        ordered, _make_headers(work, part), check_batch_size(arguments["batch_size"]), part, _should_retry_failed_rows(work)
    )
    if not overwrite:
        wanted.check_existing_outputs()
    return replace(work, output_request=wanted)


def _make_headers(job: PreparedJob, shard: tuple[int, int] | None) -> tuple[Header, ...]:
    """What each output is made of."""
    same: dict[str, Any] = {
        "model": job.loader.compute_fingerprint(),
        "input": compute_input_fingerprint(job.inputs),
        "options": collect_result_options(job.run_config.options),
        "unit_rows": job.layout.cell_rows,
        "batch_size": job.run_config.batch_size,
        "by_kind": dict(job.run_config.by_kind),
        "channels_last": job.run_config.channels_last,
        "shards": shard[1] if shard else 0,
    }
    outputs = zip(job.output_spec.structure.names, job.output_spec.outputs, strict=True)
    return tuple(
        Header(output=name, shape=(job.inputs.n_rows, *o.shape[1:]), dtype=o.dtype.str, **same) for name, o in outputs
    )


def _should_retry_failed_rows(job: PreparedJob) -> bool:
    return job.run_config.options.on_error == "raise"


def _check_output_path(path: StrPath, source: Any, *, overwrite: bool) -> str:
    for read in _get_source_paths(source):
        if os.path.commonpath([os.path.abspath(path), os.path.abspath(read)]) == os.path.abspath(read):
            raise OutputExists(
                f"the output {os.fspath(path)!r} lies inside the input {os.fspath(read)!r}; an input is never written to. "
                "Choose another path."
            )
    path = check_output_path(path)
    if os.path.lexists(path) and not overwrite and read_header(path) is None:
        raise not_ours_error(path)
    return path


def _get_source_paths(source: Any) -> list[StrPath]:
    ports = source.values() if isinstance(source, Mapping) else source if isinstance(source, tuple) else [source]
    return [port for port in ports if isinstance(port, str | os.PathLike)]


def make_even_chunks(inputs: Inputs, row_out_nbytes: int, batch_size: int) -> tuple[int, ...]:
    """The chunks of a lazy array that nobody has cut yet: whole micro-batches of equal size."""
    layout = make_chunks(inputs.n_rows, [1.0], batch_size=batch_size, row_nbytes=inputs.row_nbytes + row_out_nbytes)
    return layout.row_chunks
