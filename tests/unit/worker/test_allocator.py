"""Freed memory is kept for the next tensors, if the allocator is glibc's."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import subprocess
import sys
from typing import Any

import pytest

from daskinfer.worker.allocator import retain_freed_memory

# Counts the page faults of a block of 64 MiB after one like it was freed, in a process as Dask's nanny starts it.
FAULTS = """
import ctypes, resource
from daskinfer.worker.allocator import retain_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
dear = faults()
done = retain_freed_memory()
faults()
print(done, dear, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_freed_memory_is_reused() -> None:
    """Under Dask's nanny each large block costs page faults; with these settings the second one costs hardly any."""
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536"}
    answer = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    done, dear, cheap = answer.stdout.split()
    assert done == "True"
    assert int(cheap) < int(dear) / 10


@pytest.mark.parametrize("error", [OSError, TypeError, AttributeError])
def test_other_systems(error: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """If the allocator is not glibc's, nothing is changed, and one DEBUG line says so."""

    def without_mallopt(_: object) -> Any:
        raise error("no mallopt")

    monkeypatch.setattr(ctypes, "CDLL", without_mallopt)
    with caplog.at_level(logging.DEBUG, "daskinfer.worker.allocator"):
        assert not retain_freed_memory()
    assert [record.message for record in caplog.records] == [
        "the allocator has no mallopt, so reusing freed memory may be slow"
    ]
