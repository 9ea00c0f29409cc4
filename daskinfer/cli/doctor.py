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
    LOOPBACK_CHECK,
    OK,
    UNKNOWN,
    WARNING,
    WRONG,
    ChildError,
    Finding,
    locate_findings,
    make_error_finding,
    run_check,
    run_in_child,
    run_worker_checks,
)
from daskinfer.cluster.placement import check_installed
from daskinfer.cluster.preflight import WorkerRequirements, check_workers
from daskinfer.cluster.preflight import get_versions as agreed
from daskinfer.errors import DaskInferError, PlanError
from daskinfer.transport.process_memory import advertise_process_memory

CHECK_SECONDS = 3 * CHILD_SECONDS  # for one check, its own processes included
CONNECT_SECONDS = 10.0  # until a scheduler answers: whoever asks waits for it; arbitrary, a run gives it Dask's 30
N_ROWS, TOLERANCE = 512, 1e-4  # of the small run; arbitrary, of answers of about 1

_COMPARED_PACKAGES = ("torch", "daskinfer", "zarr", "safetensors")  # beside the packages that Dask compares
_SCHEDULER_PACKAGES = frozenset({"cloudpickle", "dask", "distributed", "msgpack", "python", "toolz", "tornado"})
_DASHBOARD_SECONDS = 10.0  # until the dashboard answers; arbitrary


def is_healthy(findings: Sequence[Finding]) -> bool:
    """Whether a run would work, as far as is known."""
    return not any(finding.state == WRONG for finding in findings)


def examine(connect: Callable[[], Client] | None = None) -> Iterator[Finding]:
    """Look at this machine, and at the workers of the client that ``connect`` makes; None: at a cluster of our own."""
    wrong = set()
    for what, check in CHECKS.items():
        for finding in run_with_timeout(what, lambda what=what, check=check: run_check(what, check)):  # type: ignore[misc]
            wrong |= {what} if finding.state == WRONG else set()
            yield finding
    if connect is not None:
        yield from _check_workers(connect)
    elif LOOPBACK_CHECK in wrong:  # its workers would be waited for in vain, for a minute
        yield Finding("a small run", UNKNOWN, "is not tried: its processes could not talk to each other")
    else:
        yield from run_with_timeout("a small run", _check_small_run)


