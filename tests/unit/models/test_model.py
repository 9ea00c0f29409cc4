from __future__ import annotations

import os
import pickle
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
from daskinfer.models.model import BroadcastLoader, InMemoryLoader, Model, ModelLoader, as_model
from daskinfer.models.serialization import serialize_object
from daskinfer.models.shared_files import get_broadcast_path
from daskinfer.worker.loaded import LoadedModel

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
    """What the protocol asks for; ``log`` says what was called."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def load(self, device: str) -> None:
        self.log.append(f"load {device}")

    def __call__(self, batch: Any) -> Any:
        return batch * 2

    def close(self) -> None:
        self.log.append("close")


def recipe(source: Any, **given: Any) -> ModelLoader:
    """What travels, after it travelled."""
    made = Model(source, **given).make_loader()
    again: ModelLoader = pickle.loads(pickle.dumps(made))
    assert (again.key, again.nbytes) == (made.key, made.nbytes)
    return again


def load(source: Any, **given: Any) -> LoadedModel:
    """The model as a worker loads it."""
    return recipe(source, **given).load(CPU)


def linear() -> nn.Linear:
    """A small network with weights of its own."""
    return nn.Linear(3, 2)


def weights(path: Path, net: nn.Module, **how: Any) -> Path:
    """The network's state dict in a file, in the format that the suffix names."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_model(net, str(path))
    else:
        torch.save(net.state_dict(), path, **how)
    return path


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """An exported program with a dynamic batch, and the network that it was exported from."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout()).eval()
    exported = torch.export.export(net, (X,), dynamic_shapes=({0: torch.export.Dim("n")},))
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    torch.export.save(exported, path)
    return path, net


# --- networks in memory


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
    """A function of any kind is given ndarrays, and there is nothing to close."""
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


def test_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A network whose block lies on the host is loaded from there, under the same key."""
    monkeypatch.setenv(env.SCRATCH, str(tmp_path))
    net = linear()
    made = InMemoryLoader(serialize_object(net))
    Path(get_broadcast_path("block")).write_bytes(made.serialized.to_bytes())
    shipped = BroadcastLoader(made.key, "block", made.nbytes)
    assert torch.equal(shipped.load(CPU).run(X), net(X))
    with pytest.raises(NotImplementedError, match="before it ships"):
        shipped.compute_fingerprint()


def test_shipped_but_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A block that is not there is named."""
    monkeypatch.setenv(env.SCRATCH, str(tmp_path))
    with pytest.raises(ModelError, match=f"the model shipped to {tmp_path}/gone cannot be loaded: FileNotFoundError"):
        BroadcastLoader("key", "gone", 0).load(CPU)


def test_shipped_path_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere each user has a folder of their own."""
    monkeypatch.delenv(env.SCRATCH, raising=False)
    assert get_broadcast_path("block").endswith(f"daskinfer-{os.getuid()}/block")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "the model is a int, which cannot be called on arrays; allowed are an nn.Module"),
        (None, "the model is a NoneType, which cannot"),
        (b"net.pt", "the model is a bytes, which cannot"),
        ({"weight": X}, "the model is a dict, which cannot"),
        (nn.Linear, "the model is a class Linear, which cannot"),
        (Model("a:b"), "the model is a Model, which cannot"),
        (threading.Lock().acquire, "the model .* cannot be sent to workers"),
        ("", "the model '' is neither a file ending in .safetensors, .pt2, .ts, .pt, .pth nor a factory"),
        ("resnet18", "the model 'resnet18' is neither"),
        ("net.onnx", "the model 'net.onnx' is neither"),
        ("net.safetensors", "net.safetensors holds weights only; a factory has to make the network"),
        ("net.pt", "the model file 'net.pt' does not exist"),
        (Path("net.PTH"), "the model file 'net.PTH' does not exist"),
        ("gone.pt2", "the model file 'gone.pt2' does not exist"),
    ],
)
def test_what_is_no_model(in_folder: Path, source: Any, message: str) -> None:
    """A source that is not understood is refused before anything travels."""
    with pytest.raises(ModelError, match=message):
        Model(source).make_loader()


def test_a_program_in_memory() -> None:
    """An exported program that was not saved is refused, and the message names the file that is needed."""
    exported = torch.export.export(linear(), (X,))
    with pytest.raises(ModelError, match=r"is a ExportedProgram, which cannot be called .*a path \(a program's is .pt2\)"):
        Model(exported).make_loader()


