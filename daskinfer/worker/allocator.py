"""How this process gives memory back to the system: keep what tensors used, for the next ones.

Dask's nanny sets ``MALLOC_TRIM_THRESHOLD_=65536``, so every large tensor is mapped anew, and faulting its pages in costs
more than computing it: 2 times on CPUs (decision 4). Two calls of glibc's ``mallopt`` bring it back; they can be made at
any time. The price is that a worker keeps the most that it ever used.
"""

from __future__ import annotations

import ctypes
import logging

logger = logging.getLogger(__name__)

# <malloc.h>: what to set, and the value.
_TRIM_THRESHOLD = (-1, 2**31 - 1)  # bytes at the top of the heap that are kept
_MMAP_THRESHOLD = (-3, 1 << 30)  # bytes from which a block is mapped on its own
_ARENA_MAX = (-8, 1)  # one heap for all threads (launch), where no second thread has asked for memory yet


def retain_freed_memory() -> bool:
    """Set this process's allocator so; False where it is not glibc's.

    Examples
    --------
    >>> retain_freed_memory() in (True, False)
    True
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        logger.debug("this system's allocator has no mallopt; freed memory may be costly to get again")
        return False
    done = [mallopt(*setting) == 1 for setting in (_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX)]
    return all(done)
