from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import ClassVar

import dask
import psutil
import pytest
from distributed import Client

from daskinfer.cluster import process_cluster
from daskinfer.cluster.placement import fetch_workers
from daskinfer.cluster.process_cluster import DefaultCluster
from daskinfer.cluster.shutdown import _is_running
from daskinfer.execution.result_buffers import result_pool
from tests.conftest import wait_until

slow = pytest.mark.slow  # a test that starts clusters of its own

ONE = ["cpu"]


@pytest.fixture(scope="module")
def default() -> Iterator[DefaultCluster]:
    """A default cluster of one CPU worker, closed with this file."""
    default = DefaultCluster()
    with default.acquire_client(ONE):
        pass
    yield default
    default.close()


def nannies(client: Client) -> list[psutil.Process]:
    """List the processes of a client's cluster."""
    return [process for nanny in client.cluster.workers.values() for process in nanny.list_processes()]


def gone(processes: list[psutil.Process]) -> bool:
    """Whether none of the processes is running."""
    return not any(map(_is_running, processes))


@slow
def test_the_same_devices_find_the_same_cluster(default: DefaultCluster) -> None:
    """The second call starts nothing, and nested calls share the cluster."""
    with default.acquire_client(ONE) as first, default.acquire_client(ONE) as inner:
        assert first is inner
    with default.acquire_client(ONE) as second:
        assert second is first
        assert second.submit(sum, [1, 2]).result() == 3


@slow
def test_it_is_running_for_the_devices_requested_last(default: DefaultCluster) -> None:
    """It has a cluster of the devices requested last, and none of others; a new object has none."""
    with default.acquire_client(ONE):
        assert default.is_running(ONE)
    assert default.is_running(tuple(ONE))
    assert not default.is_running(["cpu", "cpu"])
    assert not DefaultCluster().is_running(ONE)


@slow
def test_the_callers_dask_settings_do_not_change(default: DefaultCluster) -> None:
    """Neither the current client nor the configuration changes, during a call and after it."""
    config = repr(dask.config.config)
    with default.acquire_client(ONE):
        assert repr(dask.config.config) == config
        with pytest.raises(ValueError, match="No clients found"):
            Client.current()


@slow
def test_the_last_call_to_finish_closes_a_cluster_in_use() -> None:
    """close() and other devices take it from later calls, not from running ones; then the idle timer closes it."""
    default = DefaultCluster(idle_seconds=0.1)
    with default.acquire_client(ONE) as client:
        default.close()
        assert not default.is_running(ONE)
        processes = nannies(client)
        assert client.submit(sum, [1, 2]).result() == 3
        with default.acquire_client(["cpu", "cpu"]) as other:
            assert other is not client
            assert len(fetch_workers(other)) == 2
            assert not gone(processes)
            others = nannies(other)
    assert gone(processes)
    wait_until(lambda: gone(others))
    default.close()


@slow
def test_other_devices_and_a_dead_nanny_replace_the_cluster() -> None:
    """A cluster that no call uses is replaced if the devices differ, or if it cannot restart its worker."""
    default = DefaultCluster()
    try:
        with default.acquire_client(ONE) as first:
            processes = nannies(first)
        processes[0].kill()
        wait_until(lambda: gone(processes))
        wait_until(lambda: not default.is_running(ONE))
        with default.acquire_client(ONE) as second:
            assert second.submit(sum, [1, 2]).result(timeout=30) == 3
        assert first.status == "closed"
    finally:
        default.close()
    assert second.status == "closed"


@slow
def test_the_idle_timer_stops_while_a_call_runs(default: DefaultCluster) -> None:
    """Only the time between calls is idle."""
    with default.acquire_client(ONE):
        pass
    assert default._current is not None
    timer = default._current._idle_timer
    assert timer is not None
    with default.acquire_client(ONE):
        wait_until(lambda: not timer.is_alive())
        assert default._current._idle_timer is None


@slow
def test_a_client_that_cannot_connect_leaves_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the cluster starts and its client does not, the cluster is closed."""

    def fails(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(process_cluster, "Client", fails)
    with pytest.raises(OSError, match="no route"), DefaultCluster().acquire_client(["cpu"]):
        pass


@slow
def test_a_failed_start_leaves_nothing_running() -> None:
    """The error reaches the caller, and there is no current cluster afterwards."""
    default = DefaultCluster()
    with pytest.raises(ValueError, match="unknown device 'tpu'"), default.acquire_client(["tpu"]):
        pass
    default.close()
    assert default._current is None


class FakeCluster:
    """Stands for a cluster, and for its client; it appends what happens to it to a log."""

    status, is_healthy = "running", True
    log: ClassVar[list[str]] = []

    def __init__(self, what: object, **_: object) -> None:
        self.name = "client" if isinstance(what, FakeCluster) else "cluster"

    def close(self) -> None:
        self.log.append(f"{self.name} closed")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Start fake clusters; the log of what happens to them."""
    monkeypatch.setattr(FakeCluster, "log", [])
    for name in ("LocalDeviceCluster", "Client"):
        monkeypatch.setattr(process_cluster, name, FakeCluster)
    return FakeCluster.log


