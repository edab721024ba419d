"""Figures against other ways to compute them, and the plot."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statewise.traffic.drive import Run
from statewise.traffic.plot import svg
from statewise.traffic.record import Failure, Record
from statewise.traffic.statistics import PERCENTILES, Spread, peak_concurrency, summarize, timeline

seconds = st.floats(0, 1000, allow_subnormal=False)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    records = []
    for number in range(draw(st.integers(0, 12))):
        started = draw(seconds)
        times = array("d", sorted(started + draw(seconds) for _ in range(draw(st.integers(0, 5)))))
        record = Record(
            number, 0, started - draw(st.floats(0, 5, allow_subnormal=False)), started, (times or [started])[-1], times
        )
        record.completion_tokens, record.prompt_tokens = len(times) * draw(st.integers(1, 3)), draw(st.integers(0, 50))
        record.cached_tokens = draw(st.none() | st.integers(0, record.prompt_tokens))
        record.counted = draw(st.booleans())
        if draw(st.booleans()) and number % 3 == 0:
            record.failure = Failure(draw(st.sampled_from("ab")), f"of {number}")
        records.append(record)
    return Run(0.0, max((one.ended for one in records), default=0.0), records)


@given(st.lists(seconds, min_size=1, max_size=50))
def test_percentiles_are_those_of_numpy(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread is not None
    expected = np.percentile(np.array(values), PERCENTILES)
    assert list(spread.percentiles.values()) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert list(spread.percentiles) == ["p50", "p90", "p95", "p99"]
    assert (spread.mean, spread.least, spread.most) == pytest.approx((np.mean(values), min(values), max(values)))


def test_no_values_have_no_spread() -> None:
    assert Spread.of([]) is None


@given(runs())
def test_a_report_adds_up(run: Run) -> None:
    report = summarize(run)
    done = [one for one in run.records if one.failure is None]
    assert report.completed == len(done)
    assert report.failed == sum(one.count for one in report.errors) == len(run.records) - len(done)
    assert report.output_tokens == sum(one.completion_tokens for one in done)
    assert report.uncounted == sum(not one.counted for one in done)
    told = [one for one in done if one.cached_tokens is not None]
    assert report.cached_tokens == (sum(one.cached_tokens or 0 for one in told) if told else None)
    for error in report.errors:
        first = next(one.failure for one in run.records if one.failure and one.failure.kind == error.kind)
        assert error.message == first.message
    if report.total is not None and report.total_intended is not None:
        assert report.total_intended.mean >= report.total.mean


@given(runs())
def test_the_peak_is_what_counting_at_each_start_gives(run: Run) -> None:
    counted = [
        sum(one.started <= at.started < one.ended or one is at for one in run.records if one.ended > one.started)
        for at in run.records
        if at.ended > at.started
    ]
    lasting = [one for one in run.records if one.ended > one.started]
    assert peak_concurrency(lasting) == max(counted, default=0)


@given(runs(), st.integers(1, 20))
def test_a_time_line_holds_every_token_and_every_second(run: Run, bins: int) -> None:
    line = timeline(run, bins)
    tokens = sum((one.end - one.start) * one.output_tokens_per_second for one in line)
    assert tokens == pytest.approx(sum(one.completion_tokens for one in run.records if one.times), rel=1e-6, abs=1e-6)
    busy = sum((one.end - one.start) * one.running for one in line)
    assert busy == pytest.approx(sum(one.total_s for one in run.records), rel=1e-6, abs=1e-3)


@given(runs(), st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="￾￿")))
def test_a_plot_is_an_svg_of_any_run(run: Run, title: str) -> None:
    root = ElementTree.fromstring(svg(run, summarize(run), title, "<&> 'quoted'"))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [one.text or "" for one in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:2] == [title, "<&> 'quoted'"]
    for line in root.iter("{http://www.w3.org/2000/svg}polyline"):
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 960
            assert 0 <= y <= 430
