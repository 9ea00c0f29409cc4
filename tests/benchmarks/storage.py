"""From Zarr to Zarr, with an input far larger than the workers' memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from tests.benchmarks import by_hand
from tests.benchmarks.judging import Verdicts, at_most, failed
from tests.benchmarks.processes import Failed, run_fresh
from tests.benchmarks.sampling import Memory, growth, peak
from tests.benchmarks.session import Session
from tests.benchmarks.works import TOLERANCE, WORKS, Work, difference

_INPUT_NBYTES = 16e9
_MEMORY_LIMIT = 10**9  # per worker
_PEAK_NBYTES = 1.5e9
_GROWTH_NBYTES = 50e6  # what an allocator may wander; the input is hundreds of times that
_DISK_PART = 0.7  # of the free disk may be taken
_CHUNK_ROWS = 1024  # 12.6 MB
_SAMPLE_CHUNKS = 16  # that compute and decoding are timed on
_N_SAMPLES = 5  # times that compute is timed
_READERS = 2
_N_WORKERS = 2
_CHECKED_ROWS = 5_000


def storage(session: Session) -> Verdicts:
    """Peak and growth of memory, and time beside what reading and computing take."""
    for codec in ("uncompressed", "zstd"):
        target = f"Zarr to Zarr, {codec}"
        source = session.folder / f"{codec}.zarr"
        try:
            yield from _judge(session, target, codec, source)
        except Failed as error:
            yield failed(target, str(error))
        finally:
            shutil.rmtree(source, ignore_errors=True)


def _judge(session: Session, target: str, codec: str, source: Path) -> Verdicts:
    n_rows, note = _rows(session)
    target = f"{target}{note}"
    run_fresh("storage:make", {"path": str(source), "codec": codec, "n_rows": n_rows})
    ideal = run_fresh("storage:parts", {"path": str(source), "out": str(session.folder / "plain.zarr")})
    with ThreadPoolExecutor(_N_WORKERS) as pool:
        beside = list(pool.map(lambda _: run_fresh("storage:compute", {"path": str(source)}), range(_N_WORKERS)))
    ideal["compute"] = fmean(found["compute"] for found in beside)
    memory = Memory()
    out = session.folder / f"{codec}-answer.zarr"
    found = run_fresh("storage:run", {"path": str(source), "out": str(out)}, meanwhile=memory.watch)
    shutil.rmtree(out, ignore_errors=True)
    session.raw.setdefault("storage", {})[codec] = found | {"ideal": ideal, "rows": n_rows, "memory": memory.as_dict()}
    span = found["start"], found["stop"]
    best = max(ideal["io"], (ideal["compute"] + ideal["decode"]) / _N_WORKERS)
    yield at_most(f"{target}: peak memory of any process", peak(memory.rss, *span) / 1e9, _PEAK_NBYTES / 1e9, " GB")
    yield at_most(
        f"{target}: growth, second to fourth quarter", growth(memory.rss, *span) / 1e6, _GROWTH_NBYTES / 1e6, " MB"
    )
    yield at_most(f"{target}: time / ideal", found["seconds"] / best, 1.10)


def _rows(session: Session) -> tuple[int, str]:
    """Rows of the input, whole chunks; fewer where the disk is short, and then said so."""
    wanted = _INPUT_NBYTES * session.scale
    free = shutil.disk_usage(session.folder).free * _DISK_PART
    nbytes = min(wanted, free)
    n_chunks = max(4, int(nbytes / WORKS["cnn"].row_nbytes / _CHUNK_ROWS))
    return n_chunks * _CHUNK_ROWS, f" (disk holds {nbytes / 1e9:.1f} GB only)" if nbytes < wanted else ""


def _work(n_rows: int) -> Work:
    return WORKS["cnn"].scaled(n_rows / WORKS["cnn"].n_rows)


def make(path: str, codec: str, n_rows: int) -> dict[str, Any]:
    """Write the input, a quarter of its bits noise, as pictures are."""
    import zarr

    work = _work(n_rows)
    codecs = {"compressors": None} if codec == "uncompressed" else {}
    store = zarr.create_array(
        path, shape=(n_rows, *work.row_shape), chunks=(_CHUNK_ROWS, *work.row_shape), dtype="float32", **codecs
    )
    made = np.random.default_rng(0)
    for start in range(0, n_rows, _CHUNK_ROWS):
        store[start : start + _CHUNK_ROWS] = made.integers(0, 256, (_CHUNK_ROWS, *work.row_shape), np.uint8)
    os.sync()  # its writing back is not to be in anybody's time
    return {}


def parts(path: str, out: str) -> dict[str, float]:
    """Seconds of plainly reading all and writing the answer; core-seconds of decoding all, from a sample."""
    import zarr

    store = zarr.open_array(path, mode="r")
    n_chunks = -(-store.shape[0] // _CHUNK_ROWS)
    n_sample = min(_SAMPLE_CHUNKS, n_chunks)
    io = _read_and_write(path, out, store.shape[0])
    sample = slice(0, n_sample * _CHUNK_ROWS)
    raw_seconds = min(_cpu_seconds(lambda: _read(_files(path)[:n_sample])) for _ in range(3))
    decode = min(_cpu_seconds(lambda: store[sample]) for _ in range(3)) - raw_seconds
    return {"io": io, "decode": max(0.0, decode) * n_chunks / n_sample}


def compute(path: str) -> dict[str, float]:
    """Core-seconds of the network over all rows, from a sample, while as many others as there are workers do the same.

    Alone a core is faster than it is in any run: two share their memory and the caches behind it (here by a tenth).
    """
    import zarr

    store = zarr.open_array(path, mode="r")
    n_rows = store.shape[0]
    rows = store[: _SAMPLE_CHUNKS * _CHUNK_ROWS]
    by_hand.keep_freed_memory()
    with by_hand.one_thread(_work(n_rows), rows) as call:
        call()
        seconds = median(_cpu_seconds(call) for _ in range(_N_SAMPLES))
    return {"compute": seconds * n_rows / len(rows)}


def _read_and_write(path: str, out: str, n_rows: int) -> float:
    """Read every byte by as many threads as there are workers, and write as many as the answer has."""
    files = _files(path)
    _forget_cached_files()
    began = time.perf_counter()
    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(_read, [[file] for file in files]))
    Path(out).write_bytes(bytes(n_rows * 4 * WORKS["cnn"].answer_shape[0]))
    seconds = time.perf_counter() - began
    Path(out).unlink()
    return seconds


def _files(path: str) -> list[Path]:
    return sorted(file for file in Path(path).rglob("*") if file.is_file() and file.name != "zarr.json")


def _read(files: list[Path]) -> None:
    for file in files:
        file.read_bytes()


def _cpu_seconds(call: Any) -> float:
    """Core-seconds of this process; all its threads count."""
    began = time.process_time()
    call()
    return time.process_time() - began


def _forget_cached_files() -> None:
    """Let both readings start from the disk, where this process may say so; elsewhere both find the same cache."""
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")


def run(path: str, out: str) -> dict[str, Any]:
    """One ``di.run`` on a warm cluster of two workers of limited memory, its answer checked at both ends."""
    import zarr
    from distributed import Client

    import daskinfer as di

    store = zarr.open_array(path, mode="r")
    net = _work(store.shape[0]).net()
    devices = ["cpu"] * _N_WORKERS
    limits = {"memory_limit": _MEMORY_LIMIT, "dashboard_address": None}
    with di.LocalDeviceCluster(devices, **limits) as cluster, Client(cluster) as client:
        di.predict(net, store[:_CHUNK_ROWS], client=client)
        _forget_cached_files()
        start, began = time.time(), time.perf_counter()
        di.run(net, path, out, client=client)
        seconds, stop = time.perf_counter() - began, time.time()
    off = _difference(store, zarr.open_array(out, mode="r"))
    if not off <= TOLERANCE * np.abs(store[:_CHUNK_ROWS]).max():
        raise ValueError(f"the answer is off by {off:.3g}")
    return {"seconds": seconds, "start": start, "stop": stop, "difference": off}


def _difference(source: Any, answer: Any) -> float:
    """Between the answer and the plain loop's, of the first and the last rows."""
    found = []
    for rows in (slice(0, _CHECKED_ROWS), slice(-_CHECKED_ROWS, None)):
        with by_hand.one_thread(_work(source.shape[0]), source[rows]) as call:
            found.append(difference(answer[rows], call()))
    return max(found)
