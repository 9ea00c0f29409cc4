from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tests.gpu import check
from tests.gpu.check import STANDIN_SCALE, Context, Part, list_parts, run_parts

CONTEXT = Context(torch.device("cpu"), STANDIN_SCALE)


def fail(context: Context) -> None:
    """Fail as a part does."""
    raise LookupError("mine")


def test_a_part_that_fails_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    """Its error becomes a row of the table; its traceback goes to stderr."""
    failed, passed = run_parts([Part("one", 1, fail), Part("other", 1, lambda context: 7)], CONTEXT)
    assert (failed.failed, failed.outcome) == (True, "FAILED LookupError: mine")
    assert (passed.failed, passed.outcome) == (False, "7")
    assert "LookupError: mine" in capsys.readouterr().err


def test_parts_without_time_left_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part needs half of the time that it may take; shorter ones still run."""
    monkeypatch.setattr(check, "BUDGET_SECONDS", 10.0)
    long, short = run_parts([Part("long", 30, fail), Part("short", 1, lambda context: "done")], CONTEXT)
    assert (long.outcome, long.failed) == ("skipped: no time left", False)
    assert short.outcome == "done"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_a_cpu_build_of_torch_needs_the_stand_in() -> None:
    """Without a GPU the message names the option that needs none."""
    result = CliRunner().invoke(check.main, [])
    assert result.exit_code == 2
    assert "CPU-only build; use --standin" in result.output


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="building the stand-in accelerator needs g++")
def test_the_stand_in_parts_pass(tmp_path: Path) -> None:
    """Every part that needs no GPU runs on the stand-in, whose model runner and pipeline give the same outputs."""
    command = [sys.executable, "-m", "tests.gpu.check", "--standin", "--folder", str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    table: list[dict[str, Any]] = json.loads((tmp_path / "table.json").read_text())
    assert [row["name"] for row in table] == [part.name for part in list_parts(STANDIN_SCALE) if part.where != "gpu"]
    outcomes = {row["name"]: row["outcome"] for row in table}
    assert outcomes["waits of the pipeline"].startswith("clean; each of refill, ")
    assert all(outcome.endswith("differ by 0") for outcome in outcomes.values() if "rows/s" in outcome)
