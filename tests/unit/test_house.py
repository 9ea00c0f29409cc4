"""The house as drawn in the package's docstring holds in its code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import daskinfer

PACKAGE = Path(daskinfer.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FUNCTION_LINES, MAX_FILE_LINES, MAX_DEPTH, MAX_PUBLIC = 60, 400, 8, 15


def room_of(path: Path) -> str:
    """The room a file belongs to: the first name below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floors() -> dict[str, int]:
    """Each room's floor, read off the drawing in the package's docstring."""
    drawn: dict[str, int] = {}
    floor = -1
    for line in (daskinfer.__doc__ or "").splitlines():
        numbered = re.match(r"    (\d)  (.*)", line)
        if numbered or (floor >= 0 and line.startswith("       ")):
            floor = int(numbered[1]) if numbered else floor
            names = (numbered[2] if numbered else line).partition("+ ")[0].partition("plain Python")[0]
            drawn |= dict.fromkeys(names.split(), floor)
    return drawn


@cache
def imported_rooms(path: Path) -> frozenset[str]:
    """Rooms that a file imports, at its top or inside a function; the public names are the house's face, no room."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("daskinfer."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "daskinfer":
            found |= {alias.name for alias in node.names if alias.name not in daskinfer.__all__}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("daskinfer.")}
    return frozenset(found - {room_of(path)})


def imports() -> dict[str, set[str]]:
    """Rooms that each room imports."""
    rooms: dict[str, set[str]] = {}
    for path in FILES:
        if path != PACKAGE / "__init__.py":
            rooms.setdefault(room_of(path), set()).update(imported_rooms(path))
    return rooms


def test_every_room_is_drawn() -> None:
    """The drawing names every room that exists and none that does not."""
    assert set(floors()) == set(imports())


def test_lower_floors_never_import_higher_ones() -> None:
    """A room imports from its own floor and below."""
    drawn = floors()
    climbing = [(room, other) for room, others in imports().items() for other in others if drawn[other] > drawn[room]]
    assert not climbing


def test_imports_have_no_cycle_and_bounded_depth() -> None:
    """The longest chain of imports is short, and none comes back to where it began."""
    rooms = imports()

    def depth(room: str, above: tuple[str, ...] = ()) -> int:
        assert room not in above, f"cycle: {' -> '.join((*above, room))}"
        return 1 + max((depth(other, (*above, room)) for other in rooms[room]), default=0)

    deepest = {room: depth(room) for room in rooms}
    assert max(deepest.values()) <= MAX_DEPTH, deepest


def test_public_names() -> None:
    """The public names are few, can be imported, and none is a room's name."""
    assert sorted(daskinfer.__all__) == [
        "DaskInferError",
        "Interrupted",
        "LocalDeviceCluster",
        "Model",
        "Options",
        "close",
        "devices",
        "map_blocks",
        "plan",
        "predict",
        "run",
        "stream",
    ]
    assert len(daskinfer.__all__) <= MAX_PUBLIC
    assert not set(daskinfer.__all__) & set(imports())
    assert all(getattr(daskinfer, name).__doc__ for name in daskinfer.__all__)
    assert set(daskinfer.__all__) <= set(dir(daskinfer))


def test_unknown_name_of_the_package() -> None:
    """A name that does not exist is an AttributeError, as everywhere."""
    with pytest.raises(AttributeError, match="has no attribute 'devise'"):
        daskinfer.devise  # noqa: B018  # the attribute access is what is tested


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes(path: Path) -> None:
    """Files and functions stay small."""
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            assert node.end_lineno - node.lineno + 1 - doc <= MAX_FUNCTION_LINES, node.name
