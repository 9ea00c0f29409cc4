from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
import pytest
import torch
from torch import nn

from daskinfer.errors import ModelError
from daskinfer.models import serialization
from daskinfer.models.serialization import ByValueFunction, deserialize_file, serialize_object

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]


class Holder(nn.Module):
    """Holds one buffer."""

    def __init__(self, buffer: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("held", buffer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


Way = Callable[[Any], Any]


def through_file(model: Any) -> Any:
    """Copy a model through its block in a file, as a worker gets it."""
    path = Path("block")
    path.write_bytes(serialize_object(model).to_bytes())
    return deserialize_file(path)


WAYS: list[Way] = [
    lambda model: serialize_object(model).deserialize(),
    lambda model: pickle.loads(pickle.dumps(serialize_object(model))).deserialize(),
    through_file,
]
every_way = pytest.mark.parametrize("way", WAYS, ids=["memory", "pickle", "file"])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and bytes."""
    a, b = (t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@every_way
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(in_folder: Path, way: Way, dtype: torch.dtype) -> None:
    """A tensor of any dtype comes back to the bit."""
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    back = way(Holder(tensor)).held
    assert back.shape == (2, 3)
    assert same(back, tensor)


@every_way
@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.empty(0, 3),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0)[::2],
        torch.zeros(1).expand(5),
        torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.ones(2, dtype=torch.complex64).mul(1j).conj(),
        torch.ones(2, dtype=torch.complex64).mul(1j).conj().imag,
    ],
    ids=["0-d", "empty", "transposed", "strided", "expanded", "channels last", "conjugate", "negative"],
)
def test_every_layout(in_folder: Path, way: Way, tensor: torch.Tensor) -> None:
    """A tensor of any strides comes back to the bit."""
    back = way(Holder(tensor)).held
    assert back.shape == tensor.shape
    assert same(back, tensor)


@every_way
def test_channels_last_stays(in_folder: Path, way: Way) -> None:
    """The order of axes in memory is kept, since the last bits and the speed depend on it."""
    net = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    assert way(net).weight.stride() == net.weight.stride()


@every_way
def test_sparse_and_attributes(in_folder: Path, way: Way) -> None:
    """Tensors that are more than their bytes come back whole."""
    net = Holder(torch.eye(3).to_sparse())
    net.scaled = nn.Parameter(torch.ones(2), requires_grad=False)
    net.scaled.scale, net.plain = 3.0, nn.Buffer(torch.ones(2))
    back = way(net)
    assert torch.equal(back.held.to_dense(), torch.eye(3))
    assert (back.scaled.scale, back.scaled.requires_grad, type(back.scaled)) == (3.0, False, nn.Parameter)
    assert list(back.state_dict()) == list(net.state_dict())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # deprecated, but people have such models
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # raised where torch itself unpickles one
def test_quantised() -> None:
    """A quantised tensor comes back, with one key each time."""
    net = Holder(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    assert torch.equal(serialize_object(net).deserialize().held.dequantize(), net.held.dequantize())
    assert serialize_object(net).key == serialize_object(net).key


@every_way
def test_tied_weights_stay_tied(in_folder: Path, way: Way) -> None:
    """One tensor in two places is one tensor in two places again."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    back = way(net)
    assert back[0].weight is back[1].weight
    assert back[0].bias is not back[1].bias


def test_views_of_one_storage() -> None:
    """Tensors that share memory are kept apart, each with its own values."""
    whole = torch.arange(6.0)
    net = nn.ModuleList([Holder(whole), Holder(whole[2:4])])
    back = serialize_object(net).deserialize()
    assert same(back[0].held, whole)
    assert same(back[1].held, whole[2:4])


@every_way
def test_requires_grad_and_kind(in_folder: Path, way: Way) -> None:
    """Parameters stay parameters, with or without gradients."""
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    back = way(net)
    assert (back.weight.requires_grad, back.bias.requires_grad) == (True, False)
    assert isinstance(back.weight, nn.Parameter)


@every_way
@pytest.mark.parametrize(
    "net",
    [
        nn.LSTM(3, 4, num_layers=2, batch_first=True),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)),
        torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2), nn.ReLU())),
        nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout()),
    ],
    ids=["lstm", "weight norm", "spectral norm", "fx", "sequential"],
)
def test_models_of_every_kind(in_folder: Path, way: Way, net: nn.Module) -> None:
    """Models that other ways of pickling refuse come back and compute the same."""
    net.eval()
    x = torch.ones(2, 5, 3) if isinstance(net, nn.LSTM) else torch.ones(2, 3)
    expected, got = net(x), way(net)(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_the_original_stays_as_it_is() -> None:
    """Neither serialization nor a change of the copy reaches the original."""
    net = nn.Linear(2, 2).train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    made = serialize_object(net)
    made.deserialize().weight.data.zero_()
    assert net.training
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert not torch.equal(made.deserialize().weight, torch.zeros(2, 2))


def test_a_later_change_does_not_reach_the_serialized_model() -> None:
    """A serialized model stays as the model was then."""
    net = nn.Linear(2, 2)
    made, before = serialize_object(net), net.weight.detach().clone()
    net.weight.data.zero_()
    assert torch.equal(made.deserialize().weight, before)


def test_key_is_the_contents() -> None:
    """The same model twice has one key; a change in place, or back, is seen."""
    net = nn.Linear(2, 2)
    key = serialize_object(net).key
    assert serialize_object(net).key == key
    net.bias.data[0] += 1
    assert serialize_object(net).key != key
    net.bias.data[0] -= 1
    net.note = "other"
    assert serialize_object(net).key != key


def test_key_survives_pickling() -> None:
    """A worker that unpickles a serialized model finds it under the client's key."""
    made = serialize_object(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2)))
    again = pickle.loads(pickle.dumps(made))
    assert (again.key, again.nbytes) == (made.key, made.nbytes)


