"""Resume: finished rows are not computed again, the output is the same in the end, and foreign files are not touched."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from click.testing import CliRunner

import daskinfer as di
from daskinfer.cli.main import main
from daskinfer.core import files
from daskinfer.errors import ChunkError, Interrupted, OutputExists, OutputLocked, StorageError, TooManyFailures
from daskinfer.storage import journal, outputs, staging
from daskinfer.storage.verify import verify
from tests.conftest import wait_until
from tests.support.crashing import digest

FORMATS = (".npy", ".zarr")
HOW: dict[str, Any] = {"devices": "inline", "batch_size": 16}
X = np.random.default_rng(0).random((200, 6), np.float32)

NETS = """
import time, torch

class Slow(torch.nn.Module):
    def forward(self, x):
        time.sleep(0.01)
        return x[:, ::2] * 3

def slow():
    return Slow()
"""


def double(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The model of most tests."""
    return rows * 2


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run ``double`` until so many chunks are stored, and interrupt it."""

    def run(x: Any, y: Path, n_chunks: int = 2, **how: Any) -> None:
        kept = outputs.OutputSet.commit
        left = [n_chunks]

        def keep(self: Any, *arguments: Any) -> None:
            kept(self, *arguments)
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt("enough")

        with monkeypatch.context() as patch:
            patch.setattr(outputs.OutputSet, "commit", keep)
            with pytest.raises(KeyboardInterrupt, match="enough") as caught:
                di.run(double, x, y, **HOW | how)
        assert f"Finished rows are kept ({y}.partial); repeat the call" in caught.value.__notes__[0]

    return run


def manifest_of(path: Path) -> Path:
    """Return the manifest folder of an output."""
    return path.with_name(f"{path.name}.daskinfer")


def read(path: Path) -> np.ndarray[Any, Any]:
    """Read an output of either format."""
    return np.load(path) if path.suffix == ".npy" else zarr.open_array(path, mode="r")[:]


def stored(folder: Path) -> Path:
    """Write the input to a file."""
    np.save(folder / "x.npy", X)
    return folder / "x.npy"


@pytest.mark.parametrize("suffix", FORMATS)
def test_killed_at_any_step(tmp_path: Path, suffix: str) -> None:
    """Killed before every tenth step on the disk and repeated, a run writes the bytes of an undisturbed run."""
    assert killed(tmp_path, suffix, first=3, step=10) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_killed_at_every_step(tmp_path: Path, suffix: str) -> None:
    """The same at every single step."""
    assert killed(tmp_path, suffix, first=1, step=1) > 30


def killed(folder: Path, suffix: str, first: int, step: int) -> int:
    """Kill and repeat runs, compare their outputs, and return their number."""
    command = [sys.executable, "-m", "tests.support.crashing", str(folder), suffix, str(first), str(step)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    found = json.loads(done.stdout)
    assert set(found["repeated"]) == {found["undisturbed"]}
    return len(found["repeated"])


def command(folder: Path, output: str, *arguments: str) -> list[str]:
    """Return the command that runs a slow model in workers."""
    (folder / "resume_nets.py").write_text(NETS)
    how = ["--devices", "cpu,cpu", "--device-weights", "even", "--batch-size", "10", *arguments]
    return [str(Path(sys.executable).with_name("daskinfer")), "run", "resume_nets:slow", "x.npy", output, *how]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_killed_with_its_workers(tmp_path: Path, two_cpus: list[str], suffix: str) -> None:
    """A command that is killed repeatedly with all its processes writes the bytes of an undisturbed run."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((2000, 6), np.float32))
    draw = random.Random(suffix)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    how = {"devices": two_cpus, "device_weights": "even", "batch_size": 10}
    di.run(lambda rows: rows[:, ::2] * 3, tmp_path / "x.npy", tmp_path / f"once{suffix}", **how)
    log, n_killed = manifest_of(tmp_path / f"y{suffix}") / "receipts.jsonl", 0
    for _ in range(2):
        n_bytes = log.stat().st_size if log.exists() else 0
        with subprocess.Popen(
            command(tmp_path, f"y{suffix}"), cwd=tmp_path, env=env, start_new_session=True, stdout=-3, stderr=-3
        ) as process:
            wait_until(
                lambda n=n_bytes, p=process: p.poll() is not None or (log.exists() and log.stat().st_size > n + 300), 120
            )
            time.sleep(draw.random() / 2)  # the moment is what is drawn
            n_killed += process.poll() is None
            os.killpg(process.pid, signal.SIGKILL)
    done = subprocess.run(
        command(tmp_path, f"y{suffix}"), cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert n_killed >= 1
    assert digest(tmp_path / f"y{suffix}") == digest(tmp_path / f"once{suffix}")
    assert verify(tmp_path / f"y{suffix}").wrong == ()


@pytest.mark.parametrize("suffix", FORMATS)
def test_goes_on_where_it_was_left(tmp_path: Path, suffix: str, interrupted: Callable[..., None]) -> None:
    """Committed rows are not computed again, in this process or on another machine's devices."""
    x, y = stored(tmp_path), tmp_path / f"y{suffix}"
    interrupted(x, y)
    assert not y.exists()
    report = di.run(double, x, y, devices="inline", prefetch=2)
    assert (report.rows + report.rows_before, report.rows_before > 0) == (200, True)
    assert f"{report.rows_before:,} rows were already done" in str(report)
    assert report.batch_size == 16  # the first run's
    np.testing.assert_array_equal(read(y), X * 2)
    assert verify(y).wrong == ()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npy", y.name, f"{y.name}.daskinfer"]


def test_what_a_killed_run_left_goes_without_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scratch folder that a killed run left is removed by the next call, even if that needs no workers."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x, y = stored(tmp_path), tmp_path / "y.npy"
    di.run(double, x, y, **HOW)
    scratch_in_use = files.ScratchDir()
    (tmp_path / "daskinfer-scratch-killed" / "dask-scratch-space").mkdir(parents=True)
    di.run(double, x, y, **HOW)
    assert [Path(scratch_in_use.path)] == list(tmp_path.glob("daskinfer-scratch-*"))
    scratch_in_use.remove()


@pytest.mark.parametrize("source", ["npy", "zarr", "array", "memmap", "dask", "ports"])
def test_nothing_to_do(tmp_path: Path, source: str) -> None:
    """The same call on a complete output returns at once, whatever form the input has, and says so."""
    given = sources(tmp_path)[source]
    net = (lambda a, b: a + b) if source == "ports" else double
    di.run(net, given(), tmp_path / "y.npy", **HOW)
    before = digest(manifest_of(tmp_path / "y.npy"))
    report = di.run(net, given(), tmp_path / "y.npy", **HOW)
    assert (report.rows, report.rows_before, report.seconds) == (0, 200, 0.0)
    assert "nothing to do: all 200 rows were already done" in str(report)
    assert digest(manifest_of(tmp_path / "y.npy")) == before


def sources(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return the input in every form; each call creates it again."""
    x = stored(folder)
    zarr.create_array(folder / "x.zarr", data=X, chunks=(50, 6))
    return {
        "npy": lambda: x,
        "zarr": lambda: folder / "x.zarr",
        "array": lambda: X.copy()[:, ::-1][:, ::-1],
        "memmap": lambda: np.load(x, mmap_mode="r")[::-1],
        "dask": lambda: da.from_array(X, chunks=(50, 6)),
        "ports": lambda: {"a": x, "b": X},
    }


@pytest.mark.parametrize("source", ["npy", "zarr", "array", "memmap", "dask"])
@pytest.mark.parametrize("complete", [True, False])
def test_another_input_is_refused(tmp_path: Path, source: str, complete: bool, interrupted: Callable[..., None]) -> None:
    """An input that changed is noticed in every form, and nothing is written."""
    given = sources(tmp_path)[source]
    di.run(double, given(), tmp_path / "y.npy", **HOW) if complete else interrupted(given(), tmp_path / "y.npy")
    changed = X + 1
    if source == "zarr":
        zarr.open_array(tmp_path / "x.zarr", mode="r+")[:50] = changed[:50]
    np.save(tmp_path / "x.npy", changed)
    other = {"array": changed, "dask": da.from_array(changed, chunks=(50, 6))}.get(source, given())
    with pytest.raises(OutputExists, match=r"y\.npy' belongs to a different run: input x .* was .* and is "):
        di.run(double, other, tmp_path / "y.npy", **HOW)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"model": np.negative}, "model was [0-9a-f]{12}… and is [0-9a-f]{12}…"),
        ({"batch_size": 8}, "batch_size was 16 and is 8"),
        ({"pad": False}, "options pad was True and is False"),
        ({"preprocess": double}, "options preprocess was None and is '?[0-9a-f]{12}…"),
        ({"dtype": "float64"}, "options dtype was None and is 'float64'.*dtype was '<f4' and is '<f8'"),
        ({"dtype": {"x": "float64"}}, r"options dtype was None and is \{'x': 'float64'\}"),
        ({"fill_value": 0.5}, "options fill_value was None and is '0.5'"),
        ({"nan_is_failure": True}, "options nan_is_failure was False and is True"),
        ({"shard": (1, 2)}, "shards was 0 and is 2"),
        ({"postprocess": lambda y: y[:, :2]}, r"shape was \(200, 6\) and is \(200, 2\)"),
    ],
)
def test_another_call_is_refused(
    tmp_path: Path, change: dict[str, Any], difference: str, interrupted: Callable[..., None]
) -> None:
    """The error names everything that changes the result, with old and new value; overwrite=True starts over."""
    x, y = stored(tmp_path), tmp_path / "y.npy"
    interrupted(x, y)
    changed = {"model": double} | HOW | change
    with pytest.raises(OutputExists, match=f"belongs to a different run: .*{difference}.* Repeat the original call"):
        di.run(changed.pop("model"), x, y, **changed)
    changed = {"model": double} | HOW | change
    if "shard" not in change:
        with pytest.raises(OutputExists, match=difference):
            di.plan(changed["model"], x, target=y, **{name: changed[name] for name in changed if name != "model"})
        assert di.run(changed.pop("model"), x, y, overwrite=True, **changed).rows == 200
        assert verify(y).wrong == ()


def test_what_holds_nothing_yet_may_become_anothers(tmp_path: Path) -> None:
    """A run that fails before its first chunk is stored leaves no output; a shard leaves one for the other shards."""

    def fails(rows: Any) -> Any:
        raise ValueError("no")

    x, y = stored(tmp_path), tmp_path / "y.npy"
    cure = ", with on_error='skip' (--on-error skip) if rows fail again,"
    for shard, said in (
        (None, []),
        ((1, 2), [f"Finished rows are kept ({y}.partial); repeat the call{cure} to compute the rest."]),
    ):
        with pytest.raises(ChunkError, match="no") as caught:
            di.run(fails, x, y, output=X[:0], retries=0, shard=shard, **HOW)
        assert getattr(caught.value, "__notes__", []) == said
        assert (tmp_path / "y.npy.partial").exists() == bool(said)
        assert (manifest_of(y) / "header.json").exists() == manifest_of(y).exists() == bool(said)
    with pytest.raises(OutputExists, match="model was"):
        di.run(double, x, y, shard=(1, 2), **HOW)
    shutil.rmtree(tmp_path / "y.npy.daskinfer")
    (tmp_path / "y.npy.partial").unlink()
    with pytest.raises(ChunkError, match="no"):
        di.run(fails, x, y, output=X[:0], retries=0, **HOW)
    assert di.run(double, x, y, **HOW).rows == 200
    assert verify(y).wrong == ()


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_appears_while_a_call_fails_stays(tmp_path: Path, suffix: str) -> None:
    """A call that fails with nothing stored removes its partial output, but not a file that appeared at its path."""
    y = tmp_path / f"y{suffix}"

    def fails(rows: Any) -> Any:
        y.write_text("precious")
        raise ValueError("no")

    with pytest.raises(ChunkError, match="no"):
        di.run(fails, X, y, output=X[:0], retries=0, **HOW)
    assert y.read_text() == "precious"
    assert not Path(f"{y}.partial").exists()


def test_several_outputs_begin_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the second of two outputs cannot be created, nothing is left of the first."""
    make = outputs._create_target

    def full(journal: journal.OutputJournal, path: str) -> None:
        if journal.path.endswith("b.npy"):
            raise OSError(28, "No space left on device", path)
        make(journal, path)

    monkeypatch.setattr(outputs, "_create_target", full)
    with pytest.raises(OSError, match="No space left"):
        di.run(lambda x: {"a": x, "b": x}, X, {"a": tmp_path / "a.npy", "b": tmp_path / "b.npy"}, **HOW)
    assert list(tmp_path.iterdir()) == []


def test_what_may_change(tmp_path: Path, two_cpus: list[str], interrupted: Callable[..., None]) -> None:
    """Devices, weights, prefetch and retries may change between runs."""
    x, y = stored(tmp_path), tmp_path / "y.zarr"
    interrupted(x, y)
    report = di.run(double, x, y, devices=two_cpus, device_weights=[1, 3], prefetch=2, retries=0, batch_size=16)
    assert 0 < report.rows < 200
    np.testing.assert_array_equal(read(y), X * 2)


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_output_without_a_manifest(tmp_path: Path, suffix: str) -> None:
    """An array without a manifest is refused and left alone; overwrite=True replaces it."""
    y = tmp_path / f"y{suffix}"
    np.save(y, X) if suffix == ".npy" else zarr.save_array(y, X)
    for target in (y, tmp_path / f"z{suffix}"):
        y.rename(f"{target}.partial") if target != y else None
        with pytest.raises(OutputExists, match=r"already exists, and no manifest describes it\. Choose another"):
            di.run(double, X, target, **HOW)
    assert di.run(double, X, tmp_path / f"z{suffix}", overwrite=True, **HOW).rows == 200


def test_overwrite_removes_no_folder_that_is_no_array(tmp_path: Path) -> None:
    """A mistyped path loses no data."""
    (tmp_path / "y.zarr").mkdir()
    (tmp_path / "y.zarr" / "precious").touch()
    with pytest.raises(OutputExists, match="no manifest describes it"):
        di.run(double, X, tmp_path / "y.zarr", overwrite=True, **HOW)
    assert (tmp_path / "y.zarr" / "precious").exists()


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_output_that_was_removed_is_computed_again(tmp_path: Path, suffix: str, interrupted: Callable[..., None]) -> None:
    """If the data is gone, its manifest is ignored."""
    for y, removed in ((tmp_path / f"a{suffix}", tmp_path / f"a{suffix}"), (tmp_path / f"b{suffix}", f"b{suffix}.partial")):
        di.run(double, X, y, **HOW) if y == removed else interrupted(X, y, device_weights="even")
        files.remove_path(tmp_path / removed)
        assert di.run(double, X, y, **HOW).rows == 200
        assert verify(y).wrong == ()


def test_an_output_that_appears_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that appears at the output's path during the run stays; once it is moved away, the call completes."""
    y = tmp_path / "y.npy"
    finish = journal.OutputJournal.finish

    def late(self: Any, metadata: Any) -> None:
        y.write_text("precious")
        finish(self, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(journal.OutputJournal, "finish", late)
        with pytest.raises(
            OutputExists, match=r"another program created .* during the run.*The complete output is at .*partial"
        ):
            di.run(double, X, y, **HOW)
    with pytest.raises(OutputExists, match="already exists"):
        di.run(double, X, y, **HOW)
    assert y.read_text() == "precious"
    y.unlink()
    assert di.run(double, X, y, **HOW).rows == 0
    np.testing.assert_array_equal(read(y), X * 2)


@pytest.mark.parametrize("tear", [b"", b'{"start":0,"stop":16,"dev', b"\0" * 300])
def test_a_torn_line_is_cut_off(tmp_path: Path, tear: bytes, interrupted: Callable[..., None]) -> None:
    """A torn receipt is cut off, and its chunk is computed again."""
    y = tmp_path / "y.zarr"
    interrupted(X, y)
    log = manifest_of(y) / "receipts.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-5] if not tear else whole + tear)
    report = di.run(double, X, y, **HOW)
    assert (report.rows_before == 48) == bool(tear)
    assert verify(y).wrong == ()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("header.json", "the header of the manifest .* is corrupt"),
        ("complete.json", "complete.json in the manifest .* is corrupt"),
    ],
)
def test_a_manifest_that_was_changed(tmp_path: Path, name: str, said: str) -> None:
    """A corrupt manifest is refused; overwrite=True starts over."""
    y = tmp_path / "y.npy"
    di.run(double, X, y, **HOW)
    (manifest_of(y) / name).write_text("{}")
    with pytest.raises(OutputExists, match=said):
        di.run(double, X, y, **HOW)
    assert di.run(double, X, y, overwrite=True, **HOW).rows == 200


@pytest.mark.parametrize("suffix", FORMATS)
def test_after_a_loss_of_power(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch, interrupted: Callable[..., None]
) -> None:
    """After a reboot, receipts whose data did not reach the disk are not trusted."""
    y = tmp_path / f"y{suffix}"
    interrupted(X, y, 3)
    lost = Path(f"{y}.partial") if suffix == ".npy" else Path(f"{y}.partial") / "c.1.0"
    content = bytearray(lost.read_bytes())
    content[128 + 16 * 24 + 5 if suffix == ".npy" else 5] ^= 1  # of rows 16:32
    lost.write_bytes(content)
    monkeypatch.setattr(journal, "_BOOT_ID_PATH", tmp_path / "boot")
    (tmp_path / "boot").write_text("another")
    report = di.run(double, X, y, **HOW)
    assert report.rows_before % 16 == 0
    np.testing.assert_array_equal(read(y), X * 2)
    assert verify(y).wrong == ()


def test_without_a_boot_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: Callable[..., None]) -> None:
    """A system without a boot id is taken for the same as before."""
    monkeypatch.setattr(journal, "_BOOT_ID_PATH", tmp_path / "none")
    interrupted(X, tmp_path / "y.npy")
    assert di.run(double, X, tmp_path / "y.npy", **HOW).rows_before > 0


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_ran_twice_is_read_again(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch, interrupted: Callable[..., None]
) -> None:
    """Before an output is completed, chunks that may have been written twice are re-read; wrong ones are computed again."""
    y = tmp_path / f"y{suffix}"
    interrupted(X, y)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "is_part_intact", lambda output, part: False)
        with pytest.raises(StorageError, match=r"parts of the output .* do not match their checksums: .* \(rows \d+:\d+\)"):
            di.run(double, X, y, **HOW)
    (manifest_of(y) / "header.json.new").touch()  # as a run leaves it that is killed there
    assert 0 < di.run(double, X, y, **HOW).rows < 200
    np.testing.assert_array_equal(read(y), X * 2)
    assert verify(y).wrong == ()


