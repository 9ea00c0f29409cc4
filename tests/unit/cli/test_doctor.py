"""The doctor reports what works, what does not and how to fix it, also on machines where something is broken."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from distributed import Client, LocalCluster

from daskinfer.cli import checks, doctor
from daskinfer.cli.checks import OK, UNKNOWN, WARNING, WRONG, ChildError, Finding
from daskinfer.cli.main import main
from daskinfer.errors import ClusterError, PlanError
from daskinfer.hardware.discovery import Device, Machine
from tests.conftest import wait_until
from tests.support.dask_commands import external_cluster

GPU = Device("cuda:0", "cuda", 0, uuid="GPU-1", label="H100", memory_nbytes=80 << 30)
SMALL = Machine(n_cores=2, cpu_label="CPU", memory_nbytes=8 << 30)
DEADLINE = 240.0  # seconds for a whole examination; arbitrary

Findings = list[Finding]


def states(found: Any) -> list[str]:
    """The states of findings."""
    return [finding.state for finding in found]


def command(*arguments: str, before: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
    """The installed command, in an environment of its own."""
    program = str(Path(sys.executable).with_name("daskinfer"))
    environment = {**os.environ, **variables}
    whole = [*before, program, "doctor", *arguments]
    return subprocess.run(whole, capture_output=True, text=True, check=False, timeout=DEADLINE, env=environment)


def can_unshare(*namespaces: str) -> bool:
    """Whether this user may have namespaces of its own."""
    return subprocess.run(["unshare", *namespaces, "true"], capture_output=True, check=False).returncode == 0


# The whole command.


@pytest.mark.slow
def test_a_machine_that_is_well() -> None:
    """If everything works, the command exits with 0, a line for each check and nothing on stderr."""
    done = command()
    assert (done.returncode, done.stderr) == (0, ""), done
    lines = done.stdout.splitlines()
    assert lines[-1] == "a run works here"
    assert any(line.startswith("ok       a small run") for line in lines)
    assert any(line.startswith("ok       packages") for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(not can_unshare("-n"), reason="needs the right to a network namespace")
def test_a_machine_without_loopback() -> None:
    """If processes cannot connect to each other, the command says so with the cure, exits with 1, and does not hang."""
    done = command("--json", before=("unshare", "-n"))
    report = json.loads(done.stdout)
    assert (done.returncode, report["healthy"], done.stdout.count("\n")) == (1, False, 1)
    (wrong,) = (finding for finding in report["findings"] if finding["state"] == WRONG)
    assert (wrong["what"], "ip link set lo up" in wrong["cure"]) == ("loopback ports", True)
    last = report["findings"][-1]
    assert (last["what"], last["state"], last["found"][:13]) == ("a small run", UNKNOWN, "was not tried")


@pytest.mark.slow
@pytest.mark.skipif(not can_unshare("-m"), reason="needs the right to a mount namespace")
def test_a_machine_with_tiny_shared_memory() -> None:
    """A /dev/shm of 64 KiB, as in a container, does no harm: rows are stored elsewhere, and a run works."""
    code = (
        "from daskinfer.cli import checks, doctor\n"
        "found = [*checks.check_shared_memory(), *doctor._check_small_run()]\n"
        "print(*found, doctor.is_healthy(found), sep='\\n')"
    )
    script = f'mount -t tmpfs -o size=64k t /dev/shm && exec "{sys.executable}" -c "$0"'
    done = subprocess.run(["unshare", "-m", "sh", "-c", script, code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "True"), done
    assert "/dev/shm, 64.0 KiB, is not used" in done.stdout


def test_words_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A finding is a line with its cure below; if one is wrong, the last line says so and the command exits with 1."""
    found = [Finding("a", WARNING, "old", "renew it"), Finding("b", WRONG, "broken", "fix it", where="tcp://w")]
    monkeypatch.setattr("daskinfer.cli.doctor.examine", lambda connect: iter(found))
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "warning  a                old",
        "                          renew it",
        "wrong    b                tcp://w: broken",
        "                          fix it",
        "some checks failed; fix the errors above first",
    ]
    assert json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)["findings"][1]["where"] == "tcp://w"