def test_key_of_a_class_that_is_defined_again() -> None:
    """A class with the same name and body, run again in a notebook, makes another model."""

    def cell() -> nn.Module:
        class Net(nn.Linear):
            pass

        return Net(2, 2)

    first, second = cell(), cell()
    second.load_state_dict(first.state_dict())
    assert serialize_object(first).key != serialize_object(second).key


def test_nbytes() -> None:
    """The size is the tensors' and the pickle's."""
    assert 4_000_000 < serialize_object(nn.Linear(1000, 1000, bias=False)).nbytes < 4_010_000


def test_from_file_maps(in_folder: Path) -> None:
    """Weights are mapped from the file, privately: what is written to them never reaches it."""
    net = nn.Linear(64, 64)
    back = through_file(net)
    block = Path("block").read_bytes()
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(in_folder / "block"))]
    assert mapped
    back.weight.data.zero_()
    assert Path("block").read_bytes() == block


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: threading.Lock(), r"the model \(lock\) cannot be pickled for the workers: .*lock"),
        (
            lambda: with_attribute(threading.Lock()),
            r"\(Linear\) cannot be pickled for the workers.*lock.*Keep open files, locks",
        ),
        (lambda: with_attribute(sys.stderr), r"\(Linear\) cannot be pickled for the workers.*open file"),
        (lambda: with_attribute(x for x in [1]), r"\(Linear\) cannot be pickled for the workers.*generator"),
    ],
    ids=["lock", "lock inside", "stream", "generator"],
)
def test_what_cannot_be_pickled(made: Callable[[], Any], message: str) -> None:
    """A handle inside a model is refused, and the message says what to do."""
    with pytest.raises(ModelError, match=message):
        serialize_object(made())


@pytest.mark.parametrize("mode", ["r", "rb", "w"])
def test_an_open_file_is_refused(tmp_path: Path, mode: str) -> None:
    """A file is refused however it was opened, not sent as a copy of its text."""
    (tmp_path / "file").touch()
    with open(tmp_path / "file", mode) as file, pytest.raises(ModelError, match=r"holds an open file \(<_io"):
        serialize_object(with_attribute(file))


def with_attribute(value: Any) -> nn.Module:
    """Make a model that holds ``value``."""
    net = nn.Linear(2, 2)
    net.held = value
    return net


def test_lambdas_travel() -> None:
    """A lambda inside a model is pickled by value."""
    assert serialize_object(with_attribute(lambda x: x + 1)).deserialize().held(1) == 2


