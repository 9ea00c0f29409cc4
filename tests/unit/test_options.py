"""Options: what is allowed, and everything that follows from their declarations."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import math
import pickle
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from IPython.core.completer import IPCompleter, provisionalcompleter

import daskinfer as di
from daskinfer import _keywords
from daskinfer.cli.main import main
from daskinfer.core.declarations import ALL
from daskinfer.errors import PACKAGE_PREFIX, OptionError, UnknownKeyword
from daskinfer.options import CallKeywords, Options, get_all_declarations, list_options, make_reference_rows
from tests.support.write_types import API, KEYWORDS, NAMED, make_keywords_module, make_name, replace_overloads

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"autocast": "fp8"}, "autocast must be 'bf16', 'fp16' or None, got 'fp8'$"),
        ({"autocast": torch.float32}, "autocast must be .*, got torch.float32$"),
        ({"autocast": 16}, "autocast must be .*, got 16$"),
        ({"autocast": np.zeros(2)}, "autocast must be .*, got array"),
        ({"preprocess": "x/255"}, "preprocess must be a function or None, got 'x/255'$"),
        ({"postprocess": 1}, "postprocess must be a function or None, got 1$"),
        (
            {"dtype": np.floating},
            "dtype must be a dtype such as 'float32' or torch.float32, .*, got <class 'numpy.floating'>$",
        ),
        ({"dtype": float}, "dtype must be a dtype .*, got <class 'float'>$"),
        ({"dtype": {"image": 32}}, "dtype must be .* a mapping from port to dtype, .*got {'image': 32}$"),
        ({"dtype": {0: "float32"}}, "dtype must be a dtype .*, got {0: 'float32'}$"),
        ({"dtype": ["float32"]}, r"dtype must be a dtype .*, got \['float32'\]$"),
        ({"pad": 1}, "pad must be True or False, got 1$"),
        ({"pad": None}, "pad must be True or False, got None$"),
        ({"prefetch": 0}, "prefetch must be an integer between 1 and 6, got 0$"),
        ({"prefetch": 7}, "prefetch must be an integer between 1 and 6, got 7$"),
        ({"prefetch": True}, "prefetch must be an integer between 1 and 6, got True$"),
        ({"prefetch": None}, "prefetch must be an integer between 1 and 6, got None$"),
        ({"prefetch": "2"}, "prefetch must be an integer between 1 and 6, got '2'$"),
        ({"prefetch": 2.0}, r"prefetch must be an integer between 1 and 6, got 2\.0$"),
        ({"prefetch": 2.5}, r"prefetch must be an integer between 1 and 6, got 2\.5$"),
        ({"prefetch": np.ones(2)}, "prefetch must be an integer between 1 and 6, got array"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'skip', got 'ignore'$"),
        ({"on_error": None}, "on_error must be 'raise' or 'skip', got None$"),
        ({"nan_is_failure": 1}, "nan_is_failure must be True or False, got 1$"),
        ({"restart_workers": None}, "restart_workers must be True or False, got None$"),
        ({"trust": "yes"}, "trust must be True or False, got 'yes'$"),
        ({"retries": -1}, "retries must be an integer >= 0, got -1$"),
        ({"retries": True}, "retries must be an integer >= 0, got True$"),
        ({"retries": 1.0}, r"retries must be an integer >= 0, got 1\.0$"),
        ({"chunk_timeout": 0}, "chunk_timeout must be a number of seconds > 0 or None, got 0$"),
        ({"chunk_timeout": "3"}, "chunk_timeout must be a number of seconds > 0 or None, got '3'$"),
        ({"chunk_timeout": True}, "chunk_timeout must be a number of seconds > 0 or None, got True$"),
        ({"chunk_timeout": math.nan}, "chunk_timeout must be a number of seconds > 0 or None, got nan$"),
        ({"fill_value": "NaN"}, "fill_value must be a number or None, got 'NaN'$"),
        ({"memory_format": "nhwc"}, "memory_format must be 'auto', 'contiguous' or 'channels_last', got 'nhwc'$"),
        ({"memory_format": torch.preserve_format}, "memory_format must be .*, got torch.preserve_format$"),
        ({"memory_format": None}, "memory_format must be 'auto', 'contiguous' or 'channels_last', got None$"),
        ({"max_failed_rows": -1}, "max_failed_rows must be an integer >= 0, a share such as '1%', or None, got -1$"),
        ({"max_failed_rows": True}, "max_failed_rows must be an integer >= 0, .*, got True$"),
        ({"max_failed_rows": 0.5}, r"max_failed_rows must be an integer >= 0, .*, got 0\.5$"),
        ({"max_failed_rows": "5"}, "max_failed_rows must be an integer >= 0, .*, got '5'$"),
        ({"max_failed_rows": "101%"}, "max_failed_rows must be an integer >= 0, .*, got '101%'$"),
        ({"max_failed_rows": "-1%"}, "max_failed_rows must be an integer >= 0, .*, got '-1%'$"),
        ({"max_failed_rows": "1.2.3%"}, r"max_failed_rows must be an integer >= 0, .*, got '1\.2\.3%'$"),
        ({"max_failed_rows": "%"}, "max_failed_rows must be an integer >= 0, .*, got '%'$"),
    ],
)
def test_refuses(field: dict[str, Any], message: str) -> None:
    """A value that is not allowed is refused with the field's name, what is allowed, and what was got."""
    with pytest.raises(OptionError, match=f"^{message}"):
        Options(**field)


