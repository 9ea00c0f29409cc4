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
from daskinfer.cluster.placement import fetch_workers, get_task_restriction, resolve_placement
from daskinfer.cluster.process_cluster import default_cluster
from daskinfer.cluster.worker_spec import memory_per_worker, resource_name
from daskinfer.errors import ClusterError, DeviceError
from daskinfer.execution.worker_setup import open_client
from daskinfer.hardware.discovery import Device, inspect_machine
from daskinfer.planning.job import Placement
from daskinfer.worker import current_device
from tests.conftest import wait_until
from tests.support.dask_commands import external_cluster
from tests.support.nvml_stand_in import LIBRARY, build


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with two GPUs, by the stand-in for NVML, and a torch built for CUDA."""
    pynvml = pytest.importorskip("pynvml")
    build(tmp_path)
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(tmp_path / LIBRARY)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return monkeypatch


@contextlib.contextmanager
def as_current(client: Client) -> Iterator[None]:
    """Make a client Dask's current one, and turn warnings into errors."""
    with client.as_current(), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_devices_of_torch(two_gpus: pytest.MonkeyPatch) -> None:
    """What torch people have in a variable names the device, alone or in a list."""
    for devices in (torch.device("cuda", 1), [torch.device("cuda:1"), "cpu"]):
        assert resolve_placement(devices, None)[0].devices[0].name == "cuda:1"
    placement, _ = resolve_placement(torch.device("cpu"), None)
    assert ([d.name for d in placement.devices], placement.can_choose_executor) == (["cpu:0"], False)


def test_an_explicit_client_is_used_even_if_another_is_current(cluster_client: Client) -> None:
    """Its workers are the devices, in order, each placed by its resource if the cluster is managed."""
    placement, client = resolve_placement("auto", cluster_client)
    assert client is cluster_client
    assert [d.name for d in placement.devices] == ["cpu:0", "cpu:1"]
    assert get_task_restriction(placement, 1) == {"resources": {resource_name("cpu:1"): 1}}
    assert placement.memory_limits == (placement.devices[0].memory_nbytes,) * 2
    assert not placement.is_inline
    with open_client(placement, client) as opened:
        assert opened is cluster_client


@pytest.mark.parametrize("devices", ["auto", " Auto"])
def test_the_current_client_is_used_if_devices_are_auto(cluster_client: Client, devices: str) -> None:
    """Dask users expect that their current client is used; named devices take precedence."""
    with as_current(cluster_client):
        assert resolve_placement(devices, None)[1] is cluster_client
        assert resolve_placement("cpu", None)[1] is None
        assert resolve_placement("inline", None)[0].is_inline


def test_a_current_client_that_leaves_gpus_unused_is_warned_of(cluster_client: Client, two_gpus: pytest.MonkeyPatch) -> None:
    """The warning names the GPUs; passing the client explicitly silences it."""
    with cluster_client.as_current(), pytest.warns(UserWarning, match=r"leaves cuda:0, cuda:1 of this machine unused"):
        assert len(resolve_placement("auto", None)[0].devices) == 2
    with as_current(cluster_client):
        resolve_placement("auto", cluster_client)


def test_gpus_come_first_and_have_their_own_memory(two_gpus: pytest.MonkeyPatch) -> None:
    """Without a client the devices are this machine's; a CPU worker's memory is its share of the host's."""
    placement, _ = resolve_placement(["cuda:1", "cpu"], None)
    assert [d.name for d in placement.devices] == ["cuda:1", "cpu:0"]
    assert placement.memory_limits == (15 << 30, memory_per_worker(2, inspect_machine().memory_nbytes))
    assert get_task_restriction(placement, 0) == {"resources": {resource_name("cuda:1"): 1}}


def test_gpus_that_torch_cannot_use_are_an_error(two_gpus: pytest.MonkeyPatch) -> None:
    """CPUs do not replace them silently."""
    two_gpus.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match="this torch is a CPU-only build"):
        resolve_placement("auto", None)


def test_inline_is_this_process_with_all_of_its_memory() -> None:
    """Nothing starts, and no worker is queried."""
    placement, _ = resolve_placement("inline", None)
    machine = inspect_machine()
    assert [(d.label, d.memory_nbytes) for d in placement.devices] == [(machine.cpu_label, machine.memory_nbytes)]


def test_the_default_cluster_is_requested_by_what_pins_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs are requested by UUID, so that the plan's GPU is used; the cluster starts only when its client is opened."""
    requested: list[list[str]] = []

    @contextlib.contextmanager
    def acquire_client(devices: list[str]) -> Iterator[str]:
        requested.append(devices)
        yield "client"

    monkeypatch.setattr(default_cluster, "acquire_client", acquire_client)
    placement = Placement((Device("cuda:1", "cuda", 1, uuid="GPU-1"), Device("cpu:0", "cpu", 0)))
    assert requested == []
    with open_client(placement, None) as opened:
        assert (opened, requested) == ("client", [["GPU-1", "cpu"]])


