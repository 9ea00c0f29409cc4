"""``--json``: one object of a known shape on stdout, in every outcome of every command."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from daskinfer.cli.checks import OK, WRONG, Finding
from daskinfer.cli.exit_codes import EXIT_CODES
from daskinfer.cli.main import __doc__ as documentation
from daskinfer.cli.result import SCHEMA, STATUSES
from daskinfer.errors import ClusterError, Interrupted
from tests.support.command_line import invoke

ROWS = {"type": "integer", "minimum": 0}
TEXT = {"type": "string"}
TEXTS = {"type": "array", "items": TEXT}
NUMBER = {"type": "number", "minimum": 0}


def make_record(**fields: Any) -> dict[str, Any]:
    """Return the schema of an object that has these fields, and maybe others."""
    return {"type": "object", "properties": fields, "required": list(fields)}


def allow_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a value that may be unknown."""
    return {"anyOf": [schema, {"type": "null"}]}


RESULTS = {
    "run": make_record(
        rows=ROWS,
        seconds=NUMBER,
        start_seconds=NUMBER,
        rows_per_second=NUMBER,
        batch_size=ROWS,
        rows_before=ROWS,
        failed_rows={"type": "array", "items": ROWS},
        failures={"type": "array", "items": make_record(start=ROWS, stop=ROWS)},
        by_kind={"type": "object", "additionalProperties": ROWS},
        n_retried=ROWS,
        verdict=TEXT,
        facts=make_record(model=TEXT, input=TEXT, output=TEXT, versions=TEXT, machine=TEXT, stored_in=TEXT)
        | {"additionalProperties": TEXT},
        devices={"type": "array", "minItems": 1, "items": make_record(device=TEXT, n_rows=ROWS, n_chunks=ROWS)},
        output_paths=TEXTS | {"minItems": 1},
    ),
    "plan": make_record(
        model=TEXT,
        inputs=TEXTS,
        outputs=TEXTS,
        n_rows=ROWS,
        batch_size=ROWS,
        devices={"type": "array", "minItems": 1, "items": make_record(device=TEXT, share=NUMBER, n_rows=ROWS)},
        chunks={"type": "array", "items": {"type": "array", "items": ROWS, "minItems": 3, "maxItems": 3}},
        seconds=allow_null(NUMBER),
        notes=TEXTS,
        output_paths=TEXTS,
    ),
    "verify": make_record(output_path=TEXT, n_rows=ROWS, n_parts=ROWS, nbytes=ROWS, n_failed=ROWS, wrong=TEXTS),
    "devices": make_record(
        devices={
            "type": "array",
            "minItems": 1,
            "items": make_record(
                name=TEXT,
                kind={"enum": ["cpu", "cuda"]},
                index=ROWS,
                label=TEXT,
                uuid=allow_null(TEXT),
                memory_nbytes=allow_null({"type": "integer", "exclusiveMinimum": 0}),
                free_nbytes=allow_null({"type": "integer", "exclusiveMinimum": 0}),
            ),
        }
    ),
    "doctor": make_record(
        healthy={"type": "boolean"},
        findings={
            "type": "array",
            "items": make_record(
                what=TEXT, state={"enum": ["ok", "warning", "wrong", "unknown"]}, found=TEXT, cure=TEXT, where=TEXT
            ),
        },
    ),
}
ERROR = make_record(type=TEXT, message=TEXT, reasons=TEXTS | {"minItems": 1})
OUTCOMES = [{"properties": {"status": {"const": s}, "exit_code": {"const": c}}} for c, s in STATUSES.items()]
SNAKE_CASE = {
    "type": ["object", "array", "string", "number", "boolean", "null"],
    "propertyNames": {"pattern": "^[a-z][a-z0-9_]*$"},
    "additionalProperties": {"$ref": "#/$defs/any"},
    "items": {"$ref": "#/$defs/any"},
}


def make_schema(command: str) -> dict[str, Any]:
    """Return the schema of what a command prints: a result, or an error and nothing else."""
    head = make_record(schema={"const": 1}, command={"const": command}, status=TEXT, exit_code=ROWS, error=allow_null(ERROR))
    failed = {"properties": {"error": ERROR}, "maxProperties": len(head["required"])}
    done = {"properties": {"error": {"type": "null"}}, "allOf": [RESULTS[command]]}
    return {
        "$defs": {"any": SNAKE_CASE},
        "allOf": [head, {"oneOf": OUTCOMES}, {"oneOf": [done, failed]}, {"$ref": "#/$defs/any"}],
    }


