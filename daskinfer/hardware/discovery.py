"""Find the GPUs of this machine with NVML and describe the machine in plain records.

GPUs are found through NVML, never through CUDA: a process that has initialised CUDA can no longer be pinned to a GPU, and
its forked children cannot use one. Nothing here imports torch or Dask.

GPUs are numbered from 0 in NVML's order (that of the PCI bus) within the caller's ``CUDA_VISIBLE_DEVICES``, regardless of
the order in that variable: with ``CUDA_VISIBLE_DEVICES=3,1``, NVML's GPU 1 is ``cuda:0``. A plain number in that variable
is also read as NVML's, as dask-cuda does; CUDA itself may count the fastest GPU first unless
``CUDA_DEVICE_ORDER=PCI_BUS_ID``. UUIDs are unambiguous, so workers are pinned by UUID. Each instance of a GPU in MIG mode
is a device of its own, named by its UUID and counted like a GPU; the number or UUID of the GPU in that variable stands for
all of its instances.
"""

from __future__ import annotations

import html
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from daskinfer.hardware.host import count_cores, read_cpu_label, read_memory_nbytes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Device:
    """A device that runs a model: a GPU, a MIG instance, a CPU worker, or the current process.

    Parameters
    ----------
    name
        ``"cuda:1"``, ``"MIG-<uuid>"``, ``"cpu:0"`` or ``"inline"``.
    kind
        ``"cuda"``, ``"cpu"`` or ``"inline"``.
    index
        A GPU's number in NVML's order within ``CUDA_VISIBLE_DEVICES``, or a CPU worker's number; both from 0.
    uuid
        UUID by which a GPU's worker is pinned; empty for other kinds.
    label
        Name of the hardware; empty if unknown.
    memory_nbytes
        Total memory in bytes; CPU workers share that of the host. 0 if unknown.
    free_nbytes
        Bytes free on a GPU at the time of discovery; 0 if unknown.

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
        return ", ".join(part for part in (self.label or self.kind, *memory, *free, self.uuid) if part)


@dataclass(frozen=True, slots=True)
class Machine:
    """The hardware of a machine, as visible to the process that inspected it.

    Parameters
    ----------
    gpus
        GPUs and MIG instances within ``CUDA_VISIBLE_DEVICES``, in NVML's order.
    n_hidden_gpus
        Number of further GPUs and MIG instances that NVML sees but ``CUDA_VISIBLE_DEVICES`` hides.
    n_cores
        Cores that this process may use: its affinity, or the quota of its control group if that is smaller.
    cpu_label
        Name of the processor.
    memory_nbytes
        Host memory in bytes, or the limit of the control group if that is smaller; 0 if unknown.
    driver
        Version of the NVIDIA driver; empty without one.
    driver_cuda
        Newest CUDA version that the driver supports, as (major, minor); None if unknown.

    Examples
    --------
    >>> Machine(n_cores=8, cpu_label="EPYC").gpus
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
    """Inspect this machine without touching CUDA or torch, and without keeping a handle open.

    Returns
    -------
    Machine
        Has no GPUs if NVML, the driver or the devices are missing; the reason is logged at DEBUG level.

    Examples
    --------
    >>> inspect_machine().n_cores >= 1
    True
    """
    nvml = _query_nvml()
    gpus = _filter_visible(nvml.gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Machine(
        gpus=gpus,
        n_hidden_gpus=sum(len(gpu.devices) for gpu in nvml.gpus) - len(gpus),
        n_cores=count_cores(),
        cpu_label=read_cpu_label(),
        memory_nbytes=read_memory_nbytes(),
        driver=nvml.driver,
        driver_cuda=nvml.driver_cuda,
    )


class _NvmlGpu(NamedTuple):
    """One GPU in NVML's order with its devices: itself, or its MIG instances; none if NVML cannot query it."""

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
        log.debug("found no GPUs: NVML reports %s", error)
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
    """Call an NVML function; return ``default`` if the driver or the hardware does not support it."""
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
        log.warning("ignoring GPU %d: NVML reports %s; run nvidia-smi for details", index, error)
        return _NvmlGpu("", ())


def _query_mig_instances(handle: Any) -> list[Any]:
    import pynvml

    n_slots = _call_nvml(0, pynvml.nvmlDeviceGetMaxMigDeviceCount, handle)
    slots = (_call_nvml(None, pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, slot) for slot in range(n_slots))
    return [instance for instance in slots if instance is not None]


def _query_device(handle: Any) -> Device:
    """Describe a device, without its number: that depends on which devices are visible."""
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
    devices = [device for gpu in gpus for device in gpu.devices]
    visible = devices if variable is None else _parse_visible_devices(gpus, variable)
    return tuple(_number_gpu(d, index) for index, d in enumerate(d for d in devices if d in visible))


def _parse_visible_devices(gpus: Sequence[_NvmlGpu], variable: str) -> list[Device]:
    """Parse ``CUDA_VISIBLE_DEVICES`` as CUDA does: an invalid entry ends the list, a repeated one empties it."""
    visible: list[Device] = []
    for entry in variable.split(","):
        devices = _find_by_index(gpus, entry.strip()) or _find_by_uuid(gpus, entry.strip())
        if not devices:
            break
        if any(device in visible for device in devices):
            return []
        visible += devices
    return visible


def _find_by_index(gpus: Sequence[_NvmlGpu], entry: str) -> Sequence[Device]:
    is_number = re.fullmatch("[0-9]{1,9}", entry)
    return gpus[int(entry)].devices if is_number and int(entry) < len(gpus) else ()


def _find_by_uuid(gpus: Sequence[_NvmlGpu], entry: str) -> Sequence[Device]:
    """Find the GPU or MIG instance whose UUID starts with ``entry``; nothing if several do."""
    if not entry.startswith(("GPU-", "MIG-")):
        return ()
    whole_gpus = [gpu.devices for gpu in gpus if gpu.uuid.startswith(entry)]
    instances = [
        (device,) for gpu in gpus for device in gpu.devices if device.uuid.startswith(entry) and device.uuid != gpu.uuid
    ]
    matches = whole_gpus + instances
    return matches[0] if len(matches) == 1 else ()


def _number_gpu(device: Device, index: int) -> Device:
    is_mig = device.uuid.startswith("MIG-")
    return replace(device, name=device.uuid if is_mig else f"cuda:{index}", index=index)
