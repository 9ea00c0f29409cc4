"""Job files: what the command line says goes over the file, the file over the default; and both ways it is the same."""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.command_line import STAMP, invoke

JOB = """
model = "job_nets:linear"
output = "y.npy"
batch_size = 10
devices = ["inline"]
no-progress = true

[input]
input = "x.npy"

[kwargs]
n_out = 3
"""


def printed(*arguments: str) -> dict[str, Any]:
    """The merged configuration."""
    done = invoke("run", *arguments, "--print-config")
    assert done.exit_code == 0, done.stderr
    return tomllib.loads(done.stdout)


@pytest.fixture
def folder(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a folder with a job file, its input and its model the working directory."""
    Path("job.toml").write_text(JOB)
    Path("job_nets.py").write_text("import torch\ndef linear(n_out=2):\n    return torch.nn.Linear(5, n_out)\n")
    np.save("x.npy", np.zeros((100, 5), np.float32))
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield in_folder
    sys.modules.pop("job_nets", None)


def test_a_job_runs_and_is_planned(folder: Path) -> None:
    """run and plan take the same file, each with the keys that only the other has; ports and keywords are tables."""
    Path("job.toml").write_text("probe = false\n" + JOB)
    planned = invoke("plan", "--config", "job.toml", "--json")
    assert (planned.exit_code, json.loads(planned.stdout)["seconds"]) == (0, None)
    done = invoke("run", "--config", "job.toml")
    assert done.exit_code == 0, done.stderr
    assert np.load("y.npy").shape == (100, 3)


def test_flag_over_file_over_default(folder: Path) -> None:
    """What the command line says goes over the file, arguments too, and the file over the defaults."""
    found = printed("--config", "job.toml", "--batch-size", "5", "--no-overwrite", "other:net")
    assert (found["batch-size"], found["model"], found["kwargs"]) == (5, "other:net", {"n_out": 3})
    assert (found["retries"], found["progress"]) == (2, False)
    assert printed("--config", "job.toml", "--progress")["progress"] is True
    assert printed("--config", "job.toml")["pad"] is True
    Path("job.toml").write_text("no_pad = true\noverwrite = true\n" + JOB)
    assert printed("--config", "job.toml")["pad"] is False
    assert printed("--config", "job.toml", "--pad", "--no-overwrite")["pad"] is True
    assert printed("--config", "job.toml", "--no-overwrite")["overwrite"] is False


def test_print_config_starts_nothing(folder: Path) -> None:
    """--print-config ends with 0 before anything is looked at, also of what would be refused; plan has it too."""
    assert printed("--config", "job.toml", "gone:net", "gone.npy")["input"] == "gone.npy"
    assert tomllib.loads(invoke("plan", "m", "x.npy", "--print-config").stdout)["probe"] is True


def test_log_format_of_the_file(folder: Path) -> None:
    """A file may choose how errors are printed; a flag goes over it."""
    Path("job.toml").write_text('log-format = "json"\n' + JOB.replace("x.npy", "gone.npy"))
    assert json.loads(invoke("run", "--config", "job.toml").stderr)["exit_code"] == 2
    assert " daskinfer: error: the input" in invoke("run", "--config", "job.toml", "--log-format", "text").stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize = 3", "unknown key 'batchsize' in {file}; did you mean 'batch-size'\\?"),
        ("zzzzz = 3", "unknown key 'zzzzz' in {file}; `daskinfer run --help` lists them"),
        (
            "num_workers = 3",
            "unknown key 'num_workers' in {file}; devices sets the number of workers, as in devices = 'cpu\\*2'",
        ),
        ("preprocess = 3", "unknown key 'preprocess' in {file}; it takes an object of Python"),
        ("[run]\nretries = 3", "unknown key 'run' in {file}; write the keys of this table at the top of the file"),
        ('config = "other.toml"', "unknown key 'config' in {file}"),
        ("readers = 3", "unknown key 'readers' in {file}; did you mean 'prefetch'\\?"),
        ("fresh = true", "unknown key 'fresh' in {file}; did you mean 'overwrite'\\?"),
        ("no_fresh = true", "unknown key 'no_fresh' in {file}; did you mean 'no-overwrite'\\?"),
        (
            "batch_size = 1\nbatch-size = 1",
            "{file} sets one option twice, as 'batch_size' and 'batch-size'. Remove one of them",
        ),
        ("pad = true\nno-pad = true", "{file} sets one option twice, as 'pad' and 'no-pad'"),
        ('overwrite = "yes"', "overwrite in {file}: must be true or false, got 'yes'"),
        ("retries = true", "retries in {file}: must be a whole number, got true"),
        ("retries = 1.5", "retries in {file}: must be a whole number, got 1.5"),
        ('chunk-timeout = "1"', "chunk-timeout in {file}: must be a number, got '1'"),
        ("factory = 3", "factory in {file}: must be text, got 3"),
        ("report = 3", "report in {file}: must be text, got 3"),
        ('on-error = "ignore"', "on-error in {file}: 'ignore' is not one of 'raise', 'skip'"),
        ("on-error = 1", "on-error in {file}: must be text, got 1"),
        ("shard = [0.5, 3]", r"shard in {file}: must be i/n, part i of n counted from 1, such as 3/64, got \[0.5, 3\]"),
        ("shard = [0, 4]", r"shard in {file}: must be i/n, .* such as 3/64, got \[0, 4\]"),
        ('shard = "5/4"', "shard in {file}: must be i/n, .* such as 3/64, got '5/4'"),
        ("retries = -1", "retries in {file}: must be an integer >= 0, got -1"),
        ("prefetch = 7", "prefetch in {file}: must be an integer between 1 and 6, got 7"),
        ("batch-size = 0", "batch-size in {file}: must be an integer >= 1, or 'auto', got 0"),
        ('max-failed-rows = "1.5"', "max-failed-rows in {file}: must be an integer >= 0 or a share such as '1%', got '1.5'"),
        ("chunk-timeout = 0", "chunk-timeout in {file}: must be a number of seconds > 0, got 0"),
        ("devices = 2", r"devices in {file}: must name devices, got 2: 'cuda:2' is one GPU, .*'cpu\*2' are two devices"),
        ("devices = [0, 1]", r"devices in {file}: must name devices, got \[0, 1\]: 'cuda:0' is one GPU"),
        ("devices = [true]", r"devices in {file}: must be text, or a list of texts, got \[true\]"),
        ("shard = 3", "shard in {file}: must be text such as '3/64', or a list of two numbers, got 3"),
        ("device-weights = [[1]]", "device-weights in {file}: must be auto, even, or weights such as 1,1,8 or cuda=8,cpu=1"),
        ('kwargs = "3"', "kwargs in {file}: must be a JSON object, got '3'"),
        ("input = 3", "input in {file}: must be a path, or a table of paths by port, got 3"),
        ("input = {}", "input in {file}: must be a path or name=path,name=path, got {{}}"),
        ("input = {a = 1}", "input in {file}: must be a path or name=path,name=path"),
        (r'model = "\u0000"', "model in {file}: embedded null"),
        ("model =", "{file} is not valid TOML: "),
    ],
)
def test_files_that_are_refused(folder: Path, text: str, message: str) -> None:
    """A key or a value that is not of the command is one line, exit code 2, before anything starts."""
    Path("job.toml").write_text(text)
    done = invoke("run", "m:n", "x.npy", "y.npy", "--config", "job.toml")
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    pattern = message.replace("{file}", "the job file 'job.toml'").replace("{{}}", "{}")
    assert re.search(f"^{STAMP} daskinfer: error: {pattern}", done.stderr), done.stderr
    assert not Path("y.npy").exists()


@pytest.mark.parametrize(("old", "new"), [("readers = 2", "prefetch = 2"), ("fresh = true", "overwrite = true")])
def test_the_suggested_key_works(folder: Path, old: str, new: str) -> None:
    """The key that an error suggests for an old one, put in its place, is accepted."""
    Path("job.toml").write_text(f"{old}\n{JOB}")
    (suggested,) = re.findall("did you mean '(.*)'\\?", invoke("run", "--config", "job.toml").stderr)
    text = old.replace(old.split()[0], suggested)
    Path("job.toml").write_text(f"{text}\n{JOB}")
    assert text == new
    assert invoke("run", "--config", "job.toml").exit_code == 0


FAULTY = """
model = "w.safetensors"
input = "gone.npy"
output = "gone/y.npy"
batchsize = 3
retries = -1
overwrite = "yes"
devices = "tpu"
shard = [0, 4]
"""
FAULTS = [
    r"unknown key 'batchsize' in the job file 'job\.toml'; did you mean 'batch-size'\?",
    r"retries in the job file 'job\.toml': must be an integer >= 0, got -1",
    r"overwrite in the job file 'job\.toml': must be true or false, got 'yes'",
    r"shard in the job file 'job\.toml': must be i/n, .*, got \[0, 4\]",
    r"w\.safetensors holds only weights, and needs a factory to make their model\. Pass --factory pkg\.mod:make\.",
    r"the input '.*gone\.npy' does not exist\. .*",
    r"the output's folder '.*gone' does not exist\. .*",
    r"unknown device 'tpu'; .*",
]


@pytest.mark.parametrize("command", ["run", "plan"])
def test_all_faults_at_once(folder: Path, command: str) -> None:
    """Keys, types, values, paths and devices that are wrong are told together, a line each, before torch is loaded."""
    Path("job.toml").write_text(FAULTY)
    done = invoke(command, "--config", "job.toml")
    first, *lines = done.stderr.splitlines()
    assert (done.exit_code, done.stdout) == (2, "")
    assert re.fullmatch(f"{STAMP} daskinfer: error: invalid plan, {len(FAULTS)} problems:", first)
    for number, (line, fault) in enumerate(zip(lines, FAULTS, strict=True), 1):
        assert re.fullmatch(f"  {number}\\. {fault}", line), line
    assert not re.search(r"\.\.(\s|$)|=True|Model\(", done.stderr)


def test_faults_of_the_file_and_of_the_command_line(folder: Path) -> None:
    """An argument that neither gives is told with the file's faults, but not one that is wrong in the file."""
    Path("job.toml").write_text("retires = 3\npad = 1\n")
    done = invoke("run", "--config", "job.toml", "m:n")
    assert re.findall(r"  \d\. (\w+ \w+)", done.stderr) == ["unknown key", "pad in", "Missing argument"]
    Path("job.toml").write_text("retires = 3\nmodel = 1\n")
    done = invoke("run", "--config", "job.toml")
    assert re.findall(r"  \d\. (\w+ \w+)", done.stderr) == ["unknown key", "model in"]
    assert "unknown key 'retires'" in invoke("run", "m:n", "x.npy", "y.npy", "--config", "job.toml", "--print-config").stderr


def test_a_faulty_file_still_chooses_the_output(folder: Path) -> None:
    """What a file says about JSON holds for its own faults too."""
    Path("job.toml").write_text('json = true\nlog-format = "json"\nretires = 3\npad = 1\n')
    done = invoke("run", "m:n", "x.npy", "y.npy", "--config", "job.toml")
    assert len(json.loads(done.stdout)["error"]["reasons"]) == 2
    assert json.loads(done.stderr)["exit_code"] == 2


def test_files_that_are_not_text(folder: Path) -> None:
    """A file of other bytes is refused as one that is missing is, and so is a folder."""
    Path("job.toml").write_bytes(b"\xff\xfe")
    assert "is not valid TOML" in invoke("run", "--config", "job.toml").stderr
    assert "cannot read the job file '.': Is a directory" in invoke("run", "--config", ".").stderr


def test_what_toml_cannot_say(folder: Path) -> None:
    """A null in --kwargs is an error of --print-config, which names it."""
    done = invoke("run", "m", "x.npy", "y.npy", "--kwargs", '{"a": null}', "--print-config")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Leave the null out of --kwargs" in done.stderr


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="=,\0"), min_size=1)
NAMES = WORDS.filter(lambda word: not re.fullmatch("[0-9]+", word))
NUMBERS = st.floats(0, 1e9)
TABLES = st.dictionaries(WORDS, WORDS, min_size=1)
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
JOBS = st.fixed_dictionaries(
    {"model": WORDS, "input": WORDS | TABLES, "output": WORDS | TABLES},
    optional={
        "devices": NAMES | st.lists(NAMES, min_size=1),
        "device-weights": st.sampled_from(["auto", "even"])
        | st.lists(NUMBERS, min_size=1)
        | st.dictionaries(WORDS, NUMBERS),
        "batch-size": st.integers(1, 1 << 40) | st.just("auto"),
        "factory": WORDS,
        "kwargs": st.dictionaries(WORDS, VALUES, max_size=3),
        "dtype": WORDS | TABLES,
        "prefetch": st.integers(1, 6),
        "on-error": st.sampled_from(["raise", "skip"]),
        "fill-value": st.floats(allow_nan=False),
        "max-failed-rows": st.integers(0) | st.just("1%"),
        "chunk-timeout": st.floats(0, 1e9, exclude_min=True),
        "autocast": st.sampled_from(["bf16", "fp16"]),
        "pad": st.booleans(),
        "overwrite": st.booleans(),
        "trust-model": st.booleans(),
        "progress": st.booleans(),
        "json": st.booleans(),
        "shard": st.lists(st.integers(1, 99), min_size=2, max_size=2).map(sorted),
        "report": WORDS,
        "scheduler": WORDS,
    },
)


@settings(max_examples=60, deadline=None)
@given(job=JOBS)
def test_what_is_printed_reads_back(job: dict[str, Any]) -> None:
    """--print-config says what the file says, and read as a file says the same again, to the letter."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first.toml"), Path(folder, "second.toml")
        first.write_text(tomli_w.dumps(job), "utf-8", newline="")
        once = invoke("run", "--config", str(first), "--print-config")
        assert once.exit_code == 0, once.stderr
        second.write_text(once.stdout, "utf-8", newline="")
        assert invoke("run", "--config", str(second), "--print-config").stdout == once.stdout
    found = tomllib.loads(once.stdout)
    assert {key: found.get(key) for key in job} == job
    assert found["retries"] == 2


def test_numbers_that_are_none(folder: Path) -> None:
    """NaN and infinity are numbers of TOML."""
    Path("job.toml").write_text("fill-value = nan\n" + JOB)
    assert math.isnan(printed("--config", "job.toml")["fill-value"])
