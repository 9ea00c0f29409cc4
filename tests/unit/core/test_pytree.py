from __future__ import annotations

import pickle
from collections import Counter, OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from daskinfer.core.pytree import Ports, PyTreeSpec, call_with, flatten

Pair = namedtuple("Pair", ["left", "right"])  # the untyped kind, which many models return


class Scores(NamedTuple):
    logits: Any
    extra: Any = None


@dataclass
class Record:
    a: Any
    b: Any = None
    n_made: int = field(default=0, init=False)


@dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg]  # as Hugging Face's: a dict of the fields that are not None
    loss: Any = None
    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for name in ("loss", "logits", "hidden"):
            if getattr(self, name) is not None:
                self[name] = getattr(self, name)


arrays = st.integers(0, 9).map(lambda n: np.full(2, n))
keys = st.text(min_size=1, max_size=3) | st.integers(0, 3)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Every kind of container around ``inner``."""
    return st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
        st.dictionaries(keys, inner, max_size=3).map(lambda items: defaultdict(list, items)),
        st.dictionaries(keys, inner, max_size=3).map(UserDict),
        *(st.builds(kind, inner, inner) for kind in (Pair, Scores, Record, ModelOutput)),
    )


nested = st.recursive(arrays | st.none(), containers, max_leaves=8)


def alike(a: Any, b: Any) -> bool:
    """Whether two values have the same containers and the same array objects."""
    if isinstance(a, np.ndarray):
        return a is b
    if type(a) is not type(b) or a is None:
        return a is b
    if isinstance(a, Record):
        return alike(a.a, b.a) and alike(a.b, b.b)
    a, b = (list(x.items()) if isinstance(x, dict | UserDict) else x for x in (a, b))
    return len(a) == len(b) and all(x == y if isinstance(x, str | int) else alike(x, y) for x, y in zip(a, b, strict=True))


@given(nested)
def test_rebuild_undoes_flatten(value: Any) -> None:
    """Any nested value is rebuilt as it was, including types and order of keys."""
    flat, structure = flatten(value)
    assert alike(structure.rebuild(flat), value)


@given(nested)
def test_one_name_per_array(value: Any) -> None:
    """Every array has a unique name."""
    flat, structure = flatten(value)
    assert len(set(structure.names)) == len(structure.names) == len(flat)


@given(nested)
def test_structure_crosses_processes(value: Any) -> None:
    """A structure is the same after pickling."""
    structure = flatten(value)[1]
    assert pickle.loads(pickle.dumps(structure)) == structure


X, Y = np.zeros(1), np.ones(1)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (X, ("y",)),
        ((X,), ("0",)),
        ([X, (X, Y)], ("0", "1.0", "1.1")),
        ({"logits": X, "aux": {"a": X}}, ("logits", "aux.a")),
        (Pair(X, [Y]), ("left", "right.0")),
        (Scores(X), ("logits",)),
        (Record(None, X), ("b",)),
        (ModelOutput(logits=X, hidden=(X, Y)), ("logits", "hidden.0", "hidden.1")),
        ({"a": {"b": X}, "a.b": Y}, ("a.b", "a.b'")),
        ({0: X, "0": Y}, ("0", "0'")),
        ({"": X}, ("y",)),
        (None, ()),
    ],
)
def test_names(value: Any, names: tuple[str, ...]) -> None:
    """An array is named by the keys that lead to it."""
    assert flatten(value)[1].names == names


def test_torch_return_types() -> None:
    """The output of torch.max is rebuilt as torch.max's own type."""
    value = torch.ones(2, 2).max(1)
    flat, structure = flatten(value)
    assert type(pickle.loads(pickle.dumps(structure)).rebuild(flat)) is type(value)


def test_a_counter_is_filled_not_counted() -> None:
    """A mapping whose constructor treats pairs differently is filled key by key."""
    rebuilt = flatten(Counter(a=X))[1].rebuild(["first"])
    assert rebuilt == Counter(a="first")


def test_a_mapping_that_cannot_be_filled_becomes_a_dict() -> None:
    """A read-only mapping is rebuilt as a plain dict."""
    rebuilt = flatten(MappingProxyType({"a": X}))[1].rebuild(["first"])
    assert rebuilt == {"a": "first"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "^str$"),
        (3.5, "^float$"),
        ([X, {"a": {1}}], "^set at '1.a'$"),
        (Scores(X, "why"), "^str at 'extra'$"),
        ({"out": Record}, "^type at 'out'$"),
        ((x for x in [X]), "^generator$"),
    ],
)
def test_other_values_are_named(value: Any, message: str) -> None:
    """An output that holds anything but arrays is refused with its type and path."""
    with pytest.raises(TypeError, match=message):
        flatten(value)


def test_numpy_scalars_are_arrays() -> None:
    """A scalar with shape and dtype counts as an array, for the caller to judge."""
    assert flatten(np.float32(1))[1] == PyTreeSpec("array")


@pytest.mark.parametrize(
    ("value", "ports"),
    [
        (X, Ports("single", ("x",))),
        ([X, Y], Ports("single", ("x",))),
        ((X, Y), Ports("positional", ("x[0]", "x[1]"))),
        ({"image": X, "meta": Y}, Ports("named", ("image", "meta"))),
        (UserDict(image=X), Ports("named", ("image",))),
    ],
)
def test_ports(value: Any, ports: Ports) -> None:
    """The ports are inferred from the input's type, and join undoes split."""
    assert Ports.from_input(value) == ports
    assert ports.join(ports.split(value)) == value


@pytest.mark.parametrize(
    ("function", "value"),
    [(lambda x: x, "a"), (lambda x, y: x + y, ("a", "")), (lambda *, x, y: x + y, {"y": "", "x": "a"})],
)
def test_call(function: Callable[..., Any], value: Any) -> None:
    """A tuple is passed by position, a dict by name, anything else as one argument."""
    assert call_with(function, value) == "a"
