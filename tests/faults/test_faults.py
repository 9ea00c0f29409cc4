"""Scenarios of ``python -m tests.faults`` that need seconds and no machine of their own, in their short version.

The others (workers killed for minutes, poison, cgroups, links that are cut, every instant of a run, the soak) the command
runs.
"""

from __future__ import annotations

import pytest

from tests.faults.__main__ import line, proved

pytestmark = pytest.mark.slow

QUICK = ("full", "output", "input", "listeners", "tampered", "code", "declared", "rows")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", QUICK)
def test_what_breaks_is_mended(name: str) -> None:
    """The figure asked for is reached where things break."""
    verdict = proved(name, "short")
    if verdict.passed is None:
        pytest.skip(verdict.figure)
    assert verdict.passed, line(verdict)
