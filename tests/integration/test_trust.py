"""Model files: code in them runs only with consent, and a file that changed since the plan is never loaded."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import zarr
from click.testing import CliRunner
from distributed import Client
from torch import nn

import daskinfer as di
from daskinfer.cli.main import main
from daskinfer.cluster import preflight
from daskinfer.cluster.broadcast import _write_model_file
from daskinfer.core import env
from daskinfer.errors import ModelError
from daskinfer.execution import worker_setup
from daskinfer.models import files
from daskinfer.models.files import ModelFile, check_folder_is_private
from daskinfer.models.loaders import BroadcastLoader, ModelLoader
from daskinfer.models.model import Model

CPU = torch.device("cpu")
X = np.ones((40, 3), np.float32)
GIVEN = {"factory": "torch.nn:Linear", "kwargs": {"in_features": 3, "out_features": 2}}
NET = nn.Linear(3, 2)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


class Scripted(nn.Module):
    """Creates a file when its TorchScript is loaded."""

    def __init__(self, marker: str) -> None:
        super().__init__()
        self.marker = marker
        self.mapped = torch.ones(4)

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return (self.marker, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.marker = state[0]
        self.training = state[1]
        self.mapped = torch.from_file(state[0], shared=True, size=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def save_script(net: nn.Module, path: Path) -> Path:
    """Save a model as TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(net).save(path)
    return path


def save_program(path: Path, payload: Payload | None = None) -> Path:
    """Save a torch.export program, with ``payload`` in the place of its sample inputs if given."""
    batch = {0: torch.export.Dim("n")}
    torch.export.save(torch.export.export(NET, (torch.ones(2, 3),), dynamic_shapes=(batch,)), path)
    if payload is not None:
        with zipfile.ZipFile(path) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        buffer = io.BytesIO()
        torch.save(payload, buffer)
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, buffer.getvalue() if "sample_inputs" in name else data)
    return path


EVIL: dict[str, Callable[[Path, Path], object]] = {
    "plain.pt": lambda path, marker: path.write_bytes(pickle.dumps(Payload(marker), protocol=2)),
    "legacy.pt": lambda path, marker: torch.save(Payload(marker), path, _use_new_zipfile_serialization=False),
    "zip.pth": lambda path, marker: torch.save({"weight": torch.ones(2, 3), "bias": Payload(marker)}, path),
    "program.pt2": lambda path, marker: save_program(path, Payload(marker)),
    "script.ts": lambda path, marker: save_script(Scripted(str(marker)), path),
    "script.pt": lambda path, marker: save_script(Scripted(str(marker)), path),
}


