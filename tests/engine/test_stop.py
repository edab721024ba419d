"""The stop matcher against a definition that sees the whole text at once."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statewise.engine.stop import StopMatcher
from statewise.errors import RequestError

LETTERS = st.text(alphabet="ab", max_size=40)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=6), max_size=4)


def first_match(text: str, stops: list[str]) -> tuple[int, int] | None:
    """(end, begin) of the match that ends first; of those, the one that begins first."""
    found = [(begin + len(stop), begin) for stop in stops for begin in range(len(text)) if text.startswith(stop, begin)]
    return min(found) if found else None


def run(matcher: StopMatcher, pieces: list[str]) -> tuple[str, str | None]:
    shown, matched = "", None
    for piece in pieces:
        emitted, matched = matcher.push(piece)
        shown += emitted
    return shown + matcher.finish(), matched


def split(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[begin:end] for begin, end in pairwise(edges)]


@given(LETTERS, STOPS, st.lists(st.integers(0, 40), max_size=8), st.booleans())
def test_any_division_of_the_text_gives_the_first_match(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    shown, matched = run(StopMatcher(stops, include_stop_str_in_output=include), split(text, cuts))
    match = first_match(text, stops)
    if match is None:
        assert (shown, matched) == (text, None)
    else:
        end, begin = match
        assert (shown, matched) == (text[: end if include else begin], text[begin:end])


@given(LETTERS, STOPS)
def test_only_what_may_begin_a_stop_string_is_withheld(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        emitted, matched = matcher.push(character)
        shown += emitted
        if matched:
            return
        tails = [text[begin:end] for begin in range(end)]
        longest = max((len(tail) for tail in tails if any(stop.startswith(tail) for stop in stops)), default=0)
        assert shown == text[: end - longest]


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("one EN") == ("one ", None)
    assert matcher.push("D two") == ("", "END")
    assert matcher.push("three") == ("", "END")
    assert matcher.finish() == ""


def test_a_promise_that_is_not_kept_is_shown_at_the_end() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("EN") == ("", None)
    assert matcher.finish() == "EN"


def test_without_stop_strings_text_passes_through() -> None:
    assert StopMatcher([]).push("text") == ("text", None)


@pytest.mark.parametrize("stops", [[""], ["a", ""], [3]])
def test_bad_stop_strings_are_named(stops: list[str]) -> None:
    with pytest.raises(RequestError, match="non-empty strings") as caught:
        StopMatcher(stops)
    assert caught.value.field == "stop"