@pytest.mark.parametrize(
    ("function", "keyword"),
    [(di.predict, "return_report"), (di.plan, "probe"), (partial(di.run, target="y.npy"), "overwrite")],
)
def test_refuses_switches_of_a_call(function: Callable[..., Any], keyword: str) -> None:
    """Keywords of a call that are switches are checked as the fields of Options are."""
    with pytest.raises(OptionError, match=f"^{keyword} must be True or False, got 'yes'$"):
        function(abs, [1.0], **{keyword: "yes"})


def test_prefetch() -> None:
    """One chunk is read ahead by default, and six at most."""
    assert Options().prefetch == 1
    assert [Options(prefetch=n).prefetch for n in (1, 6)] == [1, 6]


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [(None, math.inf), (0, 0), (7, 7), ("0%", 0), ("1%", 10), ("0.25%", 2), ("100%", 1000), (".1%", 1), ("29%", 290)],
)
def test_how_many_rows_may_fail(asked: Any, allowed: float) -> None:
    """A number is itself, a share is of all rows, rounded down and exact, and None allows any."""
    assert Options(max_failed_rows=asked).compute_max_failed_rows(1000) == allowed


def test_fields_are_keyword_only() -> None:
    """Options are given by name."""
    with pytest.raises(TypeError, match="positional argument"):
        Options("float32")  # type: ignore[misc]


def test_is_frozen() -> None:
    """Options do not change once they are made."""
    with pytest.raises(dataclasses.FrozenInstanceError, match="pad"):
        Options().pad = False  # type: ignore[misc]


def test_a_mapping_is_copied() -> None:
    """A change of the mapping that was passed does not reach the options."""
    dtype = {"image": "float32"}
    options = Options(dtype=dtype)
    dtype["image"] = "float16"
    assert options.dtype == {"image": "float32"}


@pytest.mark.parametrize("dtype", [None, "bfloat16", {"image": "float32"}, {}])
def test_survives_json_and_pickle(dtype: Any) -> None:
    """What is no function or array passes through JSON, and everything through pickle."""
    options = Options(dtype=dtype, autocast="fp16", pad=False, prefetch=3)
    assert Options(**json.loads(json.dumps(dataclasses.asdict(options)))) == options
    assert pickle.loads(pickle.dumps(options)) == options


@pytest.mark.parametrize(
    ("typed", "stored"),
    [
        (torch.float32, "float32"),
        (torch.float, "float32"),
        (torch.half, "float16"),
        (torch.bfloat16, "bfloat16"),
        ("torch.float32", "float32"),
        (np.float32, "float32"),
        (np.dtype("float32"), "float32"),
        (np.dtype(">f4"), "float32"),
        (np.bool_, "bool"),
        (
            {"image": torch.float32, "meta": np.int64, "mask": np.dtype("?")},
            {"image": "float32", "meta": "int64", "mask": "bool"},
        ),
    ],
)
def test_dtypes_of_torch_and_numpy(typed: Any, stored: Any) -> None:
    """A dtype of torch or NumPy, alone or by port, is stored as its name, however often options are made of options."""
    options = Options(dtype=typed)
    assert options.dtype == stored
    assert dataclasses.replace(options, pad=False).dtype == stored
    assert options == Options(dtype=stored)