@pytest.mark.parametrize(
    ("source", "given", "message"),
    [
        (linear(), {"kwargs": LINEAR}, "the model Linear was given kwargs=; factory= goes with a file of weights"),
        (linear(), {"factory": "torch.nn:Linear"}, "the model Linear was given factory=;"),
        ("torch.nn:Linear", {"factory": "torch.nn:Linear"}, "the model torch.nn:Linear was given factory=;"),
        ("net.pt2", {"kwargs": LINEAR}, "the model net.pt2 was given kwargs=;.* Leave kwargs= .--kwargs. out"),
        ("net.ts", {"factory": "torch.nn:Linear"}, "the model net.ts was given factory=;"),
        ("torch.nn:Linear", {"sha256": "0" * 64}, "torch.nn:Linear was given sha256=;.*, sha256= with a file"),
        (linear(), {"sha256": "0" * 64}, "the model Linear was given sha256=;"),
        (linear(), {"trust": "yes"}, "trust is 'yes'; it may be True or False"),
    ],
)
def test_what_a_source_has_no_use_for(source: Any, given: dict[str, Any], message: str) -> None:
    """A factory or keywords that nobody would call are refused, not ignored."""
    with pytest.raises(ModelError, match=message):
        Model(source, **given).make_loader()


def test_a_network_without_weights_yet() -> None:
    """A network on the meta device says so when it is loaded."""
    with pytest.raises(ModelError, match="the model cannot be loaded: NotImplementedError: Cannot copy out of meta"):
        load(nn.Linear(2, 2, device="meta"))


class NotHere(Protocol):
    """Cannot be loaded."""

    def load(self, device: str) -> None:
        raise OSError(f"no engine for {device}")


def test_a_load_that_raises() -> None:
    """What goes wrong in load(device) is said with the model's name."""
    with pytest.raises(ModelError, match=r"the model cannot be loaded: OSError: no engine for cpu\. It has to load"):
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
    assert recipe(path, factory="torch.nn:Linear", kwargs=LINEAR).nbytes == path.stat().st_size


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
    made = recipe("w.pt", factory="torch.nn:Linear", kwargs=LINEAR)
    os.chdir("/")
    assert isinstance(made.load(CPU).run, nn.Linear)


def test_a_changed_file_has_another_key(tmp_path: Path) -> None:
    """Other weights under the same name are another model; the old recipe keeps its key."""
    path = weights(tmp_path / "w.pt", linear())
    before = recipe(path, factory="torch.nn:Linear", kwargs=LINEAR)
    key = before.key
    os.utime(weights(path, linear()), ns=(1, 1))
    assert recipe(path, factory="torch.nn:Linear", kwargs=LINEAR).key != key == before.key


@pytest.mark.parametrize(
    ("other", "name"),
    [({"kwargs": {**LINEAR, "bias": False}}, "kwargs"), ({"factory": nn.Linear}, "function")],
    ids=["kwargs", "function"],
)
def test_another_factory_has_another_key(tmp_path: Path, other: dict[str, Any], name: str) -> None:
    """The key is the weights', the factory's and its keywords'."""
    path = weights(tmp_path / "w.pt", linear())
    given = {"factory": "torch.nn:Linear", "kwargs": LINEAR}
    assert recipe(path, **given).key == recipe(path, **given).key != recipe(path, **{**given, **other}).key


def test_large_keywords_count_whole() -> None:
    """Arrays among the keywords are told apart where their repr is cut short."""
    one, other = np.zeros(5000), np.zeros(5000)
    other[2500] = 1
    keys = [recipe("builtins:dict", kwargs={"table": table}).key for table in (one, one, other)]
    assert keys[0] == keys[1] != keys[2]


def test_keywords_are_not_shared() -> None:
    """A network among the keywords stays as it is, and every load gets one of its own."""
    net = Counting()
    made = recipe("torch.nn:ModuleList", kwargs={"modules": [net]})
    assert made.load(CPU).run[0] is not made.load(CPU).run[0]
    assert net.training and made.nbytes == 0


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.ones(2, 3)}, r'cannot be loaded: RuntimeError.*Missing key\(s\) in state_dict: "bias"'),
        ({**nn.Linear(3, 2).state_dict(), "extra": X}, "Unexpected key.*extra"),
        (nn.Linear(4, 2).state_dict(), "size mismatch for weight"),
        ([1, 2], "w.pt cannot be loaded: TypeError"),
        (nn.Linear(3, 2), r"holds more than tensors \(torch.nn.modules.linear.Linear\), which can run code"),
    ],
    ids=["missing", "extra", "shape", "list", "whole module"],
)
def test_weights_that_do_not_fit(tmp_path: Path, state: Any, message: str) -> None:
    """Weights fit to the letter, or the message says which do not."""
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=f"(?s)the (network of the factory torch.nn:Linear|weights file).*{message}"):
        load(tmp_path / "w.pt", factory="torch.nn:Linear", kwargs=LINEAR)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pt2"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 torn"], ids=["empty", "text", "torn"])
