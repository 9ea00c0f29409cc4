from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster, Worker

import daskinfer as di
from daskinfer.cluster.placement import Placement, fetch_workers, resolve_placement
from daskinfer.cluster.worker_spec import memory_per_worker, resource_name
from daskinfer.errors import ClusterError, DeviceError
from daskinfer.execution import run
from daskinfer.execution.run import open_client as open_
from daskinfer.hardware.discovery import Device, inspect_machine
from daskinfer.worker import current_device
from tests.conftest import wait_until
from tests.support.dask_commands import others
from tests.support.nvml_stand_in import LIBRARY, build


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with two GPUs, by a stand-in for NVML, and a torch that could drive them."""
    pynvml = pytest.importorskip("pynvml")
    build(tmp_path)
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(tmp_path / LIBRARY)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return monkeypatch


@contextlib.contextmanager
def as_current(client: Client) -> Iterator[None]:
    """Make a client the current one; no warning may come."""
    with client.as_current(), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_client_given_is_used_whatever_is_current(cluster_client: Client) -> None:
    """Its workers are the devices, in order, each reached by its resource where it is ours."""
    placement = resolve_placement("auto", cluster_client)
    assert placement.client is cluster_client
    assert [d.name for d in placement.devices] == ["cpu:0", "cpu:1"]
    assert placement.get_compute_kwargs(1) == {"resources": {resource_name("cpu:1"): 1}}
    assert placement.memory_limits == (placement.devices[0].memory_nbytes,) * 2
    assert not placement.is_inline
    with open_(placement) as opened:
        assert opened is cluster_client


@pytest.mark.parametrize("devices", ["auto", " Auto"])
def test_the_current_client_is_used_where_devices_are_automatic(cluster_client: Client, devices: str) -> None:
    """Dask's users have made a client and expect that it is used; devices that are named go before it."""
    with as_current(cluster_client):
        assert resolve_placement(devices, None).client is cluster_client
        assert resolve_placement("cpu", None).client is None
        assert resolve_placement("inline", None).is_inline


def test_a_current_client_that_leaves_gpus_unused_is_warned_of(cluster_client: Client, two_gpus: pytest.MonkeyPatch) -> None:
    """The warning names the GPUs; naming the client says that it is meant."""
    with cluster_client.as_current(), pytest.warns(UserWarning, match=r"leave cuda:0, cuda:1 of this machine unused"):
        assert len(resolve_placement("auto", None).devices) == 2
    with as_current(cluster_client):
        resolve_placement("auto", cluster_client)


def test_gpus_come_first_and_carry_their_own_memory(two_gpus: pytest.MonkeyPatch) -> None:
    """Without a client the devices are this machine's; a CPU worker's memory is its share of the host's."""
    placement = resolve_placement(["cuda:1", "cpu"], None)
    assert [d.name for d in placement.devices] == ["cuda:1", "cpu:0"]
    assert placement.memory_limits == (15 << 30, memory_per_worker(2, inspect_machine().memory_nbytes))
    assert placement.get_compute_kwargs(0) == {"resources": {resource_name("cuda:1"): 1}}


def test_gpus_that_torch_cannot_drive_are_refused(two_gpus: pytest.MonkeyPatch) -> None:
    """No CPU computes in their place."""
    two_gpus.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match="this torch is built for CPUs only"):
        resolve_placement("auto", None)


def test_inline_is_this_process_with_all_of_its_memory() -> None:
    """Nothing is started, and nothing asked."""
    placement = resolve_placement("inline", None)
    here = inspect_machine()
    assert [(d.label, d.memory_nbytes) for d in placement.devices] == [(here.cpu_label, here.memory_nbytes)]


def test_the_kept_cluster_is_asked_for_by_what_pins_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs by UUID, so that the number in the plan is the GPU of the plan; a cluster starts only when it is opened."""
    asked: list[list[str]] = []

    @contextlib.contextmanager
    def client(devices: list[str]) -> Iterator[str]:
        asked.append(devices)
        yield "client"

    monkeypatch.setattr(run.default_cluster, "client", client)
    placement = Placement((Device("cuda:1", "cuda", 1, uuid="GPU-1"), Device("cpu:0", "cpu", 0)))
    assert asked == []
    with open_(placement) as opened:
        assert (opened, asked) == ("client", [["GPU-1", "cpu"]])


@pytest.mark.slow
def test_a_worker_that_dies_when_it_is_asked_is_none(
    foreign: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place in the call is lost, and the call is not."""
    sign, describe = tmp_path / "sign", current_device.describe_worker_device

    def first_dies(dask_worker: Worker) -> Device:
        with contextlib.suppress(FileExistsError):
            sign.touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        return describe(dask_worker)

    monkeypatch.setattr(current_device, "describe_worker_device", first_dies)
    assert len(resolve_placement("auto", foreign).devices) == 1
    wait_until(lambda: len(fetch_workers(foreign)) == 2, 60)


