"""What cannot be an input is refused with code that, typed in, makes one of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import daskinfer as di
from daskinfer.errors import InputError
from daskinfer.planning.inputs import Inputs

X = np.arange(24, dtype=np.float32).reshape(8, 3)
PAIRS = TensorDataset(torch.from_numpy(X), torch.arange(8))


class Rows(Dataset):
    """Rows and their labels, one by one."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return X[i], i


class Stream(IterableDataset):
    """Rows and their labels, as they come."""

    def __iter__(self) -> Any:
        return iter(zip(X, range(8), strict=True))


class Pictures(Rows):
    """A data set that holds its inputs as one array, as those of torchvision do."""

    data = X


def run_cure(pattern: str, x: Any) -> Any:
    """Return the value of the code that the message for ``x`` shows."""
    with pytest.raises(InputError, match=pattern) as refused:
        Inputs.from_value(x)
    (code,) = re.findall(pattern, str(refused.value))
    return eval(code, {"np": np, "torch": torch, "PIL": PIL, "x": x})


@pytest.mark.parametrize("loaded", [False, True], ids=["", "DataLoader"])
@pytest.mark.parametrize("dataset", [PAIRS, Rows(), Pictures(), Stream()], ids=["pairs", "rows", "pictures", "stream"])
def test_data_sets(dataset: Any, loaded: bool) -> None:
    """Data sets and loaders are refused: the code in the message gives their inputs, all of them in order."""
    x = DataLoader(dataset, batch_size=3) if loaded else dataset
    inputs = run_cure(rf"^x is a {type(x).__name__}, and daskinfer makes the batches itself\. .*, for example (.*)\.$", x)
    np.testing.assert_array_equal(Inputs.from_value(inputs).arrays[0], X)


def test_a_data_set_by_name() -> None:
    """The message names the port."""
    with pytest.raises(InputError, match=r"^image is a TensorDataset, .* for example image\.tensors\[0\]\.$"):
        Inputs.from_value({"image": PAIRS})


@pytest.mark.parametrize(
    "rows",
    [
        [[1, 2], [3], [4, 5, 6]],
        [np.array([1, 2]), np.array([3]), np.array([4, 5, 6])],
        [torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 5, 6])],
        np.array([[1, 2], [3], [4, 5, 6]], dtype=object),
    ],
)
def test_rows_of_unlike_length(rows: Any) -> None:
    """Token ids of unlike length are refused: the code in the message pads them, and the model takes that."""
    padded = run_cure(r"^x holds rows of unlike length, 1 to 3\. Pad them with (.*), or group them by length", rows)
    np.testing.assert_array_equal(padded, [[1, 2, 0], [3, 0, 0], [4, 5, 6]])
    assert di.predict(torch.nn.Embedding(9, 2), padded, devices="inline").shape == (3, 3, 2)


def test_longer_rows_of_several_axes() -> None:
    """Sequences of vectors are padded like those of numbers."""
    padded = run_cure(r"^x holds rows of unlike length, 2 to 8\. Pad them with (.*), or group", [X, X[:2]])
    assert padded.shape == (2, 8, 3)


def test_images_of_unlike_size() -> None:
    """Rows that differ on several axes cannot be padded to one shape by one call: their shapes are named."""
    with pytest.raises(
        InputError, match=r"^x holds rows of unlike shape, such as \(3, 8, 8\) and \(3, 9, 8\)\. Resize, crop or"
    ):
        Inputs.from_value([np.zeros((3, 8, 8)), np.zeros((3, 8, 8)), np.zeros((3, 9, 8))])


@pytest.mark.parametrize("make_name", [str, Path, lambda path: str(path).encode()])
def test_names_of_images(in_folder: Path, make_name: Any) -> None:
    """Names of image files are refused: the code in the message loads them."""
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    names = [Path(f"{i}.png") for i in range(2)]
    for image, name in zip(images, names, strict=True):
        PIL.Image.fromarray(image).save(name)
    pattern = r"^x holds names of files, such as '0\.png'; models take numbers\. .* for example (.*)\.$"
    np.testing.assert_array_equal(run_cure(pattern, list(map(make_name, names))), images)
    np.testing.assert_array_equal(run_cure(pattern, np.array(list(map(make_name, names)))), images)


def test_names_of_arrays(in_folder: Path) -> None:
    """Names of .npy files, one for each row, are refused: the code in the message loads them."""
    for i, row in enumerate(X):
        np.save(f"{i}.npy", row)
    names = [f"{i}.npy" for i in range(8)]
    np.testing.assert_array_equal(run_cure(r"holds names of files, such as '0\.npy'.* for example (.*)\.$", names), X)


def test_text() -> None:
    """Text is refused: models take numbers, which a tokenizer makes."""
    with pytest.raises(
        InputError, match=r"^x holds text, such as 'what is it'; models take numbers\. Encode it first, .* tokenizer"
    ):
        Inputs.from_value(["what is it", "that"])


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (np.array([[1, 2.5], [3, True]], dtype=object), [[1, 2.5], [3, 1]]),
        ([None, 1.5], [np.nan, 1.5]),
        (np.array(["1970-01-02", "1970-01-03"], "M8[D]"), [1, 2]),
        ([np.timedelta64(1, "s"), np.timedelta64(2, "s")], [1, 2]),
    ],
)
def test_numbers_of_other_kinds(x: Any, expected: Any) -> None:
    """Numbers as Python objects, dates and durations are refused: the code in the message makes numbers of them."""
    numbers = run_cure(r"^x must hold numbers .*, got dtype [^ ]+\. Pass (.*)\.$", x)
    np.testing.assert_array_equal(Inputs.from_value(numbers).arrays[0], expected)


@pytest.mark.parametrize("x", [[{"a": row, "b": 1} for row in X], np.array([{"a": row, "b": 1} for row in X])])
def test_a_dict_for_each_row(x: Any) -> None:
    """A list of dicts is refused: the code in the message makes a dict of arrays, one for each port."""
    inputs = Inputs.from_value(run_cure(r"^x holds dicts\. Pass one dict of arrays instead, (.*)\.$", x))
    assert inputs.ports.names == ("a", "b")
    np.testing.assert_array_equal(inputs.arrays[0], X)


def test_records() -> None:
    """An array of records is refused: the code in the message makes an array of each field."""
    x = np.array([(1, 2.0), (3, 4.0)], [("a", "i4"), ("b", "f4")])
    inputs = Inputs.from_value(run_cure(r"^x holds records of a, b\. Pass an array for each, (.*)\.$", x))
    assert inputs.describe() == ("a: (2,) int32", "b: (2,) float32")


def test_a_generator() -> None:
    """A generator is refused: its rows can be read only once."""
    rows = run_cure(
        r"^x is a generator, whose rows cannot be cut into chunks\. Pass (.*), or an array\.$", (row for row in X)
    )
    np.testing.assert_array_equal(Inputs.from_value(rows).arrays[0], X)


def test_nothing() -> None:
    """None is refused by name."""
    with pytest.raises(InputError, match=r"^meta is None; it must be an array of numbers\.$"):
        Inputs.from_value({"image": X, "meta": None})