# One check at a time.


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is missing, too old, or of another release than its twin is named with what to install."""
    (well,) = checks.check_packages()
    assert well.state == OK
    assert f"numpy {metadata.version('numpy')}" in well.found
    real = metadata.version

    def old(name: str) -> str:
        if name == "safetensors":
            raise metadata.PackageNotFoundError(name)
        return {"torch": "2.0.0", "distributed": "2020.1.0", "rich": "1.0"}.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", old)
    found = {finding.found.split()[0]: finding for finding in checks.check_packages()}
    assert {name: finding.state for name, finding in found.items()} == {
        "torch": WRONG,
        "safetensors": WRONG,
        "rich": WARNING,
        "dask": WRONG,
    }
    assert found["torch"].found == "torch 2.0.0; >=2.10 is needed"
    assert found["torch"].cure == 'pip install "torch>=2.10"'
    assert found["safetensors"].found.startswith("safetensors is not installed")
    assert "distributed 2020.1.0" in found["dask"].found


@pytest.mark.parametrize(
    ("machine", "cuda", "driven", "expected"),
    [
        (SMALL, None, [], [(OK, "none, and no driver; runs use 2 cores")]),
        (Machine(n_cores=2, driver="580.1"), None, [], [(WARNING, "none, despite a driver (580.1)")]),
        (Machine(n_cores=2, driver="580.1", n_hidden_gpus=3), None, [], [(WARNING, "hides 3; runs use 2 cores")]),
        (Machine(gpus=(GPU,), driver="580.1"), None, [], [(OK, "cuda:0 (H100); driver 580.1"), (WRONG, "CPU-only build")]),
        (
            Machine(gpus=(GPU,), driver="535.1", driver_cuda=(12, 2)),
            "13.0",
            [],
            [(OK, "driver 535.1"), (WRONG, "supports CUDA 12.2")],
        ),
        (
            Machine(gpus=(GPU,), driver="580.1", driver_cuda=(13, 0)),
            "13.0",
            ["cuda:0"],
            [(OK, "driver"), (OK, "built for CUDA 13.0"), (OK, "torch computes on cuda:0")],
        ),
        (
            Machine(gpus=(GPU,), driver="580.1", driver_cuda=(13, 0)),
            "13.0",
            [],
            [(OK, "driver"), (OK, "13.0"), (WRONG, "torch sees 0 of 1 GPUs")],
        ),
        (
            Machine(gpus=(GPU,), driver="580.1", driver_cuda=(13, 0)),
            "13.0",
            ChildError("no result"),
            [(OK, "driver"), (OK, "13.0"), (WRONG, "failed (no result)")],
        ),
    ],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, cuda: str | None, driven: Any, expected: list[tuple[str, str]]
) -> None:
    """What NVML sees is compared with torch's build, the driver, and what torch does in a process that sees the GPUs."""

    def child(function: Callable[[], Any], environment: dict[str, str]) -> Any:
        assert (function, environment) == (checks.find_usable_gpus, {"CUDA_VISIBLE_DEVICES": "GPU-1"})
        if isinstance(driven, ChildError):
            raise driven
        return driven

    monkeypatch.setattr(checks, "inspect_machine", lambda: machine)
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr(checks, "run_in_child", child)
    found = list(checks.check_gpus())
    assert [(finding.state, text in finding.found) for finding, (_, text) in zip(found, expected, strict=True)] == [
        (state, True) for state, _ in expected
    ], found
    assert all(finding.cure for finding in found if finding.state != OK)


