"""What kind of trouble an exception is, and what is said of the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from daskinfer.errors import ChunkError, ModelError, OptionError
from daskinfer.worker.error_kinds import BadRowsError, annotate_errors, is_out_of_memory, is_sticky

CPU = torch.device("cpu")
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((10**15,), np.dtype(float)),
    RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_memory_is_short(error: Exception) -> None:
    """Whoever lacks memory, it is known here, and again by the message that comes from a worker."""
    assert is_out_of_memory(error)
    with pytest.raises(ChunkError, match="rows 3:9 on cpu failed") as caught, annotate_errors(CPU, 3, 9):
        raise error
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shapes differ"), KeyError("MemoryError: ")])
def test_memory_is_not_short(error: Exception) -> None:
    """What only sounds like it is no lack of memory."""
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("said", "sticky"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA error: device-side assert triggered", True),
        ("CUDA error: misaligned address", True),
        ("CUDA error: unspecified launch failure", True),
        ("CUDA error: an illegal instruction was encountered", True),
        ("CUDA error: the launch timed out and was terminated", True),
        ("CUDA error: uncorrectable ECC error encountered", True),
        ("CUDA error: hardware stack error", True),
        ("CUDA error: invalid program counter", True),
        ("CUDA error: operation not supported on global/shared address space", True),
        ("CUDA error: invalid argument", False),
        ("CUDA out of memory", False),
        ("device-side assert triggered", False),
    ],
)
def test_a_device_is_broken(said: str, sticky: bool) -> None:
    """CUDA's errors after which nothing works any more are told from all others."""
    assert is_sticky(RuntimeError(said)) is sticky


@pytest.mark.parametrize(
    ("error", "advice"), [("CUDA error: misaligned address", "start another"), ("busy", r"Repeat the call\.")]
)
def test_what_goes_wrong_is_said_of_the_rows(error: str, advice: str) -> None:
    """Any exception becomes one with the rows, the device, its kind and what to do."""
    with (
        pytest.raises(ChunkError, match=rf"rows 3:9 on cpu failed: RuntimeError: {error}\. .*{advice}"),
        annotate_errors(CPU, 3, 9),
    ):
        raise RuntimeError(error)


@pytest.mark.parametrize("kind", [ModelError, OptionError])
def test_what_is_nobodys_fault_keeps_its_kind(kind: type[Exception]) -> None:
    """An answer that is none, or an option that does not fit, is not taken for the rows' fault."""
    with pytest.raises(kind, match=r"^rows 3:9 on cpu: no answer$"), annotate_errors(CPU, 3, 9):
        raise kind("no answer")


@pytest.mark.parametrize(
    ("cause", "advice"),
    [
        (
            ValueError("odd"),
            r"ValueError: odd\. To see .* di\.predict\(model, x\[105:106\], devices='inline'\); on_error='skip'",
        ),
        (MemoryError("none"), r"MemoryError: none\. A single row does not fit into memory: .*; on_error='skip'"),
    ],
)
def test_rows_at_fault_are_named(cause: Exception, advice: str) -> None:
    """Rows that fail by themselves are named by their place in the whole input, with the call that shows it."""
    with pytest.raises(ChunkError, match=rf"rows 105:106 on cpu failed: {advice}") as caught, annotate_errors(CPU, 100, 200):
        raise BadRowsError(5, 6) from cause
    assert caught.value.__cause__ is cause
