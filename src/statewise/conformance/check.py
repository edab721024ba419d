"""What a check is, and the list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from statewise.conformance.findings import Evidence
from statewise.conformance.subject import Subject


@dataclass(frozen=True)
class Check:
    """One property of the contract.

    `run` makes its comparisons in the `Evidence`; it may raise `NotApplicableError` or `NotCheckedError`. Whatever
    else is raised in it is a failure of the layer.
    """

    name: str
    proves: str  # one sentence: what holds when it holds
    hint: str  # one sentence: where to look when it does not
    run: Callable[[Subject, Evidence], None]
    scopes: tuple[str, ...] = ("record", "page")
    reference: bool = False  # nothing of it can be checked without reference()


CHECKS: list[Check] = []


def check(
    name: str, proves: str, hint: str, *, scopes: tuple[str, ...] = ("record", "page"), reference: bool = False
) -> Callable[[Callable[[Subject, Evidence], None]], Callable[[Subject, Evidence], None]]:
    """Decorator: add a function to the list of checks, in the order of definition."""

    def add(run: Callable[[Subject, Evidence], None]) -> Callable[[Subject, Evidence], None]:
        CHECKS.append(Check(name, proves, hint, run, scopes, reference))
        return run

    return add
