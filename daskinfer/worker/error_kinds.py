"""What kind of error a chunk failed with, and the message that names its rows, its device and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import numpy as np
import torch

from daskinfer.errors import PACKAGE_PREFIX, ChunkError, ModelError, OptionError
from daskinfer.scheduling.retry import ErrorKind
from daskinfer.worker.backends import BACKENDS


class _StepNote(str):
    """A note on an exception (PEP 678) that names the user's function that raised it, or that made the model raise it."""

    def __new__(cls, subject: str, advice: str) -> _StepNote:
        note = super().__new__(cls, f"{subject}{advice}")
        note.subject, note.advice = subject, advice
        return note

    subject: str
    advice: str

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]  # str's own has one
        return self.subject, self.advice


@contextlib.contextmanager
def blame_step(step: str) -> Iterator[None]:
    """Note on any error of the block that a user's function around the model raised it: "preprocess" or "postprocess"."""
    try:
        yield
    except Exception as error:
        error.add_note(_StepNote(f"{step} raised", _advise_on_arrays(error)))
        raise


def note_preprocessed_dtypes(error: Exception, dtypes: Collection[str], model_dtypes: Collection[str]) -> None:
    """Note on a model's error that ``preprocess`` returned floats of another dtype than the model's."""
    if model_dtypes and (others := [d for d in dtypes if d.startswith("float") and d not in model_dtypes]):
        returned, wanted = " and ".join(others), " and ".join(model_dtypes)
        error.add_note(_StepNote("", f"; preprocess returned {returned}, but the model is {wanted}"))


def get_step_note(error: BaseException) -> tuple[str, str]:
    """Return what is noted on an error: the step that raised it, as a subject, and advice; both empty if nothing is."""
    notes = [note for note in getattr(error, "__notes__", ()) if isinstance(note, _StepNote)]
    return (notes[0].subject, notes[0].advice) if notes else ("", "")


def describe_error(error: BaseException) -> str:
    """Return type and message of an error, with the step that raised it and what to change there.

    Examples
    --------
    >>> describe_error(ValueError("too large"))
    'ValueError: too large'
    """
    subject, advice = get_step_note(error)
    return f"{subject} {type(error).__name__}: {error}{advice}".lstrip()


def _advise_on_arrays(error: Exception) -> str:
    """Return what to say if a function called something on an ndarray that only tensors have, or that takes only tensors."""
    takes_tensors = isinstance(error, TypeError) and "ndarray" in str(error)
    if isinstance(error, AttributeError) and isinstance(error.obj, np.ndarray):
        takes_tensors = hasattr(torch.Tensor, error.name or "")
    if takes_tensors:
        return "; it is given ndarrays: torch.from_numpy(a) makes a tensor"
    return ""


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
        raise ChunkError(f"{where} failed: {describe_error(error)}. {advice}") from _strip_internal_frames(error)


def _strip_internal_frames(error: BaseException | None) -> BaseException | None:
    """Return an error without the frames that lead to the user's function or model; unchanged if it is daskinfer's own."""
    if error is None:
        return None
    user_frames = error.__traceback__
    while user_frames is not None and user_frames.tb_frame.f_code.co_filename.startswith(PACKAGE_PREFIX):
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
    failure = f"rows {begin}:{end} on {device} failed: {describe_error(error)}"
    return f"{failure}. {advice}, or skip failing rows with on_error='skip' (--on-error)."