def test_cuda_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """dask-cuda is needed if there are GPUs, CuPy never; one that cannot be imported or is for another CUDA is named."""
    assert set(states(checks.check_cuda_packages())) == {OK}
    monkeypatch.setattr(checks, "inspect_machine", lambda: Machine(gpus=(GPU,)))
    monkeypatch.setattr("torch.version.cuda", "12.8")

    def fails(*_: Any) -> Any:
        raise ChildError("ImportError: no libcuda")

    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "2020.1.0" if name == "dask" else real(name))
    with monkeypatch.context() as patch:
        patch.setattr(checks, "run_in_child", fails)
        broken, cupy, *others = checks.check_cuda_packages()
    assert (broken.state, cupy.state) == (WRONG, WARNING)
    assert broken.cure == 'pip install "daskinfer[cuda12]"'
    assert "cupy-cuda13x is installed; torch is built for CUDA 12" in others[0].found
    assert any("dask-cuda needs dask<" in finding.found for finding in others[1:])

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing, unneeded = checks.check_cuda_packages()
    assert (missing.state, unneeded.state) == (WRONG, OK)
    assert "every GPU worker needs it" in missing.found


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows go through anonymous memory, else files; too little room, or memory that others cannot read, is a warning."""
    rows, memory = checks.check_shared_memory()
    assert (rows.state, memory.state) == (OK, OK)
    assert "memfd" in rows.found
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    rows, memory = checks.check_shared_memory()
    assert (rows.state, rows.found.startswith("1.0 MiB is free for anonymous memory")) == (WARNING, True)
    monkeypatch.setattr(checks, "run_in_child", lambda *_: {"pool": False, "memory": False})
    rows, memory = checks.check_shared_memory()
    assert "rows go through sockets" in rows.found
    assert "cannot read the client's memory" in memory.found
    assert states([rows, memory]) == [WARNING, WARNING]
    monkeypatch.delattr("os.memfd_create")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(checks, "run_in_child", lambda *_: {"pool": True, "memory": True})
    gone = shutil.disk_usage

    def usage(path: str) -> Any:
        if path == "/dev/shm":
            raise FileNotFoundError(path)
        return gone(path)

    monkeypatch.setattr("shutil.disk_usage", usage)
    rows, memory = checks.check_shared_memory()
    assert (rows.state, rows.found.startswith(f"files in {tmp_path}, ")) == (OK, True)
    assert "/dev/shm" not in rows.found


def test_what_processes_of_their_own_look_at() -> None:
    """What child processes check works in this process too."""
    assert checks.find_usable_gpus() == []
    assert checks.import_package("json") == "2.0.9"
    assert checks.check_memory_access("/proc/0/fd/0", "x", 1, 0, 0, "x") == {"pool": False, "memory": False}


def test_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little memory for torch in each worker is a warning, which says how many workers fit."""
    monkeypatch.setattr(checks, "inspect_machine", lambda: SMALL)
    (well,) = checks.check_host_memory()
    assert (well.state, well.found) == (OK, "3.6 GiB for each of 2 workers")
    monkeypatch.setattr(checks, "inspect_machine", lambda: Machine(n_cores=64, memory_nbytes=8 << 30))
    (little,) = checks.check_host_memory()
    assert (little.state, little.cure) == (WARNING, "use fewer: --devices 'cpu*16'")


def test_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that cannot be bound is wrong, with the cure."""
    assert states(checks.check_loopback()) == [OK]
    monkeypatch.setattr(checks, "LOOPBACK", "192.0.2.1")
    (found,) = checks.check_loopback()
    assert (found.state, "192.0.2.1" in found.found, bool(found.cure)) == (WRONG, True, True)


def test_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder that is not writable, replaces TMPDIR, or has little room is named; without any it is wrong."""
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert states(checks.check_temporary_folder()) == [OK]
    monkeypatch.setattr(checks, "SCRATCH_NBYTES", math.inf)
    monkeypatch.setattr(checks, "format_nbytes", str)
    (little,) = checks.check_temporary_folder()
    assert (little.state, "may need" in little.found) == (WARNING, True)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    (other,) = checks.check_temporary_folder()
    assert other.state == WARNING
    assert other.found.startswith(f"TMPDIR={str(tmp_path / 'gone')!r} is not writable; ")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    (none,) = checks.check_temporary_folder()
    assert (none.state, "No such file" in none.found) == (WRONG, True)


