"""What kind of trouble a chunk is in, and what is said of it: which rows, on which device, what to do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from daskinfer.errors import ChunkError, ModelError, OptionError

# torch has no class of its own for running out of memory on the CPU, nor inside cuBLAS and cuDNN.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "out of memory", "ALLOC_FAILED", "MemoryError: ")
_PACKAGE_PREFIX = f"{Path(__file__).parents[1]}{os.sep}"
# Of CUDA's errors those after which its documentation has the process end (cudaError_t).
_STICKY = (
    *("illegal memory access", "illegal instruction", "invalid program counter", "misaligned address", "device-side assert"),
    *("unspecified launch failure", "launch timed out", "hardware stack error", "uncorrectable ECC error"),
    "operation not supported on global/shared address space",
)


class BadRowsError(Exception):
    """Rows of the chunk, begin to end, that fail by themselves; its cause is what they raised."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def is_sticky(error: BaseException) -> bool:
    """Whether a CUDA device is of no more use to the process that got this; only a new one helps."""
    return "CUDA" in str(error) and any(words in str(error) for words in _STICKY)


@contextlib.contextmanager
def annotate_errors(device: torch.device, start: int, stop: int) -> Iterator[None]:
    """Say which rows, on which device, whatever goes wrong meanwhile."""
    where = f"rows {start}:{stop} on {device}"
    try:
        yield
    except BadRowsError as fault:
        raise ChunkError(_format_bad_rows_error(fault, start, device)) from _strip_internal_frames(fault.__cause__)
    except (ModelError, OptionError) as error:
        raise type(error)(f"{where}: {error}") from error
    except Exception as error:
        advice = "The device is of no more use to this process: start another." if is_sticky(error) else "Repeat the call."
        raise ChunkError(f"{where} failed: {type(error).__name__}: {error}. {advice}") from _strip_internal_frames(error)


def _strip_internal_frames(error: BaseException | None) -> BaseException | None:
    """An error without the frames that lead to the caller's own function or network; whole where it is of daskinfer's."""
    if error is None:
        return None
    theirs = error.__traceback__
    while theirs is not None and theirs.tb_frame.f_code.co_filename.startswith(_PACKAGE_PREFIX):
        theirs = theirs.tb_next
    return error if theirs is None else error.with_traceback(theirs)


def _format_bad_rows_error(fault: BadRowsError, start: int, device: torch.device) -> str:
    begin, end = (start + row for row in fault.args)
    error = fault.__cause__
    assert error is not None  # it is raised from what the rows raised
    advice = (
        "A single row does not fit into memory: use a device with more of it"
        if is_out_of_memory(error)
        else "To see the whole traceback run them alone, where x is the input as an array: "
        f"di.predict(model, x[{begin}:{end}], devices='inline')"
    )
    where = f"rows {begin}:{end} on {device}"
    return f"{where} failed: {type(error).__name__}: {error}. {advice}; on_error='skip' (--on-error) goes on without."
