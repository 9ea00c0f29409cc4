"""Fixtures that every test file shares, and the one that counts what a test leaves behind."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import psutil
import pytest

if TYPE_CHECKING:
    from distributed import Client

# How long an example takes is the machine's business.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Pools that dask, distributed, asyncio and torch keep for the whole process, whatever uses them.
KEPT_THREADS = (
    "Dask-Offload",
    "Dask-Default-Threads",
    "TCP-Executor",
    "ThreadPoolExecutor",
    "asyncio_",
    "Profile",
    "AsyncProcess",
    "IO loop",
    "Dask-Callback-Thread",
    "waitpid-",
    "pytest_timeout",
    "tqdm_monitor",
    "QueueFeederThread",
    "zarr_",
)
FREE_PORT = {"dashboard_address": "127.0.0.1:0"}  # of a plain scheduler; without it 8787, which another session may have
LEAVE_SECONDS = 20.0  # a killed worker's kernel clean-up on a busy machine

_SHARED = Path("/dev/shm")
_NEW_MOUNTS, _RECURSIVE, _PRIVATE = 0x20000, 0x4000, 1 << 18  # CLONE_NEWNS, MS_REC and MS_PRIVATE of Linux
_shared_memory_is_private = False


def pytest_configure(config: pytest.Config) -> None:
    """Give this session folders of its own, so that it counts only its own files: others may run at the same time."""
    folder = tempfile.mkdtemp(prefix="test-session-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    global _shared_memory_is_private
    _shared_memory_is_private = _mount_private_shared_memory()


def _mount_private_shared_memory() -> bool:
    """Give this process and its children a ``/dev/shm`` of their own; False without the right to mount."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare") or not _SHARED.is_dir() or libc.unshare(_NEW_MOUNTS):
        return False
    libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None)
    return not libc.mount(b"tmpfs", bytes(_SHARED), b"tmpfs", 0, None)


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Poll until ``condition()`` holds; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def _is_kept(path: Path) -> bool:
    """Whether it is the user's folder for networks that are shipped to clusters of others."""
    return path.name == f"daskinfer-{os.getuid()}"


def _left_behind() -> dict[str, set[object]]:
    here = psutil.Process()
    temporary = Path(tempfile.gettempdir())
    return {
        "processes": {p.pid for p in here.children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE},
        "threads": {t.name for t in threading.enumerate() if not t.name.startswith(KEPT_THREADS)},
        "ports": {c.laddr.port for c in here.net_connections("tcp") if c.status == psutil.CONN_LISTEN},
        "temporary files": {p for p in temporary.iterdir() if p.name.startswith("daskinfer") and not _is_kept(p)},
        "shared memory": _list_shared_memory(),
    }


def _list_shared_memory() -> set[object]:
    """List what this session may have made in ``/dev/shm``; if others share it, only what is named after daskinfer."""
    found = _SHARED.iterdir() if _SHARED.is_dir() else ()
    return {path for path in found if _shared_memory_is_private or "daskinfer" in path.name}


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    """Fail a test that leaves a process, thread, port, temporary file or shared memory; wider fixtures come first."""
    before = _left_behind()
    yield
    deadline = time.monotonic() + LEAVE_SECONDS
    while left := {what: new for what, now in _left_behind().items() if (new := now - before[what])}:
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {left}")
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _slow_without_coverage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a slow test starts count no lines: they start in 5 s instead of 8, and quick tests start them too."""
    if request.node.get_closest_marker("slow"):
        monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture(autouse=True)
def _forget_throughput() -> None:
    """What one test measured of a model does not change the tasks of the next."""
    if module := sys.modules.get("daskinfer.scheduling.throughput_history"):
        module.history.clear()


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """The command sets the log up for its process, which is that of the tests here."""
    loggers = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    before = [(one, one.handlers[:], one.level) for one in loggers]
    for handler in logging.root.handlers:
        handler.setLevel(logging.NOTSET)  # Dask silences handlers for as long as a cluster of the session is open
    yield
    logging.captureWarnings(False)
    for one, handlers, level in before:
        one.handlers[:] = handlers
        one.setLevel(level)


@pytest.fixture
def in_folder(tmp_path: Path) -> Iterator[Path]:
    """Work in an empty folder."""
    before = os.getcwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


@pytest.fixture(scope="session")
def cluster_client() -> Iterator[object]:
    """A client of one LocalDeviceCluster of two CPU workers for all tests that bring their own client."""
    from distributed import Client

    import daskinfer as di

    with di.LocalDeviceCluster("cpu*2") as cluster, Client(cluster, set_as_default=False) as client:
        yield client


@pytest.fixture(scope="module")
def tracker() -> None:
    """The process that multiprocessing keeps beside this one, started before a test counts processes."""
    resource_tracker.ensure_running()


@pytest.fixture
def foreign(tracker: None) -> Iterator[Client]:
    """A client of a Dask cluster of two processes, none of ours, which a test may kill."""
    from distributed import Client, LocalCluster

    how: dict[str, object] = {"threads_per_worker": 1, "processes": True, "dashboard_address": None, "silence_logs": 60}
    how["scheduler_kwargs"] = FREE_PORT
    with LocalCluster(n_workers=2, **how) as cluster, Client(cluster, set_as_default=False) as client:
        yield client


@pytest.fixture
def plain_client() -> Iterator[Client]:
    """A client of a Dask cluster of two workers in this process, none of ours."""
    from distributed import Client

    how: dict[str, object] = {"processes": False, "n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with Client(**how, scheduler_kwargs=FREE_PORT, set_as_default=False) as client:
        yield client


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker reads this process's memory: its rows go through slots, or by Dask's comms."""
    monkeypatch.setattr("daskinfer.cluster.preflight.advertise_process_memory", lambda: None)


@pytest.fixture(scope="session")
def _kept_cluster() -> Iterator[None]:
    """End the cluster that ``two_cpus`` leaves open for the next file of tests."""
    import daskinfer as di

    yield
    di.close()


@pytest.fixture(scope="module")
def two_cpus(_kept_cluster: None) -> list[str]:
    """The cluster that ``predict`` keeps, warm, of ``devices=["cpu", "cpu"]``; files in a row share it."""
    import daskinfer as di

    di.predict(abs, [1.0], devices=["cpu", "cpu"])
    return ["cpu", "cpu"]


def _needs_two_cpus(item: pytest.Item) -> bool:
    return "two_cpus" in getattr(item, "fixturenames", ())


@pytest.fixture(autouse=True, scope="module")
def _without_the_kept_cluster(request: pytest.FixtureRequest) -> None:
    """A file of tests that does not use the kept cluster starts without one."""
    here = [item for item in request.session.items if item.path == request.path]
    if not any(map(_needs_two_cpus, here)) and (module := sys.modules.get("daskinfer.cluster.process_cluster")):
        module.default_cluster.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that share the kept cluster beside each other."""
    sharing = {item.path for item in items if _needs_two_cpus(item)}
    items.sort(key=lambda item: item.path not in sharing)
