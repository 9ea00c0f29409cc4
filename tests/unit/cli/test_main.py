"""The command line: results on stdout, all else on stderr, and the exit code."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from distributed import Client

import daskinfer as di
from daskinfer.cli.main import main
from daskinfer.cli.options import check_scheduler
from daskinfer.core import env
from daskinfer.options import list_options
from tests.support.command_line import STAMP, invoke
from tests.support.dask_commands import external_cluster


def test_run_writes_and_reports(folder: Path) -> None:
    """run applies a factory of the working directory and prints the report."""
    done = invoke("run", "cli_nets:linear", "x.npy", "y.zarr", "--devices", "inline")
    assert done.exit_code == 0, done.stderr
    assert "100 rows in" in done.stdout
    assert zarr.open_array("y.zarr", mode="r").shape == (100, 2)


def test_run_again_has_nothing_to_do(folder: Path) -> None:
    """The same command again prints so in one line and ends with 0; --overwrite computes again, --shard a part."""
    how = ("run", "cli_nets:linear", "x.npy", "y.zarr", "--devices", "inline", "--batch-size", "10")
    assert invoke(*how).exit_code == 0
    again = invoke(*how)
    said = "nothing to do: all 100 rows were already done (y.zarr; to check: daskinfer verify y.zarr)\n"
    assert (again.exit_code, again.stdout) == (0, said)
    fresh = invoke(*how, "--overwrite")
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
    Path("scheduler.json").write_text(json.dumps({"address": cluster_client.scheduler.address}))
    for scheduler in (cluster_client.scheduler.address, "scheduler.json"):
        done = invoke("plan", "cli_nets:linear", "x.npy", "--no-probe", "--scheduler", scheduler)
        assert done.exit_code == 0, done.stderr
        assert "cpu:1" in done.stdout


def test_plan_is_a_table_or_json(folder: Path) -> None:
    """plan prints what would run and writes nothing."""
    how = ("--no-probe", "--devices", "cpu*2", "--device-weights", "cpu:0=3,cpu=1", "--batch-size", "5")
    table = invoke("plan", "cli_nets:linear", "x.npy", "y.zarr", *how)
    assert re.search(r"cpu:0 .* 75\.0% ", table.stdout)
    line = invoke("plan", "cli_nets:linear", "x.npy", *how[:3], "--device-weights", "even", "--json")
    assert [d["device"] for d in json.loads(line.stdout)["devices"]] == ["cpu:0", "cpu:1"]
    assert sorted(p.name for p in folder.iterdir() if p.suffix) == ["cli_nets.py", "x.npy"]


def test_devices_is_a_table_or_json() -> None:
    """devices prints this machine's, for people or scripts."""
    assert "cpu:0" in invoke("devices").stdout
    (*_, cpu) = json.loads(invoke("devices", "--json").stdout)["devices"]
    (*_, expected) = di.devices().to_dicts()
    assert cpu == expected | {"uuid": None, "free_nbytes": None}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "cli_nets:linear", "x.npy"], 2, "Missing argument 'OUTPUT'"),
        (["run", "cli_nets:linear", "gone.npy", "y.npy"], 2, r"daskinfer: error: the input .*gone\.npy' does not exist"),
        (["run", "cli_nets:linear", "x.npy", "x.npy"], 2, "is inside the input"),
        (["plan", "cli_nets:linear", "x.npy", "--device-weights", "a,b"], 2, "must be auto, even, or weights"),
        (
            ["plan", "cli_nets:linear", "x.npy", "--batch-size", "huge"],
            2,
            "'--batch-size': must be an integer >= 1, or 'auto', got 'huge'",
        ),
        (["plan", "cli_nets:linear", "a=x.npy,b"], 2, "must be a path or name=path"),
        (["plan", "cli_nets:linear", "x.npy", "--kwargs", "{"], 2, "must be a JSON object"),
        (["plan", "cli_nets:linear", "x.npy", "--kwargs", "[1]"], 2, "must be a JSON object"),
        (["plan", "cli_nets:linear", "x.npy", "--report", "r.txt"], 2, "--report must end in .html, got 'r.txt'"),
        (
            ["run", "cli_nets:linear", "x.npy", "y.npy", "--report", "gone/r.html"],
            2,
            "cannot write the report 'gone/r.html'",
        ),
        (["run", "cli_nets:linear", "x.npy", "y.npy", "--report", "folder.html"], 2, "cannot write the report"),
        (["run", "cli_nets:linear", "x.npy", "y.npy", "--config", "gone.toml"], 2, "cannot read the job file 'gone.toml'"),
        (["plan", "cli_nets:linear", "x.npy", "--dtype", "x=float99"], 2, "float99"),
        (["plan", "cli_nets:linear", "x.npy", "--scheduler", "nonsense"], 2, "neither an existing file nor an address"),
        (["run", "cli_nets:fails", "big.npy", "y.npy", "--devices", "inline"], 1, "ArithmeticError: too large"),
        (
            ["run", "cli_nets:linear", "x.npy", "y.npy", "--shard", "three"],
            2,
            "must be i/n, part i of n counted from 1, such as 3/64, got 'three'",
        ),
        (["run", "cli_nets:linear", "x.npy", "y.npy", "--shard", "0/3"], 2, "counted from 1"),
        (
            ["run", "cli_nets:linear", "x.npy", "y.npy", "--shard", "1/3", "--overwrite"],
            2,
            "--overwrite cannot be combined with --shard 1/3",
        ),
        (["plan", "cli_nets:linear", "x.npy", "--on-error", "ignore"], 2, "'ignore' is not one of 'raise', 'skip'"),
        (
            ["plan", "cli_nets:linear", "x.npy", "--max-failed-rows", "200%"],
            2,
            "'--max-failed-rows': must be an integer >= 0 or a share such as '1%', got '200%'",
        ),
        (["plan", "cli_nets:linear", "x.npy", "--retries", "-1"], 2, "'--retries': must be an integer >= 0, got '-1'"),
        (["plan", "cli_nets:linear", "x.npy", "--devices", "2"], 2, r"'cuda:2' is one GPU, .*'cpu\*2' are two devices"),
        (
            ["plan", "cli_nets:linear", "x.npy", "--wait-for-workers", "2"],
            2,
            "--wait-for-workers 2 needs --scheduler",
        ),
        (
            ["doctor", "--scheduler", "s.json", "--wait-for-workers", "0"],
            2,
            "--wait-for-workers must be an integer >= 1, got 0",
        ),
        (
            ["plan", "cli_nets:linear", "x.npy", "--chunk-timeout", "0"],
            2,
            "'--chunk-timeout': must be a number of seconds > 0, got '0'",
        ),
        (
            ["plan", "cli_nets:linear", "x.npy", "--scheduler", "tls://h:1", "--tls-key", "gone.pem"],
            2,
            "--tls-key must name a file, got 'gone.pem'",
        ),
        (["verify", "x.npy"], 2, "has no manifest"),
        (["demo", "--folder", "."], 2, "'.' holds files that no demo wrote; choose a new folder"),
    ],
)
def test_errors_are_one_line_and_a_code(folder: Path, arguments: list[str], code: int, message: str) -> None:
    """Wrong usage ends with 2, a failed run with 1, each with one line on stderr and nothing on stdout."""
    np.save("big.npy", np.full((10, 5), 9, np.float32))
    (folder / "folder.html").mkdir()
    done = invoke(*arguments)
    assert done.exit_code == code, done.stderr
    assert done.stdout == ""
    assert re.search(message, done.stderr.replace("\n", " ")), done.stderr
    assert "Traceback" not in done.stderr


