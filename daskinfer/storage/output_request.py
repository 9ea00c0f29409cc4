"""What a run wants to store, looked at before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from daskinfer.errors import OptionError
from daskinfer.models.fingerprint import fingerprint
from daskinfer.options import Options
from daskinfer.storage.manifest import ANSWER_OPTIONS, Header
from daskinfer.storage.paths import Shard, begun, refuse_differences, refuse_gone


@dataclass(frozen=True)
class Into:
    """What rows are laid out for: an output that was ``begun`` already (None: a new one), and this run's part of it."""

    begun: Header | None = None
    shard: Shard | None = None

    @classmethod
    def of(cls, paths: Sequence[str], shard: Shard | None) -> Into:
        """As the outputs at these paths are found."""
        found = [header for path in paths if (header := begun(path)) is not None]
        return cls(found[0] if found else None, shard)


@dataclass(frozen=True)
class Wanted:
    """What a run wants to store: each output's path and header, the micro-batch that was named, its part of the rows."""

    paths: tuple[str, ...]
    headers: tuple[Header, ...]
    batch_size: int | None
    shard: Shard | None
    retries_failed: bool = False

    def refuse_differences(self) -> None:
        """Refuse outputs that were begun with something else (looked at again once they are locked), or that lost parts.

        Raises
        ------
        OutputExists
            With each difference, what it was and is, or what is gone.
        """
        for path, header in zip(self.paths, self.headers, strict=True):
            if (found := begun(path)) is not None:
                refuse_differences(path, found, header, self.batch_size)
                refuse_gone(path, found)


def answer_options(options: Options) -> dict[str, Any]:
    """The options that change the answer, as a manifest keeps them."""
    return {name: _plain(getattr(options, name)) for name in ANSWER_OPTIONS}


def check_shard(shard: object, *, fresh: bool) -> Shard | None:
    """A shard (i, n), counted from 1; None for all of the output.

    Raises
    ------
    OptionError
        Where it is something else, or ``fresh`` is asked for beside it.
    """
    if shard is None:
        return None
    numbers = tuple(shard) if isinstance(shard, tuple | list) else ()
    if len(numbers) != 2 or any(type(n) is not int for n in numbers) or not 1 <= numbers[0] <= numbers[1]:
        raise OptionError(
            f"shard is {shard!r}; it may be (i, n), part i of n, counted from 1, or None. "
            "Pass (1, 64) to (64, 64), on the command line --shard 1/64 to 64/64."
        )
    if fresh:
        raise OptionError(
            f"fresh=True was given with shard={shard!r}; it would remove what the other shards have done. Remove the "
            "output, and what lies beside it under its name (.partial, .daskinfer), before the first of them starts, or "
            "choose another path."
        )
    return numbers[0], numbers[1]


def _plain(value: Any) -> Any:
    if callable(value):
        return fingerprint(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    # NaN is not equal to itself.
    return repr(value) if isinstance(value, float) else value
