from __future__ import annotations

import collections
import copy
import decimal
import enum
import functools
import io
import operator
import os
import pathlib
import re
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from daskinfer.errors import ModelError
from daskinfer.models.fingerprint import compute_fingerprint
from daskinfer.models.serialization import serialize_object


def linear(seed: int = 0) -> nn.Linear:
    """Make the same small model at each call."""
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def holding(value: Any) -> nn.Module:
    """Make a model with ``value`` as an attribute."""
    net = nn.Identity()
    net.held = value
    return net


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass
class Config:
    width: int = 3
    names: Any = ()


@dataclass(slots=True)
class Slotted:
    width: int = 3


class Rows(list):  # type: ignore[type-arg]
    note: Any = None


Point = collections.namedtuple("Point", ["x", "y"])


class Flattened(torch.Tensor):
    """A tensor made of another, as quantisation libraries have them."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, scale: float) -> Flattened:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner, made.scale = inner, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], float]:
        return ["inner"], self.scale

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.zeros(()) if "detach" not in str(function) else args[0]


# --- what outputs on disk hold


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        (
            [1, 2.5, "a", None, (True, b"b"), {"k": {1, 2}}],
            "ab0f1871c890cde95ea52ca2b64b2c6333e49957736df12bd3fdfc9d3e7dcc0a",
        ),
        (
            [torch.arange(3), np.arange(3, dtype="<f4"), torch.float32, slice(1, 2), nn.ReLU, torch.relu],
            "f882fa94360a919fbc425f81f21bb5c57014245d369e4104056c4722b9033967",
        ),
        (
            nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
            "6720fc8ad3dfe7887dd0b7a51594ae28a03584356d2bc5ee328520dba03833fe",
        ),
    ],
    ids=["plain", "arrays", "module"],
)
def test_frozen_fingerprints(obj: Any, expected: str) -> None:
    """Fingerprints are those of the first outputs on disk, which could otherwise not be continued."""
    for parameter in obj.parameters() if isinstance(obj, nn.Module) else ():
        nn.init.ones_(parameter)
    assert compute_fingerprint(obj) == expected


# --- what does not change it


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.train(not net.training),
        lambda net: net.requires_grad_(False),
        lambda net: net.to(memory_format=torch.channels_last),
        lambda net: net._parameters.update(weight=net._parameters.pop("weight")) or net,
        lambda net: copy.deepcopy(net),
        lambda net: serialize_object(net).deserialize(),
        lambda net: net.__dict__.update(reversed(list(net.__dict__.items()))) or net,
        lambda net: net.load_state_dict(torch.load(saved(net.state_dict()))) and net,
        lambda net: torch.load(saved(net), weights_only=False),
    ],
    ids=["eval", "no grad", "channels last", "order", "copy", "pack", "attributes", "state dict", "save"],
)
def test_unaffected(change: Callable[[nn.Module], nn.Module]) -> None:
    """What does not affect the output does not count."""
    net = nn.Conv2d(3, 4, 2)
    assert compute_fingerprint(net) == compute_fingerprint(change(net))


def saved(obj: Any) -> io.BytesIO:
    """Save an object with torch.save."""
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return file


def test_the_device_that_a_model_remembers() -> None:
    """The device of a model does not count."""
    assert compute_fingerprint(holding(torch.device("cpu"))) == compute_fingerprint(holding(torch.device("cuda:1")))


class Compiled(nn.Module):
    """Stands in for what torch.compile makes, whose first use takes ten seconds of imports."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self._orig_mod, self.n_times = net, object()


def test_compiled() -> None:
    """A compiled model has the fingerprint of the model that was compiled."""
    assert compute_fingerprint(Compiled(linear())) == compute_fingerprint(linear())


@pytest.mark.parametrize(
    "net",
    [
        nn.LSTM(3, 4, num_layers=2),
        nn.GRU(3, 4, bidirectional=True),
        nn.MultiheadAttention(4, 2),
        nn.TransformerEncoderLayer(4, 2),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
        torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2), nn.ReLU())),
    ],
    ids=lambda net: type(net).__name__,
)
def test_models_of_every_kind(net: nn.Module) -> None:
    """Models with special state are read, and are the same after serialization; each weight counts."""
    before = compute_fingerprint(net)
    other = serialize_object(net).deserialize()
    assert compute_fingerprint(other) == before
    next(other.parameters()).data.view(-1)[0] += 1
    assert compute_fingerprint(other) != before


# --- what changes it


def bit(net: nn.Linear) -> None:
    """Change the last bit of one weight."""
    net.weight.data.view(torch.int32).view(-1)[3] ^= 1


