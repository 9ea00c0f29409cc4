"""``daskinfer doctor``: check whether a run works here, and on each worker of a scheduler, and say how to fix what does not.

Every check has a deadline, and one that could not be made says so. The last is a small run on the default devices, compared
with NumPy: it meets what a real run would.
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
from daskinfer.cluster.preflight import get_versions as get_matching_versions
from daskinfer.errors import DaskInferError, PlanError
from daskinfer.transport.process_memory import advertise_process_memory

CHECK_SECONDS = 3 * CHILD_SECONDS  # for one check, including its own processes
CONNECT_SECONDS = 10.0  # until a scheduler answers: a user waits for it; arbitrary, a run gives it Dask's 30
N_ROWS, TOLERANCE = 512, 1e-4  # of the small run; arbitrary, for outputs of about 1

_COMPARED_PACKAGES = ("torch", "daskinfer", "zarr", "safetensors")  # besides those that Dask compares
_SCHEDULER_PACKAGES = frozenset({"cloudpickle", "dask", "distributed", "msgpack", "python", "toolz", "tornado"})
_DASHBOARD_SECONDS = 10.0  # until the dashboard answers; arbitrary


def is_healthy(findings: Sequence[Finding]) -> bool:
    """Return whether a run would work, as far as is known."""
    return not any(finding.state == WRONG for finding in findings)


def examine(connect: Callable[[], Client] | None = None) -> Iterator[Finding]:
    """Check this machine, and the workers of the client that ``connect`` makes; None: those of a managed cluster."""
    failed = set()
    for name, check in CHECKS.items():
        for finding in run_with_timeout(name, lambda name=name, check=check: run_check(name, check)):  # type: ignore[misc]
            failed |= {name} if finding.state == WRONG else set()
            yield finding
    if connect is not None:
        yield from _check_workers(connect)
    elif LOOPBACK_CHECK in failed:  # it would wait a minute for workers that cannot connect
        yield Finding("a small run", UNKNOWN, "was not tried: its processes could not connect to each other")
    else:
        yield from run_with_timeout("a small run", _check_small_run)


def run_with_timeout(name: str, check: Callable[[], list[Finding]], timeout: float | None = None) -> list[Finding]:
    """Return what a check finds in time; one that hangs is abandoned, with a finding that says so."""
    findings: list[Finding] = []

    def run() -> None:
        try:
            findings.extend(check())
        except Exception as error:
            findings.append(Finding(name, WRONG, f"{type(error).__name__}: {error}"))

    timeout = CHECK_SECONDS if timeout is None else timeout
    thread = threading.Thread(target=run, name="daskinfer-doctor", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        return [Finding(name, UNKNOWN, f"could not be checked within {timeout:g} s")]
    return findings


def _check_small_run() -> list[Finding]:
    """Make a small run in its own process."""
    try:
        result = run_in_child(run_small_model)
    except ChildError as error:
        return [
            Finding(
                "a small run",
                WRONG,
                f"failed: {error}",
                "fix the errors above; `daskinfer --debug doctor` shows its whole log",
            )
        ]
    return [_check_comparison(result), _make_dashboard_finding(result["page"])]


def run_small_model() -> dict[str, Any]:
    """Run a small model on the default devices, and open the dashboard meanwhile; for a child process."""
    with LocalDeviceCluster() as cluster, Client(cluster, set_as_default=False) as client:
        return {
            **compare_with_numpy(client),
            "page": _find_dashboard_problem(f"http://127.0.0.1:{cluster.scheduler.services['dashboard'].port}/status"),
        }


def compare_with_numpy(client: Client) -> dict[str, Any]:
    """Run a small model on a client's workers; return how far its output is from NumPy's, and the rows of each device."""
    rows = np.random.default_rng(0).standard_normal((N_ROWS, 16), dtype=np.float32)
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 4)
    weight, bias = (parameter.detach().numpy() for parameter in (model.weight, model.bias))
    start = time.perf_counter()
    output, report = predict(model, rows, client=client, batch_size=8, device_weights="even", return_report=True)
    seconds = time.perf_counter() - start
    difference = float(np.abs(output - (rows @ weight.T + bias)).max())
    return {"difference": difference, "devices": {d.device: d.n_rows for d in report.devices}, "seconds": seconds}


def _check_comparison(comparison: dict[str, Any]) -> Finding:
    devices = ", ".join(f"{name} {n_rows}" for name, n_rows in comparison["devices"].items())
    if comparison["difference"] > TOLERANCE:
        message = f"the output differs from NumPy's by {comparison['difference']:.2g}, more than {TOLERANCE:g} ({devices})"
        return Finding("a small run", WRONG, message, "run on each device alone (--devices) to find out which is wrong")
    return Finding("a small run", OK, f"{N_ROWS} rows in {comparison['seconds']:.1f} s, equal to NumPy's (rows: {devices})")


def _find_dashboard_problem(url: str) -> str:
    """Return why the dashboard shows no page; empty if it does."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach loopback
    try:
        with opener.open(url, timeout=_DASHBOARD_SECONDS) as page:
            return "" if b"bokeh" in page.read().lower() else "its page has no plots"
    except OSError as error:
        return str(error)


