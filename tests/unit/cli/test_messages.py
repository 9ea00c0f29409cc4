"""The command tells errors in its own words."""

from __future__ import annotations

import pytest

from daskinfer.cli.messages import describe_error, list_reasons, use_flags
from daskinfer.errors import InputError, OptionError, PlanError

SPELLINGS = [
    ("Pass dtype='float32' (--dtype).", "Pass --dtype float32."),
    ("pass trust=True (--trust-model); otherwise load only weights", "pass --trust-model; otherwise load only weights"),
    ("skip failing rows with on_error='skip' (--on-error).", "skip failing rows with --on-error skip."),
    ("Raise chunk_timeout (--chunk-timeout), or", "Raise --chunk-timeout, or"),
    ("Use a smaller batch_size (--batch-size), or", "Use a smaller --batch-size, or"),
    ("Pass for example fill_value=0 (--fill-value 0).", "Pass for example --fill-value 0."),
    ("correct sha256= (--model-sha256) if you passed it", "correct --model-sha256 if you passed it"),
    ('or use devices="cpu" (--devices cpu).', "or use --devices cpu."),
    ("Or pass Model(…, version='1') (--model-version 1), and", "Or pass --model-version 1, and"),
    ("Pass Model('w.pt', factory='m:n') (--factory m:n).", "Pass --factory m:n."),
    (
        "max_failed_rows='1%' allows 3. Allow more (--max-failed-rows).",
        "max_failed_rows='1%' allows 3. Allow more (--max-failed-rows).",
    ),
    ("dtype of x (--dtype) must be the name", "dtype of x (--dtype) must be the name"),
    ("it has to load.. Use another", "it has to load. Use another"),
    ("Loading ... and more", "Loading ... and more"),
]


@pytest.mark.parametrize(("python", "command"), SPELLINGS)
def test_keywords_become_flags(python: str, command: str) -> None:
    """A keyword with its flag behind it becomes the flag with the keyword's value; other brackets stay."""
    assert use_flags(python) == command


def test_errors_and_their_reasons() -> None:
    """Notes follow the message, several problems are told one by one, and an unknown error names its type."""
    error = InputError("x is wrong. Pass pad=False (--no-pad).")
    error.add_note("Rows are kept.")
    assert describe_error(error) == "x is wrong. Pass --no-pad. Rows are kept."
    plan = PlanError([str(error), str(OptionError("y"))])
    assert list_reasons(plan) == ["x is wrong. Pass --no-pad.", "y"]
    assert describe_error(ZeroDivisionError("by zero")) == "ZeroDivisionError: by zero"
    assert describe_error(KeyboardInterrupt()) == "interrupted"
