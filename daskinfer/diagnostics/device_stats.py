"""What a run did, as those see it who draw it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from daskinfer.core.chunks import RowFailure
from daskinfer.diagnostics.timeline import Span


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """One device's part in a run: shares are fractions of all rows, ``seconds`` the time spent in the network.

    ``asked_share`` is the plan's, ``measured_share`` what the device's speed is of all devices', ``done_share`` what it did.
    ``read_seconds`` and ``write_seconds`` are those of all chunks together, beside the network's; ``waited_seconds`` is how
    long the device stood still until a chunk was read. ``batch_size`` is the smallest micro-batch that was used (rows; 0
    where nothing was done), ``peak_nbytes`` the most memory held: a GPU's by the network, else the process's. ``n_retried``
    counts attempts that came to nothing, ``began`` and ``ended`` are when its first chunk was read and its last was done, in
    seconds since 1970.
    """

    device: str
    device_name: str
    n_chunks: int
    n_rows: int
    seconds: float
    asked_share: float
    done_share: float
    measured_share: float = 0.0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    waited_seconds: float = 0.0
    batch_size: int = 0
    peak_nbytes: int = 0
    n_retried: int = 0
    began: float = 0.0
    ended: float = 0.0

    @property
    def rows_per_second(self) -> float:
        """Rows over seconds spent in the network; 0.0 where nothing was done."""
        return self.n_rows / self.seconds if self.seconds else 0.0


class ReportLike(Protocol):
    """``run_report.RunReport``, which draws itself with the rooms that draw it."""

    @property
    def devices(self) -> tuple[DeviceReport, ...]: ...

    @property
    def failures(self) -> tuple[RowFailure, ...]: ...

    @property
    def failed_rows(self) -> tuple[int, ...]: ...

    @property
    def timeline(self) -> tuple[Span, ...]: ...

    @property
    def facts(self) -> Mapping[str, str]: ...

    @property
    def totals(self) -> str: ...

    @property
    def details(self) -> str: ...

    @property
    def verdict(self) -> str: ...

    @property
    def tail_seconds(self) -> float: ...

    @property
    def n_retried(self) -> int: ...
