"""How much of a scenario is done, and how what was found becomes one line of the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.benchmarks.judging import Verdict

T = TypeVar("T")


@dataclass(frozen=True)
class Effort:
    """``name`` is "short" (minutes in all), "usual" (the figures of the issue) or "long" (with the soak of half an hour).

    ``folder`` is an empty one for this scenario, and goes with it.
    """

    name: str
    folder: Path

    def pick(self, short: T, usual: T, long: T | None = None) -> T:
        """One of these."""
        if self.name == "long" and long is not None:
            return long
        return short if self.name == "short" else usual


def judged(target: str, figure: str, asked: str, met: Mapping[str, bool] | bool) -> Verdict:
    """The line of a scenario; of ``met`` those conditions that do not hold are named in it."""
    missed = [name for name, holds in met.items() if not holds] if isinstance(met, Mapping) else [] if met else [figure]
    said = f"{figure} (not met: {'; '.join(missed)})" if missed and isinstance(met, Mapping) else figure
    return Verdict(target, said, asked, not missed)