def test_flags_are_made_from_the_declarations() -> None:
    """Each option that is declared with a flag is one of run, with its default and choices; plan has --probe besides."""
    flags = {parameter.name: parameter for parameter in main.commands["run"].params}
    declared = [option for option in list_options("run") if option.key]
    assert [flags[option.name].opts for option in declared] == [[f"--{option.key}"] for option in declared]
    assert [flags[option.name].default for option in declared] == [option.default for option in declared]
    assert flags["memory_format"].type.choices == ("auto", "contiguous", "channels_last")
    assert flags["pad"].secondary_opts == ["--no-pad"]
    shown = " ".join(invoke("run", "--help").stdout.split())
    assert "Chunks to read ahead for each device while it computes. Between 1 and 6. [default: 1]" in shown
    assert "Value of the rows that --on-error skips." in shown
    assert "``" not in shown
    assert {p.name for p in main.commands["plan"].params} - flags.keys() == {"probe"}


@pytest.mark.parametrize(
    ("old", "value", "new"),
    [("--fresh", [], "--overwrite"), ("--no-fresh", [], "--no-overwrite"), ("--readers", ["2"], "--prefetch")],
)
def test_renamed_flags(folder: Path, old: str, value: list[str], new: str) -> None:
    """An old flag is refused with its new name, as text and as JSON, and the new one, typed in, works."""
    how = ("plan", "cli_nets:linear", "x.npy", "--no-probe", "--devices", "inline")
    done = invoke(*how, old, *value)
    assert (done.exit_code, done.stdout) == (2, "")
    (suggested,) = re.findall(rf"No such option '?{old}'?\. Did you mean '?(--[a-z-]+)'?\?", done.stderr)
    assert suggested == new
    line = json.loads(invoke(*how, "--log-format", "json", old, *value).stderr)
    assert (line["type"], new in line["message"]) == ("NoSuchOption", True)
    assert invoke(*how, suggested, *value).exit_code == 0