def run_with_timeout(name: str, check: Callable[[], list[Finding]], timeout: float | None = None) -> list[Finding]:
    """What is found in time; a check that hangs is left behind, and said so."""
    found: list[Finding] = []

    def run() -> None:
        try:
            found.extend(check())
        except Exception as error:
            found.append(Finding(name, WRONG, f"{type(error).__name__}: {error}"))

    timeout = CHECK_SECONDS if timeout is None else timeout
    thread = threading.Thread(target=run, name="daskinfer-doctor", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        return [Finding(name, UNKNOWN, f"could not be looked at within {timeout:g} s")]
    return found


def _check_small_run() -> list[Finding]:
    """A small run in a process of its own."""
    try:
        told = run_in_child("trial", module="cli.doctor")
    except ChildError as error:
        return [
            Finding(
                "a small run",
                WRONG,
                f"failed: {error}",
                "mend what is wrong above; `daskinfer --debug doctor` shows all of its log",
            )
        ]
    return [_check_comparison(told), _make_dashboard_finding(told["page"])]


def run_small_model() -> dict[str, Any]:
    """Run a small network on the default devices, and look at the dashboard meanwhile; for a process of its own."""
    with LocalDeviceCluster() as cluster, Client(cluster, set_as_default=False) as client:
        told = compare_with_numpy(client)
        return {
            **told,
            "page": _find_dashboard_problem(f"http://127.0.0.1:{cluster.scheduler.services['dashboard'].port}/status"),
        }


def compare_with_numpy(client: Client) -> dict[str, Any]:
    """A small network on a client's workers: how far its answer is from NumPy's, and which device did how many rows."""
    rows = np.random.default_rng(0).standard_normal((N_ROWS, 16), dtype=np.float32)
    torch.manual_seed(0)
    net = torch.nn.Linear(16, 4)
    weight, bias = (parameter.detach().numpy() for parameter in (net.weight, net.bias))
    began = time.perf_counter()
    answer, report = predict(net, rows, client=client, batch_size=8, device_weights="even", return_report=True)
    seconds = time.perf_counter() - began
    difference = float(np.abs(answer - (rows @ weight.T + bias)).max())
    return {"difference": difference, "devices": {d.device: d.n_rows for d in report.devices}, "seconds": seconds}


def _check_comparison(comparison: dict[str, Any]) -> Finding:
    devices = ", ".join(f"{name} {n_rows}" for name, n_rows in comparison["devices"].items())
    if comparison["difference"] > TOLERANCE:
        said = f"the answer is {comparison['difference']:.2g} from NumPy's; up to {TOLERANCE:g} is rounding ({devices})"
        return Finding("a small run", WRONG, said, "run it on each device alone (--devices) to find out which is wrong")
    return Finding("a small run", OK, f"{N_ROWS} rows in {comparison['seconds']:.1f} s, as NumPy has them (rows: {devices})")


def _find_dashboard_problem(url: str) -> str:
    """Empty where a page of the dashboard comes, else why not."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows nothing of loopback
    try:
        with opener.open(url, timeout=_DASHBOARD_SECONDS) as page:
            return "" if b"bokeh" in page.read().lower() else "its page has no plots"
    except OSError as error:
        return str(error)


def _make_dashboard_finding(problem: str) -> Finding:
    if problem:
        return Finding("dashboard", WARNING, f"does not come ({problem}); runs work without", 'pip install "bokeh>=3.1"')
    return Finding("dashboard", OK, "comes")


def _check_workers(connect: Callable[[], Client]) -> Iterator[Finding]:
    """What works on the workers of a scheduler."""
    made: list[Client] = []

    def connect_scheduler() -> list[Finding]:
        made.append(connect())
        return [Finding("scheduler", OK, f"{made[0].scheduler.address} answers")]

    try:
        found = run_with_timeout("scheduler", lambda: _collect_findings(connect_scheduler))
        yield from found
        if not made:
            return
        (client,) = made
        # Where one of these is wrong, those after it would only say so in other words.
        for what, look in (
            ("workers", lambda: _check_installed(client)),
            ("versions", lambda: compare_versions(client.get_versions(packages=_COMPARED_PACKAGES))),
            ("workers", lambda: _check_requirements(client)),
            ("workers", lambda: _check_worker_machines(client)),
            ("a small run", lambda: [_check_comparison(compare_with_numpy(client))]),
        ):
            found = run_with_timeout(what, lambda look=look: _collect_findings(look))  # type: ignore[misc]
            yield from found
            if not is_healthy(found):
                return
    finally:
        for client in made:
            run_with_timeout("scheduler", lambda client=client: client.close() or [])  # type: ignore[misc]


def _collect_findings(check: Callable[[], list[Finding]]) -> list[Finding]:
    """What is found, or what an error of ours says instead."""
    try:
        return check()
    except PlanError as error:
        return [make_error_finding("workers", DaskInferError(reason)) for reason in error.reasons]
    except DaskInferError as error:
        return [make_error_finding("workers", error)]


def _check_installed(client: Client) -> list[Finding]:
    """Nothing, where scheduler and workers can import daskinfer; else what is raised says who cannot."""
    check_installed(client)
    return []


def compare_versions(versions: Any) -> list[Finding]:
    """Versions of scheduler and workers that are not the client's, as ``acquire_client.get_versions`` tells them.

    Examples
    --------
    >>> here = {"packages": {"numpy": "2.4.0"}}
    >>> print(compare_versions({"client": here, "scheduler": here, "workers": {"tcp://a": {"packages": {"numpy": "1.26.0"}}}})[0])
    warning  versions         tcp://a: numpy 1.26.0; the client has 2.4.0
                              install the client's there
    """
    client = versions["client"]["packages"]
    others = {"the scheduler": versions["scheduler"], **versions["workers"]}
    wrong = []
    for where, told in others.items():
        for name, ours in client.items():
            theirs, is_worker = told["packages"].get(name), where in versions["workers"]
            if theirs == ours or not (is_worker or name in _SCHEDULER_PACKAGES):
                continue
            fails = is_worker and (
                name in agreed() or (name == "python" and _get_minor_version(theirs) != _get_minor_version(ours))
            )
            said = f"{name} {theirs or 'is not there'}; the client has {ours or 'none'}"
            wrong.append(Finding("versions", WRONG if fails else WARNING, said, "install the client's there", where))
    n_workers = len(versions["workers"])
    return wrong or [Finding("versions", OK, f"client, scheduler and {n_workers} workers have the same")]


def _get_minor_version(version: str | None) -> list[str]:
    return (version or "").split(".")[:2]


def _check_requirements(client: Client) -> list[Finding]:
    """What every worker is asked before a run."""
    answers = check_workers(client, WorkerRequirements("doctor", client_memory=advertise_process_memory()))
    if not answers:
        return [Finding("workers", WRONG, "there are none", "start some: dask worker, or dask cuda worker for GPUs")]
    return [
        Finding(
            "workers",
            OK,
            f"{a.device}, {'reads rows in' if a.can_read_client_memory else 'gets rows by sockets from'} the client",
            where=w,
        )
        for w, a in answers.items()
    ]


def _check_worker_machines(client: Client) -> list[Finding]:
    """What is not well on the workers' machines."""
    found = []
    for where, told in client.run(run_worker_checks, on_error="return").items():
        if isinstance(told, BaseException):
            said = f"could not be looked at: {type(told).__name__}: {told}"
            found.append(Finding("workers", WRONG, said, "install daskinfer there, in the client's version", where))
        else:
            found += locate_findings(where, told)
    return found