@pytest.mark.parametrize(
    ("limits", "state", "text"),
    [
        ((4096, 4096), OK, "4,096 allowed, 320 needed"),
        ((-1, -1), OK, "any number allowed, 320 needed"),
        ((100, 4096), WARNING, "ulimit -n 320"),
        ((100, 200), WARNING, "ulimit -n 320 (as root: this user's limit is 200)"),
    ],
)
def test_open_files(monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], state: str, text: str) -> None:
    """The limit of open files is compared with what a run on all devices needs."""
    monkeypatch.setattr(checks, "inspect_machine", lambda: SMALL)
    monkeypatch.setattr("resource.getrlimit", lambda _: limits)
    (found,) = checks.check_open_files()
    assert (found.state, found.cure or found.found) == (state, text)


def test_checks_that_cannot_be_made() -> None:
    """A check that raises or hangs is unknown, and says so; one that a run depends on is wrong."""

    def raises() -> Iterator[Finding]:
        raise OSError("no such thing")

    (found,) = checks.run_check("a", raises)
    assert (found.state, found.found) == (UNKNOWN, "could not be checked: OSError: no such thing")
    (found,) = doctor.run_with_timeout("a", lambda: list(raises()))
    assert (found.state, found.found) == (WRONG, "OSError: no such thing")
    go = threading.Event()
    (found,) = doctor.run_with_timeout("a", lambda: [Finding("a", OK, "")] if go.wait() else [], timeout=0.05)
    go.set()
    assert (found.state, found.found) == (UNKNOWN, "could not be checked within 0.05 s")
    assert doctor.is_healthy([found])


def test_child_processes_that_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A child process that fails, or takes too long, is an error that says so."""
    with pytest.raises(ChildError, match="ImportError: cannot import name 'nothing'"):
        checks.run_in_child(SimpleNamespace(__module__="daskinfer.cli.checks", __name__="nothing"))
    (tmp_path / "ends_at_once.py").write_text("import os\nos._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ChildError, match="it exited with 7"):
        checks.run_in_child(checks.import_package, "ends_at_once")
    monkeypatch.setattr(checks, "CHILD_SECONDS", 0.01)
    with pytest.raises(ChildError, match=r"no result within 0\.01 s"):
        checks.run_in_child(checks.import_package, "json")


# The small run and its dashboard.


@pytest.mark.slow
def test_a_small_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is compared with NumPy's; another one, or none, is wrong; an unavailable dashboard is a warning."""
    (run, page) = doctor._check_small_run()
    assert (run.state, page.state) == (OK, OK), (run, page)
    assert "cpu:0 " in run.found
    differs = {"difference": 0.5, "devices": {"cpu:0": 512}, "seconds": 1.0, "page": "gone"}
    monkeypatch.setattr(doctor, "run_in_child", lambda *_, **__: differs)
    run, page = doctor._check_small_run()
    assert (run.state, page.state) == (WRONG, WARNING)
    assert "the output differs from NumPy's by 0.5, more than 0.0001" in run.found

    def fails(*_: Any, **__: Any) -> Any:
        raise ChildError("no result within 90 s")

    monkeypatch.setattr(doctor, "run_in_child", fails)
    (run,) = doctor._check_small_run()
    assert (run.state, run.found) == (WRONG, "failed: no result within 90 s")


