"""The check of every worker before the first chunk, and how its problems are reported."""

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


def test_workers_like_the_client_have_no_problems() -> None:
    """There is no error if versions match, each GPU has one worker and nothing is missing."""
    gpus = {f"tcp://{i}": replace(WELL, device=f"cuda:{i}", uuid=f"GPU-{i}") for i in range(2)}
    assert find_incompatibilities({**gpus, "tcp://a": WELL, "tcp://b": WELL}, OURS) == []


def test_other_versions_are_errors() -> None:
    """Each version that differs from the client's is named, even if the worker has none."""
    workers = {"tcp://a": replace(WELL, versions={"Python": "3.12", "daskinfer": "0.1"})}
    found = find_incompatibilities(workers, OURS)
    assert [str(error).partition(". Install")[0] for error in found] == [
        "worker tcp://a (cpu:0) has Python 3.12, but the client has 3.11",
        "worker tcp://a (cpu:0) has torch none, but the client has 2.13",
    ]
    assert all(isinstance(error, ClusterError) for error in found)


def test_two_workers_on_one_gpu_are_an_error() -> None:
    """One GPU cannot serve two workers; the error names both, and the GPU."""
    one = replace(WELL, device="cuda:0", uuid="GPU-7")
    (found,) = find_incompatibilities({"tcp://a": one, "tcp://b": replace(one, device="cuda:1")}, OURS)
    assert isinstance(found, DeviceError)
    assert str(found).startswith("workers tcp://a, tcp://b use the same GPU (GPU-7), but each needs its own.")


def test_problems_of_a_worker_are_errors() -> None:
    """Each problem names its worker, and comes after the worker's versions."""
    problems = ("cannot read 'x'.", "cannot write 'y'.")
    workers = {"tcp://a": replace(WELL, versions={**OURS, "torch": "1"}, problems=problems)}
    messages = [str(error) for error in find_incompatibilities(workers, OURS)]
    assert messages[1:] == ["worker tcp://a (cpu:0) cannot read 'x'.", "worker tcp://a (cpu:0) cannot write 'y'."]


def test_every_worker_replies(cluster_client: Client) -> None:
    """Each managed worker returns its device, its cluster's folder, the client's versions, and that it shares memory."""
    pool = shared_memory.SharedMemoryPool(4096, 1)
    workers = check_workers(cluster_client, WorkerRequirements("unknown", pool=pool.ref))
    pool.close()
    found = sorted(workers.values(), key=lambda info: info.device)
    assert [info.device for info in found] == ["cpu:0", "cpu:1"]
    assert [(a.uuid, a.versions, a.model_loaded, a.can_attach_pool, a.problems) for a in found] == [
        ("", get_versions(), False, True, ())
    ] * 2
    assert {Path(info.scratch_path).is_dir() for info in found} == {True}


def test_memory_of_another_process_is_not_shared(cluster_client: Client) -> None:
    """Memory that is closed, or that has another token, is not taken for the client's."""
    pool = shared_memory.SharedMemoryPool(4096, 1)
    other = replace(pool.ref, token="0" * len(pool.ref.token))
    workers = check_workers(cluster_client, WorkerRequirements("unknown", pool=other))
    pool.close()
    closed = check_workers(cluster_client, WorkerRequirements("unknown", pool=pool.ref))
    assert not any(info.can_attach_pool for info in (*workers.values(), *closed.values()))


def test_workers_report_whether_they_can_read_the_clients_memory(cluster_client: Client) -> None:
    """Workers on this host read the client's memory, but not with another token, and not if no memory is advertised."""
    own = advertise_process_memory()
    for memory, reads in ((own, True), (replace(own, token=b"0" * len(own.token)), False), (None, False)):
        workers = check_workers(cluster_client, WorkerRequirements("unknown", client_memory=memory))
        assert [info.can_read_client_memory for info in workers.values()] == [reads] * 2


def test_workers_report_whether_they_have_loaded_the_model(cluster_client: Client) -> None:
    """A model that ran on a worker is loaded there for the next call."""
    net = torch.nn.Linear(3, 2)
    di.predict(net, np.ones((40, 3), np.float32), client=cluster_client, device_weights=[1, 1])
    assert all(
        info.model_loaded
        for info in check_workers(cluster_client, WorkerRequirements(Model(net).make_loader().key)).values()
    )


