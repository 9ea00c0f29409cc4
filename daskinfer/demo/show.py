"""``daskinfer demo``: a trained model applied to many images on every device, beside a plain torch loop."""

from __future__ import annotations

import importlib
import os
import shutil
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zarr

from daskinfer import Model, RunReport, __version__, run
from daskinfer.core.arrays import Array
from daskinfer.demo import digits
from daskinfer.demo.contact_sheet import N_COLUMNS, N_ROWS, draw_contact_sheet
from daskinfer.demo.net import WEIGHTS
from daskinfer.errors import DaskInferError, OptionError
from daskinfer.hardware.device_spec import check_drivable, parse_devices
from daskinfer.hardware.discovery import Machine, inspect_machine

SEED = 2026
ROWS_PER_DEVICE = 200_000  # of each GPU, or of all CPUs together: a second of work, so that every device gets some
LOOP_BATCH_SIZE = 1_000  # of the plain loop; a whole fraction of a chunk
TOLERANCE = 1e-4  # of logits of about 10; the last bits depend on the batch's shape and the number of threads
MAX_WIDTH = 100  # columns: longer lines are hard to read
SLOW_STARTUP_SECONDS = 0.5  # of workers, from which on it is mentioned; arbitrary
_TEXT_WIDTH = 54  # columns beside a bar
_IMAGES, _SCORES, _REPORT, _SHEET, _MARKER = "images.zarr", "scores.zarr", "report.html", "digits.png", ".daskinfer-demo"
_NEXT_STEPS = (
    "next:  apply your own model to your own array:    y = daskinfer.predict(net, x)",
    "       one that is larger than memory:            daskinfer run --help",
    "       what works on this machine, and why not:   daskinfer doctor",
)


@dataclass(frozen=True)
class _Race:
    """The plain loop and daskinfer on the same images: whole calls, in seconds, and both outputs, (n, 10) float32."""

    loop_seconds: float
    run_seconds: float
    expected: Array
    output: Array
    report: RunReport


def run_demo(
    folder: Path, n_rows: int | None, devices: str, width: int = 80, wait_with: Callable[[str], None] = lambda _: None
) -> Iterator[str]:
    """Make the images, classify them with a plain loop and with daskinfer, and report line by line.

    Parameters
    ----------
    folder
        Where images, scores, the report and the contact sheet are written; those of an earlier demo are replaced.
    n_rows
        How many images; None: enough for every device to work on some.
    devices
        As for ``predict``.
    width
        Columns of the terminal, of which at most 100 are used.
    wait_with
        Is told what takes time now; "" when the next line comes.

    Raises
    ------
    OptionError
        If the folder holds files, and no demo wrote them.
    """
    machine = inspect_machine()
    devices, note = choose_devices(devices, machine)
    n_rows = n_rows or count_rows(devices, machine)
    _prepare_folder(folder)
    width = min(MAX_WIDTH, width)
    title = f"daskinfer {__version__} demo: {n_rows:,} images of handwritten digits (8x8 pixels, in Zarr)"
    yield from textwrap.wrap(f"{title}, classified by a small CNN that never saw them", width)
    yield from textwrap.wrap(f"this machine: {_describe_machine(machine)}{note}", width)
    yield ""
    labels = digits.write(folder / _IMAGES, n_rows, SEED)
    race = _race(folder, devices, wait_with)
    wait_with("")
    yield from _format_speeds(race, n_rows, machine.n_cores, width)
    yield ""
    read = np.argmax(race.output, axis=1)  # (n,)
    wait_with("drawing")
    race.report.to_html(folder / _REPORT)
    n_shown = N_COLUMNS * N_ROWS
    images = np.asarray(zarr.open_array(folder / _IMAGES, mode="r")[:n_shown])
    draw_contact_sheet(folder / _SHEET, images, read[:n_shown], labels[:n_shown])
    wait_with("")
    yield from textwrap.wrap(f"{_compare_outputs(race)}; {np.mean(read == labels):.1%} of the digits are right", width)
    yield from textwrap.wrap(f"files in {_shorten_path(folder)}: {_SCORES}, {_REPORT}, {_SHEET}", width)
    yield ""
    yield from _NEXT_STEPS


def choose_devices(devices: str, machine: Machine) -> tuple[str, str]:
    """Choose this process, and say why, if ``devices`` is "auto" and the GPUs cannot be used as daskinfer is installed.

    Returns
    -------
    devices, note
        The note says what to install; it is empty if ``devices`` is returned as it is.
    """
    if devices != "auto" or not machine.gpus:
        return devices, ""
    try:
        check_drivable(machine.gpus, torch.version.cuda, machine)
        importlib.import_module("daskinfer.cluster.cuda")  # needs an extra
    except DaskInferError as error:
        return "inline", f", not used: {error}"
    return devices, ""


