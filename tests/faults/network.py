"""Links that are cut, schedulers that are lost, and who can reach what we start."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.benchmarks.judging import Verdict
from tests.benchmarks.processes import Failed, Unavailable, run_fresh
from tests.faults import means, nets
from tests.faults.crashes import received
from tests.faults.effort import Effort, judged

N_ROWS = 400  # 40 micro-batches
CUT_SECONDS, LONG_CUT_SECONDS = 5.0, 60.0
_SUBNET = "10.213.{}.{}"  # not a network that machines commonly have


@dataclass(frozen=True)
class Namespace:
    """A network namespace with a link to the outside; ``before`` goes in front of a command that shall live there."""

    name: str
    link: str
    outside: str

    @property
    def before(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)

    def cut(self) -> None:
        """Take the link down."""
        means.system("ip", "link", "set", self.link, "down")

    def mend(self) -> None:
        """Bring it up again."""
        means.system("ip", "link", "set", self.link, "up")


@contextlib.contextmanager
def namespace(number: int) -> Iterator[Namespace]:
    """Make one, and a pair of links with addresses."""
    unique = uuid.uuid4().hex[:6]
    made = Namespace(f"chaos-{unique}", f"chaos{unique}o", _SUBNET.format(number, 1))
    inner = f"chaos{unique}i"
    inside = ("ip", "netns", "exec", made.name, "ip")
    means.system("ip", "netns", "add", made.name)
    try:
        means.system("ip", "link", "add", made.link, "type", "veth", "peer", "name", inner)
        means.system("ip", "link", "set", inner, "netns", made.name)
        means.system("ip", "address", "add", f"{made.outside}/24", "dev", made.link)
        means.system("ip", "link", "set", made.link, "up")
        means.system(*inside, "address", "add", f"{_SUBNET.format(number, 2)}/24", "dev", inner)
        for link in ("lo", inner):
            means.system(*inside, "link", "set", link, "up")
        yield made
    finally:
        with contextlib.suppress(Unavailable):
            means.system("ip", "link", "delete", made.link)
        means.system("ip", "netns", "delete", made.name)


def cut(effort: Effort) -> Verdict:
    """The link to a worker goes down for 5 s and for 60 s, with and without another worker outside the cut."""
    short = _cut(effort.folder / "5s", CUT_SECONDS, outside=True)
    met = {
        "5 s: same bytes": short["code"] == 0 and short["same"],
        "5 s: nothing run again": short["again"] == 0,
        "5 s: no worker lost": "died while computing" not in short["said"] and "lost device" not in short["said"],
    }
    said = [f"5 s: exit {short['code']}, {short['again']} run again"]
    if effort.name != "short":
        long = _cut(effort.folder / "60s", LONG_CUT_SECONDS, outside=True)
        none = _cut(effort.folder / "alone", LONG_CUT_SECONDS, outside=False)
        met |= {
            "60 s: same bytes": long["code"] == 0 and long["same"],
            "60 s: committed once": long["receipts"] == 1,
            "none outside: a clear end": none["code"] == 1 and ("lost all workers" in none["said"]),
            "none outside: goes on": none["again_code"] == 0 and none["kept"] and none["same"],
        }
        said.append(f"60 s: exit {long['code']}, {long['receipts']} receipt per row")
        said.append(f"none outside: exit {none['code']} after {none['seconds']:.0f} s, repeated {none['again_code']}")
    asked = "5 s: nothing; 60 s: done by others, once; none outside: a clear end, goes on"
    return judged("network cut (workers in namespaces)", "; ".join(said), asked, met)


def _cut(folder: Path, seconds: float, *, outside: bool) -> dict[str, Any]:
    """One command whose worker is cut off once it has begun."""
    folder.mkdir()
    np.save(folder / "x.npy", nets.rows(N_ROWS))
    env = {nets.FOLDER: str(folder), nets.SECONDS: "0.4"}
    log, receipts = folder / "run.log", folder / "y.zarr.daskinfer" / "receipts.jsonl"
    with contextlib.ExitStack() as stack:
        inside = stack.enter_context(namespace(1))
        _, address = stack.enter_context(means.scheduler(folder, inside.outside))
        first = stack.enter_context(contextlib.ExitStack())
        first.enter_context(means.worker(address, folder, "inside", before=inside.before, env=env))
        if outside:
            first.enter_context(means.worker(address, folder, "outside", env=env))
        means.await_workers(address, 1 + outside)
        command = ["run", "tests.faults.nets:made", "x.npy", "y.zarr", "--batch-size", "10", "--scheduler", address]
        process = stack.enter_context(means.started([means.PYTHON, "-m", "daskinfer.cli.main", *command], log, env))
        means.wait_until(lambda: len(received(receipts)) >= 3 or process.poll() is not None, 60, "the first chunks")
        inside.cut()
        began = time.monotonic()
        mender = threading.Timer(seconds, inside.mend)
        mender.start()
        try:
            means.wait_until(lambda: process.poll() is not None, 240, "the run")
            took = time.monotonic() - began
        finally:
            mender.join()
        found = _state(folder, process.returncode, log) | {"seconds": took}
        if outside:
            return found
        first.close()
        stack.enter_context(means.worker(address, folder, "another", before=inside.before, env=env))
        means.await_workers(address, 1)
        code, said = means.run_command(*command, folder=folder, env=env)
        return found | {"again_code": code, "kept": "rows were already done" in said, "same": _same(folder)}


def _state(folder: Path, code: int, log: Path) -> dict[str, Any]:
    counts = Counter(
        row for start, stop in received(folder / "y.zarr.daskinfer" / "receipts.jsonl") for row in range(start, stop)
    )
    return {
        "code": code,
        "said": log.read_text(errors="replace"),
        "again": sum(nets.begun(folder).values()) - N_ROWS // 10,
        "receipts": max(counts.values(), default=0),
        "same": _same(folder),
    }


def _same(folder: Path) -> bool:
    from tests.faults.storage import read

    path = folder / "y.zarr"
    return path.exists() and np.array_equal(read(path), nets.plain(N_ROWS, 10))


def scheduler_lost(effort: Effort) -> Verdict:
    """The scheduler of others is killed in the middle of a run: a clear end; with another the same command goes on."""
    folder = effort.folder
    np.save(folder / "x.npy", nets.rows(N_ROWS))
    env = {nets.FOLDER: str(folder), nets.SECONDS: "0.3"}
    log, receipts = folder / "run.log", folder / "y.zarr.daskinfer" / "receipts.jsonl"
    command = ["run", "tests.faults.nets:made", "x.npy", "y.zarr", "--batch-size", "10", "--scheduler"]
    with contextlib.ExitStack() as stack:
        process, address = stack.enter_context(_cluster(folder, env))
        run = stack.enter_context(means.started([means.PYTHON, "-m", "daskinfer.cli.main", *command, address], log, env))
        means.wait_until(lambda: len(received(receipts)) >= 3 or run.poll() is not None, 60, "the first chunks")
        os.kill(process.pid, signal.SIGKILL)
        seconds = means.wait_until(lambda: run.poll() is not None, 120, "the end of the run")
    said = log.read_text()
    with _cluster(folder, env) as (_, address):
        code, again = means.run_command(*command, address, folder=folder, env=env)
    last = said.strip().splitlines()[-1]
    return judged(
        "scheduler lost (--scheduler)",
        f"exit {run.returncode} after {seconds:.1f} s, repeated: {code}",
        "clear error, continues",
        {
            "exit": run.returncode == 1,
            f"clear error ({last[:200]})": "error: " in last and "scheduler" in last and "repeat" in last,
            "continues": code == 0 and "rows were already done" in again,
            "same bytes": _same(folder),
        },
    )


@contextlib.contextmanager
def _cluster(folder: Path, env: dict[str, str]) -> Iterator[tuple[Any, str]]:
    """A scheduler and two workers, all of others."""
    with contextlib.ExitStack() as stack:
        process, address = stack.enter_context(means.scheduler(folder))
        for name in ("one", "two"):
            stack.enter_context(means.worker(address, folder, name, env=env))
        means.await_workers(address, 2)
        yield process, address


def listeners(effort: Effort) -> Verdict:
    """What a predict without a client starts listens on loopback only."""
    found = run_fresh("tests.faults.network:listening", {})
    return judged(
        "listeners of the default cluster",
        f"{len(found['off'])} of {found['all']} off loopback",
        "0",
        {"on loopback": not found["off"], "seen at all": found["all"] >= 6},
    )


def listening() -> dict[str, Any]:
    """Where this process and all below it listen, from /proc/net/tcp and tcp6; in a fresh process."""
    import daskinfer as di

    di.predict(np.sqrt, np.ones((100, 2), np.float32), devices=["cpu", "cpu"])
    here = psutil.Process()
    family = [here, *here.children(recursive=True)]
    ips = [c.laddr.ip for process in family for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    di.close()
    return {"all": len(ips), "off": [ip for ip in ips if not (ip.startswith("127.") or ip == "::1")]}


def tls(effort: Effort) -> Verdict:
    """Clients without a certificate, with another's, or without TLS are refused; a run that goes on notices nothing."""
    found = run_fresh("tests.faults.network:refused", {"folder": str(effort.folder)})
    return judged(
        "TLS: clients without a certificate",
        f"{found['refused']} of {found['tried']} refused, run {'right' if found['same'] else 'WRONG'}",
        "refused, run unaffected",
        {
            "refused": found["refused"] == found["tried"],
            "during the run": found["during"],
            "unaffected": found["same"] and found["again"] == 0,
        },
    )


