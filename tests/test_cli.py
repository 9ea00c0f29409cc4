"""The command line: results on stdout, all else on stderr, and the exit code."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner, Result
from distributed import Client

import daskinfer as di
from daskinfer.cli import main

FACTORY = """
import torch

def linear(n_out=2):
    torch.manual_seed(0)
    return torch.nn.Linear(5, n_out)

def two_ports():
    class Net(torch.nn.Module):
        def forward(self, a, b):
            return {"sum": a + b, "difference": a - b}
    return Net()

def fails():
    class Net(torch.nn.Module):
        def forward(self, x):
            if x.max() > 5:
                raise ArithmeticError("too large")
            return x
    return Net()
"""


@pytest.fixture
def folder(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with inputs and a module of factories, which is the working directory."""
    (in_folder / "cli_nets.py").write_text(FACTORY)
    np.save("x.npy", np.arange(500, dtype=np.float32).reshape(100, 5) / 500)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield in_folder
    sys.modules.pop("cli_nets", None)


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """The command sets up the log of its process: undo it here."""
    logger = logging.getLogger("daskinfer")
    level, handlers = logger.level, logger.handlers[:]
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


def invoke(*arguments: str) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(main, arguments)


def test_run_writes_and_reports(folder: Path) -> None:
    """run applies a factory of the working directory and prints the report."""
    done = invoke("run", "cli_nets:linear", "x.npy", "y.zarr", "--devices", "inline")
    assert done.exit_code == 0, done.stderr
    assert "100 rows in" in done.stdout
    assert zarr.open_array("y.zarr", mode="r").shape == (100, 2)


def test_run_again_has_nothing_to_do(folder: Path) -> None:
    """The same command again prints so and ends with 0; --fresh computes again, --shard a part."""
    how = ("run", "cli_nets:linear", "x.npy", "y.zarr", "--devices", "inline", "--batch-size", "10")
    assert invoke(*how).exit_code == 0
    again = invoke(*how)
    assert (again.exit_code, "nothing to do: all 100 rows were done before" in again.stdout) == (0, True)
    fresh = invoke(*how, "--fresh")
    assert (fresh.exit_code, "100 rows in" in fresh.stdout) == (0, True)
    part = invoke(*how[:3], "z.npy", *how[4:], "--shard", "1/2", "--json")
    assert json.loads(part.stdout)["rows"] == 50
    assert invoke("verify", "y.zarr").exit_code == 0


def test_run_prints_one_line_of_json(folder: Path) -> None:
    """--json prints the report as one line for scripts."""
    done = invoke("run", "cli_nets:linear", "x.npy", "y.npy", "--devices", "inline", "--json")
    assert json.loads(done.stdout)["rows"] == 100
    assert done.stdout.count("\n") == 1


def test_weights_file_with_factory_and_keywords(folder: Path) -> None:
    """Weights are loaded into what the factory makes of the keywords."""
    from safetensors.torch import save_file

    net = torch.nn.Linear(5, 3)
    save_file(net.state_dict(), "w.safetensors")
    how = ("--factory", "cli_nets:linear", "--kwargs", '{"n_out": 3}', "--devices", "inline", "--batch-size", "10")
    assert invoke("run", "w.safetensors", "x.npy", "y.npy", *how).exit_code == 0
    np.testing.assert_allclose(np.load("y.npy"), net(torch.from_numpy(np.load("x.npy"))).detach(), rtol=1e-5, atol=1e-6)


def test_named_ports_and_outputs(folder: Path) -> None:
    """Ports and outputs are named as name=path."""
    done = invoke(
        "run", "cli_nets:two_ports", "a=x.npy,b=x.npy", "sum=s.npy,difference=d.zarr", "--devices", "inline", "--no-pad"
    )
    assert done.exit_code == 0, done.stderr
    np.testing.assert_allclose(np.load("s.npy"), 2 * np.load("x.npy"))


def test_scheduler_by_address_and_by_file(folder: Path, cluster_client: Client) -> None:
    """--scheduler uses a running cluster, named by its address or by a scheduler file."""
    Path("scheduler.json").write_text(json.dumps(cluster_client.scheduler_info()))
    for scheduler in (cluster_client.scheduler.address, "scheduler.json"):
        done = invoke("plan", "cli_nets:linear", "x.npy", "--scheduler", scheduler)
        assert done.exit_code == 0, done.stderr
        assert "cpu:1" in done.stdout


def test_plan_is_a_table_or_json(folder: Path) -> None:
    """plan prints what would run and writes nothing."""
    how = ("--devices", "cpu*2", "--device-weights", "cpu:0=3,cpu=1", "--batch-size", "5")
    table = invoke("plan", "cli_nets:linear", "x.npy", "y.zarr", *how)
    assert re.search(r"cpu:0 .* 75\.0% ", table.stdout)
    line = invoke("plan", "cli_nets:linear", "x.npy", "--devices", "cpu*2", "--device-weights", "even", "--json")
    assert [d["device"] for d in json.loads(line.stdout)["devices"]] == ["cpu:0", "cpu:1"]
    assert sorted(p.name for p in folder.iterdir() if p.suffix) == ["cli_nets.py", "x.npy"]


