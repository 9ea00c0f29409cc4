"""The memory allocator of this process: keep what tensors freed, for the next ones.

Dask's nanny sets ``MALLOC_TRIM_THRESHOLD_=65536``, so every large tensor is mapped again, and faulting in its pages makes
models on CPUs 2 times slower (figures in the docstring of ``daskinfer.worker``). Calls of glibc's ``mallopt`` undo that, at
any time. The price is that a worker never returns the most memory that it used.
"""

from __future__ import annotations

import ctypes
import logging

logger = logging.getLogger(__name__)

# Parameter and value, from <malloc.h>.
_TRIM_THRESHOLD = (-1, 2**31 - 1)  # bytes at the top of the heap that are not returned
_MMAP_THRESHOLD = (-3, 1 << 30)  # bytes from which on a block gets a mapping of its own
_ARENA_MAX = (
    -8,
    1,
)  # one heap for all threads, as in a worker's environment (``worker_spec``), unless a second thread has allocated already


def retain_freed_memory() -> bool:
    """Make this process's allocator keep freed memory; return False if it is not glibc's.

    Examples
    --------
    >>> retain_freed_memory() in (True, False)
    True
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        logger.debug("the allocator has no mallopt, so reusing freed memory may be slow")
        return False
    accepted = [mallopt(*setting) == 1 for setting in (_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX)]
    return all(accepted)
