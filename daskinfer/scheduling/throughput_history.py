"""What this process has measured of a model: its throughput in each execution mode, and the best batch size.

The execution mode says where a model runs: in this process with all threads, or on workers of one thread each. Records are
kept for the next call with the same model on rows of the same shape, so that nothing is measured twice.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from daskinfer.scheduling.autotune import BatchSizeChoice

MAX_RECORDS = 64  # models and shapes; arbitrary, a record takes some hundred bytes


@dataclass
class PerformanceRecord:
    """What was measured of one model on rows of one shape.

    ``speeds`` holds rows/s by execution mode ("inline", "workers") or device; ``batch_sizes`` the best batch size by kind of
    device; ``channels_last`` whether that memory format is faster on a kind of device, if it was tried. ``n_rows`` counts
    the rows computed so far: a caller of many short runs is likely to start more of them.
    """

    speeds: dict[str, float] = field(default_factory=dict)
    batch_sizes: dict[str, int] = field(default_factory=dict)
    channels_last: dict[str, bool] = field(default_factory=dict)
    n_rows: int = 0

    def record_choice(self, kind: str, choice: BatchSizeChoice) -> None:
        """Record the choice for a kind of device; a short run tells only the memory format."""
        if choice.channels_last is not None:
            self.channels_last[kind] = choice.channels_last
        if not choice.is_short_run:
            self.batch_sizes[kind] = choice.batch_size

    def get_channels_last_kinds(self, kinds: Iterable[str]) -> list[str]:
        """Return those of the kinds on which channels_last is faster."""
        return [kind for kind in kinds if self.channels_last.get(kind)]


class PerformanceHistory:
    """Performance records by key; beyond ``MAX_RECORDS`` the least recently used one is dropped.

    Note: threads share it. The lock guards the table, not the records: of two threads that measure one model, the last one
    to write wins.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: OrderedDict[Hashable, PerformanceRecord] = OrderedDict()

    def get_or_create(self, key: Hashable) -> PerformanceRecord:
        """Return the record under ``key``, a new one if there is none.

        Examples
        --------
        >>> history = PerformanceHistory()
        >>> history.get_or_create("model").speeds["inline"] = 1e6
        >>> history.get_or_create("model").speeds
        {'inline': 1000000.0}
        """
        with self._lock:
            record = self._records.setdefault(key, PerformanceRecord())
            self._records.move_to_end(key)
            if len(self._records) > MAX_RECORDS:
                self._records.popitem(last=False)
            return record

    def clear(self) -> None:
        """Delete all records."""
        with self._lock:
            self._records.clear()


history = PerformanceHistory()