@pytest.mark.parametrize(
    "change",
    [
        bit,
        lambda net: net.register_buffer("mask", torch.ones(2), persistent=False),
        lambda net: setattr(net, "scale", 2.0),
        lambda net: setattr(net, "in_features", 4),
        lambda net: setattr(net.weight, "scale", 3.0),
        lambda net: setattr(net, "__class__", nn.Identity),
        lambda net: net.half(),
        lambda net: net.add_module("extra", nn.Identity()),
        lambda net: net.register_forward_hook(lambda *_: None),
        lambda net: net.register_forward_pre_hook(functools.partial(print, sep="")),
        lambda net: setattr(net, "weight", nn.Parameter(net.weight.reshape(3, 2))),
    ],
    ids=["bit", "buffer", "attribute", "size", "tensor's", "class", "dtype", "child", "hook", "pre-hook", "shape"],
)
def test_changes(change: Callable[[nn.Module], Any]) -> None:
    """Everything that may change an output counts."""
    net = linear()
    change(net)
    assert compute_fingerprint(net) != compute_fingerprint(linear())


def test_a_buffer_that_is_not_saved() -> None:
    """A non-persistent buffer's content counts."""
    nets = [linear(), linear()]
    for i, net in enumerate(nets):
        net.register_buffer("mask", torch.full((2,), i), persistent=False)
    assert compute_fingerprint(nets[0]) != compute_fingerprint(nets[1])


def test_which_submodule_is_shared() -> None:
    """Which of two equal layers is used twice counts, also across containers."""
    a, b = nn.ReLU(), nn.ReLU()
    assert compute_fingerprint([[a], b, a]) != compute_fingerprint([[a], b, b])


def test_graphs() -> None:
    """A traced model is its code: another operation is another model."""
    nets = [torch.fx.symbolic_trace(nn.Sequential(layer)) for layer in (nn.ReLU(), nn.ReLU())]
    assert compute_fingerprint(nets[0]) == compute_fingerprint(nets[1])
    nets[1].graph.output_node().append(nets[1].graph.placeholder("unused"))
    nets[1].recompile()
    assert compute_fingerprint(nets[0]) != compute_fingerprint(nets[1])


def cached(n: int) -> Any:
    """A cached function over ``n``."""
    return functools.cache(lambda x: x + n)


VALUES: list[tuple[Any, Any]] = [
    (1, True),
    (1, 1.0),
    ("a", b"a"),
    ([1, 2], (1, 2)),
    ([[1], 2], [[1, 2]]),
    ({"a": 1}, {"a": 2}),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ({1, 2}, {1, 3}),
    (frozenset("a"), {"a"}),
    (range(3), range(4)),
    (slice(0, 3), slice(0, 4)),
    (torch.Size([1]), (1,)),
    (torch.float32, torch.float64),
    (Color.RED, Color.BLUE),
    (Config(3), Config(4)),
    (Config(names=["a"]), Config(names=["b"])),
    (Slotted(3), Slotted(4)),
    (Point(1, 2), (1, 2)),
    (Rows([1]), Rows([2])),
    (collections.OrderedDict(a=1), collections.OrderedDict(a=2)),
    (collections.deque([1]), collections.deque([2])),
    (types.MappingProxyType({"a": 1}), types.MappingProxyType({"a": 2})),
    (decimal.Decimal("1.1"), decimal.Decimal("1.2")),
    (pathlib.Path("a"), pathlib.Path("b")),
    (re.compile("a" * 300 + "a"), re.compile("a" * 300 + "b")),
    (np.float32(1), np.float64(1)),
    (np.zeros(3), np.zeros((3, 1))),
    (np.zeros(3), np.ones(3)),
    (np.array([1, "a"], object), np.array([2, "a"], object)),
    (np.zeros(1, [("a", "f4")]), np.zeros(1, [("b", "f4")])),
    (np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 2], mask=[1, 0])),
    (np.dtype("f4"), np.dtype("f8")),
    (np.add, np.subtract),
    (torch.eye(2).to_sparse(), torch.eye(2)),
    (torch.eye(2).to_sparse(), (2 * torch.eye(2)).to_sparse()),
    (torch.ones(2, dtype=torch.complex64).mul(1j), torch.ones(2, dtype=torch.complex64).mul(1j).conj()),
    (Flattened(torch.ones(2), 1.0), Flattened(torch.ones(2), 2.0)),
    (Flattened(torch.ones(2), 1.0), Flattened(torch.zeros(2), 1.0)),
    (torch.relu, torch.tanh),
    (nn.functional.relu, nn.functional.max_pool2d),
    (functools.partial(max, 1), functools.partial(max, 2)),
    (operator.itemgetter(1), operator.itemgetter(2)),
    ({"a": 1}.get, {"a": 2}.get),
    (linear(0).forward, linear(1).forward),
    (cached(1), cached(2)),
    (torch, np),
    (nn.ReLU, nn.Tanh),
    (lambda x: x + 1, lambda x: x + 2),
    (lambda x: x.a, lambda x: x.b),
    (lambda x, y=1: x, lambda x, y=2: x),
    (lambda x, *, y=1: x, lambda x, *, y=2: x),
    (lambda x: [2 * y for y in x], lambda x: [3 * y for y in x]),
]


