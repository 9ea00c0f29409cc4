"""The nested forms that networks take and give: input ports in, mirrored outputs back.

A network may take one array, several by position (a tuple) or several by name (a dict); it may give a tensor, or tuples,
lists, dicts, named tuples and dataclasses of them, nested. Work is done on flat lists of arrays; this room takes the
forms apart and puts them together again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Ports:
    """How the inputs reach the network: ``names`` of its ports, ``kind`` one of "single", "positional" and "named"."""

    kind: str
    names: tuple[str, ...]

    @classmethod
    def from_input(cls, value: Any) -> Ports:
        """Read the form off an input: a dict is named, a tuple positional, anything else one array called "x".

        Examples
        --------
        >>> Ports.from_input({"image": 0, "meta": 1})
        Ports(form='named', names=('image', 'meta'))
        """
        if isinstance(value, Mapping):
            return cls("named", tuple(map(str, value)))
        if isinstance(value, tuple):
            return cls("positional", tuple(f"x[{i}]" for i in range(len(value))))
        return cls("single", ("x",))

    def split(self, value: Any) -> list[Any]:
        """The arrays of ``value`` in the order of ``names``."""
        if self.kind == "named":
            return list(value.values())
        return list(value) if self.kind == "positional" else [value]

    def join(self, arrays: Sequence[Any]) -> Any:
        """The inverse of :meth:`split`."""
        if self.kind == "named":
            return dict(zip(self.names, arrays, strict=True))
        return tuple(arrays) if self.kind == "positional" else arrays[0]


def call_with(function: Callable[..., Any], value: Any) -> Any:
    """Call ``function`` on what a network would be called on: a dict as keywords, a tuple as positions."""
    if isinstance(value, Mapping):
        return function(**value)
    if isinstance(value, tuple):
        return function(*value)
    return function(value)


@dataclass(frozen=True, slots=True)
class PyTreeSpec:
    """What a flat list of arrays was before: ``container_type`` puts the children, labelled by ``keys``, together again."""

    kind: str  # "array", "none" or a key of _MAKERS
    container_type: type[Any] | None = None
    keys: tuple[Any, ...] = ()
    children: tuple[PyTreeSpec, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """One name per array: the path of keys that leads to it, "y" where there is only one; no two are alike.

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
        """Put ``arrays`` (in the order that :func:`flatten` gave) back into the form that was taken apart."""
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
    """Take a network's answer apart into its arrays and the structure that holds them.

    Anything with a ``shape`` and a ``dtype`` is an array. ``None`` is kept as it is.

    Raises
    ------
    TypeError
        Where there is something else; the message names its path and type.

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
    """Name the kind of container and list its labelled children; the first match wins.

    A dataclass comes before a dict, since some libraries' outputs are both and are made by keywords.
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
    """A mapping of its own kind where that can be filled (a defaultdict, a UserDict), else a plain dict."""
    try:
        made = container_type()
        for key, value in items.items():
            made[key] = value
    except TypeError:
        return items
    return made


_CONTAINER_BUILDERS: dict[str, Callable[[Any, tuple[Any, ...], list[Any]], Any]] = {
    "record": lambda make, keys, children: make(**dict(zip(keys, children, strict=True))),
    "mapping": lambda make, keys, children: _build_mapping(make, dict(zip(keys, children, strict=True))),
    "sequence": lambda make, keys, children: make(children),
}
