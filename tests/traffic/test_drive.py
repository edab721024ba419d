"""The driver against servers of exactly known speed, in virtual time."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import Callable, Sequence
from itertools import islice, pairwise

import pytest

from statewise.traffic.arrivals import Pattern
from statewise.traffic.drive import Run, drive
from statewise.traffic.record import Failure, Record
from statewise.traffic.sender import Talk
from statewise.traffic.statistics import summarize
from statewise.traffic.workload import Span, Synthetic, Turn, Vocabulary
from tests.traffic.virtual_time import clock, run


class Server:
    """Answers three tokens, `seconds` after each other; `fails` says which requests end with the first."""

    def __init__(self, seconds: float = 0.25, lanes: int = 1000, fails: Callable[[Record], bool] | None = None) -> None:
        self.seconds, self.lanes, self.fails = seconds, asyncio.Semaphore(lanes), fails
        self.ended: list[int] = []

    async def converse(self, turns: Sequence[Turn], record: Record, talk: Talk) -> None:
        record.started = clock()
        async with self.lanes:
            times = array("d")
            for _ in range(3):
                await asyncio.sleep(self.seconds)
                times.append(clock())
                if self.fails is not None and self.fails(record):
                    record.failure = Failure("made up", "as the test wants it")
                    break
        record.times, record.ended = times, clock()
        record.prompt_tokens, record.completion_tokens = 10, len(times)

    async def end(self, talk: Talk) -> None:
        self.ended.append(1)


def measure(pattern: Pattern, server: Server, turns: int = 1, seed: int = 0) -> Run:
    workload = Synthetic(Vocabulary(), Span(5, 9), Span(3, 3), turns=turns, seed=seed)
    return run(drive(pattern, workload, server, clock, seed))


def test_a_concurrency_is_kept_and_figures_are_those_of_the_server() -> None:
    report = summarize(measure(Pattern(concurrency=4, requests=20), Server(0.25)))
    assert (report.completed, report.failed, report.peak_concurrency) == (20, 0, 4)
    assert report.seconds == pytest.approx(5 * 0.75)
    assert report.output_tokens_per_second == pytest.approx(60 / 3.75)
    assert report.total_tokens_per_second == pytest.approx(260 / 3.75)
    assert report.requests_per_second == pytest.approx(20 / 3.75)
    for spread, expected in (
        (report.first_token, 0.25),
        (report.between_events, 0.25),
        (report.per_token, 0.25),
        (report.total, 0.75),
        (report.total_intended, 0.75),
    ):
        assert spread is not None
        assert [spread.mean, spread.least, spread.most, *spread.percentiles.values()] == pytest.approx([expected] * 7)
    assert all(one.running == pytest.approx(4) for one in report.timeline)


def test_a_rate_does_not_wait_for_the_server() -> None:
    result = measure(Pattern(rate=20, requests=200), Server(5.0))
    offsets = list(islice(Pattern(rate=20, requests=1).offsets(random.Random("arrivals 0")), 200))
    assert [one.intended - result.began for one in result.records] == pytest.approx(offsets)
    assert [one.started for one in result.records] == pytest.approx([one.intended for one in result.records])
    assert summarize(result).peak_concurrency > 100


def test_latency_counts_from_the_intended_start() -> None:
    """A server of one request per second that gets two per second looks quick to who waits for it."""
    pattern = Pattern(rate=2, burstiness=1e6, concurrency=1, requests=20)
    report = summarize(measure(pattern, Server(1 / 3)))
    assert report.total is not None
    assert report.total_intended is not None
    assert report.total.most == pytest.approx(1)
    assert report.total_intended.most == pytest.approx(20 - 19 / 2, abs=0.1)
    assert report.peak_concurrency == 1


def test_nothing_is_sent_after_the_duration_and_what_was_sent_may_end() -> None:
    for pattern in (
        Pattern(concurrency=2, duration=10),
        Pattern(rate=3, duration=10),
        Pattern(concurrency=1, duration=10),
    ):
        result = measure(pattern, Server(0.5))
        assert result.records
        assert all(one.intended < result.began + 10 for one in result.records)
        assert all(one.failure is None and one.ended == one.started + 1.5 for one in result.records)
        assert 10 <= result.seconds <= 11.5 + 1


@pytest.mark.parametrize("pattern", [Pattern(concurrency=3, requests=50), Pattern(rate=10, requests=50)])
def test_a_conversation_that_fails_ends_and_its_requests_are_sent_in_others(pattern: Pattern) -> None:
    server = Server(fails=lambda record: record.conversation % 3 == 0 and record.turn == 1)
    result = measure(pattern, server, turns=4)
    report = summarize(result)
    assert len(result.records) == 50
    assert report.failed == sum(one.conversation % 3 == 0 and one.turn == 1 for one in result.records) > 0
    assert [(one.kind, one.count) for one in report.errors] == [("made up", report.failed)]
    talks: dict[int, list[Record]] = {}
    for record in result.records:
        talks.setdefault(record.conversation, []).append(record)
    for records in talks.values():
        assert [one.turn for one in records] == list(range(len(records)))
        assert all(later.started >= sooner.ended for sooner, later in pairwise(records))
    assert len(server.ended) == len(talks)


def test_the_same_seed_sends_at_the_same_times() -> None:
    def times(seed: int) -> list[float]:
        result = measure(Pattern(rate=5, burstiness=0.5, requests=30), Server(), seed=seed)
        return [one.started - result.began for one in result.records]

    assert times(1) == times(1) != times(2)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 16.0])
def test_arrivals_have_the_rate_and_the_spread_that_was_asked(burstiness: float) -> None:
    offsets = Pattern(rate=50, burstiness=burstiness, requests=1).offsets(random.Random(3))
    gaps = [later - sooner for sooner, later in pairwise(islice(offsets, 20_001))]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert deviation / mean == pytest.approx(burstiness**-0.5, rel=0.05)
