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
from daskinfer.hardware.discovery import read_cpu_label
from daskinfer.worker import current_device as room
from daskinfer.worker.current_device import WorkerDevice, current_device, describe_worker_device, get_worker_device

UUID = "GPU-00000000-0000-0000-0000-000000000001"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that is no worker's yet, and has not looked at its device."""
    for name in (env.DEVICE, env.UUID, env.THREADS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(room, "_resolve_torch_device", room._resolve_torch_device.__wrapped__)
    return monkeypatch


@pytest.fixture
def gpu(fresh: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A torch that sees one GPU."""
    properties = SimpleNamespace(uuid=UUID.removeprefix("GPU-"), name="Stand-in GPU")
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    fresh.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    fresh.setattr(torch.cuda, "mem_get_info", lambda index: (5 << 30, 16 << 30))
    fresh.setattr(torch.cuda, "memory_reserved", lambda index: 1 << 30)
    return fresh


def dask_worker(name: Any = "tcp://127.0.0.1:1234", nthreads: int = 2) -> Any:
    """What the room asks of a Dask worker."""
    memory = SimpleNamespace(memory_limit=1 << 30)
    return SimpleNamespace(name=name, address="tcp://a:1", state=SimpleNamespace(nthreads=nthreads), memory_manager=memory)


def test_outside_tasks_this_process_is_the_seat(fresh: pytest.MonkeyPatch) -> None:
    """Inline work is done on the CPU with torch's own threads."""
    here = current_device()
    assert here == WorkerDevice("inline", read_cpu_label(), torch.device("cpu"), None, f"process {os.getpid()}")
    before = torch.get_num_threads()
    with here.limit_threads():
        assert torch.get_num_threads() == before


def test_threads_are_set_inside_and_put_back_also_after_an_error() -> None:
    """The number counts for the thread that computes, and only while it does."""
    before = torch.get_num_threads()

    def failing() -> None:
        with WorkerDevice("cpu:0", "", torch.device("cpu"), before + 2, "").limit_threads():
            raise LookupError(str(torch.get_num_threads()))

    with pytest.raises(LookupError, match=str(before + 2)):
        failing()
    assert torch.get_num_threads() == before


def test_a_worker_of_ours_is_what_its_variables_say(fresh: pytest.MonkeyPatch) -> None:
    """Name and threads come from the environment, before what Dask says."""
    fresh.setenv(env.DEVICE, "cpu:3")
    fresh.setenv(env.THREADS, "7")
    here = get_worker_device(dask_worker())
    assert (here.device, here.n_threads, here.torch_device.type, here.worker) == ("cpu:3", 7, "cpu", "tcp://a:1")


def test_a_worker_of_others_without_gpu_is_a_cpu_with_its_threads(fresh: pytest.MonkeyPatch) -> None:
    """Its name is Dask's, and its memory what Dask limits it to."""
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    here = get_worker_device(dask_worker(name=3))
    assert (here.device, here.n_threads, here.torch_device.type) == ("3", 2, "cpu")
    described = describe_worker_device(dask_worker(name=3))
    assert (described.name, described.kind, described.memory_nbytes) == ("3", "cpu", 1 << 30)


def test_a_worker_of_others_with_gpus_is_the_first_one_it_sees(gpu: pytest.MonkeyPatch) -> None:
    """dask-cuda rotates the visible GPUs so that a worker's own is the first; what counts is that GPU's memory."""
    described = describe_worker_device(dask_worker())
    assert (described.kind, described.uuid, described.label) == ("cuda", UUID, "Stand-in GPU")
    assert (described.memory_nbytes, described.free_nbytes) == (16 << 30, 6 << 30)
    assert str(get_worker_device(dask_worker()).torch_device) == "cuda:0"


def test_a_pinned_worker_takes_its_gpu(gpu: pytest.MonkeyPatch) -> None:
    """The UUID that it was pinned to is the first GPU's."""
    gpu.setenv(env.DEVICE, "cuda:1")
    gpu.setenv(env.UUID, UUID)
    assert get_worker_device(dask_worker()).device_name == "Stand-in GPU"


def test_a_pinned_worker_refuses_another_gpu(gpu: pytest.MonkeyPatch) -> None:
    """A wrong GPU would compute in silence beside the worker whose GPU it is."""
    gpu.setenv(env.DEVICE, "cuda:0")
    gpu.setenv(env.UUID, UUID[:-1] + "0")
    with pytest.raises(DeviceError, match=r"the worker of cuda:0 sees GPU-.*1 as its first device; it was pinned to .*0\."):
        get_worker_device(dask_worker())


def test_a_mig_instance_is_not_compared_with_the_gpus_uuid(gpu: pytest.MonkeyPatch) -> None:
    """Torch gives the whole GPU's UUID for an instance of it; the instance stays what it was pinned by."""
    gpu.setenv(env.DEVICE, "MIG-1")
    gpu.setenv(env.UUID, "MIG-1")
    assert describe_worker_device(dask_worker()).uuid == "MIG-1"


def test_a_pinned_worker_without_cuda_is_refused(fresh: pytest.MonkeyPatch) -> None:
    """It never computes on the CPU instead."""
    fresh.setenv(env.DEVICE, "cuda:0")
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="the worker of cuda:0 finds no CUDA device"):
        get_worker_device(dask_worker())


def test_inside_a_task_the_seat_is_the_workers(cluster_client: Client) -> None:
    """A block finds its device by itself, wherever it runs."""
    found = cluster_client.submit(current_device, pure=False, resources={"daskinfer-cpu:1": 1}).result()
    assert (found.device, found.n_threads) == ("cpu:1", 1)
    assert found.worker in fetch_workers(cluster_client)