def refused(folder: str) -> dict[str, Any]:
    """Clients that try to get in while a run goes on; in a fresh process."""
    from distributed import Client, Security

    import daskinfer as di

    answer: list[Any] = []
    n_refused = 0
    with di.LocalDeviceCluster("cpu*2", security=True) as cluster, cluster.get_client() as client:
        how: dict[str, Any] = {"client": client, "batch_size": 10, "output": np.empty((0, 3), np.float32)}
        net = nets.Watched(folder, 0.3)
        run = threading.Thread(target=lambda: answer.append(di.predict(net, nets.rows(N_ROWS), **how)))
        run.start()
        means.wait_until(lambda: nets.begun(folder), 60, "the run")
        secure = cluster.scheduler_address
        tried = [
            (secure, Security.temporary()),
            (secure, Security(require_encryption=True)),
            (secure, None),
            (secure.replace("tls", "tcp"), None),
        ]
        for address, security in tried:
            try:
                Client(address, security=security, timeout="1s", set_as_default=False).close()
            except (OSError, TypeError, RuntimeError, ValueError):
                n_refused += 1
            gc.collect()  # a refused client that ends in the thread which the next one starts waits for it, and it for that
        during = run.is_alive()
        run.join(120)
    if not answer:
        raise Failed("the run did not end")
    same = np.array_equal(answer[0], nets.plain(N_ROWS, 10))
    again = sum(nets.begun(folder).values()) - N_ROWS // 10
    return {"refused": n_refused, "tried": len(tried), "same": same, "during": during, "again": again}
