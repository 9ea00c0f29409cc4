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

import dask
import psutil
import pytest
from distributed import Client

from daskinfer.cluster import process_cluster as room
from daskinfer.cluster.placement import fetch_workers
from daskinfer.cluster.process_cluster import DefaultCluster
from daskinfer.cluster.shutdown import _is_running
from tests.conftest import wait_until

pytestmark = pytest.mark.slow  # each test starts clusters of its own

ONE = ["cpu"]


@pytest.fixture(scope="module")
def kept() -> Iterator[DefaultCluster]:
    """A keeper of one cluster, ended with this file."""
    keeper = DefaultCluster()
    with keeper.acquire_client(ONE):
        pass
    yield keeper
    keeper.close()


def nannies(client: Client) -> list[psutil.Process]:
    """The processes of a client's cluster."""
    return [process for nanny in client.cluster.workers.values() for process in nanny.processes()]


def gone(processes: list[psutil.Process]) -> bool:
    """Whether none of the processes runs any more."""
    return not any(map(_is_running, processes))


def test_the_same_devices_find_the_same_cluster(kept: DefaultCluster) -> None:
    """The second call starts nothing, and calls inside one another share it."""
    with kept.acquire_client(ONE) as first, kept.acquire_client(ONE) as inner:
        assert first is inner
    with kept.acquire_client(ONE) as second:
        assert second is first
        assert second.submit(sum, [1, 2]).result() == 3


def test_what_it_has(kept: DefaultCluster) -> None:
    """It has a cluster of the devices that were asked for last, and none of others; a new keeper has none."""
    with kept.acquire_client(ONE):
        assert kept.is_running(ONE)
    assert kept.is_running(tuple(ONE))
    assert not kept.is_running(["cpu", "cpu"])
    assert not DefaultCluster().is_running(ONE)


def test_the_callers_dask_is_none_of_its_business(kept: DefaultCluster) -> None:
    """Neither the current client nor the configuration changes, inside and after."""
    config = repr(dask.config.config)
    with kept.acquire_client(ONE):
        assert repr(dask.config.config) == config
        with pytest.raises(ValueError, match="No clients found"):
            Client.current()


def test_a_cluster_in_use_is_ended_by_the_last_to_leave() -> None:
    """close() and other devices take it away from later calls, not from the ones that compute; then the clock ends it."""
    keeper = DefaultCluster(idle_seconds=0.1)
    with keeper.acquire_client(ONE) as client:
        keeper.close()
        assert not keeper.is_running(ONE)
        processes = nannies(client)
        assert client.submit(sum, [1, 2]).result() == 3
        with keeper.acquire_client(["cpu", "cpu"]) as other:
            assert other is not client
            assert len(fetch_workers(other)) == 2
            assert not gone(processes)
            others = nannies(other)
    assert gone(processes)
    wait_until(lambda: gone(others))
    keeper.close()


def test_other_devices_and_a_dead_nanny_replace_the_cluster() -> None:
    """A cluster that nobody uses and that does not fit, or cannot bring its worker back, gives way to a new one."""
    keeper = DefaultCluster()
    try:
        with keeper.acquire_client(ONE) as first:
            processes = nannies(first)
        processes[0].kill()
        wait_until(lambda: gone(processes))
        wait_until(lambda: not keeper.is_running(ONE))
        with keeper.acquire_client(ONE) as second:
            assert second.submit(sum, [1, 2]).result(timeout=30) == 3
        assert first.status == "closed"
    finally:
        keeper.close()
    assert second.status == "closed"


def test_the_clock_stops_while_a_call_is_inside(kept: DefaultCluster) -> None:
    """Idle means between calls."""
    with kept.acquire_client(ONE):
        pass
    assert kept._current is not None
    clock = kept._current._idle_timer
    assert clock is not None
    with kept.acquire_client(ONE):
        wait_until(lambda: not clock.is_alive())
        assert kept._current._idle_timer is None


