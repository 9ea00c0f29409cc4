"""What a network, or a function of the user's around it, returned: is it an answer, and the one that was planned?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from daskinfer.core.arrays import Array
from daskinfer.core.pytree import PyTreeSpec, flatten
from daskinfer.errors import ModelError


def flatten_output(output: Any, producer: str) -> tuple[list[Any], PyTreeSpec]:
    """The arrays of what ``who`` returned, and the structure they stood in.

    Raises
    ------
    ModelError
        Where there is none, or something else.
    """
    try:
        arrays, structure = flatten(output)
    except TypeError as error:
        raise ModelError(
            f"{producer} returned a {error}; an array with one entry per row is needed, or tuples and dicts of them. "
            "Return a tensor or an ndarray."
        ) from None
    if not arrays:
        raise ModelError(
            f"{producer} returned no array; one with an entry per row is needed. Return a tensor or an ndarray."
        )
    return arrays, structure


def check_row_counts(names: Sequence[str] | PyTreeSpec, arrays: Sequence[Any], n_rows: int, producer: str) -> None:
    """See that each array has an entry per row.

    Raises
    ------
    ModelError
        Where one has not.
    """
    for i, array in enumerate(arrays):
        shape = array.shape
        if len(shape) == 0 or shape[0] != n_rows:
            name = (names.names if isinstance(names, PyTreeSpec) else names)[i]  # made only where it is needed
            raise ModelError(
                f"{producer} returned {name} of shape {tuple(shape)} for {n_rows} rows; its first axis has to be the "
                f"rows', {n_rows} long. Return one entry per row."
            )


def check_output_spec(
    structure: PyTreeSpec, actual: Sequence[Array], requested: Any, planned: Sequence[Array] | None
) -> None:
    """Compare the first answer, as empty arrays, with ``output=`` as it was given, and with what was planned.

    Raises
    ------
    ModelError
        Where it is another.
    """
    if requested is not None and (names := flatten(requested)[1].names) != structure.names:
        raise ModelError(
            f"the model gave {', '.join(structure.names)} where output= says {', '.join(names)}; the two have to agree, "
            "in this order. Pass output= in the structure of the model's answer."
        )
    if planned is not None and _get_row_specs(planned) != _get_row_specs(actual):
        raise ModelError(
            f"the model gave {describe_row_specs(actual)} per row where {describe_row_specs(planned)} was planned; the two have to "
            "agree. Pass output= as it really is."
        )


def has_different_rows(one: Array, other: Array) -> bool:
    """Whether rows of two arrays look different."""
    return one.shape[1:] != other.shape[1:] or one.dtype != other.dtype


def describe_row_specs(arrays: Sequence[Array]) -> str:
    """What a row of each array looks like, in words."""
    return ", ".join(f"{tuple(a.shape[1:])} {a.dtype}" for a in arrays)


def _get_row_specs(arrays: Sequence[Array]) -> list[tuple[Any, ...]]:
    return [(array.shape[1:], array.dtype) for array in arrays]
