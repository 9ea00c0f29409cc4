"""``python -m tests.support.write_types``: write what type checkers read about the keywords, from their declarations.

``daskinfer/_keywords.py`` holds a TypedDict for each public function; ``daskinfer/api.py`` holds ``predict``'s overloads
between two marks. A test fails if either differs from what ``daskinfer/options.py`` declares.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path

import daskinfer
from daskinfer.core.declarations import ALL, COMPUTING, STORING, Declaration
from daskinfer.options import get_all_declarations

PACKAGE = Path(daskinfer.__file__).parent
KEYWORDS, API = PACKAGE / "_keywords.py", PACKAGE / "api.py"
BEGIN, END = "# Written by python -m tests.support.write_types:\n", "# (end of what is written)\n"
NAMED = ("return_report",)  # by the overloads, since it changes the type of what is returned

GROUP_NAMES = {ALL: "_SharedKeywords", COMPUTING: "_ComputingKeywords", STORING: "_StoringKeywords"}

HEADER = '''\
"""The keywords of the public functions, as type checkers read them.

Written by ``python -m tests.support.write_types`` from the declarations in ``daskinfer.options``: change those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from daskinfer.options import Options

if TYPE_CHECKING:
    import torch
    from distributed import Client

    from daskinfer.diagnostics.events import Event
'''


def make_name(functions: Sequence[str]) -> str:
    """Return the name of the TypedDict of keywords that these functions take.

    Examples
    --------
    >>> make_name(["run", "plan"]), make_name(["predict", "run"]), make_name(["map_blocks"])
    ('_StoringKeywords', '_PredictRunKeywords', 'MapBlocksKeywords')
    """
    name = "".join(function.title().replace("_", "") for function in functions)
    return GROUP_NAMES.get(tuple(functions), f"{'_' if len(functions) > 1 else ''}{name}Keywords")


def make_keywords_module(declared: Mapping[str, Declaration]) -> str:
    """Return the text of ``_keywords.py``: a TypedDict for what several functions share, then one for each function."""
    groups = {
        functions: [option for option in declared.values() if option.functions == functions] for functions in _sort(declared)
    }
    shared = {functions: options for functions, options in groups.items() if len(functions) > 1}
    text = HEADER + "".join(
        _make_class(make_name(functions), ["TypedDict"], options) for functions, options in shared.items()
    )
    for function in ALL:
        bases = [make_name(functions) for functions in shared if function in functions]
        text += _make_class(make_name([function]), bases, groups.get((function,), []))
    return text


def _sort(declared: Mapping[str, Declaration]) -> list[tuple[str, ...]]:
    """Return the groups of functions that take the same keywords, the largest first."""
    return sorted({option.functions for option in declared.values()}, key=lambda functions: (-len(functions), functions))


def _make_class(name: str, bases: Sequence[str], options: Sequence[Declaration]) -> str:
    doc = "Keywords that several functions take." if name.startswith("_") else "All keywords of one function."
    lines = [f'    """{doc}"""', ""] + [
        f"    {option.name}: {option.type}" for option in options if option.name not in NAMED
    ]
    body = "\n".join(lines).rstrip().replace("'", '"')
    return f"\n\nclass {name}({', '.join(bases)}, total=False):\n{body}\n"


def make_overloads(api: str) -> str:
    """Return the overloads of ``predict`` in the text of ``api.py``: ``return_report`` decides what it returns."""
    functions = [node for node in ast.parse(api).body if isinstance(node, ast.FunctionDef) and node.name == "predict"]
    own = "".join(f"    {argument.arg}: {ast.unparse(argument.annotation)},\n" for argument in functions[-1].args.args)
    return "".join(
        f"@overload\ndef predict(\n{own}    *,\n    return_report: {given},\n"
        f"    **keywords: Unpack[PredictKeywords],\n) -> {returned}: ...\n"
        for given, returned in (
            ("Literal[True]", "tuple[Any, RunReport]"),
            ("Literal[False] = False", "Any"),
            ("bool", "Any"),
        )
    )


def replace_overloads(api: str) -> str:
    """Return the text of ``api.py`` with the overloads that its ``predict`` should have."""
    before, _, rest = api.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + make_overloads(api) + END + after


def main() -> None:
    """Write both files."""
    KEYWORDS.write_text(make_keywords_module(get_all_declarations()))
    API.write_text(replace_overloads(API.read_text()))


if __name__ == "__main__":
    main()
