"""What a network, or a function of the user's around it, returned: is it an answer, and the one that was planned?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from daskinfer.core.arrays import Array
from daskinfer.core.pytree import Structure, flatten
from daskinfer.errors import ModelError


def flat(answer: Any, who: str) -> tuple[list[Any], Structure]:
    """The arrays of what ``who`` returned, and the structure they stood in.

    Raises
    ------
    ModelError
        Where there is none, or something else.
    """
    try:
        arrays, structure = flatten(answer)
    except TypeError as error:
        raise ModelError(
            f"{who} returned a {error}; an array with one entry per row is needed, or tuples and dicts of them. "
            "Return a tensor or an ndarray."
        ) from None
    if not arrays:
        raise ModelError(f"{who} returned no array; one with an entry per row is needed. Return a tensor or an ndarray.")
    return arrays, structure


def check_rows(named: Sequence[str] | Structure, arrays: Sequence[Any], n_rows: int, who: str) -> None:
    """See that each array has an entry per row.

    Raises
    ------
    ModelError
        Where one has not.
    """
    for i, array in enumerate(arrays):
        shape = array.shape
        if len(shape) == 0 or shape[0] != n_rows:
            name = (named.names if isinstance(named, Structure) else named)[i]  # made only where it is needed
            raise ModelError(
                f"{who} returned {name} of shape {tuple(shape)} for {n_rows} rows; its first axis has to be the "
                f"rows', {n_rows} long. Return one entry per row."
            )


def check_promise(structure: Structure, looks: Sequence[Array], given: Any, promised: Sequence[Array] | None) -> None:
    """Compare the first answer, as empty arrays, with ``output=`` as it was given, and with what was planned.

    Raises
    ------
    ModelError
        Where it is another.
    """
    if given is not None and (names := flatten(given)[1].names) != structure.names:
        raise ModelError(
            f"the model gave {', '.join(structure.names)} where output= says {', '.join(names)}; the two have to agree, "
            "in this order. Pass output= in the structure of the model's answer."
        )
    if promised is not None and _looks(promised) != _looks(looks):
        raise ModelError(
            f"the model gave {in_words(looks)} per row where {in_words(promised)} was planned; the two have to "
            "agree. Pass output= as it really is."
        )


def differ(one: Array, other: Array) -> bool:
    """Whether rows of two arrays look different."""
    return one.shape[1:] != other.shape[1:] or one.dtype != other.dtype


def in_words(arrays: Sequence[Array]) -> str:
    """What a row of each array looks like, in words."""
    return ", ".join(f"{tuple(a.shape[1:])} {a.dtype}" for a in arrays)


def _looks(arrays: Sequence[Array]) -> list[tuple[Any, ...]]:
    return [(array.shape[1:], array.dtype) for array in arrays]
