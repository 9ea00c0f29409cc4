"""``daskinfer doctor``: whether a run works here, and on each worker of a scheduler; what does not, and how to mend it.

Every check has a deadline, and one that cannot be made says so. The last is a small run on the default devices, compared
with NumPy: what it finds wrong, a real one would.
"""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from distributed import Client

from daskinfer import LocalDeviceCluster, predict
from daskinfer.cli.checks import (
    CHECKS,
    CHILD_SECONDS,
    NETWORK,
    OK,
    UNKNOWN,
    WARNING,
    WRONG,
    ChildError,
    Finding,
    at,
    in_child,
    of_error,
    on_worker,
    tried,
)
from daskinfer.cluster.placement import check_installed
from daskinfer.cluster.preflight import Question, ask
from daskinfer.cluster.preflight import versions as agreed
from daskinfer.errors import DaskInferError, PlanError
from daskinfer.transport.process_memory import own_memory

CHECK_SECONDS = 3 * CHILD_SECONDS  # for one check, its own processes included
CONNECT_SECONDS = 10.0  # until a scheduler answers: whoever asks waits for it; arbitrary, a run gives it Dask's 30
ROWS, TOLERANCE = 512, 1e-4  # of the small run; arbitrary, of answers of about 1

_LOOKED_AT = ("torch", "daskinfer", "zarr", "safetensors")  # beside the packages that Dask compares
_OF_SCHEDULERS = frozenset({"cloudpickle", "dask", "distributed", "msgpack", "python", "toolz", "tornado"})
_PAGE_SECONDS = 10.0  # until the dashboard answers; arbitrary


def is_well(findings: Sequence[Finding]) -> bool:
    """Whether a run would work, as far as is known."""
    return not any(finding.state == WRONG for finding in findings)


def examine(connect: Callable[[], Client] | None = None) -> Iterator[Finding]:
    """Look at this machine, and at the workers of the client that ``connect`` makes; None: at a cluster of our own."""
    wrong = set()
    for what, check in CHECKS.items():
        for finding in within(what, lambda what=what, check=check: tried(what, check)):  # type: ignore[misc]
            wrong |= {what} if finding.state == WRONG else set()
            yield finding
    if connect is not None:
        yield from _workers(connect)
    elif NETWORK in wrong:  # its workers would be waited for in vain, for a minute
        yield Finding("a small run", UNKNOWN, "is not tried: its processes could not talk to each other")
    else:
        yield from within("a small run", _own_trial)


