"""Checks of what a run needs from a machine: in the client's process, and in workers those that concern them.

Nothing here initializes CUDA, since a process that did can no longer be pinned to a GPU. Whether torch can use a GPU, and
whether dask-cuda and CuPy can be imported, is tried in child processes, which have a deadline.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement

from daskinfer.cli.messages import use_flags
from daskinfer.cluster.worker_spec import LOOPBACK, memory_per_worker
from daskinfer.core.env import MAX_TASKS_IN_FLIGHT
from daskinfer.core.formatting import format_nbytes
from daskinfer.errors import DaskInferError
from daskinfer.hardware.device_spec import check_drivable
from daskinfer.hardware.discovery import Machine, inspect_machine
from daskinfer.scheduling.chunking import CHUNK_NBYTES
from daskinfer.transport.process_memory import ProcessMemoryRef, advertise_process_memory, can_read_memory
from daskinfer.transport.shared_memory import PoolRef, SharedMemoryPool, can_attach

logger = logging.getLogger(__name__)

OK, WARNING, WRONG, UNKNOWN = "ok", "warning", "wrong", "unknown"
LOOPBACK_CHECK = "loopback ports"  # no cluster on this machine works if this check fails

CHILD_SECONDS = 90.0  # for a process that imports torch and starts CUDA: about 10 s; the rest is for machines under load
WORKER_NBYTES = 512 << 20  # of a worker with torch and a small model (measured: about 300 MiB)
SCRATCH_NBYTES = 1 << 30  # free in the temporary folder, for models that are sent to workers; arbitrary
FILES_PER_WORKER = 32  # open files and sockets of a client for each worker (measured: about 15)
CLIENT_FILES = 256  # of a client without workers (measured: about 80)

_DISPLAY_PACKAGES = frozenset({"bokeh", "rich", "tomli-w"})  # a run computes without these packages
_CUDA_PACKAGES = ("dask_cuda", "cupy")


@dataclass(frozen=True)
class Finding:
    """What one check found.

    ``state`` is "ok", "warning", "wrong" (a run would fail), or "unknown" (the check could not be made); ``where`` is a
    worker's address, empty for the client's machine.
    """

    what: str
    state: str
    found: str
    cure: str = ""
    where: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        line = f"{self.state:8} {self.what:16} {place}{self.found}"
        return f"{line}\n{'':25} {self.cure}" if self.cure else line


def make_error_finding(check_name: str, error: Exception, where: str = "") -> Finding:
    """Make a finding of an error's message; what follows its first sentence is the cure."""
    found, _, cure = use_flags(str(error)).partition(". ")
    return Finding(check_name, WRONG, found, cure, where)


def check_packages() -> Iterator[Finding]:
    """Check that every package that daskinfer requires is installed, and new enough."""
    n_wrong, versions = 0, [f"Python {sys.version.split()[0]}", f"daskinfer {metadata.version('daskinfer')}"]
    for required in map(Requirement, metadata.requires("daskinfer") or ()):
        if required.marker is not None and not required.marker.evaluate({"extra": ""}):
            continue
        version = _get_version(required.name)
        versions.append(f"{required.name} {version}")
        if not version or not required.specifier.contains(version, prereleases=True):
            n_wrong += 1
            state = WARNING if required.name in _DISPLAY_PACKAGES else WRONG
            message = f"{required.name} {version or 'is not installed'}; {required.specifier} is needed"
            yield Finding("packages", state, message, f'pip install "{required.name}{required.specifier}"')
    if _get_version("dask") != _get_version("distributed"):
        n_wrong += 1
        message = f"dask {_get_version('dask')} and distributed {_get_version('distributed')} must have the same version"
        yield Finding("packages", WRONG, message, 'pip install "dask[array,distributed]"')
    if not n_wrong:
        yield Finding("packages", OK, ", ".join(versions))


