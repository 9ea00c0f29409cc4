"""Parse device specs such as ``"cuda,cpu*2"``, and check that torch can use the devices.

The functions map text and a :class:`Machine` record to devices. Only :func:`find_local_devices` inspects this machine, so a
plan can be made and tested for another one.

Every name that a table or a report shows is also a spec, so what was listed can be typed: ``"cuda:1"``, a UUID, and
``"cpu:0"``. GPUs have numbers of their own. CPU workers are numbered in the order requested, so ``"cpu:0,cpu:1"`` is
``"cpu*2"``, and any other number is refused: the worker would get another name than was typed.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from reprlib import repr as short_repr
from typing import TYPE_CHECKING, Any

from daskinfer.core.formatting import format_html_table, format_nbytes, format_text_table
from daskinfer.core.installation import describe_cuda_install
from daskinfer.errors import DeviceError
from daskinfer.hardware.discovery import Device, Machine, inspect_machine

if TYPE_CHECKING:
    import torch

MAX_CPU_WORKERS = 1024  # arbitrary: catches "cpu*40000"; no machine gains from more processes than this

_MIN_DRIVER = {11: "450", 12: "525", 13: "580"}  # by CUDA's major version; from its release notes
_CPU_HINT = 'devices="cpu" (--devices cpu)'
_ALLOWED_SPECS = (
    '"auto", "cuda" (every GPU), "cuda:1", "GPU-<uuid>", "MIG-<uuid>", "cpu", "cpu:0", '
    f'"cpu*4" (1 to {MAX_CPU_WORKERS}), several of these, or "inline" alone'
)


class DeviceTable(tuple[Device, ...]):
    """A tuple of devices that displays as a table.

    Examples
    --------
    >>> print(DeviceTable([Device("cpu:0", "cpu", 0, label="EPYC", memory_nbytes=8 << 30)]))
    device  name   memory  free  uuid
    cpu:0   EPYC  8.0 GiB
    """

    __slots__ = ()

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the fields of each device as a dict that JSON can encode."""
        return [asdict(device) for device in self]

    def _format_rows(self) -> list[list[str]]:
        return [
            [d.name, d.label, _format_known_nbytes(d.memory_nbytes), _format_known_nbytes(d.free_nbytes), d.uuid]
            for d in self
        ]

    def __str__(self) -> str:
        return format_text_table(_TABLE_HEADERS, self._format_rows())

    __repr__ = __str__  # shown at the interpreter's prompt and in notebooks without HTML

    def _repr_html_(self) -> str:
        return format_html_table(_TABLE_HEADERS, self._format_rows())


_TABLE_HEADERS = ("device", "name", "memory", "free", "uuid")


def _format_known_nbytes(nbytes: int) -> str:
    return format_nbytes(nbytes) if nbytes else ""


def find_local_devices() -> DeviceTable:
    """List this machine's devices: its GPUs as NVML sees them, and one CPU worker labelled with the number of cores.

    Examples
    --------
    >>> find_local_devices()[-1].name
    'cpu:0'
    """
    machine = inspect_machine()
    (cpu,) = parse_devices("cpu", machine)
    cores = "1 core" if machine.n_cores == 1 else f"{machine.n_cores} cores"
    return DeviceTable((*machine.gpus, replace(cpu, label=f"{cpu.label}, {cores}")))


def parse_devices(spec: str | torch.device | Sequence[str | torch.device], machine: Machine) -> tuple[Device, ...]:
    """Parse a device spec into devices, in the order requested.

    Parameters
    ----------
    spec
        ``"auto"`` (every GPU; without GPUs, a CPU worker per core), ``"cuda"`` (every GPU), ``"cuda:1"``,
        ``"GPU-<uuid>"``, ``"MIG-<uuid>"``, ``"cpu"``, ``"cpu*4"``, ``"cpu:0"`` (the first CPU worker), several of these
        joined by commas or in a list, or ``"inline"`` alone. ``"gpu"`` means ``"cuda"``; letter case and spaces do not
        matter. A ``torch.device`` stands for its text: ``torch.device("cuda")`` is every GPU.
    machine
        The machine whose devices can be chosen.

    Returns
    -------
    tuple of Device
        At least one device; CPU workers are numbered consecutively from ``cpu:0``.

    Raises
    ------
    DeviceError
        If a device is unknown, missing or requested twice, if a CPU worker's number is not the next one, or if the spec is
        empty or not text.

    Examples
    --------
    >>> [device.name for device in parse_devices("cpu:0, CPU*2", Machine(n_cores=8))]
    ['cpu:0', 'cpu:1', 'cpu:2']
    """
    entries = _split_spec(spec)
    if "inline" in map(str.lower, entries):
        return _parse_inline(entries)
    requested = [(entry, device) for entry in entries for device in _parse_entry(entry, machine)]
    _check_duplicate_gpus(requested)
    return tuple(_number_cpu_devices(requested))


