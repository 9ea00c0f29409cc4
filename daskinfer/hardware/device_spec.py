"""The device language: from ``"cuda,cpu*2"`` to devices, and whether this torch can drive them.

Words in, records out: nothing here looks at the machine, so a plan can be made and tested for one that is elsewhere.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from reprlib import repr as short_repr
from typing import Any

from daskinfer.core.formatting import format_html_table, format_nbytes, format_text_table
from daskinfer.errors import DeviceError
from daskinfer.hardware.discovery import Device, Machine, inspect_machine

__all__ = [
    "MAX_CPU_WORKERS",
    "Device",
    "DeviceTable",
    "Machine",
    "check_drivable",
    "find_local_devices",
    "inspect_machine",
    "parse_devices",
]

MAX_CPU_WORKERS = 1024  # arbitrary: catches "cpu*40000", and no machine gains from more processes than this

_MIN_DRIVER = {11: "450", 12: "525", 13: "580"}  # by CUDA's major version, from its release notes
_CPU_HINT = 'devices="cpu" (--devices)'
_ALLOWED_SPECS = (
    '"auto", "cuda" (every GPU), "cuda:1", "GPU-<uuid>", "MIG-<uuid>", "cpu", '
    f'"cpu*4" (1 to {MAX_CPU_WORKERS}), several of these, or "inline" alone'
)


class DeviceTable(tuple[Device, ...]):
    """Devices that show themselves as a table.

    Examples
    --------
    >>> print(DeviceTable([Device("cpu:0", "cpu", 0, label="EPYC", memory_nbytes=8 << 30)]))
    device  name   memory  free  uuid
    cpu:0   EPYC  8.0 GiB
    """

    __slots__ = ()

    def to_dicts(self) -> list[dict[str, Any]]:
        """Every field of every device, ready for JSON."""
        return [asdict(device) for device in self]

    def _format_rows(self) -> list[list[str]]:
        return [
            [d.name, d.label, _format_known_nbytes(d.memory_nbytes), _format_known_nbytes(d.free_nbytes), d.uuid]
            for d in self
        ]

    def __str__(self) -> str:
        return format_text_table(_TABLE_HEADERS, self._format_rows())

    __repr__ = __str__  # what a notebook without HTML and the interpreter's prompt show

    def _repr_html_(self) -> str:
        return format_html_table(_TABLE_HEADERS, self._format_rows())


_TABLE_HEADERS = ("device", "name", "memory", "free", "uuid")


def _format_known_nbytes(nbytes: int) -> str:
    return format_nbytes(nbytes) if nbytes else ""


def find_local_devices() -> DeviceTable:
    """What this machine has: its GPUs as NVML sees them, and one CPU worker, named with the cores there are.

    Examples
    --------
    >>> find_local_devices()[-1].name
    'cpu:0'
    """
    found = inspect_machine()
    (cpu,) = parse_devices("cpu", found)
    cores = "1 core" if found.n_cores == 1 else f"{found.n_cores} cores"
    return DeviceTable((*found.gpus, replace(cpu, label=f"{cpu.label}, {cores}")))


def parse_devices(spec: str | Sequence[str], machine: Machine) -> tuple[Device, ...]:
    """Read the device language: which devices are asked for, in the order asked.

    Parameters
    ----------
    spec
        ``"auto"`` (every GPU; where there is none, a CPU worker per core), ``"cuda"`` (every GPU), ``"cuda:1"``,
        ``"GPU-<uuid>"``, ``"MIG-<uuid>"``, ``"cpu"``, ``"cpu*4"``, several of these joined by commas or in a list, or
        ``"inline"`` alone. ``"gpu"`` means ``"cuda"``; letter case and spaces do not matter.
    machine
        What there is to choose from.

    Returns
    -------
    tuple of Device
        At least one; CPU workers are numbered through, from ``cpu:0``.

    Raises
    ------
    DeviceError
        A device that is unknown, absent or asked for twice, or a spec that is empty or not text.

    Examples
    --------
    >>> [device.name for device in parse_devices("cpu, CPU*2", Machine(n_cores=8))]
    ['cpu:0', 'cpu:1', 'cpu:2']
    """
    entries = _split_spec(spec)
    if "inline" in map(str.lower, entries):
        return _parse_inline(entries)
    asked = [(entry, device) for entry in entries for device in _parse_entry(entry, machine)]
    _check_duplicate_gpus(asked)
    number = itertools.count()
    return tuple(_number_cpu_device(d, next(number)) if d.kind == "cpu" else d for _, d in asked)


def check_drivable(devices: Sequence[Device], torch_cuda: str | None, machine: Machine) -> None:
    """Refuse GPUs that this torch cannot drive, rather than run on CPUs in silence.

    Parameters
    ----------
    devices
        What was asked for; without a GPU among them there is nothing to check.
    torch_cuda
        ``torch.version.cuda``; None where torch was built for CPUs only.
    machine
        Whose driver it is; one that does not tell its CUDA version passes.

    Raises
    ------
    DeviceError
        torch was built without CUDA, or for a newer one than the driver speaks.

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
        f"{gpus}: this torch is built for CPUs only and cannot drive a GPU. Install torch's CUDA {major} build "
        f'(https://pytorch.org/get-started/locally) and pip install "daskinfer[cuda{major}]", '
        f"or pass {_CPU_HINT} to use the CPUs on purpose."
    )


