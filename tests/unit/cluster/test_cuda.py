from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from daskinfer.cluster.worker_spec import memory_per_worker
from daskinfer.core.env import MAX_TASKS_IN_FLIGHT
from daskinfer.hardware.discovery import inspect_machine
from tests.support.nvml_stand_in import build

pytestmark = pytest.mark.slow  # each test starts clusters of up to four workers

pytest.importorskip("dask_cuda", reason="dask-cuda's wheels are for Linux only")

GPU = "GPU-00000000-0000-0000-0000-{:012d}".format

# The only fakes are NVML and a torch that claims to be built for CUDA. Its workers cannot make a CUDA context, which
# dask-cuda only logs.
HEAD = """
    import json, os, signal, sys, time
    import torch
    torch.version.cuda = "13.0"
    import daskinfer as di
    from distributed import Client

    def inspect():
        import os
        from daskinfer.core.env import DEVICE, UUID, THREADS
        names = ["CUDA_VISIBLE_DEVICES", DEVICE, UUID, THREADS]
        return {"pid": os.getpid(), "cores": sorted(os.sched_getaffinity(0)), **{n: os.environ.get(n) for n in names}}

    def look(client):
        values = client.run(inspect)
        infos = client.sync(client.scheduler.identity, n_workers=-1)["workers"]
        return {infos[a]["name"]: {**values[a], **{k: infos[a][k] for k in ("resources", "memory_limit", "nthreads")}}
                for a in values if a in infos}

    def wait_for_workers(client, n):
        deadline = time.monotonic() + 60
        while len(client.sync(client.scheduler.identity, n_workers=-1)["workers"]) != n:
            assert time.monotonic() < deadline
            time.sleep(0.02)
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which NVML reports GPUs."""
    environment = build(tmp_path_factory.mktemp("nvml"))
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    return environment


