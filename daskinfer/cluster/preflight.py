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
from daskinfer.models.model import FactoryCall, Recipe, WeightsFile
from daskinfer.transport.process_memory import MemoryRef, own_memory, readable
from daskinfer.transport.shared_memory import ArenaRef, reaches
from daskinfer.worker.current_device import seat_of
from daskinfer.worker.loaded_models import models


@dataclass(frozen=True)
class Question:
    """What a call needs of a worker.

    ``reads`` and ``writes`` are paths of inputs and of outputs that are being written; ``factory`` is "pkg.mod:make" or
    empty; ``arena`` is None where no rows go through shared memory, ``memory`` is the client's own. ``file`` is the
    network's, None where it has none.
    """

    key: str
    factory: str = ""
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    arena: ArenaRef | None = None
    memory: MemoryRef | None = None
    file: ModelFile | None = None


@dataclass(frozen=True)
class Answer:
    """What a worker says: its device and versions, whether it has the network, and what it lacks, in words."""

    device: str
    uuid: str
    versions: Mapping[str, str]
    loaded: bool
    scratch: str
    shares_memory: bool
    lacks: tuple[str, ...]
    reads_memory: bool = False


def ask(client: Client, question: Question) -> dict[str, Answer]:
    """Ask all workers; the answers by address.

    Raises
    ------
    DaskInferError
        Where a worker cannot do the work, all reasons at once.
    """
    asked: dict[str, Any] = client.run(_answer, question, on_error="return")
    # A worker that ended while it was asked is not there: it comes back, or the window goes on without it.
    found = {address: _raised(answer) for address, answer in asked.items() if not isinstance(answer, OSError)}
    reasons = refusals(found, versions())
    if len(reasons) == 1:
        raise reasons[0]
    if reasons:
        raise PlanError([str(reason) for reason in reasons])
    return found


def _raised(answer: Answer | BaseException) -> Answer:
    if isinstance(answer, BaseException):
        raise answer
    return answer


def question_of(recipe: Recipe, reads: Sequence[str], writes: Sequence[str], arena: ArenaRef | None) -> Question:
    """The question for a network and its files."""
    made = recipe.factory if isinstance(recipe, WeightsFile) else recipe
    factory = made.factory if isinstance(made, FactoryCall) and isinstance(made.factory, str) else ""
    file = getattr(recipe, "file", None)
    return Question(recipe.key, factory, tuple(reads), tuple(writes), arena, own_memory(), file)


def versions() -> dict[str, str]:
    """What has to be alike everywhere: pickles of one Python are not another's, nor are torch's answers."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"Python": python, "torch": torch.__version__, "daskinfer": version("daskinfer")}


def refusals(answers: Mapping[str, Answer], wanted: Mapping[str, str]) -> list[DaskInferError]:
    """What cannot work, a sentence each.

    Examples
    --------
    >>> refusals({"tcp://a": Answer("cpu:0", "", {"torch": "1"}, False, "", False, ())}, {"torch": "2"})[0].args[0]
    'the worker tcp://a (cpu:0) has torch 1; the client has 2, and the two have to agree. Install the same there.'
    """
    found: list[DaskInferError] = []
    by_uuid: dict[str, list[str]] = defaultdict(list)
    for address, answer in answers.items():
        who = f"the worker {address} ({answer.device})"
        for name, ours in wanted.items():
            if (theirs := answer.versions.get(name, "none")) != ours:
                found.append(
                    ClusterError(
                        f"{who} has {name} {theirs}; the client has {ours}, and the two have to agree. "
                        "Install the same there."
                    )
                )
        found += [ClusterError(f"{who} {lack}") for lack in answer.lacks]
        if answer.uuid:
            by_uuid[answer.uuid].append(address)
    return [*found, *(_doubled(uuid, addresses) for uuid, addresses in by_uuid.items() if len(addresses) > 1)]


def _doubled(uuid: str, addresses: Sequence[str]) -> DeviceError:
    return DeviceError(
        f"the workers {', '.join(addresses)} have the same GPU ({uuid}); each needs one of its own. "
        "Start them with dask-cuda, or with another CUDA_VISIBLE_DEVICES each."
    )


async def _answer(question: Question, dask_worker: Any) -> Answer:
    """In the worker, on its event loop: a large file is read beside it."""
    here = seat_of(dask_worker)
    loaded = (question.key, str(here.torch_device)) in models
    lacks = _lacks(question)
    if question.file is not None and not loaded:
        lacks += await asyncio.to_thread(_other_file, question.file)
    return Answer(
        device=here.device,
        uuid=_uuid(here.torch_device),
        versions=versions(),
        loaded=loaded,
        scratch=os.environ.get(env.SCRATCH, ""),
        shares_memory=question.arena is not None and reaches(question.arena),
        lacks=tuple(lacks),
        reads_memory=question.memory is not None and readable(question.memory),
    )


def _uuid(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    found = torch.cuda.get_device_properties(device)  # pragma: no cover - needs a GPU
    return os.environ.get(env.UUID) or f"GPU-{found.uuid}"  # pragma: no cover - needs a GPU


def _lacks(question: Question) -> list[str]:
    found = []
    if question.factory:
        try:
            pkgutil.resolve_name(question.factory)
        except Exception as error:  # importing runs the module, which may raise anything
            found.append(
                f"cannot import the factory {question.factory!r} ({type(error).__name__}: {error}); every worker has to. "
                "Install its package there, or put its folder on the workers' PYTHONPATH."
            )
    for paths, mode, verb in ((question.reads, os.R_OK, "read"), (question.writes, os.W_OK, "write")):
        found += [_cannot(verb, path) for path in paths if not os.access(path, mode)]
    return found


def _other_file(file: ModelFile) -> list[str]:
    """What is wrong with the network's file here."""
    try:
        file.check()
    except ModelError as error:
        return [f"sees another file: {error}"]
    except OSError:
        return [_cannot("read", file.path)]
    return []


def _cannot(verb: str, path: str) -> str:
    return f"cannot {verb} {path!r}; every worker has to. Use a folder that all hosts share, and check its rights."
