"""What a careful person writes without any tool: loops, and two processes over shared memory."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import torch

from tests.benchmarks.works import WORKS, Work

Call = Callable[[], np.ndarray]

_N_WORKERS = 2
_ONE_BY_ONE_PART = 20  # one example at a time is timed on 1/20 of the rows
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


@contextlib.contextmanager
def one_thread(work: Work, x: np.ndarray) -> Iterator[Call]:
    """The plain loop over batches with one torch thread."""
    torch.set_num_threads(1)
    with all_threads(work, x) as call:
        yield call


@contextlib.contextmanager
def all_threads(work: Work, x: np.ndarray) -> Iterator[Call]:
    """The plain loop over batches with torch's default of threads."""
    net = work.net()
    yield lambda: _loop(net, x, work.batch_size)


@contextlib.contextmanager
def one_by_one(work: Work, x: np.ndarray) -> Iterator[Call]:
    """One example at a time, for a part of the rows."""
    net = work.net()
    part = x[: len(x) // _ONE_BY_ONE_PART]
    yield lambda: _loop(net, part, 1)


def _loop(net: torch.nn.Module, x: np.ndarray, batch_size: int) -> np.ndarray:
    with torch.inference_mode():
        answers = [net(torch.from_numpy(x[i : i + batch_size])) for i in range(0, len(x), batch_size)]
        return torch.cat(answers).numpy()


@contextlib.contextmanager
def two_processes(work: Work, x: np.ndarray) -> Iterator[Call]:
    """Two processes over shared memory, as people write it."""
    with _started(work, tuned=False) as halves:
        yield lambda: halves(x)


@contextlib.contextmanager
def two_processes_tuned(work: Work, x: np.ndarray) -> Iterator[Call]:
    """Two processes over shared memory, whose allocator keeps freed memory."""
    with _started(work, tuned=True) as halves:
        yield lambda: halves(x)


@contextlib.contextmanager
def _started(work: Work, *, tuned: bool) -> Iterator[_Halves]:
    """Start the workers and wait until each has its network."""
    with contextlib.ExitStack() as ending:
        memory_in = ending.enter_context(_shared(work.n_rows * work.row_nbytes))
        memory_out = ending.enter_context(_shared(work.n_rows * 4 * int(np.prod(work.answer_shape))))
        names = memory_in.name, memory_out.name
        pipes = [ending.enter_context(_worker(work, names, index, tuned=tuned)) for index in range(_N_WORKERS)]
        halves = _Halves(pipes, *_views(work, memory_in, memory_out))
        halves.ask_all("ready?")
        yield halves
        halves.let_go()


class _Halves:
    """Has each worker compute its half; both copies are the caller's to wait for."""

    def __init__(self, pipes: list[Connection], shared_in: np.ndarray, shared_out: np.ndarray) -> None:
        self.pipes, self.shared_in, self.shared_out = pipes, shared_in, shared_out

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.shared_in[:] = x
        self.ask_all("compute")
        return self.shared_out.copy()

    def ask_all(self, word: str) -> None:
        """Send a word to every worker and wait until all have answered."""
        for pipe in self.pipes:
            pipe.send(word)
        for pipe in self.pipes:
            pipe.recv()

    def let_go(self) -> None:
        """Shared memory cannot be closed while arrays look into it."""
        del self.shared_in, self.shared_out


@contextlib.contextmanager
def _shared(nbytes: int) -> Iterator[SharedMemory]:
    memory = SharedMemory(create=True, size=nbytes)
    try:
        yield memory
    finally:
        memory.unlink()
        with contextlib.suppress(BufferError):  # after an error a traceback may still hold the arrays
            memory.close()


@contextlib.contextmanager
def _worker(work: Work, names: tuple[str, str], index: int, *, tuned: bool) -> Iterator[Connection]:
    """One worker process, by spawn, since torch's threads do not survive a fork."""
    context = multiprocessing.get_context("spawn")
    pipe, its_pipe = context.Pipe()
    arguments = (its_pipe, work.name, work.n_rows, names, index, tuned)
    process = context.Process(target=_serve, args=arguments, daemon=True)
    process.start()
    its_pipe.close()
    try:
        yield pipe
    finally:
        pipe.close()
        process.join()


def _serve(pipe: Connection, name: str, n_rows: int, names: tuple[str, str], index: int, tuned: bool) -> None:
    """Compute one half each time the parent asks, until it hangs up."""
    if tuned:
        keep_freed_memory()
    torch.set_num_threads(1)
    work = WORKS[name].scaled(n_rows / WORKS[name].n_rows)
    net = work.net()
    memory_in, memory_out = (SharedMemory(name=n) for n in names)
    shared_in, shared_out = _views(work, memory_in, memory_out)
    start, stop = (n_rows * i // _N_WORKERS for i in (index, index + 1))
    with contextlib.suppress(EOFError):
        while word := pipe.recv():
            if word == "compute":
                _fill(net, shared_in[start:stop], shared_out[start:stop], work.batch_size)
            pipe.send(word)
    del shared_in, shared_out


def _fill(net: torch.nn.Module, x: np.ndarray, y: np.ndarray, batch_size: int) -> None:
    with torch.inference_mode():
        for i in range(0, len(x), batch_size):
            y[i : i + batch_size] = net(torch.from_numpy(x[i : i + batch_size])).numpy()


def _views(work: Work, memory_in: SharedMemory, memory_out: SharedMemory) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.ndarray((work.n_rows, *work.row_shape), np.float32, memory_in.buf),
        np.ndarray((work.n_rows, *work.answer_shape), np.float32, memory_out.buf),
    )


def keep_freed_memory() -> None:
    """Tell glibc to map nothing below 1 GiB anew and to give nothing back; elsewhere do nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
