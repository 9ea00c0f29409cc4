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

from daskinfer.cluster.placement import Placement, place
from daskinfer.core.arrays import Array
from daskinfer.core.chunks import Chunk
from daskinfer.errors import InputError, OutputExists, PlanError, Refusals
from daskinfer.hardware.discovery import machine
from daskinfer.models.model import Recipe, as_model
from daskinfer.options import OptionFields, Options, merge_options, trusts
from daskinfer.planning.input_fingerprint import input_mark
from daskinfer.planning.inputs import Inputs
from daskinfer.planning.job import Call, key_of
from daskinfer.planning.output_spec import Promise, check_fill, promise
from daskinfer.planning.plan import Plan, describe, memory_refusals
from daskinfer.scheduling.batching import auto_batch_size, check_batch_size, read_grid, within
from daskinfer.scheduling.chunking import Layout, fit_chunk_nbytes, follow, lay_out, resolve_weights
from daskinfer.scheduling.throughput_history import memory
from daskinfer.storage.formats import Target, check_path
from daskinfer.storage.manifest import Header, shard_rows
from daskinfer.storage.output_request import Into, Wanted, answer_options, check_shard
from daskinfer.storage.paths import foreign, read_header
from daskinfer.worker.model_runner import Job

Path = str | os.PathLike[str]
Weights = str | Sequence[float] | Mapping[str, float]

# Bytes of output in a write-unit (a store's chunk): large enough for a disk, small enough to balance; arbitrary.
WRITE_UNIT_NBYTES = 1 << 20
# Write-units in the smallest share: every share is met to within 1/64 of it; arbitrary.
MIN_WRITE_UNITS = 32


@dataclass(frozen=True)
class Work:
    """A call that can run: what is computed, where, in which chunks; ``wanted`` is what it stores, where it has a target."""

    name: str
    inputs: Inputs
    recipe: Recipe
    promise: Promise
    job: Job
    placement: Placement
    weights: tuple[float, ...]
    balanced: bool
    tunable: bool
    layout: Layout
    wanted: Wanted | None = None

    def plan(self) -> Plan:
        """The plan as people read it, with the speeds that are known."""
        speeds = memory.of(key_of(self.recipe, self.inputs, self.job.options)).speeds
        devices = self.placement.devices
        outputs = zip(self.promise.structure.names, self.promise.outputs, strict=True)
        return Plan(
            devices=describe(
                self.layout,
                names=[d.name for d in devices],
                labels=[d.label for d in devices],
                weights=self.weights,
                row_in_nbytes=self.inputs.row_nbytes,
                row_out_nbytes=self.promise.row_nbytes,
                model_nbytes=self.recipe.nbytes,
                speeds=[speeds.get(d.name, 0.0) for d in devices],
            ),
            layout=self.layout,
            weights_assumed=self.balanced and len(self.weights) > 1 and not all(speeds.get(d.name) for d in devices),
            balanced=self.balanced,
            notes=self._notes(),
            model=self.name,
            inputs=self.inputs.describe(),
            outputs=tuple(f"{name}: {(self.inputs.n_rows, *o.shape[1:])} {o.dtype}" for name, o in outputs),
        )

    def _notes(self) -> tuple[str, ...]:
        if not self.placement.automatic:
            return ()
        return (
            f"CPUs: {len(self.placement.devices)} x 1 thread, or this process with all of torch's threads where that is "
            "faster; what is measured decides",
        )

    def call(
        self,
        targets: Sequence[Target] = (),
        done: Sequence[tuple[int, int]] = (),
        n_failed: int = 0,
        part: tuple[int, int] | None = None,
    ) -> Call:
        """What the driver computes.

        ``targets`` are files that the workers write to, ``done`` row ranges that they hold, ``n_failed`` of these rows
        without an answer, ``part`` (start, stop) the call's part of the input, None: all of it.
        """
        start, stop = part or (0, self.layout.n_rows)
        return Call(
            inputs=self.inputs,
            recipe=self.recipe,
            job=self.job,
            placement=self.placement,
            weights=self.weights,
            layout=self.layout,
            balanced=self.balanced,
            readers=self.job.options.readers,
            row_nbytes=self.inputs.row_nbytes + self.promise.row_nbytes,
            chunk_nbytes=fit_chunk_nbytes(self.placement.limits, self.recipe.nbytes),
            targets=tuple(targets),
            tunable=self.tunable,
            done=tuple(done),
            part_rows=stop - start,
            n_failed=n_failed,
        )

    def answer(self, arrays: Sequence[Array]) -> Any:
        """Arrays in the form of the network's answer; tensors where the input was one."""
        return self.promise.structure.rebuild([torch.from_numpy(a) for a in arrays] if self.inputs.tensors else arrays)

    def refusals(self) -> list[str]:
        """Sentences on what does not fit into memory."""
        row_nbytes = self.inputs.row_nbytes + self.promise.row_nbytes
        limits = self.placement.limits
        return memory_refusals(
            self.plan().devices, self.layout, limits, row_nbytes=row_nbytes, model_nbytes=self.recipe.nbytes
        )