def iter_texts(value: Any) -> Iterator[str]:
    """Yield every text within a JSON value."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from iter_texts(inner)
    elif isinstance(value, str):
        yield value


def reject_constant(name: str) -> None:
    """Fail on what Python's JSON has besides JSON's numbers."""
    pytest.fail(f"{name} is no number of JSON")


def check(*arguments: str, code: int) -> dict[str, Any]:
    """Run a command with --json; return the one object on stdout, which fits the schema and the exit code."""
    done = invoke(*arguments, "--json")
    assert done.exit_code == code, done.stderr
    assert done.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(done.stdout, parse_constant=reject_constant)
    jsonschema.validate(found, make_schema(arguments[0]), cls=jsonschema.Draft202012Validator)
    assert (found["exit_code"], found["status"]) == (code, STATUSES[code])
    assert not [text for text in iter_texts(found) if "{'" in text]
    if found["error"] is not None:
        assert found["error"]["message"].splitlines()[0] in done.stderr
    return found


RUN = ("run", "cli_nets:linear", "x.npy", "y.npy", "--devices", "inline", "--batch-size", "10", "--no-progress")


def raise_error(error: BaseException) -> Callable[..., None]:
    """Return a function that raises an error, whatever its arguments."""

    def raise_it(*_: Any, **__: Any) -> None:
        raise error

    return raise_it


def test_the_schema_is_the_documented_one() -> None:
    """Its number, statuses and exit codes are those that the command documents; a schema refuses what does not fit."""
    assert SCHEMA == 1
    assert STATUSES.keys() == EXIT_CODES.keys()
    for code, status in STATUSES.items():
        assert re.search(rf"^{code} +{status} ", documentation, re.MULTILINE)
    for command in RESULTS:
        assert re.search(rf"^{command} +", documentation, re.MULTILINE)
    good = {"schema": 1, "command": "doctor", "status": "done", "exit_code": 0, "error": None, "healthy": True}
    jsonschema.validate(good | {"findings": []}, make_schema("doctor"))
    for wrong in (good, good | {"findings": [], "a key": 1}, good | {"findings": [], "status": "failed"}):
        assert not jsonschema.Draft202012Validator(make_schema("doctor")).is_valid(wrong)


def test_outcomes_of_run(folder: Path) -> None:
    """A run that is done, done already, lacks rows, fails, is refused, or finds its output locked."""
    done = check(*RUN, code=0)
    assert (done["rows"], done["output_paths"]) == (100, [str(folder / "y.npy")])
    assert done["facts"]["stored_in"] == str(folder / "y.npy")
    again = check(*RUN, code=0)
    assert (again["rows"], again["rows_before"]) == (0, 100)
    x = np.load("x.npy")
    x[7] = 9
    np.save("bad.npy", x)
    how = ("run", "cli_nets:fails", "bad.npy", "z.npy", *RUN[4:], "--retries", "0", "--no-pad")
    assert "ArithmeticError" in check(*how, code=1)["error"]["message"]
    missing = check(*how, "--on-error", "skip", code=3)
    assert (missing["failed_rows"], missing["error"]) == ([7], None)
    refused = check(*RUN[:2], "gone.npy", "gone/y.npy", code=2)["error"]
    assert (refused["type"], len(refused["reasons"])) == ("PlanError", 2)
    assert check(*RUN, "--batch-size", "huge", code=2)["error"]["type"] == "BadParameter"
    assert check(*RUN, "--unknown", code=2)["error"]["type"] == "NoSuchOption"
    assert check(*RUN[:3], code=2)["error"]["type"] == "MissingParameter"
    assert check(*RUN, "--config", "gone.toml", code=2)["error"]["reasons"] == [
        "cannot read the job file 'gone.toml': No such file or directory. Name an existing TOML file."
    ]
    Path("v.npy.daskinfer").mkdir()
    with open("v.npy.daskinfer/lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert check(*RUN[:3], "v.npy", *RUN[4:], code=4)["error"]["type"] == "OutputLocked"


@pytest.mark.parametrize("command", ["run", "plan"])
def test_interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Ctrl-C and SIGTERM end with an object too, and so does what nobody expected."""
    for error, code in [
        (KeyboardInterrupt(), 130),
        (Interrupted("Ctrl-C ended it.", signal.SIGINT), 130),
        (Interrupted("SIGTERM ended it.", signal.SIGTERM), 143),
        (ClusterError("no workers"), 1),
        (ZeroDivisionError("by zero"), 1),
    ]:
        monkeypatch.setattr(f"daskinfer.api.{command}", raise_error(error))
        assert check(command, *RUN[1:], code=code)["error"]["type"] == type(error).__name__


def test_outcomes_of_plan(folder: Path) -> None:
    """A plan with and without an output, and one that is refused."""
    how = ("plan", "cli_nets:linear", "x.npy", "--devices", "cpu*2", "--no-probe", "--no-progress")
    found = check(*how, code=0)
    assert (found["seconds"], found["output_paths"], len(found["devices"])) == (None, [], 2)
    assert check(*how[:3], "y.npy", *how[3:], code=0)["output_paths"] == [str(folder / "y.npy")]
    assert check(*how, "--scheduler", "nofile.json", code=2)["error"]["type"] == "OptionError"


def test_outcomes_of_verify(folder: Path) -> None:
    """An output that is as it was written, one that is not, and one that never was."""
    assert invoke(*RUN).exit_code == 0
    assert check("verify", "y.npy", code=0)["wrong"] == []
    with open("y.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    changed = check("verify", "y.npy", code=1)
    assert (len(changed["wrong"]), changed["error"], changed["n_rows"]) == (1, None, 100)
    assert check("verify", "x.npy", code=2)["error"]["type"] == "InputError"


def test_outcomes_of_devices_and_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The devices, a machine that is well, one that is not, and wrong usage."""
    assert check("devices", code=0)["devices"][-1]["name"] == "cpu:0"
    assert check("devices", "--unknown", code=2)["error"]["type"] == "NoSuchOption"
    for state, code in ((OK, 0), (WRONG, 1)):
        findings = [Finding("a small run", state, "it ran", "fix it", where="tcp://w")]
        monkeypatch.setattr("daskinfer.cli.doctor.examine", lambda connect, findings=findings: iter(findings))
        assert check("doctor", code=code)["healthy"] == (state == OK)
    assert check("doctor", "--wait-for-workers", "1", code=2)["error"]["type"] == "OptionError"


def test_the_last_switch_counts(folder: Path) -> None:
    """--no-json after --json, or over a job file, prints no object when the command is refused."""
    assert invoke("verify", "x.npy", "--json", "--no-json").stdout == ""
    Path("job.toml").write_text("json = true\n")
    assert invoke("run", "m:n", "gone.npy", "y.npy", "--config", "job.toml", "--no-json").stdout == ""
    assert json.loads(invoke("run", "m:n", "gone.npy", "y.npy", "--config", "job.toml").stdout)["status"] == "refused"
