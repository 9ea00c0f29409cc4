"""verify: whatever happened to an output or its manifest is found, and nothing else is."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import daskinfer as di
from daskinfer.cli.main import main
from daskinfer.core.files import remove_path
from daskinfer.storage.verify import verify

X = np.random.default_rng(0).random((300, 6))
FORMATS = (".npy", ".zarr")
N_FLIPS = 1000


@pytest.fixture(params=FORMATS)
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A finished output with rows that failed, so that every kind of file is there."""

    def picky(rows: np.ndarray) -> np.ndarray:
        if (rows[:, 0] == 7).any():
            raise ArithmeticError("seven")
        return rows * 2

    x = X.copy()
    x[[40, 200], 0] = 7
    path = tmp_path / f"y{request.param}"
    how = {"devices": "inline", "batch_size": 8, "on_error": "skip", "retries": 0, "output": X[:0]}
    report = di.run(picky, x, path, **how)
    assert report.failed_rows == (40, 200)
    return path


def files_of(output: Path) -> list[Path]:
    """All files of an output and of its manifest that hold anything."""
    folders = [output, output.with_name(f"{output.name}.daskinfer")]
    found = [path for folder in folders for path in ([folder] if folder.is_file() else sorted(folder.rglob("*")))]
    return [path for path in found if path.is_file() and path.stat().st_size]


def test_as_written(output: Path) -> None:
    """An output that nobody touched is said to be as it was written, with its size."""
    found = verify(output)
    assert found.wrong == ()
    assert str(found).startswith("300 rows in 38 parts of ")
    done = CliRunner().invoke(main, ["verify", str(output)])
    assert (done.exit_code, done.stdout) == (0, f"{found}\n")


def test_every_flipped_byte_is_found(output: Path) -> None:
    """A thousand times one byte of any file of the output or of its manifest is changed: it is found each time."""
    draw = random.Random(0)
    files = files_of(output)
    assert {"header.json", "complete.json", "receipts.jsonl", "failed_rows.json"} <= {path.name for path in files}
    n_found = 0
    for _ in range(N_FLIPS):
        path = draw.choice(files)
        content = path.read_bytes()
        at = draw.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ draw.randrange(1, 256)]) + content[at + 1 :])
        n_found += bool(verify(output).wrong)
        path.write_bytes(content)
    assert n_found == N_FLIPS
    assert verify(output).wrong == ()


def test_every_missing_or_longer_file_is_found(output: Path) -> None:
    """A file that is gone, one that is cut off and one that grew are named."""
    for path in files_of(output):
        content = path.read_bytes()
        for change in (path.unlink, lambda: path.write_bytes(content[:-1]), lambda: path.write_bytes(content + b"\0")):  # noqa: B023  # called at once
            change()
            assert any(path.name in said for said in verify(output).wrong), path
            path.write_bytes(content)
    assert verify(output).wrong == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda output, manifest: (manifest / "more").touch(),
        lambda output, manifest: (manifest / "staging").mkdir(),
        lambda output, manifest: (manifest / "lock").write_text("x"),
        lambda output, manifest: ((manifest / "creating").unlink(), (manifest / "creating").mkdir()),
        lambda output, manifest: ((output if output.is_dir() else manifest) / "c.99.0").touch(),
        lambda output, manifest: ((output if output.is_dir() else manifest) / "folder").mkdir(),
        lambda output, manifest: remove_path(output),
    ],
    ids=["more", "staging", "lock", "creating", "chunk", "folder", "gone"],
)
def test_what_should_not_be_there(output: Path, change: Callable[[Path, Path], object]) -> None:
    """What does not belong to an output or its manifest is named."""
    change(output, output.with_name(f"{output.name}.daskinfer"))
    done = CliRunner().invoke(main, ["verify", str(output)])
    assert (done.exit_code, bool(done.stdout)) == (1, True)


def test_rows_of_a_changed_part_are_named(output: Path) -> None:
    """What is wrong is said with its rows."""
    path = output / "c.4.0" if output.is_dir() else output
    content = bytearray(path.read_bytes())
    at = 10 if output.is_dir() else len(content) - 48 * (300 - 33)  # in row 33
    content[at] ^= 1
    path.write_bytes(content)
    (said,) = verify(output).wrong
    assert "(rows 32:40): changed" in said


def test_not_complete(output: Path) -> None:
    """An output that is not complete is said to be so, with the rows that are missing; what is there is read."""
    manifest = output.with_name(f"{output.name}.daskinfer")
    (manifest / "complete.json").unlink()
    log = manifest / "receipts.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:2]))
    found = verify(output)
    assert found.wrong[0] == f"{output}: not complete (complete.json is missing); repeat the run to go on"
    assert any(said.endswith("(rows 8:300): no receipt") for said in found.wrong)
    assert found.n_parts == 1


@pytest.mark.parametrize("content", [b"", b"{}", None])
def test_without_a_header(output: Path, content: bytes | None) -> None:
    """Where the header is gone or changed, that is what is said."""
    header = output.with_name(f"{output.name}.daskinfer") / "header.json"
    header.unlink() if content is None else header.write_bytes(content)
    assert "header.json" in verify(output).wrong[-1]


def test_without_a_manifest(tmp_path: Path) -> None:
    """An array that run did not write cannot be verified, and the command says so."""
    np.save(tmp_path / "y.npy", X)
    with pytest.raises(di.DaskInferError, match=r"has no manifest .*; only what `daskinfer run` wrote can be verified"):
        verify(tmp_path / "y.npy")
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "y.npy")]).exit_code == 2


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (5,)])
@pytest.mark.parametrize("suffix", FORMATS)
def test_outputs_of_any_shape(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    """An output without rows, of rows of nothing, or of numbers is complete and verified."""
    y = tmp_path / f"y{suffix}"
    di.run(np.negative, np.ones(shape), y, devices="inline", output=np.ones(shape))
    assert verify(y).wrong == ()
    assert di.run(np.negative, np.ones(shape), y, devices="inline", output=np.ones(shape)).rows == 0


def test_a_complete_output_whose_parts_are_gone_is_not_called_done(tmp_path: Path) -> None:
    """Repeating the call refuses, with the cure; starting over computes it anew."""
    for suffix in FORMATS:
        path = tmp_path / f"gone{suffix}"
        how = {"devices": "inline", "batch_size": 8}
        di.run(np.sqrt, X, path, **how)
        if path.is_dir():
            sorted(path.glob("c.*"))[1].unlink()
        else:
            os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(di.errors.OutputExists, match=r"parts are gone or cut short since \(.*--overwrite"):
            di.run(np.sqrt, X, path, **how)
        with pytest.raises(di.errors.OutputExists, match="gone or cut short"):
            di.plan(np.sqrt, X, target=path, **how)
        assert di.run(np.sqrt, X, path, overwrite=True, **how).rows == len(X)
        assert verify(path).wrong == ()
