"""When requests are to be sent."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from statewise.errors import RequestError


@dataclass(frozen=True)
class Pattern:
    """How much is asked at once, or how often, and when it ends.

    With a rate, conversations begin by a clock of their own, whether or not the server keeps up; `concurrency` then
    bounds how many run at once, and waiting for a place counts as latency. Without one, `concurrency` conversations
    run at any time and a next one begins when one ends.
    """

    concurrency: int | None = None
    rate: float | None = None  # conversations per second
    burstiness: float = 1.0  # 1: arrivals know nothing of each other (Poisson); below 1 in bursts, above 1 steadier
    requests: int | None = None  # None: until the duration is over
    duration: float | None = None  # seconds in which requests are sent; those that run then may end

    def __post_init__(self) -> None:
        if self.rate is None and self.concurrency is None:
            raise RequestError("concurrency", "give a concurrency, a request rate or both")
        if self.rate is not None and not 0 < self.rate <= 1e6:
            raise RequestError("request-rate", "the request rate must be above 0 and at most 1,000,000 per second")
        if not 1e-3 <= self.burstiness <= 1e6:
            raise RequestError("burstiness", "burstiness must lie between 0.001 and 1,000,000")
        if self.requests is None and self.duration is None:
            raise RequestError("num-requests", "give a number of requests or a duration")

    def offsets(self, draw: random.Random) -> Iterator[float]:
        """Seconds from the beginning, one for each conversation, without end. All are 0 where there is no rate."""
        at = 0.0
        while True:
            yield at
            if self.rate is not None:
                at += draw.gammavariate(self.burstiness, 1 / (self.rate * self.burstiness))
