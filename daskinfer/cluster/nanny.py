"""A Dask worker and its nanny in a process of their own, ended with the client.

Dask's own clusters start workers by multiprocessing from the client. That re-imports the user's script, which then needs a
``__main__`` guard (without one: 194 log lines and a hang), and it leaves the nanny's environment in the client. So each
worker gets a plain Python that runs its Nanny, whose module path and options come over its standard input, and GPUs take
the same way: no script of the user is ever imported again (this replaces the exit that decision 9 asked for where there
are GPUs).

The pipe stays open as long as the client lives. When the client ends, however it ends, the pipe does too, and nanny and
worker exit with it. Ctrl-C does not reach them: they are a process group of their own, and the client decides.
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
import time
from collections.abc import Sequence
from typing import Any

import cloudpickle
import dask
import psutil
from distributed import Nanny
from distributed.core import Status
from distributed.deploy.spec import ProcessInterface

# A worker that is not in the middle of a chunk ends within 1 s, most of it torch's clean-up (measured); one that is may
# take this long.
GRACE_SECONDS = 3.0

# The client's module path comes first of all: started by "-m", a random.py in the working directory would be imported in
# place of Python's, although the client's own path does not hold that directory.
_BOOTSTRAP_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.stdin.buffer.readline() or 'null') or sys.path; "
    "from daskinfer.cluster.nanny import main; main()"
)
_LENGTH_NBYTES = 8
_POLL_SECONDS = 0.005
_CURRENT_CLIENT_KEY = "scheduler"  # what a current Client sets in the configuration: not for the workers of another cluster


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
        self._aborted = False

    @property
    def is_running(self) -> bool:
        """Whether the process is there; its worker may be on its way back."""
        return self.process is not None and self.process.returncode is None

    async def start(self) -> None:
        """Start the process and wait until its worker has joined the scheduler."""
        if not self._aborted:
            await self._launch_process()
        await super().start()

    async def _launch_process(self) -> None:
        message = self._encode_message()
        environment = {**os.environ, **self.environment}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-c",
            _BOOTSTRAP_CODE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: value for name, value in environment.items() if value is not None},
            process_group=0,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(message)
        if self._aborted:  # while the process was made
            self.process.stdin.close()
        try:
            await asyncio.wait_for(self._wait_until_ready(), self.start_timeout)
        except TimeoutError:
            await self.close()
            raise RuntimeError(f"the worker {self.name} was not there within {self.start_timeout:g} s") from None
        except BaseException as error:
            await self.close()
            if not self._aborted or not isinstance(error, Exception):
                raise

    def abort(self) -> None:
        """Ask the nanny to end though it may be starting still: that it does is no failure. For the cluster's loop."""
        self._aborted = True
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()

    def _encode_message(self) -> bytes:
        config = {key: value for key, value in dask.config.config.items() if key != _CURRENT_CLIENT_KEY}
        content = cloudpickle.dumps({"scheduler": self.scheduler, "options": self.options, "config": config})
        path = json.dumps([str(entry) for entry in sys.path]).encode()
        return path + b"\n" + len(content).to_bytes(_LENGTH_NBYTES, "little") + bytes(content)

    async def _wait_until_ready(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        line = await self.process.stdout.readline()
        answer: dict[str, str] = json.loads(line) if line else {"error": "its process ended; its log is on stderr"}
        if "error" in answer:
            raise RuntimeError(f"the worker {self.name} did not start: {answer['error']}")

    async def close(self) -> None:
        """Ask the nanny to end by closing its input; kill what is left of it after its own grace."""
        if self.process is not None and self.is_running:
            family = self.list_processes()
            assert self.process.stdin is not None
            self.process.stdin.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), GRACE_SECONDS)
            kill_processes(family)
            await self.process.wait()
        await super().close()

    def list_processes(self) -> list[psutil.Process]:
        """The nanny's process and everything that it started."""
        if self.process is None or not self.is_running:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            nanny = psutil.Process(self.process.pid)
            return [nanny, *nanny.children(recursive=True)]
        return []


