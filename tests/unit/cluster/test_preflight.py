"""What every worker is asked before the first chunk, and how what it lacks is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from distributed import Client

import daskinfer as di
from daskinfer.cluster import preflight
from daskinfer.cluster.preflight import (
    WorkerInfo,
    WorkerRequirements,
    build_requirements,
    check_workers,
    find_incompatibilities,
    get_versions,
)
from daskinfer.errors import ClusterError, DeviceError, PlanError
from daskinfer.models.files import ModelFile
from daskinfer.models.model import Model
from daskinfer.transport import shared_memory
from daskinfer.transport.process_memory import advertise_process_memory

OURS = {"Python": "3.11", "torch": "2.13", "daskinfer": "0.1"}
WELL = WorkerInfo("cpu:0", "", OURS, model_loaded=False, scratch_path="", can_attach_pool=True, problems=())


def test_workers_like_the_client_are_well() -> None:
    """Nothing is refused where versions agree, each GPU has one worker and nothing is lacking."""
    gpus = {f"tcp://{i}": replace(WELL, device=f"cuda:{i}", uuid=f"GPU-{i}") for i in range(2)}
    assert find_incompatibilities({**gpus, "tcp://a": WELL, "tcp://b": WELL}, OURS) == []


def test_other_versions_are_refused() -> None:
    """Each version that differs from the client's is named, also one that the worker does not have."""
    answers = {"tcp://a": replace(WELL, versions={"Python": "3.12", "daskinfer": "0.1"})}
    found = find_incompatibilities(answers, OURS)
    assert [str(error).partition(";")[0] for error in found] == [
        "the worker tcp://a (cpu:0) has Python 3.12",
        "the worker tcp://a (cpu:0) has torch none",
    ]
    assert all(isinstance(error, ClusterError) for error in found)


def test_two_workers_on_one_gpu_are_refused() -> None:
    """One GPU cannot serve two workers; both are named, with the GPU."""
    one = replace(WELL, device="cuda:0", uuid="GPU-7")
    (found,) = find_incompatibilities({"tcp://a": one, "tcp://b": replace(one, device="cuda:1")}, OURS)
    assert isinstance(found, DeviceError)
    assert str(found).startswith("the workers tcp://a, tcp://b have the same GPU (GPU-7); each needs one of its own.")


def test_what_a_worker_lacks_is_refused() -> None:
    """What a worker lacks is said of it, after what is wrong with its versions."""
    answers = {"tcp://a": replace(WELL, versions={**OURS, "torch": "1"}, lacks=("cannot read 'x'.", "cannot write 'y'."))}
    said = [str(error) for error in find_incompatibilities(answers, OURS)]
    assert said[1:] == ["the worker tcp://a (cpu:0) cannot read 'x'.", "the worker tcp://a (cpu:0) cannot write 'y'."]


def test_every_worker_answers(cluster_client: Client) -> None:
    """Each worker of ours says its device, its cluster's folder, the client's versions, and that it shares memory."""
    arena = shared_memory.SharedMemoryPool(4096, 1)
    answers = check_workers(cluster_client, WorkerRequirements("unknown", pool=arena.ref))
    arena.close()
    found = sorted(answers.values(), key=lambda answer: answer.device)
    assert [answer.device for answer in found] == ["cpu:0", "cpu:1"]
    assert [(a.uuid, a.versions, a.model_loaded, a.can_attach_pool, a.problems) for a in found] == [
        ("", get_versions(), False, True, ())
    ] * 2
    assert {Path(answer.scratch_path).is_dir() for answer in found} == {True}


def test_memory_of_another_is_not_shared(cluster_client: Client) -> None:
    """Memory that is gone, or that has another token, is not taken for the client's."""
    arena = shared_memory.SharedMemoryPool(4096, 1)
    other = replace(arena.ref, token="0" * len(arena.ref.token))
    answers = check_workers(cluster_client, WorkerRequirements("unknown", pool=other))
    arena.close()
    gone = check_workers(cluster_client, WorkerRequirements("unknown", pool=arena.ref))
    assert not any(answer.can_attach_pool for answer in (*answers.values(), *gone.values()))


def test_workers_say_whether_they_read_memory(cluster_client: Client) -> None:
    """Workers of this host read the client's memory; with another token it is another's, and unasked they say no."""
    own = advertise_process_memory()
    for memory, reads in ((own, True), (replace(own, token=b"0" * len(own.token)), False), (None, False)):
        answers = check_workers(cluster_client, WorkerRequirements("unknown", client_memory=memory))
        assert [answer.can_read_client_memory for answer in answers.values()] == [reads] * 2


def test_workers_know_what_they_have_loaded(cluster_client: Client) -> None:
    """A network that ran on a worker is loaded there for the next call."""
    net = torch.nn.Linear(3, 2)
    di.predict(net, np.ones((40, 3), np.float32), client=cluster_client, device_weights=[1, 1])
    assert all(
        answer.model_loaded
        for answer in check_workers(cluster_client, WorkerRequirements(Model(net).make_loader().key)).values()
    )


