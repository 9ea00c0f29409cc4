"""The house stays livable: its imports point down, its files are small, and its names and sentences are plain."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import daskinfer
from daskinfer import errors

PACKAGE = Path(daskinfer.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in FILES})
TREES = {path: ast.parse(path.read_text()) for path in FILES}
MAX_FUNCTION_LINES, MAX_FILE_LINES, MAX_MODULES, MAX_PUBLIC = 40, 600, 13, 16
MAX_MESSAGE_WORDS, MAX_MESSAGE_SENTENCES = 30, 2
MAX_CROSSINGS = 300  # between modules, in one predict on 4,000 rows; 572 before the modules moved into packages


def split_words(text: str) -> set[str]:
    """Split a list of words."""
    return set(text.split())


# Names that said nothing to a newcomer; each was a module or a function once.
BANNED_MODULES = split_words("""
    answering borrowed call dealer ending feeder fetching foreseen in_order jobs kept ladder lane launch ledger loaded
    owned own_code pace packed parts ready recipe replacing reported returned shipping stored trial wanted ways
""")
BANNED_FUNCTIONS = split_words("""
    anew answered asked begun deal foreign gone keep lent opened place promise ready said_of see_to speak streamed
    took travelling tuned_here weigh
""")
BANNED_WORDS = r"Pass one of these|\b[Mm]end\b|\bnobody (said|asked)\b|\bis no TOML\b|\bdecision \d|\bthe network('s)?\b"

# What functions begin with that do something; nouns, `from_x`, `to_x` and the questions `is_`, `has_` are not counted.
VERBS = split_words("""
    abort acquire add align allocate annotate append apply assign attach attempt benchmark borrow broadcast build
    cancel cast catch check choose clamp classify clean clear close collect commit compare compute concatenate
    configure connect convert copy count create cut declare describe deserialize detach discard document draw drain
    drop dump emit encode ensure enumerate estimate evict exclude explain expect extend fetch fill filter find finish
    fit flatten flush format free fsync get give halve handle hash hold hide import index infer insert inspect install
    intersect invalidate isolate iter join keep kill launch limit list load locate lock log look make mark match
    measure merge move name normalize note notify number open order pack parse peek pick pickle pin place plan plot
    pop prepare preserve process publish push put query raise read rebuild recheck record refuse register reject
    release remove rename render replace replay report requeue reserve reset resolve restart restore retain retire
    retry return rewrite run sample save scan scatter seed select send serialize serve set share shorten show shut
    signal skip sort split start stop store stream strip submit subtract succeeds suggest sync take tell terminate
    track transfer try tune unpack unpickle unregister unwrap update use validate verify wait walk warn watch wrap
    write advise mount
""")
MIN_VERBS = 0.55


def get_label(path: Path) -> str:
    """Return a file's path within the package."""
    return str(path.relative_to(PACKAGE))


def list_functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """List every function and method, nested ones too."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_imports_point_down() -> None:
    """import-linter holds the contracts of pyproject.toml."""
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-logo"], cwd=ROOT, capture_output=True, text=True, check=False)
    if "no such option" in done.stderr.lower():
        done = subprocess.run([program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"Contracts: [1-9]\d* kept, 0 broken", done.stdout)


def test_public_names() -> None:
    """The public names are few, can be imported, have a docstring, and none is a module's at the top."""
    assert daskinfer.__all__ == sorted(daskinfer.__all__)
    assert len(daskinfer.__all__) <= MAX_PUBLIC
    assert not set(daskinfer.__all__) & {path.stem for path in PACKAGE.iterdir()}
    assert all(getattr(daskinfer, name).__doc__ for name in daskinfer.__all__)
    assert set(daskinfer.__all__) <= set(dir(daskinfer))
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", daskinfer.__version__)


def test_unknown_name_of_the_package() -> None:
    """A name that does not exist is an AttributeError, as everywhere."""
    with pytest.raises(AttributeError, match="has no attribute 'devise'"):
        daskinfer.devise  # noqa: B018  # the attribute access is what is tested


@pytest.mark.parametrize("path", FILES, ids=get_label)
def test_sizes(path: Path) -> None:
    """Files and functions stay small."""
    assert path.read_text().count("\n") <= MAX_FILE_LINES
    for node in list_functions(TREES[path]):
        doc = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
        assert node.end_lineno - node.lineno + 1 - doc <= MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("folder", FOLDERS, ids=get_label)
