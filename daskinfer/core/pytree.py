"""Input ports and nested outputs of models: flatten them into lists of arrays, and rebuild them.

A model takes one array, several by position (a tuple) or several by name (a dict). It returns a tensor, or tuples, lists,
dicts, named tuples and dataclasses of tensors, nested. Everything between works on flat lists of arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Ports:
    """How a model takes its inputs: ``kind`` is "single", "positional" or "named", ``names`` has one entry per port."""

    kind: str
    names: tuple[str, ...]

    @classmethod
    def from_input(cls, value: Any) -> Ports:
        """Infer the ports from an input: a dict is named, a tuple positional, anything else one array called "x".

        Examples
        --------
        >>> Ports.from_input({"image": 0, "meta": 1})
        Ports(kind='named', names=('image', 'meta'))
        """
        if isinstance(value, Mapping):
            return cls("named", tuple(map(str, value)))
        if isinstance(value, tuple):
            return cls("positional", tuple(f"x[{i}]" for i in range(len(value))))
        return cls("single", ("x",))

    def split(self, value: Any) -> list[Any]:
        """Return the arrays of ``value`` in the order of ``names``."""
        if self.kind == "named":
            return list(value.values())
        return list(value) if self.kind == "positional" else [value]

    def join(self, arrays: Sequence[Any]) -> Any:
        """Return the arrays in the form that a model takes: the inverse of :meth:`split`."""
        if self.kind == "named":
            return dict(zip(self.names, arrays, strict=True))
        return tuple(arrays) if self.kind == "positional" else arrays[0]


def call_with(function: Callable[..., Any], value: Any) -> Any:
    """Call ``function`` as a model is called: a dict becomes keywords, a tuple positional arguments."""
    if isinstance(value, Mapping):
        return function(**value)
    if isinstance(value, tuple):
        return function(*value)
    return function(value)


@dataclass(frozen=True, slots=True)
class PyTreeSpec:
    """Structure of a nested output: ``container_type`` is rebuilt from its ``children``, which are labelled by ``keys``."""

    kind: str  # "array", "none" or a key of _CONTAINER_BUILDERS
    container_type: type[Any] | None = None
    keys: tuple[Any, ...] = ()
    children: tuple[PyTreeSpec, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """One unique name per array: the keys that lead to it, joined by dots, or "y" for a single array.

        Examples
        --------
        >>> import numpy as np
        >>> flatten({"logits": np.zeros(2), "aux": (np.ones(2), None)})[1].names
        ('logits', 'aux.0')
        """
        names: list[str] = []
        for path in self._iter_paths():
            name = ".".join(path) or "y"
            while name in names:  # {"a": {"b": …}, "a.b": …}, {0: …, "0": …}
                name += "'"
            names.append(name)
        return tuple(names)

    def rebuild(self, arrays: Sequence[Any]) -> Any:
        """Rebuild the nested value from ``arrays``, in the order in which :func:`flatten` returned them."""
        return self._rebuild(iter(arrays))

    def _rebuild(self, arrays: Iterator[Any]) -> Any:
        if self.kind == "array":
            return next(arrays)
        if self.kind == "none":
            return None
        return _CONTAINER_BUILDERS[self.kind](
            self.container_type, self.keys, [child._rebuild(arrays) for child in self.children]
        )

    def _iter_paths(self) -> Iterator[tuple[str, ...]]:
        if self.kind == "array":
            yield ()
        for key, child in zip(self.keys, self.children, strict=True):
            for path in child._iter_paths():
                yield (str(key), *path)


_NONE_SPEC, LEAF_SPEC = PyTreeSpec("none"), PyTreeSpec("array")


def flatten(value: Any) -> tuple[list[Any], PyTreeSpec]:
    """Flatten a model's output into its arrays and the structure that holds them.

    Anything with a ``shape`` and a ``dtype`` is an array. ``None`` stays in the structure.

    Raises
    ------
    TypeError
        If the output holds anything else; the message names its type and path.

    Examples
    --------
    >>> import numpy as np
    >>> arrays, structure = flatten((np.zeros(2), {"a": np.ones(2)}))
    >>> structure.rebuild(["first", "second"])
    ('first', {'a': 'second'})
    """
    arrays: list[Any] = []
    return arrays, _flatten(value, arrays, "")


def _flatten(value: Any, arrays: list[Any], path: str) -> PyTreeSpec:
    if value is None:
        return _NONE_SPEC
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        arrays.append(value)
        return LEAF_SPEC
    kind, items = _list_children(value, path)
    children = tuple(_flatten(child, arrays, f"{path}.{key}") for key, child in items)
    return PyTreeSpec(kind, type(value), tuple(key for key, _ in items), children)


def _list_children(value: Any, path: str) -> tuple[str, list[tuple[Any, Any]]]:
    """Return the kind of container and its labelled children; the first match wins.

    A dataclass comes before a dict: some libraries return outputs that are both and are constructed by keywords.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "record", [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init]
    if isinstance(value, Mapping):
        return "mapping", list(value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "record", list(zip(value._fields, value, strict=True))
    if isinstance(value, tuple | list):
        return "sequence", list(enumerate(value))
    where = f" at {path[1:]!r}" if path else ""
    raise TypeError(f"{type(value).__name__}{where}")


def _build_mapping(container_type: type[Any], items: dict[Any, Any]) -> Any:
    """Build a mapping of the original type if that can be filled (a defaultdict, a UserDict), else a plain dict."""
    try:
        mapping = container_type()
        for key, value in items.items():
            mapping[key] = value
    except TypeError:
        return items
    return mapping


_CONTAINER_BUILDERS: dict[str, Callable[[Any, tuple[Any, ...], list[Any]], Any]] = {
    "record": lambda cls, keys, children: cls(**dict(zip(keys, children, strict=True))),
    "mapping": lambda cls, keys, children: _build_mapping(cls, dict(zip(keys, children, strict=True))),
    "sequence": lambda cls, keys, children: cls(children),
}
