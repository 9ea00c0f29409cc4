"""Check daskinfer on a GPU in ten minutes, riskiest parts first: ``python -m tests.gpu.check [--standin] [--folder DIR]``.

Each part runs in a try of its own, and only if the time left allows it; a table of all results comes last. Exit code 1 if a
part failed. With ``--standin``, the parts that fit any device run on the stand-in accelerator with little data, which shows
on any machine that the check itself works.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from daskinfer.core.arrays import Array
from daskinfer.core.chunks import BatchConfig
from daskinfer.core.pytree import Ports
from daskinfer.models.loaded_model import LoadedModel
from daskinfer.options import Options
from daskinfer.worker.model_runner import ModelRunConfig, run_model
from tests.gpu import programs
from tests.gpu.pipeline import WAITS, TransferPipeline

BUDGET_SECONDS = 540.0  # of ten minutes; importing torch and starting CUDA take the rest
CHUNK_NBYTES = 64 << 20  # rows and outputs of a chunk, as daskinfer cuts them


@dataclass(frozen=True)
class Scale:
    """How much data the parts use."""

    nbytes: int  # of one copy
    n_calls: int  # that a latency is averaged over
    n_images: int
    image_side: int
    image_batch: int
    n_vectors: int
    vector_batches: tuple[int, ...]
    n_masks: int
    mask_side: int


GPU_SCALE = Scale(512 << 20, 2000, 4096, 224, 256, 2_000_000, (1024, 65_536), 512, 512)
STANDIN_SCALE = Scale(4 << 20, 20, 64, 32, 16, 2048, (1024,), 16, 64)


@dataclass(frozen=True)
class Context:
    """The device, how much data to use, the stand-in if it is one, and where to write logs."""

    device: torch.device
    scale: Scale
    standin: Any = None
    folder: Path | None = None


@dataclass(frozen=True)
class Result:
    """A row of the table."""

    name: str
    outcome: str
    seconds: float = 0.0
    failed: bool = False


@dataclass(frozen=True)
class Part:
    """A part of the check, the seconds that it may take, and where it can run: "any", "gpu" or "standin"."""

    name: str
    seconds: float
    run: Callable[[Context], Any]
    where: str = "any"


def run_parts(parts: list[Part], context: Context) -> Iterator[Result]:
    """Run the parts one after the other; skip those for which too little time is left."""
    deadline = time.monotonic() + BUDGET_SECONDS
    for part in parts:
        started = time.monotonic()
        if deadline - started < part.seconds / 2:
            yield Result(part.name, "skipped: no time left")
            continue
        try:
            outcome, failed = str(part.run(context)), False
        except Exception as error:  # whatever breaks, the other parts are worth their time
            traceback.print_exc()
            outcome, failed = f"FAILED {type(error).__name__}: {str(error)[:300]}", True
        yield Result(part.name, outcome, round(time.monotonic() - started, 1), failed)


# What the machine is, without CUDA


def check_nvml(context: Context) -> list[str]:
    """Query what daskinfer's start depends on: UUID, MIG mode, driver, and the cores near the GPU by number and by UUID."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    uuid = pynvml.nvmlDeviceGetUUID(handle)
    queries: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        ("MIG mode", pynvml.nvmlDeviceGetMigMode, (handle,)),
        ("driver", pynvml.nvmlSystemGetDriverVersion, ()),
        ("affinity by number", pynvml.nvmlDeviceGetCpuAffinity, (handle, 2)),
        ("affinity by UUID", lambda *_: pynvml.nvmlDeviceGetCpuAffinity(pynvml.nvmlDeviceGetHandleByUUID(uuid), 2), ()),
    ]
    found = [uuid]
    for name, function, arguments in queries:
        try:
            found.append(f"{name} {function(*arguments)}")
        except pynvml.NVMLError as error:
            found.append(f"{name}: {error}")
    return found


def check_limits(context: Context) -> str:
    """Read the limits of locked memory, of reading another process's memory, and of cores."""
    ptrace = Path("/proc/sys/kernel/yama/ptrace_scope")
    scope = ptrace.read_text().strip() if ptrace.exists() else "none"
    return (
        f"memlock {resource.getrlimit(resource.RLIMIT_MEMLOCK)}, ptrace_scope {scope}, cores {len(os.sched_getaffinity(0))}"
    )


# daskinfer as it is, in processes of its own


def run_program(code: str, timeout: float, **environment: str) -> str:
    """Run Python code in a new process; return what it prints after "RESULT"."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )
    results = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not results or done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-600:]}")
    return "; ".join(results)


def check_predict(context: Context) -> str:
    """Predict twice on the GPU; CUDA must not be initialised in the client."""
    return run_program(programs.PREDICT, 85)


def check_gpu_tests(context: Context) -> list[str]:
    """Run ``tests/gpu``."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "-W", "default"], capture_output=True, text=True, timeout=145)
    if context.folder is not None:
        (context.folder / "gpu_tests.log").write_text(done.stdout + done.stderr)
    tail = done.stdout.strip().splitlines()[-3:]
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {tail}")
    return tail


