"""Disks that are full, writers that come late, bytes that change: no answer is wrong, and what is wrong is named."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zarr
from zarr.codecs import Crc32cCodec

from tests.benchmarks.judging import Verdict
from tests.benchmarks.processes import Failed, run_fresh
from tests.faults import means, nets
from tests.faults.crashes import received
from tests.faults.effort import Effort, judged
from tests.faults.shim import STOP, Shim

FORMATS = (".zarr", ".npy")
N_FLIPS = 1000
DISK_MB, ROOM_MB = 8, 64
FULL_ROWS = 1_000_000  # three float32 each: 12 MB


def read(path: Path) -> np.ndarray[Any, Any]:
    """An output of either format."""
    return np.load(path) if path.suffix == ".npy" else np.asarray(zarr.open_array(path, mode="r")[:])


def disk_full(effort: Effort) -> Verdict:
    """The output's disk of 8 MB runs full: exit 1 and its path; with more room the same command completes it."""
    found = {suffix: _disk_full(effort.folder / f"full{suffix}", suffix) for suffix in FORMATS}
    return judged(
        f"disk full ({', '.join(FORMATS)} on {DISK_MB} MB)",
        "; ".join(f"{k}: exit {f['code']}, then {f['again']}, {f['before']:,} rows kept" for k, f in found.items()),
        "path named, exit 1, continues after space",
        {
            "exit 1": all(f["code"] == 1 for f in found.values()),
            "path named": all(f["named"] for f in found.values()),
            "continues": all(f["again"] == 0 for f in found.values()) and found[".zarr"]["before"] > 0,
            "same answer": all(f["same"] for f in found.values()),
        },
    )


def _disk_full(folder: Path, suffix: str) -> dict[str, Any]:
    folder.mkdir()
    np.save(folder / "x.npy", nets.rows(FULL_ROWS))
    disk = folder / "disk"
    env = {nets.FOLDER: str(folder)}
    how = ["--devices", "cpu", "--batch-size", "1000"]
    command = ["run", "tests.faults.nets:made", "x.npy", str(disk / f"y{suffix}"), *how]
    with means.small_disk(disk, DISK_MB) as resize:
        code, said = means.run_command(*command, folder=folder, env=env)
        resize(ROOM_MB)
        again, report = means.run_command(*command, folder=folder, env=env)
        same = again == 0 and np.array_equal(read(disk / f"y{suffix}"), nets.plain(FULL_ROWS, 1000))
    kept = re.search(r"([\d,]+) rows were already done", report)
    before = int(kept[1].replace(",", "")) if kept else 0
    return {"code": code, "named": str(disk / f"y{suffix}") in said, "again": again, "before": before, "same": same}


def stale_writer(effort: Effort) -> Verdict:
    """A worker is stopped in a write, others do its chunks, it goes on: the same bytes, and one receipt per row."""
    formats = effort.pick((".npy",), FORMATS)
    found = {suffix: _stale_writer(effort.folder / f"stale{suffix}", suffix) for suffix in formats}
    return judged(
        f"late stale writer ({', '.join(formats)})",
        "; ".join(f"{k}: {_said(f['same'])} bytes, {f['receipts']} receipt per row" for k, f in found.items()),
        "same bytes, one receipt",
        {
            "stopped in a write, done elsewhere": all(f["late"] for f in found.values()),
            "same bytes": all(f["same"] for f in found.values()),
            "one receipt": all(f["receipts"] == 1 for f in found.values()),
            "verified": all(f["verified"] for f in found.values()),
        },
    )


def _stale_writer(folder: Path, suffix: str) -> dict[str, Any]:
    n, output = 400, folder / "disk" / f"y{suffix}"
    output.parent.mkdir(parents=True)
    np.save(folder / "x.npy", nets.rows(n))
    shim = Shim.build(folder, output.parent)
    env = {nets.FOLDER: str(folder), nets.SECONDS: "0.1"}
    how = ["--batch-size", "10", "--chunk-timeout", "3"]
    with contextlib.ExitStack() as stack:
        _, address = stack.enter_context(means.scheduler(folder))
        workers = [
            stack.enter_context(means.worker(address, folder, f"worker-{i}", env=env | preload, nanny=False))
            for i, preload in enumerate((shim.environment, {}))
        ]
        means.await_workers(address, len(workers))
        shim.arm(at=3 if suffix == ".npy" else 4, action=STOP)
        command = [means.PYTHON, "-m", "daskinfer.cli.main", "run", "tests.faults.nets:made", "x.npy", str(output)]
        log = folder / "run.log"
        process = stack.enter_context(means.started([*command, *how, "--scheduler", address], log, env))
        means.wait_until(lambda: shim.struck or process.poll() is not None, 60, "the write")
        stale = workers[0].pid
        receipts = output.with_name(f"{output.name}.daskinfer") / "receipts.jsonl"
        means.wait_until(lambda: _all_received(folder, receipts, stale) or process.poll() is not None, 90, "the retry")
        stopped = shim.writes and psutil.Process(stale).status() == psutil.STATUS_STOPPED
        begun = {by: {n.first for n in nets.notes(folder) if (n.pid == stale) == by} for by in (True, False)}
        os.kill(stale, signal.SIGCONT)
        means.wait_until(lambda: process.poll() is not None, 120, "the run")
        if process.returncode:
            raise Failed(f"{suffix}: exit code {process.returncode}: {log.read_text().strip().splitlines()[-1:]}")
        counts = Counter(row for start, stop in received(receipts) for row in range(start, stop))
        verified, _ = means.run_command("verify", str(output), folder=folder)
    return {
        "late": stopped and bool(begun[True] & begun[False]),
        "same": np.array_equal(read(output), nets.plain(n, 10)),
        "receipts": max(counts.values()) if len(counts) == n else 0,
        "verified": verified == 0,
    }


