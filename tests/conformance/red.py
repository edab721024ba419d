"""Which checks turn red."""

from __future__ import annotations

from statewise.conformance import CHECKS, Finding, prove

Red = dict[str, Finding]
SLOW = ("maximum length", "extreme input")
QUICK = [check.name for check in CHECKS if check.name not in SLOW]
RANKS = ["specification", "rank cuts", "2 ranks", "4 ranks"]


def red(layer: type, dtype: str = "float32", only: list[str] = QUICK) -> Red:
    """The failed checks of a layer, by name."""
    return {finding.check: finding for finding in prove(layer, [dtype], long=256, only=only).failed}