@pytest.mark.parametrize(("one", "other"), VALUES, ids=[type(one).__name__ for one, _ in VALUES])
def test_values(one: Any, other: Any) -> None:
    """Attributes count by value, whatever they are, and are the same in a copy."""
    assert compute_fingerprint(holding(one)) == compute_fingerprint(holding(one))
    assert compute_fingerprint(holding(one)) != compute_fingerprint(holding(other))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # deprecated, but people have such models
def test_quantised() -> None:
    """A quantised tensor counts by its values."""
    one, same, other = (torch.quantize_per_tensor(torch.full((2,), n), 0.1, 0, torch.qint8) for n in (1.0, 1.0, 2.0))
    assert compute_fingerprint(one) == compute_fingerprint(same) != compute_fingerprint(other)


def test_equal_containers() -> None:
    """Whether two equal lists are one object does not count."""
    shared = [1, 2]
    assert compute_fingerprint([shared, shared]) == compute_fingerprint([[1, 2], [1, 2]])


def test_cycles_end() -> None:
    """Parents that their children refer to, and sets of them, are read once."""
    net = nn.Sequential(nn.ReLU())
    net[0].parent, net.all = [net], {net[0]}
    assert compute_fingerprint(net) == compute_fingerprint(copy.deepcopy(net))


def test_functions_that_refer_to_themselves() -> None:
    """Recursion, and a local function that is never defined, are read."""

    def down(n: int) -> int:
        return down(n - 1) if n else never

    if not down:
        never = 0
    assert compute_fingerprint(down) == compute_fingerprint(down)


# --- code of the user's files

NETS = """
import enum, functools, torch
import helpers
from helpers import halve
from dataclasses import dataclass
SCALE = 3

class Mode(enum.Enum):
    FAST = 1

class Base(torch.nn.Module):
    __slots__ = ("slot",)
    def forward(self, x):
        return self.twice(x) * 2

class Net(Base):
    '''A docstring.'''
    mode = Mode.FAST
    @staticmethod
    def twice(x):
        return halve(x) * SCALE
    @classmethod
    def made(cls):
        return cls()
    @property
    def width(self):
        return 10
    @functools.cached_property
    def depth(self):
        return 20

class Far(torch.nn.Module):
    def forward(self, x):
        return [helpers.inner.quarter(y) for y in x]

@dataclass
class Config:
    width: int = 5

def configured(x):
    return Config().width * x
"""
HELPERS = "import inner\ndef halve(x):\n    return x / 2\ndef unused(x):\n    return 1\nx = object.__new__\n"
INNER = "import helpers\ndef quarter(x):\n    return x / 4\n"


@pytest.fixture
def of_files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Compute the fingerprint of one name in the user's files, with one text in them replaced by another."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def read(name: str = "Net", old: str = "", new: str = "") -> str:
        for module, source in {"nets": NETS, "helpers": HELPERS, "inner": INNER}.items():
            (tmp_path / f"{module}.py").write_text(source.replace(old, new) if old else source)
            sys.modules.pop(module, None)
        obj = getattr(import_module("nets"), name)
        return compute_fingerprint(obj() if isinstance(obj, type) else obj)

    yield read
    for module in ("nets", "helpers", "inner"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("Net", "self.twice(x) * 2", "self.twice(x) * 4"),
        ("Net", "x / 2", "x / 3"),
        ("Net", "SCALE = 3", "SCALE = 4"),
        ("Net", "halve(x) * SCALE", "halve(x) + SCALE"),
        ("Net", "return cls()", "return cls"),
        ("Net", "return 10", "return 11"),
        ("Net", "return 20", "return 21"),
        ("Net", "FAST = 1", "FAST = 2"),
        ("Net", "Base(torch.nn.Module)", "Base(torch.nn.Identity)"),
        ("Far", "x / 4", "x / 5"),
        ("configured", "width: int = 5", "width: int = 6"),
    ],
)
def test_edited_files(of_files: Callable[..., str], name: str, old: str, new: str) -> None:
    """An edit of the class, of its base, or of what its code uses in other files counts."""
    assert of_files(name) != of_files(name, old, new)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("Net", "", ""),
        ("Far", "", ""),
        ("configured", "", ""),
        ("Net", "SCALE = 3", "SCALE = 3; import io; width = io.StringIO(); twice = 7"),
        ("Net", "'''A docstring.'''", ""),
        ("Net", "return 1\n", "return 2\n"),
        ("Net", "import enum", "\n\n# A comment.\nimport enum"),
    ],
)
def test_edits_beside(of_files: Callable[..., str], name: str, old: str, new: str) -> None:
    """Reading the same files again, comments, docstrings of classes and what is not used do not count."""
    assert of_files(name) == of_files(name, old, new)