@pytest.fixture(params=EVIL)
def evil(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A file that creates another one, the marker, when it is loaded; both paths."""
    path, marker = tmp_path / request.param, tmp_path / "marker"
    EVIL[request.param](path, marker)
    marker.unlink(missing_ok=True)
    return path, marker


REFUSED = (
    r"model file '.*' holds a .*, which can run code when loaded\. "
    r"If .*trust=True \(--trust-model\); otherwise load only weights, with factory="
)


def test_code_in_a_file_is_refused(evil: tuple[Path, Path]) -> None:
    """No function runs a file's code without trust, and each error says how to consent and what to use instead."""
    path, marker = evil
    calls: list[Callable[[], object]] = [
        lambda: Model(path).make_loader().compute_fingerprint(),
        lambda: di.plan(path, X),
        lambda: di.plan(path, X, probe=True, devices="inline"),
        lambda: di.map_blocks(path, X).compute(),
        lambda: di.predict(str(path), X, devices="inline"),
        lambda: list(di.stream(path, X, devices="inline")),
        lambda: di.predict(path, X, devices="inline", output=X[:0], options=di.Options()),
    ]
    for call in calls:
        with pytest.raises(ModelError, match=REFUSED):
            call()
    assert not marker.exists()


def test_code_is_refused_whatever_else_is_wrong(evil: tuple[Path, Path]) -> None:
    """All problems are reported at once, the missing consent among them."""
    with pytest.raises(di.DaskInferError, match=r"(?s)invalid plan, 2 problems:.*can run code"):
        di.plan(evil[0], X, batch_size=0)
    assert not evil[1].exists()


def test_code_in_a_file_that_is_trusted(evil: tuple[Path, Path]) -> None:
    """The files of these tests work: loaded with trust, each creates its marker."""
    path, marker = evil
    try:
        Model(path, trust=True).make_loader().load(CPU)
    except ModelError:  # an exit code is not a model
        assert path.suffix != ".ts"
    assert marker.exists()


@pytest.mark.parametrize("name", ["plain.pt", "legacy.pt", "zip.pth", "script.pt"])
def test_code_among_weights(tmp_path: Path, cluster_client: Client, name: str) -> None:
    """With a factory only a state dict is loaded, by client or worker, trusted or not; anything else is named."""
    EVIL[name](tmp_path / name, tmp_path / "marker")
    (tmp_path / "marker").unlink(missing_ok=True)
    for trust in (False, True):
        model = Model(tmp_path / name, trust=trust, **GIVEN)
        with pytest.raises(ModelError, match=r"more than tensors \((posix\.system|TorchScript)\).*best as \.safetensors"):
            di.plan(model, X)
        with pytest.raises(di.DaskInferError, match="holds more than tensors"):
            # output= is passed, so that a worker is the first to load the file.
            di.predict(model, X, client=cluster_client, output=np.empty((0, 2), "f4"))
    assert not (tmp_path / "marker").exists()


def test_a_swapped_file_is_not_run_by_workers(
    tmp_path: Path, cluster_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are replaced by a pickle after the workers were checked are not loaded either."""
    path, check_workers = tmp_path / "w.pth", preflight.check_workers
    torch.save(NET.state_dict(), path)

    def check(*arguments: Any) -> Any:
        infos = check_workers(*arguments)
        EVIL["zip.pth"](path, tmp_path / "marker")
        return infos

    monkeypatch.setattr(worker_setup.preflight, "check_workers", check)
    with pytest.raises(ModelError, match="has SHA-256"):
        di.predict(Model(path, **GIVEN), X, client=cluster_client)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_code_in_inputs(tmp_path: Path, suffix: str) -> None:
    """An array of pickled objects is refused, and nothing in it is unpickled."""
    path, marker = tmp_path / f"x{suffix}", tmp_path / "marker"
    if suffix == ".npy":
        np.save(path, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    else:
        zarr.create_array(path, shape=(4,), dtype="f4", chunks=(4,), zarr_format=2, compressors=None)[:] = 1
        described = (path / ".zarray").read_text().replace('"compressor": null', '"compressor": {"id": "pickle"}')
        (path / ".zarray").write_text(described)
        (path / "0").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(di.DaskInferError, match=r"pickled Python objects, which are never loaded|cannot be opened"):
        di.predict(np.sqrt, path, devices="inline")
    assert not marker.exists()


# --- what is trusted


@pytest.mark.parametrize("where", ["inline", "workers"])
@pytest.mark.parametrize("name", ["net.pt2", "net.ts", "net.pt", "net.pth", "legacy.pt"])
def test_trusted_files(tmp_path: Path, cluster_client: Client, name: str, where: str) -> None:
    """With trust, programs, TorchScript and pickled modules are run, in this process and on workers."""
    path = tmp_path / name
    if path.suffix == ".pt2":
        save_program(path)
    elif name in ("net.ts", "net.pt"):
        save_script(NET, path)
    else:
        torch.save(NET, path, _use_new_zipfile_serialization=name != "legacy.pt")
    how: dict[str, Any] = {"client": cluster_client} if where == "workers" else {"devices": "inline"}
    answer = di.predict(path, torch.from_numpy(X), trust=True, batch_size=8, **how)
    torch.testing.assert_close(answer, NET(torch.from_numpy(X)).detach())


def test_ways_to_consent(tmp_path: Path) -> None:
    """Consent is a keyword, a field of Options, a field of Model, or a flag of the command."""
    path = save_program(tmp_path / "net.pt2")
    np.save(tmp_path / "x.npy", X)
    assert di.plan(path, X, trust=True).n_rows == 40
    assert di.plan(path, X, options=di.Options(trust=True)).n_rows == 40
    assert di.map_blocks(Model(path, trust=True), X).shape == (40, 2)
    arguments = ["plan", str(path), str(tmp_path / "x.npy"), "--devices", "inline"]
    assert CliRunner().invoke(main, [*arguments, "--trust-model"]).exit_code == 0
    refused = CliRunner().invoke(main, arguments)
    assert (refused.exit_code, "--trust-model" in refused.stderr) == (2, True)
    with pytest.raises(ModelError, match="can run code"):
        di.plan(path, X, options=di.Options(trust=True), trust=False)


def test_fingerprints_of_trusted_files(tmp_path: Path) -> None:
    """A pickled module is the same model as in memory; TorchScript is identified by its file."""
    torch.save(NET, tmp_path / "net.pt")
    assert (
        Model(tmp_path / "net.pt", trust=True).make_loader().compute_fingerprint()
        == Model(NET).make_loader().compute_fingerprint()
    )
    one, other = (save_script(net, tmp_path / f"{i}.ts") for i, net in enumerate([NET, nn.Linear(3, 2)]))
    prints = [Model(path, trust=True).make_loader().compute_fingerprint() for path in (one, one, other)]
    assert prints[0] == prints[1] != prints[2]


def test_what_a_trusted_pickle_must_hold(tmp_path: Path) -> None:
    """A pickle without a module is named by its content; a state dict needs a factory."""
    torch.save({1, 2}, tmp_path / "set.pt")
    with pytest.raises(ModelError, match=r"set\.pt' must hold an nn\.Module, got set"):
        Model(tmp_path / "set.pt", trust=True).make_loader().load(CPU)
    torch.save(NET.state_dict(), tmp_path / "w.pt")
    for trust in (False, True):
        with pytest.raises(ModelError, match=r"w\.pt holds only weights, and needs a factory"):
            Model(tmp_path / "w.pt", trust=trust).make_loader()


# --- which file it is


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights of a small model in a file."""
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(NET.state_dict(), path)
    return path


def sha256_of(path: Path) -> str:
    """Compute what sha256sum prints."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(path: Path) -> None:
    """Change the file's last byte and restore its modification time."""
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_right_file(weights: Path) -> None:
    """A file with the expected SHA-256 is loaded, in any letter case."""
    for sha256 in (sha256_of(weights), sha256_of(weights).upper()):
        answer = di.predict(Model(weights, sha256=sha256, **GIVEN), X, devices="inline")
        np.testing.assert_allclose(answer, NET(torch.from_numpy(X)).detach(), rtol=1e-5)


def test_another_file_is_refused_in_the_plan(weights: Path) -> None:
    """A file with another SHA-256 is refused in the plan, by Python and by the command."""
    sha256 = sha256_of(weights)
    flip(weights)
    with pytest.raises(ModelError, match=f"has SHA-256 {sha256_of(weights)}, expected {sha256}"):
        di.plan(Model(weights, sha256=sha256, **GIVEN), X)
    np.save(weights.with_name("x.npy"), X)
    arguments = ["plan", str(weights), str(weights.with_name("x.npy")), "--factory", "torch.nn:Linear"]
    done = CliRunner().invoke(
        main, [*arguments, "--kwargs", '{"in_features": 3, "out_features": 2}', "--model-sha256", sha256]
    )
    assert (done.exit_code, "has SHA-256" in done.stderr) == (2, True)


@pytest.mark.parametrize("sha256", ["", "ab", "g" * 64, 5])
def test_malformed_sha256(weights: Path, sha256: Any) -> None:
    """Anything but 64 hexadecimal digits is refused."""
    with pytest.raises(ModelError, match=r"sha256 must be 64 hexadecimal digits .*, got "):
        Model(weights, sha256=sha256, **GIVEN).make_loader()


def send_loader(model: Model) -> ModelLoader:
    """Make a loader as a worker gets it, pickled and unpickled."""
    loader: ModelLoader = pickle.loads(pickle.dumps(model.make_loader()))
    return loader


@pytest.mark.parametrize("given", [True, False])
def test_a_file_that_changes_after_the_plan_is_not_loaded(weights: Path, given: bool) -> None:
    """One changed byte, at the same size and time, stops the load, whether user or plan provided the SHA-256."""
    loader = send_loader(Model(weights, sha256=sha256_of(weights) if given else None, **GIVEN))
    flip(weights)
    with pytest.raises(ModelError, match=r"w\.safetensors' has SHA-256 .*, expected .* Restore the file"):
        loader.load(CPU)


def test_a_change_while_it_is_loaded_changes_nothing(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes that were compared are the bytes that are loaded, even if the file changes in between."""
    loader = send_loader(Model(weights, **GIVEN))
    monkeypatch.setattr(
        files.ModelFile, "_check_sha256", lambda self, found: flip(weights) if found == self.sha256 else None
    )
    loaded = loader.load(CPU).run
    assert torch.equal(loaded.weight, NET.weight) and torch.equal(loaded.bias, NET.bias)


def test_without_files_in_memory(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On systems without files in memory, the private copy is in the temporary folder."""
    monkeypatch.delattr(os, "memfd_create")
    assert torch.equal(send_loader(Model(weights, **GIVEN)).load(CPU).run.weight, NET.weight)


def test_a_large_file_is_compared_by_its_size(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file too large to be hashed is compared by size; a SHA-256 from the user is always compared."""
    sha256 = sha256_of(weights)
    monkeypatch.setattr(files, "MAX_HASHED_NBYTES", 10)
    loader = send_loader(Model(weights, **GIVEN))
    assert loader.file.sha256 == "" and loader.file.content_sha256 == sha256
    loader.file.check_unchanged()
    assert torch.equal(loader.load(CPU).run.weight, NET.weight)
    assert Model(weights, sha256=sha256, **GIVEN).make_loader().file.sha256 == sha256
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(ModelError, match=r"has \d+ bytes, expected \d+\. Restore the file"):
        loader.load(CPU)


def test_workers_compare_before_the_first_chunk(
    weights: Path, cluster_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that see another file than the client say so before anything runs."""
    check_workers = preflight.check_workers

    def check(*arguments: Any) -> Any:
        flip(weights)
        return check_workers(*arguments)

    monkeypatch.setattr(worker_setup.preflight, "check_workers", check)
    with pytest.raises(
        di.DaskInferError, match=r"(?s)invalid plan, 2 problems:.*sees a different model file: .* has SHA-256"
    ):
        di.predict(Model(weights, **GIVEN), X, client=cluster_client)


def test_workers_without_the_file(weights: Path, cluster_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that cannot read the file say so before anything runs."""
    check_workers = preflight.check_workers

    def check(*arguments: Any) -> Any:
        weights.unlink()
        return check_workers(*arguments)

    monkeypatch.setattr(worker_setup.preflight, "check_workers", check)
    with pytest.raises(di.DaskInferError, match=r"cannot read '.*w\.safetensors'\. Use a folder that all hosts share"):
        di.predict(Model(weights, **GIVEN), X, client=cluster_client)


class LoggingLinear(nn.Linear):
    """Logs which weights it computed with."""

    log = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with open(self.log, "a") as file:
            file.write(f"{self.bias.sum().item()}\n")
        return super().forward(x)


def test_a_change_between_two_loads(weights: Path, cluster_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file changes between the loads of two workers: no chunk is computed with the changed one."""
    LoggingLinear.log = str(weights.with_name("log"))
    check_workers, loaded = preflight.check_workers, []

    def check(client: Client, requirements: Any) -> Any:
        infos = check_workers(client, requirements)
        first = min(infos)
        loaded.append(client.submit(load_there, made.make_loader(), workers=[first], pure=False).result())
        flip(weights)
        return infos

    def load_there(loader: ModelLoader) -> int:
        from daskinfer.worker.loaded_models import model_cache

        model_cache.get((loader.key, "cpu"), lambda: loader.load(torch.device("cpu")))
        return 1

    log = LoggingLinear.log

    def make() -> nn.Module:
        LoggingLinear.log = log
        return LoggingLinear(3, 2)

    made = Model(weights, factory=make)
    monkeypatch.setattr(worker_setup.preflight, "check_workers", check)
    with pytest.raises(ModelError, match="has SHA-256"):
        di.predict(made, np.ones((4000, 3), np.float32), client=cluster_client, device_weights=[1, 1], batch_size=10)
    assert loaded == [1]
    assert set(Path(log).read_text().split()) <= {str(NET.bias.sum().item())}


# --- models that are broadcast to external hosts


def test_a_folder_that_others_can_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model, which is unpickled, is neither put into nor read from a folder that others may write into."""
    monkeypatch.setenv(env.SCRATCH, str(tmp_path / "shared"))
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    refused = r"folder '.*shared' for broadcast models must be .* got drwxrwxrwx of user "
    (tmp_path / "shared" / "block").write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    with pytest.raises(ModelError, match=refused):
        BroadcastLoader("key", "block", 0).load(CPU)
    with pytest.raises(ModelError, match=refused):
        _write_model_file(None, "block", b"")
    (tmp_path / "shared").chmod(0o700)
    check_folder_is_private(str(tmp_path / "shared" / "block"))
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    with pytest.raises(ModelError, match=r"folder '.*link'"):
        check_folder_is_private(str(tmp_path / "link" / "block"))
    assert not (tmp_path / "marker").exists()


def test_from_path(weights: Path) -> None:
    """A file is recorded with its absolute path, its size and its SHA-256."""
    found = ModelFile.from_path(os.path.relpath(weights))
    assert (found.path, found.nbytes, found.sha256) == (str(weights), weights.stat().st_size, sha256_of(weights))
