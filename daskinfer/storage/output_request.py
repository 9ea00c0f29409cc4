"""What a run is asked to store, checked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from daskinfer.errors import OptionError
from daskinfer.storage.manifest import Header
from daskinfer.storage.paths import Shard, check_parts_present, check_same_run, read_existing_header


@dataclass(frozen=True)
class ExistingOutput:
    """The output that chunks are cut for: the ``header`` of one to be continued (None: a new one), and this run's shard."""

    header: Header | None = None
    shard: Shard | None = None

    @classmethod
    def from_paths(cls, paths: Sequence[str], shard: Shard | None) -> ExistingOutput:
        """Build it from the first of these paths that holds an output with data."""
        headers = [header for path in paths if (header := read_existing_header(path)) is not None]
        return cls(headers[0] if headers else None, shard)


@dataclass(frozen=True)
class OutputRequest:
    """What a run is asked to store: path and header of each output, the batch size if named (else None), and its shard."""

    paths: tuple[str, ...]
    headers: tuple[Header, ...]
    batch_size: int | None
    shard: Shard | None
    retry_failed_rows: bool = False

    def check_existing_outputs(self) -> None:
        """Refuse outputs that a different run started (checked again under the lock), or that lost parts.

        Raises
        ------
        OutputExists
            The message lists each difference with its old and new value, or the missing parts.
        """
        for path, header in zip(self.paths, self.headers, strict=True):
            if (existing := read_existing_header(path)) is not None:
                check_same_run(path, existing, header, self.batch_size)
                check_parts_present(path, existing)


def check_shard(shard: object, *, overwrite: bool) -> Shard | None:
    """Check a shard (i, n), counted from 1, and return it; None stands for the whole output.

    Raises
    ------
    OptionError
        If it is anything else, or is combined with ``overwrite``.
    """
    if shard is None:
        return None
    numbers = tuple(shard) if isinstance(shard, tuple | list) else ()
    if len(numbers) != 2 or any(type(n) is not int for n in numbers) or not 1 <= numbers[0] <= numbers[1]:
        raise OptionError(
            f"shard must be None or (i, n), part i of n, counted from 1, got {shard!r}. For 64 parts, pass (1, 64) to "
            "(64, 64) (--shard 1/64 to 64/64)."
        )
    if overwrite:
        raise OptionError(
            f"overwrite=True (--overwrite) cannot be combined with shard={numbers} (--shard {numbers[0]}/{numbers[1]}): it "
            "would delete other shards' rows. Remove the output, .partial and .daskinfer before the first shard starts, or "
            "choose another path."
        )
    return numbers[0], numbers[1]
