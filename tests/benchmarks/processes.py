"""Runs a function of this package, or of a module named in full, in a fresh process; brings its result back as JSON.

python -m tests.benchmarks.processes module:function '{"argument": 1}'
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 900.0  # of one process; whoever takes longer hangs
SPOKEN = ("daskinfer", "dask", "distributed", "torch", "numpy", "zarr", "ray", "daft", "pyspark", "pyarrow")
GRACE_SECONDS = 10.0  # for helpers of an ended process, such as those that remove semaphores
_MARK = "benchmark result: "  # tools write to stdout too


class Unavailable(Exception):
    """What was asked for is not there or cannot run on this machine: no failure, and no pass."""


class Failed(Exception):
    """A process ended without a result."""


def run_fresh(
    function: str,
    arguments: dict[str, Any],
    *,
    python: str = sys.executable,
    seconds: float = LIMIT_SECONDS,
    meanwhile: Callable[[subprocess.Popen[bytes]], None] = lambda process: None,
) -> dict[str, Any]:
    """Call ``"module:function"`` in a fresh process; ``meanwhile`` is called with that process while it runs."""
    command = [python, "-m", "tests.benchmarks.processes", function, json.dumps(arguments)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=_environment(folder),
                start_new_session=True,
            )
            _await(process, seconds, meanwhile)
        return _result(out.read_text(errors="replace"), err.read_text(errors="replace"), process.returncode)


def _await(process: subprocess.Popen[bytes], seconds: float, meanwhile: Callable[[subprocess.Popen[bytes]], None]) -> None:
    try:
        meanwhile(process)
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise Failed(f"no end within {seconds:g} s") from None
    finally:
        _end_session(process)


def _environment(folder: str) -> dict[str, str]:
    """This process's, with the checkout on the path of all that it starts, and their temporary files in a folder."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TMPDIR": folder, "RAY_TMPDIR": folder}


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """Give what is left of the process's own session time to clean up, then kill it."""
    deadline = time.monotonic() + (GRACE_SECONDS if process.poll() is not None else 0.0)
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _result(out: str, err: str, code: int) -> dict[str, Any]:
    marked = [line for line in out.splitlines() if line.startswith(_MARK)]
    if not marked:
        # Python's tracker of semaphores speaks after the error, of processes that were killed.
        lines = [line for line in err.splitlines() if line.strip() and "resource_tracker" not in line]
        last = lines[-1] if lines else "no output"
        raise Failed(f"exit code {code}: {last.strip()}")
    result: dict[str, Any] = json.loads(marked[-1].removeprefix(_MARK))
    if "unavailable" in result:
        raise Unavailable(result["unavailable"])
    return result


def versions() -> dict[str, str]:
    """Versions of what takes part and is installed for this interpreter."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in SPOKEN:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _main(function: str, arguments: str) -> None:
    module, _, name = function.partition(":")
    called = importlib.import_module(module if "." in module else f"tests.benchmarks.{module}")
    from tests.benchmarks.processes import Unavailable  # this file is __main__ here; others import it by its name

    try:
        result = getattr(called, name)(**json.loads(arguments))
    except Unavailable as error:
        result = {"unavailable": str(error)}
    print(f"\n{_MARK}{json.dumps(result)}", flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