def test_debug_before_or_after_the_command(folder: Path) -> None:
    """--debug shows tracebacks and debug lines, -v info lines, before or after the command; the next command begins anew."""
    arguments = ("run", "cli_nets:linear", "gone.npy", "y.npy")
    for done in (invoke("--debug", *arguments), invoke(*arguments, "--debug"), invoke("-v", *arguments, "--debug")):
        assert done.exit_code == 2
        assert "Traceback (most recent call last)" in done.stderr
        assert logging.getLogger("daskinfer.worker").isEnabledFor(logging.DEBUG)
    for done in (invoke("-v", *arguments), invoke(*arguments, "--verbose")):
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert logging.getLogger("daskinfer.worker").getEffectiveLevel() == logging.INFO
    assert invoke(*arguments).stderr.count("\n") == 1
    assert logging.getLogger("daskinfer.worker").getEffectiveLevel() == logging.WARNING


NO_SCHEDULER = [
    ("nofile.json", r"scheduler file 'nofile\.json' does not exist\. Correct the path, or wait .* --wait-for-workers 1\."),
    ("tcp://host", r"scheduler's address 'tcp://host' has no port\. Add it: tcp://host:8786\."),
    ("tls://10.0.0.1/", r"scheduler's address 'tls://10\.0\.0\.1/' has no port\. Add it: tls://10\.0\.0\.1:8786\."),
    ("host", r"scheduler 'host' is neither an existing file nor an address"),
    (".", r"scheduler '\.' is neither an existing file nor an address"),
]


