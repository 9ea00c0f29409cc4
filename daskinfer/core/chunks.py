"""The records of a chunk, from the plan to its result: frozen, small, and the same in every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daskinfer.core.arrays import Array


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows ``start:stop`` of the input, and the number of the chunk within its plan or run."""

    index: int
    start: int
    stop: int

    @property
    def n_rows(self) -> int:
        """Rows of the chunk."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class ChunkStats:
    """What a worker says of a chunk that it finished.

    ``batch_size`` is the smallest batch that was used (rows), below the plan's if memory ran out. ``channels_last`` says
    whether images were laid out in that memory format. ``seconds`` is the time spent in the model, transfers included, but
    not loading it, reading and writing; ``first_call_seconds`` of it went into the first micro-batch that the process gave
    to the model, 0 in any later chunk. ``load_seconds`` is how long this chunk had the device wait for the model to load;
    ``waited_seconds`` is how long the device was idle until this chunk was read. ``read_began``, ``began`` and ``ended`` are
    when reading and computing began, and when all was written, in seconds since 1970 by the worker's clock. ``peak_nbytes``
    is the most that was held so far: of a GPU's memory by the model, of the host's by the process.
    """

    start: int
    stop: int
    device: str
    device_name: str
    batch_size: int
    seconds: float
    worker: str
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    waited_seconds: float = 0.0
    read_began: float = 0.0
    began: float = 0.0
    ended: float = 0.0
    peak_nbytes: int = 0
    channels_last: bool = False
    load_seconds: float = 0.0
    first_call_seconds: float = 0.0

    @property
    def is_abandoned(self) -> bool:
        """Whether no attempt gave an output: nothing is known of when and how it was computed."""
        return not self.began

    def with_timing(
        self, *, read_began: float, ended: float, read_seconds: float, write_seconds: float, waited_seconds: float
    ) -> ChunkStats:
        """Return the stats with what was measured around the model."""
        return replace(
            self,
            read_began=read_began,
            ended=ended,
            read_seconds=read_seconds,
            write_seconds=write_seconds,
            waited_seconds=waited_seconds,
        )


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part of a stored output that a worker wrote: its name within the output, its bytes, and their checksum."""

    name: str
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class RowFailure:
    """Rows ``start:stop`` without an output, the device that tried last, and its error."""

    start: int
    stop: int
    device: str
    exception: str


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """How rows are put into batches: the batch size in rows, and what was measured to pay on each kind of device.

    ``by_kind`` holds the batch size of kinds of device ("cuda", "cpu") that take another, each a divisor of ``batch_size``.
    ``channels_last`` holds the kinds on which images are laid out in that memory format.

    Examples
    --------
    >>> config = BatchConfig(64, {"cpu": 16})
    >>> config.get_batch_size("cpu"), config.get_batch_size("cuda")
    (16, 64)
    """

    batch_size: int
    by_kind: Mapping[str, int] = field(default_factory=dict)
    channels_last: tuple[str, ...] = ()

    def get_batch_size(self, kind: str) -> int:
        """Return the rows of a batch on a kind of device."""
        return self.by_kind.get(kind, self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a header on disk has them."""
        return {"batch_size": self.batch_size, "by_kind": dict(self.by_kind), "channels_last": self.channels_last}


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What became of a chunk: its outputs, each (n, *shape), how it was computed, and which rows failed.

    ``arrays`` is empty if the outputs went into files or shared memory. On the client they may be views of shared memory
    that another task uses afterwards: they are valid only while ``sink.write`` uses them. ``parts`` holds what was written
    to each target, ``failures`` the rows without an output, in order, ``attempts`` how often the chunk was tried.
    """

    chunk: Chunk
    arrays: Sequence[Array]
    stats: ChunkStats
    parts: tuple[tuple[StoredPart, ...], ...] = ()
    failures: tuple[RowFailure, ...] = ()
    attempts: int = 1