def run_code(environment: dict[str, str], n_gpus: int, code: str) -> Any:
    """Run code in a new process where NVML reports GPUs; parse its last line as JSON."""
    code = dedent(HEAD) + dedent(code)
    environment = {**environment, "NVML_STAND_IN_DEVICES": str(n_gpus)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Traceback") == done.stderr.count("Unable to start CUDA Context"), done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def mixed(stand_in: dict[str, str]) -> Any:
    """The state of a cluster of two GPU and two CPU workers, before and after a GPU worker is killed."""
    code = """
        environment = dict(os.environ)
        with di.LocalDeviceCluster(["cuda:1", "cpu", "cuda:0", "cpu"], threads_per_worker="auto") as cluster:
            same = dict(os.environ) == environment
            with Client(cluster, set_as_default=False) as client:
                before = look(client)
                os.kill(before["cuda:1"]["pid"], signal.SIGKILL)
                wait_for_workers(client, 3)
                waiting = client.submit(inspect, resources={"daskinfer-cuda:1": 1})
                waited = waiting.result(timeout=60)
                after = look(client)
            import psutil
            here = [psutil.Process(), *psutil.Process().children(recursive=True)]
            ips = sorted({c.laddr.ip for p in here for c in p.net_connections("inet") if c.status == "LISTEN"})
            healthy, devices, text = cluster.is_healthy, [d.name for d in cluster.devices], repr(cluster)
        print(json.dumps([same, before, waited, after, ips, healthy, devices, text, torch.cuda.is_initialized()]))
    """
    names = ("same", "before", "waited", "after", "ips", "healthy", "devices", "text", "initialized")
    return dict(zip(names, run_code(stand_in, 2, code), strict=True))


def test_gpus_and_cpu_workers_are_one_cluster(mixed: Any) -> None:
    """Workers are named after their devices and have a resource each, whatever their kind."""
    assert mixed["devices"] == ["cuda:1", "cpu:0", "cuda:0", "cpu:1"]
    assert mixed["before"].keys() == set(mixed["devices"])
    for name, worker in mixed["before"].items():
        assert worker["resources"] == {f"daskinfer-{name}": MAX_TASKS_IN_FLIGHT}
        assert worker["nthreads"] == MAX_TASKS_IN_FLIGHT
        assert worker["DASKINFER_DEVICE"] == name
    assert "cuda:1, cpu:0, cuda:0, cpu:1; tcp://127.0.0.1:" in mixed["text"]


def test_each_gpu_worker_sees_its_own_gpu_first(mixed: Any) -> None:
    """Workers are pinned by UUID; dask-cuda rotates the other GPUs behind it. CPU workers see none."""
    visible = {name: worker["CUDA_VISIBLE_DEVICES"] for name, worker in mixed["before"].items()}
    assert visible["cuda:0"].split(",")[0] == mixed["before"]["cuda:0"]["DASKINFER_DEVICE_UUID"] == GPU(0)
    assert visible["cuda:1"].split(",")[0] == mixed["before"]["cuda:1"]["DASKINFER_DEVICE_UUID"] == GPU(1)
    assert visible["cpu:0"] == visible["cpu:1"] == ""


def test_memory_and_cores_are_divided_over_both_kinds(mixed: Any) -> None:
    """Four workers get a quarter of nine tenths each; CPU workers share the cores that GPU workers do not use."""
    here = inspect_machine()
    assert {w["memory_limit"] for w in mixed["before"].values()} == {memory_per_worker(4, here.memory_nbytes)}
    n_threads = {name: int(w["DASKINFER_TORCH_THREADS"]) for name, w in mixed["before"].items()}
    assert n_threads["cuda:0"] == n_threads["cuda:1"] == 1
    assert n_threads["cpu:0"] == n_threads["cpu:1"] == max(1, (here.n_cores - 2) // 2)


def test_a_killed_gpu_worker_restarts_on_its_gpu(mixed: Any) -> None:
    """A task that waits for its device runs in the new process, which is pinned to the same GPU."""
    old, new = mixed["before"]["cuda:1"], mixed["after"]["cuda:1"]
    assert mixed["waited"]["pid"] == new["pid"] != old["pid"]
    assert {k: v for k, v in new.items() if k != "pid"} == {k: v for k, v in old.items() if k != "pid"}
    assert mixed["healthy"]


def test_the_client_stays_as_it_was(mixed: Any) -> None:
    """dask-cuda's variables do not stay in it, CUDA is not initialised, and everything listens on loopback."""
    assert mixed["same"] is True
    assert mixed["initialized"] is False
    assert mixed["ips"] == ["127.0.0.1"]


def test_auto_is_every_gpu_that_the_caller_may_see(stand_in: dict[str, str]) -> None:
    """If CUDA_VISIBLE_DEVICES hides one of four, there are three workers; left open, they exit with the script."""
    code = """
        cluster = di.LocalDeviceCluster(memory_limit=1 << 30)
        with Client(cluster, set_as_default=False) as client:
            print(json.dumps(look(client)))
    """
    found = run_code({**stand_in, "CUDA_VISIBLE_DEVICES": "3,0,2"}, 4, code)
    assert {name: w["DASKINFER_DEVICE_UUID"] for name, w in found.items()} == {
        "cuda:0": GPU(0),
        "cuda:1": GPU(2),
        "cuda:2": GPU(3),
    }
    assert all(w["CUDA_VISIBLE_DEVICES"].startswith(w["DASKINFER_DEVICE_UUID"]) for w in found.values())
    assert {w["memory_limit"] for w in found.values()} == {1 << 30}


def test_gpu_workers_that_start_too_late_leave_nothing(stand_in: dict[str, str]) -> None:
    """LocalCUDACluster's constructor raises half-way; its processes are stopped, and the environment does not change."""
    code = """
        import psutil
        environment = dict(os.environ)
        try:
            di.LocalDeviceCluster("cuda,cpu", start_timeout=0.05)
        except di.DaskInferError as error:
            here = psutil.Process()
            ports = [c for c in here.net_connections() if c.status == "LISTEN"]
            left = len(here.children()) + len(ports) + (dict(os.environ) != environment)
            print(json.dumps([type(error).__name__, str(error), left]))
    """
    name, message, left = run_code(stand_in, 2, code)
    assert (name, left) == ("ClusterError", 0)
    assert message.startswith("the workers of cuda:0, cuda:1, cpu:0 did not start: ")


def test_gpus_without_dask_cuda_name_the_extra_to_install(stand_in: dict[str, str]) -> None:
    """The message says how to install it, and nothing keeps running."""
    code = """
        sys.modules["dask_cuda"] = None
        try:
            di.LocalDeviceCluster("cuda")
        except ImportError as error:
            print(json.dumps([type(error).__name__, str(error)]))
    """
    name, message = run_code(stand_in, 1, code)
    assert name == "MissingExtra"
    assert re.search(r'Install it: pip install .*\[cuda13\]" .*, or pip install .*\[cuda12\]"', message)


def test_a_script_without_a_main_guard_works_with_gpus_too(stand_in: dict[str, str], in_folder: Path) -> None:
    """Its top level runs once, not again in each worker, and workers use only the cores that it may use."""
    code = """
        open("runs", "a").write("once ")
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        client = di.LocalDeviceCluster("cuda:0").get_client()
        print(json.dumps([sorted(os.sched_getaffinity(0)), look(client)["cuda:0"]["cores"]]))
    """
    Path("script.py").write_text(dedent(HEAD) + dedent(code))
    done = subprocess.run([sys.executable, "script.py"], env=stand_in, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    client_cores, worker_cores = json.loads(done.stdout)
    assert worker_cores == client_cores
    assert Path("runs").read_text() == "once "
