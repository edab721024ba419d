"""Percentiles and sums of a measurement."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from statewise.traffic.drive import Run
from statewise.traffic.record import Record

PERCENTILES = (50, 90, 95, 99)
MAX_BINS = 120  # of the time line


@dataclass(frozen=True)
class Spread:
    """Values of one kind, in seconds."""

    count: int
    mean: float
    least: float
    most: float
    percentiles: dict[str, float]  # "p50": 0.012

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        ordered = sorted(values)
        if not ordered:
            return None
        return cls(
            count=len(ordered),
            mean=math.fsum(ordered) / len(ordered),
            least=ordered[0],
            most=ordered[-1],
            percentiles={f"p{share}": percentile(ordered, share) for share in PERCENTILES},
        )


@dataclass(frozen=True)
class ErrorKind:
    """Failures of one kind."""

    kind: str
    count: int
    message: str  # of the first


@dataclass(frozen=True)
class Bin:
    """A stretch of the measurement. Times are seconds from its beginning."""

    start: float
    end: float
    output_tokens_per_second: float
    running: float  # requests, on average


@dataclass(frozen=True)
class Report:
    """What a run shows. Latencies are of the requests that have a complete answer; None where there is no value.

    `first_token`, `total`: from sending. `first_token_intended`, `total_intended`: from when the pattern wanted it
    sent, so that a server which holds the sender up does not look quicker for it. `between_events`: from one event
    with tokens to the next, within an answer. `per_token`: an answer's mean from token to token behind its first.
    """

    seconds: float
    completed: int
    failed: int
    errors: list[ErrorKind]
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None
    cached_share: float | None  # of the prompt tokens of those requests whose server counts them
    uncounted: int  # complete answers without token counts of the server; their events are counted instead
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    peak_concurrency: int
    events_per_token: float | None
    first_token: Spread | None
    first_token_intended: Spread | None
    between_events: Spread | None
    per_token: Spread | None
    total: Spread | None
    total_intended: Spread | None
    sent_late: Spread | None
    timeline: list[Bin] = field(default_factory=list)


def summarize(run: Run) -> Report:
    """The report of a run."""
    done = [record for record in run.records if record.failure is None]
    seconds = max(run.seconds, 1e-9)
    prompt, output = sum(one.prompt_tokens for one in done), sum(one.completion_tokens for one in done)
    told = [one for one in done if one.cached_tokens is not None]
    cached = sum(one.cached_tokens or 0 for one in told) if told else None
    told_prompt = sum(one.prompt_tokens for one in told)
    events = sum(len(one.times) for one in done)
    first = [(one, one.first_token_s) for one in done]
    return Report(
        seconds=run.seconds,
        completed=len(done),
        failed=len(run.records) - len(done),
        errors=errors(run.records),
        prompt_tokens=prompt,
        output_tokens=output,
        cached_tokens=cached,
        cached_share=cached / told_prompt if cached is not None and told_prompt else None,
        uncounted=sum(not one.counted for one in done),
        requests_per_second=len(done) / seconds,
        output_tokens_per_second=output / seconds,
        total_tokens_per_second=(prompt + output) / seconds,
        peak_concurrency=peak_concurrency(run.records),
        events_per_token=events / output if output else None,
        first_token=Spread.of(value for _, value in first if value is not None),
        first_token_intended=Spread.of(value + one.late_s for one, value in first if value is not None),
        between_events=Spread.of(later - sooner for one in done for sooner, later in zip(one.times, one.times[1:])),
        per_token=Spread.of(value for one in done if (value := one.per_token_s) is not None),
        total=Spread.of(one.total_s for one in done),
        total_intended=Spread.of(one.total_s + one.late_s for one in done),
        sent_late=Spread.of(one.late_s for one in run.records),
        timeline=timeline(run, min(MAX_BINS, max(1, len(done)))),
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of sorted values; between two of them on the line that joins them."""
    place = (len(ordered) - 1) * share / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def errors(records: Iterable[Record]) -> list[ErrorKind]:
    """Failures by kind, the most frequent first."""
    failures = [record.failure for record in records if record.failure is not None]
    counts = Counter(one.kind for one in failures)
    first = {one.kind: one.message for one in reversed(failures)}
    return [ErrorKind(kind, count, first[kind]) for kind, count in counts.most_common()]


def peak_concurrency(records: Iterable[Record]) -> int:
    """The most requests that were under way at one time."""
    changes = sorted(
        change for one in records for change in ((one.started, 1), (max(one.ended, one.started), -1))
    )  # at the same time, an end sorts before a beginning
    running = peak = 0
    for _, change in changes:
        running += change
        peak = max(peak, running)
    return peak


def timeline(run: Run, bins: int) -> list[Bin]:
    """Tokens and running requests over time. The tokens of an answer are spread evenly over its events."""
    width = max(run.seconds, 1e-9) / bins
    tokens, running = [0.0] * bins, [0.0] * bins
    for record in run.records:
        if record.times:
            share = record.completion_tokens / len(record.times)
            for time in record.times:
                tokens[min(bins - 1, max(0, int((time - run.began) / width)))] += share
        begin, end = record.started - run.began, record.ended - run.began
        for at in range(max(0, int(begin / width)), min(bins, int(end / width) + 1)):
            running[at] += max(0.0, min(end, (at + 1) * width) - max(begin, at * width))
    return [Bin(at * width, (at + 1) * width, tokens[at] / width, running[at] / width) for at in range(bins)]
