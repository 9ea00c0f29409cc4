"""Device weights: from what a user typed as ``device_weights`` to one checked number per device.

Weights are relative: a device of weight 8 gets 8 times the rows of a device of weight 1. ``chunking`` turns them into
shares of rows. Pure numbers and strings; no Dask and no device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from numbers import Real

from daskinfer.errors import OptionError

# Relative rows per second by kind of device; arbitrary priors, used until a run has measured the devices.
KIND_SPEED_PRIORS = {"cuda": 8.0, "cpu": 1.0, "inline": 1.0}

_MAX_SHOWN_NAMES = 8  # device names that a message lists before it counts the rest


def resolve_weights(
    weights: str | Sequence[float] | Mapping[str, float], names: Sequence[str], kinds: Sequence[str]
) -> tuple[float, ...]:
    """Resolve what was typed as ``device_weights`` to one weight per device.

    Parameters
    ----------
    weights
        A list in the devices' order; a mapping by device (``"cuda:0"``) or kind (``"cuda"``, also called ``"gpu"``), in
        any letter case, in which the entry of a device overrides that of its kind; ``"even"``; or ``"auto"``, which means
        ``KIND_SPEED_PRIORS``.
    names, kinds
        Name and kind of each device, in order.

    Returns
    -------
    tuple of float
        Finite numbers >= 0, at least one above 0.

    Raises
    ------
    OptionError
        If a device has no weight or an invalid one, if an entry matches no device, or if all weights are 0.

    Examples
    --------
    >>> resolve_weights({"GPU": 8, "cuda:1": 4, "cpu": 1}, ["cuda:0", "cuda:1", "cpu:0"], ["cuda", "cuda", "cpu"])
    (8.0, 4.0, 1.0)
    """
    plain = getattr(weights, "tolist", lambda: weights)()  # arrays and tensors
    if isinstance(plain, str) and plain in ("even", "auto"):
        resolved: list[object] = [1.0 if plain == "even" else KIND_SPEED_PRIORS[kind] for kind in kinds]
    elif isinstance(plain, Mapping):
        resolved = _resolve_weight_mapping(plain, names, kinds)
    elif isinstance(plain, Sequence) and not isinstance(plain, str | bytes):
        resolved = list(plain)
    else:
        raise OptionError(
            f"device_weights must be 'auto', 'even', a list in the devices' order, or a mapping by device or kind, "
            f"got {weights!r}. Give one number for each of {_format_names(names)}."
        )
    if len(resolved) != len(names):
        raise OptionError(
            f"device_weights has {len(resolved)} entries for {len(names)} devices ({_format_names(names)}). "
            "Give one per device, in this order; 0 leaves a device out."
        )
    checked = tuple(_check_weight(name, weight) for name, weight in zip(names, resolved, strict=True))
    if not any(checked):
        raise OptionError(f"device_weights are all 0. Give at least one of {_format_names(names)} a weight above 0.")
    return checked


def _resolve_weight_mapping(weights: Mapping[str, float], names: Sequence[str], kinds: Sequence[str]) -> list[object]:
    """Look each device up by its name, then by its kind; return the values unchecked."""
    known = {_normalize_device_name(name) for name in (*names, *kinds)}
    by_name: dict[str, object] = {}
    for key, weight in weights.items():
        name = _normalize_device_name(key)
        if name not in known:
            raise OptionError(
                f"device_weights has an entry {key!r} that matches none of the devices ({_format_names(names)}). "
                "Remove the entry, or add the device to devices."
            )
        if name in by_name:
            raise OptionError(f"device_weights has two entries for {name!r}, one of them {key!r}. Remove one.")
        by_name[name] = weight
    for name, kind in zip(names, kinds, strict=True):
        if _normalize_device_name(name) not in by_name and _normalize_device_name(kind) not in by_name:
            raise OptionError(
                f"device_weights has no entry for {name}. Add one for {name!r} or {kind!r}; 0 leaves the device out."
            )
    return [
        by_name.get(_normalize_device_name(name), by_name.get(_normalize_device_name(kind)))
        for name, kind in zip(names, kinds, strict=True)
    ]


def _normalize_device_name(name: object) -> str:
    """Return the name in lower case, with "cuda" for the alias "gpu"; a UUID such as "GPU-ab12" is no alias."""
    folded = str(name).strip().lower()
    kind, colon, number = folded.partition(":")
    return f"cuda{colon}{number}" if kind == "gpu" else folded


def _check_weight(name: str, weight: object) -> float:
    if not isinstance(weight, Real) or isinstance(weight, bool):
        raise OptionError(f"weight of {name} must be a number >= 0, got {weight!r}")
    try:
        value = float(weight)
    except OverflowError:
        value = float("inf")
    if not (isfinite(value) and value >= 0):
        raise OptionError(f"weight of {name} must be finite and >= 0, got {weight!r}")
    return value


def _format_names(names: Sequence[str]) -> str:
    """List the first device names, and count the rest."""
    rest = len(names) - _MAX_SHOWN_NAMES
    return ", ".join(names[:_MAX_SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")
