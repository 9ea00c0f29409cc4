"""verify: every change to an output or its manifest is found, and nothing else is reported."""

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
    """A complete output with failed rows, so that every kind of file exists."""

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
    """Return all non-empty files of an output and its manifest."""
    folders = [output, output.with_name(f"{output.name}.daskinfer")]
    found = [path for folder in folders for path in ([folder] if folder.is_file() else sorted(folder.rglob("*")))]
    return [path for path in found if path.is_file() and path.stat().st_size]


def test_as_written(output: Path) -> None:
    """An unchanged output matches its checksums, and the report gives its size."""
    found = verify(output)
    assert found.wrong == ()
    assert str(found).startswith("300 rows in 38 parts (")
    assert str(found).endswith(" bytes) match their checksums; 2 rows failed in the run (listed in failed_rows.json)")
    done = CliRunner().invoke(main, ["verify", str(output)])
    assert (done.exit_code, done.stdout) == (0, f"{found}\n")


def test_every_flipped_byte_is_found(output: Path) -> None:
    """A thousand times one byte of a random file of the output or its manifest is changed: each change is found."""
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
    """Missing, truncated and longer files are named."""
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
    """Unexpected files in an output or its manifest are reported."""
    change(output, output.with_name(f"{output.name}.daskinfer"))
    done = CliRunner().invoke(main, ["verify", str(output)])
    assert (done.exit_code, bool(done.stdout)) == (1, True)


def test_rows_of_a_changed_part_are_named(output: Path) -> None:
    """A changed part is reported with its rows."""
    path = output / "c.4.0" if output.is_dir() else output
    content = bytearray(path.read_bytes())
    at = 10 if output.is_dir() else len(content) - 48 * (300 - 33)  # in row 33
    content[at] ^= 1
    path.write_bytes(content)
    (said,) = verify(output).wrong
    assert "(rows 32:40): changed" in said


def test_not_complete(output: Path) -> None:
    """An incomplete output is reported with its missing rows; the stored ones are checked."""
    manifest = output.with_name(f"{output.name}.daskinfer")
    (manifest / "complete.json").unlink()
    log = manifest / "receipts.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:2]))
    found = verify(output)
    assert found.wrong[0] == f"{output}: incomplete (complete.json is missing); repeat the run to continue it"
    assert any(said.endswith("(rows 8:300): no receipt") for said in found.wrong)
    assert found.n_parts == 1


@pytest.mark.parametrize("content", [b"", b"{}", None])
def test_without_a_header(output: Path, content: bytes | None) -> None:
    """A missing or changed header is reported."""
    header = output.with_name(f"{output.name}.daskinfer") / "header.json"
    header.unlink() if content is None else header.write_bytes(content)
    assert "header.json" in verify(output).wrong[-1]


def test_without_a_manifest(tmp_path: Path) -> None:
    """An array without a manifest cannot be verified, and the command says so."""
    np.save(tmp_path / "y.npy", X)
    with pytest.raises(di.DaskInferError, match=r"has no manifest .*Name an output of `daskinfer run` or `di\.run`"):
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
    """A repeated call is refused with a cure; starting over computes the output again."""
    for suffix in FORMATS:
        path = tmp_path / f"gone{suffix}"
        how = {"devices": "inline", "batch_size": 8}
        di.run(np.sqrt, X, path, **how)
        if path.is_dir():
            sorted(path.glob("c.*"))[1].unlink()
        else:
            os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(
            di.errors.OutputExists, match=r"parts of the complete output .* are missing or truncated \(.*--overwrite"
        ):
            di.run(np.sqrt, X, path, **how)
        with pytest.raises(di.errors.OutputExists, match="are missing or truncated"):
            di.plan(np.sqrt, X, target=path, **how)
        assert di.run(np.sqrt, X, path, overwrite=True, **how).rows == len(X)
        assert verify(path).wrong == ()
