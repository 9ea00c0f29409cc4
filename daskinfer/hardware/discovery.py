"""What one machine has: its GPUs by NVML, its cores and memory by the system.

GPUs are found through NVML, never through CUDA: a process that has touched CUDA can no longer be pinned to a GPU, and
its forked children cannot use one. The answers are plain records; nothing here imports torch or Dask.

GPUs are numbered from 0 in NVML's order (the PCI bus's) within the caller's ``CUDA_VISIBLE_DEVICES``, whatever the
order in that variable: with ``CUDA_VISIBLE_DEVICES=3,1`` the GPU that NVML calls 1 is ``cuda:0``. A plain number in
that variable is read as NVML's too, as dask-cuda does; CUDA itself may count the fastest GPU first unless
``CUDA_DEVICE_ORDER=PCI_BUS_ID``. UUIDs leave no doubt, which is why pinning goes by them. The instances of a GPU in MIG
mode are devices of their own, named by their UUID, and count like GPUs; the number or UUID of a GPU in MIG mode in that
variable stands for all of its instances.
"""

from __future__ import annotations

import html
import logging
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

_ROOT = Path("/")  # where proc and sys are found


@dataclass(frozen=True, slots=True)
class Device:
    """One thing that runs a network: a GPU, a part of one, a CPU worker, or this very process.

    Parameters
    ----------
    name
        ``"cuda:1"``, ``"MIG-<uuid>"``, ``"cpu:0"`` or ``"inline"``.
    kind
        ``"cuda"``, ``"cpu"`` or ``"inline"``.
    index
        A GPU's number in NVML's order within ``CUDA_VISIBLE_DEVICES``; a CPU worker's number; both from 0.
    uuid
        What a GPU's worker is pinned by; empty for the others.
    label
        The hardware's name; empty where it is unknown.
    memory_nbytes
        All of its memory in bytes; CPU workers share the host's. 0 where it is unknown.
    free_nbytes
        Bytes that were free on a GPU when it was found; 0 where that is unknown.

    Examples
    --------
    >>> print(Device("cuda:0", "cuda", 0, uuid="GPU-1f2e", label="NVIDIA L4", memory_nbytes=24 << 30))
    cuda:0: NVIDIA L4, 24.0 GiB, GPU-1f2e
    """

    name: str
    kind: str
    index: int
    uuid: str = ""
    label: str = ""
    memory_nbytes: int = 0
    free_nbytes: int = 0

    def __str__(self) -> str:
        return f"{self.name}: {self._describe()}"

    def _repr_html_(self) -> str:
        return f"<b>{html.escape(self.name)}</b>: {html.escape(self._describe())}"

    def _describe(self) -> str:
        memory = [f"{self.memory_nbytes / 2**30:,.1f} GiB"] if self.memory_nbytes else []
        free = [f"{self.free_nbytes / 2**30:,.1f} GiB free"] if self.free_nbytes else []
        return ", ".join(said for said in (self.label or self.kind, *memory, *free, self.uuid) if said)


@dataclass(frozen=True, slots=True)
class Machine:
    """What one machine has, as the process sees it that asked.

    Parameters
    ----------
    gpus
        GPUs and MIG instances within ``CUDA_VISIBLE_DEVICES``, in NVML's order.
    hidden_gpus
        How many more NVML sees.
    n_cores
        Cores that this process may use: its affinity, or its control group's quota where that is less.
    cpu_label
        The processor's name.
    memory_nbytes
        The host's memory, or the control group's limit where that is less; 0 where it is unknown.
    driver
        Version of NVIDIA's driver; empty where there is none.
    driver_cuda
        The newest CUDA that this driver speaks, as (major, minor); None where it is unknown.

    Examples
    --------
    >>> Machine(n_cores=8, read_cpu_label="EPYC").gpus
    ()
    """

    gpus: tuple[Device, ...] = ()
    n_hidden_gpus: int = 0
    n_cores: int = 1
    cpu_label: str = ""
    memory_nbytes: int = 0
    driver: str = ""
    driver_cuda: tuple[int, int] | None = None