def kill_processes(processes: Sequence[psutil.Process]) -> None:
    """Kill those that are still there and all that they have started, but let Python's trackers of semaphores be.

    Those remove the semaphores of the killed and end by themselves. Each process is stopped before its children are
    looked for and dies after them: none is started unseen, or finds its semaphores gone and says so on stderr.
    """
    doomed: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if not _is_resource_tracker(process):
                process.suspend()
                doomed += [process, *process.children(recursive=True)]
    for process in reversed(doomed):
        with contextlib.suppress(psutil.NoSuchProcess):
            if not _is_resource_tracker(process):
                process.kill()


def _is_resource_tracker(process: psutil.Process) -> bool:
    return any("resource_tracker" in word for word in process.cmdline())


async def _serve(scheduler: str, options: dict[str, Any], reply_fd: int) -> None:
    """Run the nanny until the client closes the pipe or the nanny ends."""
    loop = asyncio.get_running_loop()
    closed = loop.create_future()

    def end_of_client() -> None:
        # Nothing more comes over the pipe: that it can be read means that its other end is gone.
        loop.remove_reader(sys.stdin.fileno())
        closed.set_result(None)

    loop.add_reader(sys.stdin.fileno(), end_of_client)
    try:
        nanny = Nanny(scheduler, **options)
    except Exception as error:
        _send_reply(reply_fd, error=f"{type(error).__name__}: {error}")
        return
    started = asyncio.ensure_future(_await_nanny(nanny))
    await asyncio.wait([started, closed], return_when=asyncio.FIRST_COMPLETED)
    if not started.done():
        started.cancel()
        await asyncio.wait([started], timeout=GRACE_SECONDS)
        await _wait_for_spawn(nanny)
        return  # a nanny cannot be closed while it starts: main() kills what it started
    if failure := started.exception():
        while failure.__cause__ is not None:  # Dask's own says no more than that the nanny failed to start
            failure = failure.__cause__
        _send_reply(reply_fd, error=f"{type(failure).__name__}: {failure}")
        return
    _send_reply(reply_fd, ready=nanny.worker_address)
    ended = asyncio.ensure_future(nanny.finished())
    await asyncio.wait([ended, closed], return_when=asyncio.FIRST_COMPLETED)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(nanny.close(timeout=GRACE_SECONDS / 2), GRACE_SECONDS)


async def _await_nanny(nanny: Nanny) -> None:
    await nanny


async def _wait_for_spawn(nanny: Nanny) -> None:
    """Let a worker's process that a thread is just starting be there, so that it can be killed.

    Started any later, it would look for semaphores that have gone with this process, and say so on stderr.
    """
    deadline = time.monotonic() + GRACE_SECONDS
    while nanny.process is not None and nanny.process.status == Status.starting and nanny.pid is None:
        if time.monotonic() > deadline:
            return
        await asyncio.sleep(_POLL_SECONDS)


def _send_reply(reply_fd: int, **fields: str) -> None:
    os.write(reply_fd, json.dumps(fields).encode() + b"\n")


def main() -> None:
    """Read the options from standard input and serve; whatever the worker prints goes to standard error."""
    # Somebody may still send it to every process: the client decides when workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.dup(1)
    os.dup2(2, 1)
    size = int.from_bytes(sys.stdin.buffer.read(_LENGTH_NBYTES), "little")
    content = sys.stdin.buffer.read(size)
    if not size or len(content) < size:
        return  # the client has ended already
    message = cloudpickle.loads(content)
    dask.config.update(dask.config.config, message["config"])
    logging.getLogger("distributed").setLevel(logging.ERROR)
    with asyncio.Runner() as runner:
        runner.run(_serve(message["scheduler"], message["options"], answers))
        # Before the runner waits for tasks that wait for these.
        kill_processes(psutil.Process().children(recursive=True))
