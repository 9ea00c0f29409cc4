"""What this process has measured of a network: its speed in each layout, and the micro-batch that paid.

A layout is where a network runs: in this process with all threads, or on workers of one thread each. Kept for the next
call with the same network on rows of the same shape, so that nothing is measured twice.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from daskinfer.scheduling.autotune import BatchSizeChoice

MAX_RECORDS = 64  # networks and shapes; arbitrary, a record is some hundred bytes


@dataclass
class PerformanceRecord:
    """What is known of one network on rows of one shape: rows/s by layout or device, and by kind the micro-batch that pays.

    ``channels_last`` says by kind whether that memory format pays, as far as was tried.
    ``n_rows`` is how many rows were computed so far: who asks for many short runs will ask for more of them. ``output_spec`` is
    what the answer looks like (``probe``); None: not found out yet.
    """

    speeds: dict[str, float] = field(default_factory=dict)
    batch_sizes: dict[str, int] = field(default_factory=dict)
    channels_last: dict[str, bool] = field(default_factory=dict)
    n_rows: int = 0
    output_spec: Any = None

    def record_choice(self, kind: str, choice: BatchSizeChoice) -> None:
        """Note what pays on a kind of device; of a short run only the memory format is known."""
        if choice.channels_last is not None:
            self.channels_last[kind] = choice.channels_last
        if not choice.is_short_run:
            self.batch_sizes[kind] = choice.batch_size

    def get_channels_last_kinds(self, kinds: Iterable[str]) -> list[str]:
        """Of these kinds, those on which that memory format pays."""
        return [kind for kind in kinds if self.channels_last.get(kind)]


class PerformanceHistory:
    """Records by key, those used last.

    Note: threads share it; the lock guards the table, a record is written by whoever measured last.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: OrderedDict[Hashable, PerformanceRecord] = OrderedDict()

    def get_or_create(self, key: Hashable) -> PerformanceRecord:
        """The record under ``key``, new where nothing is known.

        Examples
        --------
        >>> history = PerformanceHistory()
        >>> history.get_or_create("net").speeds["inline"] = 1e6
        >>> history.get_or_create("net").speeds
        {'inline': 1000000.0}
        """
        with self._lock:
            known = self._records.setdefault(key, PerformanceRecord())
            self._records.move_to_end(key)
            if len(self._records) > MAX_RECORDS:
                self._records.popitem(last=False)
            return known

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._records.clear()


history = PerformanceHistory()