@contextmanager
def served(content: bytes) -> Iterator[str]:
    """A page at a URL."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/status"
        server.shutdown()
        thread.join()


def test_the_dashboard_s_page() -> None:
    """A page is accepted if it has plots; one that is not available says why."""
    with served(b"<script src=Bokeh.js>") as url:
        assert doctor._find_dashboard_problem(url) == ""
    with served(b"install it") as url:
        assert doctor._find_dashboard_problem(url) == "its page has no plots"
    assert "refused" in doctor._find_dashboard_problem(url)


# Workers of a scheduler.


@pytest.fixture
def only_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the checks of this machine out."""
    monkeypatch.setattr(doctor, "CHECKS", {})


def examined(connect: Callable[[], Client]) -> dict[str, Findings]:
    """What is found, by what it is about."""
    found: dict[str, Findings] = {}
    for finding in doctor.examine(connect):
        found.setdefault(finding.what, []).append(finding)
    return found


def test_checks_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a scheduler the checks of this machine are reported one after the other, the small run last."""
    monkeypatch.setattr(doctor, "CHECKS", {name: lambda n=name: iter([Finding(n, OK, "")]) for name in ("a", "b")})
    monkeypatch.setattr(doctor, "_check_small_run", lambda: [Finding("run", OK, "")])
    assert [finding.what for finding in doctor.examine()] == ["a", "b", "run"]


@pytest.mark.usefixtures("only_workers")
def test_workers_that_are_well(cluster_client: Client) -> None:
    """Every worker reports its device, versions are compared, and a small run goes through the scheduler."""
    done = CliRunner().invoke(main, ["doctor", "--scheduler", cluster_client.scheduler.address, "--json"])
    report = json.loads(done.stdout)
    assert (done.exit_code, report["healthy"]) == (0, True), report
    assert [finding["what"] for finding in report["findings"]] == [
        *("scheduler", "versions", "workers", "workers", "a small run")
    ]
    assert {finding["found"] for finding in report["findings"][2:4]} == {
        f"{device}, reads rows in the client" for device in ("cpu:0", "cpu:1")
    }


@pytest.mark.usefixtures("only_workers")
def test_a_scheduler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that does not answer is wrong, with the cure, and nothing else is checked."""
    assert doctor.CONNECT_SECONDS <= 10
    monkeypatch.setattr(doctor, "CONNECT_SECONDS", 0.5)
    done = CliRunner().invoke(main, ["doctor", "--scheduler", "tcp://127.0.0.1:1"])
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert (len(lines), "cannot reach the scheduler" in lines[0], "Start one with `dask scheduler`" in lines[1]) == (
        3,
        True,
        True,
    )


@pytest.mark.usefixtures("only_workers")
def test_a_scheduler_without_workers() -> None:
    """No workers is wrong, and says how to start some."""
    with LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        found = examined(lambda: Client(cluster, set_as_default=False))
    assert (states(found["workers"]), "dask worker" in found["workers"][0].cure) == ([WRONG], True)
    assert "a small run" not in found


@pytest.mark.slow
@pytest.mark.usefixtures("only_workers")
def test_a_worker_without_daskinfer(tmp_path: Path) -> None:
    """It is reported once, with the cure, without what would follow from it."""
    with external_cluster(tmp_path, worker_lacks="daskinfer") as (client, _):
        found = examined(lambda: Client(client.scheduler.address, set_as_default=False))
    assert list(found) == ["scheduler", "workers"]
    (wrong,) = found["workers"]
    assert (wrong.state, "cannot import daskinfer" in wrong.found) == (WRONG, True)
    assert wrong.cure.startswith("Install the same versions of")


