"""What kind of error an exception is, and the message that names its rows."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from daskinfer.errors import ChunkError, ModelError, OptionError
from daskinfer.scheduling.retry import ErrorKind
from daskinfer.worker.error_kinds import (
    BadRowsError,
    annotate_errors,
    blame_step,
    classify_error,
    describe_error,
    is_out_of_memory,
    is_sticky,
)

CPU = torch.device("cpu")
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((10**15,), np.dtype(float)),
    RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory(error: Exception) -> None:
    """Out of memory is recognized on any device, and again in the message that comes from a worker."""
    assert is_out_of_memory(error)
    with pytest.raises(ChunkError, match="rows 3:9 on cpu failed") as caught, annotate_errors(CPU, 3, 9):
        raise error
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shapes differ"), KeyError("MemoryError: ")])
def test_not_out_of_memory(error: Exception) -> None:
    """An error that only sounds like it is not out of memory."""
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("message", "sticky"),
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
def test_sticky_errors(message: str, sticky: bool) -> None:
    """CUDA errors after which the process cannot use the device any more are told from all others."""
    assert is_sticky(RuntimeError(message)) is sticky


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("CUDA error: misaligned address"), ErrorKind.STICKY),
        (RuntimeError("CUDA out of memory"), ErrorKind.OUT_OF_MEMORY),
        (RuntimeError("CUDA error: misaligned address; CUDA out of memory"), ErrorKind.STICKY),
        (MemoryError(), ErrorKind.OUT_OF_MEMORY),
        (ChunkError("rows 0:4 on cpu failed: MemoryError: "), ErrorKind.OUT_OF_MEMORY),
        (RuntimeError("shapes differ"), ErrorKind.OTHER),
    ],
)
def test_errors_are_classified_for_the_retry_rules(error: Exception, kind: ErrorKind) -> None:
    """A sticky error is sticky even if memory is short too, and what is neither is OTHER."""
    assert classify_error(error) is kind


@pytest.mark.parametrize(
    ("error", "advice"), [("CUDA error: misaligned address", "Start a new process"), ("busy", r"Run the call again\.")]
)
def test_errors_name_their_rows(error: str, advice: str) -> None:
    """Any exception becomes one with the rows, the device, its type and what to do."""
    with (
        pytest.raises(ChunkError, match=rf"rows 3:9 on cpu failed: RuntimeError: {error}\. .*{advice}"),
        annotate_errors(CPU, 3, 9),
    ):
        raise RuntimeError(error)


def test_the_step_of_an_error_survives_pickling() -> None:
    """What is noted on an error of preprocess is still known after it came from another process."""
    with pytest.raises(ValueError, match="odd") as caught, blame_step("preprocess"):
        raise ValueError("odd")
    again = pickle.loads(pickle.dumps(caught.value))
    assert describe_error(again) == describe_error(caught.value) == "preprocess raised ValueError: odd"


@pytest.mark.parametrize("kind", [ModelError, OptionError])
def test_errors_of_no_rows_keep_their_type(kind: type[Exception]) -> None:
    """An unusable output, or an option that does not fit, is not taken for the rows' fault."""
    with pytest.raises(kind, match=r"^rows 3:9 on cpu: no answer$"), annotate_errors(CPU, 3, 9):
        raise kind("no answer")


@pytest.mark.parametrize(
    ("cause", "advice"),
    [
        (
            ValueError("odd"),
            r"ValueError: odd\. For the traceback, run di\.predict\(model, x\[105:106\], devices='inline'\) with x as an "
            r"array, or skip failing rows with on_error='skip'",
        ),
        (MemoryError("none"), r"MemoryError: none\. A single row does not fit into memory: .*, or skip .* on_error='skip'"),
    ],
)
def test_bad_rows_are_named(cause: Exception, advice: str) -> None:
    """Rows that fail on their own are named by their position in the whole input, with the call that reproduces it."""
    with pytest.raises(ChunkError, match=rf"rows 105:106 on cpu failed: {advice}") as caught, annotate_errors(CPU, 100, 200):
        raise BadRowsError(5, 6) from cause
    assert caught.value.__cause__ is cause
