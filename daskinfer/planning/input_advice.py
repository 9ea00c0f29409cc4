"""What to pass instead of an input that is no array of numbers: a data loader, rows of unlike length, names of files.

Each function looks at a value that was refused and makes the error; the code in its message, typed in, gives an array.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from daskinfer.errors import InputError

_IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_SAMPLE_SIZE = 1000  # objects that are tried as numbers; arbitrary


def check_is_array_like(name: str, value: Any) -> None:
    """Refuse what gives out rows one after the other: NumPy would read it as a single object, or make one axis too many.

    Raises
    ------
    InputError
        With the array to pass instead.
    """
    if isinstance(value, DataLoader | Dataset):
        raise InputError(
            f"{name} is a {type(value).__name__}, and daskinfer makes the batches itself. Pass all inputs as one array, "
            f"for example {_describe_inputs(name, value)}."
        )
    if isinstance(value, Iterator):
        raise InputError(
            f"{name} is a {type(value).__name__}, whose rows cannot be cut into chunks. Pass list({name}), or an array."
        )
    if value is None:
        raise InputError(f"{name} is None; it must be an array of numbers.")


def _describe_inputs(name: str, value: DataLoader[Any] | Dataset[Any]) -> str:
    """Return code for the inputs of a data set whose rows are inputs or begin with them."""
    dataset, code = (value.dataset, f"{name}.dataset") if isinstance(value, DataLoader) else (value, name)
    if isinstance(dataset, TensorDataset):
        return f"{code}.tensors[0]"
    data = getattr(dataset, "data", None)  # as the data sets of torchvision have it
    if isinstance(data, np.ndarray | torch.Tensor) and isinstance(dataset, Sized) and len(data) == len(dataset):
        return f"{code}.data"
    if isinstance(dataset, IterableDataset):
        return f"np.stack([np.asarray(row[0]) for row in {code}])"
    return f"np.stack([np.asarray({code}[i][0]) for i in range(len({code}))])"


def make_conversion_error(name: str, value: Any, reason: Exception) -> InputError:
    """Make the error for a value that NumPy cannot convert; its rows may be of unlike length or shape."""
    return _find_unlike_rows(name, value) or InputError(
        f"{name} cannot be read as an array: {str(reason).rstrip('.')}. "
        "Convert it so that every row holds numbers in the same shape."
    )


def _find_unlike_rows(name: str, rows: Any) -> InputError | None:
    """Make the error for rows of unlike length or shape; None if they are not."""
    try:
        shapes = [np.shape(row) for row in rows]
    except (ValueError, TypeError, RuntimeError):
        return None  # a row is ragged itself, or no row at all
    if len(set(shapes)) == 1:
        return None
    if all(shapes) and len({shape[1:] for shape in shapes}) == 1:
        lengths = sorted(shape[0] for shape in shapes)
        cure = f"torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in {name}], batch_first=True)"
        return InputError(
            f"{name} holds rows of unlike length, {lengths[0]} to {lengths[-1]}. Pad them with {cure}, or group them by "
            "length and call once for each."
        )
    first, other = shapes[0], next(shape for shape in shapes if shape != shapes[0])
    return InputError(
        f"{name} holds rows of unlike shape, such as {first} and {other}. Resize, crop or pad them to one shape first."
    )


def make_dtype_error(name: str, value: Any, array: Any) -> InputError:
    """Make the error for a value that gave an array of anything else than numbers."""
    kind, first = array.dtype.kind, _get_first_entry(array)
    if kind in "USTO" and isinstance(first, str | bytes | os.PathLike):
        return _make_text_error(name, first)
    if kind == "O" and isinstance(first, Mapping):
        return InputError(
            f"{name} holds dicts. Pass one dict of arrays instead, "
            f"{{key: np.stack([row[key] for row in {name}]) for key in {name}[0]}}."
        )
    if kind == "O" and isinstance(first, Sequence | np.ndarray | torch.Tensor) and (error := _find_unlike_rows(name, array)):
        return error
    what = f"{name} must hold numbers (bool, int, float or complex), got dtype {array.dtype}"
    cure = "Convert or encode it first"
    if kind == "O" and _can_be_numbers(array):
        cure = f'Pass np.asarray({name}, "float32")'
    elif kind in "mM":
        cure = f'Pass {name if hasattr(value, "astype") else f"np.asarray({name})"}.astype("int64")'
    elif array.dtype.names:
        what = f"{name} holds records of {', '.join(array.dtype.names)}"
        cure = f"Pass an array for each, {{field: {name}[field] for field in {name}.dtype.names}}"
    return InputError(f"{what}. {cure}.")


def _get_first_entry(array: Any) -> Any:
    """Return the first entry of an array; None if it has none, or would have to be computed."""
    return next(iter(array.flat), None) if isinstance(array, np.ndarray) else None


def _can_be_numbers(array: Any) -> bool:
    try:
        np.asarray(array.ravel()[:_SAMPLE_SIZE], np.float32)
    except (ValueError, TypeError):
        return False
    return isinstance(array, np.ndarray) and array.ndim > 0


def _make_text_error(name: str, first: str | bytes | os.PathLike[Any]) -> InputError:
    text = str(os.fsdecode(first))
    load = {".npy": "np.load(path)"} | dict.fromkeys(_IMAGE_SUFFIXES, "np.asarray(PIL.Image.open(path))")
    if (suffix := PurePath(text).suffix.lower()) in load:
        return InputError(
            f"{name} holds names of files, such as {text!r}; models take numbers. Load them into one array, for "
            f"example np.stack([{load[suffix]} for path in {name}])."
        )
    return InputError(
        f"{name} holds text, such as {text!r}; models take numbers. Encode it first, for example with the model's tokenizer."
    )
