"""What each kind of device says of itself; CUDA's part with a stand-in for ``torch.cuda``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from daskinfer.core import env
from daskinfer.errors import DeviceError
from daskinfer.worker import backends
from daskinfer.worker.backends import BACKENDS, CpuBackend, CudaBackend, DeviceMemory, choose_backend, get_backend

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
UUID = "GPU-00000000-0000-0000-0000-000000000001"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    """CUDA's backend on a machine with one GPU, which answers for ``cuda:0`` only."""
    by_device = {GPU: SimpleNamespace(uuid=UUID.removeprefix("GPU-"), name="Stand-in GPU")}
    monkeypatch.delenv(env.UUID, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", by_device.__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", {GPU: (5 << 30, 16 << 30)}.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_reserved", {GPU: 1 << 30}.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {GPU: 3 << 30}.__getitem__)
    return CudaBackend()


def test_a_torch_device_has_the_backend_of_its_type() -> None:
    """The number of a device does not matter, and every backend is registered under its own type."""
    assert isinstance(get_backend(torch.device("cuda:3")), CudaBackend)
    assert isinstance(get_backend(CPU), CpuBackend)
    assert all(backend.device_type == device_type for device_type, backend in BACKENDS.items())


def test_a_device_without_backend_is_refused() -> None:
    """The error names the device and the types that are supported."""
    with pytest.raises(DeviceError, match=r"device must be of type cuda or cpu, got 'meta'"):
        get_backend(torch.device("meta"))


@pytest.mark.parametrize(("pinned", "kind"), [("cpu:3", "cpu"), ("cuda:1", "cuda"), ("MIG-1", "cuda"), (UUID, "cuda")])
def test_a_pinned_process_has_the_backend_of_its_device(cuda: CudaBackend, pinned: str, kind: str) -> None:
    """The name in the plan decides, whatever else is available; a name without a type is a GPU's UUID."""
    assert choose_backend(pinned).device_type == kind


@pytest.mark.parametrize("available", [True, False])
def test_an_unpinned_process_prefers_the_accelerator(monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    """It computes on a GPU if torch finds one, otherwise on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert choose_backend(None).device_type == ("cuda" if available else "cpu")


def test_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the host's: without memory or UUID of its own, always there, and never broken."""
    backend = CpuBackend()
    assert (backend.first_device, backend.get_memory(CPU), backend.get_uuid(CPU)) == (CPU, None, "")
    assert backend.is_available()
    backend.check_pinned("cpu:0", UUID)
    backend.empty_cache()
    assert not backend.is_sticky(RuntimeError("CUDA error: device-side assert triggered"))


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_of_the_cpu(monkeypatch: pytest.MonkeyPatch, platform: str, unit: int) -> None:
    """The system counts in KiB, macOS in bytes."""
    monkeypatch.setattr(backends.sys, "platform", platform)
    monkeypatch.setattr(backends.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=1000))
    assert CpuBackend().get_peak_nbytes(CPU) == 1000 * unit


def test_the_processors_name_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk reports it, and reading takes longer than a small chunk."""
    n_reads = []
    monkeypatch.setattr(backends, "read_cpu_label", lambda: n_reads.append(1) or "A CPU")
    backends._read_cpu_label.cache_clear()
    assert [CpuBackend().get_device_name(CPU) for _ in range(3)] == ["A CPU"] * 3
    assert len(n_reads) == 1
    backends._read_cpu_label.cache_clear()


def test_a_gpu(cuda: CudaBackend) -> None:
    """It has a name, a UUID and memory of its own; what torch reserved counts as free."""
    assert (cuda.first_device, cuda.get_device_name(GPU), cuda.get_uuid(GPU)) == (GPU, "Stand-in GPU", UUID)
    assert cuda.get_memory(GPU) == DeviceMemory(total_nbytes=16 << 30, free_nbytes=6 << 30)
    assert cuda.get_peak_nbytes(GPU) == 3 << 30


def test_a_mig_instance_keeps_the_uuid_that_it_is_pinned_by(cuda: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reports the whole GPU's UUID for it, so there is nothing to compare either."""
    monkeypatch.setenv(env.UUID, "MIG-1")
    assert cuda.get_uuid(GPU) == "MIG-1"
    cuda.check_pinned("MIG-1", "MIG-1")


def test_pinning_is_checked(cuda: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first visible GPU must be the one that the worker is pinned to, and there must be one."""
    cuda.check_pinned("cuda:1", UUID)
    with pytest.raises(DeviceError, match=r"worker for cuda:1 must have GPU-7 as its first device, got GPU-.*1\. CUDA_VIS"):
        cuda.check_pinned("cuda:1", "GPU-7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"worker for cuda:1 found no CUDA device .* Install a CUDA build of torch"):
        cuda.check_pinned("cuda:1", UUID)


def test_memory_that_torch_caches_goes_back_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """After running out of memory, torch's cache of the GPU is emptied."""
    n_calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: n_calls.append(1))
    CudaBackend().empty_cache()
    assert n_calls == [1]


@pytest.mark.parametrize(
    ("error", "kinds"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), {"cpu", "cuda"}),
        (MemoryError(), {"cpu", "cuda"}),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), {"cpu"}),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), {"cuda"}),
        (ValueError("out of memory"), set()),
    ],
)
def test_each_kind_of_device_knows_its_own_words(error: Exception, kinds: set[str]) -> None:
    """Classes of exceptions count everywhere, messages only for the kind of device that they come from."""
    assert {kind for kind, backend in BACKENDS.items() if backend.is_out_of_memory(error)} == kinds
