"""A Dask cluster of other people: ``dask scheduler`` and ``dask worker``, started as they start them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from distributed import Client

_WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *more):
        return None if name.partition(".")[0] == {!r} else self.finder.find_spec(name, *more)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


@contextlib.contextmanager
def _command(log: Path, *words: str, lacks: str = "") -> Iterator[None]:
    """A ``dask`` command that runs meanwhile, in a Python where a package is not installed."""
    environment = dict(os.environ)
    if lacks:
        folder = log.parent / f"without-{lacks}"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(_WITHOUT.format(lacks))
        environment["PYTHONPATH"] = str(folder)
    with (
        log.open("wb") as out,
        subprocess.Popen([sys.executable, "-m", "dask", *words], stderr=out, env=environment) as process,
    ):
        try:
            yield
        finally:
            process.terminate()


@contextlib.contextmanager
def others(folder: Path, *words: str, lacks: str = "", worker_lacks: str = "") -> Iterator[tuple[Client, Path]]:
    """A client of a scheduler and a worker that others started, each without a package, and the scheduler's log."""
    file, log = folder / "scheduler.json", folder / "scheduler.log"
    scheduler = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
    worker = ["worker", "--nthreads", "2", "--host", "127.0.0.1", "--no-dashboard", "--local-directory", str(folder)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_command(log, *scheduler, "--scheduler-file", str(file), *words, lacks=lacks))
        stack.enter_context(_command(folder / "worker.log", *worker, "--scheduler-file", str(file), lacks=worker_lacks))
        client = stack.enter_context(Client(scheduler_file=str(file), set_as_default=False, timeout=60))
        client.wait_for_workers(1, timeout=60)
        yield client, log
