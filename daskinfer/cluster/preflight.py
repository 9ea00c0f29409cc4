"""Check before the first chunk that every worker can run the call.

One request goes to all workers at once, and every problem is reported before anything runs. The replies also say which
workers share memory with the client, and which have already loaded the model.
"""

from __future__ import annotations

import asyncio
import os
import pkgutil
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from distributed import Client

from daskinfer.core import env
from daskinfer.errors import ClusterError, DaskInferError, DeviceError, ModelError, PlanError
from daskinfer.models.files import ModelFile
from daskinfer.models.loaders import FactoryLoader, ModelLoader, WeightsLoader
from daskinfer.transport.process_memory import ProcessMemoryRef, advertise_process_memory, can_read_memory
from daskinfer.transport.shared_memory import PoolRef, can_attach
from daskinfer.worker.current_device import get_worker_device
from daskinfer.worker.loaded_models import model_cache


@dataclass(frozen=True)
class WorkerRequirements:
    """What a call needs from a worker.

    ``input_paths`` must be readable and ``output_paths`` writable. ``factory`` is "pkg.mod:make" or empty. ``pool`` is None
    if no rows travel through shared memory; ``client_memory`` refers to the client's memory. ``model_file`` is the model's
    file, None without one.
    """

    model_key: str
    factory: str = ""
    input_paths: tuple[str, ...] = ()
    output_paths: tuple[str, ...] = ()
    pool: PoolRef | None = None
    client_memory: ProcessMemoryRef | None = None
    model_file: ModelFile | None = None


@dataclass(frozen=True)
class WorkerInfo:
    """A worker's reply: its device and versions, whether it has loaded the model, and its problems as text."""

    device: str
    uuid: str
    versions: Mapping[str, str]
    model_loaded: bool
    scratch_path: str
    can_attach_pool: bool
    problems: tuple[str, ...]
    can_read_client_memory: bool = False


def check_workers(client: Client, requirements: WorkerRequirements) -> dict[str, WorkerInfo]:
    """Check all workers; return their replies by address.

    Raises
    ------
    DaskInferError
        If a worker cannot run the call, with all problems at once.
    """
    results: dict[str, Any] = client.run(_inspect_worker, requirements, on_error="return")
    # A worker that died meanwhile is missing here: it restarts, or the window continues without it.
    workers = {address: _unwrap_result(result) for address, result in results.items() if not isinstance(result, OSError)}
    problems = find_incompatibilities(workers, get_versions())
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise PlanError([str(problem) for problem in problems])
    return workers


def _unwrap_result(result: WorkerInfo | BaseException) -> WorkerInfo:
    if isinstance(result, BaseException):
        raise result
    return result


def build_requirements(
    loader: ModelLoader, input_paths: Sequence[str], output_paths: Sequence[str], pool: PoolRef | None
) -> WorkerRequirements:
    """Build the requirements of a model, its file, and the paths of inputs and outputs."""
    maker = loader.factory if isinstance(loader, WeightsLoader) else loader
    factory = maker.factory if isinstance(maker, FactoryLoader) and isinstance(maker.factory, str) else ""
    file = getattr(loader, "file", None)
    return WorkerRequirements(
        loader.key, factory, tuple(input_paths), tuple(output_paths), pool, advertise_process_memory(), file
    )


def get_versions() -> dict[str, str]:
    """Return the versions that must match everywhere: pickles depend on Python's, and outputs on torch's."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"Python": python, "torch": torch.__version__, "daskinfer": version("daskinfer")}


def find_incompatibilities(workers: Mapping[str, WorkerInfo], client_versions: Mapping[str, str]) -> list[DaskInferError]:
    """Return an error for each incompatibility of a worker with the client.

    Examples
    --------
    >>> info = WorkerInfo("cpu:0", "", {"torch": "1"}, False, scratch_path="", can_attach_pool=False, problems=())
    >>> print(*find_incompatibilities({"tcp://a": info}, {"torch": "2"}))
    worker tcp://a (cpu:0) has torch 1, but the client has 2. Install the client's version on the worker.
    """
    errors: list[DaskInferError] = []
    by_uuid: dict[str, list[str]] = defaultdict(list)
    for address, info in workers.items():
        worker = f"worker {address} ({info.device})"
        errors += [
            ClusterError(
                f"{worker} has {name} {info.versions.get(name, 'none')}, but the client has {expected}. "
                "Install the client's version on the worker."
            )
            for name, expected in client_versions.items()
            if info.versions.get(name) != expected
        ]
        errors += [ClusterError(f"{worker} {problem}") for problem in info.problems]
        if info.uuid:
            by_uuid[info.uuid].append(address)
    return [
        *errors,
        *(_make_duplicate_gpu_error(uuid, addresses) for uuid, addresses in by_uuid.items() if len(addresses) > 1),
    ]


def _make_duplicate_gpu_error(uuid: str, addresses: Sequence[str]) -> DeviceError:
    return DeviceError(
        f"workers {', '.join(addresses)} use the same GPU ({uuid}), but each needs its own. "
        "Start them with dask-cuda, or with a different CUDA_VISIBLE_DEVICES each."
    )


async def _inspect_worker(requirements: WorkerRequirements, dask_worker: Any) -> WorkerInfo:
    """Reply to the client, on the worker's event loop; a large model file is read in another thread."""
    here = get_worker_device(dask_worker)
    is_loaded = (requirements.model_key, str(here.torch_device)) in model_cache
    problems = _find_problems(requirements)
    if requirements.model_file is not None and not is_loaded:
        problems += await asyncio.to_thread(_check_model_file, requirements.model_file)
    return WorkerInfo(
        device=here.device,
        uuid=here.uuid,
        versions=get_versions(),
        model_loaded=is_loaded,
        scratch_path=os.environ.get(env.SCRATCH, ""),
        can_attach_pool=requirements.pool is not None and can_attach(requirements.pool),
        problems=tuple(problems),
        can_read_client_memory=requirements.client_memory is not None and can_read_memory(requirements.client_memory),
    )


def _find_problems(requirements: WorkerRequirements) -> list[str]:
    problems = []
    if requirements.factory:
        try:
            pkgutil.resolve_name(requirements.factory)
        except Exception as error:  # importing runs the module, which may raise anything
            problems.append(
                f"cannot import the factory {requirements.factory!r} ({type(error).__name__}: {error}). "
                "Install its package on every worker, or add its folder to the workers' PYTHONPATH."
            )
    for paths, mode, verb in ((requirements.input_paths, os.R_OK, "read"), (requirements.output_paths, os.W_OK, "write")):
        problems += [_format_access_problem(verb, path) for path in paths if not os.access(path, mode)]
    return problems


def _check_model_file(file: ModelFile) -> list[str]:
    """List the problems of the model's file on this worker."""
    try:
        file.check_unchanged()
    except ModelError as error:
        return [f"sees a different model file: {error}"]
    except OSError:
        return [_format_access_problem("read", file.path)]
    return []


def _format_access_problem(verb: str, path: str) -> str:
    return f"cannot {verb} {path!r}. Use a folder that all hosts share, and check its permissions."