NET = """
import functools, torch
from helpers import halve
SCALE = 3
class Net(torch.nn.Module):
    @functools.cached_property
    def scale(self):
        return SCALE
    def forward(self, x):
        return halve(x) * self.scale
def double(x):
    return halve(x) * 4
"""
HELPERS = "def halve(x):\n    return x / 2\n"
WRITE = """
import pickle, sys, nets
from daskinfer.models.serialization import ByValueFunction, serialize_object
for name, net in (("script", Net()), ("beside", nets.Net())):
    open(f"{sys.argv[1]}/{name}", "wb").write(serialize_object(net).to_bytes())
open(f"{sys.argv[1]}/function", "wb").write(pickle.dumps(ByValueFunction(nets.double)))
"""
READ = """
import pickle, sys, torch
from daskinfer.models.serialization import deserialize_file
print(*(deserialize_file(f"{sys.argv[1]}/{name}")(torch.ones(1)).item() for name in ("script", "beside")))
print(pickle.load(open(f"{sys.argv[1]}/function", "rb"))(1))
"""


def run(*arguments: str, cwd: Path) -> list[str]:
    """Return the words that a new Python prints; it can import this package, and of the user's files those in ``cwd``."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """A folder of a user's files."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "nets.py").write_text(NET)
    (folder / "helpers.py").write_text(HELPERS)
    (folder / "script.py").write_text(NET + WRITE)
    return folder


def test_where_it_cannot_be_imported(user_folder: Path, tmp_path: Path) -> None:
    """Classes and functions of a script and of files beside it arrive in a process that cannot import them."""
    run("script.py", str(tmp_path), cwd=user_folder)
    assert run("-c", READ, str(tmp_path), cwd=tmp_path) == ["1.5", "1.5", "2.0"]


@pytest.fixture
def own(user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The user's module, imported here."""
    monkeypatch.syspath_prepend(user_folder)
    yield import_module("nets")
    del sys.modules["nets"], sys.modules["helpers"]


def test_by_value(own: types.ModuleType) -> None:
    """A function by value is called like the function."""
    assert ByValueFunction(own.double)(x=2) == 4
    assert pickle.loads(pickle.dumps(ByValueFunction(own.double)))(2) == 4


def test_a_cached_property(own: types.ModuleType) -> None:
    """A user's class may have one, though it holds a lock."""
    assert serialize_object(own.Net()).deserialize()(torch.ones(1)).item() == 1.5


def test_threads_serialize_at_once(own: types.ModuleType) -> None:
    """A thread that finishes does not end by-value pickling for another one."""
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: serialize_object(own.Net()), range(64)))
    assert all(b"SCALE" in serialized.skeleton for serialized in results)


def test_the_registry_is_left_as_it_was(own: types.ModuleType) -> None:
    """After serialization, other pickles go by reference as before."""
    serialize_object(own.Net())
    assert b"SCALE" not in cloudpickle.dumps(own.Net())


def test_only_modules_that_the_model_names_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all loaded modules are checked: some thousand, 20 ms of a first short call."""
    modules = []
    monkeypatch.setattr(serialization, "is_user_module", lambda module: modules.append(module.__name__))
    serialize_object(nn.Sequential(nn.Linear(1, 1), nn.ReLU()))
    assert 0 < len(modules) < 200
    assert len(modules) < len(sys.modules) / 2


def test_pickled_once_more_only_where_classes_travel_by_value(own: types.ModuleType) -> None:
    """Classes pickled by name are this process's own already."""
    assert serialize_object(nn.Linear(1, 1)).local_pickle is None
    assert type(serialize_object(own.Net()).deserialize()) is own.Net
    inside = type("Inside", (nn.Linear,), {})
    assert type(serialize_object(inside(1, 1)).deserialize()) is inside
    kept = nn.Identity()
    kept.module, kept.function = own, lambda x: x
    assert serialize_object(kept).deserialize().module is own
    assert serialize_object(kept).deserialize().function is kept.function


def test_what_does_not_say_where_it_is_from(own: types.ModuleType) -> None:
    """A function without a module, and a type variable of the user's file, travel by value as well."""
    own.double.__module__ = None
    own.T = TypeVar("T")
    own.T.__module__ = "nets"
    assert b"_make_function" in serialize_object(own.double).skeleton
    assert b"_make_typevar" in serialize_object(own.T).skeleton
