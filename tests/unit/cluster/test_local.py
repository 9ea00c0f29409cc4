from __future__ import annotations

import copy
import gc
import importlib.abc
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import Client, Status
from distributed.client import get_client

import daskinfer as di
from daskinfer.cluster import local, shutdown
from daskinfer.cluster.placement import fetch_workers
from daskinfer.cluster.worker_spec import LOOPBACK, memory_per_worker, resource_name
from daskinfer.core import files
from daskinfer.core.env import MAX_TASKS_IN_FLIGHT
from daskinfer.errors import ClusterError, DeviceError, OptionError
from daskinfer.hardware.discovery import Device, inspect_machine
from tests.conftest import wait_until


def read_settings() -> dict[str, Any]:
    """Read the settings of the caller's process that a cluster must not change."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    config = copy.deepcopy(dask.config.config)
    return {"environment": dict(os.environ), "config": config, "handlers": handlers, "path": [*sys.path]}


@pytest.fixture(scope="module")
def before() -> dict[str, Any]:
    """The caller's settings before the module's cluster starts."""
    found = read_settings()
    found["environment"].pop("PYTEST_CURRENT_TEST")
    return found


@pytest.fixture(scope="module")
def cluster(before: dict[str, Any]) -> Iterator[di.LocalDeviceCluster]:
    """One cluster for all tests that do not change it."""
    with di.LocalDeviceCluster(["cpu", "CPU"]) as started:
        yield started


@pytest.fixture(scope="module")
def client(cluster: di.LocalDeviceCluster) -> Iterator[Client]:
    """A client that is not Dask's current one."""
    with Client(cluster, set_as_default=False) as connected:
        yield connected


def workers(client: Client) -> dict[str, Any]:
    """Return the scheduler's record of each worker, by name."""
    return {info["name"]: info for info in fetch_workers(client).values()}


def list_processes(cluster: di.LocalDeviceCluster) -> list[psutil.Process]:
    """List all processes that a cluster started."""
    return [process for nanny in cluster.workers.values() for process in nanny.list_processes()]


def gone(processes: list[psutil.Process]) -> bool:
    """Whether none of the processes is running."""
    return not any(shutdown._is_running(process) for process in processes)