def assemble(
    model: Any,
    x: Any,
    *,
    devices: str | Sequence[str],
    device_weights: Weights,
    batch_size: int | str,
    client: Client | None,
    options: Options | None,
    fields: OptionFields,
    refusals: Refusals | None = None,
    into: Into | None = None,
) -> Work:
    """Look at every argument, find out what the answer looks like, and lay the rows out.

    ``refusals`` may hold errors that the caller has found already. ``into`` cuts at the write-units of a store.

    Raises
    ------
    DaskInferError
        The one thing that cannot work, or a PlanError with all of them.
    """
    refusals = refusals or Refusals()
    given: dict[str, Any] = {}
    with refusals.collect():
        given["inputs"] = Inputs.of(x)
    with refusals.collect():
        given["options"] = merge_options(options, fields)
    with refusals.collect():
        given["batch_size"] = check_batch_size(batch_size)
    with refusals.collect():
        given["placement"] = placement = place(devices, client)
        names, kinds = [d.name for d in placement.devices], [d.kind for d in placement.devices]
        given["weights"] = resolve_weights(device_weights, names, kinds)
    with refusals.collect():
        # Before the network is tried on made-up rows: these would be as large as the file declares.
        if inputs := given.pop("inputs", None):
            inputs.check_sizes(_budget(given))
            given["inputs"] = inputs
    with refusals.collect():
        given["model"] = as_model(model, trust=trusts(options, fields))
        given["recipe"] = given["model"].recipe()
    with refusals.collect():
        _find_promise(given)
    refusals.raise_if_any()
    balanced = isinstance(device_weights, str) and device_weights == "auto"
    return _lay_out(given, balanced=balanced, into=into)


def _find_promise(given: dict[str, Any]) -> None:
    """Find out what the answer looks like, where there is all that this takes."""
    if {"inputs", "options", "recipe"} <= given.keys():
        given["options"] = keep_bfloat16(given["options"], given["inputs"])
        given["promise"] = find_promise(given["recipe"], given["inputs"], given["options"])
        check_fill(given["options"], given["promise"])