@pytest.mark.slow
@pytest.mark.usefixtures("only_workers")
def test_a_worker_with_other_versions(tracker: None, tmp_path: Path) -> None:
    """A worker whose packages are of other versions is named with each of them."""
    fake = tmp_path / "zarr-0.0.1.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: zarr\nVersion: 0.0.1\n")
    program = str(Path(sys.executable).with_name("dask"))
    options = ["--nworkers", "1", "--nthreads", "1", "--no-dashboard", "--local-directory", str(tmp_path)]
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=60) as cluster:
        address = cluster.scheduler_address
        with subprocess.Popen(
            [program, "worker", address, *options],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as worker:
            try:
                wait_until(lambda: len(cluster.scheduler.workers) == 2)
                found = examined(lambda: Client(address, set_as_default=False))
            finally:
                worker.terminate()
    (clash,) = found["versions"]
    assert clash.state == WARNING
    assert clash.found == f"zarr 0.0.1; the client has {metadata.version('zarr')}"
    (old,) = found["packages"]
    assert (old.state, old.where, old.found) == (WRONG, clash.where, "zarr 0.0.1; >=3.0.8 is needed")


def test_clashes() -> None:
    """Python, torch and daskinfer must be the same on workers; any other difference is a warning, on the scheduler too."""
    here = {"python": "3.11.7.final.0", "torch": "2.13.0", "numpy": "2.4.0", "dask": "2026.7.1", "lz4": None}
    there = {**here, "python": "3.12.1.final.0", "torch": None, "numpy": "2.3.0", "lz4": "4.0"}
    report = {
        "client": {"packages": here},
        "scheduler": {"packages": {**here, "torch": None, "dask": "2026.7.0"}},
        "workers": {"tcp://a": {"packages": here}, "tcp://b": {"packages": there}},
    }
    found = doctor.compare_versions(report)
    assert [(f.where, f.found.split()[0], f.state) for f in found] == [
        ("the scheduler", "dask", WARNING),
        ("tcp://b", "python", WRONG),
        ("tcp://b", "torch", WRONG),
        ("tcp://b", "numpy", WARNING),
        ("tcp://b", "lz4", WARNING),
    ]
    assert found[2].found == "torch is not installed; the client has 2.13.0"
    assert found[4].found == "lz4 4.0; the client has none"
    assert states(doctor.compare_versions({**report, "scheduler": report["client"], "workers": {}})) == [OK]


def test_workers_that_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each problem of a worker is a finding with its cure; a worker without daskinfer is wrong."""

    def refuse(error: Exception) -> Callable[..., Any]:
        def ask(*_: Any) -> Any:
            raise error

        return ask

    monkeypatch.setattr(
        doctor, "check_workers", refuse(PlanError(["a has torch 1; 2 is needed. Install it.", "b is gone. Start it."]))
    )
    found = doctor._collect_findings(lambda: doctor._check_requirements(SimpleNamespace()))
    assert [(f.state, f.found, f.cure) for f in found] == [
        (WRONG, "a has torch 1; 2 is needed", "Install it."),
        (WRONG, "b is gone", "Start it."),
    ]
    monkeypatch.setattr(doctor, "check_workers", refuse(ClusterError("a is gone. Start it.")))
    assert states(doctor._collect_findings(lambda: doctor._check_requirements(SimpleNamespace()))) == [WRONG]
    error = ModuleNotFoundError("No module named 'daskinfer'")
    (found,) = doctor._check_worker_machines(SimpleNamespace(run=lambda *_, **__: {"tcp://a": error}))
    assert (found.state, found.where) == (WRONG, "tcp://a")
    assert "install daskinfer there" in found.cure


def test_what_a_worker_looks_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker reports what is wrong on its machine."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    monkeypatch.setattr(checks, "inspect_machine", lambda: SMALL)
    (found,) = checks.locate_findings("tcp://a", checks.run_worker_checks())
    assert (found.what, found.state, found.where) == ("temporary folder", WRONG, "tcp://a")
    assert tempfile.tempdir == str(tmp_path / "gone")


def test_the_small_runs_output_is_numpys(cluster_client: Client) -> None:
    """The small run's output is NumPy's up to rounding, and every device computed rows."""
    report = doctor.compare_with_numpy(cluster_client)
    assert report["difference"] < doctor.TOLERANCE
    assert sum(report["devices"].values()) == doctor.N_ROWS
    assert np.all(list(report["devices"].values()))
