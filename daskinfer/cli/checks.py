"""What a machine needs for a run, looked at one by one, in the client's process; and in workers' what concerns them.

Nothing here touches CUDA: a process that did can be pinned to no GPU any more. Whether torch can drive a GPU, and whether
dask-cuda and CuPy can be imported, is tried in a process of its own, which has a deadline.
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
LOOPBACK_CHECK = "loopback ports"  # the check of what no cluster of this machine works without

CHILD_SECONDS = 90.0  # for a process that imports torch and starts CUDA: some 10 s; the rest is for machines under load
WORKER_NBYTES = 512 << 20  # that a worker takes with torch imported and a small network (measured: some 300 MiB)
SCRATCH_NBYTES = 1 << 30  # free in the temporary folder: networks that are shipped to workers; arbitrary
FILES_PER_WORKER = 32  # open files and sockets that a client has for each worker (measured: some 15)
CLIENT_FILES = 256  # that it has anyhow (measured: some 80)

_DISPLAY_PACKAGES = frozenset({"bokeh", "rich", "tomli-w"})  # packages without which a run computes all the same
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
    """What an error of ours says, its cure apart: it is what stands after the first sentence."""
    found, _, cure = str(error).partition(". ")
    return Finding(check_name, WRONG, found, cure, where)


def check_packages() -> Iterator[Finding]:
    """Every package that daskinfer requires is there, and new enough."""
    wrong, shown = 0, [f"Python {sys.version.split()[0]}", f"daskinfer {metadata.version('daskinfer')}"]
    for required in map(Requirement, metadata.requires("daskinfer") or ()):
        if required.marker is not None and not required.marker.evaluate({"extra": ""}):
            continue
        found = _get_version(required.name)
        shown.append(f"{required.name} {found}")
        if not found or not required.specifier.contains(found, prereleases=True):
            wrong += 1
            state = WARNING if required.name in _DISPLAY_PACKAGES else WRONG
            said = f"{required.name} {found or 'is not installed'}; {required.specifier} is needed"
            yield Finding("packages", state, said, f'pip install "{required.name}{required.specifier}"')
    if _get_version("dask") != _get_version("distributed"):
        wrong += 1
        said = (
            f"dask {_get_version('dask')} and distributed {_get_version('distributed')}; the two have to be of one release"
        )
        yield Finding("packages", WRONG, said, 'pip install "dask[array,distributed]"')
    if not wrong:
        yield Finding("packages", OK, ", ".join(shown))


def _get_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def check_gpus() -> Iterator[Finding]:
    """GPUs as NVML sees them, against torch's build and the driver, and whether torch can drive them."""
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
        said = f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r} hides {host.n_hidden_gpus}"
        return Finding("GPUs", WARNING, f"{said}; runs use {cores}", "unset it, or name the GPUs in it")
    if host.driver:
        said = f"none, though there is a driver ({host.driver}); runs use {cores}"
        return Finding("GPUs", WARNING, said, "see what nvidia-smi says")
    return Finding("GPUs", OK, f"none, NVML finds no driver; runs use {cores}")


def _check_torch_on_gpus(uuids: list[str]) -> Iterator[Finding]:
    """What torch says in a process that sees all these GPUs."""
    try:
        told = run_in_child("torch_drives", environment={"CUDA_VISIBLE_DEVICES": ",".join(uuids)})
    except ChildError as error:
        said = f"a process in which torch computes on the GPUs failed ({error})"
        yield Finding("torch on GPUs", WRONG, said, "see what nvidia-smi says; restart the machine or the container")
        return
    if len(told) < len(uuids):
        said = f"torch sees {len(told)} of {len(uuids)} GPUs"
        yield Finding("torch on GPUs", WRONG, said, "see what nvidia-smi says of the others, or name devices")
    else:
        yield Finding("torch on GPUs", OK, f"torch computes on {', '.join(told)}")


def find_usable_gpus() -> list[str]:
    """Compute on every GPU that torch sees; for a process of its own."""
    found = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [f"cuda:{d.index}" for d in found if float(torch.ones(8, device=d).sum()) == 8]


