"""A Dask worker and its nanny in a process of their own, ended with the client.

Dask's own clusters start workers by multiprocessing from the client. That re-imports the user's script, which then needs a
``__main__`` guard (without one: 194 log lines and a hang), and it leaves the nanny's environment in the client. So each
worker gets a plain Python that runs its Nanny (``python -m daskinfer.nanny_process``), whose options come over its standard
input, and GPUs take the same way: no script of the user is ever imported again (this replaces the exit that decision 9
asked for where there are GPUs).

The pipe stays open as long as the client lives. When the client ends, however it ends, the pipe does too, and nanny and
worker exit with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from typing import Any

import cloudpickle
import dask
import psutil
from distributed import Nanny
from distributed.deploy.spec import ProcessInterface

_READY = "daskinfer-worker-ready"


class NannyProcess(ProcessInterface):  # type: ignore[misc]  # distributed ships no annotations
    """What a cluster's ``worker_spec`` holds: the options of a Nanny, and the process that runs it.

    Parameters
    ----------
    scheduler
        Address of the scheduler.
    start_timeout
        Seconds until the worker has to be there.
    environment
        Variables that the process starts with, beside the client's own; None unsets one.
    options
        Everything else is the Nanny's.
    """

    def __init__(
        self,
        scheduler: str,
        *,
        start_timeout: float = 60.0,
        environment: dict[str, str | None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(scheduler=scheduler, name=options.get("name"))
        self.scheduler = scheduler
        self.name = options.get("name")
        self.start_timeout = start_timeout
        self.environment = environment or {}
        self.options = options
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process and wait until its worker has joined the scheduler."""
        environment = {**os.environ, **self.environment}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "daskinfer.nanny_process",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: value for name, value in environment.items() if value is not None},
        )
        assert self.process.stdin is not None
        message = cloudpickle.dumps(
            {"scheduler": self.scheduler, "options": self.options, "path": sys.path, "config": dask.config.config}
        )
        self.process.stdin.write(len(message).to_bytes(8, "little") + message)
        try:
            await asyncio.wait_for(self._ready(), self.start_timeout)
        except BaseException:
            await self.close()
            raise
        await super().start()

    async def _ready(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        line = await self.process.stdout.readline()
        answer: dict[str, str] = json.loads(line) if line else {"error": "its process ended; its log is on stderr"}
        if "error" in answer:
            raise RuntimeError(f"the worker {self.name} did not start: {answer['error']}")

    async def close(self) -> None:
        """Ask the nanny to end by closing its input; kill what is left of it after its own grace."""
        process, self.process = self.process, None
        if process is not None and process.returncode is None:
            family = _family(process.pid)
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), GRACE_SECONDS)
            _kill(family)
            await process.wait()
        await super().close()

    def pids(self) -> list[int]:
        """Process ids of the nanny and everything that it started."""
        return [p.pid for p in _family(self.process.pid)] if self.process is not None else []


# A worker that is not in the middle of a chunk ends within 0.3 s (measured); one that is may take this long.
GRACE_SECONDS = 3.0


def _family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


async def _serve(scheduler: str, options: dict[str, Any], answers: int) -> None:
    """Run the nanny until the client closes the pipe or the nanny ends."""
    loop = asyncio.get_running_loop()
    pipe_closed = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), lambda: None if os.read(sys.stdin.fileno(), 1) else pipe_closed.set())
    try:
        nanny = await Nanny(scheduler, **options)
    except Exception as error:
        os.write(answers, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        return
    os.write(answers, json.dumps({"ready": nanny.worker_address}).encode() + b"\n")
    ended = asyncio.ensure_future(nanny.finished())
    closed = asyncio.ensure_future(pipe_closed.wait())
    await asyncio.wait([ended, closed], return_when=asyncio.FIRST_COMPLETED)
    loop.remove_reader(sys.stdin.fileno())
    await nanny.close(timeout=GRACE_SECONDS / 2)


def main() -> None:
    """Read the options from standard input and serve; whatever the worker prints goes to standard error."""
    # Ctrl-C reaches the whole process group: the client decides when workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.dup(1)
    os.dup2(2, 1)
    size = int.from_bytes(sys.stdin.buffer.read(8), "little")
    message = cloudpickle.loads(sys.stdin.buffer.read(size))
    sys.path[:] = message["path"]
    dask.config.update(dask.config.config, message["config"])
    logging.getLogger("distributed").setLevel(logging.ERROR)
    asyncio.run(_serve(message["scheduler"], message["options"], answers))


if __name__ == "__main__":
    main()