def _said(same: bool) -> str:
    return "same" if same else "other"


def _all_received(folder: Path, receipts: Path, stale: int) -> bool:
    """Whether all that a worker began has a receipt."""
    begun = {note.first for note in nets.notes(folder) if note.pid == stale}
    done = {row for start, stop in received(receipts) for row in range(start, stop, 10)}
    return bool(begun) and begun <= done


def output_corrupted(effort: Effort) -> Verdict:
    """Whichever byte of an output or its manifest is changed, ``verify`` finds it."""
    n = effort.pick(200, N_FLIPS)
    asked = [{"folder": str(effort.folder), "suffix": suffix, "n": n // 2} for suffix in FORMATS]
    found = [run_fresh("tests.faults.storage:flipped", one) for one in asked]
    n_found, said = sum(f["found"] for f in found), sum(f["command"] for f in found)
    return judged(
        "output corrupted (one byte of any of its files)",
        f"{n_found} of {2 * (n // 2)} found; by the command {said} of 2",
        f"{n} found",
        {"found": n_found == 2 * (n // 2), "the command": said == 2, "untouched is right": all(f["clean"] for f in found)},
    )


def flipped(folder: str, suffix: str, n: int) -> dict[str, Any]:
    """Flip bytes of an output, one at a time; in a fresh process."""
    import daskinfer as di
    from daskinfer.storage.verify import verify

    output = Path(folder, f"flipped{suffix}")
    nets.break_at(folder, {50: "raise"})  # so that there is a file of rows that failed, too
    how: dict[str, Any] = {"devices": "inline", "batch_size": 10, "on_error": "skip", "retries": 0}
    di.run(nets.Watched(folder), nets.rows(400), output, output=np.empty((0, 3), np.float32), **how)
    manifest = output.with_name(f"{output.name}.daskinfer")
    paths = [output, *output.rglob("*"), *manifest.rglob("*")]
    files = sorted(path for path in paths if path.is_file() and path.stat().st_size)
    draw, n_found = random.Random(suffix), 0
    for number in range(n):
        path = draw.choice(files)
        content = path.read_bytes()
        at = draw.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ draw.randrange(1, 256)]) + content[at + 1 :])
        n_found += bool(verify(output).wrong)
        if number == n - 1:
            code, _ = means.run_command("verify", str(output), folder=Path(folder))
        path.write_bytes(content)
    return {"found": n_found, "command": int(code == 1), "clean": not verify(output).wrong}


def input_corrupted(effort: Effort) -> Verdict:
    """One byte of a store with checksums is changed: the command fails, and names the store's chunk and its rows."""
    named, codes = 0, []
    draw = random.Random(0)
    for number in range(n := effort.pick(1, 4)):
        x = effort.folder / f"x{number}.zarr"
        zarr.create_array(x, data=nets.rows(400), chunks=(10, nets.WIDTH), compressors=Crc32cCodec())
        chunk = draw.randrange(40)
        path = x / "c" / str(chunk) / "0"
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        env = {nets.FOLDER: str(effort.folder)}
        how = ["--devices", ("inline", "cpu,cpu")[number % 2], "--batch-size", "10"]
        run = ["run", "tests.faults.nets:made", str(x), f"y{number}.npy", *how]
        code, said = means.run_command(*run, folder=effort.folder, env=env)
        codes.append(code)
        named += f"chunk 'c/{chunk}/0' (rows {10 * chunk}:{10 * chunk + 10})" in said
    return judged(
        "input corrupted (one byte of a crc32c store)",
        f"chunk and rows named {named}/{n}; exit {','.join(map(str, codes))}",
        f"{n}/{n}; exit 1",
        {"named": named == n, "exit": set(codes) == {1}},
    )