def check_sanitizer(context: Context) -> str:
    """Run the pipeline under torch's sanitizer, which reports accesses that do not wait for each other."""
    return run_program(programs.PIPELINE, 60, TORCH_CUDA_SANITIZER="1")


def check_bad_index(context: Context) -> str:
    """Count the rows that one bad index costs: it is a device-side assert, which breaks the process."""
    return run_program(programs.BAD_INDEX, 58)


def check_second_call(context: Context) -> str:
    """Make a second call while the worker's allocator still holds most of the GPU's memory."""
    return run_program(programs.SECOND_CALL, 58)


# The figures that the design of a data path rests on


def measure_seconds(function: Callable[[], Any], n_times: int = 3) -> float:
    """Measure the least seconds that a function and its work on the device take, after a run that does not count."""
    times = []
    for _ in range(n_times + 1):
        started = time.perf_counter()
        function()
        torch.accelerator.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def make_bytes(context: Context, **options: Any) -> torch.Tensor:
    """Make the bytes that one copy moves."""
    return torch.zeros(context.scale.nbytes, dtype=torch.uint8, **options)


def check_copy_rates(context: Context) -> dict[str, float]:
    """Measure copies in GB/s, each way, by the kind of host memory."""
    pageable, pinned = make_bytes(context), make_bytes(context, pin_memory=True)
    device = make_bytes(context, device=context.device)
    copies: dict[str, Callable[[], Any]] = {
        "to device, pageable": lambda: device.copy_(pageable),
        "to device, pinned": lambda: device.copy_(pinned, non_blocking=True),
        "to host, pageable": lambda: pageable.copy_(device),
        "to host, pinned": lambda: pinned.copy_(device, non_blocking=True),
        "to host, new memory": device.cpu,
    }
    return {name: round(context.scale.nbytes / measure_seconds(copy) / 1e9, 1) for name, copy in copies.items()}


def check_overlap(context: Context) -> dict[str, Any]:
    """Measure copies of both ways at a time, in GB/s; on CUDA also the pinning of shared memory that exists, in seconds."""
    sources = make_bytes(context, pin_memory=True), make_bytes(context, device=context.device)
    targets = make_bytes(context, device=context.device), make_bytes(context, pin_memory=True)
    streams = torch.Stream(context.device), torch.Stream(context.device)

    def copy_both_ways() -> None:
        for stream, source, target in zip(streams, sources, targets, strict=True):
            with stream:
                target.copy_(source, non_blocking=True)

    found: dict[str, Any] = {"GB/s": round(2 * context.scale.nbytes / measure_seconds(copy_both_ways) / 1e9, 1)}
    return found | (register_shared_memory() if context.device.type == "cuda" else {})


def register_shared_memory(nbytes: int = 64 << 20) -> dict[str, Any]:
    """Pin shared memory in place."""
    descriptor = os.memfd_create("check")
    os.ftruncate(descriptor, nbytes)
    array = np.frombuffer(mmap.mmap(descriptor, nbytes), np.uint8)
    array[:] = 0
    started = time.perf_counter()
    code = int(torch.cuda.cudart().cudaHostRegister(array.ctypes.data, nbytes, 0))
    seconds = round(time.perf_counter() - started, 4)
    return {"cudaHostRegister": code, "seconds": seconds, "is pinned": torch.from_numpy(array).is_pinned()}


def check_latencies(context: Context) -> dict[str, float]:
    """Measure the microseconds of small operations."""
    rows, values = torch.zeros(1024, 64, device=context.device), torch.zeros(1024, device=context.device)
    layer = torch.nn.Linear(64, 64).to(context.device)
    event, stream = torch.Event(context.device), torch.Stream(context.device)

    def record_and_wait() -> None:
        event.record()
        stream.wait_event(event)

    operations: dict[str, Callable[[], Any]] = {
        "add_": lambda: rows.add_(1),
        "linear 64->64, 1024 rows": lambda: layer(rows),
        "synchronize": torch.accelerator.synchronize,
        "record and wait": record_and_wait,
        "4 KiB to host": values.cpu,
    }
    n = context.scale.n_calls
    with torch.inference_mode():
        return {name: round(measure_seconds(partial(repeat, f, n)) / n * 1e6, 1) for name, f in operations.items()}


def repeat(function: Callable[[], Any], n: int) -> None:
    """Call a function ``n`` times."""
    for _ in range(n):
        function()


# The model runner, the pipeline, and the model alone


