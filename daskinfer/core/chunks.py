"""Frozen records that cross processes: what is to be done, and what was done."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows ``start:stop`` of the input, meant for the device at position ``device_index`` of the plan."""

    index: int
    start: int
    stop: int
    device_index: int

    @property
    def n_rows(self) -> int:
        """How many rows the chunk holds."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class ChunkStats:
    """What a worker says of a chunk that it finished.

    ``batch_size`` is the smallest micro-batch that was used (rows); it is below the plan's where memory ran out.
    ``channels_last`` says whether images lay in that memory format.
    ``seconds`` is the time spent in the network, transfers included, reading and writing not; ``waited_seconds`` is how
    long the device then stood still until this chunk was read. ``read_began``, ``began`` and ``ended`` are when reading and
    the network began, and when all was written, in seconds since 1970 by the worker's clock. ``peak_nbytes`` is the most
    that was held so far: of the device's memory by the network on a GPU, else of the host's by the process.
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

    @property
    def is_abandoned(self) -> bool:
        """Whether no attempt came to an answer: nothing is known of when and how it was computed."""
        return not self.began

    def with_timing(
        self, *, read_began: float, ended: float, read_seconds: float, write_seconds: float, waited_seconds: float
    ) -> ChunkStats:
        """The same with what was found out around the network."""
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
    """Rows ``start:stop`` without an answer, the device that tried last, and what it said."""

    start: int
    stop: int
    device: str
    exception: str