def test_the_callers_process_keeps_its_settings(
    before: dict[str, Any], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Environment, module path, Dask's configuration, signal handlers and current client do not change."""
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    assert read_settings() == before
    with pytest.raises(ValueError, match="No global client found"):
        get_client(timeout=0)


def test_it_is_a_dask_cluster_like_any_other(cluster: di.LocalDeviceCluster) -> None:
    """Clients connect to it or come from it, and it has the attributes of Dask's clusters."""
    with Client(cluster) as one, cluster.get_client() as two:
        assert one.submit(sum, [1, 2]).result() == two.submit(sum, [2, 1]).result() == 3
        assert Client.current() is two
    with Client(cluster.scheduler_address, set_as_default=False) as three:
        assert len(workers(three)) == 2
    assert cluster.status is Status.running
    assert "cpu:0, cpu:1; tcp://127.0.0.1:" in repr(cluster)
    assert "LocalDeviceCluster" in cluster._repr_html_()
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = cluster.no_such_thing


def test_the_dashboard_answers(cluster: di.LocalDeviceCluster) -> None:
    """The link opens Dask's status page."""
    with urllib.request.urlopen(cluster.dashboard_link, timeout=30) as page:
        assert b"<title>Dask" in page.read()


def test_every_device_is_one_worker_with_its_resource_and_share_of_memory(
    cluster: di.LocalDeviceCluster, client: Client
) -> None:
    """A worker is named after its device, runs one chunk at a time, and gets an equal share of nine tenths of the memory."""
    assert [d.name for d in cluster.devices] == ["cpu:0", "cpu:1"]
    here = inspect_machine().memory_nbytes
    for name in ("cpu:0", "cpu:1"):
        info = workers(client)[name]
        assert info["resources"] == {resource_name(name): MAX_TASKS_IN_FLIGHT}
        assert info["nthreads"] == MAX_TASKS_IN_FLIGHT
        assert info["memory_limit"] == memory_per_worker(2, here) == int(here * 0.9) // 2


def test_a_cpu_worker_sees_no_gpu_and_computes_with_one_thread(client: Client) -> None:
    """CUDA_VISIBLE_DEVICES is empty before Python starts, and torch uses one thread."""

    def inspect() -> tuple[Any, ...]:
        import os

        import torch

        from daskinfer.worker.current_device import current_device

        here = current_device()
        with here.limit_threads():
            return os.environ["CUDA_VISIBLE_DEVICES"], here.device, str(here.torch_device), torch.get_num_threads()

    asked = [client.submit(inspect, pure=False, resources={resource_name(f"cpu:{i}"): 1}) for i in range(2)]
    assert client.gather(asked) == [("", "cpu:0", "cpu", 1), ("", "cpu:1", "cpu", 1)]


def test_a_task_that_kills_its_worker_is_reported_after_one_death(cluster: di.LocalDeviceCluster) -> None:
    """The scheduler retries nothing on its own."""
    assert cluster.scheduler.allowed_failures == 0


def test_everything_listens_on_loopback_only(cluster: di.LocalDeviceCluster) -> None:
    """Scheduler, dashboard, nannies and workers cannot be reached from outside."""
    here = [psutil.Process(), *list_processes(cluster)]
    listening = [c.laddr.ip for p in here for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert len(listening) >= 6
    assert set(listening) == {LOOPBACK}


def test_private_names_are_not_forwarded(cluster: di.LocalDeviceCluster) -> None:
    """Only public names are forwarded to the wrapped Dask cluster."""
    with pytest.raises(AttributeError, match="_lock"):
        cluster._lock  # noqa: B018  # the attribute access is what is tested


def test_a_process_that_exits_during_the_check_is_not_running() -> None:
    """A process may exit between two calls of psutil."""

    class Ending:
        def is_running(self) -> bool:
            return True

        def status(self) -> str:
            raise psutil.NoSuchProcess(1)

    assert not shutdown._is_running(Ending())


def test_scaling_is_an_error(cluster: di.LocalDeviceCluster) -> None:
    """The workers are the devices, so there can be neither more nor fewer."""
    for scale in (lambda: cluster.scale(3), lambda: cluster.adapt(minimum=0, maximum=2)):
        with pytest.raises(ClusterError, match="cannot scale this cluster: it has one worker for each of cpu:0, cpu:1"):
            scale()


def test_closing_ends_stopped_processes_too() -> None:
    """A worker and a nanny that do not respond are killed within the deadline; port, loop and folder go as well."""
    cluster = di.LocalDeviceCluster("cpu*2", dashboard_address=None)
    assert cluster.dashboard_link == ""
    nannies = list(cluster.workers.values())
    processes = list_processes(cluster)
    one_worker = next(p for p in nannies[0].list_processes() if "multiprocessing-fork" in " ".join(p.cmdline()))
    one_worker.suspend()
    psutil.Process(nannies[1].process.pid).suspend()
    began = time.monotonic()
    cluster.close()
    assert time.monotonic() - began < 10
    assert gone(processes)
    assert not cluster.is_healthy
    assert repr(cluster) == "LocalDeviceCluster(cpu:0, cpu:1; closed)"
    cluster.close()


def test_closing_in_less_time_than_it_takes_still_ends_list_processes(caplog: pytest.LogCaptureFixture) -> None:
    """After the deadline the remaining processes are killed, with a warning, and the scheduler stops too."""
    cluster = di.LocalDeviceCluster("cpu")
    processes = list_processes(cluster)
    processes[0].suspend()
    with caplog.at_level(logging.WARNING, "daskinfer"):
        cluster.close(timeout=0.1)
    assert "closing the cluster failed" in caplog.text
    wait_until(lambda: gone(processes))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["here", "loop"])
def test_an_unreferenced_cluster_closes(where: str) -> None:
    """It closes when its last reference is dropped, even if garbage collection runs on the cluster's own event loop."""
    holder = [di.LocalDeviceCluster("cpu")]
    processes, loop = list_processes(holder[0]), holder[0].loop
    if where == "here":
        holder.clear()
        gc.collect()
    else:
        done = threading.Event()
        loop.add_callback(lambda: (holder.clear(), gc.collect(), done.set()))
        assert done.wait(10)
    wait_until(lambda: gone(processes))


def test_an_exception_inside_with_closes_the_cluster() -> None:
    """The block's own error reaches the caller; here it is Ctrl-C."""
    processes = []

    def interrupted() -> None:
        with di.LocalDeviceCluster("cpu") as cluster:
            processes.extend(list_processes(cluster))
            raise KeyboardInterrupt("now")

    with pytest.raises(KeyboardInterrupt, match="now"):
        interrupted()
    assert processes
    assert gone(processes)


def test_workers_that_start_too_late_are_an_error_and_leave_nothing() -> None:
    """The message names the devices and the timeout."""
    with pytest.raises(ClusterError, match=r"the workers of cpu:0, cpu:1 did not start: .*start_timeout=0\.05 s"):
        di.LocalDeviceCluster("cpu*2", start_timeout=0.05)


def test_a_worker_that_cannot_import_torch_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a worker is found while the cluster starts, and is part of the message."""
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ClusterError, match="ImportError: this torch is broken"):
        di.LocalDeviceCluster("cpu")


def children() -> set[int]:
    """Process IDs of this process's own children."""
    return {process.pid for process in psutil.Process().children()}


def folders() -> set[Path]:
    """The scratch folders of all clusters."""
    return set(Path(tempfile.gettempdir()).glob("daskinfer-*"))


@pytest.mark.parametrize("sign", [folders, children])
def test_ctrl_c_while_it_starts_leaves_nothing(sign: Callable[[], set[Any]]) -> None:
    """An interrupted constructor returns no cluster to close, so it stops the scheduler and workers that it started."""
    before = sign()

    def interrupt() -> None:
        wait_until(lambda: sign() - before)
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        di.LocalDeviceCluster("cpu")
    interrupter.join()


class Blocked(importlib.abc.MetaPathFinder):
    """Rejects imports that only GPUs need."""

    def find_spec(self, name: str, *_: Any) -> None:
        assert name.split(".")[0] not in ("dask_cuda", "cupy", "rmm", "cudf"), f"{name} is not needed here"


@pytest.mark.slow
def test_without_gpus_no_cuda_package_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of CPUs needs neither dask-cuda nor CuPy, and "auto" means CPUs without a GPU."""
    monkeypatch.setattr("sys.meta_path", [Blocked(), *sys.meta_path])
    machine = replace(inspect_machine(), gpus=(), n_cores=2)
    monkeypatch.setattr(local, "inspect_machine", lambda: machine)
    with di.LocalDeviceCluster() as cluster:
        assert [d.name for d in cluster.devices] == ["cpu:0", "cpu:1"]


REFUSED: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "a cluster needs CPU or GPU devices, got 'inline'": (ClusterError, {"devices": "inline"}),
    "unknown device 'tpu'": (DeviceError, {"devices": "tpu"}),
    "threads_per_worker must be an integer >= 1 or 'auto', got 0": (OptionError, {"threads_per_worker": 0}),
    "threads_per_worker must be .* got True": (OptionError, {"threads_per_worker": True}),
    r"memory_limit must be an integer >= 1 \(bytes\) or 'auto', got '4GB'": (OptionError, {"memory_limit": "4GB"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_invalid_arguments_are_errors_before_anything_starts(message: str) -> None:
    """There is no process and no folder, and the message names what is allowed."""
    error, arguments = REFUSED[message]
    with pytest.raises(error, match=message):
        di.LocalDeviceCluster(**{"devices": "cpu", **arguments})


CPU, GPU = Device("cpu:0", "cpu", 0), Device("cuda:0", "cuda", 0)


@pytest.mark.parametrize(
    ("devices", "n_cores", "n_threads"),
    [([CPU], 8, 8), ([CPU, CPU], 9, 4), ([CPU] * 4, 2, 1), ([GPU, GPU, CPU, CPU], 8, 3), ([GPU] * 4, 2, 1)],
)
def test_auto_threads_divide_the_cores_that_gpu_workers_do_not_use(
    devices: list[Device], n_cores: int, n_threads: int
) -> None:
    """Each GPU worker gets a core, CPU workers divide the rest evenly, and each has at least one thread."""
    assert local._resolve_n_threads("auto", devices, n_cores) == n_threads
    assert local._resolve_n_threads(3, devices, n_cores) == 3


def test_memory_is_given_in_bytes_or_divided() -> None:
    """A number is used as it is, "auto" leaves a tenth to client and scheduler, and unknown memory is no limit."""
    assert local._resolve_memory_limit(1 << 30, 4, 64 << 30) == 1 << 30
    assert local._resolve_memory_limit("auto", 9, 100) == 10
    assert local._resolve_memory_limit("auto", 3, 0) == 0


def test_a_killed_worker_restarts_with_the_same_settings() -> None:
    """The nanny keeps name, resource, threads and memory, and a restart may take longer than Dask waits for workers."""

    def inspect() -> tuple[int, int]:
        import os

        import torch

        from daskinfer.worker.current_device import current_device

        with current_device().limit_threads():
            return os.getpid(), torch.get_num_threads()

    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "10ms"}),
        di.LocalDeviceCluster("cpu", threads_per_worker=3, memory_limit=1 << 30) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        pid, n_threads = client.submit(inspect, pure=False).result()
        before = workers(client)["cpu:0"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not cluster.scheduler.workers)
        waiting = client.submit(inspect, pure=False, resources={resource_name("cpu:0"): 1})
        assert (waiting.result(timeout=60)[1], n_threads) == (3, 3)
        after = workers(client)["cpu:0"]
        assert [after[key] for key in ("resources", "memory_limit")] == [
            {resource_name("cpu:0"): MAX_TASKS_IN_FLIGHT},
            1 << 30,
        ]
        assert after["nanny"] == before["nanny"]
        assert cluster.is_healthy


def test_what_a_killed_process_leaves_late_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a killed client may write into its folder once more after the next one has removed it: it goes again."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = files.ScratchDir()
    (late := tmp_path / "daskinfer-scratch-late").mkdir()
    (late / "a worker's").touch()
    made.remove()
    assert not late.exists()
    assert list(tmp_path.iterdir()) == []