def test_devices_is_a_table_or_json() -> None:
    """devices prints this machine's, for people or scripts."""
    assert "cpu:0" in invoke("devices").stdout
    assert json.loads(invoke("devices", "--json").stdout) == di.devices().to_dicts()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "cli_nets:linear", "x.npy"], 2, "Missing argument 'OUTPUT'"),
        (["run", "cli_nets:linear", "gone.npy", "y.npy"], 2, r"daskinfer: error: the input .*gone\.npy' does not exist"),
        (["run", "cli_nets:linear", "x.npy", "x.npy"], 2, "lies inside the input"),
        (["plan", "cli_nets:linear", "x.npy", "--device-weights", "a,b"], 2, "neither auto, even"),
        (["plan", "cli_nets:linear", "x.npy", "--batch-size", "huge"], 2, "batch_size is 'huge'"),
        (["plan", "cli_nets:linear", "a=x.npy,b"], 2, "neither a path nor name=path"),
        (["plan", "cli_nets:linear", "x.npy", "--kwargs", "{"], 2, "no JSON object"),
        (["plan", "cli_nets:linear", "x.npy", "--dtype", "x=float99"], 2, "float99"),
        (["plan", "cli_nets:linear", "x.npy", "--scheduler", "nonsense"], 1, "cannot be reached"),
        (["run", "cli_nets:fails", "big.npy", "y.npy", "--devices", "inline"], 1, "ArithmeticError: too large"),
        (["run", "cli_nets:linear", "x.npy", "y.npy", "--shard", "three"], 2, "'three' is no part such as 3/64"),
        (["run", "cli_nets:linear", "x.npy", "y.npy", "--shard", "0/3"], 2, "counted from 1"),
        (["plan", "cli_nets:linear", "x.npy", "--on-error", "ignore"], 2, "'ignore' is not one of 'raise', 'skip'"),
        (["plan", "cli_nets:linear", "x.npy", "--max-failed-rows", "200%"], 2, "max_failed_rows is '200%'"),
        (["plan", "cli_nets:linear", "x.npy", "--retries", "-1"], 2, "retries is -1"),
        (["plan", "cli_nets:linear", "x.npy", "--chunk-timeout", "0"], 2, r"chunk_timeout is 0\.0"),
        (["verify", "x.npy"], 2, "has no manifest"),
        (["demo", "--folder", "."], 2, "a new folder is needed"),
    ],
)
def test_errors_are_one_line_and_a_code(folder: Path, arguments: list[str], code: int, said: str) -> None:
    """Wrong usage ends with 2, a failed run with 1, each with one line on stderr and nothing on stdout."""
    np.save("big.npy", np.full((10, 5), 9, np.float32))
    done = invoke(*arguments)
    assert done.exit_code == code, done.stderr
    assert done.stdout == ""
    assert re.search(said, done.stderr.replace("\n", " ")), done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(folder: Path) -> None:
    """--debug shows the whole traceback, and debug lines of the log."""
    done = invoke("--debug", "run", "cli_nets:linear", "gone.npy", "y.npy")
    assert done.exit_code == 2
    assert "Traceback (most recent call last)" in done.stderr


def test_ctrl_c(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends with 130 and one line."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("daskinfer.api.run", interrupted)
    done = invoke("run", "cli_nets:linear", "x.npy", "y.npy")
    assert (done.exit_code, done.stderr) == (130, "daskinfer: interrupted\n")


def test_help_and_version_do_not_wait_for_torch() -> None:
    """--help imports neither torch nor Dask."""
    code = "import sys; from daskinfer.cli import main; main(['--help'], standalone_mode=False); print(sorted(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'torch'" not in shown
    assert "'distributed'" not in shown
    assert invoke("--version").stdout.startswith("daskinfer, version 0.")


def test_demo_on_workers(folder: Path) -> None:
    """The installed command shows a right, ordered answer, and leaves stderr to what went wrong: nothing."""
    command = [Path(sys.executable).with_name("daskinfer"), "demo", "--rows", "3000", "--devices", "cpu", "--folder", "d"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the answer equals a plain torch loop's, in the same order" in done.stdout
    assert "accuracy        97." in done.stdout
    assert zarr.open_array("d/scores.zarr", mode="r").shape == (3000, 10)


def test_demo_in_a_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without --folder the demo makes a temporary one and says where the answers lie."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = invoke("demo", "--rows", "500", "--devices", "inline")
    assert done.exit_code == 0, done.stderr
    (made,) = tmp_path.iterdir()
    assert f"the answers     {made / 'scores.zarr'}" in done.stdout