def _format_old_driver_error(gpus: str, torch_cuda: str, driver: str, driver_cuda: tuple[int, int]) -> str:
    major = int(torch_cuda.split(".")[0])
    speaks = ".".join(map(str, driver_cuda))
    needs = f"driver {_MIN_DRIVER[major]} or newer" if major in _MIN_DRIVER else "a newer driver"
    return (
        f"{gpus}: driver {driver} speaks CUDA {speaks}; this torch is built for CUDA {torch_cuda}, which needs "
        f"{needs}. Update the driver, or install a torch built for CUDA {driver_cuda[0]}, "
        f"or pass {_CPU_HINT} to use the CPUs on purpose."
    )


def _split_spec(spec: object) -> list[str]:
    if not isinstance(spec, Sequence) or isinstance(spec, bytes | bytearray):
        raise DeviceError(
            f"devices={short_repr(spec)} is of type {type(spec).__name__}; allowed is a string or a list of strings: "
            f'{_ALLOWED_SPECS}. Write the devices as text, such as devices="cuda,cpu*2".'
        )
    items = [spec] if isinstance(spec, str) else list(spec)
    for place, item in enumerate(items):
        if not isinstance(item, str):
            raise DeviceError(
                f"devices[{place}] is {short_repr(item)}, of type {type(item).__name__}; allowed is text: {_ALLOWED_SPECS}. "
                'Write "cuda:1" for the GPU of number 1, "cpu*2" for 2 CPU workers.'
            )
    entries = [entry.strip() for item in items for entry in item.split(",")]
    if not entries or not all(entries):
        raise DeviceError(
            f"devices={short_repr(spec)} has an empty place; allowed are {_ALLOWED_SPECS}. "
            'Name a device there, or use devices="auto" (--devices).'
        )
    return entries


def _parse_inline(entries: Sequence[str]) -> tuple[Device, ...]:
    if len(entries) > 1:
        raise DeviceError(
            f'"inline" stands among {len(entries)} devices; it runs everything in this process and is allowed only '
            'alone. Use devices="inline" (--devices), or leave it out.'
        )
    return (Device("inline", "inline", 0),)


def _parse_entry(entry: str, machine: Machine) -> Sequence[Device]:
    for pattern, devices_of in _ENTRY_PARSERS:
        if match := re.fullmatch(pattern, entry, re.IGNORECASE):
            return devices_of(match, machine)
    raise DeviceError(
        f"device {short_repr(entry)} is unknown; allowed are {_ALLOWED_SPECS}. {_describe_machine(machine)}. Use one of them."
    )