def test_another_version_ends_the_call(cluster_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call to workers of another torch ends before its first chunk, with all workers named."""
    monkeypatch.setattr(preflight, "get_versions", lambda: {"torch": "0.4"})
    with pytest.raises(PlanError, match=r"for 2 reasons:\n.* has torch .*; the client has 0\.4") as caught:
        di.predict(np.negative, [1.0, 2.0], client=cluster_client)
    assert {device for device in ("(cpu:0)", "(cpu:1)") if device in str(caught.value)} == {"(cpu:0)", "(cpu:1)"}


def test_one_reason_is_raised_as_it_is(cluster_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single refusal keeps its own class."""
    monkeypatch.setattr(preflight, "find_incompatibilities", lambda *_: [DeviceError("the one")])
    with pytest.raises(DeviceError, match="the one"):
        check_workers(cluster_client, WorkerRequirements("unknown"))


def test_a_factory_that_workers_cannot_import(
    cluster_client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factory on the client's path only is refused before the first chunk, with the cure."""
    (tmp_path / "of_the_client.py").write_text("def make():\n    return abs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        PlanError, match=r"cannot import the factory 'of_the_client:make' \(ModuleNotFoundError: .*PYTHONPATH"
    ):
        di.predict("of_the_client:make", [1.0, -2.0], client=cluster_client)


def test_paths_that_workers_cannot_use(cluster_client: Client, tmp_path: Path) -> None:
    """Everything that a worker can neither read nor write is said at once, for every worker."""
    question = WorkerRequirements(
        "unknown", input_paths=("/nowhere/x.npy", str(tmp_path)), output_paths=("/nowhere/y.npy", str(tmp_path))
    )
    with pytest.raises(PlanError, match="every worker has to") as caught:
        check_workers(cluster_client, question)
    said = sorted(reason.partition(") ")[2].partition(";")[0] for reason in caught.value.reasons)
    assert said == ["cannot read '/nowhere/x.npy'"] * 2 + ["cannot write '/nowhere/y.npy'"] * 2


def test_an_input_that_only_the_client_sees_ends_the_call(
    cluster_client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call whose input no worker can read starts no chunk, and what it began is no output."""
    np.save(tmp_path / "x.npy", np.arange(10.0))
    asked = preflight.build_requirements
    monkeypatch.setattr(
        preflight,
        "build_requirements",
        lambda recipe, reads, *rest: asked(recipe, [f"/host/of{path}" for path in reads], *rest),
    )
    with pytest.raises(
        PlanError, match=r"cannot read '/host/of.*x\.npy'; every worker has to\. Use a folder that all hosts"
    ):
        di.run(np.negative, tmp_path / "x.npy", tmp_path / "y.npy", client=cluster_client)
    assert not (tmp_path / "y.npy").exists()
    monkeypatch.undo()
    assert di.run(np.negative, tmp_path / "x.npy", tmp_path / "y.npy", client=cluster_client).rows == 10


def test_the_question_of_a_network_in_memory() -> None:
    """A network in memory is shipped: nothing of it has to be there."""
    recipe = Model(torch.nn.Linear(1, 1)).make_loader()
    assert build_requirements(recipe, ["x.npy"], ["y.npy"], None) == WorkerRequirements(
        recipe.key, "", ("x.npy",), ("y.npy",), None, advertise_process_memory()
    )


def test_the_question_of_a_factory() -> None:
    """A factory by its name has to be imported, a function that is one travels."""
    by_name = Model("torch.nn:Linear", kwargs={"in_features": 1, "out_features": 1}).make_loader()
    assert build_requirements(by_name, (), (), None) == WorkerRequirements(
        by_name.key, "torch.nn:Linear", client_memory=advertise_process_memory()
    )


def test_the_question_of_a_weights_file(tmp_path: Path) -> None:
    """Weights have to be read, and the factory of their network imported unless it travels."""
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(torch.nn.Linear(1, 1).state_dict(), path)
    kwargs = {"in_features": 1, "out_features": 1}
    by_name = Model(path, factory="torch.nn:Linear", kwargs=kwargs).make_loader()
    file = ModelFile.from_path(str(path))
    expected = WorkerRequirements(
        by_name.key, "torch.nn:Linear", ("x.zarr",), client_memory=advertise_process_memory(), model_file=file
    )
    assert build_requirements(by_name, ("x.zarr",), (), None) == expected
    by_value = Model(path, factory=lambda: torch.nn.Linear(1, 1)).make_loader()
    assert build_requirements(by_value, (), (), None) == WorkerRequirements(
        by_value.key, client_memory=advertise_process_memory(), model_file=file
    )


def test_the_question_of_a_program(tmp_path: Path) -> None:
    """A program has to be read."""
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(1, 1), (torch.ones(2, 1),)), path)
    recipe = Model(path, trust=True).make_loader()
    assert build_requirements(recipe, (), (), None) == WorkerRequirements(
        recipe.key, client_memory=advertise_process_memory(), model_file=ModelFile.from_path(str(path))
    )


def test_factories_and_paths_that_are_there(tmp_path: Path) -> None:
    """Nothing is lacking where the factory can be imported and the paths used."""
    assert (
        preflight._find_problems(WorkerRequirements("unknown", "torch.nn:Linear", (str(tmp_path),), (str(tmp_path),))) == []
    )
    assert preflight._find_problems(WorkerRequirements("unknown", "torch.nn:Nowhere"))[0].startswith(
        "cannot import the factory"
    )
