"""A figure beside its bound, and the line that says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """One target: what was measured, what was allowed; ``passed`` is None where it could not be measured here."""

    target: str
    figure: str
    bound: str
    passed: bool | None

    def __str__(self) -> str:
        word = {True: "pass", False: "FAIL", None: "skipped"}[self.passed]
        if not self.bound:
            return f"{self.target:<72} {word}: {self.figure}"
        return f"{self.target:<72} {self.figure:>12}  {self.bound:>12}  {word}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


Verdicts = Iterator[Verdict]


def at_most(target: str, figure: float, bound: float, unit: str = "") -> Verdict:
    """Pass where the figure is no more than the bound."""
    return Verdict(target, f"{figure:.3g}{unit}", f"<= {bound:g}{unit}", figure <= bound)


def at_least(target: str, figure: float, bound: float, unit: str = "") -> Verdict:
    """Pass where the figure is no less than the bound."""
    return Verdict(target, f"{figure:,.4g}{unit}", f">= {bound:,g}{unit}", figure >= bound)


def skipped(target: str, reason: str) -> Verdict:
    """Neither pass nor failure: it cannot be measured here."""
    return Verdict(target, reason, "", None)


def failed(target: str, reason: str) -> Verdict:
    """No figure, as something went wrong."""
    return Verdict(target, reason, "", False)
