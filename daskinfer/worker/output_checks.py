"""Checks of what the model, or a user's function around it, returned: is it an output, and the one that was planned?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from daskinfer.core.arrays import NUMERIC_KINDS, Array
from daskinfer.core.pytree import PyTreeSpec, flatten
from daskinfer.errors import ModelError


def flatten_output(output: Any, producer: str) -> tuple[list[Any], PyTreeSpec]:
    """Return the arrays of what ``producer`` returned, and the structure that held them.

    Raises
    ------
    ModelError
        If there is no array, or anything else than arrays.
    """
    try:
        arrays, structure = flatten(output)
    except TypeError as error:
        raise ModelError(
            f"{producer} returned a {error}; it must return tensors or ndarrays with one entry per row, or tuples and dicts "
            "of them."
        ) from None
    if not arrays:
        raise ModelError(
            f"{producer} returned no array; it must return tensors or ndarrays with one entry per row, or tuples and dicts "
            "of them."
        )
    return arrays, structure


def check_row_counts(names: Sequence[str] | PyTreeSpec, arrays: Sequence[Any], n_rows: int, producer: str) -> None:
    """Check that each array has one entry per row.

    Raises
    ------
    ModelError
        If one has not.
    """
    for i, array in enumerate(arrays):
        shape = array.shape
        if len(shape) == 0 or shape[0] != n_rows:
            name = (names.names if isinstance(names, PyTreeSpec) else names)[i]  # computed only for the error
            raise ModelError(
                f"{producer} returned {name} of shape {tuple(shape)} for {n_rows} rows; its first axis must have length "
                f"{n_rows}, one entry per row."
            )


def check_preprocessed_dtypes(names: Sequence[str], arrays: Sequence[Any]) -> None:
    """Check that ``preprocess`` returned numbers, for a model that gets tensors.

    Raises
    ------
    ModelError
        If an array holds anything else.
    """
    for name, array in zip(names, arrays, strict=True):
        if array.dtype.kind not in NUMERIC_KINDS:
            raise ModelError(
                f"preprocess returned {name} of dtype {array.dtype}; a module takes numbers (bool, int, float or complex)."
            )


def check_output_spec(
    structure: PyTreeSpec, actual: Sequence[Array], requested: Any, planned: Sequence[Array] | None
) -> None:
    """Check the first output, as empty arrays, against ``output=`` as the user passed it, and against the plan.

    Raises
    ------
    ModelError
        If it differs from either.
    """
    if requested is not None and (names := flatten(requested)[1].names) != structure.names:
        raise ModelError(
            f"the model returned {', '.join(structure.names)}, output= has {', '.join(names)}. Make output= match the "
            "structure of the model's actual output, in the same order."
        )
    if planned is not None and _get_row_specs(planned) != _get_row_specs(actual):
        raise ModelError(
            f"the model returned {describe_row_specs(actual)} per row, {describe_row_specs(planned)} was planned. Make "
            "output= match the model's actual output."
        )


def has_different_rows(one: Array, other: Array) -> bool:
    """Return whether the rows of two arrays differ in shape or dtype."""
    return one.shape[1:] != other.shape[1:] or one.dtype != other.dtype


def describe_row_specs(arrays: Sequence[Array]) -> str:
    """Describe the shape and dtype of a row of each array."""
    return ", ".join(f"{tuple(a.shape[1:])} {a.dtype}" for a in arrays)


def _get_row_specs(arrays: Sequence[Array]) -> list[tuple[Any, ...]]:
    return [(array.shape[1:], array.dtype) for array in arrays]