def inspect_machine() -> Machine:
    """Look at this machine; touches neither CUDA nor torch, and keeps nothing open.

    Returns
    -------
    Machine
        Without GPUs where NVML, the driver or a device is missing; the reason is logged at DEBUG level.

    Examples
    --------
    >>> inspect_machine().n_cores >= 1
    True
    """
    found = _query_nvml()
    gpus = _filter_visible(found.gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Machine(
        gpus=gpus,
        n_hidden_gpus=sum(len(gpu.devices) for gpu in found.gpus) - len(gpus),
        n_cores=_count_cores(),
        cpu_label=read_cpu_label(),
        memory_nbytes=_read_host_nbytes(),
        driver=found.driver,
        driver_cuda=found.driver_cuda,
    )


class _NvmlGpu(NamedTuple):
    """One GPU in NVML's order: itself as a device, or its MIG instances; none where it does not answer."""

    uuid: str
    devices: tuple[Device, ...]


class _NvmlInfo(NamedTuple):
    gpus: tuple[_NvmlGpu, ...] = ()
    driver: str = ""
    driver_cuda: tuple[int, int] | None = None


def _query_nvml() -> _NvmlInfo:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.debug("no GPUs here, NVML says: %s", error)
        return _NvmlInfo()
    try:
        cuda = _call_nvml(0, pynvml.nvmlSystemGetCudaDriverVersion_v2)
        return _NvmlInfo(
            gpus=tuple(_query_gpu(index) for index in range(_call_nvml(0, pynvml.nvmlDeviceGetCount))),
            driver=_call_nvml("", pynvml.nvmlSystemGetDriverVersion),
            driver_cuda=(cuda // 1000, cuda % 1000 // 10) if cuda else None,
        )
    finally:
        pynvml.nvmlShutdown()


def _call_nvml(default: Any, function: Callable[..., Any], *args: object) -> Any:
    """What NVML answers; ``otherwise`` where this driver lacks the question or the hardware an answer."""
    from pynvml import NVMLError

    try:
        return function(*args)
    except NVMLError as error:
        log.debug("%s: %s", function.__name__, error)
        return default


def _query_gpu(index: int) -> _NvmlGpu:
    import pynvml

    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        in_mig_mode, _ = _call_nvml((0, 0), pynvml.nvmlDeviceGetMigMode, handle)
        handles = _query_mig_instances(handle) if in_mig_mode else [handle]
        return _NvmlGpu(pynvml.nvmlDeviceGetUUID(handle), tuple(_query_device(h) for h in handles))
    except pynvml.NVMLError as error:
        log.warning("GPU %d of this machine is left out, NVML says: %s; see nvidia-smi", index, error)
        return _NvmlGpu("", ())


def _query_mig_instances(handle: Any) -> list[Any]:
    import pynvml

    n_places = _call_nvml(0, pynvml.nvmlDeviceGetMaxMigDeviceCount, handle)
    places = (_call_nvml(None, pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, place) for place in range(n_places))
    return [instance for instance in places if instance is not None]


def _query_device(handle: Any) -> Device:
    """The device without its number, which depends on what is visible."""
    import pynvml

    memory = _call_nvml(None, pynvml.nvmlDeviceGetMemoryInfo, handle)
    return Device(
        name="",
        kind="cuda",
        index=0,
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        label=_call_nvml("", pynvml.nvmlDeviceGetName, handle),
        memory_nbytes=memory.total if memory else 0,
        free_nbytes=memory.free if memory else 0,
    )


def _filter_visible(gpus: Sequence[_NvmlGpu], variable: str | None) -> tuple[Device, ...]:
    everything = [device for gpu in gpus for device in gpu.devices]
    chosen = everything if variable is None else _parse_visible_devices(gpus, variable)
    return tuple(_number_gpu(d, index) for index, d in enumerate(d for d in everything if d in chosen))


def _parse_visible_devices(gpus: Sequence[_NvmlGpu], variable: str) -> list[Device]:
    """Read ``CUDA_VISIBLE_DEVICES`` as CUDA does: what is invalid ends the list, what is repeated empties it."""
    chosen: list[Device] = []
    for entry in variable.split(","):
        devices = _find_by_index(gpus, entry.strip()) or _find_by_uuid(gpus, entry.strip())
        if not devices:
            break
        if any(device in chosen for device in devices):
            return []
        chosen += devices
    return chosen


def _find_by_index(gpus: Sequence[_NvmlGpu], entry: str) -> Sequence[Device]:
    is_number = re.fullmatch("[0-9]{1,9}", entry)
    return gpus[int(entry)].devices if is_number and int(entry) < len(gpus) else ()


def _find_by_uuid(gpus: Sequence[_NvmlGpu], entry: str) -> Sequence[Device]:
    """The one GPU or MIG instance whose UUID begins so; nothing where several do."""
    if not entry.startswith(("GPU-", "MIG-")):
        return ()
    whole = [gpu.devices for gpu in gpus if gpu.uuid.startswith(entry)]
    parts = [
        (device,) for gpu in gpus for device in gpu.devices if device.uuid.startswith(entry) and device.uuid != gpu.uuid
    ]
    return (whole + parts)[0] if len(whole + parts) == 1 else ()


def _number_gpu(device: Device, index: int) -> Device:
    is_mig = device.uuid.startswith("MIG-")
    return replace(device, name=device.uuid if is_mig else f"cuda:{index}", index=index)


def _count_cores() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [text.split() for text in _iter_cgroup_limits("cpu", ["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"])]
    quotas = [int(limit[0]) // int(limit[1]) for limit in limits if len(limit) == 2 and limit[0].isdigit()]
    return max(1, min([allowed, *quotas]))


def _read_host_nbytes() -> int:
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows has no sysconf, and some systems not these names
        return 0
    limits = [
        int(text) for text in _iter_cgroup_limits("memory", ["memory.max"], ["memory.limit_in_bytes"]) if text.isdigit()
    ]
    return min([physical, *limits])


def _iter_cgroup_limits(controller: str, v2_files: Sequence[str], v1_files: Sequence[str]) -> Iterator[str]:
    """A limit's text in this process's control group and in every group above it, for both versions of those."""
    for line in _read_text("proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        folders = {"": ("sys/fs/cgroup", v2_files), controller: (f"sys/fs/cgroup/{controller}", v1_files)}
        for name in folders.keys() & controllers.split(","):
            top, files = folders[name]
            group = PurePosixPath(path.lstrip("/"))
            for folder in (group, *group.parents):
                yield " ".join(_read_text(f"{top}/{folder}/{file}") for file in files)


def _read_text(path: str) -> str:
    try:
        return (_ROOT / path).read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def read_cpu_label() -> str:
    """The processor's name; empty where it is unknown."""
    named = re.search(r"^model name\s*:\s*(.+)$", _read_text("proc/cpuinfo"), re.MULTILINE)
    return named[1] if named else platform.processor()