@pytest.mark.parametrize("given", ["tcp://127.0.0.1:8786", 3])
def test_what_is_no_client_is_refused(given: Any) -> None:
    """An address, or a cluster, is no client: the message says how to make one of it."""
    with pytest.raises(
        ClusterError, match=r"client is a (str|int); a distributed\.Client is needed\. Make one with Client\("
    ):
        di.predict(np.negative, np.zeros(3), client=given)


@pytest.mark.parametrize("devices", ["cpu", ["auto"], "inline"])
def test_devices_beside_a_client_are_refused(devices: str, cluster_client: Client) -> None:
    """Two answers to one question."""
    with pytest.raises(DeviceError, match="was given beside client=; a client's devices are its workers"):
        resolve_placement(devices, cluster_client)


def test_a_client_that_cannot_compute_is_refused() -> None:
    """Without workers, closed, or asynchronous: the message says which, and what to do."""
    address = {"dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=0, processes=False, dashboard_address=None, scheduler_kwargs=address) as empty:
        with Client(empty, set_as_default=False) as client, pytest.raises(ClusterError, match="has no workers; at least"):
            resolve_placement("auto", client)
        with pytest.raises(ClusterError, match="the client is closed; a running synchronous one is needed"):
            resolve_placement("auto", client)

        async def asynchronous() -> None:
            async with Client(empty.scheduler_address, asynchronous=True, set_as_default=False) as client:
                with pytest.raises(ClusterError, match="the client is asynchronous"):
                    resolve_placement("auto", client)

        import asyncio

        asyncio.run(asynchronous())


@contextlib.contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A ``dask`` command that runs meanwhile."""
    with subprocess.Popen([sys.executable, "-m", "dask", *words], stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.mark.slow
def test_a_cluster_that_others_started_works_with_a_device_per_worker(tmp_path: Path) -> None:
    """``dask scheduler`` and ``dask worker``: each worker is one CPU with Dask's threads, reached by its address."""
    file = str(tmp_path / "scheduler.json")
    with contextlib.ExitStack() as stack:
        loopback = ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"]
        stack.enter_context(running("scheduler", "--port", "0", "--scheduler-file", file, *loopback))
        for n_threads in "12":
            mine = ["--nthreads", n_threads, "--name", f"theirs-{n_threads}", "--memory-limit", "1GiB"]
            folder = ["--local-directory", str(tmp_path), "--no-dashboard", "--host", "127.0.0.1"]
            stack.enter_context(running("worker", "--scheduler-file", file, *mine, *folder))
        client = stack.enter_context(Client(scheduler_file=file, set_as_default=False, timeout=60))
        client.wait_for_workers(2, timeout=60)
        placement = resolve_placement("auto", client)
        assert [(d.name, d.kind, d.memory_nbytes) for d in placement.devices] == [
            ("theirs-1", "cpu", 1 << 30),
            ("theirs-2", "cpu", 1 << 30),
        ]
        assert placement.get_compute_kwargs(1) == {"workers": [placement.addresses[1]]}
        x = np.arange(100, dtype="float32")
        y, report = di.predict(np.sqrt, x, client=client, device_weights=[1, 3], batch_size=5, return_report=True)
        np.testing.assert_array_equal(y, np.sqrt(x))
        assert [(d.device, d.n_rows) for d in report.devices] == [("theirs-1", 25), ("theirs-2", 75)]


def test_free_memory_of_a_gpu_counts_before_all_of_it() -> None:
    """Where it is unknown the whole counts, and 0 where that is unknown too."""
    gpu = Device("cuda:0", "cuda", 0, memory_nbytes=16, free_nbytes=5)
    known = [gpu, replace(gpu, free_nbytes=0), replace(gpu, free_nbytes=0, memory_nbytes=0)]
    assert Placement(tuple(known)).memory_limits == (5, 16, 0)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["scheduler", "worker"])
def test_a_cluster_without_daskinfer_is_refused(tmp_path: Path, who: str) -> None:
    """Where the scheduler or a worker cannot import it, the error says who, why and what to do."""
    lacks = {"lacks" if who == "scheduler" else "worker_lacks": "daskinfer"}
    with others(tmp_path, **lacks) as (client, _):
        match = rf"the {who} tcp://127\.0\.0\.1:\d+ cannot import daskinfer \(No module named 'daskinfer'\); .*Install"
        with pytest.raises(ClusterError, match=match):
            di.predict(abs, np.ones(3), client=client)
