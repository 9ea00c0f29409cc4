"""What the command writes to stderr: lines of text for people, or one JSON object per line for programs.

All of it goes through Python's logging: the package's own records, progress unless a terminal shows a bar, and the error
that ends the command. With ``--log-format json`` Python's warnings and those of Dask in this process are JSON too; what
worker processes or a model's own code write to stderr is passed on unchanged.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import import_module

from daskinfer.cli.messages import describe_error

logger = logging.getLogger("daskinfer")
progress_logger = logging.getLogger("daskinfer.progress")

_DASK_LOGGERS = ("bokeh", "distributed", "tornado")  # their loggers get handlers once Dask is imported


class _StderrHandler(logging.Handler):
    """Writes each line to the current ``sys.stderr``: a progress bar replaces it while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is not None:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()


class _TextFormatter(logging.Formatter):
    """``2026-12-01 00:30:12 daskinfer: error: …``, in local time, below the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = "error: " if record.levelno >= logging.ERROR else ""
        time = f"{datetime.fromtimestamp(record.created):%Y-%m-%d %H:%M:%S}"
        return f"{_format_traceback(record)}{time} {record.name}: {prefix}{record.getMessage()}"


class _JsonFormatter(logging.Formatter):
    """One object: time, level, logger, message, and the record's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if lines := _format_traceback(record):
            entry["traceback"] = lines
        return json.dumps(entry, default=str)


_FORMATS: Mapping[str, type[logging.Formatter]] = {"text": _TextFormatter, "json": _JsonFormatter}


def _format_traceback(record: logging.LogRecord) -> str:
    return "".join(traceback.format_exception(record.exc_info[1])) if record.exc_info else ""


def configure_logging(log_format: str = "text") -> None:
    """Show daskinfer's log; leave the root logger alone, or Dask's lines would come too."""
    handler = _StderrHandler()
    handler.setFormatter(_FORMATS[log_format]())
    logger.handlers[:] = [handler]
    if log_format == "json":
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").handlers[:] = [handler]


def reset_verbosity() -> None:
    """Show warnings and errors, and progress."""
    _set_level(logging.WARNING)


def raise_verbosity(level: int) -> None:
    """Show lines of this level too; one that is shown already stays."""
    _set_level(min(level, logger.level))


def _set_level(level: int) -> None:
    logger.setLevel(level)
    # At the package's level, WARNING, progress would be silent; ``--no-progress`` decides whether there is any.
    progress_logger.setLevel(min(logging.INFO, level))


def is_debugging() -> bool:
    """Return whether debug lines are shown, and with them tracebacks."""
    return logger.isEnabledFor(logging.DEBUG)


def is_json_format() -> bool:
    """Return whether lines are JSON."""
    return any(isinstance(handler.formatter, _JsonFormatter) for handler in logger.handlers)


def adopt_dask_loggers() -> None:
    """Make Dask's lines JSON if daskinfer's are; Dask configures its logging when it is imported, so import it first."""
    if not is_json_format():
        return
    import_module("distributed")
    for name, other in list(logging.root.manager.loggerDict.items()):
        if isinstance(other, logging.Logger) and other.handlers and name.partition(".")[0] in _DASK_LOGGERS:
            other.handlers[:] = logger.handlers
            # Dask's lines about starting and closing its processes would bury those about the run.
            other.setLevel(max(other.level, logging.WARNING))


def log_error(error: BaseException, exit_code: int, *, with_traceback: bool = False) -> None:
    """Log why the command ends, with the error's notes on how to continue."""
    logger.log(
        logging.WARNING if isinstance(error, KeyboardInterrupt) else logging.ERROR,
        "%s",
        describe_error(error),
        exc_info=error if with_traceback else None,
        extra={"fields": {"type": type(error).__name__, "exit_code": exit_code}},
    )


def log_missing_rows(n_rows: int, exit_code: int, output: str, *, sharded: bool) -> None:
    """Log that the command is done, except for some rows of an output."""
    listed = f"{'once all shards are done ' if sharded else ''}{output}.daskinfer/failed_rows.json lists them"
    restart = f"remove {output} and {output}.daskinfer while no shard runs" if sharded else "use --overwrite"
    logger.warning(
        "%s rows of %s have no output; %s. After fixing the cause, %s to start over",
        f"{n_rows:,}",
        output,
        listed,
        restart,
        extra={"fields": {"n_failed": n_rows, "output": output, "exit_code": exit_code}},
    )
