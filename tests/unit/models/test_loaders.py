from __future__ import annotations

import os
import pickle
import pkgutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from daskinfer.core import env
from daskinfer.errors import ModelError
from daskinfer.models.fingerprint import compute_fingerprint
from daskinfer.models.loaded_model import LoadedModel
from daskinfer.models.loaders import BroadcastLoader, FileLoader, InMemoryLoader, ModelLoader
from daskinfer.models.model import Model
from daskinfer.models.paths import FILE_LOADERS
from daskinfer.models.serialization import serialize_object
from daskinfer.models.shared_files import get_broadcast_path

CPU = torch.device("cpu")
X = torch.ones(2, 3)
LINEAR = {"in_features": 3, "out_features": 2}


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class Counting(nn.Module):
    """Writes into its buffer, and forgets to return itself from train()."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n_calls", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n_calls += 1
        return x + self.n_calls


class Protocol:
    """An object with all methods of the protocol; ``log`` lists the calls."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def load(self, device: str) -> None:
        self.log.append(f"load {device}")

    def __call__(self, batch: Any) -> Any:
        return batch * 2

    def close(self) -> None:
        self.log.append("close")


def make_loader(source: Any, **keywords: Any) -> ModelLoader:
    """Make a loader as a worker gets it, pickled and unpickled."""
    made = Model(source, **keywords).make_loader()
    again: ModelLoader = pickle.loads(pickle.dumps(made))
    assert (again.key, again.nbytes) == (made.key, made.nbytes)
    return again


def load(source: Any, **keywords: Any) -> LoadedModel:
    """Load a model as a worker does."""
    return make_loader(source, **keywords).load(CPU)


def linear() -> nn.Linear:
    """Make a small model with weights of its own."""
    return nn.Linear(3, 2)


def weights(path: Path, net: nn.Module, **how: Any) -> Path:
    """Save the model's state dict in the format of the suffix."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_model(net, str(path))
    else:
        torch.save(net.state_dict(), path, **how)
    return path


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """An exported program with a dynamic batch, and the model that it was exported from."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout()).eval()
    exported = torch.export.export(net, (X,), dynamic_shapes=({0: torch.export.Dim("n")},))
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    torch.export.save(exported, path)
    return path, net


# --- models in memory


def test_modules_are_loaded_for_inference() -> None:
    """A loaded module is in eval mode and needs no gradients; the caller's stays in training."""
    net = nn.Sequential(linear(), nn.Dropout()).train()
    model = load(net)
    assert model.takes_tensors
    assert not model.run.training and not any(p.requires_grad for p in model.run.parameters())
    assert net.training and net[1].training and all(p.requires_grad for p in net.parameters())


def test_the_callers_module_is_never_changed() -> None:
    """What a loaded module writes into its weights and buffers stays its own, load by load."""
    net = Counting()
    made = Model(net).make_loader()
    assert [made.load(CPU).run(torch.zeros(1)).item() for _ in range(2)] == [1, 1]
    assert net.n_calls == 0


def test_a_train_that_returns_nothing() -> None:
    """A module whose train() forgets to return itself is loaded like any other."""
    assert isinstance(load(Counting().train() or Counting()).run, Counting)


def test_tied_weights_stay_tied() -> None:
    """One weight in two layers is loaded as one."""
    loaded = load(Tied()).run
    assert loaded.first.weight is loaded.second.weight


@pytest.mark.parametrize("function", [np.abs, abs, lambda x: abs(x), Protocol().__call__])
def test_callables_get_arrays(function: Callable[..., Any]) -> None:
    """A function of any kind is keywords ndarrays, and there is nothing to close."""
    model = load(function)
    model.close()
    assert not model.takes_tensors
    assert model.run(np.full(1, 2)) in (2, 4)


def test_protocol() -> None:
    """An object is loaded on its device, called and closed, on a copy of the caller's."""
    made = Protocol()
    model = load(made)
    model.close()
    assert model.run.log == ["load cpu", "close"]
    assert made.log == []


