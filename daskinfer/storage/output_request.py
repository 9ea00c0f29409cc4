"""What a run wants to store, looked at before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from daskinfer.errors import OptionError
from daskinfer.models.fingerprint import compute_fingerprint
from daskinfer.options import Options
from daskinfer.storage.manifest import RESULT_OPTIONS, Header
from daskinfer.storage.paths import Shard, check_parts_present, check_same_run, existing_header


@dataclass(frozen=True)
class ExistingOutput:
    """What rows are laid out for: an output that was ``header`` already (None: a new one), and this run's part of it."""

    header: Header | None = None
    shard: Shard | None = None

    @classmethod
    def from_paths(cls, paths: Sequence[str], shard: Shard | None) -> ExistingOutput:
        """As the outputs at these paths are found."""
        found = [header for path in paths if (header := existing_header(path)) is not None]
        return cls(found[0] if found else None, shard)


@dataclass(frozen=True)
class OutputRequest:
    """What a run wants to store: each output's path and header, the micro-batch that was named, its part of the rows."""

    paths: tuple[str, ...]
    headers: tuple[Header, ...]
    batch_size: int | None
    shard: Shard | None
    retry_failed_rows: bool = False

    def check_existing_outputs(self) -> None:
        """Refuse outputs that were begun with something else (looked at again once they are locked), or that lost parts.

        Raises
        ------
        OutputExists
            With each difference, what it was and is, or what is gone.
        """
        for path, header in zip(self.paths, self.headers, strict=True):
            if (found := existing_header(path)) is not None:
                check_same_run(path, found, header, self.batch_size)
                check_parts_present(path, found)


def collect_result_options(options: Options) -> dict[str, Any]:
    """The options that change the answer, as a manifest keeps them."""
    return {name: _serialize_option(getattr(options, name)) for name in RESULT_OPTIONS}


def check_shard(shard: object, *, overwrite: bool) -> Shard | None:
    """A shard (i, n), counted from 1; None for all of the output.

    Raises
    ------
    OptionError
        Where it is something else, or ``overwrite`` is asked for beside it.
    """
    if shard is None:
        return None
    numbers = tuple(shard) if isinstance(shard, tuple | list) else ()
    if len(numbers) != 2 or any(type(n) is not int for n in numbers) or not 1 <= numbers[0] <= numbers[1]:
        raise OptionError(
            f"shard is {shard!r}; it may be (i, n), part i of n, counted from 1, or None. "
            "Pass (1, 64) to (64, 64), on the command line --shard 1/64 to 64/64."
        )
    if overwrite:
        raise OptionError(
            f"overwrite=True was given with shard={shard!r}; it would remove what the other shards have done. Remove the "
            "output, and what lies beside it under its name (.partial, .daskinfer), before the first of them starts, or "
            "choose another path."
        )
    return numbers[0], numbers[1]


def _serialize_option(value: Any) -> Any:
    if callable(value):
        return compute_fingerprint(value)
    if isinstance(value, Mapping):
        return {str(key): _serialize_option(item) for key, item in value.items()}
    # NaN is not equal to itself.
    return repr(value) if isinstance(value, float) else value
