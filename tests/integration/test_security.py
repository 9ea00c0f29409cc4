"""Who can reach what we start, who gets in, and what a browser makes of names that are code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner
from distributed import Client, Security

import daskinfer as di
from daskinfer.cli.main import main
from daskinfer.cluster import local as cluster_room
from daskinfer.cluster.process_cluster import default_cluster
from daskinfer.cluster.worker_spec import LOOPBACK, WorkerSpec, resolve_security
from daskinfer.diagnostics.report import DeviceReport, RunReport
from daskinfer.errors import MissingExtra, OptionError
from daskinfer.hardware.device_spec import DeviceTable
from daskinfer.hardware.discovery import Device
from daskinfer.planning.plan import Plan, make_device_plans
from daskinfer.scheduling.chunking import make_chunks
from tests.conftest import wait_until

X = np.arange(4000, dtype=np.float32)


def listeners(processes: list[psutil.Process]) -> list[str]:
    """The addresses on which processes listen, as the kernel has them in /proc/net/tcp."""
    found = [c for process in processes for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return [connection.laddr.ip for connection in found]


def everything(cluster: di.LocalDeviceCluster) -> list[psutil.Process]:
    """This process, and every one that a cluster started."""
    return [psutil.Process(), *(process for nanny in cluster.workers.values() for process in nanny.list_processes())]


# --- who can reach it


def test_the_default_cluster_listens_on_loopback_only(two_cpus: list[str]) -> None:
    """What ``predict`` starts, its dashboard included, cannot be reached from another machine."""
    di.predict(np.sqrt, X, devices=two_cpus)
    assert default_cluster._current is not None
    found = listeners(everything(default_cluster._current.cluster))
    assert len(found) >= 6
    assert set(found) == {LOOPBACK}


COMMAND = """
import sys, time
import numpy as np

def slow():
    def net(x):
        open("running", "w").close()
        time.sleep(0.05)
        return x
    return net
"""


@pytest.mark.slow
def test_the_command_listens_on_loopback_only(in_folder: Path) -> None:
    """While ``daskinfer run`` computes, no process of its tree can be reached from another machine."""
    Path("slow_nets.py").write_text(COMMAND)
    np.save("x.npy", X[:1600])
    how = ["--devices", "cpu*2", "--batch-size", "20", "--no-pad"]
    command = [Path(sys.executable).with_name("daskinfer"), "run", "slow_nets:slow", "x.npy", "y.npy", *how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        wait_until(lambda: Path("running").exists() or run.poll() is not None, 60)
        # The plan ran the network too: wait for workers.
        tree = psutil.Process(run.pid)
        wait_until(lambda: len(listeners([tree, *tree.children(recursive=True)])) >= 6 or run.poll() is not None, 60)
        found = listeners([tree, *tree.children(recursive=True)])
        _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert len(found) >= 6
    assert set(found) == {LOOPBACK}


# --- who gets in


@pytest.fixture(scope="module")
def secure() -> Iterator[di.LocalDeviceCluster]:
    """A cluster that talks by TLS."""
    with di.LocalDeviceCluster("cpu*2", security=True) as cluster:
        yield cluster


def test_a_cluster_talks_by_tls(secure: di.LocalDeviceCluster) -> None:
    """With ``security=True`` scheduler and workers have tls:// addresses, on loopback, and ``get_client`` gets in."""
    assert secure.scheduler_address.startswith(f"tls://{LOOPBACK}:")
    with secure.get_client() as client:
        assert all(address.startswith(f"tls://{LOOPBACK}:") for address in client.run(lambda: 1))
        np.testing.assert_allclose(di.predict(np.sqrt, X, client=client), np.sqrt(X))
    assert set(listeners(everything(secure))) == {LOOPBACK}


INTRUDER = """
import sys
from distributed import Client, Security

_, address, *files = sys.argv
names = ("tls_ca_file", "tls_client_cert", "tls_client_key")
security = Security(require_encryption=True, **dict(zip(names, files))) if files else None
try:
    Client(address, security=security, timeout="5s")
except Exception as error:
    print(type(error).__name__, error)
else:
    print("got in")
"""


@pytest.fixture(scope="module")
def others() -> Security:
    """Certificates of somebody else."""
    return Security.temporary()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: a client that was refused may keep the next from starting.

    Dask tries for 30 s by default, refused or not.
    """
    installed = str(Path(sys.executable).with_name("daskinfer"))
    env = os.environ | {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s"}
    return subprocess.run([installed, *arguments], capture_output=True, text=True, check=False, timeout=120, env=env)


def pem_files(security: Security, folder: Path) -> dict[str, str]:
    """Certificates as files, by the command's options."""
    parts = {"ca-file": security.tls_ca_file, "cert": security.tls_client_cert, "key": security.tls_client_key}
    for name, content in parts.items():
        (folder / f"{name}.pem").write_text(content)
    return {f"--tls-{name}": str(folder / f"{name}.pem") for name in parts}