def test_another_version_ends_the_call(cluster_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call to workers with another torch fails before its first chunk, and names all workers."""
    monkeypatch.setattr(preflight, "get_versions", lambda: {"torch": "0.4"})
    with pytest.raises(PlanError, match=r"invalid plan, 2 problems:\n.* has torch .*, but the client has 0\.4") as caught:
        di.predict(np.negative, [1.0, 2.0], client=cluster_client)
    assert {device for device in ("(cpu:0)", "(cpu:1)") if device in str(caught.value)} == {"(cpu:0)", "(cpu:1)"}


def test_a_single_problem_is_raised_as_it_is(cluster_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single error keeps its own class."""
    monkeypatch.setattr(preflight, "find_incompatibilities", lambda *_: [DeviceError("the one")])
    with pytest.raises(DeviceError, match="the one"):
        check_workers(cluster_client, WorkerRequirements("unknown"))


def test_a_factory_that_workers_cannot_import(
    cluster_client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factory on the client's path only is an error before the first chunk, which suggests the fix."""
    (tmp_path / "of_the_client.py").write_text("def make():\n    return abs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        PlanError, match=r"cannot import the factory 'of_the_client:make' \(ModuleNotFoundError: .*PYTHONPATH"
    ):
        di.predict("of_the_client:make", [1.0, -2.0], client=cluster_client)


def test_paths_that_workers_cannot_use(cluster_client: Client, tmp_path: Path) -> None:
    """All paths that a worker cannot read or write are reported at once, for every worker."""
    requirements = WorkerRequirements(
        "unknown", input_paths=("/nowhere/x.npy", str(tmp_path)), output_paths=("/nowhere/y.npy", str(tmp_path))
    )
    with pytest.raises(PlanError, match="Use a folder that all hosts share") as caught:
        check_workers(cluster_client, requirements)
    problems = sorted(reason.partition(") ")[2].partition(". ")[0] for reason in caught.value.reasons)
    assert problems == ["cannot read '/nowhere/x.npy'"] * 2 + ["cannot write '/nowhere/y.npy'"] * 2


def test_an_input_that_only_the_client_sees_ends_the_call(
    cluster_client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call whose input no worker can read starts no chunk and leaves no output."""
    np.save(tmp_path / "x.npy", np.arange(10.0))
    build = preflight.build_requirements
    monkeypatch.setattr(
        preflight,
        "build_requirements",
        lambda loader, paths, *rest: build(loader, [f"/host/of{path}" for path in paths], *rest),
    )
    with pytest.raises(PlanError, match=r"cannot read '/host/of.*x\.npy'\. Use a folder that all hosts"):
        di.run(np.negative, tmp_path / "x.npy", tmp_path / "y.npy", client=cluster_client)
    assert not (tmp_path / "y.npy").exists()
    monkeypatch.undo()
    assert di.run(np.negative, tmp_path / "x.npy", tmp_path / "y.npy", client=cluster_client).rows == 10


def test_requirements_of_a_model_in_memory() -> None:
    """A model in memory is sent: the worker needs nothing of it."""
    loader = Model(torch.nn.Linear(1, 1)).make_loader()
    assert build_requirements(loader, ["x.npy"], ["y.npy"], None) == WorkerRequirements(
        loader.key, "", ("x.npy",), ("y.npy",), None, advertise_process_memory()
    )


def test_requirements_of_a_factory() -> None:
    """The worker must import a factory given by name; a factory that is a function travels."""
    by_name = Model("torch.nn:Linear", kwargs={"in_features": 1, "out_features": 1}).make_loader()
    assert build_requirements(by_name, (), (), None) == WorkerRequirements(
        by_name.key, "torch.nn:Linear", client_memory=advertise_process_memory()
    )


def test_requirements_of_a_weights_file(tmp_path: Path) -> None:
    """The worker must read the weights, and import the factory of their model unless it travels."""
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


def test_requirements_of_an_exported_program(tmp_path: Path) -> None:
    """The worker must read the program's file."""
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(1, 1), (torch.ones(2, 1),)), path)
    loader = Model(path, trust=True).make_loader()
    assert build_requirements(loader, (), (), None) == WorkerRequirements(
        loader.key, client_memory=advertise_process_memory(), model_file=ModelFile.from_path(str(path))
    )


def test_usable_factories_and_paths(tmp_path: Path) -> None:
    """There is no problem if the factory can be imported and the paths are accessible."""
    assert (
        preflight._find_problems(WorkerRequirements("unknown", "torch.nn:Linear", (str(tmp_path),), (str(tmp_path),))) == []
    )
    assert preflight._find_problems(WorkerRequirements("unknown", "torch.nn:Nowhere"))[0].startswith(
        "cannot import the factory"
    )