def test_release_callbacks_run_each_time_a_cluster_closes(log: list[str]) -> None:
    """They run before the client closes, only once no call uses the cluster, and for each cluster anew."""
    default = DefaultCluster()
    default.add_release_callback(lambda: log.append("released"))
    for _ in range(2):
        with default.acquire_client(ONE):
            default.close()
            assert log == []
        assert log == ["released", "client closed", "cluster closed"]
        log.clear()
    default.close()
    assert log == []


def test_a_release_callback_that_fails_stops_neither_the_others_nor_the_closing(log: list[str]) -> None:
    """Its error reaches the caller after the cluster has closed."""

    def fail() -> None:
        raise LookupError("mine")

    default = DefaultCluster()
    for callback in (lambda: log.append("first"), fail, lambda: log.append("last")):
        default.add_release_callback(callback)
    with pytest.raises(LookupError, match="mine"), default.acquire_client(ONE):
        default.close()
    assert sorted(log[:2]) == ["first", "last"]
    assert log[2:] == ["client closed", "cluster closed"]


def test_the_cluster_package_does_not_import_execution() -> None:
    """Importing the default cluster in a new process loads nothing of the layer above."""
    code = (
        "import sys, daskinfer.cluster.process_cluster; "
        "print([name for name in sys.modules if name.startswith('daskinfer.execution')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_result_buffers_are_released_with_the_default_cluster() -> None:
    """The pool of result buffers is registered with the cluster that keeps it."""
    assert result_pool.release in process_cluster.default_cluster._release_callbacks


GUARDLESS = """
    import daskinfer as di
    open("runs", "a").write("once ")
    print(di.predict(abs, [-1.0, 2.0], devices="cpu").tolist())
"""


def python(*words: str, code: str = "", error: int = 0) -> subprocess.CompletedProcess[str]:
    """Run Python in the working directory with code on its standard input, and check its exit code."""
    environment = {**os.environ, "DASKINFER_TEST": "1"}
    command = [sys.executable, *words]
    done = subprocess.run(command, input=dedent(code), env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == error, done.stderr
    return done


def by_file() -> subprocess.CompletedProcess[str]:
    """``python script.py``, with neither dask-cuda nor CuPy to import."""
    for name in ("dask_cuda", "cupy"):
        Path(f"{name}.py").write_text("raise ImportError('not here')\n")
    Path("script.py").write_text(dedent(GUARDLESS))
    return python("script.py")


def by_command() -> subprocess.CompletedProcess[str]:
    """``python -c``."""
    return python("-c", dedent(GUARDLESS))


def by_input() -> subprocess.CompletedProcess[str]:
    """``python -`` with the code on standard input."""
    return python("-", code=GUARDLESS)


def by_module() -> subprocess.CompletedProcess[str]:
    """``python -m package``."""
    Path("package").mkdir()
    Path("package/__init__.py").touch()
    Path("package/__main__.py").write_text(dedent(GUARDLESS))
    return python("-m", "package")


@slow
@pytest.mark.parametrize("run", [by_file, by_command, by_input, by_module])
def test_a_script_without_a_main_guard_works(run: Callable[[], subprocess.CompletedProcess[str]], in_folder: Path) -> None:
    """It prints its result and nothing else, exits with 0 without closing anything, and its top level runs once."""
    done = run()
    assert (done.stdout, done.stderr) == ("[1.0, 2.0]\n", "")
    assert Path("runs").read_text() == "once "


@slow
def test_an_error_in_a_script_is_its_only_traceback(in_folder: Path) -> None:
    """The cluster closes afterwards without printing anything."""
    done = python("-", code=GUARDLESS + "    raise LookupError('mine')\n", error=1)
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.endswith("LookupError: mine\n")
    assert len(done.stderr.splitlines()) <= 4


@slow
def test_a_current_client_and_a_cluster_left_open_end_with_the_script(in_folder: Path) -> None:
    """The script exits cleanly without closing either."""
    code = """
        import daskinfer as di
        cluster = di.LocalDeviceCluster("cpu")
        client = cluster.get_client()
        print(di.predict(abs, [-1.0]).tolist())
    """
    done = python("-", code=code)
    assert (done.stdout, done.stderr) == ("[1.0]\n", "")


COMPUTING = """
    import os, time, psutil, numpy
    import daskinfer as di

    def slow(rows):
        if rows[0]:
            open(os.environ["SIGN"], "w").close()
        time.sleep(float(rows[0]))
        return rows

    di.predict(slow, [0.0], devices="cpu", output=numpy.empty((0,), "float32"))
    print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)
    di.predict(slow, [100.0], devices="cpu", output=numpy.empty((0,), "float32"))
"""


@contextlib.contextmanager
def computing() -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """Run a script up to the middle of a chunk, in its own process group; yield it and the processes it started."""
    command = [sys.executable, "-c", dedent(COMPUTING)]
    pipe, sign = subprocess.PIPE, Path(tempfile.mkdtemp(), "sign")
    environment = os.environ | {"SIGN": str(sign)}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=environment) as script:
        assert script.stdout is not None
        processes = [psutil.Process(int(pid)) for pid in script.stdout.readline().split()]
        assert len(processes) >= 2
        wait_until(sign.exists)
        shutil.rmtree(sign.parent)
        yield script, processes


@slow
def test_killing_the_client_ends_its_workers() -> None:
    """After SIGKILL in the middle of a chunk, nannies and workers exit within seconds."""
    before = set(Path(tempfile.gettempdir()).glob("daskinfer-*"))
    with computing() as (script, processes):
        script.kill()
        wait_until(lambda: gone(processes), 10)
    for folder in set(Path(tempfile.gettempdir()).glob("daskinfer-*")) - before:
        shutil.rmtree(folder)  # its owner was killed


@slow
def test_ctrl_c_is_one_traceback_of_the_script() -> None:
    """Sent twice to the whole process group, as a terminal does: workers print nothing, and all processes exit."""
    with computing() as (script, processes):
        os.killpg(script.pid, signal.SIGINT)
        assert script.stderr is not None
        assert "send it again to abort" in script.stderr.readline()
        os.killpg(script.pid, signal.SIGINT)
        _, stderr = script.communicate(timeout=30)
        assert script.returncode in (-signal.SIGINT, 130, 1)
        wait_until(lambda: gone(processes), 10)
    assert stderr.count("Traceback (most recent call last)") <= 2
    assert "distributed." not in stderr.replace("/distributed/", "")
    error, note = stderr.splitlines()[-2:]
    assert "Interrupted: Ctrl-C ended the call" in error
    assert note.startswith("0 of ")
    assert len(stderr.splitlines()) < 60


@slow
def test_a_forked_child_leaves_the_parents_cluster_alone() -> None:
    """It does not use the cluster, and its exit, with all exit handlers, does not close it."""
    code = """
        import os, sys, gc, time
        import daskinfer as di
        from daskinfer.cluster.process_cluster import default_cluster
        cluster = di.LocalDeviceCluster("cpu")
        with default_cluster.acquire_client(["cpu"]) as client:
            pass
        child = os.fork()
        if not child:
            assert default_cluster._current is None
            assert default_cluster._parent_cluster is not None
            del cluster
            gc.collect()
            sys.exit(0)
        began = time.monotonic()
        assert os.waitpid(child, 0)[1] == 0
        assert time.monotonic() - began < 30
        with default_cluster.acquire_client(["cpu"]) as again:
            assert again is client
            print(again.submit(sum, [1, 2]).result(timeout=10), cluster.is_healthy)
    """
    done = python("-c", dedent(code))
    assert (done.stdout, done.stderr) == ("3 True\n", "")


@slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # zmq's and ipykernel's own
def test_it_works_in_a_notebook(in_folder: Path) -> None:
    """A model of a class defined in the notebook runs on a worker, and a cluster displays as HTML."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    cells = [
        "import torch, daskinfer as di\nclass Net(torch.nn.Module):\n    def forward(self, x): return 2 * x",
        "di.predict(Net(), torch.ones(3), devices='cpu').tolist()",
        "di.close()\nwith di.LocalDeviceCluster('cpu') as cluster: html = cluster._repr_html_()\n'DeviceCluster' in html",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    ran = nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    results = [output for cell in ran.cells for output in cell.outputs if output.output_type == "execute_result"]
    assert [o["data"]["text/plain"] for o in results] == ["[2.0, 2.0, 2.0]", "True"]