def test_broadcast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model whose block is on the host is loaded from there, under the same key."""
    monkeypatch.setenv(env.SCRATCH, str(tmp_path))
    net = linear()
    made = InMemoryLoader(serialize_object(net))
    Path(get_broadcast_path("block")).write_bytes(made.serialized.to_bytes())
    loader = BroadcastLoader(made.key, "block", made.nbytes)
    assert torch.equal(loader.load(CPU).run(X), net(X))
    with pytest.raises(NotImplementedError, match="on the client, before the model is broadcast"):
        loader.compute_fingerprint()


def test_broadcast_but_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A missing block is named in the error."""
    monkeypatch.setenv(env.SCRATCH, str(tmp_path))
    with pytest.raises(ModelError, match=f"cannot load the model broadcast to {tmp_path}/gone: FileNotFoundError"):
        BroadcastLoader("key", "gone", 0).load(CPU)


def test_broadcast_path_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a managed cluster each user has a folder of their own."""
    monkeypatch.delenv(env.SCRATCH, raising=False)
    assert get_broadcast_path("block").endswith(f"daskinfer-{os.getuid()}/block")


def test_a_model_without_weights_yet() -> None:
    """Loading a model on the meta device fails, and the error says why."""
    with pytest.raises(ModelError, match="cannot load the model: NotImplementedError: Cannot copy out of meta"):
        load(nn.Linear(2, 2, device="meta"))


class NotHere(Protocol):
    """Cannot be loaded."""

    def load(self, device: str) -> None:
        raise OSError(f"no engine for {device}")


def test_a_load_that_raises() -> None:
    """An error in load(device) is reported with the model's name."""
    with pytest.raises(ModelError, match=r"cannot load the model: OSError: no engine for cpu\. It must load"):
        load(NotHere())


# --- weights and factories


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.PTH"])
def test_weights(tmp_path: Path, name: str) -> None:
    """A state dict in a file goes into what the factory makes."""
    net = linear()
    path = weights(tmp_path / name, net)
    model = load(path, factory="torch.nn:Linear", kwargs=LINEAR)
    assert torch.equal(model.run(X), net(X))
    assert not model.run.training
    assert make_loader(path, factory="torch.nn:Linear", kwargs=LINEAR).nbytes == path.stat().st_size


def test_weights_of_old(tmp_path: Path) -> None:
    """Files from before torch 1.6, which cannot be mapped, are read as well."""
    net = linear()
    path = weights(tmp_path / "w.pth", net, _use_new_zipfile_serialization=False)
    assert torch.equal(load(path, factory="torch.nn:Linear", kwargs=LINEAR).run(X), net(X))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_tied_weights_in_a_file(tmp_path: Path, name: str) -> None:
    """A file that holds a tied weight under one of its names fits."""
    net = Tied()
    loaded = load(weights(tmp_path / name, net), factory=Tied).run
    assert torch.equal(loaded(X), net(X))
    assert loaded.first.weight is loaded.second.weight


def test_a_relative_path(in_folder: Path) -> None:
    """A file is named by its whole path, since workers have folders of their own."""
    weights(Path("w.pt"), linear())
    made = make_loader("w.pt", factory="torch.nn:Linear", kwargs=LINEAR)
    os.chdir("/")
    assert isinstance(made.load(CPU).run, nn.Linear)


def test_a_changed_file_has_another_key(tmp_path: Path) -> None:
    """Other weights under the same name are another model; the old loader keeps its key."""
    path = weights(tmp_path / "w.pt", linear())
    before = make_loader(path, factory="torch.nn:Linear", kwargs=LINEAR)
    key = before.key
    os.utime(weights(path, linear()), ns=(1, 1))
    assert make_loader(path, factory="torch.nn:Linear", kwargs=LINEAR).key != key == before.key


