"""An external Dask cluster, started by the commands ``dask scheduler`` and ``dask worker``."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from distributed import Client

_HIDE_PACKAGE = """
import sys

class HidingFinder:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *args):
        return None if name.partition(".")[0] == {!r} else self.finder.find_spec(name, *args)

sys.meta_path[:] = map(HidingFinder, sys.meta_path)
"""


@contextlib.contextmanager
def _run_command(log: Path, *arguments: str, lacks: str = "") -> Iterator[None]:
    """Run a ``dask`` command within the context, in a Python that cannot import the package ``lacks``."""
    environment = dict(os.environ)
    if lacks:
        folder = log.parent / f"without-{lacks}"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(_HIDE_PACKAGE.format(lacks))
        environment["PYTHONPATH"] = str(folder)
    with (
        log.open("wb") as out,
        subprocess.Popen([sys.executable, "-m", "dask", *arguments], stderr=out, env=environment) as process,
    ):
        try:
            yield
        finally:
            process.terminate()


@contextlib.contextmanager
def external_cluster(
    folder: Path, *arguments: str, lacks: str = "", worker_lacks: str = ""
) -> Iterator[tuple[Client, Path]]:
    """Start a scheduler and a worker, each without a package; yield a client and the scheduler's log."""
    file, log = folder / "scheduler.json", folder / "scheduler.log"
    scheduler = ["scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
    worker = ["worker", "--nthreads", "2", "--host", "127.0.0.1", "--no-dashboard", "--local-directory", str(folder)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_run_command(log, *scheduler, "--scheduler-file", str(file), *arguments, lacks=lacks))
        stack.enter_context(_run_command(folder / "worker.log", *worker, "--scheduler-file", str(file), lacks=worker_lacks))
        client = stack.enter_context(Client(scheduler_file=str(file), set_as_default=False, timeout=60))
        client.wait_for_workers(1, timeout=60)
        yield client, log