@dataclass(frozen=True)
class Workload:
    """A model with its rows: how it is batched, what it takes, and how its input is laid out."""

    model: torch.nn.Module
    rows: Array
    batch_size: int
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format


def make_image_workload(scale: Scale) -> Workload:
    """Make a ResNet-50 in half precision on stored images of bytes; a small CNN if torchvision is not installed."""
    try:
        import torchvision

        model = torchvision.models.resnet50(weights=None)
    except ImportError:
        convolution = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 7, 4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1))
        model = torch.nn.Sequential(convolution, torch.nn.Flatten(), torch.nn.Linear(64, 1000))
    shape = (scale.n_images, 3, scale.image_side, scale.image_side)
    rows = np.random.default_rng(0).integers(0, 255, shape).astype("uint8")
    return Workload(model.eval().half(), rows, scale.image_batch, torch.float16, torch.channels_last)


def make_vector_workload(scale: Scale, *, batch_size: int) -> Workload:
    """Make a small MLP, whose rows cost more to move than to compute."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)).eval()
    rows = np.random.default_rng(0).standard_normal((scale.n_vectors, 256), dtype="float32")
    return Workload(model, rows, batch_size)


def make_mask_workload(scale: Scale) -> Workload:
    """Make a convolution whose outputs are 7 times as large as its rows."""
    shape = (scale.n_masks, 3, scale.mask_side, scale.mask_side)
    rows = np.random.default_rng(0).standard_normal(shape, dtype="float32")
    return Workload(torch.nn.Conv2d(3, 21, 3, padding=1).eval(), rows, 8)


def check_workload(context: Context, *, make: Callable[[Scale], Workload]) -> str:
    """Measure the rows/s of the model runner, the pipeline and the model alone; compare the outputs of the first two."""
    torch.backends.cudnn.benchmark = True
    workload = make(context.scale)
    model, rows = workload.model.to(context.device).requires_grad_(False), workload.rows
    with torch.inference_mode():
        template = model(torch.from_numpy(rows[:2]).to(context.device, workload.dtype)).cpu().numpy()[:1]
    n_batches = max(1, CHUNK_NBYTES // (rows[0].nbytes + template.nbytes) // workload.batch_size)  # of a chunk
    chunk_rows = n_batches * workload.batch_size
    by_runner, by_pipeline = (np.empty((len(rows), *template.shape[1:]), template.dtype) for _ in range(2))
    run_runner = make_runner(context, workload, model, template, chunk_rows, by_runner)
    pipeline = TransferPipeline(
        model,
        context.device,
        workload.batch_size,
        chunk_rows,
        rows[:1],
        template,
        dtype=workload.dtype,
        memory_format=workload.memory_format,
    )
    batch = torch.zeros((workload.batch_size, *rows.shape[1:]), dtype=workload.dtype, device=context.device)
    batch = batch.to(memory_format=workload.memory_format)
    rates = {
        "model runner": len(rows) / measure_seconds(run_runner, 1),
        "pipeline": len(rows) / measure_seconds(lambda: pipeline.run(rows, by_pipeline, chunk_rows), 1),
        "model alone": len(rows) / measure_seconds(lambda: run_batches(model, batch, len(rows)), 1),
    }
    difference = np.abs(by_runner.astype("float32") - by_pipeline.astype("float32")).max()
    if not difference < 1e-2 * max(1.0, float(np.abs(by_runner).max())):
        raise RuntimeError(f"the outputs of the model runner and the pipeline differ by {difference}")
    return f"rows/s: {', '.join(f'{name} {rate:,.0f}' for name, rate in rates.items())}; differ by {difference:.2g}"


def make_runner(
    context: Context, workload: Workload, model: torch.nn.Module, template: Array, chunk_rows: int, result: Array
) -> Callable[[], None]:
    """Return a function that computes all rows as a worker does, chunk by chunk."""
    loaded, ports = LoadedModel.from_model(model, context.device), Ports.from_input(workload.rows)
    options = Options(
        dtype=str(workload.dtype).removeprefix("torch."),
        memory_format="channels_last" if workload.memory_format == torch.channels_last else "auto",
    )
    run_config = ModelRunConfig(ports, BatchConfig(workload.batch_size), options, (template[:0],))

    def run() -> None:
        for begin in range(0, len(workload.rows), chunk_rows):
            rows = slice(begin, begin + chunk_rows)
            run_model(loaded, [workload.rows[rows]], begin, run_config, [result[rows]])

    return run


def run_batches(model: torch.nn.Module, batch: torch.Tensor, n_rows: int) -> None:
    """Run the model on a batch that is on the device already, as often as ``n_rows`` rows take."""
    with torch.inference_mode():
        for _ in range(0, n_rows, len(batch)):
            model(batch)


def check_channels_last(context: Context) -> str:
    """Compare a deep model in both memory formats; above 0.001 daskinfer does not use channels_last."""
    import torchvision

    model, images = torchvision.models.resnet50(weights=None).eval().to(context.device), torch.randn(32, 3, 224, 224)
    images = images.to(context.device)
    with torch.inference_mode():
        plain, last = model(images), model(images.contiguous(memory_format=torch.channels_last))
    return f"differ by {float((plain - last).abs().max() / plain.abs().max()):.2g} of the largest output"


def check_waits(context: Context) -> str:
    """Leave out each wait of the pipeline on the stand-in, which must notice; with all of them it must not complain."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(1568, 10))
    model.eval().requires_grad_(False)
    rows = np.random.default_rng(0).integers(0, 255, (1000, 3, 16, 16)).astype("uint8")
    expected = model(torch.from_numpy(rows).float()).numpy()
    model.to(context.device)

    def is_wrong(*omitted: str) -> bool:
        pipeline = TransferPipeline(
            model, context.device, 32, 160, rows[:1], expected[:1], dtype=torch.float32, omitted_waits=omitted
        )
        context.standin.read_log()
        result = np.zeros_like(expected)
        pipeline.run(rows, result, 160)
        return bool(context.standin.read_violations()) or not np.allclose(result, expected, rtol=1e-3, atol=1e-2)

    if is_wrong():
        raise RuntimeError("the pipeline is wrong with all of its waits")
    if blocking := [line for line in context.standin.read_log() if "blocking" in line]:
        raise RuntimeError(f"the pipeline copies while the host waits: {blocking[0]}")
    if unnoticed := [name for name in WAITS if not is_wrong(name)]:
        raise RuntimeError(f"left out and not noticed: {unnoticed}")
    context.standin.read_log()
    return f"clean; each of {', '.join(WAITS)} is noticed if left out"