def test_without_a_certificate_nobody_gets_in(secure: di.LocalDeviceCluster, in_folder: Path, others: Security) -> None:
    """A client with another certificate, with none, or without encryption is refused, and a run is not disturbed."""
    wrong, ca = list(pem_files(others, in_folder).values()), str(in_folder / "right.pem")
    Path(ca).write_text(secure.security.tls_ca_file)
    address, go, answer = secure.scheduler_address, in_folder / "go", []

    def held(x: Any) -> Any:
        deadline = time.monotonic() + 120
        while not go.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return x + 1

    with secure.get_client() as client:
        how = {"client": client, "batch_size": 100, "pad": False, "output": X[:0]}
        run = threading.Thread(target=lambda: answer.append(di.predict(held, X, **how)))
        run.start()
        # A process each: in one, Dask's event loop of the one that was refused may keep the next from starting.
        asked = ([address], [address, ca], [address, *wrong], [address, ca, *wrong[1:]], [address.replace("tls", "tcp")])
        command = [sys.executable, "-W", "ignore", "-c", INTRUDER]
        intruders = [subprocess.Popen([*command, *words], stdout=subprocess.PIPE, text=True) for words in asked]
        said = [intruder.communicate(timeout=120)[0] for intruder in intruders]
        assert run.is_alive()
        go.touch()
        run.join(120)
    assert all(re.search(r"(?i)certificate|ssl|tls|closed|timed out", line) for line in said), said
    assert not any("got in" in line for line in said)
    np.testing.assert_array_equal(answer[0], X + 1)


@pytest.mark.slow
def test_the_command_gets_in_by_certificates(secure: di.LocalDeviceCluster, in_folder: Path, others: Security) -> None:
    """``--tls-ca-file``, ``--tls-cert`` and ``--tls-key`` let the command in; other certificates or none do not."""
    np.save("x.npy", X)
    arguments = ["plan", "torch.nn:Identity", "x.npy", "--scheduler", secure.scheduler_address]
    files = [word for pair in pem_files(secure.security, in_folder).items() for word in pair]
    done = CliRunner().invoke(main, [*arguments, *files])
    assert done.exit_code == 0, done.stderr
    assert "cpu:1" in done.stdout
    refused = command(*arguments)
    assert (refused.returncode, "cannot reach the scheduler" in refused.stderr) == (1, True), refused.stderr
    assert "pass --tls-ca-file and --tls-cert for one at tls://" in refused.stderr


def test_certificates_of_ones_own(secure: di.LocalDeviceCluster) -> None:
    """A ``distributed.Security`` is taken as it is, for every part of the cluster."""
    with di.LocalDeviceCluster("cpu", security=secure.security) as cluster, Client(cluster, set_as_default=False) as client:
        assert cluster.scheduler_address.startswith("tls://")
        assert client.submit(sum, [1, 2]).result() == 3


def test_what_security_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """None and False are what Dask's configuration says; anything else is refused before a process starts."""
    for asked in (None, False):
        assert not resolve_security(asked).require_encryption
    assert WorkerSpec(1, "", None, 1.0).protocol == "tcp://"
    with pytest.raises(OptionError, match=r"security must be True, None or a distributed\.Security, got a str"):
        di.LocalDeviceCluster("cpu", security="yes")

    def temporary(**_: Any) -> Security:
        raise ImportError("no cryptography")

    monkeypatch.setattr(cluster_room.Security, "temporary", temporary)
    with pytest.raises(MissingExtra, match=r'security=True needs the cryptography package.*pip install "daskinfer\[tls\]"'):
        di.LocalDeviceCluster("cpu", security=True)


@pytest.mark.slow
def test_a_scheduler_without_tls_is_no_place_for_certificates(
    cluster_client: Client, in_folder: Path, others: Security
) -> None:
    """A command with certificates does not talk to a scheduler without encryption."""
    np.save("x.npy", X)
    files = [word for pair in pem_files(others, in_folder).items() for word in pair]
    arguments = ["plan", "torch.nn:Identity", "x.npy", "--scheduler", cluster_client.scheduler.address, *files]
    done = command(*arguments)
    assert (done.returncode, "cannot reach the scheduler" in done.stderr) == (1, True), done.stderr


# --- what a browser makes of it

SCRIPT = "<script>alert(1)</script>"


def test_names_are_no_code_in_a_notebook() -> None:
    """Device, port and network names, labels and notes are text in every HTML that is made."""
    layout = make_chunks(8, [1.0], batch_size=2)
    parts = make_device_plans(
        layout, names=[SCRIPT], labels=[SCRIPT], weights=[1.0], row_in_nbytes=1, row_out_nbytes=1, model_nbytes=1
    )
    plan = Plan(parts, layout, True, SCRIPT, (f"{SCRIPT}: (8,) float32",), (f"{SCRIPT}: (8,) float32",), (SCRIPT,))
    report = RunReport(8, 1.0, 2, (DeviceReport(SCRIPT, SCRIPT, 1, 8, 1.0, 1.0, 1.0),))
    device = Device(SCRIPT, "cuda", 0, uuid=SCRIPT, label=SCRIPT)
    model = di.Model(SCRIPT, factory=SCRIPT, kwargs={SCRIPT: SCRIPT}, version=SCRIPT)
    for page in (plan, report, device, DeviceTable((device,)), model):
        shown = page._repr_html_()
        assert "<script" not in shown
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown


def test_names_that_a_user_gave_are_no_code_in_a_notebook() -> None:
    """The same holds on the way from a port and a network that a user named."""
    net = torch.nn.Linear(1, 1)
    net.__class__ = type(SCRIPT, (torch.nn.Linear,), {"forward": lambda self, **ports: {SCRIPT: ports[SCRIPT] * 2}})
    shown = di.plan(di.Model(net, version="1"), {SCRIPT: np.ones((4, 1), np.float32)}, devices="inline")._repr_html_()
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;") >= 3