def _make_dashboard_finding(problem: str) -> Finding:
    if problem:
        return Finding(
            "dashboard", WARNING, f"is not available ({problem}); runs work without it", 'pip install "bokeh>=3.1"'
        )
    return Finding("dashboard", OK, "is available")


def _check_workers(connect: Callable[[], Client]) -> Iterator[Finding]:
    """Check the workers of a scheduler."""
    clients: list[Client] = []

    def connect_scheduler() -> list[Finding]:
        clients.append(connect())
        return [Finding("scheduler", OK, f"{clients[0].scheduler.address} answers")]

    try:
        findings = run_with_timeout("scheduler", lambda: _collect_findings(connect_scheduler))
        yield from findings
        if not clients:
            return
        (client,) = clients
        # After one that fails, the others would only repeat it in other words.
        for name, check in (
            ("workers", lambda: _check_installed(client)),
            ("versions", lambda: compare_versions(client.get_versions(packages=_COMPARED_PACKAGES))),
            ("workers", lambda: _check_requirements(client)),
            ("workers", lambda: _check_worker_machines(client)),
            ("a small run", lambda: [_check_comparison(compare_with_numpy(client))]),
        ):
            findings = run_with_timeout(name, lambda check=check: _collect_findings(check))  # type: ignore[misc]
            yield from findings
            if not is_healthy(findings):
                return
    finally:
        for client in clients:
            run_with_timeout("scheduler", lambda client=client: client.close() or [])  # type: ignore[misc]


def _collect_findings(check: Callable[[], list[Finding]]) -> list[Finding]:
    """Return what a check finds; an error that daskinfer raises on purpose is a finding."""
    try:
        return check()
    except PlanError as error:
        return [make_error_finding("workers", DaskInferError(reason)) for reason in error.reasons]
    except DaskInferError as error:
        return [make_error_finding("workers", error)]


def _check_installed(client: Client) -> list[Finding]:
    """Find nothing if the scheduler and the workers can import daskinfer; else the error says which cannot."""
    check_installed(client)
    return []


def compare_versions(versions: Any) -> list[Finding]:
    """Find versions of the scheduler and workers that differ from the client's, given ``Client.get_versions``.

    Examples
    --------
    >>> here, there = ({"packages": {"numpy": version}} for version in ("2.4.0", "1.26.0"))
    >>> print(compare_versions({"client": here, "scheduler": here, "workers": {"tcp://a": there}})[0])
    warning  versions         tcp://a: numpy 1.26.0; the client has 2.4.0
                              install the client's there
    """
    client = versions["client"]["packages"]
    others = {"the scheduler": versions["scheduler"], **versions["workers"]}
    findings = []
    for where, process in others.items():
        for name, expected in client.items():
            version, is_worker = process["packages"].get(name), where in versions["workers"]
            if version == expected or not (is_worker or name in _SCHEDULER_PACKAGES):
                continue
            is_python = name == "python" and _get_minor_version(version) != _get_minor_version(expected)
            fails = is_worker and (name in get_matching_versions() or is_python)
            message = f"{name} {version or 'is not installed'}; the client has {expected or 'none'}"
            findings.append(Finding("versions", WRONG if fails else WARNING, message, "install the client's there", where))
    n_workers = len(versions["workers"])
    return findings or [Finding("versions", OK, f"client, scheduler and {n_workers} workers have the same")]


def _get_minor_version(version: str | None) -> list[str]:
    return (version or "").split(".")[:2]


def _check_requirements(client: Client) -> list[Finding]:
    """Check what a run checks on every worker before it starts."""
    workers = check_workers(client, WorkerRequirements("doctor", client_memory=advertise_process_memory()))
    if not workers:
        return [Finding("workers", WRONG, "there are none", "start some: dask worker, or dask cuda worker for GPUs")]
    return [
        Finding(
            "workers",
            OK,
            f"{info.device}, {'reads rows in the client' if info.can_read_client_memory else 'gets rows through sockets'}",
            where=address,
        )
        for address, info in workers.items()
    ]


def _check_worker_machines(client: Client) -> list[Finding]:
    """Find what is wrong on the workers' machines."""
    findings = []
    for where, found in client.run(run_worker_checks, on_error="return").items():
        if isinstance(found, BaseException):
            message = f"could not be checked: {type(found).__name__}: {found}"
            findings.append(Finding("workers", WRONG, message, "install daskinfer there, in the client's version", where))
        else:
            findings += locate_findings(where, found)
    return findings