def test_corrupt_files(tmp_path: Path, name: str, content: bytes) -> None:
    """A file that cannot be read is named, and so is what is wrong with it."""
    (tmp_path / name).write_bytes(content)
    given = {"trust": True} if name.endswith("2") else {"factory": "torch.nn:Linear", "kwargs": LINEAR}
    with pytest.raises(ModelError, match=f"(?s){name} cannot be loaded: .*: .*Correct the file"):
        load(tmp_path / name, **given)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    """A file that the client had and the worker has not is named."""
    made = recipe(weights(tmp_path / "w.pt", linear()), factory="torch.nn:Linear", kwargs=LINEAR)
    (tmp_path / "w.pt").unlink()
    with pytest.raises(ModelError, match=r"w\.pt cannot be loaded: FileNotFoundError"):
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
    """A name in an importable module is called for the network."""
    assert load("made_nets:make", kwargs={"n": 5}).run.in_features == 5
    assert load("made_nets:Nets.make").run.in_features == 1
    assert not load("made_nets:function").takes_tensors


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_package:make", "'no_such_package:make' cannot be imported .ModuleNotFoundError: No module.*PYTHONPATH"),
        ("made_nets:missing", r"cannot be imported \(AttributeError: module 'made_nets' has no"),
        ("broken_nets:make", r"cannot be imported \(ZeroDivisionError"),
        (":make", "the factory ':make' cannot be imported"),
        ("..made_nets:make", "the factory '..made_nets:make' cannot be imported"),
        ("s3://bucket/net", "the factory 's3://bucket/net' cannot be imported"),
        ("made_nets:value", r"the factory made_nets:value\(\) cannot be loaded: TypeError: 'int' object is not callable"),
        ("made_nets:", "the factory made_nets:.. cannot be loaded: TypeError: 'module' object is not callable"),
        ("made_nets:fails", r"the network of the factory made_nets:fails\(\) cannot be loaded: KeyError: 'config'"),
        ("made_nets:number", r"the factory made_nets:number\(\) returned a int; it has to return an nn.Module"),
    ],
)
def test_factories_that_fail(factories: Path, source: str, message: str) -> None:
    """What is wrong with a factory is said by its name."""
    with pytest.raises(ModelError, match=message):
        load(source)


def test_wrong_keywords_are_shown() -> None:
    """A call that the factory refuses is shown as it was made, long values cut short."""
    with pytest.raises(ModelError, match=r"Linear\(depth=18, table=\[0, 0, .*\.\.\.\]\) cannot be loaded: TypeError"):
        load("torch.nn:Linear", kwargs={"depth": 18, "table": [0] * 1000})


@pytest.mark.parametrize("factory", ["made_nets:function", lambda: abs])
def test_weights_into_what_has_none(factories: Path, factory: Any) -> None:
    """Weights go into modules only."""
    weights(factories / "w.pt", linear())
    with pytest.raises(ModelError, match=r"returned a builtin_function_or_method; weights can only be loaded into an nn"):
        load(factories / "w.pt", factory=factory)


def test_keywords_that_cannot_travel() -> None:
    """Keywords that hold a handle are refused by name."""
    lock = threading.Lock()
    with pytest.raises(ModelError, match=r"the factory's kwargs \(dict\) cannot be sent"):
        Model("torch.nn:Linear", kwargs={"lock": lock}).make_loader()


def test_a_factory_function_that_cannot_travel(tmp_path: Path) -> None:
    """A factory that holds a handle is refused by name."""
    lock = threading.Lock()
    with pytest.raises(ModelError, match=r"the factory \(function\) cannot be sent to workers"):
        Model(weights(tmp_path / "w.pt", linear()), factory=lambda: lock).make_loader()


# --- programs


def test_a_program(program: tuple[Path, nn.Module]) -> None:
    """An exported program gives the same answers as its network, for any number of rows."""
    path, net = program
    model = load(path, trust=True)
    assert model.takes_tensors and not any(p.requires_grad for p in model.run.parameters())
    for n in (1, 2, 7):
        torch.testing.assert_close(model.run(torch.ones(n, 3)), net(torch.ones(n, 3)))


def test_a_program_is_known_by_its_file(program: tuple[Path, nn.Module]) -> None:
    """The same file is the same key, and its size is known without loading."""
    made = recipe(program[0], trust=True)
    assert made.key == recipe(str(program[0]), trust=True).key
    assert made.nbytes == program[0].stat().st_size