def test_a_part_that_is_gone_is_not_stored(tmp_path: Path, interrupted: Callable[..., None]) -> None:
    """A chunk whose file was removed is computed again after the recheck."""
    y = tmp_path / "y.zarr"
    interrupted(X, y, 1)
    interrupted(X, y, 1)  # of the second run: looked at before the end
    (Path(f"{y}.partial") / "c.1.0").unlink()
    with pytest.raises(StorageError, match="do not match their checksums"):
        di.run(double, X, y, **HOW)
    di.run(double, X, y, **HOW)
    np.testing.assert_array_equal(read(y), X * 2)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Start a run in a thread that pauses once its first chunk is stored; it continues after the test."""
    leave, threads = threading.Event(), []

    def start(y: Path, **how: Any) -> None:
        entered, kept = threading.Event(), outputs.OutputSet.commit

        def keep(self: Any, *arguments: Any) -> None:
            kept(self, *arguments)
            entered.set()
            assert leave.wait(60)

        def run() -> None:
            di.run(double, X, y, **HOW | how)

        with monkeypatch.context() as patch:
            patch.setattr(outputs.OutputSet, "commit", keep)
            threads.append(threading.Thread(target=run))
            threads[-1].start()
            assert entered.wait(60)

    yield start
    leave.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("how", [{}, {"overwrite": True}])
def test_two_runs_at_once(tmp_path: Path, running: Callable[..., None], how: dict[str, Any]) -> None:
    """A second run on one output fails at once, with or without overwrite; the first is not disturbed."""
    running(tmp_path / "y.npy")
    with pytest.raises(OutputLocked, match=r"y\.npy' is locked by another run .*Wait until that run ends"):
        di.run(double, X, tmp_path / "y.npy", **HOW | how)


def test_shards_lock_their_part_only(tmp_path: Path, running: Callable[..., None]) -> None:
    """While a shard runs, the same shard and a run of the whole output are refused; another shard is not."""
    running(tmp_path / "y.npy", shard=(1, 2))
    for how in ({"shard": (1, 2)}, {"overwrite": True}):
        with pytest.raises(OutputLocked, match="only one run, or one per shard, can write it"):
            di.run(double, X, tmp_path / "y.npy", **HOW | how)
    assert di.run(double, X, tmp_path / "y.npy", shard=(2, 2), **HOW).rows == 104
    assert not (tmp_path / "y.npy").exists()


def test_a_refused_call_leaves_nothing(tmp_path: Path) -> None:
    """A call that is refused because the path holds a foreign array leaves nothing beside it."""
    y = tmp_path / "y.npy"
    np.save(y, X)
    for _ in range(2):
        with pytest.raises(OutputExists, match="already exists, and no manifest describes it"):
            di.run(double, X, y, **HOW)
        assert list(tmp_path.iterdir()) == [y]


def test_two_commands_at_once(tmp_path: Path, in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that finds the output locked exits with 4 and prints one line."""
    (in_folder / "resume_nets.py").write_text(NETS)
    np.save("x.npy", X)
    manifest_of(in_folder / "y.npy").mkdir()
    lock = os.open(manifest_of(in_folder / "y.npy") / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    done = CliRunner().invoke(main, ["run", "resume_nets:slow", "x.npy", "y.npy", "--devices", "inline", "--no-progress"])
    os.close(lock)
    assert (done.exit_code, done.stderr.count("\n")) == (4, 1)


@pytest.mark.parametrize("suffix", FORMATS)
def test_shards_write_one_output(tmp_path: Path, suffix: str) -> None:
    """Shards in any order write one output; it appears with the last, and each reports its own rows."""
    y, n_shards = tmp_path / f"y{suffix}", 5
    di.run(double, X, tmp_path / f"once{suffix}", **HOW | {"batch_size": 4})
    for i in (4, 1, 5, 3, 2):
        assert not y.exists()
        report = di.run(double, X, y, shard=(i, n_shards), **HOW | {"batch_size": 4})
        assert report.rows == 40
        assert di.run(double, X, y, shard=(i, n_shards), **HOW | {"batch_size": 4}).rows_before == 40
    np.testing.assert_array_equal(read(y), X * 2)
    assert verify(y).wrong == ()


def test_shards_follow_the_first(tmp_path: Path) -> None:
    """A shard that would choose another batch size takes that of the shard that created the output."""
    y = tmp_path / "y.zarr"
    di.run(double, X, y, devices="inline", batch_size=2, shard=(1, 3))
    assert di.run(double, X, y, devices="inline", shard=(2, 3)).batch_size == 2
    header = json.loads((manifest_of(y) / "header.json").read_bytes().partition(b"\t")[0])
    assert (header["batch_size"], header["shards"]) == (2, 3)


def test_two_shards_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If another shard creates the output after this one checked, this one cuts its chunks again."""
    y, hold = tmp_path / "y.zarr", journal.OutputJournal.lock

    def late(self: Any) -> None:
        hold(self)
        if self.shard == (2, 2):
            di.run(double, X, y, devices="inline", batch_size=2, shard=(1, 2))

    monkeypatch.setattr(journal.OutputJournal, "lock", late)
    assert di.run(double, X, y, devices="inline", shard=(2, 2)).batch_size == 2
    np.testing.assert_array_equal(read(y), X * 2)
    assert verify(y).wrong == ()


@pytest.mark.slow
def test_shards_in_processes(tmp_path: Path) -> None:
    """Commands of a job array, all at once, write one output, each its part."""
    np.save(tmp_path / "x.npy", X)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    commands = [command(tmp_path, "y.zarr", "--shard", f"{i}/3", "--devices", "cpu", "--json") for i in (1, 2, 3)]
    started = [
        subprocess.Popen(c, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    reports = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], reports
    assert sum(json.loads(out)["rows"] for out, _ in reports) == 200
    np.testing.assert_array_equal(read(tmp_path / "y.zarr"), X[:, ::2] * 3)
    assert verify(tmp_path / "y.zarr").wrong == ()


@pytest.mark.parametrize("shard", [(0, 4), (5, 4), (1.0, 2), (1, 2, 3), "1/2", 3])
def test_invalid_shards(tmp_path: Path, shard: Any) -> None:
    """Shards are pairs of integers, counted from 1."""
    with pytest.raises(di.DaskInferError, match=r"shard must be None or \(i, n\), part i of n, counted from 1, got"):
        di.run(double, X, tmp_path / "y.npy", shard=shard, **HOW)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_does_not_start_over(tmp_path: Path) -> None:
    """overwrite=True would remove what the other shards did."""
    with pytest.raises(
        di.DaskInferError, match=r"overwrite=True \(--overwrite\) cannot be combined with shard=\(1, 2\) \(--shard 1/2\)"
    ):
        di.run(double, X, tmp_path / "y.npy", shard=(1, 2), overwrite=True, **HOW)


def picky(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A model that fails on a row with a 7."""
    if (rows == 7).any():
        raise ArithmeticError("seven")
    return rows * 2


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_that_fail(tmp_path: Path, in_folder: Path, suffix: str) -> None:
    """A run that failed on bad rows continues with on_error="skip"; they are listed beside the output, every time."""
    x, y = X.copy(), tmp_path / f"y{suffix}"
    x[[3, 170]] = 7
    with pytest.raises(di.DaskInferError, match="seven"):
        di.run(picky, x, y, retries=0, **HOW)
    for n_rows in (198, 0):
        report = di.run(picky, x, y, on_error="skip", retries=0, **HOW)
        assert (report.rows, report.rows_before, report.failed_rows) == (n_rows, 198 - n_rows, (3, 170))
    assert [failure.start for failure in report.failures] == [3, 170]
    listed = json.loads((manifest_of(y) / "failed_rows.json").read_text())
    assert [(f["start"], f["stop"], f["device"]) for f in listed] == [(3, 4, "inline"), (170, 171, "inline")]
    assert "ArithmeticError: seven" in listed[0]["exception"]
    assert np.isnan(read(y)[[3, 170]]).all()
    assert str(verify(y)).endswith("match their checksums; 2 rows failed in the run (listed in failed_rows.json)")


@pytest.mark.parametrize(("shard", "allowed"), [(None, 5), (None, "2.5%"), ((1, 2), 5), ((1, 2), "5.3%")])
def test_repeating_allows_no_more_failures(tmp_path: Path, shard: tuple[int, int] | None, allowed: int | str) -> None:
    """Rows that failed in earlier attempts count: the same call fails the same way until more are allowed."""
    x, how = X.copy(), {"on_error": "skip", "retries": 0, "shard": shard, **HOW}
    x[3:90:16] = 7  # six, one per micro-batch, in the first shard
    for _ in range(3):
        with pytest.raises(TooManyFailures, match=f"6 rows failed; max_failed_rows={allowed!r} allows 5") as caught:
            di.run(picky, x, tmp_path / "y.npy", max_failed_rows=allowed, **how)
        assert (
            "repeat the call, with a larger max_failed_rows (--max-failed-rows), to compute the rest"
            in caught.value.__notes__[0]
        )
    with pytest.raises(TooManyFailures, match=r"5 rows failed; max_failed_rows=4 allows 4\. Fix the rows"):
        di.run(picky, x, tmp_path / "y.npy", max_failed_rows=4, **how)
    report = di.run(picky, x, tmp_path / "y.npy", max_failed_rows=6, **how)
    assert report.failed_rows == tuple(range(3, 90, 16))
    assert report.rows_before > 0


def test_rows_that_failed_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an incomplete output, on_error="raise" computes rows again that were skipped before."""
    x, y, finish = X.copy(), tmp_path / "y.npy", outputs.OutputSet.finish
    x[3] = 7
    monkeypatch.setattr(outputs.OutputSet, "finish", lambda self: None)
    di.run(picky, x, y, on_error="skip", retries=0, **HOW)
    monkeypatch.setattr(outputs.OutputSet, "finish", finish)
    with pytest.raises(di.DaskInferError, match="seven"):
        di.run(picky, x, y, retries=0, **HOW)


def test_missing_rows_on_the_command_line(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed rows end the command with 3, every time, and it prints where they are listed."""
    (in_folder / "resume_nets.py").write_text(NETS)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    x = X.copy()
    x[3, 0] = np.nan
    np.save("x.npy", x)
    how = ["--devices", "inline", "--batch-size", "50", "--on-error", "skip", "--nan-is-failure", "--no-progress"]
    for _ in range(2):
        done = CliRunner().invoke(main, ["run", "resume_nets:slow", "x.npy", "y.npy", *how])
        assert done.exit_code == 3, done.stderr
        said = "1 rows of y.npy have no output; y.npy.daskinfer/failed_rows.json lists them"
        (line,) = done.stderr.splitlines()
        assert line.endswith(f" daskinfer: {said}. After fixing the cause, use --overwrite to start over")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_on_the_command_line(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    """A command that was interrupted exits with 130 or 143, and prints what is stored and how to continue."""
    np.save("x.npy", X)
    (in_folder / "resume_nets.py").write_text(NETS)
    monkeypatch.setattr(sys, "path", sys.path.copy())

    def stop(*_: Any) -> None:
        raise Interrupted("stopped.", number)

    monkeypatch.setattr(outputs.OutputSet, "commit", stop)
    done = CliRunner().invoke(main, ["run", "resume_nets:slow", "x.npy", "y.npy", "--devices", "inline"])
    assert done.exit_code == code
    assert "daskinfer: stopped. No rows are stored yet" in done.stderr
    assert "repeat the command to start again" in done.stderr


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk(tmp_path: Path, suffix: str) -> None:
    """On a full disk the run fails and names the path; with space again it continues."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        filler, x = disk / "filler", np.random.default_rng(0).random((500, 60))
        filler.write_bytes(b"x" * 250_000)
        with pytest.raises(OSError, match=rf"y{suffix}.*No space left on device|No space left on device.*y{suffix}"):
            di.run(double, x, disk / f"y{suffix}", **HOW)
        filler.unlink()
        di.run(double, x, disk / f"y{suffix}", **HOW)
        np.testing.assert_array_equal(read(disk / f"y{suffix}"), x * 2)
        assert verify(disk / f"y{suffix}").wrong == ()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_receipts_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a receipt does not fit on the disk, the run fails and names the log."""

    class Full:
        name = "receipts.jsonl"

        def write(self, line: bytes) -> int:
            return len(line) - 1

        def close(self) -> None:
            pass

    class Closed(journal.OutputJournal):
        def commit(self, *arguments: Any) -> None:
            self._log.close()
            self._log = Full()
            super().commit(*arguments)

    monkeypatch.setattr(outputs, "OutputJournal", Closed)
    with pytest.raises(StorageError, match=r"cannot write the receipts 'receipts\.jsonl': No space left") as caught:
        di.run(double, X, tmp_path / "y.npy", **HOW)
    assert caught.value.number == errno.ENOSPC


def test_data_reaches_the_disk_before_its_receipt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are flushed first, then their folder, then the log: about once a second, and at the end."""
    flushed: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(files, "SYNC_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    di.run(double, X, tmp_path / "y.zarr", **HOW)
    receipts, partial = str(manifest_of(tmp_path / "y.zarr") / "receipts.jsonl"), str(tmp_path / "y.zarr.partial")
    chunks = [i for i, path in enumerate(flushed) if path.startswith(f"{partial}/c.")]
    assert len(chunks) == 13
    for i in chunks:
        rest = flushed[i:]
        assert rest.index(partial) < rest.index(receipts)


def test_a_flush_that_fails_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk in the background thread is raised in the run."""

    def broken(files: set[str], log: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "_flush", broken)
    with pytest.raises(OSError, match="Input/output error"):
        di.run(double, X, tmp_path / "y.npy", **HOW)
    assert not (tmp_path / "y.npy").exists()


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_late_writer_is_kept_out(tmp_path: Path, suffix: str, interrupted: Callable[..., None]) -> None:
    """A worker of an earlier run that writes after another run took over changes nothing."""
    y, late = tmp_path / f"y{suffix}", []
    with pytest.MonkeyPatch.context() as patch:
        init = outputs.OutputSet.__init__
        patch.setattr(outputs.OutputSet, "__init__", lambda self, *a: (init(self, *a), late.extend(self.targets))[0])
        interrupted(X, y)
    di.run(double, X, y, **HOW)
    with pytest.raises(FileNotFoundError):
        late[0].write(0, np.full((16, 6), 9, np.float32))
    np.testing.assert_array_equal(read(y), X * 2)
    assert verify(y).wrong == ()


def test_a_writer_of_an_earlier_run_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run waits for the writers of an earlier run; if one does not finish, the error says so."""
    run = staging.create_run_folder(tmp_path, "run")
    monkeypatch.setattr(staging, "WAIT_SECONDS", 0.1)
    with (
        staging.hold_write_fence(str(run)),
        pytest.raises(OutputLocked, match="a worker of an earlier run is still writing"),
    ):
        staging.remove_run_folders(tmp_path, "run")
    other = staging.create_run_folder(tmp_path, "run-1-of-2")
    staging.remove_run_folders(tmp_path, "run")
    assert list(tmp_path.iterdir()) == [other]
    other.rename(f"{other}.old")  # killed between two steps
    staging.remove_run_folders(tmp_path)
    assert not tmp_path.exists()


def test_a_writer_that_waits_for_the_fence_sees_that_it_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that gets the fence after its run was replaced does not write."""
    run = staging.create_run_folder(tmp_path, "run")
    monkeypatch.setattr(fcntl, "flock", lambda fence, kind: shutil.rmtree(run))
    with pytest.raises(FileNotFoundError), staging.hold_write_fence(str(run)):
        pytest.fail("the writer got the fence")


def low_and_high(x: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Two outputs by name."""
    return {"low": -x, "high": x}


def test_several_outputs_are_one(tmp_path: Path, interrupted: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk is done once it is in all outputs; swapped paths are refused."""
    paths = {"low": tmp_path / "low.npy", "high": tmp_path / "high.zarr"}
    commit, left = journal.OutputJournal.commit, [5]

    def fail(self: Any, *arguments: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt("between the two")
        commit(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(journal.OutputJournal, "commit", fail)
        with pytest.raises(KeyboardInterrupt, match="between"):
            di.run(low_and_high, X, paths, **HOW)
    with pytest.raises(OutputExists, match=r"output was '(low|high)' and is '(low|high)'"):
        di.run(low_and_high, X, {"low": paths["high"], "high": paths["low"]}, **HOW)
    assert 0 < di.run(low_and_high, X, paths, **HOW).rows < 200
    np.testing.assert_array_equal(read(paths["low"]), -read(paths["high"]))
    assert not verify(paths["low"]).wrong
    paths["low"].unlink()
    with pytest.raises(OutputExists, match=r"low\.npy' is missing, but .*high\.zarr' of the same run is complete"):
        di.run(low_and_high, X, paths, **HOW)
    assert di.run(low_and_high, X, paths, overwrite=True, **HOW).rows == 200


def test_micro_batches_that_were_chosen_are_kept(tmp_path: Path) -> None:
    """A tuned batch size is in the header before the first receipt, and the next run uses it."""
    y = tmp_path / "y.npy"
    di.run(double, X, y, devices="inline", batch_size=8, shard=(1, 2))
    with journal.OutputJournal(str(y), journal.read_header(str(y)), None, (2, 2)) as opened:
        opened.lock()
        opened.open(lambda path: None)
        opened.record_batch_config({"batch_size": 4, "by_kind": {"cpu": 4, "cuda": 2}})
        opened.record_batch_config({"batch_size": 4, "by_kind": {"cpu": 4, "cuda": 2}})
    report = di.run(double, X, y, devices="inline", shard=(2, 2))
    assert (report.batch_size, report.by_kind) == (4, {"cpu": 4, "cuda": 2})
    assert '"by_kind":{"cpu":4,"cuda":2}' in (manifest_of(y) / "header.json").read_text()


# -------------------------------------------------------------------------------------------------- outputs held together


def two(rows: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """A model with two outputs."""
    return {"a": rows * 2, "b": rows * 3}


def test_outputs_of_different_runs_are_no_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of two runs with different write-units are refused together: each would overwrite the rows of the other."""

    def begin(name: str, unit: int) -> None:
        with monkeypatch.context() as patch:
            keep, n_kept = outputs.OutputSet.commit, []

            def stop(self: Any, *arguments: Any) -> None:
                keep(self, *arguments)
                n_kept.append(1)
                if len(n_kept) == 2:
                    raise KeyboardInterrupt

            patch.setattr(outputs.OutputSet, "commit", stop)
            where = {output: tmp_path / f"{output}{name}.zarr" for output in ("a", "b")}
            with pytest.raises(KeyboardInterrupt):
                di.run(two, X, where, devices="inline", batch_size=unit)

    begin("1", 16)
    begin("2", 64)
    with pytest.raises(OutputExists, match=r"a1\.zarr' and .*b2\.zarr' belong to different runs, with write-units of"):
        di.run(two, X, {"a": tmp_path / "a1.zarr", "b": tmp_path / "b2.zarr"}, devices="inline")
    for name in "12":
        where = {output: tmp_path / f"{output}{name}.zarr" for output in ("a", "b")}
        di.run(two, X, where, devices="inline")
        for output, expected in two(X).items():
            np.testing.assert_array_equal(read(where[output]), expected)


def test_overwrite_removes_nothing_if_it_is_refused(tmp_path: Path) -> None:
    """If one of two outputs is not an array, the other stays unchanged, also under ``overwrite``."""
    where = {"a": tmp_path / "a.npy", "b": tmp_path / "b.npy"}
    di.run(two, X, where, **HOW)
    (photos := tmp_path / "photos.zarr").mkdir()
    (photos / "one.jpg").touch()
    with pytest.raises(OutputExists, match=r"photos\.zarr' already exists"):
        di.run(two, X, where | {"b": photos}, overwrite=True, **HOW)
    np.testing.assert_array_equal(read(where["a"]), X * 2)
    assert verify(where["a"]).wrong == ()
    assert (photos / "one.jpg").exists()


def test_one_of_two_complete_outputs_is_gone(tmp_path: Path) -> None:
    """If one of two complete outputs was moved away, nothing replaces it, and it can be restored."""
    where = {"a": tmp_path / "a.npy", "b": tmp_path / "b.npy"}
    di.run(two, X, where, **HOW)
    where["a"].rename(tmp_path / "elsewhere.npy")
    for _ in range(2):
        with pytest.raises(OutputExists, match=r"a\.npy' is missing, but .*b\.npy' of the same run is complete"):
            di.run(two, X, where, **HOW)
    (tmp_path / "elsewhere.npy").rename(where["a"])
    assert di.run(two, X, where, **HOW).rows == 0
    assert verify(where["a"]).wrong == ()


def test_shards_are_told_how_to_start_over(tmp_path: Path) -> None:
    """Shards are told to remove files by hand, since they may not pass ``overwrite``."""
    where = {"a": tmp_path / "a.npy", "b": tmp_path / "b.npy"}
    for k in (1, 2):
        di.run(two, X, where, shard=(k, 2), **HOW)
    where["a"].rename(tmp_path / "elsewhere.npy")
    with pytest.raises(
        OutputExists, match=r"or remove .*b\.npy', .* while no shard is running, to compute all outputs again"
    ):
        di.run(two, X, where, shard=(1, 2), **HOW)


def test_failed_rows_that_are_computed_again_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between two outputs' receipts of one chunk, its failed rows do not count towards ``max_failed_rows`` twice."""

    def picky(rows: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        if (rows == X[3]).all(axis=1).any():
            raise ValueError("the fourth row")
        return two(rows)

    where = {"a": tmp_path / "a.npy", "b": tmp_path / "b.npy"}
    how = HOW | {"on_error": "skip", "max_failed_rows": 1, "retries": 0}
    commit = journal.OutputJournal.commit

    def killed(self: journal.OutputJournal, *arguments: Any) -> None:
        if self.path.endswith("b.npy"):
            raise KeyboardInterrupt
        commit(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(journal.OutputJournal, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            di.run(picky, X, where, output=two(X[:0]), **how)
    report = di.run(picky, X, where, output=two(X[:0]), **how)
    assert (report.rows, report.rows_before, report.failed_rows) == (199, 0, (3,))
    np.testing.assert_array_equal(np.delete(read(where["b"]), 3, 0), np.delete(X * 3, 3, 0))


def test_a_memmap_whose_changes_stay_in_memory_is_another_input(tmp_path: Path) -> None:
    """Changes to a copy-on-write memmap count although its file is unchanged; so do changes that reach the file."""
    np.save(tmp_path / "x.npy", X)
    for mode in ("c", "r+"):
        x = np.load(tmp_path / "x.npy", mmap_mode=mode)
        y = tmp_path / f"y-{mode}.npy"
        assert di.run(double, x, y, **HOW).rows == 200
        assert di.run(double, x, y, **HOW).rows == 0
        x[7] += 1
        with pytest.raises(OutputExists, match="belongs to a different run: input x"):
            di.run(double, x, y, **HOW)


def test_a_run_whose_output_was_removed_leaves_its_successor_alone(tmp_path: Path) -> None:
    """If the files of a running run are removed and another run starts, the first removes nothing of it when it fails."""
    x, y = stored(tmp_path), tmp_path / "y.npy"
    began: list[Any] = []

    def fails(rows: Any) -> Any:
        if not began:
            shutil.rmtree(manifest_of(y))
            Path(f"{y}.partial").unlink()
            began.append(di.run(double, x, y, **HOW))
        raise ValueError("no")

    with pytest.raises(ChunkError, match="no"):
        di.run(fails, x, y, output=X[:0], retries=0, **HOW)
    np.testing.assert_array_equal(read(y), X * 2)
    assert verify(y).wrong == ()
    assert di.run(double, x, y, **HOW).rows == 0