def list_parts(scale: Scale) -> list[Part]:
    """List the parts, riskiest first."""
    vectors = {size: partial(make_vector_workload, batch_size=size) for size in scale.vector_batches}
    return [
        Part("NVML: UUID, MIG, driver, affinity", 10, check_nvml, "gpu"),
        Part("limits of the process", 5, check_limits),
        Part("predict on the GPU, CUDA in the client", 90, check_predict, "gpu"),
        Part("tests/gpu", 150, check_gpu_tests, "gpu"),
        Part("copies, GB/s", 20, check_copy_rates),
        Part("copies of both ways at a time", 20, check_overlap),
        Part("latencies, microseconds", 20, check_latencies),
        Part("ResNet-50 on images", 45, partial(check_workload, make=make_image_workload)),
        *(Part(f"MLP, batch size {n:,}", 45, partial(check_workload, make=make)) for n, make in vectors.items()),
        Part("convolution with large outputs", 45, partial(check_workload, make=make_mask_workload)),
        Part("waits of the pipeline", 20, check_waits, "standin"),
        Part("pipeline under torch's sanitizer", 40, check_sanitizer, "gpu"),
        Part("one bad index", 60, check_bad_index, "gpu"),
        Part("channels_last of a deep model", 20, check_channels_last, "gpu"),
        Part("a second call when memory is taken", 60, check_second_call, "gpu"),
    ]


def make_context(standin: bool, folder: Path | None) -> Context:
    """Find the GPU, or build and load the stand-in."""
    if standin:
        from tests.support import accelerator

        os.environ.setdefault("STANDIN_MEMORY", str(2 << 30))
        torch.set_num_threads(1)  # its kernels run on the CPU, on small tensors
        with tempfile.TemporaryDirectory() as directory:
            loaded = accelerator.load(accelerator.build(Path(directory)))
        return Context(torch.device(accelerator.DEVICE_TYPE, 0), STANDIN_SCALE, loaded, folder)
    return Context(torch.device("cuda", 0), GPU_SCALE, folder=folder)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--standin", is_flag=True, help="Run the device-neutral parts on the stand-in accelerator, with little data.")
@click.option(
    "--folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Write the table and logs here."
)
def main(standin: bool, folder: Path | None) -> None:
    """Check daskinfer on a GPU in ten minutes, riskiest parts first."""
    if not standin and not torch.version.cuda:
        raise click.UsageError("this torch is a CPU-only build; use --standin to check the check itself")
    context = make_context(standin, folder)
    where = ("any", "standin") if standin else ("any", "gpu")
    results = []
    for result in run_parts([part for part in list_parts(context.scale) if part.where in where], context):
        click.echo(f"{result.name}: {result.outcome}")
        results.append(result)
    click.echo("\n" + "\n".join(f"{result.seconds:6.1f} s  {result.name:40} {result.outcome}" for result in results))
    if folder is not None:
        (folder / "table.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
    sys.exit(any(result.failed for result in results))


if __name__ == "__main__":
    main()