def _lay_out(given: dict[str, Any], *, balanced: bool, into: Into | None) -> Work:
    inputs: Inputs = given["inputs"]
    wanted: Promise = given["promise"]
    placement: Placement = given["placement"]
    recipe: Recipe = given["recipe"]
    weights: tuple[float, ...] = given["weights"]
    automatic = within(inputs.unit_rows or 1, auto_batch_size(inputs.n_rows, inputs.row_nbytes, weights))
    begun = into.begun if into is not None else None
    if begun is not None and given["batch_size"] not in (None, begun.batch_size):
        begun = None  # which is refused when the output is opened
    batch_size = given["batch_size"] or (begun.batch_size if begun else automatic)
    # After the micro-batch, which must not change from call to call.
    weights = (_measured(given) if balanced else None) or weights
    chunk_nbytes = fit_chunk_nbytes(placement.limits, recipe.nbytes)
    # Into a store a dask array is cut anew: two chunks in one write-unit would be written over each other.
    if inputs.row_chunks is not None and into is None:
        layout = follow(inputs.row_chunks, weights, batch_size=batch_size)
    else:
        layout = _cut(inputs, wanted, weights, batch_size, chunk_nbytes, into and replace(into, begun=begun))
    job = Job(inputs.ports, batch_size, given["options"], wanted.outputs)
    if begun is not None:
        job = replace(job, by_kind=dict(begun.by_kind), channels_last=begun.channels_last)
    work = Work(
        given["model"].name,
        inputs,
        recipe,
        wanted,
        job,
        placement,
        weights,
        balanced,
        # Shards do not know of one another's measurements, and a run that goes on computes the same bytes.
        given["batch_size"] is None and begun is None and (into is None or into.shard is None),
        layout,
    )
    if sentences := work.refusals():
        raise PlanError(sentences)
    return work