def test_fingerprint_of_a_program(program: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """A program saved again is the same; other weights are not."""
    loaded = torch.export.load(program[0])
    torch.export.save(loaded, tmp_path / "again.pt2")
    loaded.state_dict["0.weight"].data[0, 0] += 1
    torch.export.save(loaded, tmp_path / "other.pt2")
    paths = (program[0], tmp_path / "again.pt2", tmp_path / "other.pt2")
    same, again, other = (recipe(path, trust=True).compute_fingerprint() for path in paths)
    assert same == again != other


# --- fingerprints


def test_fingerprint_is_the_networks(tmp_path: Path) -> None:
    """However a network comes, from memory or from a file, it is the same network."""
    net = linear()
    given = {"factory": "torch.nn:Linear", "kwargs": LINEAR}
    files = [weights(tmp_path / name, net) for name in ("w.pt", "w.safetensors")]
    prints = [recipe(net).compute_fingerprint(), *(recipe(path, **given).compute_fingerprint() for path in files)]
    assert len(set(prints)) == 1


def test_fingerprint_of_other_weights(tmp_path: Path) -> None:
    """Other weights in the file, or another network around them, count."""
    given = {"factory": "torch.nn:Linear", "kwargs": LINEAR}
    one, other = (recipe(weights(tmp_path / name, linear()), **given).compute_fingerprint() for name in ("a.pt", "b.pt"))
    assert one != other


def test_fingerprint_of_a_factory(factories: Path) -> None:
    """What a factory makes is read."""
    assert recipe("made_nets:function").compute_fingerprint() == recipe(abs).compute_fingerprint()


def test_fingerprint_that_fails(factories: Path) -> None:
    """What goes wrong while the network is made to be read is said as when it is loaded."""
    with pytest.raises(ModelError, match=r"made_nets:fails\(\) cannot be loaded: KeyError"):
        recipe("made_nets:fails").compute_fingerprint()


def test_version_says_it_instead(tmp_path: Path) -> None:
    """With version= the content is not read (making this network would end the process), and the version is what counts."""
    path = weights(tmp_path / "w.pt", linear())
    prints = [recipe(path, factory="os:abort", version=version).compute_fingerprint() for version in ("1", 1, "2")]
    assert prints[0] == prints[1] != prints[2]


def test_fingerprint_in_another_process(tmp_path: Path) -> None:
    """A weights file and its factory are the same to a later process."""
    path = weights(tmp_path / "w.pt", linear())
    call = f"Model({str(path)!r}, factory='torch.nn:Linear', kwargs={LINEAR})"
    code = f"from daskinfer import Model; print({call}.make_loader().compute_fingerprint())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == recipe(path, factory="torch.nn:Linear", kwargs=LINEAR).compute_fingerprint()


# --- the record itself


@pytest.mark.parametrize(
    "model",
    [
        Model("pkg.mod:make"),
        Model("w.pt", factory="pkg.mod:make"),
        Model("w.safetensors", factory="pkg.mod:make", kwargs={"depth": 18, "act": "relu"}, version="2", sha256="ab" * 32),
        Model("net.pt2", trust=True),
    ],
)
def test_repr_is_the_call(model: Model) -> None:
    """A Model prints as what would make it."""
    assert eval(repr(model)) == model


def test_a_notebook_shows_what_a_model_was_made_with() -> None:
    """What was given is a row each; networks keep their lines, and all of it is text."""
    page = Model("<b>.pt", factory="pkg.mod:make", trust=True)._repr_html_()
    assert "<b>" not in page
    assert page.count("<tr>") == 4
    assert "<td>trust</td><td>True</td>" in page
    assert '<td style="white-space:pre-wrap">Sequential(' in Model(nn.Sequential(linear()))._repr_html_()


@pytest.mark.parametrize(
    ("source", "name"),
    [("a/w.pt", "w.pt"), (Path("a/w.pt"), "w.pt"), ("pkg.mod:make", "pkg.mod:make"), (linear(), "Linear"), (abs, "abs")],
)
def test_name(source: Any, name: str) -> None:
    """A model has a short name."""
    assert Model(source).name == name


def test_making_a_model_touches_nothing() -> None:
    """Neither file nor factory need exist before the model is used."""
    assert Model("/no/such/w.pt", factory="no_such:make").version is None


def test_as_model() -> None:
    """A Model is taken as it is, all else becomes one."""
    model = Model(abs)
    assert as_model(model) is model
    assert as_model(abs) == model
    assert as_model(model, trust=True) == as_model(Model(abs, trust=True)) == Model(abs, trust=True)
