"""Which device a process computes on, and with how many threads."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import Client

from daskinfer.cluster.placement import fetch_workers
from daskinfer.core import env
from daskinfer.errors import DeviceError
from daskinfer.hardware.host import read_cpu_label
from daskinfer.worker import current_device as current_device_module
from daskinfer.worker.current_device import WorkerDevice, current_device, describe_worker_device, get_worker_device

UUID = "GPU-00000000-0000-0000-0000-000000000001"


@pytest.fixture
def unpinned(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that is pinned to no device, and has not resolved its hardware yet."""
    for name in (env.DEVICE, env.UUID, env.THREADS):
        monkeypatch.delenv(name, raising=False)
    uncached = current_device_module._resolve_hardware.__wrapped__
    monkeypatch.setattr(current_device_module, "_resolve_hardware", uncached)
    return monkeypatch


@pytest.fixture
def gpu(unpinned: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Stand in for a torch that sees one GPU."""
    properties = SimpleNamespace(uuid=UUID.removeprefix("GPU-"), name="Stand-in GPU")
    unpinned.setattr(torch.cuda, "is_available", lambda: True)
    unpinned.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    unpinned.setattr(torch.cuda, "mem_get_info", lambda device: (5 << 30, 16 << 30))
    unpinned.setattr(torch.cuda, "memory_reserved", lambda device: 1 << 30)
    return unpinned


def dask_worker(name: Any = "tcp://127.0.0.1:1234", nthreads: int = 2) -> Any:
    """The attributes of a Dask worker that are read."""
    memory = SimpleNamespace(memory_limit=1 << 30)
    return SimpleNamespace(name=name, address="tcp://a:1", state=SimpleNamespace(nthreads=nthreads), memory_manager=memory)


def test_outside_tasks_this_process_is_the_device(unpinned: pytest.MonkeyPatch) -> None:
    """Inline work runs on the CPU with torch's own threads."""
    here = current_device()
    assert here == WorkerDevice("inline", read_cpu_label(), torch.device("cpu"), None, f"process {os.getpid()}")
    before = torch.get_num_threads()
    with here.limit_threads():
        assert torch.get_num_threads() == before


def test_threads_are_limited_inside_and_restored_even_after_an_error() -> None:
    """The limit holds in the thread that computes, and only while it computes."""
    before = torch.get_num_threads()

    def failing() -> None:
        with WorkerDevice("cpu:0", "", torch.device("cpu"), before + 2, "").limit_threads():
            raise LookupError(str(torch.get_num_threads()))

    with pytest.raises(LookupError, match=str(before + 2)):
        failing()
    assert torch.get_num_threads() == before


def test_a_managed_worker_is_what_its_variables_say(unpinned: pytest.MonkeyPatch) -> None:
    """Name and threads come from the environment first, from Dask second."""
    unpinned.setenv(env.DEVICE, "cpu:3")
    unpinned.setenv(env.THREADS, "7")
    here = get_worker_device(dask_worker())
    assert (here.device, here.n_threads, here.torch_device.type, here.worker) == ("cpu:3", 7, "cpu", "tcp://a:1")


def test_an_external_worker_without_gpu_is_a_cpu_with_its_threads(unpinned: pytest.MonkeyPatch) -> None:
    """Its name is Dask's, its memory is Dask's limit, and it has no UUID."""
    unpinned.setattr(torch.cuda, "is_available", lambda: False)
    here = get_worker_device(dask_worker(name=3))
    assert (here.device, here.n_threads, here.torch_device.type, here.uuid) == ("3", 2, "cpu", "")
    described = describe_worker_device(dask_worker(name=3))
    assert (described.name, described.kind, described.memory_nbytes) == ("3", "cpu", 1 << 30)


def test_an_external_worker_with_gpus_is_the_first_one_it_sees(gpu: pytest.MonkeyPatch) -> None:
    """dask-cuda rotates the visible GPUs so that a worker's own is the first; its memory is that GPU's."""
    described = describe_worker_device(dask_worker())
    assert (described.kind, described.uuid, described.label) == ("cuda", UUID, "Stand-in GPU")
    assert (described.memory_nbytes, described.free_nbytes) == (16 << 30, 6 << 30)
    assert str(get_worker_device(dask_worker()).torch_device) == "cuda:0"


def test_a_pinned_worker_takes_its_gpu(gpu: pytest.MonkeyPatch) -> None:
    """The UUID that the worker is pinned to is the first GPU's."""
    gpu.setenv(env.DEVICE, "cuda:1")
    gpu.setenv(env.UUID, UUID)
    here = get_worker_device(dask_worker())
    assert (here.device_name, here.uuid) == ("Stand-in GPU", UUID)


def test_a_pinned_worker_refuses_another_gpu(gpu: pytest.MonkeyPatch) -> None:
    """On the wrong GPU it would silently compete with the worker that is pinned to it."""
    gpu.setenv(env.DEVICE, "cuda:0")
    gpu.setenv(env.UUID, UUID[:-1] + "0")
    with pytest.raises(DeviceError, match=r"worker for cuda:0 must have GPU-.*0 as its first device, got GPU-.*1\."):
        get_worker_device(dask_worker())


def test_a_mig_instance_is_not_compared_with_the_gpus_uuid(gpu: pytest.MonkeyPatch) -> None:
    """torch reports the whole GPU's UUID for a MIG instance; the instance keeps the UUID that it is pinned by."""
    gpu.setenv(env.DEVICE, "MIG-1")
    gpu.setenv(env.UUID, "MIG-1")
    assert describe_worker_device(dask_worker()).uuid == "MIG-1"


def test_a_pinned_worker_without_cuda_is_refused(unpinned: pytest.MonkeyPatch) -> None:
    """It never falls back to the CPU."""
    unpinned.setenv(env.DEVICE, "cuda:0")
    unpinned.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"worker for cuda:0 found no CUDA device \(CUDA_VISIBLE_DEVICES=.*torch"):
        get_worker_device(dask_worker())


def test_inside_a_task_the_device_is_the_workers(cluster_client: Client) -> None:
    """A task finds the device of the worker that runs it."""
    found = cluster_client.submit(current_device, pure=False, resources={"daskinfer-cpu:1": 1}).result()
    assert (found.device, found.n_threads) == ("cpu:1", 1)
    assert found.worker in fetch_workers(cluster_client)