def check_drivable(devices: Sequence[Device], torch_cuda: str | None, machine: Machine) -> None:
    """Raise if this torch cannot use the requested GPUs; daskinfer never falls back to CPUs silently.

    Parameters
    ----------
    devices
        The requested devices; without a GPU among them there is nothing to check.
    torch_cuda
        ``torch.version.cuda``; None for a CPU-only build of torch.
    machine
        The machine with the driver; a driver of unknown CUDA version passes.

    Raises
    ------
    DeviceError
        If torch was built without CUDA, or for a newer CUDA than the driver supports.

    Examples
    --------
    >>> check_drivable([Device("cpu:0", "cpu", 0)], None, Machine())
    """
    gpus = ", ".join(f"{d.name} ({d.label})" for d in devices if d.kind == "cuda")
    if not gpus:
        return
    if torch_cuda is None:
        raise DeviceError(_format_cpu_build_error(gpus, machine))
    major = int(torch_cuda.split(".")[0])
    if machine.driver_cuda and machine.driver_cuda[0] < major:
        raise DeviceError(_format_old_driver_error(gpus, torch_cuda, machine.driver, machine.driver_cuda))


def _format_cpu_build_error(gpus: str, machine: Machine) -> str:
    major = 12 if machine.driver_cuda and machine.driver_cuda[0] == 12 else 13
    return (
        f"cannot use {gpus}: this torch is a CPU-only build. Install its CUDA {major} build "
        f"(https://pytorch.org/get-started/locally) and {describe_cuda_install(major)}, or use {_CPU_HINT}."
    )


def _format_old_driver_error(gpus: str, torch_cuda: str, driver: str, driver_cuda: tuple[int, int]) -> str:
    major = int(torch_cuda.split(".")[0])
    supported = ".".join(map(str, driver_cuda))
    needs = f"driver {_MIN_DRIVER[major]} or newer" if major in _MIN_DRIVER else "a newer driver"
    return (
        f"cannot use {gpus}: driver {driver} supports CUDA {supported}, but this torch is built for CUDA {torch_cuda} "
        f"and needs {needs}. Update the driver, install a torch built for CUDA {driver_cuda[0]}, or use {_CPU_HINT}."
    )


def explain_number(number: int) -> str:
    """Return how to write what a number alone may have meant: one GPU, or so many devices.

    Examples
    --------
    >>> explain_number(2)
    "'cuda:2' is one GPU, 'cuda:0,cuda:1' or 'cpu*2' are two devices"
    """
    if number < 2:
        return f"'cuda:{number}' is one GPU, 'cpu' is one CPU worker"
    gpus = f"{','.join(f'cuda:{i}' for i in range(number))!r} or " if number <= _MAX_SPELLED_GPUS else ""
    return f"'cuda:{number}' is one GPU, {gpus}'cpu*{number}' are {_NUMBER_WORDS.get(number, number)} devices"


_MAX_SPELLED_GPUS = 8  # named one by one; arbitrary
_NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}


def _split_spec(spec: object) -> list[str]:
    if isinstance(spec, int) and not isinstance(spec, bool) and spec >= 0:
        raise DeviceError(f"devices must name devices, got {spec}: {explain_number(spec)}")
    spec = _convert_torch_device(spec)
    if not isinstance(spec, Sequence) or isinstance(spec, bytes | bytearray):
        raise DeviceError(
            'devices must be a string or a list of strings, such as "cpu*2" or ["cuda:0", "cpu"], '
            f"got {short_repr(spec)} ({type(spec).__name__})"
        )
    items = [spec] if isinstance(spec, str) else [_convert_torch_device(item) for item in spec]
    for position, item in enumerate(items):
        if not isinstance(item, str):
            raise DeviceError(
                f'devices[{position}] must be a string such as "cuda:1" or "cpu*2", '
                f"got {short_repr(item)} ({type(item).__name__})"
            )
    entries = [entry.strip() for item in items for entry in str(item).split(",")]
    if not entries or not all(entries):
        raise DeviceError(
            f'devices={short_repr(spec)} has an empty entry; name a device there, or use devices="auto" (--devices auto). '
            f"Allowed are {_ALLOWED_SPECS}."
        )
    return entries


def _convert_torch_device(item: object) -> object:
    """Return the text of a ``torch.device``, and anything else unchanged; this module does not import torch."""
    kind = type(item)
    return str(item) if (kind.__module__, kind.__qualname__) == ("torch", "device") else item


def _parse_inline(entries: Sequence[str]) -> tuple[Device, ...]:
    if len(entries) > 1:
        raise DeviceError(
            f'"inline" computes in this process and must be the only device, got {len(entries)} devices. '
            'Use devices="inline" (--devices inline), or remove it.'
        )
    return (Device("inline", "inline", 0),)


def _parse_entry(entry: str, machine: Machine) -> Sequence[Device]:
    for pattern, select_devices in _ENTRY_PARSERS:
        if match := re.fullmatch(pattern, entry, re.IGNORECASE):
            return select_devices(match, machine)
    if re.fullmatch(r"[0-9]{1,9}", entry):
        raise DeviceError(f"{entry!r} does not name a device: {explain_number(int(entry))}")
    raise DeviceError(
        f"unknown device {short_repr(entry)}; allowed are {_ALLOWED_SPECS}. This process sees {_list_hardware(machine)}."
    )