def test_class_name(of_files: Callable[..., str]) -> None:
    """A class with another name is another model."""
    assert of_files("Net") != of_files("Other", "class Net(Base)", "class Other(Base)")


def test_closures_of_installed_packages() -> None:
    """A function made by an installed one counts by what it closes over."""
    one, same, other = (torch.optim.swa_utils.get_ema_avg_fn(decay) for decay in (0.5, 0.5, 0.9))
    assert compute_fingerprint(one) == compute_fingerprint(same) != compute_fingerprint(other)


SCRIPT = (
    NETS
    + """
import sys
from collections import Counter
import numpy as np
from torch import nn
from daskinfer.models.fingerprint import compute_fingerprint
from daskinfer.models.serialization import serialize_object
torch.manual_seed(0)
net = Net()
net.names = {"a", "b", "c", "d", "e"}
net.layers = nn.Sequential(nn.LSTM(3, 4), nn.BatchNorm1d(4), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
net.config, net.array, net.counts = Config(7), np.arange(5), Counter("hello")
net.method, net.pool, net.words = net.made, nn.functional.max_pool2d, frozenset(["x", "y", "z"])
print(compute_fingerprint(net), compute_fingerprint(serialize_object(net).deserialize()))
print(compute_fingerprint(configured), compute_fingerprint(Far()))
print(compute_fingerprint(lambda x: x in {"a", "b", "c", "d"}))
print(compute_fingerprint(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))))
"""
)


def test_the_same_in_every_process(tmp_path: pathlib.Path) -> None:
    """Processes whose strings hash differently agree, also on what a script defines itself."""
    for name, source in {"helpers": HELPERS, "inner": INNER, "script": SCRIPT}.items():
        (tmp_path / f"{name}.py").write_text(source)
    running = [
        subprocess.Popen(
            [sys.executable, "script.py"], cwd=tmp_path, stdout=subprocess.PIPE, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    ]
    printed = [process.communicate(timeout=120)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert printed[0] == printed[1]
    assert len(printed[0]) == 6
    assert printed[0][0] == printed[0][1]


# --- what cannot be read


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (threading.Lock(), "^model.held is a lock, which has no reproducible hash"),
        ({"a": [threading.Lock()]}, r"^model.held\['a'\].0 is a lock"),
        (Config(threading.Lock()), r"^model.held.width is a lock"),
        ({threading.Lock()}, "^model.held.member is a lock"),
        ((x for x in [1]), "^model.held is a generator"),
        (weakref.ref(nn.ReLU), "^model.held is a ReferenceType"),
        (torch.empty(2, device="meta"), "^model.held is a Tensor"),
        (functools.wraps(bit)(types.FunctionType(bit.__code__, {}, "f", (threading.Lock(),))), "^model.held.0 is a lock"),
    ],
    ids=["lock", "nested", "object", "set", "generator", "weakref", "meta", "default"],
)
def test_unreadable_values(value: Any, message: str) -> None:
    """What has no reproducible hash is refused with its path, and the message offers version=."""
    with pytest.raises(ModelError, match=message + r".*pass Model\(…, version='1'\) \(--model-version 1\)"):
        compute_fingerprint(holding(value))


def test_a_lazy_model() -> None:
    """A model whose weights do not exist yet is refused."""
    with pytest.raises(ModelError, match="is a UninitializedParameter"):
        compute_fingerprint(nn.LazyLinear(3))


class WithLock(nn.Module):
    """Leaves its lock out of what is pickled."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.lock, self.state = threading.Lock(), state

    def __getstate__(self) -> Any:
        return self.state


def test_what_a_model_leaves_out() -> None:
    """A model's own __getstate__ decides what counts."""
    assert (
        compute_fingerprint(WithLock({"a": 1}))
        == compute_fingerprint(WithLock({"a": 1}))
        != compute_fingerprint(WithLock({"a": 2}))
    )
    assert compute_fingerprint(WithLock((1, 2))) != compute_fingerprint(WithLock((1, 3)))