@pytest.mark.parametrize(
    ("typed", "stored"),
    [
        (torch.bfloat16, "bf16"),
        ("bfloat16", "bf16"),
        ("torch.bfloat16", "bf16"),
        (True, "bf16"),
        (torch.float16, "fp16"),
        (torch.half, "fp16"),
        (np.float16, "fp16"),
        ("float16", "fp16"),
        (False, None),
    ],
)
def test_precisions_of_torch(typed: Any, stored: str | None) -> None:
    """A precision of autocast in torch's words is stored in the short ones."""
    assert Options(autocast=typed).autocast == stored


@pytest.mark.parametrize(
    ("typed", "stored"),
    [
        (torch.channels_last, "channels_last"),
        (torch.channels_last_3d, "channels_last"),
        (torch.contiguous_format, "contiguous"),
    ],
)
def test_memory_formats_of_torch(typed: Any, stored: str) -> None:
    """A memory format of torch is stored by its name."""
    assert Options(memory_format=typed).memory_format == stored


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": torch.float32, "autocast": torch.bfloat16},
        {"dtype": np.float32, "autocast": "bfloat16"},
        {"dtype": {"x": np.dtype("float32")}, "autocast": True},
    ],
)
def test_a_run_is_the_same_however_its_options_are_typed(in_folder: Path, fields: dict[str, Any]) -> None:
    """An output that was begun with names is continued by a call with torch's and NumPy's dtypes: nothing is left to do."""
    x, dtype = np.arange(24, dtype=np.float64).reshape(8, 3), fields["dtype"]
    model = torch.nn.Linear(3, 2)
    names = {"dtype": {"x": "float32"} if isinstance(dtype, dict) else "float32", "autocast": "bf16"}
    assert di.run(model, x, "y.npy", devices="inline", **names).rows == 8
    header = Path("y.npy.daskinfer/header.json").read_bytes()
    again = di.run(model, x, "y.npy", devices="inline", **fields)
    assert (again.rows, again.rows_before) == (0, 8)
    assert Path("y.npy.daskinfer/header.json").read_bytes() == header


def test_functions_of_any_kind() -> None:
    """Whatever can be called may be a preprocess or postprocess."""
    assert Options(preprocess=np.abs, postprocess=torch.nn.ReLU()).preprocess is np.abs


@pytest.mark.parametrize(
    ("dtype", "cast"), [(None, None), ("float32", "float32"), ({"x": "int8"}, "int8"), ({"y": "int8"}, None)]
)
def test_cast(dtype: Any, cast: str | None) -> None:
    """A name casts every port, a mapping those that it names."""
    assert Options(dtype=dtype).get_cast_dtype("x") == cast


FUNCTIONS = {name: getattr(di, name) for name in ALL}