def _select_auto(_: re.Match[str], machine: Machine) -> Sequence[Device]:
    return machine.gpus or [_make_cpu_device(machine)] * machine.n_cores


def _select_all_gpus(match: re.Match[str], machine: Machine) -> Sequence[Device]:
    return machine.gpus or _raise_missing_device(match[0], machine)


def _select_gpu_by_index(match: re.Match[str], machine: Machine) -> Sequence[Device]:
    return [g for g in machine.gpus if g.index == int(match["n"])] or _raise_missing_device(match[0], machine)


def _select_gpu_by_uuid(match: re.Match[str], machine: Machine) -> Sequence[Device]:
    uuid = match[0].lower()
    return [g for g in machine.gpus if g.uuid.lower() == uuid] or _raise_missing_device(match[0], machine)


def _make_cpu_workers(match: re.Match[str], machine: Machine) -> Sequence[Device]:
    n_workers = int(match["n"] or 1)
    if not 1 <= n_workers <= MAX_CPU_WORKERS:
        raise DeviceError(
            f"{match[0]!r} requests {n_workers:,} CPU workers; allowed are 1 to {MAX_CPU_WORKERS:,}. "
            f'Use "cpu*{machine.n_cores}" for one worker per core.'
        )
    return [_make_cpu_device(machine)] * n_workers


def _make_numbered_cpu_worker(match: re.Match[str], machine: Machine) -> Sequence[Device]:
    return [_number_cpu_device(_make_cpu_device(machine), int(match["n"]))]


_ENTRY_PARSERS: tuple[tuple[str, Callable[[re.Match[str], Machine], Sequence[Device]]], ...] = (
    (r"auto", _select_auto),
    (r"(cuda|gpu)", _select_all_gpus),
    (r"(cuda|gpu)\s*:\s*(?P<n>[0-9]{1,9})", _select_gpu_by_index),
    (r"(gpu|mig)-.+", _select_gpu_by_uuid),
    (r"cpu(\s*\*\s*(?P<n>[0-9]{1,9}))?", _make_cpu_workers),
    (r"cpu\s*:\s*(?P<n>[0-9]{1,9})", _make_numbered_cpu_worker),
)


def _make_cpu_device(machine: Machine) -> Device:
    return Device("cpu", "cpu", 0, label=machine.cpu_label, memory_nbytes=machine.memory_nbytes)


def _number_cpu_device(device: Device, index: int) -> Device:
    return replace(device, name=f"cpu:{index}", index=index)


def _number_cpu_devices(requested: Sequence[tuple[str, Device]]) -> Iterator[Device]:
    """Number the CPU workers in the order requested, and leave GPUs as they are; refuse a typed number that differs."""
    index = itertools.count()
    for entry, device in requested:
        if device.kind != "cpu":
            yield device
            continue
        numbered = _number_cpu_device(device, next(index))
        if ":" in device.name and device.name != numbered.name:
            raise DeviceError(
                f"{entry!r} is not the next CPU worker, which is {numbered.name}: they are numbered in the order requested. "
                "Use 'cpu' for one worker, 'cpu*2' for two."
            )
        yield numbered


def _check_duplicate_gpus(requested: Sequence[tuple[str, Device]]) -> None:
    counts = Counter(device for _, device in requested if device.kind == "cuda")
    for gpu in (gpu for gpu, n in counts.items() if n > 1):
        entries = " and ".join(repr(entry) for entry, device in requested if device == gpu)
        raise DeviceError(
            f"{gpu.name} ({gpu.label}) is requested {counts[gpu]} times, as {entries}; each GPU has one worker. "
            "Keep one of these entries."
        )


def _raise_missing_device(entry: str, machine: Machine) -> Sequence[Device]:
    is_alias = re.match("gpu(?!-)", entry, re.IGNORECASE)
    alias = f" (same as {'cuda' + entry[3:]!r})" if is_alias else ""
    raise DeviceError(
        f"device {entry!r}{alias} not found; this process sees {_list_hardware(machine)}. {_suggest_fix(machine)}"
    )


def _list_hardware(machine: Machine) -> str:
    gpus = ", ".join(f"cuda:{g.index} = {g.uuid} ({g.label})" for g in machine.gpus) or "no GPU"
    return f"{gpus} and {machine.n_cores} CPU cores"


def _suggest_fix(machine: Machine) -> str:
    """Name the likeliest reason why a GPU is missing and what to do about it; the first match wins."""
    if machine.n_hidden_gpus:
        return f"CUDA_VISIBLE_DEVICES hides {machine.n_hidden_gpus} more: unset it, add them to it, or use {_CPU_HINT}."
    if machine.gpus:
        return f"Request one of those, or use {_CPU_HINT}."
    if not machine.driver:
        return (
            "NVML finds no NVIDIA driver: install it, start the container with its GPUs (docker run --gpus all), "
            f"or use {_CPU_HINT}."
        )
    return f"Driver {machine.driver} finds no GPU: check nvidia-smi, or use {_CPU_HINT}."