def check_cuda_packages() -> Iterator[Finding]:
    """dask-cuda and CuPy can be imported, and are of torch's CUDA."""
    has_gpu = bool(inspect_machine().gpus)
    for name in _CUDA_PACKAGES:
        needed = has_gpu and name == "dask_cuda"
        if importlib.util.find_spec(name) is None:
            state = WRONG if needed else OK
            said = "not installed" + ("; every GPU's worker needs it" if needed else "; nothing here needs it")
            yield Finding(name, state, said, _get_install_command() if needed else "")
            continue
        try:
            version = run_in_child("imported", name)
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
    """Packages that say for which CUDA, or which Dask, they are."""
    ours = (torch.version.cuda or "").partition(".")[0]
    for name in ("cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x"):
        if ours and _get_version(name) and not name.startswith(f"cupy-cuda{ours}"):
            yield Finding("cupy", WARNING, f"{name} is there, torch is built for CUDA {ours}", _get_install_command())
    if not _get_version("rapids-dask-dependency"):
        return
    for required in map(Requirement, metadata.requires("rapids-dask-dependency") or ()):
        found = _get_version(required.name)
        if found and not required.specifier.contains(found, prereleases=True):
            said = f"dask-cuda needs {required.name}{required.specifier}; {found} is there"
            yield Finding("dask_cuda", WARNING, said, f'pip install "{required.name}{required.specifier}"')


def import_package(name: str) -> str:
    """Import a package, and say its version; for a process of its own."""
    return str(getattr(importlib.import_module(name), "__version__", ""))


