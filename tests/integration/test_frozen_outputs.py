"""Outputs that were written before the package was reorganized are verified, continued and completed by this code.

``tests/support/outputs-before-the-move.tar.gz`` was made from the arrays and the model below, with ``devices="inline"`` and
``batch_size=8``, as ``.npy`` and as ``.zarr``: ``complete``; ``begun``, interrupted after its second chunk; ``failed``, with
a NaN in row 21, ``on_error="skip"`` and ``nan_is_failure=True``; ``sharded``, the first of two shards. If a test here fails,
files that an earlier version wrote for users cannot be continued: change the code, never the archive.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import daskinfer as di
from daskinfer.errors import OutputExists
from daskinfer.storage.manifest import parse_lines
from daskinfer.storage.verify import verify

ARCHIVE = Path(__file__).parents[1] / "support" / "outputs-before-the-move.tar.gz"
X = np.arange(240, dtype=np.float32).reshape(80, 3)
HOW: dict[str, Any] = {"devices": "inline", "batch_size": 8}


@pytest.fixture(params=["npy", "zarr"])
def suffix(request: pytest.FixtureRequest) -> str:
    """Each format of the archive."""
    return str(request.param)


@pytest.fixture
def frozen(tmp_path: Path) -> Path:
    """A folder with a copy of the outputs."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def linear() -> torch.nn.Module:
    """Return the model of the outputs."""
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).reshape(2, 3))
        model.bias.copy_(torch.tensor([0.5, -0.5]))
    return model


def with_nan() -> np.ndarray[Any, Any]:
    """Return the input of the failed outputs."""
    x = X.copy()
    x[21] = np.nan
    return x


def expected() -> np.ndarray[Any, Any]:
    """Return what plain torch computes."""
    with torch.inference_mode():
        return linear()(torch.from_numpy(X)).numpy()


def read(path: Path) -> np.ndarray[Any, Any]:
    """Read an output of either format."""
    return np.load(path) if path.suffix == ".npy" else zarr.open_array(path, mode="r")[:]


def manifest_of(path: Path) -> Path:
    """Return the manifest folder of an output."""
    return path.with_name(f"{path.name}.daskinfer")


def read_files(path: Path) -> dict[str, bytes]:
    """Return the content of all files of an output and its manifest."""
    folders = [path, manifest_of(path)]
    found = [file for folder in folders for file in ([folder] if folder.is_file() else folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in found}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of an output's log."""
    return parse_lines((manifest_of(path) / "receipts.jsonl").read_bytes())[0]


def test_a_complete_output_is_verified_and_left_alone(frozen: Path, suffix: str) -> None:
    """It matches its checksums and the result of torch, and repeating the call changes no file."""
    output = frozen / f"complete.{suffix}"
    before = read_files(output)
    assert verify(output).wrong == ()
    np.testing.assert_allclose(read(output), expected(), rtol=1e-6)
    report = di.run(linear(), X, output, **HOW)
    assert (report.rows, report.rows_before) == (0, 80)
    assert read_files(output) == before


def test_an_interrupted_output_is_continued(frozen: Path, suffix: str) -> None:
    """Only the missing rows are computed; the stored bytes are kept, and the whole output is right."""
    output = frozen / f"begun.{suffix}"
    records = read_records(output)
    assert not output.exists()
    report = di.run(linear(), X, output, **HOW)
    assert report.rows_before > 0
    assert report.rows == 80 - report.rows_before
    assert read_records(output)[: len(records)] == records
    np.testing.assert_array_equal(read(output), read(frozen / f"complete.{suffix}"))
    np.testing.assert_allclose(read(output), expected(), rtol=1e-6)
    assert verify(output).wrong == ()


def test_failed_rows_stay_listed(frozen: Path, suffix: str) -> None:
    """Row 21 is in the list of the manifest, in the report of a repeated call and in that of verify."""
    output = frozen / f"failed.{suffix}"
    listed = json.loads((manifest_of(output) / "failed_rows.json").read_text())
    assert [(failure["start"], failure["stop"], failure["device"]) for failure in listed] == [(21, 22, "inline")]
    for on_error in ("skip", "raise"):  # the output is complete: its failed rows are not tried again
        report = di.run(linear(), with_nan(), output, on_error=on_error, nan_is_failure=True, **HOW)
        assert (report.rows, report.rows_before, report.failed_rows) == (0, 79, (21,))
    checked = verify(output)
    assert (checked.wrong, checked.n_failed) == ((), 1)
    assert np.isnan(read(output)[21]).all()
    np.testing.assert_allclose(np.delete(read(output), 21, 0), np.delete(expected(), 21, 0), rtol=1e-6)


def test_failed_rows_are_computed_from_another_input_only_on_request(frozen: Path, suffix: str) -> None:
    """A good input is another input and is refused; ``overwrite`` computes all rows."""
    output = frozen / f"failed.{suffix}"
    how = HOW | {"on_error": "raise", "nan_is_failure": True}
    with pytest.raises(OutputExists, match=r"belongs to a different run: input x sha256 was .* and is "):
        di.run(linear(), X, output, **how)
    report = di.run(linear(), X, output, overwrite=True, **how)
    assert (report.rows, report.failed_rows) == (80, ())
    np.testing.assert_allclose(read(output), expected(), rtol=1e-6)
    assert verify(output).wrong == ()


def test_the_second_shard_completes_a_sharded_output(frozen: Path, suffix: str) -> None:
    """The first shard is not computed again, and the output appears under its name with the second."""
    output = frozen / f"sharded.{suffix}"
    assert di.run(linear(), X, output, shard=(1, 2), **HOW).rows == 0
    assert not output.exists()
    report = di.run(linear(), X, output, shard=(2, 2), **HOW)
    assert (report.rows, report.rows_before) == (40, 0)
    np.testing.assert_array_equal(read(output), read(frozen / f"complete.{suffix}"))
    np.testing.assert_allclose(read(output), expected(), rtol=1e-6)
    assert verify(output).wrong == ()


def test_new_outputs_use_the_same_files_and_keys(frozen: Path, suffix: str) -> None:
    """What this code writes has the old file names, header, data and record keys, so that older code can read it too."""
    old, new = frozen / f"complete.{suffix}", frozen / "new" / f"complete.{suffix}"
    new.parent.mkdir()
    di.run(linear(), X, new, **HOW)
    old_files, new_files = read_files(old), read_files(new)
    assert new_files.keys() == old_files.keys()
    changing = {f"{old.name}.daskinfer/{name}" for name in ("receipts.jsonl", "complete.json")}  # process and boot ids
    assert {name for name in old_files if new_files[name] != old_files[name]} <= changing
    keys = [{tuple(record) for record in read_records(path)} for path in (old, new)]
    assert keys[0] == keys[1]
    completions = [parse_lines((manifest_of(path) / "complete.json").read_bytes())[0][0] for path in (old, new)]
    assert completions[0].keys() == completions[1].keys()
    assert completions[0]["metadata"] == completions[1]["metadata"]


def test_a_changed_byte_of_an_old_output_is_found(frozen: Path) -> None:
    """The checksums of old receipts are compared, not only read."""
    chunk = frozen / "complete.zarr" / "c.3.0"
    content = bytearray(chunk.read_bytes())
    content[-1] ^= 1
    chunk.write_bytes(content)
    assert verify(frozen / "complete.zarr").wrong == (f"{chunk} (rows 24:32): changed",)
