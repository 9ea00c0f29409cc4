"""Files that are not what they should be: models that were tampered with, code in files, sizes that nobody has."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import zarr

from daskinfer.core import env
from tests.benchmarks.judging import Verdict
from tests.benchmarks.processes import Failed, Unavailable, run_fresh
from tests.faults import means, nets
from tests.faults.effort import Effort, judged

WEIGHTS = "CHAOS_WEIGHTS"  # variable: the file that `tampering` changes
TIB = 1 << 40
BUDGET_MB = 600  # of memory, for a process that refuses what is larger


def tampering() -> torch.nn.Module:
    """A factory; the second worker that calls it, whichever that is, finds the file of weights changed by one byte."""
    here = Path(os.environ[nets.FOLDER])
    if env.DEVICE in os.environ:  # not in the client, which looks at the network too
        with contextlib.suppress(FileExistsError):
            os.close(os.open(here / "first-load", os.O_CREAT | os.O_EXCL))
            (here / "loader").write_text(str(os.getpid()))
            flip(Path(os.environ[WEIGHTS]))
    return nets.made()


def flip(path: Path) -> None:
    """Change one byte in the middle of the tensors, and nothing that a directory shows."""
    found = path.stat()
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-8, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def tampered(effort: Effort) -> Verdict:
    """A byte of the weights is changed before the run, or between two workers' loads: nothing is computed with them."""
    folders = {name: effort.folder / name for name in ("before", "between")}
    found = {name: _tampered(folder, between=name == "between") for name, folder in folders.items()}
    begun = _loaders(folders["between"])
    n_between = sum(count for pid, count in begun.items() if pid != _first_loader(folders["between"]))
    n_before = sum(nets.begun(folders["before"]).values())
    return judged(
        "model file tampered (1 byte; between two loads)",
        f"{n_before} chunks run; between two loads {n_between} with it; "
        f"exit {', '.join(str(code) for code, _ in found.values())}",
        "0 chunks run",
        {
            "0 run": n_before == 0 and n_between == 0,
            "refused": all(code in (1, 2) and "SHA-256" in said for code, said in found.values()),
            "changed between two loads": (folders["between"] / "loader").exists(),
        },
    )


def _tampered(folder: Path, *, between: bool) -> tuple[int, str]:
    """The command's exit code and what it said."""
    folder.mkdir()
    weights = folder / "net.safetensors"
    safetensors.torch.save_file(nets.Watched("").state_dict(), weights)
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    np.save(folder / "x.npy", nets.rows(400))
    env = {nets.FOLDER: str(folder), nets.SECONDS: "0.05", WEIGHTS: str(weights)}
    if not between:
        flip(weights)
    factory = "tests.faults.trust:tampering" if between else "tests.faults.nets:made"
    how = ["--devices", "cpu,cpu", "--batch-size", "10", "--model-sha256", sha256, "--factory", factory]
    return means.run_command("run", str(weights), "x.npy", "y.npy", *how, folder=folder, env=env)


def _loaders(folder: Path) -> dict[int, int]:
    """How many micro-batches each process began."""
    found: dict[int, int] = {}
    for note in nets.notes(folder):
        found[note.pid] = found.get(note.pid, 0) + (note.what == "begin")
    return found


def _first_loader(folder: Path) -> int:
    """The process that read the weights before they were changed, if it did."""
    path = folder / "loader"
    return int(path.read_text()) if path.exists() else -1


def code_in_files(effort: Effort) -> Verdict:
    """Pickles, programs and object arrays that run code when loaded: none of it runs without consent, and all of it with."""
    found = run_fresh("tests.faults.trust:executed", {"folder": str(effort.folder)})
    n_files, n_ways = len(found["files"]), found["ways"]
    ran = [f"{name} by {way}" for name, ways in found["files"].items() for way in ways]
    return judged(
        f"code in files ({', '.join(found['files'])})",
        f"{len(ran)} executed in {n_files} files x {n_ways} ways; {found['live']} of {n_files} do when trusted",
        "0 executed without trust",
        {f"executed: {ran}": not ran, "the files are what they should be": found["live"] == n_files},
    )


