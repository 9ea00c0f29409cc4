"""What every worker is asked before the first chunk: can it do this work at all?

One question to all workers at once; what cannot work is said before anything has run. The answers also tell the driver
which worker shares memory with the client, and which has loaded the network already.
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
from daskinfer.models.model import FactoryLoader, ModelLoader, WeightsLoader
from daskinfer.transport.process_memory import ProcessMemoryRef, advertise_process_memory, can_read_memory
from daskinfer.transport.shared_memory import PoolRef, can_attach
from daskinfer.worker.current_device import get_worker_device
from daskinfer.worker.loaded_models import model_cache


@dataclass(frozen=True)
class WorkerRequirements:
    """What a call needs of a worker.

    ``input_paths`` and ``output_paths`` are paths of inputs and of outputs that are being written; ``factory`` is "pkg.mod:make" or
    empty; ``pool`` is None where no rows go through shared memory, ``client_memory`` is the client's own. ``model_file`` is the
    network's, None where it has none.
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
    """What a worker says: its device and versions, whether it has the network, and what it lacks, in words."""

    device: str
    uuid: str
    versions: Mapping[str, str]
    model_loaded: bool
    scratch_path: str
    can_attach_pool: bool
    problems: tuple[str, ...]
    can_read_client_memory: bool = False


def check_workers(client: Client, requirements: WorkerRequirements) -> dict[str, WorkerInfo]:
    """Ask all workers; the answers by address.

    Raises
    ------
    DaskInferError
        Where a worker cannot do the work, all reasons at once.
    """
    asked: dict[str, Any] = client.run(_inspect_worker, requirements, on_error="return")
    # A worker that ended while it was asked is not there: it comes back, or the window goes on without it.
    found = {address: _unwrap_result(answer) for address, answer in asked.items() if not isinstance(answer, OSError)}
    reasons = find_incompatibilities(found, get_versions())
    if len(reasons) == 1:
        raise reasons[0]
    if reasons:
        raise PlanError([str(reason) for reason in reasons])
    return found


def _unwrap_result(result: WorkerInfo | BaseException) -> WorkerInfo:
    if isinstance(result, BaseException):
        raise result
    return result


def build_requirements(
    loader: ModelLoader, input_paths: Sequence[str], output_paths: Sequence[str], pool: PoolRef | None
) -> WorkerRequirements:
    """The question for a network and its files."""
    made = loader.factory if isinstance(loader, WeightsLoader) else loader
    factory = made.factory if isinstance(made, FactoryLoader) and isinstance(made.factory, str) else ""
    file = getattr(loader, "file", None)
    return WorkerRequirements(
        loader.key, factory, tuple(input_paths), tuple(output_paths), pool, advertise_process_memory(), file
    )


def get_versions() -> dict[str, str]:
    """What has to be alike everywhere: pickles of one Python are not another's, nor are torch's answers."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"Python": python, "torch": torch.__version__, "daskinfer": version("daskinfer")}


def find_incompatibilities(workers: Mapping[str, WorkerInfo], client_versions: Mapping[str, str]) -> list[DaskInferError]:
    """What cannot work, a sentence each.

    Examples
    --------
    >>> find_incompatibilities({"tcp://a": WorkerInfo("cpu:0", "", {"torch": "1"}, False, "", False, ())}, {"torch": "2"})[0].args[0]
    'the worker tcp://a (cpu:0) has torch 1; the client has 2, and the two have to agree. Install the same there.'
    """
    found: list[DaskInferError] = []
    by_uuid: dict[str, list[str]] = defaultdict(list)
    for address, answer in workers.items():
        who = f"the worker {address} ({answer.device})"
        for name, ours in client_versions.items():
            if (theirs := answer.versions.get(name, "none")) != ours:
                found.append(
                    ClusterError(
                        f"{who} has {name} {theirs}; the client has {ours}, and the two have to agree. "
                        "Install the same there."
                    )
                )
        found += [ClusterError(f"{who} {lack}") for lack in answer.problems]
        if answer.uuid:
            by_uuid[answer.uuid].append(address)
    return [
        *found,
        *(_make_duplicate_gpu_error(uuid, addresses) for uuid, addresses in by_uuid.items() if len(addresses) > 1),
    ]


def _make_duplicate_gpu_error(uuid: str, addresses: Sequence[str]) -> DeviceError:
    return DeviceError(
        f"the workers {', '.join(addresses)} have the same GPU ({uuid}); each needs one of its own. "
        "Start them with dask-cuda, or with another CUDA_VISIBLE_DEVICES each."
    )


async def _inspect_worker(requirements: WorkerRequirements, dask_worker: Any) -> WorkerInfo:
    """In the worker, on its event loop: a large file is read beside it."""
    here = get_worker_device(dask_worker)
    loaded = (requirements.model_key, str(here.torch_device)) in model_cache
    lacks = _find_problems(requirements)
    if requirements.model_file is not None and not loaded:
        lacks += await asyncio.to_thread(_check_model_file, requirements.model_file)
    return WorkerInfo(
        device=here.device,
        uuid=_get_gpu_uuid(here.torch_device),
        versions=get_versions(),
        model_loaded=loaded,
        scratch_path=os.environ.get(env.SCRATCH, ""),
        can_attach_pool=requirements.pool is not None and can_attach(requirements.pool),
        problems=tuple(lacks),
        can_read_client_memory=requirements.client_memory is not None and can_read_memory(requirements.client_memory),
    )


def _get_gpu_uuid(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    found = torch.cuda.get_device_properties(device)  # pragma: no cover - needs a GPU
    return os.environ.get(env.UUID) or f"GPU-{found.uuid}"  # pragma: no cover - needs a GPU


def _find_problems(requirements: WorkerRequirements) -> list[str]:
    found = []
    if requirements.factory:
        try:
            pkgutil.resolve_name(requirements.factory)
        except Exception as error:  # importing runs the module, which may raise anything
            found.append(
                f"cannot import the factory {requirements.factory!r} ({type(error).__name__}: {error}); every worker has to. "
                "Install its package there, or put its folder on the workers' PYTHONPATH."
            )
    for paths, mode, verb in ((requirements.input_paths, os.R_OK, "read"), (requirements.output_paths, os.W_OK, "write")):
        found += [_format_access_problem(verb, path) for path in paths if not os.access(path, mode)]
    return found


def _check_model_file(file: ModelFile) -> list[str]:
    """What is wrong with the network's file here."""
    try:
        file.check_unchanged()
    except ModelError as error:
        return [f"sees another file: {error}"]
    except OSError:
        return [_format_access_problem("read", file.path)]
    return []


def _format_access_problem(verb: str, path: str) -> str:
    return f"cannot {verb} {path!r}; every worker has to. Use a folder that all hosts share, and check its rights."