@pytest.mark.parametrize(
    ("other", "name"),
    [({"kwargs": {**LINEAR, "bias": False}}, "kwargs"), ({"factory": nn.Linear}, "function")],
    ids=["kwargs", "function"],
)
def test_another_factory_has_another_key(tmp_path: Path, other: dict[str, Any], name: str) -> None:
    """The key is the weights', the factory's and its keywords'."""
    path = weights(tmp_path / "w.pt", linear())
    keywords = {"factory": "torch.nn:Linear", "kwargs": LINEAR}
    keys = [make_loader(path, **arguments).key for arguments in (keywords, keywords, {**keywords, **other})]
    assert keys[0] == keys[1] != keys[2]


def test_large_keywords_count_whole() -> None:
    """Arrays among the keywords are told apart where their repr is cut short."""
    one, other = np.zeros(5000), np.zeros(5000)
    other[2500] = 1
    keys = [make_loader("builtins:dict", kwargs={"table": table}).key for table in (one, one, other)]
    assert keys[0] == keys[1] != keys[2]


def test_keywords_are_not_shared() -> None:
    """A model among the keywords stays as it is, and every load gets its own copy."""
    net = Counting()
    made = make_loader("torch.nn:ModuleList", kwargs={"modules": [net]})
    assert made.load(CPU).run[0] is not made.load(CPU).run[0]
    assert net.training and made.nbytes == 0


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.ones(2, 3)}, r'RuntimeError.*Missing key\(s\) in state_dict: "bias"'),
        ({**nn.Linear(3, 2).state_dict(), "extra": X}, "Unexpected key.*extra"),
        (nn.Linear(4, 2).state_dict(), "size mismatch for weight"),
        ([1, 2], "w.pt: TypeError"),
        (nn.Linear(3, 2), r"holds more than tensors \(torch.nn.modules.linear.Linear\), which can run code"),
    ],
    ids=["missing", "extra", "shape", "list", "whole module"],
)
def test_weights_that_do_not_fit(tmp_path: Path, state: Any, message: str) -> None:
    """Weights must match the model exactly, or the message says which do not."""
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=f"(?s)(cannot load the model of factory torch.nn:Linear|weights file).*{message}"):
        load(tmp_path / "w.pt", factory="torch.nn:Linear", kwargs=LINEAR)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pt2"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 torn"], ids=["empty", "text", "torn"])
def test_corrupt_files(tmp_path: Path, name: str, content: bytes) -> None:
    """A corrupt file is named, together with the cause."""
    (tmp_path / name).write_bytes(content)
    keywords = {"trust": True} if name.endswith("2") else {"factory": "torch.nn:Linear", "kwargs": LINEAR}
    with pytest.raises(ModelError, match=f"(?s)cannot load the model .*{name}: .*: .*fix the file"):
        load(tmp_path / name, **keywords)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    """A file that exists on the client only is named."""
    made = make_loader(weights(tmp_path / "w.pt", linear()), factory="torch.nn:Linear", kwargs=LINEAR)
    (tmp_path / "w.pt").unlink()
    with pytest.raises(ModelError, match=r"cannot load the model .* with the weights in .*w\.pt: FileNotFoundError"):
        made.load(CPU)