def executed(folder: str) -> dict[str, Any]:
    """Use each file in each way; which of them made the marker; in a fresh process."""
    from click.testing import CliRunner

    import daskinfer as di
    from daskinfer.cli.main import main
    from tests.integration.test_trust import EVIL, Payload

    here = Path(folder)
    x = np.ones((40, 3), np.float32)
    np.save(here / "x.npy", x)

    def objects(path: Path, marker: Path) -> None:
        np.save(path, np.array([Payload(marker)], object), allow_pickle=True)

    files: dict[str, Callable[[Path, Path], object]] = {**EVIL, "object.npy": objects}
    ways: dict[str, Callable[[str], object]] = {
        "plan": lambda path: di.plan(path, x),
        "predict": lambda path: di.predict(path, x, devices="inline"),
        "workers": lambda path: di.predict(path, x, devices=["cpu"], output=x[:0]),
        "map_blocks": lambda path: di.map_blocks(path, x).compute(),
        "run": lambda path: di.run(path, x, here / "y.npy", devices="inline"),
        "as weights": lambda path: di.plan(di.Model(path, factory="torch.nn:Identity"), x),
        "as input": lambda path: di.run(np.copy, path, here / "y.npy", devices="inline"),
        "the command": lambda path: CliRunner().invoke(main, ["plan", path, str(here / "x.npy")]),
        "the command's input": lambda path: CliRunner().invoke(main, ["plan", "torch.nn:Identity", path]),
    }
    ran: dict[str, list[str]] = {}
    n_live = 0
    for number, (name, make) in enumerate(files.items()):
        path, marker = here / f"{number}-{name}", here / f"{number}-marker"
        make(path, marker)
        marker.unlink(missing_ok=True)
        ran[name] = []
        for way, use in ways.items():
            with contextlib.suppress(di.DaskInferError):
                use(str(path))
            if marker.exists():
                ran[name].append(way)
                marker.unlink()
        _use_trusted(path)
        n_live += marker.exists()
    di.close()
    return {"files": ran, "ways": len(ways), "live": n_live}


def _use_trusted(path: Path) -> None:
    """Load a file as somebody does who trusts it."""
    import daskinfer as di

    with contextlib.suppress(Exception):
        if path.suffix == ".npy":
            np.load(path, allow_pickle=True)
        else:
            di.Model(path, trust=True).make_loader().load(torch.device("cpu"))


def declared(effort: Effort) -> Verdict:
    """A file of a few bytes that declares terabytes is refused in the plan, before any memory is taken for it."""
    folder = effort.folder
    make_declared(folder)
    names = sorted(path.name for path in folder.iterdir())
    with contextlib.ExitStack() as stack:
        try:
            before = stack.enter_context(means.memory_limit(BUDGET_MB << 20)).before
        except Unavailable:
            before = ()
        log = folder / "measured.log"
        command = [*before, means.PYTHON, "-m", "tests.faults.trust", str(folder), *names]
        process = stack.enter_context(means.started(command, log))
        means.wait_until(lambda: process.poll() is not None, 120, "the plans")
    lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
    if not lines:
        raise Failed(f"exit code {process.returncode}, no plan was refused: {log.read_text()[-300:]}")
    found = json.loads(lines[-1])
    return judged(
        "declared 4 TB chunk, npz bomb",
        f"{len(found['refused'])} of {len(names)} refused at plan; {found['grown'] / 2**20:.0f} MiB taken, "
        f"{found['peak'] / 2**20:.0f} in all, budget {found['budget'] / 2**20:.0f}",
        "refused, memory < 2x budget",
        {
            "refused": found["refused"] == names,
            "memory": found["peak"] < 2 * found["budget"],
            "ended by itself": process.returncode == 0,
        },
    )


def make_declared(folder: Path) -> None:
    """Files that are small, and declare what nobody has."""
    zarr.create_array(folder / "chunk.zarr", shape=(TIB,), chunks=(TIB,), dtype="f4")
    zarr.create_array(folder / "row.zarr", shape=(9, TIB), chunks=(1, 1024), dtype="f4")
    with open(folder / "declared.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (TIB,)})
    np.savez_compressed(folder / "bomb.npz", x=np.zeros(1 << 30, np.uint8))
    (folder / "pickle.npy").write_bytes(pickle.dumps([1.0]))


def refuse(folder: str, *names: str) -> None:
    """Plan with each file; print which were refused, and what memory that took."""
    import resource

    import daskinfer as di
    from daskinfer.hardware.discovery import inspect_machine

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    di.plan(np.sqrt, np.ones(100, np.float32), devices="inline")
    before, said = peak(), []
    for name in names:
        try:
            di.plan(np.sqrt, Path(folder, name), devices="inline")
        except di.DaskInferError:
            said.append(name)
    print(json.dumps({"refused": said, "peak": peak(), "grown": peak() - before, "budget": inspect_machine().memory_nbytes}))


if __name__ == "__main__":
    import sys

    refuse(*sys.argv[1:])