def _select_auto(_: re.Match[str], machine: Machine) -> Sequence[Device]:
    return machine.gpus or [_make_cpu_device(machine)] * machine.n_cores


def _select_all_gpus(match: re.Match[str], machine: Machine) -> Sequence[Device]:
    return machine.gpus or _raise_missing_device(match[0], machine)


def _select_gpu_by_index(match: re.Match[str], machine: Machine) -> Sequence[Device]:
    return [g for g in machine.gpus if g.index == int(match["n"])] or _raise_missing_device(match[0], machine)


def _select_gpu_by_uuid(match: re.Match[str], machine: Machine) -> Sequence[Device]:
    asked = match[0].lower()
    return [g for g in machine.gpus if g.uuid.lower() == asked] or _raise_missing_device(match[0], machine)


def _make_cpu_workers(match: re.Match[str], machine: Machine) -> Sequence[Device]:
    n_workers = int(match["n"] or 1)
    if not 1 <= n_workers <= MAX_CPU_WORKERS:
        raise DeviceError(
            f"device {match[0]!r} asks for {n_workers:,} CPU workers; 1 to {MAX_CPU_WORKERS:,} are allowed. "
            f'This machine has {machine.n_cores} cores: "cpu*{machine.n_cores}" is one worker per core.'
        )
    return [_make_cpu_device(machine)] * n_workers


_ENTRY_PARSERS: tuple[tuple[str, Callable[[re.Match[str], Machine], Sequence[Device]]], ...] = (
    (r"auto", _select_auto),
    (r"(cuda|gpu)", _select_all_gpus),
    (r"(cuda|gpu)\s*:\s*(?P<n>[0-9]{1,9})", _select_gpu_by_index),
    (r"(gpu|mig)-.+", _select_gpu_by_uuid),
    (r"cpu(\s*\*\s*(?P<n>[0-9]{1,9}))?", _make_cpu_workers),
)


def _make_cpu_device(machine: Machine) -> Device:
    return Device("cpu", "cpu", 0, label=machine.cpu_label, memory_nbytes=machine.memory_nbytes)


def _number_cpu_device(device: Device, index: int) -> Device:
    return replace(device, name=f"cpu:{index}", index=index)


def _check_duplicate_gpus(requested: Sequence[tuple[str, Device]]) -> None:
    times = Counter(device for _, device in requested if device.kind == "cuda")
    for gpu in (gpu for gpu, n in times.items() if n > 1):
        spelled = " and as ".join(repr(entry) for entry, device in requested if device == gpu)
        raise DeviceError(
            f"{gpu.name} ({gpu.label}) is asked for {times[gpu]} times, as {spelled}; a GPU is allowed once, since one "
            "worker drives it. Leave all but one of them out."
        )


def _raise_missing_device(entry: str, machine: Machine) -> Sequence[Device]:
    means = ' (which means "cuda")' if re.match("gpu(?!-)", entry, re.IGNORECASE) else ""
    raise DeviceError(f"device {entry!r}{means} is not there. {_describe_machine(machine)}. {_suggest_fix(machine)}")


def _describe_machine(machine: Machine) -> str:
    gpus = ", ".join(f"cuda:{g.index} = {g.uuid} ({g.label})" for g in machine.gpus) or "no GPU"
    return f"This process sees {gpus} and {machine.n_cores} CPU cores"


def _suggest_fix(machine: Machine) -> str:
    """First match wins: the likeliest reason why a GPU is missing, and what to do."""
    if machine.n_hidden_gpus:
        return f"CUDA_VISIBLE_DEVICES hides {machine.n_hidden_gpus} more: unset it or name them there, or use {_CPU_HINT}."
    if machine.gpus:
        return "Ask for one of these."
    if not machine.driver:
        return (
            "NVML finds no NVIDIA driver: install it, or give the container its GPUs (docker run --gpus all), "
            f"or use {_CPU_HINT}."
        )
    return f"The driver ({machine.driver}) finds no GPU: see what nvidia-smi says, or use {_CPU_HINT}."