FACTORIES = """
import torch
def make(n=1): return torch.nn.Linear(n, n)
def number(): return 3
def function(): return abs
def fails(): raise KeyError("config")
class Nets:
    make = staticmethod(make)
value = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with a module of factories, and one that fails when it is imported."""
    (tmp_path / "made_nets.py").write_text(FACTORIES)
    (tmp_path / "broken_nets.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("made_nets", None)


def test_factories(factories: Path) -> None:
    """A factory in an importable module is called for the model."""
    assert load("made_nets:make", kwargs={"n": 5}).run.in_features == 5
    assert load("made_nets:Nets.make").run.in_features == 1
    assert not load("made_nets:function").takes_tensors


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_package:make", "cannot import factory 'no_such_package:make' .ModuleNotFoundError: No module.*PYTHONPATH"),
        ("made_nets:missing", r"cannot import .* \(AttributeError: module 'made_nets' has no"),
        ("broken_nets:make", r"cannot import .* \(ZeroDivisionError"),
        (":make", "cannot import factory ':make'"),
        ("..made_nets:make", "cannot import factory '..made_nets:make'"),
        ("s3://bucket/net", "cannot import factory 's3://bucket/net'"),
        ("made_nets:value", r"factory made_nets:value\(\): TypeError: 'int' object is not callable"),
        ("made_nets:", "factory made_nets:..: TypeError: 'module' object is not callable"),
        ("made_nets:fails", r"cannot load the model of factory made_nets:fails\(\): KeyError: 'config'"),
        ("made_nets:number", r"factory made_nets:number\(\) must return an nn.Module, .*, got int"),
    ],
)
def test_factories_that_fail(factories: Path, source: str, message: str) -> None:
    """A failing factory is named, together with the cause."""
    with pytest.raises(ModelError, match=message):
        load(source)


def test_wrong_keywords_are_shown() -> None:
    """A call that the factory refuses is shown as it was made, long values cut short."""
    with pytest.raises(ModelError, match=r"Linear\(depth=18, table=\[0, 0, .*\.\.\.\]\): TypeError"):
        load("torch.nn:Linear", kwargs={"depth": 18, "table": [0] * 1000})


@pytest.mark.parametrize("factory", ["made_nets:function", lambda: abs])
def test_weights_into_what_has_none(factories: Path, factory: Any) -> None:
    """Weights go into modules only."""
    weights(factories / "w.pt", linear())
    with pytest.raises(ModelError, match=r"must return an nn\.Module to load weights into, got builtin_function"):
        load(factories / "w.pt", factory=factory)


def test_keywords_that_cannot_travel() -> None:
    """Keywords that hold a handle are refused by name."""
    lock = threading.Lock()
    with pytest.raises(ModelError, match=r"the factory's kwargs \(dict\) cannot be pickled for the workers"):
        Model("torch.nn:Linear", kwargs={"lock": lock}).make_loader()


def test_a_factory_function_that_cannot_travel(tmp_path: Path) -> None:
    """A factory that holds a handle is refused by name."""
    lock = threading.Lock()
    with pytest.raises(ModelError, match=r"the factory \(function\) cannot be pickled for the workers"):
        Model(weights(tmp_path / "w.pt", linear()), factory=lambda: lock).make_loader()


# --- programs


def test_a_program(program: tuple[Path, nn.Module]) -> None:
    """An exported program gives the same outputs as its model, for any number of rows."""
    path, net = program
    model = load(path, trust=True)
    assert model.takes_tensors and not any(p.requires_grad for p in model.run.parameters())
    for n in (1, 2, 7):
        torch.testing.assert_close(model.run(torch.ones(n, 3)), net(torch.ones(n, 3)))


def test_a_program_is_identified_by_its_file(program: tuple[Path, nn.Module]) -> None:
    """The same file is the same key, and its size is known without loading."""
    made = make_loader(program[0], trust=True)
    assert made.key == make_loader(str(program[0]), trust=True).key
    assert made.nbytes == program[0].stat().st_size


