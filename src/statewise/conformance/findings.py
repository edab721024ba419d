"""What a check found: the comparisons it made, the worst of them, and the sentences for those that failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Status = Literal["held", "failed", "not checked", "not applicable"]
MOST_PROBLEMS = 3  # sentences that one finding shows; the first failures explain the others


class NotApplicableError(Exception):
    """A check does not concern this layer; the message says why."""


class NotCheckedError(Exception):
    """A check could not be made; the message says what the layer lacks."""


@dataclass(frozen=True)
class Point:
    """One point of the drift curve: errors behind `tokens` tokens, relative to the scale of the reference."""

    tokens: int
    output: float  # of the last rows
    state: float  # of the worst field


@dataclass(frozen=True)
class Finding:
    """The result of one check in one dtype. `error` and `limit` are those of the comparison nearest to its limit."""

    check: str
    dtype: str
    status: Status
    message: str
    error: float | None = None  # relative to the scale of what was expected
    limit: float | None = None  # 0: the same to the bit
    seconds: float = 0.0
    curve: tuple[Point, ...] = ()
    problem: str = ""  # of a failure: the message without its last sentence, which says where to look
    remark: str = ""  # worth knowing although the check held


@dataclass(frozen=True)
class Report:
    """All findings about one layer. It has passed if some check held and none failed."""

    layer: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return bool(self.held) and not self.failed

    @property
    def held(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == "held"]

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == "failed"]


@dataclass
class Evidence:
    """Collects the comparisons of one check. Errors count relative to the largest entry of what is expected."""

    problems: list[str] = field(default_factory=list)
    worst: tuple[float, float] | None = None  # (error, limit)
    curve: list[Point] = field(default_factory=list)
    raised: str = ""  # what the layer raised, which ended the check
    remark: str = ""  # shown if the check holds

    def close(
        self, what: str, actual: Tensor, expected: Tensor, limit: float, rows: str = "", scale: float | None = None
    ) -> float:
        """Compare within `limit` (0: bit by bit) and return the error.

        `rows` says what the first axis counts ("token"). `scale` replaces the largest entry of `expected`, for a part
        that is small by nature.
        """
        if not self._fits(what, actual, expected):
            return float("inf")
        wide, goal = actual.detach().double(), expected.detach().double()
        if not bool(torch.isfinite(wide).all()):
            self._count(float("inf"), limit)
            self.problems.append(f"{what} is not finite{_place(~torch.isfinite(wide), rows)}")
            return float("inf")
        errors = (wide - goal).abs() / (largest(goal) if scale is None else scale)
        error = largest(errors, default=0.0)
        self._count(error, limit)
        if error > limit:
            bound = f"the limit is {limit:.0e}" if limit else "it must be the same to the bit"
            self.problems.append(f"{what} is off by {error:.1e} of its scale, {bound}{_place(errors > limit, rows)}")
        return error

    def same(self, what: str, actual: Tensor, expected: Tensor, rows: str = "") -> None:
        """Compare bit by bit; the signs of zeros do not count."""
        self.close(what, actual, expected, 0.0, rows)

    def hold(self, truth: bool, problem: str) -> None:
        """Record `problem` unless `truth`."""
        if not truth:
            self.problems.append(problem)

    def finding(self, check: str, dtype: str, proves: str, hint: str, seconds: float) -> Finding:
        error, limit = self.worst or (None, None)
        shown = self.problems[:MOST_PROBLEMS]
        rest = len(self.problems) - len(shown)
        found = "; ".join(shown) + (f"; and {rest} more" if rest else "")
        problem = ". ".join(sentence.rstrip(".") for sentence in (self.raised, found) if sentence)
        curve = tuple(self.curve)
        if not problem:
            return Finding(check, dtype, "held", proves, error, limit, seconds, curve, remark=self.remark)
        message = f"{problem}. {hint}" if hint else problem
        return Finding(check, dtype, "failed", message, error, limit, seconds, curve, problem=problem)

    def _fits(self, what: str, actual: Tensor, expected: Tensor) -> bool:
        if actual.shape == expected.shape:
            return True
        self._count(float("inf"), 0.0)
        self.problems.append(f"{what} has the shape {list(actual.shape)}, expected {list(expected.shape)}")
        return False

    def _count(self, error: float, limit: float) -> None:
        def badness(pair: tuple[float, float]) -> float:
            return pair[0] / pair[1] if pair[1] else (float("inf") if pair[0] else 0.0)

        if self.worst is None or badness((error, limit)) > badness(self.worst):
            self.worst = (error, limit)


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry of `expected`."""
    return largest(actual.double() - expected.double(), default=0.0) / largest(expected)


def largest(values: Tensor, default: float = 1.0) -> float:
    """The largest magnitude; `default` where there is none or it is zero."""
    return (float(values.abs().max()) if values.numel() else 0.0) or default


def _place(wrong: Tensor, rows: str) -> str:
    """Where the wrong entries are, in words."""
    if wrong.ndim == 0:
        return ""
    where = wrong.nonzero()
    if rows:
        hit = where[:, 0].unique()
        return f" (first at {rows} {int(hit[0])}, {len(hit)} of {len(wrong)})"
    return f" (first at {where[0].tolist()}, {len(where):,} of {wrong.numel():,} entries)"
