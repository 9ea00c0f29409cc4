"""Run a Dask worker and its nanny in processes of their own that exit with the client.

Dask's own clusters start workers from the client by multiprocessing. That re-imports the user's script, which then needs a
``__main__`` guard (without one: 194 log lines and a hang, measured), and it leaves the nanny's environment in the client.
So each worker gets a plain Python process that runs its Nanny and reads its module path and options from standard input.
Workers of GPUs start the same way: the user's script is never imported again.

The pipe stays open while the client lives. When the client exits for any reason, the pipe closes, and nanny and worker
exit too. Ctrl-C does not reach them, because they are in a process group of their own: the client decides when they stop.
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

# An idle worker exits within 1 s, most of it torch's clean-up (measured); one that computes a chunk gets this long.
GRACE_SECONDS = 3.0

# Sets the client's module path before any import: "-m" would put the working directory in front, and a random.py there
# would replace Python's, even if the client's own path does not contain that directory.
_BOOTSTRAP_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.stdin.buffer.readline() or 'null') or sys.path; "
    "from daskinfer.cluster.nanny import main; main()"
)
_LENGTH_NBYTES = 8
_POLL_SECONDS = 0.005
_CURRENT_CLIENT_KEY = "scheduler"  # set by a current Client; workers of another cluster must not inherit it


class NannyProcess(ProcessInterface):  # type: ignore[misc]  # distributed ships no annotations
    """An entry of a cluster's ``worker_spec``: the options of a Nanny, and the process that runs it.

    Parameters
    ----------
    scheduler
        Address of the scheduler.
    start_timeout
        Seconds within which the worker must start.
    environment
        Environment variables of the process, in addition to those of the client; None unsets a variable.
    options
        All other keywords are passed to the Nanny.
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
        """Whether the process runs; its worker may be restarting."""
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
        if self._aborted:  # while the process was being created
            self.process.stdin.close()
        try:
            await asyncio.wait_for(self._wait_until_ready(), self.start_timeout)
        except TimeoutError:
            await self.close()
            raise RuntimeError(f"the worker {self.name} did not start within {self.start_timeout:g} s") from None
        except BaseException as error:
            await self.close()
            if not self._aborted or not isinstance(error, Exception):
                raise

    def abort(self) -> None:
        """Ask the nanny to exit even if it is still starting, without an error. Call this on the cluster's event loop."""
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
        reply: dict[str, str] = json.loads(line) if line else {"error": "its process exited; see its log on stderr"}
        if "error" in reply:
            raise RuntimeError(f"the worker {self.name} did not start: {reply['error']}")

    async def close(self) -> None:
        """Close the nanny's standard input to make it exit; kill what still runs after the grace period."""
        if self.process is not None and self.is_running:
            processes = self.list_processes()
            assert self.process.stdin is not None
            self.process.stdin.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), GRACE_SECONDS)
            kill_processes(processes)
            await self.process.wait()
        await super().close()

    def list_processes(self) -> list[psutil.Process]:
        """List the nanny's process and all its descendants."""
        if self.process is None or not self.is_running:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            nanny = psutil.Process(self.process.pid)
            return [nanny, *nanny.children(recursive=True)]
        return []


def kill_processes(processes: Sequence[psutil.Process]) -> None:
    """Kill these processes and their descendants, except for Python's resource trackers.

    The trackers remove the semaphores of killed processes and exit by themselves. Each process is suspended before its
    children are listed, and killed after them: none can start unnoticed, or miss its semaphores and report that on stderr.
    """
    suspended: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if not _is_resource_tracker(process):
                process.suspend()
                suspended += [process, *process.children(recursive=True)]
    for process in reversed(suspended):
        with contextlib.suppress(psutil.NoSuchProcess):
            if not _is_resource_tracker(process):
                process.kill()


def _is_resource_tracker(process: psutil.Process) -> bool:
    return any("resource_tracker" in argument for argument in process.cmdline())


async def _serve(scheduler: str, options: dict[str, Any], reply_fd: int) -> None:
    """Run the nanny until the client closes the pipe or the nanny finishes."""
    loop = asyncio.get_running_loop()
    client_exited = loop.create_future()

    def signal_client_exit() -> None:
        # The client sends nothing more, so a readable pipe means that its other end is closed.
        loop.remove_reader(sys.stdin.fileno())
        client_exited.set_result(None)

    loop.add_reader(sys.stdin.fileno(), signal_client_exit)
    try:
        nanny = Nanny(scheduler, **options)
    except Exception as error:
        _send_reply(reply_fd, error=f"{type(error).__name__}: {error}")
        return
    started = asyncio.ensure_future(_await_nanny(nanny))
    await asyncio.wait([started, client_exited], return_when=asyncio.FIRST_COMPLETED)
    if not started.done():
        started.cancel()
        await asyncio.wait([started], timeout=GRACE_SECONDS)
        await _wait_for_spawn(nanny)
        return  # a nanny cannot close while it starts: main() kills its processes
    if failure := started.exception():
        while failure.__cause__ is not None:  # Dask's error only says that the nanny failed to start
            failure = failure.__cause__
        _send_reply(reply_fd, error=f"{type(failure).__name__}: {failure}")
        return
    _send_reply(reply_fd, ready=nanny.worker_address)
    finished = asyncio.ensure_future(nanny.finished())
    await asyncio.wait([finished, client_exited], return_when=asyncio.FIRST_COMPLETED)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(nanny.close(timeout=GRACE_SECONDS / 2), GRACE_SECONDS)


async def _await_nanny(nanny: Nanny) -> None:
    await nanny


async def _wait_for_spawn(nanny: Nanny) -> None:
    """Wait until a worker process that is just being started exists, so that it can be killed.

    If it started later, it would miss semaphores that are removed with this process, and report that on stderr.
    """
    deadline = time.monotonic() + GRACE_SECONDS
    while nanny.process is not None and nanny.process.status == Status.starting and nanny.pid is None:
        if time.monotonic() > deadline:
            return
        await asyncio.sleep(_POLL_SECONDS)


def _send_reply(reply_fd: int, **fields: str) -> None:
    os.write(reply_fd, json.dumps(fields).encode() + b"\n")


def main() -> None:
    """Read the options from standard input and serve; redirect what the worker prints to standard error."""
    # Ctrl-C may still be sent to every process, but the client decides when workers stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reply_fd = os.dup(1)
    os.dup2(2, 1)
    size = int.from_bytes(sys.stdin.buffer.read(_LENGTH_NBYTES), "little")
    content = sys.stdin.buffer.read(size)
    if not size or len(content) < size:
        return  # the client has already exited
    message = cloudpickle.loads(content)
    dask.config.update(dask.config.config, message["config"])
    logging.getLogger("distributed").setLevel(logging.ERROR)
    with asyncio.Runner() as runner:
        runner.run(_serve(message["scheduler"], message["options"], reply_fd))
        # Before the runner waits for tasks that wait for these processes.
        kill_processes(psutil.Process().children(recursive=True))
