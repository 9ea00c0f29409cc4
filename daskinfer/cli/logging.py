"""What the command says on stderr: lines of text for people, or one JSON object a line for programs.

All of it goes through Python's log: the package's own records, progress where no terminal shows a bar, and the error that
ends the command. With ``--log-format json`` Python's warnings and those of Dask in this process come as JSON too; what the
processes of workers or a network's own code write to stderr is passed on as it is.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import import_module

from daskinfer.errors import DaskInferError

logger = logging.getLogger("daskinfer")
progress_logger = logging.getLogger("daskinfer.progress")

_DASK_LOGGERS = ("bokeh", "distributed", "tornado")  # whose loggers have handlers of their own once Dask is imported


class _StderrHandler(logging.Handler):
    """Writes to what ``sys.stderr`` is at each line: a bar takes its place for as long as it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is not None:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()


class _TextFormatter(logging.Formatter):
    """``daskinfer: error: …``, under the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        mark = "error: " if record.levelno >= logging.ERROR else ""
        return f"{_format_traceback(record)}{record.name}: {mark}{record.getMessage()}"


class _JsonFormatter(logging.Formatter):
    """One object: when, how grave, who, what, and the fields that the record carries."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if raised := _format_traceback(record):
            told["traceback"] = raised
        return json.dumps(told, default=str)


_FORMATS: Mapping[str, type[logging.Formatter]] = {"text": _TextFormatter, "json": _JsonFormatter}


def _format_traceback(record: logging.LogRecord) -> str:
    return "".join(traceback.format_exception(record.exc_info[1])) if record.exc_info else ""


def configure_logging(log_format: str = "text", *, debug: bool | None = None) -> None:
    """Show our own log; the root logger stays as it is, or Dask's lines would come too. ``debug`` None: as before."""
    handler = _StderrHandler()
    handler.setFormatter(_FORMATS[log_format]())
    logger.handlers[:] = [handler]
    if debug is not None:
        logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    # At the level of the others progress would not be heard; whether there is any is not the log's to say.
    progress_logger.setLevel(min(logging.INFO, logger.level))
    if log_format == "json":
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").handlers[:] = [handler]


def is_json_format() -> bool:
    """Whether lines are JSON."""
    return any(isinstance(handler.formatter, _JsonFormatter) for handler in logger.handlers)


def adopt_dask_loggers() -> None:
    """Where lines are JSON, have those of Dask be so too; it sets its log up when it is imported."""
    if not is_json_format():
        return
    import_module("distributed")
    for name, other in list(logging.root.manager.loggerDict.items()):
        if isinstance(other, logging.Logger) and other.handlers and name.partition(".")[0] in _DASK_LOGGERS:
            other.handlers[:] = logger.handlers
            # What Dask tells of its own comings and goings would bury what is said of the run.
            other.setLevel(max(other.level, logging.WARNING))


def log_error(error: BaseException, exit_code: int, *, message: str = "", with_traceback: bool = False) -> None:
    """Say what ends the command; its notes say how to go on. ``said`` stands in for the error's own words."""
    interrupted = isinstance(error, KeyboardInterrupt)
    known = interrupted or message or isinstance(error, DaskInferError)
    message = message or str(error) or "interrupted"
    message = " ".join([message if known else f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
    logger.log(
        logging.WARNING if interrupted else logging.ERROR,
        "%s",
        message,
        exc_info=error if with_traceback else None,
        extra={"fields": {"type": type(error).__name__, "exit_code": exit_code}},
    )


def log_missing_rows(n_rows: int, exit_code: int, output: str, *, sharded: bool) -> None:
    """Say that the command is done, but for some rows of an output."""
    listed = f"{output}.daskinfer/failed_rows.json lists{' when all shards are done' if sharded else ''}"
    anew = f"removing {output} and {output}.daskinfer while no shard runs" if sharded else "--overwrite"
    logger.warning(
        "%s rows of %s have no answer, as %s; once they are mended, %s starts over",
        f"{n_rows:,}",
        output,
        listed,
        anew,
        extra={"fields": {"n_failed": n_rows, "output": output, "exit_code": exit_code}},
    )
