"""The host's cores, memory and processor name, limited to what this process may use.

CPU affinity and the limits of control groups (versions 1 and 2, at every level of the hierarchy) are respected: in a
container or a batch job, the machine's own totals include cores and memory that the process can never get.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

_ROOT = Path("/")  # holds proc and sys


def count_cores() -> int:
    """Count the cores that this process may use: its affinity, or the quota of its control group if that is smaller.

    Examples
    --------
    >>> count_cores() >= 1
    True
    """
    n_allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [text.split() for text in _iter_cgroup_limits("cpu", ["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"])]
    quotas = [int(limit[0]) // int(limit[1]) for limit in limits if len(limit) == 2 and limit[0].isdigit()]
    return max(1, min([n_allowed, *quotas]))


def read_memory_nbytes() -> int:
    """Return the host's memory in bytes, or the limit of its control group if that is smaller; 0 if unknown.

    Examples
    --------
    >>> read_memory_nbytes() >= 0
    True
    """
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows has no sysconf; some systems lack these names
        return 0
    limits = [
        int(text) for text in _iter_cgroup_limits("memory", ["memory.max"], ["memory.limit_in_bytes"]) if text.isdigit()
    ]
    return min([physical, *limits])


def _iter_cgroup_limits(controller: str, v2_files: Sequence[str], v1_files: Sequence[str]) -> Iterator[str]:
    """Yield the text of a limit for this process's control group and each of its parents, in versions 1 and 2."""
    for line in _read_text("proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        folders = {"": ("sys/fs/cgroup", v2_files), controller: (f"sys/fs/cgroup/{controller}", v1_files)}
        for name in folders.keys() & controllers.split(","):
            root, files = folders[name]
            group = PurePosixPath(path.lstrip("/"))
            for folder in (group, *group.parents):
                yield " ".join(_read_text(f"{root}/{folder}/{file}") for file in files)


def _read_text(path: str) -> str:
    try:
        return (_ROOT / path).read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def read_cpu_label() -> str:
    """Return the processor's name; empty if unknown.

    Examples
    --------
    >>> isinstance(read_cpu_label(), str)
    True
    """
    model_name = re.search(r"^model name\s*:\s*(.+)$", _read_text("proc/cpuinfo"), re.MULTILINE)
    return model_name[1] if model_name else platform.processor()