def count_rows(devices: str, machine: Machine) -> int:
    """Return how many images give each device enough to do."""
    return ROWS_PER_DEVICE * max(1, sum(device.kind == "cuda" for device in parse_devices(devices, machine)))


def _prepare_folder(folder: Path) -> None:
    """Create the folder; refuse one with files, unless a demo wrote them: then remove these."""
    marker = folder / _MARKER
    if folder.is_dir() and any(folder.iterdir()) and not marker.exists():
        raise OptionError(f"--folder {os.fspath(folder)!r} holds files that no demo wrote; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    for name in (_IMAGES, _SCORES, f"{_SCORES}.partial", f"{_SCORES}.daskinfer"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _race(folder: Path, devices: str, wait_with: Callable[[str], None]) -> _Race:
    wait_with("the plain torch loop runs")
    began = time.perf_counter()
    expected = run_plain_loop(folder / _IMAGES)
    loop_seconds = time.perf_counter() - began
    wait_with("daskinfer runs")
    model = Model(os.fspath(WEIGHTS), factory="daskinfer.demo.net:make_model")
    began = time.perf_counter()
    report = run(model, folder / _IMAGES, folder / _SCORES, devices=devices, progress=False)
    run_seconds = time.perf_counter() - began
    output = np.asarray(zarr.open_array(folder / _SCORES, mode="r")[:])
    return _Race(loop_seconds, run_seconds, expected, output, report)


def run_plain_loop(images: Path) -> Array:
    """Return what a plain loop over batches of the images gives, without daskinfer, (n, 10) float32.

    It reads each chunk of the store once, and its batches are as large as suits the model.
    """
    model = Model(os.fspath(WEIGHTS), factory="daskinfer.demo.net:make_model").make_loader().load(torch.device("cpu")).run
    rows = zarr.open_array(images, mode="r")
    outputs = []
    with torch.inference_mode():
        for start in range(0, rows.shape[0], digits.CHUNK_ROWS):
            chunk = torch.from_numpy(rows[start : start + digits.CHUNK_ROWS])
            outputs += [model(batch) for batch in torch.split(chunk, LOOP_BATCH_SIZE)]
    return np.asarray(torch.cat(outputs).numpy())


def _describe_machine(machine: Machine) -> str:
    gpus = Counter(gpu.label or gpu.name for gpu in machine.gpus)
    parts = [f"{n} x {label}" if n > 1 else label for label, n in gpus.items()] or ["no GPU"]
    cores = f"{machine.n_cores} CPU core{'s' if machine.n_cores > 1 else ''}"
    return ", ".join([f"{cores} ({machine.cpu_label})" if machine.cpu_label else cores, *parts])


def _format_speeds(race: _Race, n_rows: int, n_cores: int, width: int) -> Iterator[str]:
    slowest = max(race.loop_seconds, race.run_seconds)
    for name, seconds in (("plain torch loop", race.loop_seconds), ("daskinfer", race.run_seconds)):
        bar = "█" * max(1, round((width - _TEXT_WIDTH) * seconds / slowest))
        factor = f"{race.loop_seconds / seconds:4.1f}x" if name == "daskinfer" else ""
        line = f"{name:<16}  {bar:<{width - _TEXT_WIDTH}} {seconds:6.2f} s {n_rows / seconds:10,.0f} images/s {factor}"
        yield line.rstrip()
    for device in race.report.devices:
        if device.n_rows:
            name = f"this process (all {n_cores} cores)" if device.device == "inline" else device.device
            yield f"  {name:<26} {device.n_rows / n_rows:6.1%} {device.n_rows:12,} images"
    if race.report.start_seconds >= SLOW_STARTUP_SECONDS:
        text = (
            f"  {race.report.start_seconds:.1f} of the {race.run_seconds:.1f} s started workers; Python sessions keep them"
        )
        yield from textwrap.wrap(text, width, drop_whitespace=False)


def _compare_outputs(race: _Race) -> str:
    difference = float(np.abs(race.output - race.expected).max())
    verdict = "same output as" if difference <= TOLERANCE else "the output DIFFERS FROM that of"
    return f"{verdict} the loop, in the same order (largest difference {difference:.1g})"


def _shorten_path(folder: Path) -> str:
    """Return the path as people type it: relative if it is below the working directory."""
    path = folder.absolute()
    return f"./{path.relative_to(Path.cwd())}" if path.is_relative_to(Path.cwd()) else os.fspath(path)
