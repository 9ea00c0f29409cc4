"""What differs between kinds of device: identity, memory, and the errors that they raise.

One class per torch device type, in ``BACKENDS``. The rest of this package works with any device and asks the backend of
the device at hand, so a new accelerator is one subclass of :class:`DeviceBackend` and one entry there.
"""

from __future__ import annotations

import functools
import os
import resource
import sys
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch

from daskinfer.core import env
from daskinfer.errors import DeviceError
from daskinfer.hardware.host import read_cpu_label


class DeviceMemory(NamedTuple):
    """A device's own memory, and how much of it this process may still use."""

    total_nbytes: int
    free_nbytes: int


class DeviceBackend(ABC):
    """One kind of device as the worker uses it; it has no state.

    ``device_type`` is torch's name of the kind. ``out_of_memory_phrases`` are parts of the messages by which torch and the
    libraries below it say that memory ran out without raising ``torch.OutOfMemoryError``.
    """

    device_type: ClassVar[str]
    out_of_memory_phrases: ClassVar[tuple[str, ...]]

    @abstractmethod
    def is_available(self) -> bool:
        """Return whether this process has such a device."""

    @property
    @abstractmethod
    def first_device(self) -> torch.device:
        """The device of this kind that a worker computes on."""

    @abstractmethod
    def get_device_name(self, device: torch.device) -> str:
        """Return the hardware's name, such as "NVIDIA L4"; empty if unknown."""

    @abstractmethod
    def get_uuid(self, device: torch.device) -> str:
        """Return what identifies the hardware across processes; empty if nothing does."""

    @abstractmethod
    def check_pinned(self, device_name: str, uuid: str) -> None:
        """Check that this process sees the device that its worker is pinned to.

        Raises
        ------
        DeviceError
            If there is none, or if it is another one.
        """

    @abstractmethod
    def get_memory(self, device: torch.device) -> DeviceMemory | None:
        """Return the device's own memory; None if it shares the host's."""

    @abstractmethod
    def get_peak_nbytes(self, device: torch.device) -> int:
        """Return the most memory that this process has held so far, in the memory that the device computes in."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Give memory that torch keeps for later tensors back to the device."""

    @abstractmethod
    def is_sticky(self, error: BaseException) -> bool:
        """Return whether the process that got this error can no longer use the device; only a new process helps."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether memory ran out on such a device."""
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in self.out_of_memory_phrases)


class CpuBackend(DeviceBackend):
    """The host's cores and memory."""

    device_type = "cpu"
    # torch has no class of its own for it; "MemoryError: " is what a worker's ChunkError says of Python's.
    out_of_memory_phrases = ("DefaultCPUAllocator", "can't allocate memory", "MemoryError: ")

    def is_available(self) -> bool:
        return True

    @property
    def first_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_name(self, device: torch.device) -> str:
        return _read_cpu_label()

    def get_uuid(self, device: torch.device) -> str:
        return ""

    def check_pinned(self, device_name: str, uuid: str) -> None:
        """Do nothing: every process has the CPU."""

    def get_memory(self, device: torch.device) -> DeviceMemory | None:
        return None

    def get_peak_nbytes(self, device: torch.device) -> int:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes that one of the system's units stands for
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def empty_cache(self) -> None:
        """Do nothing: torch frees host memory at once."""

    def is_sticky(self, error: BaseException) -> bool:
        return False


class CudaBackend(DeviceBackend):
    """NVIDIA GPUs. A worker sees its own GPU as the first: dask-cuda rotates ``CUDA_VISIBLE_DEVICES``."""

    device_type = "cuda"
    out_of_memory_phrases = ("out of memory", "ALLOC_FAILED")  # the driver's, and those of cuBLAS and cuDNN
    # Of CUDA's errors those after which its documentation says that the process has to end (cudaError_t).
    sticky_phrases: ClassVar[tuple[str, ...]] = (
        *("illegal memory access", "illegal instruction", "invalid program counter", "misaligned address"),
        *("device-side assert", "unspecified launch failure", "launch timed out", "hardware stack error"),
        *("uncorrectable ECC error", "operation not supported on global/shared address space"),
    )

    def is_available(self) -> bool:
        return torch.cuda.is_available()

    @property
    def first_device(self) -> torch.device:
        return torch.device("cuda:0")

    def get_device_name(self, device: torch.device) -> str:
        return str(torch.cuda.get_device_properties(device).name)

    def get_uuid(self, device: torch.device) -> str:
        """Return the UUID that the worker is pinned by, which may be a MIG instance's, else the GPU's own."""
        return os.environ.get(env.UUID) or self._get_gpu_uuid(device)

    def check_pinned(self, device_name: str, uuid: str) -> None:
        if not self.is_available():
            raise DeviceError(
                f"worker for {device_name} found no CUDA device (CUDA_VISIBLE_DEVICES="
                f"{os.environ.get('CUDA_VISIBLE_DEVICES')!r}, torch {torch.__version__}). Install a CUDA build of torch, "
                "or leave the device out."
            )
        # torch reports the whole GPU's UUID for a MIG instance, so there is nothing to compare an instance's with.
        if uuid.startswith("GPU-") and (actual := self._get_gpu_uuid(self.first_device)) != uuid:
            raise DeviceError(
                f"worker for {device_name} must have {uuid} as its first device, got {actual}. CUDA_VISIBLE_DEVICES was "
                "changed, or CUDA initialized, before pinning; do neither in a preload script."
            )

    def get_memory(self, device: torch.device) -> DeviceMemory | None:
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(total, free + torch.cuda.memory_reserved(device))  # what torch reserved, it can use again

    def get_peak_nbytes(self, device: torch.device) -> int:
        """Return the most that tensors of this process held on the GPU."""
        return int(torch.cuda.max_memory_allocated(device))

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def is_sticky(self, error: BaseException) -> bool:
        return "CUDA" in str(error) and any(phrase in str(error) for phrase in self.sticky_phrases)

    def _get_gpu_uuid(self, device: torch.device) -> str:
        return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


# By torch device type, in the order in which a worker that is told nothing looks for its device; the CPU is always there.
BACKENDS: dict[str, DeviceBackend] = {backend.device_type: backend for backend in (CudaBackend(), CpuBackend())}


def get_backend(device: torch.device) -> DeviceBackend:
    """Return the backend of a torch device.

    Raises
    ------
    DeviceError
        If there is none for devices of its type.

    Examples
    --------
    >>> get_backend(torch.device("cpu")).device_type
    'cpu'
    """
    if device.type not in BACKENDS:
        raise DeviceError(f"device must be of type {' or '.join(BACKENDS)}, got {str(device)!r}")
    return BACKENDS[device.type]


def choose_backend(pinned: str | None) -> DeviceBackend:
    """Return the backend of the device that this process computes on.

    ``pinned`` is the device's name in the plan; a name without a known type before its colon is a GPU's UUID, as of a MIG
    instance. None: the first type that is available, so the CPU only if there is no accelerator.
    """
    if pinned is None:
        return next(backend for backend in BACKENDS.values() if backend.is_available())
    return BACKENDS.get(pinned.partition(":")[0], BACKENDS["cuda"])


@functools.cache
def _read_cpu_label() -> str:
    """Read the processor's name once: every chunk computed in this process reports it, and reading it takes 0.5 ms."""
    return read_cpu_label()