def _cut(
    inputs: Inputs, wanted: Promise, weights: Sequence[float], batch_size: int, chunk_nbytes: int, into: Into | None
) -> Layout:
    """Cut the rows at cells that cut neither what is read in one go nor, into a store, what is written so."""
    row_nbytes = inputs.row_nbytes + wanted.row_nbytes
    limits = {"row_nbytes": row_nbytes, "chunk_nbytes": chunk_nbytes}
    cell_rows = read_grid(batch_size, inputs.unit_rows or 1, inputs.n_rows, **limits)
    n_rows, n_shards = inputs.n_rows, into.shard[1] if into is not None and into.shard else 1
    if into is not None:
        cell_rows = _write_unit(n_rows // n_shards, cell_rows, wanted, weights, chunk_nbytes // max(1, row_nbytes))
        cell_rows = into.begun.unit_rows if into.begun else cell_rows
    if into is None or into.shard is None:
        return lay_out(n_rows, weights, batch_size=batch_size, cell_rows=cell_rows, **limits)
    # The devices share the rows of this shard, not only those of all: each part is laid out by itself.
    chunks: list[Chunk] = []
    start, stop = shard_rows(n_rows, cell_rows, into.shard)
    for first, last in ((0, start), (start, stop), (stop, n_rows)):
        part = lay_out(last - first, weights, batch_size=batch_size, cell_rows=cell_rows, **limits)
        chunks += [replace(c, index=len(chunks) + c.index, start=first + c.start, stop=first + c.stop) for c in part.chunks]
    return Layout(n_rows, batch_size, cell_rows, tuple(chunks))


def _budget(given: Mapping[str, Any]) -> int:
    """Bytes of the device with the least memory of those that get rows; this machine's where none is known."""
    shares = zip(given["placement"].limits, given["weights"], strict=True) if "weights" in given else ()
    return min((limit for limit, weight in shares if limit and weight), default=0) or machine().memory_nbytes


def _measured(given: dict[str, Any]) -> tuple[float, ...] | None:
    """Each device's speed as its weight, the slowest 1, where all were measured for this network."""
    known = memory.of(key_of(given["recipe"], given["inputs"], given["options"])).speeds
    speeds = tuple(known.get(device.name, 0.0) for device in given["placement"].devices)
    return tuple(speed / min(speeds) for speed in speeds) if all(speeds) else None


def keep_bfloat16(options: Options, inputs: Inputs) -> Options:
    """Cast ports that came as bfloat16 tensors back to it in the worker, unless told otherwise."""
    if not inputs.bfloat16 or options.dtype is not None:
        return options
    return replace(options, dtype=dict.fromkeys(inputs.bfloat16, "bfloat16"))


def find_promise(recipe: Recipe, inputs: Inputs, options: Options) -> Promise:
    """What the answer to these inputs looks like; found out once per network, and again where functions stand around it."""
    if options.output is not None or options.preprocess is not None or options.postprocess is not None:
        return promise(recipe, inputs.ports, inputs.like(), options)
    known = memory.of(key_of(recipe, inputs, options))
    known.promise = found = known.promise or promise(recipe, inputs.ports, inputs.like(), options)
    return cast(Promise, found)


def _write_unit(n_rows: int, grid: int, wanted: Promise, weights: Sequence[float], max_rows: int) -> int:
    """Rows of a store's chunk: whole cells of about ``WRITE_UNIT_NBYTES``, few enough to meet every share.

    ``max_rows`` are those of a task: a unit is computed whole.
    """
    by_size = WRITE_UNIT_NBYTES // max(1, wanted.row_nbytes)
    smallest = min(weight for weight in weights if weight > 0) / sum(weights)
    by_share = int(n_rows * smallest / MIN_WRITE_UNITS)
    return max(1, min(by_size, by_share, max_rows) // grid) * grid


def assemble_run(
    model: Any,
    source: Any,
    target: Path | Mapping[str, Path],
    *,
    fresh: bool = False,
    shard: tuple[int, int] | None = None,
    **arguments: Any,
) -> Work:
    """The work of a run to storage, with what it wants to store, in the order of the network's outputs.

    An output that was begun, unless it is to be made ``fresh``, says the micro-batch and the write-units.

    Raises
    ------
    DaskInferError
        As :func:`assemble`; where an output's path cannot be used, or does not belong to an output.
    """
    refusals = Refusals()
    part, paths = None, dict[str, str]()
    with refusals.collect():
        part = check_shard(shard, fresh=fresh)
    for name, path in target.items() if isinstance(target, Mapping) else [("", target)]:
        with refusals.collect():
            paths[name] = _check_output(path, source, fresh=fresh)
    into = Into.of([] if fresh else list(paths.values()), part)
    work = assemble(model, source, refusals=refusals, into=into, **arguments)
    names = work.promise.structure.names
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
    wanted = Wanted(ordered, _headers(work, part), check_batch_size(arguments["batch_size"]), part, _retries_failed(work))
    if not fresh:
        wanted.refuse_differences()
    return replace(work, wanted=wanted)


def _headers(work: Work, shard: tuple[int, int] | None) -> tuple[Header, ...]:
    """What each output is made of."""
    same: dict[str, Any] = {
        "model": work.recipe.fingerprint(),
        "input": input_mark(work.inputs),
        "options": answer_options(work.job.options),
        "unit_rows": work.layout.cell_rows,
        "batch_size": work.job.batch_size,
        "by_kind": dict(work.job.by_kind),
        "channels_last": work.job.channels_last,
        "shards": shard[1] if shard else 0,
    }
    outputs = zip(work.promise.structure.names, work.promise.outputs, strict=True)
    return tuple(
        Header(output=name, shape=(work.inputs.n_rows, *o.shape[1:]), dtype=o.dtype.str, **same) for name, o in outputs
    )


def _retries_failed(work: Work) -> bool:
    return work.job.options.on_error == "raise"


def _check_output(path: Path, source: Any, *, fresh: bool) -> str:
    for read in _paths(source):
        if os.path.commonpath([os.path.abspath(path), os.path.abspath(read)]) == os.path.abspath(read):
            raise OutputExists(
                f"the output {os.fspath(path)!r} lies inside the input {os.fspath(read)!r}; an input is never written to. "
                "Choose another path."
            )
    path = check_path(path)
    if os.path.lexists(path) and not fresh and read_header(path) is None:
        raise foreign(path)
    return path


def _paths(source: Any) -> list[Path]:
    ports = source.values() if isinstance(source, Mapping) else source if isinstance(source, tuple) else [source]
    return [port for port in ports if isinstance(port, str | os.PathLike)]


def even_chunks(inputs: Inputs, row_out_nbytes: int, batch_size: int) -> tuple[int, ...]:
    """The chunks of a lazy array that nobody has cut yet: whole micro-batches of equal size."""
    layout = lay_out(inputs.n_rows, [1.0], batch_size=batch_size, row_nbytes=inputs.row_nbytes + row_out_nbytes)
    return layout.row_chunks