def within(what: str, look: Callable[[], list[Finding]], seconds: float | None = None) -> list[Finding]:
    """What is found in time; a check that hangs is left behind, and said so."""
    found: list[Finding] = []

    def run() -> None:
        try:
            found.extend(look())
        except Exception as error:
            found.append(Finding(what, WRONG, f"{type(error).__name__}: {error}"))

    seconds = CHECK_SECONDS if seconds is None else seconds
    thread = threading.Thread(target=run, name="daskinfer-doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return [Finding(what, UNKNOWN, f"could not be looked at within {seconds:g} s")]
    return found


def _own_trial() -> list[Finding]:
    """A small run in a process of its own."""
    try:
        told = in_child("trial", room="cli.doctor")
    except ChildError as error:
        return [
            Finding(
                "a small run",
                WRONG,
                f"failed: {error}",
                "mend what is wrong above; `daskinfer --debug doctor` shows all of its log",
            )
        ]
    return [_judged(told), _page(told["page"])]


def trial() -> dict[str, Any]:
    """Run a small network on the default devices, and look at the dashboard meanwhile; for a process of its own."""
    with LocalDeviceCluster() as cluster, Client(cluster, set_as_default=False) as client:
        told = compared(client)
        return {**told, "page": _looked_at(f"http://127.0.0.1:{cluster.scheduler.services['dashboard'].port}/status")}


def compared(client: Client) -> dict[str, Any]:
    """A small network on a client's workers: how far its answer is from NumPy's, and which device did how many rows."""
    rows = np.random.default_rng(0).standard_normal((ROWS, 16), dtype=np.float32)
    torch.manual_seed(0)
    net = torch.nn.Linear(16, 4)
    weight, bias = (parameter.detach().numpy() for parameter in (net.weight, net.bias))
    began = time.perf_counter()
    answer, report = predict(net, rows, client=client, batch_size=8, device_weights="even", return_report=True)
    seconds = time.perf_counter() - began
    difference = float(np.abs(answer - (rows @ weight.T + bias)).max())
    return {"difference": difference, "devices": {d.device: d.n_rows for d in report.devices}, "seconds": seconds}


def _judged(told: dict[str, Any]) -> Finding:
    devices = ", ".join(f"{name} {n_rows}" for name, n_rows in told["devices"].items())
    if told["difference"] > TOLERANCE:
        said = f"the answer is {told['difference']:.2g} from NumPy's; up to {TOLERANCE:g} is rounding ({devices})"
        return Finding("a small run", WRONG, said, "run it on each device alone (--devices) to find out which is wrong")
    return Finding("a small run", OK, f"{ROWS} rows in {told['seconds']:.1f} s, as NumPy has them (rows: {devices})")


def _looked_at(url: str) -> str:
    """Empty where a page of the dashboard comes, else why not."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows nothing of loopback
    try:
        with opener.open(url, timeout=_PAGE_SECONDS) as page:
            return "" if b"bokeh" in page.read().lower() else "its page has no plots"
    except OSError as error:
        return str(error)


def _page(why_not: str) -> Finding:
    if why_not:
        return Finding("dashboard", WARNING, f"does not come ({why_not}); runs work without", 'pip install "bokeh>=3.1"')
    return Finding("dashboard", OK, "comes")


def _workers(connect: Callable[[], Client]) -> Iterator[Finding]:
    """What works on the workers of a scheduler."""
    made: list[Client] = []

    def reached() -> list[Finding]:
        made.append(connect())
        return [Finding("scheduler", OK, f"{made[0].scheduler.address} answers")]

    try:
        found = within("scheduler", lambda: _said(reached))
        yield from found
        if not made:
            return
        (client,) = made
        # Where one of these is wrong, those after it would only say so in other words.
        for what, look in (
            ("workers", lambda: _installed(client)),
            ("versions", lambda: clashes(client.get_versions(packages=_LOOKED_AT))),
            ("workers", lambda: _asked(client)),
            ("workers", lambda: _looked(client)),
            ("a small run", lambda: [_judged(compared(client))]),
        ):
            found = within(what, lambda look=look: _said(look))  # type: ignore[misc]
            yield from found
            if not is_well(found):
                return
    finally:
        for client in made:
            within("scheduler", lambda client=client: client.close() or [])  # type: ignore[misc]


def _said(look: Callable[[], list[Finding]]) -> list[Finding]:
    """What is found, or what an error of ours says instead."""
    try:
        return look()
    except PlanError as error:
        return [of_error("workers", DaskInferError(reason)) for reason in error.reasons]
    except DaskInferError as error:
        return [of_error("workers", error)]


def _installed(client: Client) -> list[Finding]:
    """Nothing, where scheduler and workers can import daskinfer; else what is raised says who cannot."""
    check_installed(client)
    return []


def clashes(found: Any) -> list[Finding]:
    """Versions of scheduler and workers that are not the client's, as ``client.get_versions`` tells them.

    Examples
    --------
    >>> here = {"packages": {"numpy": "2.4.0"}}
    >>> print(clashes({"client": here, "scheduler": here, "workers": {"tcp://a": {"packages": {"numpy": "1.26.0"}}}})[0])
    warning  versions         tcp://a: numpy 1.26.0; the client has 2.4.0
                              install the client's there
    """
    client = found["client"]["packages"]
    others = {"the scheduler": found["scheduler"], **found["workers"]}
    wrong = []
    for where, told in others.items():
        for name, ours in client.items():
            theirs, is_worker = told["packages"].get(name), where in found["workers"]
            if theirs == ours or not (is_worker or name in _OF_SCHEDULERS):
                continue
            fails = is_worker and (name in agreed() or (name == "python" and _minor(theirs) != _minor(ours)))
            said = f"{name} {theirs or 'is not there'}; the client has {ours or 'none'}"
            wrong.append(Finding("versions", WRONG if fails else WARNING, said, "install the client's there", where))
    n_workers = len(found["workers"])
    return wrong or [Finding("versions", OK, f"client, scheduler and {n_workers} workers have the same")]


def _minor(version: str | None) -> list[str]:
    return (version or "").split(".")[:2]


def _asked(client: Client) -> list[Finding]:
    """What every worker is asked before a run."""
    answers = ask(client, Question("doctor", memory=own_memory()))
    if not answers:
        return [Finding("workers", WRONG, "there are none", "start some: dask worker, or dask cuda worker for GPUs")]
    return [
        Finding(
            "workers",
            OK,
            f"{a.device}, {'reads rows in' if a.reads_memory else 'gets rows by sockets from'} the client",
            where=w,
        )
        for w, a in answers.items()
    ]


def _looked(client: Client) -> list[Finding]:
    """What is not well on the workers' machines."""
    found = []
    for where, told in client.run(on_worker, on_error="return").items():
        if isinstance(told, BaseException):
            said = f"could not be looked at: {type(told).__name__}: {told}"
            found.append(Finding("workers", WRONG, said, "install daskinfer there, in the client's version", where))
        else:
            found += at(where, told)
    return found