def check_shared_memory() -> Iterator[Finding]:
    """Rows and answers get from this process to another of this host, and there is room for those in flight."""
    n_workers = max(1, len(inspect_machine().gpus) or inspect_machine().n_cores)
    needed = n_workers * (MAX_TASKS_IN_FLIGHT // 2) * CHUNK_NBYTES
    arena, memory = SharedMemoryPool(1 << 20, 1), advertise_process_memory()
    unnamed = arena.ref.path.startswith("/proc/")
    try:
        seen = run_in_child(
            "sees", arena.ref.path, arena.ref.token, arena.ref.nbytes, memory.pid, memory.address, memory.token.decode()
        )
    finally:
        arena.close()
    size = _get_shm_nbytes()
    shm = f"/dev/shm, {format_nbytes(size)}, is not used" if unnamed and size is not None else ""
    room = psutil.virtual_memory().available if unnamed else shutil.disk_usage(tempfile.gettempdir()).free
    kind = "memory without a name (memfd)" if unnamed else f"files in {tempfile.gettempdir()}"
    if not seen["arena"]:
        said = f"another process cannot open this one's {kind}; rows go through sockets, which is slower"
        yield Finding("shared memory", WARNING, said, "let processes of one user see each other's /proc (no hidepid)")
    elif room < needed:
        said = f"{format_nbytes(room)} is free for {kind}; chunks in flight take up to {format_nbytes(needed)}"
        yield Finding("shared memory", WARNING, said, "use fewer devices, or give the container more memory")
    else:
        yield Finding("shared memory", OK, ", ".join(filter(None, [f"{kind}, {format_nbytes(room)} free", shm])))
    if seen["memory"]:
        yield Finding("process memory", OK, "workers can read rows where they lie in the client")
    else:
        said = (
            "workers cannot read the client's memory (Yama, seccomp or the container forbids it); rows are copied once more"
        )
        yield Finding(
            "process memory", WARNING, said, "allow process_vm_readv: --cap-add SYS_PTRACE, or ptrace_scope 0 or 1"
        )


def check_memory_access(path: str, token: str, nbytes: int, pid: int, address: int, memory_token: str) -> dict[str, bool]:
    """Whether this process sees an arena and a process's memory; for a process of its own."""
    memory = ProcessMemoryRef(pid, address, memory_token.encode())
    return {"arena": can_attach(PoolRef(path, token, nbytes)), "memory": can_read_memory(memory)}


def _get_shm_nbytes() -> int | None:
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return None


def check_host_memory() -> Iterator[Finding]:
    """A worker per device has room for torch."""
    here = inspect_machine()
    n_workers = len(here.gpus) or here.n_cores
    share = memory_per_worker(n_workers, here.memory_nbytes)
    said = f"{format_nbytes(share)} for each of {n_workers} workers"
    if 0 < share < WORKER_NBYTES:
        fits = max(1, int(here.memory_nbytes // WORKER_NBYTES))
        cure = f"ask for fewer: --devices 'cpu*{min(fits, n_workers)}'"
        yield Finding("memory", WARNING, f"{said}; one with torch takes {format_nbytes(WORKER_NBYTES)}", cure)
    else:
        yield Finding("memory", OK, said)


def check_loopback() -> Iterator[Finding]:
    """Processes of this host can talk to each other."""
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            server.settimeout(5)
            port = server.getsockname()[1]
            with socket.create_connection((LOOPBACK, port), timeout=5) as one, server.accept()[0] as other:
                one.sendall(b"x")
                other.settimeout(5)
                assert other.recv(1) == b"x"
    except OSError as error:
        said = f"a process cannot be reached on {LOOPBACK} ({error})"
        yield Finding(
            LOOPBACK_CHECK, WRONG, said, "allow sockets on the loopback interface; in a container: ip link set lo up"
        )
        return
    yield Finding(LOOPBACK_CHECK, OK, f"{LOOPBACK}:{port} was opened and reached")


def check_temporary_folder() -> Iterator[Finding]:
    """There is a temporary folder that can be written, with room."""
    cure = "set TMPDIR to a folder on a local disk that can be written"
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding("temporary folder", WRONG, f"none can be written ({error})", cure)
        return
    asked = os.environ.get("TMPDIR")
    said = f"{folder}, {format_nbytes(free)} free"
    if asked and Path(asked).absolute() != Path(folder).absolute():
        yield Finding("temporary folder", WARNING, f"TMPDIR={asked!r} cannot be written; {said} is used", cure)
    elif free < SCRATCH_NBYTES:
        said += f"; a network is laid there for the workers, for which {format_nbytes(SCRATCH_NBYTES)} is little"
        yield Finding("temporary folder", WARNING, said, cure)
    else:
        yield Finding("temporary folder", OK, said)


def check_open_files() -> Iterator[Finding]:
    """A process may open as many files as a run with all devices needs."""
    import resource

    here = inspect_machine()
    needed = CLIENT_FILES + FILES_PER_WORKER * (len(here.gpus) or here.n_cores)
    allowed, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= allowed < needed:
        cure = f"ulimit -n {needed}" + (
            "" if hard < 0 or hard >= needed else f" (as root: {hard} is all this user may have)"
        )
        yield Finding("open files", WARNING, f"{allowed:,} are allowed; a run may need {needed:,}", cure)
    else:
        yield Finding("open files", OK, f"{'any number' if allowed < 0 else f'{allowed:,}'} allowed, {needed:,} needed")


Check = Callable[[], Iterator[Finding]]

# By what they look at, in the order in which they are told.
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
    """What a check finds; one that raises could not be made, and says so."""
    try:
        return list(check())
    except Exception as error:
        return [Finding(name, UNKNOWN, f"could not be looked at: {type(error).__name__}: {error}")]


def run_worker_checks() -> list[Finding]:
    """What is wrong on the machine of a worker, which runs this."""
    found = [finding for what in _WORKER_CHECKS for finding in run_check(what, CHECKS[what])]
    return [finding for finding in found if finding.state != OK]


def locate_findings(where: str, findings: list[Finding]) -> list[Finding]:
    """The same, found on a worker."""
    return [replace(finding, where=where) for finding in findings]


class ChildError(Exception):
    """A process that looked at something did not answer."""


def run_in_child(
    function: str, *arguments: Any, module: str = "cli.checks", environment: dict[str, str] | None = None
) -> Any:
    """What a function of ours answers in a process of its own.

    Raises
    ------
    ChildError
        Where it ends without an answer, or takes longer than ``CHILD_SECONDS``.
    """
    code = (
        f"import json, sys; from daskinfer.{module} import {function} as f; print(json.dumps(f(*json.loads(sys.argv[1]))))"
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
        raise ChildError(f"no answer within {CHILD_SECONDS:g} s") from None
    if done.returncode:
        logger.debug("%s in a process of its own: %s", function, done.stderr.strip())
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise ChildError(lines[-1])
    return json.loads(done.stdout.splitlines()[-1])