def _get_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def check_gpus() -> Iterator[Finding]:
    """Check that torch's build and the driver support the GPUs that NVML sees, and that torch can use them."""
    here = inspect_machine()
    if not here.gpus:
        yield _explain_no_gpus(here)
        return
    names = ", ".join(f"{gpu.name} ({gpu.label})" for gpu in here.gpus)
    yield Finding("GPUs", OK, f"{names}; driver {here.driver or 'unknown'}")
    try:
        check_drivable(here.gpus, torch.version.cuda, here)
    except DaskInferError as error:
        yield make_error_finding("torch and driver", error)
        return
    yield Finding("torch and driver", OK, f"torch {torch.__version__} is built for CUDA {torch.version.cuda}")
    yield from _check_torch_on_gpus([gpu.uuid for gpu in here.gpus])


def _explain_no_gpus(host: Machine) -> Finding:
    cores = f"{host.n_cores} cores ({host.cpu_label})"
    if host.n_hidden_gpus:
        hidden = f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r} hides {host.n_hidden_gpus}"
        return Finding("GPUs", WARNING, f"{hidden}; runs use {cores}", "unset it, or name the GPUs in it")
    if host.driver:
        message = f"none, despite a driver ({host.driver}); runs use {cores}"
        return Finding("GPUs", WARNING, message, "check the output of nvidia-smi")
    return Finding("GPUs", OK, f"none, and no driver; runs use {cores}")


def _check_torch_on_gpus(uuids: list[str]) -> Iterator[Finding]:
    """Check that torch computes on these GPUs, in a process that sees all of them."""
    try:
        usable = run_in_child(find_usable_gpus, environment={"CUDA_VISIBLE_DEVICES": ",".join(uuids)})
    except ChildError as error:
        message = f"a process in which torch computes on the GPUs failed ({error})"
        cure = "check the output of nvidia-smi; restart the machine or the container"
        yield Finding("torch on GPUs", WRONG, message, cure)
        return
    if len(usable) < len(uuids):
        message = f"torch sees {len(usable)} of {len(uuids)} GPUs"
        yield Finding("torch on GPUs", WRONG, message, "check the output of nvidia-smi for the others, or name devices")
    else:
        yield Finding("torch on GPUs", OK, f"torch computes on {', '.join(usable)}")


def find_usable_gpus() -> list[str]:
    """Compute on every GPU that torch sees; for a child process."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [f"cuda:{d.index}" for d in devices if float(torch.ones(8, device=d).sum()) == 8]


def check_cuda_packages() -> Iterator[Finding]:
    """Check that dask-cuda and CuPy can be imported, and are built for torch's CUDA."""
    has_gpu = bool(inspect_machine().gpus)
    for name in _CUDA_PACKAGES:
        needed = has_gpu and name == "dask_cuda"
        if importlib.util.find_spec(name) is None:
            state = WRONG if needed else OK
            message = f"not installed; {'every GPU worker' if needed else 'nothing here'} needs it"
            yield Finding(name, state, message, _get_install_command() if needed else "")
            continue
        try:
            version = run_in_child(import_package, name)
        except ChildError as error:
            state = WRONG if needed else WARNING
            yield Finding(name, state, f"cannot be imported ({error})", _get_install_command())
            continue
        yield Finding(name, OK, f"{name} {version} can be imported")
    yield from _check_cuda_versions()


def _get_install_command() -> str:
    major = (torch.version.cuda or "13").partition(".")[0]
    return f'pip install "daskinfer[cuda{major}]"'


def _check_cuda_versions() -> Iterator[Finding]:
    """Check the packages that are built for one CUDA, or one Dask."""
    cuda = (torch.version.cuda or "").partition(".")[0]
    for name in ("cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x"):
        if cuda and _get_version(name) and not name.startswith(f"cupy-cuda{cuda}"):
            yield Finding("cupy", WARNING, f"{name} is installed; torch is built for CUDA {cuda}", _get_install_command())
    if not _get_version("rapids-dask-dependency"):
        return
    for required in map(Requirement, metadata.requires("rapids-dask-dependency") or ()):
        version = _get_version(required.name)
        if version and not required.specifier.contains(version, prereleases=True):
            message = f"dask-cuda needs {required.name}{required.specifier}; {version} is installed"
            yield Finding("dask_cuda", WARNING, message, f'pip install "{required.name}{required.specifier}"')


