"""What a server has seen, in plain numbers that cost next to nothing on the token path; `metrics.py` exports them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from statewise.server import messages

# Upper bounds of buckets. Those that dashboards expect, and shorter ones between tokens, for small models.
FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_S = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
ROUTE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
STEP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKENS = (*(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5)), 1e6)
STEP_TOKENS = (1.0, *(float(1 << power) for power in range(3, 15)))
CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)

MISSES = {
    "no common prefix": "no_common_prefix",
    "never checkpointed": "never_checkpointed",
    "evicted": "evicted",
    "other tenant": "other_tenant",
    "disabled": "disabled",
    "the request wants every row of its prompt": "prompt_logprobs",
}
"""Labels of the engine's reasons why no more of a prompt was reused. Any other reason is `other`."""

UNMATCHED = "unmatched"  # in place of the path of a request that met no route
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class Tally:
    """A histogram: how many values fell into each bucket, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last is above all bounds
        self.total = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Count a value, or several that are equal."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count


class Seen:
    """What the HTTP process has seen since its start, whatever lives the engine had."""

    def __init__(self) -> None:
        self.pieces = 0  # of answers, from the engine
        self.inter_token = Tally(TOKEN_S)
        self.first_token = Tally(FIRST_TOKEN_S)
        self.per_token = Tally(TOKEN_S)
        self.whole, self.queued, self.prefill, self.decode, self.inference = (Tally(REQUEST_S) for _ in range(5))
        self.prompt_tokens, self.generated_tokens, self.max_tokens = (Tally(TOKENS) for _ in range(3))
        self.choices = Tally(CHOICES)
        self.ended: Counter[str] = Counter()  # continuations, by finish reason
        self.misses: Counter[str] = Counter()  # requests, by why no more was reused
        self.rejections: Counter[str] = Counter()  # requests that were kept out, by reason
        self.refused_files = 0  # snapshots that are damaged, or of another model
        self.answers: Counter[tuple[str, str, int]] = Counter()  # by method, route and status
        self.routes: dict[str, Tally] = {}  # seconds

    def took(self, at: float, counts: Mapping[float, int]) -> None:
        """A step at the time `at`: how many pieces went to streams whose last piece was from each time; 0: none."""
        tally = self.inter_token
        for last, count in counts.items():
            self.pieces += count
            if last:
                gap = at - last
                tally.counts[bisect_left(TOKEN_S, gap)] += count  # `add`, without a call for each stream and step
                tally.total += gap * count

    def finished(self, message: messages.Finished) -> None:
        """A request has ended, whether anybody still waits for it or not."""
        metrics, copies = message.metrics, max(1, len(message.reasons))
        self.ended.update(message.reasons)
        self.prompt_tokens.add(metrics.prompt_tokens)
        self.generated_tokens.add(metrics.completion_tokens)
        if metrics.cache_miss_reason is not None:
            self.misses[MISSES.get(metrics.cache_miss_reason, "other")] += 1
        queue, first, decode = metrics.queue_s, metrics.time_to_first_token_s, metrics.decode_s
        if queue is not None:
            self.queued.add(queue)
        if first is not None:
            prefill, decoded = max(0.0, first - (queue or 0.0)), decode or 0.0
            self.first_token.add(first)
            self.prefill.add(prefill)
            self.decode.add(decoded)
            self.inference.add(prefill + decoded)
            later = metrics.completion_tokens / copies - 1  # tokens of each behind the first
            if later > 0:
                self.per_token.add(decoded / later)
        if metrics.total_s is not None:
            self.whole.add(metrics.total_s)

    def answered(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """An HTTP request is over. `route` is the template of its path; None: it met no route."""
        route = route or UNMATCHED
        self.answers[method if method in METHODS else "other", route, status] += 1
        self.routes.setdefault(route, Tally(ROUTE_S)).add(seconds)


def carried(before: messages.Stats | None, now: messages.Stats | None) -> messages.Stats | None:
    """What all lives of the engine have counted together. What is there now is of the last one alone."""
    if before is None or now is None:
        return now or before
    sums = {name: getattr(before, name) + getattr(now, name) for name in messages.Stats.SUMS}
    counts = dict(Counter(before.counts) + Counter(now.counts))
    lists = {
        name: [a + b for a, b in zip(getattr(before, name), getattr(now, name), strict=True)]
        for name in ("step_times", "step_sizes")
    }
    return msgspec.structs.replace(now, **sums, **lists, counts=counts)
