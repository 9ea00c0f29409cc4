"""Every scenario of ``python -m tests.chaos``, in its short version; what the machine forbids is skipped with the reason."""

from __future__ import annotations

import pytest

from tests.chaos.__main__ import SCENARIOS, line, proved

pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SCENARIOS)
def test_what_breaks_is_mended(name: str) -> None:
    """The figure asked for is reached where things break."""
    verdict = proved(name, "short")
    if verdict.passed is None:
        pytest.skip(verdict.figure)
    assert verdict.passed, line(verdict)