def test_a_client_that_cannot_connect_leaves_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cluster starts and its client does not, the cluster is ended."""

    def fails(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(room, "Client", fails)
    with pytest.raises(OSError, match="no route"), DefaultCluster().acquire_client(["cpu"]):
        pass


def test_a_start_that_fails_leaves_a_keeper_that_works() -> None:
    """The error passes, and nothing is kept of it."""
    keeper = DefaultCluster()
    with pytest.raises(ValueError, match="device 'tpu' is unknown"), keeper.acquire_client(["tpu"]):
        pass
    keeper.close()
    assert keeper._current is None


GUARDLESS = """
    import daskinfer as di
    open("runs", "a").write("once ")
    print(di.predict(abs, [-1.0, 2.0], devices="cpu").tolist())
"""


def python(*words: str, code: str = "", error: int = 0) -> subprocess.CompletedProcess[str]:
    """Run Python in the working directory, code on its standard input, and see that its exit code is right."""
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


@pytest.mark.parametrize("run", [by_file, by_command, by_input, by_module])
def test_a_script_without_a_main_guard_works(run: Callable[[], subprocess.CompletedProcess[str]], in_folder: Path) -> None:
    """It prints its answer and nothing else, ends with 0 without closing anything, and its top level is run once."""
    done = run()
    assert (done.stdout, done.stderr) == ("[1.0, 2.0]\n", "")
    assert Path("runs").read_text() == "once "


def test_an_error_in_a_script_is_its_only_traceback(in_folder: Path) -> None:
    """The cluster ends behind it without a word of its own."""
    done = python("-", code=GUARDLESS + "    raise LookupError('mine')\n", error=1)
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.endswith("LookupError: mine\n")
    assert len(done.stderr.splitlines()) <= 4


def test_a_current_client_and_a_cluster_left_open_end_with_the_script(in_folder: Path) -> None:
    """Neither has to be closed for a clean exit."""
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
    """A script in the middle of a chunk, in a process group of its own, and the processes it started."""
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


def test_killing_the_client_ends_its_workers() -> None:
    """SIGKILL in the middle of a chunk: nannies and workers are gone within seconds."""
    before = set(Path(tempfile.gettempdir()).glob("daskinfer-*"))
    with computing() as (script, processes):
        script.kill()
        wait_until(lambda: gone(processes), 10)
    for folder in set(Path(tempfile.gettempdir()).glob("daskinfer-*")) - before:
        shutil.rmtree(folder)  # nobody is left to remove it


def test_ctrl_c_is_one_traceback_of_the_script() -> None:
    """Sent twice to the whole process group as a terminal does: workers say nothing, and all is gone."""
    with computing() as (script, processes):
        os.killpg(script.pid, signal.SIGINT)
        assert script.stderr is not None
        assert "once more stops at once" in script.stderr.readline()
        os.killpg(script.pid, signal.SIGINT)
        _, said = script.communicate(timeout=30)
        assert script.returncode in (-signal.SIGINT, 130, 1)
        wait_until(lambda: gone(processes), 10)
    assert said.count("Traceback (most recent call last)") <= 2
    assert "distributed." not in said.replace("/distributed/", "")
    ended, note = said.splitlines()[-2:]
    assert "Interrupted: Ctrl-C ended the call" in ended
    assert note.startswith("0 of ")
    assert len(said.splitlines()) < 60


def test_a_forked_child_leaves_the_parents_cluster_alone() -> None:
    """It does not use it, and its exit, with all exit handlers, does not end it."""
    code = """
        import os, sys, gc, time
        import daskinfer as di
        from daskinfer.cluster.process_cluster import kept
        cluster = di.LocalDeviceCluster("cpu")
        with kept.client(["cpu"]) as client:
            pass
        child = os.fork()
        if not child:
            assert kept._current is None
            assert kept._of_parent is not None
            del cluster
            gc.collect()
            sys.exit(0)
        began = time.monotonic()
        assert os.waitpid(child, 0)[1] == 0
        assert time.monotonic() - began < 30
        with kept.client(["cpu"]) as again:
            assert again is client
            print(again.submit(sum, [1, 2]).result(timeout=10), cluster.whole)
    """
    done = python("-c", dedent(code))
    assert (done.stdout, done.stderr) == ("3 True\n", "")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # zmq's and ipykernel's own
def test_it_works_in_a_notebook(in_folder: Path) -> None:
    """A network of the notebook's own class runs on a worker, and a cluster shows itself as HTML."""
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
