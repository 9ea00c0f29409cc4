from __future__ import annotations

import dataclasses
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import daskinfer as di
from daskinfer.errors import OptionError
from daskinfer.options import OptionFields, Options


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"autocast": "bfloat16"}, "autocast is 'bfloat16'; it may be 'bf16', 'fp16' or None"),
        ({"autocast": True}, "autocast is True; it may be"),
        ({"autocast": np.zeros(2)}, "autocast is array.*; it may be"),
        ({"preprocess": "x/255"}, "preprocess is a str; it may be a function"),
        ({"postprocess": 1}, "postprocess is a int; it may be a function"),
        ({"dtype": np.float32}, "dtype is <class 'numpy.float32'>; it may be a name such as 'float32'"),
        ({"dtype": torch.float32}, "dtype is torch.float32; it may be a name"),
        ({"dtype": {"image": torch.float32}}, "dtype is {'image': torch.float32}; it may be a name"),
        ({"dtype": {0: "float32"}}, "dtype is {0: 'float32'}; it may be a name"),
        ({"dtype": ["float32"]}, r"dtype is \['float32'\]; it may be a name"),
        ({"pad": 1}, "pad is 1; it may be True or False"),
        ({"pad": None}, "pad is None; it may be True or False"),
        ({"prefetch": 0}, "prefetch is 0; it may be a number from 1 to 6"),
        ({"prefetch": 7}, "prefetch is 7; it may be a number from 1 to 6"),
        ({"prefetch": True}, "prefetch is True; it may be a number from 1 to 6"),
        ({"prefetch": None}, "prefetch is None; it may be a number from 1 to 6"),
        ({"prefetch": "2"}, "prefetch is '2'; it may be a number from 1 to 6"),
        ({"prefetch": 2.0}, "prefetch is 2.0; it may be a number from 1 to 6"),
        ({"prefetch": 2.5}, "prefetch is 2.5; it may be a number from 1 to 6"),
        ({"prefetch": np.ones(2)}, "prefetch is array.*; it may be a number from 1 to 6"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; it may be 'raise' or 'skip'"),
        ({"on_error": None}, "on_error is None; it may be 'raise' or 'skip'"),
        ({"nan_is_failure": 1}, "nan_is_failure is 1; it may be True or False"),
        ({"restart_workers": None}, "restart_workers is None; it may be True or False"),
        ({"retries": -1}, "retries is -1; it may be a number from 0"),
        ({"retries": True}, "retries is True; it may be a number from 0"),
        ({"retries": 1.0}, r"retries is 1\.0; it may be a number from 0"),
        ({"chunk_timeout": 0}, "chunk_timeout is 0; it may be seconds, above 0, or None"),
        ({"chunk_timeout": "3"}, "chunk_timeout is '3'; it may be seconds, above 0, or None"),
        ({"chunk_timeout": True}, "chunk_timeout is True; it may be seconds, above 0, or None"),
        ({"fill_value": "NaN"}, "fill_value is 'NaN'; it may be a number or None"),
        ({"memory_format": "nhwc"}, "memory_format is 'nhwc'; it may be 'auto', 'contiguous' or 'channels_last'"),
        ({"memory_format": None}, "memory_format is None; it may be 'auto', 'contiguous' or 'channels_last'"),
        ({"max_failed_rows": -1}, "max_failed_rows is -1; it may be a number from 0, a share such as '1%', or None"),
        ({"max_failed_rows": True}, "max_failed_rows is True; it may be a number from 0"),
        ({"max_failed_rows": 0.5}, r"max_failed_rows is 0\.5; it may be a number from 0"),
        ({"max_failed_rows": "5"}, "max_failed_rows is '5'; it may be a number from 0"),
        ({"max_failed_rows": "101%"}, "max_failed_rows is '101%'; it may be a number from 0"),
        ({"max_failed_rows": "-1%"}, "max_failed_rows is '-1%'; it may be a number from 0"),
        ({"max_failed_rows": "1.2.3%"}, r"max_failed_rows is '1\.2\.3%'; it may be a number from 0"),
        ({"max_failed_rows": "%"}, "max_failed_rows is '%'; it may be a number from 0"),
    ],
)
def test_refuses(field: dict[str, Any], message: str) -> None:
    """A field outside what is allowed is named, with what was got and what is allowed."""
    with pytest.raises(OptionError, match=message):
        Options(**field)


def test_readers() -> None:
    """One chunk is read ahead unless more are asked for, six at most."""
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


def test_fields_as_keywords_are_the_same() -> None:
    """The keywords that the public functions take are the fields."""
    assert list(OptionFields.__annotations__) == [field.name for field in dataclasses.fields(Options)]


@pytest.mark.parametrize("dtype", [None, "bfloat16", {"image": "float32"}, {}])
def test_survives_json_and_pickle(dtype: Any) -> None:
    """What is no function or array passes through JSON, and everything through pickle."""
    options = Options(dtype=dtype, autocast="fp16", pad=False, prefetch=3)
    assert Options(**json.loads(json.dumps(dataclasses.asdict(options)))) == options
    assert pickle.loads(pickle.dumps(options)) == options


def test_functions_of_any_kind() -> None:
    """Whatever can be called may be a preprocess or postprocess."""
    assert Options(preprocess=np.abs, postprocess=torch.nn.ReLU()).preprocess is np.abs


@pytest.mark.parametrize(
    ("dtype", "cast"), [(None, None), ("float32", "float32"), ({"x": "int8"}, "int8"), ({"y": "int8"}, None)]
)
def test_cast(dtype: Any, cast: str | None) -> None:
    """A name casts every port, a mapping those that it names."""
    assert Options(dtype=dtype).get_cast_dtype("x") == cast


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("batchsize", r"^the keyword 'batchsize' was given; allowed are .*, trust\. Did you mean 'batch_size'\?$"),
        ("device", r"^the keyword 'device' was given; allowed are .*, trust\. Did you mean 'devices'\?$"),
        ("onerror", r"Did you mean 'on_error'\?"),
        ("num_workers", r"The devices say how many workers there are: devices='cpu\*2', for example\.$"),
        ("colour", r"^the keyword 'colour' was given; .* signature and dtype, autocast, .*, trust\. Leave it out\.$"),
    ],
)
def test_a_keyword_that_there_is_none_of(given: str, said: str) -> None:
    """A word that was mistyped is refused with the one that was meant."""
    for call in (di.predict, di.plan, di.map_blocks, di.stream):
        with pytest.raises(OptionError, match=said):
            call(abs, [1.0], **{given: 1})


def test_a_keyword_of_another_function() -> None:
    """A word that only another function takes is not suggested again."""
    with pytest.raises(
        OptionError, match=r"^the keyword 'overwrite' was given; .*, trust\. Another function takes it: leave it out\.$"
    ):
        di.predict(abs, [1.0], overwrite=True)
