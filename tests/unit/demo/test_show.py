from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner, Result
from PIL import Image

from daskinfer.cli.main import main
from daskinfer.demo import show
from daskinfer.errors import OptionError
from daskinfer.hardware.discovery import Device, Machine

GPU = Device("cuda:0", "cuda", 0, uuid="GPU-1", label="NVIDIA H200")


SPEED = re.compile(r"(plain torch loop|daskinfer) +(█+) +([\d.]+) s +([\d,]+) images/s(?: +([\d.]+)x)?$")


def invoke(*arguments: str, columns: int = 80) -> Result:
    """Run the demo on 2,000 images in this process."""
    fixed = ("demo", "--rows", "2000", "--devices", "inline")
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(main, [*fixed, *arguments])


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_demo_fits_a_screen(in_folder: Path, columns: int) -> None:
    """At any width, the demo takes at most 20 lines, none wider than the terminal, and no word is split."""
    done = invoke(columns=columns)
    lines = done.stdout.splitlines()
    assert done.exit_code == 0, done.stderr
    assert len(lines) <= 20
    assert max(map(len, lines)) <= max(columns, 80)  # lines of figures keep their columns
    assert "same output as the loop, in the same order (largest difference" in " ".join(lines)
    assert "this process (all" in done.stdout
    assert "inline" not in done.stdout


def test_the_speeds_are_those_of_the_calls(in_folder: Path) -> None:
    """The factor is that of the two times, and so are the lengths of the bars."""
    lines = invoke().stdout.splitlines()
    figures = [
        re.match(r"(plain torch loop|daskinfer) +(█+) +([\d.]+) s +([\d,]+) images/s(?: +([\d.]+)x)?$", x) for x in lines
    ]
    loop, ours = (found for found in figures if found)
    assert float(ours[5]) == pytest.approx(int(ours[4].replace(",", "")) / int(loop[4].replace(",", "")), abs=0.06)
    longest = max(loop[2], ours[2], key=len)
    assert len(longest) == 80 - show._TEXT_WIDTH


def test_the_files_of_the_demo(in_folder: Path) -> None:
    """The scores, the report and the picture stay in ./daskinfer-demo, and a second demo replaces them."""
    for _ in range(2):
        done = invoke()
        assert "files in ./daskinfer-demo: scores.zarr, report.html, digits.png" in done.stdout, done.stderr
        assert zarr.open_array("daskinfer-demo/scores.zarr", mode="r").shape == (2000, 10)
        with Image.open("daskinfer-demo/digits.png") as sheet:
            assert sheet.size == (832, 546)
        assert "<html" in Path("daskinfer-demo/report.html").read_text()


def test_the_folder_of_somebody_else_is_left_alone(in_folder: Path) -> None:
    """A folder with files that no demo wrote is refused, and they stay."""
    np.save("scores.npy", np.zeros(3))
    done = invoke("--folder", ".")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "'.' holds files that no demo wrote; choose a new folder" in done.stderr
    assert [path.name for path in in_folder.iterdir()] == ["scores.npy"]


def test_gpus_that_cannot_be_used_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU but without the extra, this process is used, and the note says what to install."""
    machine = Machine(gpus=(GPU,), n_cores=2, driver="580.1", driver_cuda=(13, 0))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    monkeypatch.delitem(sys.modules, "daskinfer.cluster.cuda", raising=False)
    devices, note = show.choose_devices("auto", machine)
    assert devices == "inline"
    assert note.startswith(", not used: GPU workers need dask-cuda")
    assert "[cuda13]" in note
    monkeypatch.setattr("torch.version.cuda", None)
    assert "CPU-only build" in show.choose_devices("auto", machine)[1]


def test_named_devices_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that the user names are never replaced by others."""
    machine = Machine(gpus=(GPU,), n_cores=2)
    assert show.choose_devices("cuda:0", machine) == ("cuda:0", "")
    assert show.choose_devices("auto", Machine(n_cores=2)) == ("auto", "")


def test_every_gpu_has_enough_images() -> None:
    """There are as many images for each GPU as for all CPUs together."""
    gpus = tuple(Device(f"cuda:{i}", "cuda", i) for i in range(4))
    assert show.count_rows("auto", Machine(gpus=gpus, n_cores=8)) == 4 * show.ROWS_PER_DEVICE
    assert show.count_rows("auto", Machine(n_cores=8)) == show.ROWS_PER_DEVICE
    assert show.count_rows("cuda:1,cpu", Machine(gpus=gpus, n_cores=8)) == show.ROWS_PER_DEVICE


def test_what_takes_time_is_said(tmp_path: Path) -> None:
    """While the demo computes it says what it does, and it clears that before the next line."""
    told: list[str] = []
    lines = list(show.run_demo(tmp_path / "d", 100, "inline", 80, told.append))
    assert told == ["the plain torch loop runs", "daskinfer runs", "", "drawing", ""]
    assert lines[0].startswith("daskinfer ")
    (tmp_path / "d" / show._MARKER).unlink()
    with pytest.raises(OptionError, match="holds files that no demo wrote"):
        next(show.run_demo(tmp_path / "d", 100, "inline"))