def import_package(name: str) -> str:
    """Import a package and return its version; for a child process."""
    return str(getattr(importlib.import_module(name), "__version__", ""))


def check_shared_memory() -> Iterator[Finding]:
    """Check that another process of this host can read rows from this one, and that those in flight have room."""
    n_workers = max(1, len(inspect_machine().gpus) or inspect_machine().n_cores)
    needed = n_workers * (MAX_TASKS_IN_FLIGHT // 2) * CHUNK_NBYTES
    pool, memory = SharedMemoryPool(1 << 20, 1), advertise_process_memory()
    unnamed, address = pool.ref.path.startswith("/proc/"), (memory.pid, memory.address, memory.token.decode())
    try:
        readable = run_in_child(check_memory_access, pool.ref.path, pool.ref.token, pool.ref.nbytes, *address)
    finally:
        pool.close()
    size = _get_shm_nbytes()
    shm = f"/dev/shm, {format_nbytes(size)}, is not used" if unnamed and size is not None else ""
    room = psutil.virtual_memory().available if unnamed else shutil.disk_usage(tempfile.gettempdir()).free
    kind = "anonymous memory (memfd)" if unnamed else f"files in {tempfile.gettempdir()}"
    if not readable["pool"]:
        message = f"another process cannot open this one's {kind}; rows go through sockets, which is slower"
        yield Finding("shared memory", WARNING, message, "let processes of one user see each other's /proc (no hidepid)")
    elif room < needed:
        message = f"{format_nbytes(room)} is free for {kind}; chunks in flight take up to {format_nbytes(needed)}"
        yield Finding("shared memory", WARNING, message, "use fewer devices, or give the container more memory")
    else:
        yield Finding("shared memory", OK, ", ".join(filter(None, [f"{kind}, {format_nbytes(room)} free", shm])))
    if readable["memory"]:
        yield Finding("process memory", OK, "workers can read rows in the client's memory")
        return
    message = (
        "workers cannot read the client's memory (Yama, seccomp or the container forbids it); rows are copied once more"
    )
    cure = "allow process_vm_readv: --cap-add SYS_PTRACE, or ptrace_scope 0 or 1"
    yield Finding("process memory", WARNING, message, cure)


def check_memory_access(path: str, token: str, nbytes: int, pid: int, address: int, memory_token: str) -> dict[str, bool]:
    """Return whether this process can open a shared memory pool and read a process's memory; for a child process."""
    memory = ProcessMemoryRef(pid, address, memory_token.encode())
    return {"pool": can_attach(PoolRef(path, token, nbytes)), "memory": can_read_memory(memory)}


def _get_shm_nbytes() -> int | None:
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return None


def check_host_memory() -> Iterator[Finding]:
    """Check that there is enough memory for a worker with torch on each device."""
    here = inspect_machine()
    n_workers = len(here.gpus) or here.n_cores
    share = memory_per_worker(n_workers, here.memory_nbytes)
    message = f"{format_nbytes(share)} for each of {n_workers} workers"
    if 0 < share < WORKER_NBYTES:
        fits = max(1, int(here.memory_nbytes // WORKER_NBYTES))
        cure = f"use fewer: --devices 'cpu*{min(fits, n_workers)}'"
        yield Finding("memory", WARNING, f"{message}; one with torch needs {format_nbytes(WORKER_NBYTES)}", cure)
    else:
        yield Finding("memory", OK, message)


def check_loopback() -> Iterator[Finding]:
    """Check that processes of this host can connect to each other."""
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            server.settimeout(5)
            port = server.getsockname()[1]
            with socket.create_connection((LOOPBACK, port), timeout=5) as one, server.accept()[0] as other:
                one.sendall(b"x")
                other.settimeout(5)
                assert other.recv(1) == b"x"
    except OSError as error:
        message = f"processes cannot connect on {LOOPBACK} ({error})"
        cure = "allow sockets on the loopback interface; in a container: ip link set lo up"
        yield Finding(LOOPBACK_CHECK, WRONG, message, cure)
        return
    yield Finding(LOOPBACK_CHECK, OK, f"a connection to {LOOPBACK}:{port} works")


def check_temporary_folder() -> Iterator[Finding]:
    """Check that the temporary folder is writable and has room."""
    cure = "set TMPDIR to a writable folder on a local disk"
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding("temporary folder", WRONG, f"none is writable ({error})", cure)
        return
    configured = os.environ.get("TMPDIR")
    message = f"{folder}, {format_nbytes(free)} free"
    if configured and Path(configured).absolute() != Path(folder).absolute():
        yield Finding("temporary folder", WARNING, f"TMPDIR={configured!r} is not writable; {message} is used", cure)
    elif free < SCRATCH_NBYTES:
        message += f"; models for the workers are stored there and may need {format_nbytes(SCRATCH_NBYTES)}"
        yield Finding("temporary folder", WARNING, message, cure)
    else:
        yield Finding("temporary folder", OK, message)


def check_open_files() -> Iterator[Finding]:
    """Check that a process may open as many files as a run on all devices needs."""
    import resource

    here = inspect_machine()
    needed = CLIENT_FILES + FILES_PER_WORKER * (len(here.gpus) or here.n_cores)
    allowed, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= allowed < needed:
        cure = f"ulimit -n {needed}"
        if 0 <= hard < needed:
            cure += f" (as root: this user's limit is {hard})"
        yield Finding("open files", WARNING, f"{allowed:,} are allowed; a run may need {needed:,}", cure)
    else:
        yield Finding("open files", OK, f"{'any number' if allowed < 0 else f'{allowed:,}'} allowed, {needed:,} needed")


Check = Callable[[], Iterator[Finding]]

# By what they check, in the order in which they are reported.
CHECKS: dict[str, Check] = {
    "packages": check_packages,
    "GPUs": check_gpus,
    "CUDA packages": check_cuda_packages,
    "memory": check_host_memory,
    "shared memory": check_shared_memory,
    LOOPBACK_CHECK: check_loopback,
    "temporary folder": check_temporary_folder,
    "open files": check_open_files,
}
_WORKER_CHECKS = ("packages", "temporary folder", "open files")


def run_check(name: str, check: Check) -> list[Finding]:
    """Return what a check finds; one that raises could not be made, and its finding says so."""
    try:
        return list(check())
    except Exception as error:
        return [Finding(name, UNKNOWN, f"could not be checked: {type(error).__name__}: {error}")]


def run_worker_checks() -> list[Finding]:
    """Return what is wrong on this machine; a worker calls it."""
    findings = [finding for name in _WORKER_CHECKS for finding in run_check(name, CHECKS[name])]
    return [finding for finding in findings if finding.state != OK]


def locate_findings(where: str, findings: list[Finding]) -> list[Finding]:
    """Return the findings as those of a worker at the address ``where``."""
    return [replace(finding, where=where) for finding in findings]


class ChildError(Exception):
    """A child process that made a check failed, or took too long."""


def run_in_child(function: Callable[..., Any], *arguments: Any, environment: dict[str, str] | None = None) -> Any:
    """Call a function of a module in a child process; arguments and result pass through JSON.

    Raises
    ------
    ChildError
        If the process fails, or takes longer than ``CHILD_SECONDS``.
    """
    code = (
        f"import json, sys; from {function.__module__} import {function.__name__} as f; "
        "print(json.dumps(f(*json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-P", "-c", code, json.dumps(arguments)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=CHILD_SECONDS,
            env={**os.environ, **(environment or {})},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ChildError(f"no result within {CHILD_SECONDS:g} s") from None
    if done.returncode:
        logger.debug("%s in a child process: %s", function.__name__, done.stderr.strip())
        lines = done.stderr.strip().splitlines() or [f"it exited with {done.returncode}"]
        raise ChildError(lines[-1])
    return json.loads(done.stdout.splitlines()[-1])