def test_folders(folder: Path) -> None:
    """A folder holds few modules, and its ``__init__`` says what it owns."""
    modules = [path for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__")]
    assert len(modules) <= MAX_MODULES
    assert len((ast.get_docstring(TREES[folder / "__init__.py"]) or "").split()) >= 12


def test_no_module_or_function_has_a_banned_name() -> None:
    """The words of both lists do not come back."""
    assert not {path.stem for path in FILES} & BANNED_MODULES
    named = {(get_label(path), f.name) for path, tree in TREES.items() for f in list_functions(tree)}
    assert not {(path, name) for path, name in named if name.strip("_") in BANNED_FUNCTIONS}


def test_functions_begin_with_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    """Most functions begin with a verb of a fixed list; those that return a value may be its noun, or ask."""
    names = [f.name.strip("_") for tree in TREES.values() for f in list_functions(tree) if not f.name.startswith("__")]
    verbs = [name for name in names if name.split("_")[0] in VERBS]
    share = len(verbs) / len(names)
    with capsys.disabled():
        print(f"\n{share:.0%} of {len(names):,} functions begin with a verb")
    assert share >= MIN_VERBS


def test_the_tests_mirror_the_tree() -> None:
    """A test file in ``tests/unit`` is named after a module of the package, perhaps with a topic after it."""
    modules = {get_label(path).removesuffix(".py") for path in FILES}
    for test in sorted((ROOT / "tests/unit").rglob("test_*.py")):
        if test == Path(__file__).resolve():
            continue
        folder = test.parent.relative_to(ROOT / "tests/unit")
        name = test.stem.removeprefix("test_")
        about = [module for module in modules if Path(module).parent == folder and name.startswith(Path(module).name)]
        assert about or (PACKAGE / folder / name).is_dir(), test


def iter_messages() -> Iterator[tuple[str, str]]:
    """Yield each message of an error, a warning or a log line, with its place; a value counts as one word, X."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and is_message(ast.unparse(node.func)):
                for text in filter(None, map(read_text, node.args)):
                    yield f"{get_label(path)}:{node.lineno}", text


def is_message(function: str) -> bool:
    """Whether a call of this function makes an error, whether raised at once or returned, a warning or a log line."""
    name = function.rpartition(".")[2]
    made = getattr(errors, name, None)
    is_error = isinstance(made, type) and issubclass(made, BaseException)
    return is_error or name.endswith(("Error", "warn", "BadParameter")) or function.startswith("logger.")


def read_text(node: ast.expr) -> str:
    """Return the text of a string or f-string, with X for each value; empty if it is something else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
    return ""


def count_sentences(text: str) -> int:
    """Count what ends with a full stop before a capital letter, or at the end."""
    return len([part for part in re.split(r"(?<=[a-z)\]'\"X])\. +(?=[A-Z'])", text.strip()) if part])


def test_messages_are_short() -> None:
    """A message says which thing, what was got, what is allowed and the cure, in two sentences of 30 words in all."""
    long = [
        f"{place}: {text}"
        for place, text in iter_messages()
        if len([word for word in text.split() if word.strip("X.,;:()'\"")]) > MAX_MESSAGE_WORDS
        or count_sentences(text) > MAX_MESSAGE_SENTENCES
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("path", FILES, ids=get_label)
def test_plain_words(path: Path) -> None:
    """Docstrings, comments and messages use the field's words."""
    found = [
        f"{number}: {line.strip()}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(BANNED_WORDS, line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("package", ["core", "scheduling", "errors", "options"])
def test_pure_packages_import_quickly(package: str) -> None:
    """What decides in numbers needs neither torch nor Dask, in a process that has imported nothing else."""
    modules = [f"daskinfer.{package}"]
    if (PACKAGE / package).is_dir():
        modules += [f"daskinfer.{package}.{path.stem}" for path in (PACKAGE / package).glob("[a-z]*.py")]
    code = f"import sys\nfor name in {modules}: __import__(name)\nprint(*{{'torch', 'dask', 'zarr'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert all(import_module(name).__doc__ for name in modules)


RUN_A_FILE = """
import sys
import numpy as np
import daskinfer as di
np.save("x.npy", np.arange(8.0))
di.run(np.sqrt, "x.npy", "y.npy", devices="inline", progress=False)
print(*{"dask.array", "pandas", "xarray", "cupy"} & set(sys.modules))
"""


def test_dask_array_is_imported_for_dask_arrays_only(tmp_path: Path) -> None:
    """A run from file to file imports neither ``dask.array`` nor what that imports, which would take a second."""
    done = subprocess.run([sys.executable, "-c", RUN_A_FILE], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


COUNT_CROSSINGS = """
import sys
import numpy as np, torch
import daskinfer as di

def name_module(frame):
    name = frame.f_globals.get("__name__", "") if frame is not None else ""
    return name if name.startswith("daskinfer") else None

def count(frame, event, argument):
    module = name_module(frame)
    if event != "call" or module is None:
        return
    modules.add(module)
    caller = frame.f_back
    while caller is not None and name_module(caller) is None:
        caller = caller.f_back
    crossings.append(caller is not None and name_module(caller) != module)

model, x, crossings, modules = torch.nn.Linear(8, 4), np.ones((4000, 8), np.float32), [], set()
for _ in range(3):
    di.predict(model, x, devices="inline")
sys.setprofile(count)
di.predict(model, x, devices="inline")
sys.setprofile(None)
print(sum(crossings), len(modules))
"""


def test_a_call_crosses_few_modules(capsys: pytest.CaptureFixture[str]) -> None:
    """A reader who follows one warm call changes modules a bounded number of times."""
    done = subprocess.run([sys.executable, "-c", COUNT_CROSSINGS], capture_output=True, text=True, check=True)
    n_crossings, n_modules = map(int, done.stdout.split())
    with capsys.disabled():
        print(f"\n{n_crossings} crossings between {n_modules} modules")
    assert 0 < n_crossings <= MAX_CROSSINGS
