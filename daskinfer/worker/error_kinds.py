"""What kind of error a chunk failed with, and the message that names its rows, its device and what to do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from daskinfer.errors import ChunkError, ModelError, OptionError
from daskinfer.scheduling.retry import ErrorKind
from daskinfer.worker.backends import BACKENDS

_PACKAGE_PREFIX = f"{Path(__file__).parents[1]}{os.sep}"


class BadRowsError(Exception):
    """Rows of the chunk, begin to end, that fail on their own; the cause is what they raised."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, on any kind of device."""
    return any(backend.is_out_of_memory(error) for backend in BACKENDS.values())


def is_sticky(error: BaseException) -> bool:
    """Return whether the process that got this error can no longer use its device; only a new process helps."""
    return any(backend.is_sticky(error) for backend in BACKENDS.values())


def classify_error(error: BaseException) -> ErrorKind:
    """Tell the scheduler's retry rules what kind of error this is."""
    if is_sticky(error):
        return ErrorKind.STICKY
    return ErrorKind.OUT_OF_MEMORY if is_out_of_memory(error) else ErrorKind.OTHER


@contextlib.contextmanager
def annotate_errors(device: torch.device, start: int, stop: int) -> Iterator[None]:
    """Raise any error of the block as one that names the rows and the device."""
    where = f"rows {start}:{stop} on {device}"
    try:
        yield
    except BadRowsError as fault:
        raise ChunkError(_format_bad_rows_error(fault, start, device)) from _strip_internal_frames(fault.__cause__)
    except (ModelError, OptionError) as error:
        raise type(error)(f"{where}: {error}") from error
    except Exception as error:
        advice = "Start a new process: this one can no longer use the device." if is_sticky(error) else "Run the call again."
        raise ChunkError(f"{where} failed: {type(error).__name__}: {error}. {advice}") from _strip_internal_frames(error)


def _strip_internal_frames(error: BaseException | None) -> BaseException | None:
    """Return an error without the frames that lead to the user's function or model; unchanged if it is daskinfer's own."""
    if error is None:
        return None
    user_frames = error.__traceback__
    while user_frames is not None and user_frames.tb_frame.f_code.co_filename.startswith(_PACKAGE_PREFIX):
        user_frames = user_frames.tb_next
    return error if user_frames is None else error.with_traceback(user_frames)


def _format_bad_rows_error(fault: BadRowsError, start: int, device: torch.device) -> str:
    begin, end = (start + row for row in fault.args)
    error = fault.__cause__
    assert error is not None  # it is raised from what the rows raised
    advice = (
        "A single row does not fit into memory: use a device with more"
        if is_out_of_memory(error)
        else f"For the traceback, run di.predict(model, x[{begin}:{end}], devices='inline') with x as an array"
    )
    failure = f"rows {begin}:{end} on {device} failed: {type(error).__name__}: {error}"
    return f"{failure}. {advice}, or skip failing rows with on_error='skip' (--on-error)."