def test_fingerprint_of_a_program(program: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """A program saved again is the same; other weights are not."""
    loaded = torch.export.load(program[0])
    torch.export.save(loaded, tmp_path / "again.pt2")
    loaded.state_dict["0.weight"].data[0, 0] += 1
    torch.export.save(loaded, tmp_path / "other.pt2")
    paths = (program[0], tmp_path / "again.pt2", tmp_path / "other.pt2")
    same, again, other = (make_loader(path, trust=True).compute_fingerprint() for path in paths)
    assert same == again != other


# --- fingerprints


def test_fingerprint_is_the_models(tmp_path: Path) -> None:
    """A model has the same fingerprint from memory and from a file."""
    net = linear()
    keywords = {"factory": "torch.nn:Linear", "kwargs": LINEAR}
    files = [weights(tmp_path / name, net) for name in ("w.pt", "w.safetensors")]
    loaders = [make_loader(net), *(make_loader(path, **keywords) for path in files)]
    assert len({loader.compute_fingerprint() for loader in loaders}) == 1


def test_fingerprint_of_other_weights(tmp_path: Path) -> None:
    """Other weights in the file have another fingerprint."""
    keywords = {"factory": "torch.nn:Linear", "kwargs": LINEAR}
    one, other = (make_loader(weights(tmp_path / name, linear()), **keywords) for name in ("a.pt", "b.pt"))
    assert one.compute_fingerprint() != other.compute_fingerprint()


def test_fingerprint_of_a_factory(factories: Path) -> None:
    """The fingerprint of a factory is that of what it makes."""
    assert make_loader("made_nets:function").compute_fingerprint() == make_loader(abs).compute_fingerprint()


def test_fingerprint_that_fails(factories: Path) -> None:
    """An error while the model is made for its fingerprint reads like one at loading."""
    with pytest.raises(ModelError, match=r"cannot load the model of factory made_nets:fails\(\): KeyError"):
        make_loader("made_nets:fails").compute_fingerprint()


def test_version_replaces_the_content(tmp_path: Path) -> None:
    """With version= the content is not read (making this model would abort the process), and the version counts."""
    path = weights(tmp_path / "w.pt", linear())
    prints = [make_loader(path, factory="os:abort", version=version).compute_fingerprint() for version in ("1", 1, "2")]
    assert prints[0] == prints[1] != prints[2]


def test_fingerprint_in_another_process(tmp_path: Path) -> None:
    """A weights file and its factory are the same to a later process."""
    path = weights(tmp_path / "w.pt", linear())
    call = f"Model({str(path)!r}, factory='torch.nn:Linear', kwargs={LINEAR})"
    code = f"from daskinfer import Model; print({call}.make_loader().compute_fingerprint())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == make_loader(path, factory="torch.nn:Linear", kwargs=LINEAR).compute_fingerprint()


# --- the registry of file formats


class FunctionNameLoader(FileLoader):
    """A format that a test adds: a text file with the name of a NumPy function."""

    format_name = "a function's name"
    can_run_code = False

    def _load_model(self, device: torch.device) -> LoadedModel:
        return LoadedModel.from_model(getattr(np, self._read_fingerprint_source()), device)

    def _read_fingerprint_source(self) -> str:
        return Path(self.file.path).read_text()


def test_a_new_format_is_a_class_and_a_registry_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A registered loader is found by the suffix, needs no trust if its format runs no code, and is offered in messages."""
    monkeypatch.setitem(FILE_LOADERS, ".fn", (f"{__name__}:FunctionNameLoader",))
    path = tmp_path / "net.FN"
    path.write_text("sqrt")
    assert load(path).run is np.sqrt
    assert make_loader(path).compute_fingerprint() == compute_fingerprint("sqrt")
    with pytest.raises(ModelError, match=r"ending in \.safetensors, .*\.fn or a factory"):
        Model("net.unknown").make_loader()


def test_a_new_format_that_runs_code_needs_trust(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unless its class says otherwise, a format is one that can run code: without trust it is refused by its name."""
    monkeypatch.setitem(FILE_LOADERS, ".fn", (f"{__name__}:FunctionNameLoader",))
    monkeypatch.setattr(FunctionNameLoader, "can_run_code", FileLoader.can_run_code)
    path = tmp_path / "net.fn"
    path.write_text("sqrt")
    assert load(path, trust=True).run is np.sqrt
    with pytest.raises(ModelError, match="holds a function's name, which can run code"):
        load(path)


@pytest.mark.parametrize("name", sorted({name for names in FILE_LOADERS.values() for name in names}))
def test_registered_loaders_exist(name: str) -> None:
    """Each name in the registry is a loader of files that says what its format is called."""
    loader_class = pkgutil.resolve_name(name)
    assert issubclass(loader_class, FileLoader) and loader_class.format_name
