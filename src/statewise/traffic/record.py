"""What is kept of one request of a measurement."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Failure:
    """Why a request has no complete answer. `kind` is one of few, so that it can be counted."""

    kind: str
    message: str


@dataclass
class Record:
    """Times are seconds of one clock; tokens are those that the server counted."""

    # set by the driver
    conversation: int
    turn: int
    intended: float  # when the pattern wanted it sent; the same as `started` where it waits for no one's clock
    # set by the sender
    started: float = 0.0
    ended: float = 0.0
    times: array[float] = field(default_factory=lambda: array("d"))  # of the events with tokens
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None  # None: the server does not say
    counted: bool = False  # the server gave token counts
    finish_reason: str | None = None
    failure: Failure | None = None
    text: str = ""  # kept only where a next turn needs it

    @property
    def first_token_s(self) -> float | None:
        return self.times[0] - self.started if self.times else None

    @property
    def total_s(self) -> float:
        return self.ended - self.started

    @property
    def late_s(self) -> float:
        """How long after its time it was sent."""
        return self.started - self.intended

    @property
    def per_token_s(self) -> float | None:
        """Mean time from token to token behind the first."""
        if self.completion_tokens < 2 or len(self.times) < 2:
            return None
        return (self.times[-1] - self.times[0]) / (self.completion_tokens - 1)