@pytest.mark.slow
def test_a_worker_that_dies_during_the_query_is_skipped(
    foreign: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call continues without its device."""
    sign, describe = tmp_path / "sign", current_device.describe_worker_device

    def first_dies(dask_worker: Worker) -> Device:
        with contextlib.suppress(FileExistsError):
            sign.touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
        return describe(dask_worker)

    monkeypatch.setattr(current_device, "describe_worker_device", first_dies)
    assert len(resolve_placement("auto", foreign)[0].devices) == 1
    wait_until(lambda: len(fetch_workers(foreign)) == 2, 60)


@pytest.mark.parametrize("given", ["tcp://127.0.0.1:8786", 3])
def test_other_types_than_a_client_are_an_error(given: Any) -> None:
    """For an address or a cluster, the message says how to make a client."""
    with pytest.raises(
        ClusterError, match=r"client must be a distributed\.Client, got a (str|int)\. Make one from .*: Client\(cluster\)"
    ):
        di.predict(np.negative, np.zeros(3), client=given)


@pytest.mark.parametrize("devices", ["cpu", ["auto"], "inline"])
def test_devices_and_a_client_together_are_an_error(devices: str, cluster_client: Client) -> None:
    """The client's workers are the devices already."""
    with pytest.raises(DeviceError, match="conflicts with client=, whose workers are the devices"):
        resolve_placement(devices, cluster_client)


def test_a_client_that_cannot_compute_is_an_error() -> None:
    """The message says whether it has no workers, is closed or is asynchronous, and how to fix it."""
    address = {"dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=0, processes=False, dashboard_address=None, scheduler_kwargs=address) as empty:
        with (
            Client(empty, set_as_default=False) as client,
            pytest.raises(ClusterError, match=r"the cluster at .* has no workers\. Start one"),
        ):
            resolve_placement("auto", client)
        with pytest.raises(ClusterError, match="must be running and synchronous, but it is closed"):
            resolve_placement("auto", client)

        async def asynchronous() -> None:
            async with Client(empty.scheduler_address, asynchronous=True, set_as_default=False) as client:
                with pytest.raises(ClusterError, match="must be running and synchronous, but it is asynchronous"):
                    resolve_placement("auto", client)

        import asyncio

        asyncio.run(asynchronous())


@contextlib.contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a ``dask`` command within the context."""
    with subprocess.Popen([sys.executable, "-m", "dask", *words], stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.mark.slow
def test_an_external_cluster_works_with_a_device_per_worker(tmp_path: Path) -> None:
    """With ``dask scheduler`` and ``dask worker``, each worker is one CPU with Dask's threads, placed by its address."""
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
        placement, _ = resolve_placement("auto", client)
        assert [(d.name, d.kind, d.memory_nbytes) for d in placement.devices] == [
            ("theirs-1", "cpu", 1 << 30),
            ("theirs-2", "cpu", 1 << 30),
        ]
        assert get_task_restriction(placement, 1) == {"workers": [placement.addresses[1]]}
        x = np.arange(100, dtype="float32")
        y, report = di.predict(np.sqrt, x, client=client, device_weights=[1, 3], batch_size=5, return_report=True)
        np.testing.assert_array_equal(y, np.sqrt(x))
        assert [(d.device, d.n_rows) for d in report.devices] == [("theirs-1", 25), ("theirs-2", 75)]


def test_free_memory_of_a_gpu_counts_before_all_of_it() -> None:
    """If it is unknown the total counts, and 0 if that is unknown too."""
    gpu = Device("cuda:0", "cuda", 0, memory_nbytes=16, free_nbytes=5)
    known = [gpu, replace(gpu, free_nbytes=0), replace(gpu, free_nbytes=0, memory_nbytes=0)]
    assert Placement(tuple(known)).memory_limits == (5, 16, 0)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["scheduler", "worker"])
def test_a_cluster_without_daskinfer_is_an_error(tmp_path: Path, who: str) -> None:
    """The error names the scheduler or worker that cannot import it, the reason and the fix."""
    lacks = {"lacks" if who == "scheduler" else "worker_lacks": "daskinfer"}
    with external_cluster(tmp_path, **lacks) as (client, _):
        match = rf"{who} tcp://127\.0\.0\.1:\d+ cannot import daskinfer: No module named 'daskinfer'\. Install"
        with pytest.raises(ClusterError, match=match):
            di.predict(abs, np.ones(3), client=client)