@pytest.mark.parametrize("name", ALL)
def test_signatures_show_every_option(name: str) -> None:
    """A function's signature, docstring and type checkers' text have each option that it takes, with its default."""
    function, declared = FUNCTIONS[name], list_options(name)
    shown = {p.name: p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    shown.pop("target", None)  # of plan: what is planned, not an option
    assert list(shown) == [option.name for option in declared]
    assert [(p.default, p.annotation) for p in shown.values()] == [(option.default, option.type) for option in declared]
    entries = re.findall(r"^    (\w+) : .*, default ", function.__doc__, re.MULTILINE)
    assert entries == list(shown)
    typed = getattr(_keywords, make_name([name]))
    assert {*typed.__optional_keys__, *NAMED} >= shown.keys() >= typed.__optional_keys__


def test_map_blocks_takes_fewer_options() -> None:
    """What is followed only while daskinfer computes is no keyword of map_blocks."""
    without = {option.name for option in list_options("predict")} - {option.name for option in list_options("map_blocks")}
    assert {"on_error", "prefetch", "devices", "client", "progress"} <= without
    assert {"dtype", "autocast", "pad", "batch_size"} & without == set()


@pytest.mark.parametrize("use_jedi", [False, True])
def test_completion_in_ipython(use_jedi: bool) -> None:
    """Tab in IPython completes the keywords of a function, and of Options."""
    completer = IPCompleter(namespace={"di": di, "net": abs, "x": [1.0]})
    completer.use_jedi = use_jedi
    for text, expected in {
        "di.predict(net, x, on_e": "on_error=",
        "di.run(net, x, 'y.npy', overw": "overwrite=",
        "di.Options(memory_f": "memory_format=",
    }.items():
        with provisionalcompleter():
            found = [completion.text for completion in completer.completions(text, len(text))]
        assert expected in found, text
    with provisionalcompleter():
        assert not list(completer.completions("di.map_blocks(net, x, on_e", 26))


def count_own_frames(error: BaseException | None) -> int:
    """Count the frames of daskinfer in an error's traceback."""
    assert error is not None
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    assert __file__ in frames
    return sum(name.startswith(PACKAGE_PREFIX) for name in frames)


class Broken(torch.nn.Module):
    """A module that fails."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken")


def stream_all(*args: Any, **fields: Any) -> None:
    """Stream to the end."""
    list(di.stream(*args, **fields))


@pytest.mark.parametrize(
    "call",
    [
        partial(di.predict, np.sqrt, np.ones(8), pad="yes"),
        partial(di.plan, np.sqrt, np.ones(8), devices="tpu"),
        partial(di.stream, np.sqrt, [[1.0], [1.0, 2.0]]),
        partial(di.map_blocks, np.sqrt, "nowhere.npy"),
        partial(Options, pad="yes"),
    ],
)
def test_a_refusal_has_a_short_traceback(call: Callable[..., Any]) -> None:
    """What is refused shows the caller's line and one line of daskinfer; the message says the rest."""
    with pytest.raises(di.DaskInferError, match=r"must be|allowed|unlike|does not exist") as refused:
        call()
    assert count_own_frames(refused.value) == 1
    shown = "".join(traceback.format_exception(refused.value))
    assert shown.count(PACKAGE_PREFIX) == 1


@pytest.mark.parametrize("function", [di.predict, stream_all])
def test_the_traceback_of_a_model_begins_in_the_model(function: Callable[..., Any]) -> None:
    """If the model fails, its own frames are shown, and of daskinfer only those that raised to the caller."""
    with pytest.raises(di.DaskInferError, match="rows 0:1 on cpu failed: RuntimeError: broken") as failed:
        function(Broken(), np.ones((4, 3), np.float32), output=np.empty((0, 3), "f4"), devices="inline")
    assert count_own_frames(failed.value) == 1
    assert count_own_frames(failed.value.__cause__) == 0


def test_debug_keeps_the_traceback(caplog: pytest.LogCaptureFixture) -> None:
    """With debug lines in the log, the traceback is whole."""
    with (
        caplog.at_level(logging.DEBUG, "daskinfer"),
        pytest.raises(OptionError, match="pad must be") as refused,
    ):
        di.predict(np.sqrt, np.ones(8), pad="yes")
    assert count_own_frames(refused.value) > 3


def test_docstrings_explain_options() -> None:
    """``di.predict?`` explains an option and says what is allowed."""
    doc = inspect.getdoc(di.predict) or ""
    assert doc.count("\nprefetch : int, default 1\n    Chunks to read ahead") == 1
    assert "Must be an integer between 1 and 6." in " ".join(doc.split())
    assert doc.index("\nParameters\n") < doc.index("\nprefetch") < doc.index("\nReturns\n")
    assert "\nprefetch" not in (inspect.getdoc(di.map_blocks) or "")


@pytest.mark.parametrize(
    ("keyword", "advice"),
    [
        ("batchsize", r"did you mean 'batch_size'\?$"),
        ("onerror", r"did you mean 'on_error'\?$"),
        ("readers", r"did you mean 'prefetch'\?$"),
        ("device", r"did you mean 'devices'\?$"),
        ("num_workers", r"devices sets the number of workers, as in devices='cpu\*2'$"),
        ("colour", r"allowed are devices, device_weights, .*, trust$"),
    ],
)
def test_unknown_keyword(keyword: str, advice: str) -> None:
    """A keyword that no function takes is refused as Python does, with the one that was meant, or all that are allowed."""
    for name in ("predict", "plan", "stream"):
        with pytest.raises(UnknownKeyword, match=rf"^{name}\(\) got an unexpected keyword argument '{keyword}'; {advice}"):
            FUNCTIONS[name](abs, [1.0], **{keyword: 1})


@pytest.mark.parametrize(
    ("call", "value"),
    [
        (partial(di.predict, np.sqrt, np.ones(8), devices="inline"), {"readers": 2}),
        (partial(di.predict, np.sqrt, np.ones(8)), {"device": "inline"}),
        (partial(di.plan, np.sqrt, np.ones(8)), {"fresh": True}),
        (partial(di.map_blocks, np.sqrt, np.ones(8)), {"batchsize": 4}),
        (Options, {"readers": 2}),
    ],
)
def test_the_suggested_keyword_works(call: Callable[..., Any], value: dict[str, Any]) -> None:
    """The keyword that an error suggests, typed in, is accepted."""
    with pytest.raises(UnknownKeyword) as error:
        call(**value)
    (suggested,) = re.findall(r"did you mean '(\w+)'\?$", str(error.value))
    call(**{suggested: next(iter(value.values()))})


def test_the_suggested_devices_work() -> None:
    """What stands instead of a number of workers is accepted."""
    with pytest.raises(UnknownKeyword) as error:
        di.plan(np.sqrt, np.ones(8), n_workers=2)
    (suggested,) = re.findall(r"as in devices='(.*)'$", str(error.value))
    assert len(di.plan(np.sqrt, np.ones(8), devices=suggested).devices) == 2


@pytest.mark.parametrize(
    ("name", "keyword", "takers"),
    [
        ("predict", "overwrite", "run, plan"),
        ("predict", "fresh", "run, plan"),
        ("stream", "return_report", "predict"),
        ("map_blocks", "on_error", "predict, stream, run, plan"),
        ("map_blocks", "readers", "predict, stream, run, plan"),
    ],
)
def test_keyword_of_another_function(name: str, keyword: str, takers: str) -> None:
    """A keyword that only other functions take is refused with their names."""
    new = {"fresh": "overwrite", "readers": "prefetch"}.get(keyword, keyword)
    message = rf"^{name}\(\) got an unexpected keyword argument '{keyword}'; '{new}' is a keyword of {takers}$"
    with pytest.raises(UnknownKeyword, match=message):
        FUNCTIONS[name](abs, [1.0], **{keyword: True})


def test_reference_rows() -> None:
    """Each option is one row of the reference; flags and keys are those of the command and of job files."""
    rows = make_reference_rows()
    names = [field.name for holder in (CallKeywords, Options) for field in dataclasses.fields(holder)]
    assert [row["name"] for row in rows] == [name for name in names if name != "fields"]
    assert all(row["help"].endswith(".") and row["allowed"] and row["section"] for row in rows)
    by_name = {row["name"]: row for row in rows}
    assert by_name["on_error"]["allowed"] == "'raise' or 'skip'"
    assert by_name["trust"]["flag"] == "--trust-model"
    assert by_name["preprocess"]["flag"] == by_name["preprocess"]["key"] == ""
    assert by_name["progress"]["type"] == "bool | Callable[[Event], Any] | None"
    flags = {name for parameter in main.commands["plan"].params for name in parameter.opts}
    assert {row["flag"] for row in rows if row["flag"]} <= flags


def test_the_text_for_type_checkers_is_up_to_date() -> None:
    """What ``python -m tests.support.write_types`` writes is what the package holds."""
    assert KEYWORDS.read_text() == make_keywords_module(get_all_declarations())
    assert API.read_text() == replace_overloads(API.read_text())


def test_the_file_of_the_declarations_knows_no_torch() -> None:
    """Importing the options imports neither torch, Dask nor click."""
    code = "import sys, daskinfer.options; print({'torch', 'dask', 'distributed', 'click'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.slow
def test_types_of_calls() -> None:
    """mypy accepts the right calls of ``typing_cases.py``, and finds an error in each of the wrong ones."""
    path = "tests/unit/typing_cases.py"
    done = subprocess.run([sys.executable, "-m", "mypy", path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith(path)] == []