@pytest.mark.parametrize("command", [["run", "m:n", "x.npy", "y.npy"], ["plan", "m:n", "x.npy"], ["doctor"]], ids=" ".join)
def test_a_scheduler_that_cannot_be_there(folder: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    """A scheduler's file that is missing, or an address without a port, is refused before anything is loaded or waits."""
    loaded: list[str] = []
    monkeypatch.setattr("daskinfer.cli.options.log_start", lambda message, progress: loaded.append(message))
    monkeypatch.setattr("daskinfer.cli.doctor.examine", lambda connect: loaded.append("examined"))
    for scheduler, message in NO_SCHEDULER:
        done = invoke(*command, "--scheduler", scheduler)
        assert (done.exit_code, done.stdout, loaded) == (2, "", [])
        assert re.search(f"daskinfer: error: the {message}", done.stderr), done.stderr


@pytest.mark.parametrize(
    "scheduler",
    ["tcp://host:8786", "host:8786", "tls://[fe80::1%eth0]:8786", "ucx://10.0.0.1:1/", "inproc://10.0.0.1/2/3", "here.json"],
)
def test_schedulers_that_may_be_there(folder: Path, scheduler: str) -> None:
    """What Dask could connect to is left to Dask, and so is a file that a command waits for."""
    Path("here.json").touch()
    others = dict.fromkeys(("tls_ca_file", "tls_cert", "tls_key"))
    check_scheduler({"scheduler": scheduler, "wait_for_workers": None, **others})
    check_scheduler({"scheduler": "later.json", "wait_for_workers": 1, **others})


@pytest.mark.slow
def test_a_command_that_waits_for_workers(folder: Path) -> None:
    """Started before its scheduler, the command waits for the scheduler's file and for the given number of workers."""
    arguments = ["run", "cli_nets:linear", "x.npy", "y.npy", "--scheduler", "scheduler.json", "--wait-for-workers", "1"]
    program = str(Path(sys.executable).with_name("daskinfer"))
    with subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stdout is not None
        with external_cluster(folder):
            assert process.wait(120) == 0, process.stderr.read()
        assert "100 rows" in process.stdout.read()


def test_waiting_for_workers_can_be_interrupted(
    cluster_client: Client, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Who does not want to wait any longer leaves no client behind."""
    waited: list[Client] = []

    def interrupted(client: Client, n_workers: int) -> None:
        waited.append(client)
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "wait_for_workers", interrupted)
    address = cluster_client.scheduler.address
    done = invoke("plan", "cli_nets:linear", "x.npy", "--scheduler", address, "--wait-for-workers", "99")
    assert done.exit_code == 130
    assert [client.status for client in waited] == ["closed"]


def test_a_folder_with_an_equals_sign_is_no_port(folder: Path) -> None:
    """A path such as ``…/date=2026-11-27/x.npy`` is one, alone and as a port's."""
    (folder / "date=1").mkdir()
    np.save(folder / "date=1" / "x.npy", np.load("x.npy"))
    for path in (f"{folder}/date=1/x.npy", "./date=1/x.npy", "input=date=1/x.npy"):
        done = invoke("plan", "cli_nets:linear", path, "--no-probe", "--devices", "inline")
        assert done.exit_code == 0, done.stderr


def test_ctrl_c(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends with 130 and one line."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("daskinfer.api.run", interrupted)
    done = invoke("run", "cli_nets:linear", "x.npy", "y.npy")
    assert done.exit_code == 130
    assert re.fullmatch(f"{STAMP} daskinfer: interrupted\n", done.stderr.splitlines(keepends=True)[-1])


def installed(*arguments: str, program: str = "daskinfer", **how: Any) -> subprocess.CompletedProcess[str]:
    """Run the installed command."""
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **how)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cli_nets:linear", "gone.npy", "y.npy"], "gone.npy' does not exist"),
        (["cli_nets:linear", "x.npy", "a=gone/y.npy"], "the output's folder .* does not exist"),
        (["cli_nets:linear", "x.npy", "y.npy", "--devices", "tpu"], "tpu"),
        (["gone.pt2", "x.npy", "y.npy", "--trust-model"], "model file 'gone.pt2' does not exist"),
        (["gone.safetensors", "x.npy", "y.npy", "--factory", "cli_nets:linear"], "'gone.safetensors' does not exist"),
        (["net.safetensors", "x.npy", "y.npy"], "holds only weights, and needs a factory"),
        (["linear", "x.npy", "y.npy"], "model must be a file ending in .*, got 'linear'"),
        (
            ["gone.pt", "gone.npy", "gone/y.npy", "--devices", "tpu"],
            "gone.pt' does not exist.*gone.npy' does not exist.*output's folder .* does not exist.*tpu",
        ),
    ],
)
def test_typos_are_reported_before_torch_is_imported(folder: Path, arguments: list[str], message: str) -> None:
    """Importing torch takes seconds: the model's name, paths and devices are checked before."""
    done = installed("run", *arguments, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 2
    assert re.search(f"daskinfer: error: .*{message}", done.stderr, re.DOTALL)
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


@pytest.mark.slow
def test_a_refusal_of_the_workers_is_reported_once(folder: Path) -> None:
    """What ends a run before its first chunk is the command's last line, and not a line of progress, too."""
    only_here = f"import os\nif {env.DEVICE!r} in os.environ:\n    raise ImportError('only here')\n"
    (folder / "cli_here.py").write_text(only_here + "from cli_nets import linear\n")
    done = installed("run", "cli_here:linear", "x.npy", "y.npy", "--devices", "cpu")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("only here") == 1, done.stderr


def test_stdout_is_the_result_alone(folder: Path) -> None:
    """With --json stdout is the result, whatever the model prints; stderr has progress, from before torch is imported on."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = installed("run", "cli_nets:prints", "x.npy", "y.npy", "--devices", "inline", "--json", env=environment)
    assert (done.returncode, json.loads(done.stdout)["rows"]) == (0, 100)
    assert "printed by the model" in done.stderr
    assert re.search(rf"{STAMP} daskinfer\.progress: cli_nets:prints: 100%, 100 of 100 rows, done after 0:0", done.stderr)
    start = re.search(rf"^{STAMP} daskinfer\.progress: cli_nets:prints: loading torch and the model$", done.stderr, re.M)
    assert start is not None
    assert re.search(r"\| +torch$", done.stderr[start.end() :], re.MULTILINE)
    assert not re.search(r"\| +(torch|zarr)$", done.stderr[: start.start()], re.MULTILINE)
    quiet = installed("run", "cli_nets:linear", "x.npy", "z.npy", "--devices", "inline", "--no-progress")
    assert (quiet.returncode, quiet.stderr) == (0, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_outputs_that_are_closed(folder: Path, closed: str) -> None:
    """A caller who closed stdout or stderr gets the output all the same, and the files that took their place stay intact."""
    program = Path(sys.executable).with_name("daskinfer")
    how = "cli_nets:prints x.npy y.npy --devices inline"
    subprocess.run(["sh", "-c", f'"{program}" run {how} {closed}'], check=True)
    np.testing.assert_array_equal(np.load("y.npy"), np.load("x.npy"))
    assert invoke("verify", "y.npy").exit_code == 0


def test_stderr_as_json(folder: Path) -> None:
    """With --log-format json each line on stderr is an object: when, who, what, how the run stands, how it ended."""
    np.save("big.npy", np.full((10, 5), 9, np.float32))
    how = ("--devices", "inline", "--log-format", "json", "--no-pad", "--retries", "0")
    done = installed("run", "cli_nets:linear", "x.npy", "y.npy", *how, "--json")
    (*_, line) = map(json.loads, done.stderr.splitlines())
    assert (done.returncode, line["logger"], line["level"], line["n_rows"]) == (
        0,
        "daskinfer.progress",
        "INFO",
        100,
    )
    assert (line["n_done"], line["ended"], line["devices"][0]["device"]) == (100, True, "inline")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
    failed = installed("--debug", "run", "cli_nets:fails", "big.npy", "z.npy", *how)
    lines = [json.loads(line) for line in failed.stderr.splitlines()]
    assert (failed.returncode, failed.stdout, lines[-1]["type"], lines[-1]["exit_code"]) == (1, "", "ChunkError", 1)
    assert "ArithmeticError: too large" in lines[-1]["traceback"]


def test_an_output_that_another_run_holds(folder: Path) -> None:
    """An output that another run holds ends the command with 4."""
    Path("y.npy.daskinfer").mkdir()
    with open("y.npy.daskinfer/lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = installed("run", "cli_nets:linear", "x.npy", "y.npy", "--devices", "inline", "--log-format", "json")
    line = json.loads(done.stderr.splitlines()[-1])
    assert (done.returncode, done.stdout, line["type"], line["exit_code"]) == (4, "", "OutputLocked", 4)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            ["--log-format=json", "--shard", "three"],
            "BadParameter",
            "must be i/n, part i of n counted from 1, such as 3/64, got 'three'",
        ),
        (["--unknown", "--log-format", "json"], "NoSuchOption", "No such option"),
        (["--log-format", "json", "--config", "gone.toml"], "OptionError", "cannot read the job file 'gone.toml'"),
    ],
)
def test_wrong_usage_as_json(folder: Path, arguments: list[str], kind: str, message: str) -> None:
    """With --log-format json wrong usage is one JSON line too, and ends with 2."""
    done = invoke("run", "cli_nets:linear", "x.npy", "y.npy", *arguments)
    line = json.loads(done.stderr)
    assert (done.exit_code, done.stdout, line["type"], line["exit_code"]) == (2, "", kind, 2)
    assert message in line["message"]


def test_warnings_and_dask_as_json(folder: Path) -> None:
    """With --log-format json Python's warnings and Dask's own lines are JSON as well."""
    how = ("--devices", "inline", "--log-format", "json", "--no-progress")
    done = installed("run", "cli_nets:warns", "x.npy", "y.npy", *how)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 0, lines
    assert {(line["logger"], line["level"]) for line in lines} == {("py.warnings", "WARNING"), ("distributed", "ERROR")}


def test_a_bar_in_a_terminal(folder: Path) -> None:
    """If stderr is a terminal a bar is drawn there, and lines of the log above it."""
    import pty

    reader, terminal = pty.openpty()
    command = [str(Path(sys.executable).with_name("daskinfer")), "run", "cli_nets:linear", "x.npy", "y.npy", "--progress"]
    with subprocess.Popen(
        [*command, "--devices", "inline"],
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
        env={**os.environ, "TERM": "xterm"},
    ) as run:
        os.close(terminal)
        assert run.stdout is not None
        out, shown = run.stdout.read(), _read_all(reader)
    assert run.returncode == 0
    assert "100 rows in" in out
    assert "100 of 100 rows" in shown
    assert "\x1b[" in shown
    assert "daskinfer.progress" not in shown
    assert shown.startswith("cli_nets:linear: loading torch and the model\r\n")


def _read_all(terminal: int) -> str:
    """Return what was written to a terminal that no process has open any more."""
    found = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(terminal, 1 << 16):
            found += chunk
    os.close(terminal)
    return found.decode()


def test_rows_are_missing(folder: Path) -> None:
    """Rows without an output end the command with 3, with the result, the report and a line that counts them."""
    x = np.load("x.npy")
    x[7] = 9
    np.save("bad.npy", x)
    how = ("--devices", "inline", "--on-error", "skip", "--retries", "0", "--batch-size", "10", "--no-pad", "--no-progress")
    done = invoke("run", "cli_nets:fails", "bad.npy", "y.npy", *how, "--json", "--report", "r.html")
    assert (done.exit_code, json.loads(done.stdout)["failed_rows"]) == (3, [7])
    listed = "y.npy.daskinfer/failed_rows.json"
    message = f"1 rows of y.npy have no output; {listed} lists them. After fixing the cause, use --overwrite to start over"
    assert re.fullmatch(f"{STAMP} daskinfer: {re.escape(message)}\n", done.stderr)
    assert "<html" in Path("r.html").read_text()
    done = invoke("run", "cli_nets:fails", "bad.npy", "z.npy", *how, "--shard", "1/2")
    assert done.exit_code == 3
    assert "once all shards are done z.npy.daskinfer/failed_rows.json lists them" in done.stderr
    assert "remove z.npy and z.npy.daskinfer while no shard runs to start over" in done.stderr


def test_another_version_of_the_model_is_another(folder: Path) -> None:
    """What ``--model-version`` says is what a run that continues goes by."""
    how = ("run", "cli_nets:linear", "x.npy", "y.npy", "--devices", "inline", "--no-progress", "--model-version")
    assert invoke(*how, "1").exit_code == 0
    assert invoke(*how, "1").exit_code == 0
    done = invoke(*how, "2")
    assert done.exit_code == 2
    assert "belongs to a different run: model was" in done.stderr


def test_reports_of_shards_and_of_runs_with_nothing_to_do(folder: Path) -> None:
    """Each shard has a page of its own, and a run that finds everything done leaves the page of the one that did it."""
    how = ("run", "cli_nets:linear", "x.npy", "y.npy", "--devices", "inline", "--no-progress", "--batch-size", "10")
    for shard in ("1/2", "2/2"):
        assert invoke(*how, "--report", "r.html", "--shard", shard).exit_code == 0
    pages = {path.name: path.read_text() for path in folder.glob("*.html")}
    assert pages.keys() == {"r-1-of-2.html", "r-2-of-2.html"}
    again = invoke(*how, "--report", "r.html", "--shard", "1/2")
    assert again.stdout.startswith("nothing to do: all 50 rows were already done (y.npy; to check: daskinfer verify y.npy)")
    assert {path.name: path.read_text() for path in folder.glob("*.html")} == pages


def test_report_is_written_after_a_run_that_was_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--report writes a page, over an older one; a disk that is full then ends with 1, and a run that fails writes none."""
    Path("r.HTML").write_text("older")
    how = ("--devices", "inline", "--no-progress")
    command = ["run", "cli_nets:linear", "x.npy", "y.npy", *how, "--report", "r.HTML"]
    monkeypatch.setattr("sys.argv", ["/opt/bin/daskinfer", *command])
    assert invoke(*command).exit_code == 0
    page = Path("r.HTML").read_text()
    assert f"{' '.join(command)}</code>" in page
    assert all(f"<td>{fact}</td>" in page for fact in ("command", "call", "options", "hosts", "versions"))
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d to .*\(UTC[+-]\d\d:\d\d\)", page)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("daskinfer.diagnostics.report.RunReport.to_html", full)
        done = invoke("run", "cli_nets:linear", "x.npy", "z.npy", *how, "--report", "s.html")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "cannot write the report 's.html': No space left on device; the output itself is stored" in done.stderr
    np.save("big.npy", np.full((10, 5), 9, np.float32))
    assert invoke("run", "cli_nets:fails", "big.npy", "v.npy", *how, "--report", "t.html").exit_code == 1
    assert not Path("t.html").exists()


def test_plan_measures_and_touches_nothing(folder: Path) -> None:
    """plan measures the first rows on every device, tells the time to expect, and what it would do about the output."""
    how = ("cli_nets:linear", "x.npy", "y.npy", "--devices", "inline", "--batch-size", "5")
    new = invoke("plan", *how, "--json")
    found = json.loads(new.stdout)
    assert (new.exit_code, found["notes"]) == (0, [])
    assert found["seconds"] > 0
    assert not list(folder.glob("y.npy*"))
    assert "shard 1 of 2: rows 0:50" in invoke("plan", *how, "--no-probe", "--shard", "1/2").stdout
    assert invoke("run", *how, "--no-progress", "--shard", "1/2").exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    part = invoke("plan", *how, "--shard", "2/2")
    assert re.search(r"resumes .*y\.npy: 50 of 50 rows left, about 0:0\d", part.stdout)
    assert "nothing to do: all 50 rows" in invoke("plan", *how, "--shard", "1/2").stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert invoke("run", *how, "--no-progress", "--shard", "2/2").exit_code == 0
    assert "nothing to do: all 50 rows" in invoke("plan", *how, "--shard", "2/2").stdout
    planned = invoke("plan", *how, "--no-probe", "--overwrite").stdout
    assert re.search(r"overwrites the existing output at .*y\.npy", planned)


def test_plan_counts_rows_that_failed_as_left(folder: Path) -> None:
    """Rows without an output are left for a run that does not skip them, and done for one that does."""
    x = np.load("x.npy")
    x[7] = 9
    np.save("bad.npy", x)
    how = ("cli_nets:fails", "bad.npy", "y.npy", "--devices", "inline", "--retries", "0", "--batch-size", "10", "--no-pad")
    assert invoke("run", *how, "--no-progress", "--on-error", "skip", "--shard", "1/2").exit_code == 3
    again = invoke("plan", *how, "--no-probe", "--shard", "1/2")
    assert re.search(r"resumes .*y\.npy: [1-9]\d? of 50 rows left(, about \d:\d\d)?\n", again.stdout), again
    skipped = invoke("plan", *how, "--no-probe", "--on-error", "skip", "--shard", "1/2")
    assert "nothing to do: all 50 rows" in skipped.stdout


def test_verify_as_json(folder: Path) -> None:
    """verify --json lists what is wrong, and ends with 1 if anything is."""
    assert invoke("run", "cli_nets:linear", "x.npy", "y.npy", "--devices", "inline", "--no-progress").exit_code == 0
    assert re.fullmatch(rf"{STAMP} daskinfer\.progress: y\.npy: reading all of it\n", invoke("verify", "y.npy").stderr)
    whole = invoke("verify", "y.npy", "--json", "--no-progress")
    assert whole.stderr == ""
    assert (whole.exit_code, json.loads(whole.stdout)["wrong"]) == (0, [])
    with open("y.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    changed = invoke("verify", "y.npy", "--json")
    assert (changed.exit_code, len(json.loads(changed.stdout)["wrong"])) == (1, 1)


@pytest.mark.slow
def test_dask_infer_is_the_same_command(folder: Path) -> None:
    """``dask infer`` computes, refuses and ends as ``daskinfer run`` does."""
    assert "MODEL INPUT OUTPUT" in installed("infer", "--help", program="dask").stdout
    arguments = ("cli_nets:linear", "x.npy", "y.npy", "--devices", "inline", "--json", "--no-progress")
    done = installed("infer", *arguments, program="dask")
    assert (done.returncode, json.loads(done.stdout)["rows"], done.stderr) == (0, 100, "")
    again = invoke("run", *arguments)
    assert (again.exit_code, json.loads(again.stdout)["rows_before"]) == (0, 100)
    wrong = ["cli_nets:linear", "x.npy", "y.npy", "--batch-size", "7"]
    one, other = installed("infer", *wrong, program="dask"), invoke("run", *wrong)
    assert (one.returncode, one.stdout) == (2, "")
    assert re.sub(STAMP, "", one.stderr) == re.sub(STAMP, "", other.stderr)


def complete(words: str) -> list[str]:
    """Return what bash offers for the last of these words."""
    environment = {"_DASKINFER_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    return CliRunner(env=environment).invoke(main, prog_name="daskinfer").stdout.split()


def test_completion(folder: Path) -> None:
    """Shells complete commands, options, choices, paths and the devices of this machine, the last of several too."""
    assert complete("daskinfer ver") == ["plain,verify"]
    assert complete("daskinfer run --autocast ") == ["plain,bf16", "plain,fp16"]
    assert complete("daskinfer run --device-w") == ["plain,--device-weights"]
    assert complete("daskinfer run x.sa") == ["file,x.sa"]
    assert complete("daskinfer run m x.n") == ["file,x.n"]
    assert complete("daskinfer run --devices c")[-1] == "plain,cpu"
    assert "plain,cuda,cpu" in complete("daskinfer run --devices cuda,c")
    assert complete("daskinfer run --dtype f") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    """``completion`` prints the script that click makes for a shell, which bash reads without complaint."""
    done = installed("completion", shell)
    asked = installed(env={**os.environ, "_DASKINFER_COMPLETE": f"{shell}_source"})
    assert (done.returncode, done.stdout.strip()) == (0, asked.stdout.strip())
    assert "_DASKINFER_COMPLETE" in done.stdout
    if shell == "bash":
        subprocess.run(["bash", "-euc", done.stdout], check=True)


def test_help_and_version_do_not_wait_for_torch() -> None:
    """--help imports neither torch nor Dask."""
    code = "import sys; from daskinfer.cli.main import main; main(['--help'], standalone_mode=False)"
    code += "; print(sorted(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'torch'" not in shown
    assert "'distributed'" not in shown
    assert invoke("--version").stdout.startswith("daskinfer, version 0.")


@pytest.mark.slow
def test_demo_on_workers(folder: Path) -> None:
    """The installed command shows a right, ordered output, and nothing on stderr."""
    command = [Path(sys.executable).with_name("daskinfer"), "demo", "--rows", "3000", "--devices", "cpu", "--folder", "d"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "same output as the loop, in the same order" in done.stdout
    assert re.search(r"  cpu:0 +100\.0% +3,000 images", done.stdout)
    assert zarr.open_array("d/scores.zarr", mode="r").shape == (3000, 10)
