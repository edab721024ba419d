"""What a session knows of its tokens: it comes back as it was, and what would not is not written."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statewise.errors import SnapshotError
from statewise.memory.snapshot import read_snapshot, verify_snapshot
from statewise.memory.snapshot_transcript import (
    MAX_DEPTH,
    MAX_TURNS,
    Transcript,
    decode_transcript,
    encode_transcript,
)
from tests.memory.corruption import without
from tests.memory.test_snapshot import saved

TOKENS = 1000
PLACES = st.integers(0, TOKENS)
NAMES = st.text(min_size=1, max_size=12).filter(str.isprintable)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBERS = st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(
    allow_nan=False, allow_infinity=False, allow_subnormal=False
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(
    turns=st.lists(PLACES, max_size=9).map(sorted),
    checkpoints=st.dictionaries(NAMES, PLACES, max_size=4),
    messages=st.lists(st.dictionaries(TEXT, VALUES, max_size=3), max_size=3),
)
def test_a_transcript_comes_back(turns: list[int], checkpoints: dict[str, int], messages: list[Any]) -> None:
    transcript = Transcript(tuple(turns), checkpoints, tuple(messages))
    found = decode_transcript(encode_transcript(transcript, TOKENS), TOKENS)
    assert found == transcript
    assert list(found.checkpoints) == list(checkpoints)


def test_messages_of_other_types_come_back_as_plain_data() -> None:
    message = UserDict(role="user", parts=({"text": "a"}, UserDict(text="b")))
    found = decode_transcript(encode_transcript(Transcript(messages=(message,)), 0), 0)
    assert found.messages == ({"role": "user", "parts": [{"text": "a"}, {"text": "b"}]},)


def nested(depth: int) -> Any:
    return "x" if depth == 0 else [nested(depth - 1)]


@pytest.mark.parametrize(
    ("transcript", "reason"),
    [
        (Transcript((TOKENS + 1,)), "its turns do not rise"),
        (Transcript((5, 4)), "its turns do not rise"),
        (Transcript((0,) * (MAX_TURNS + 1)), "its turns are not a list of at most"),
        (Transcript(checkpoints={"a": -1}), "a named checkpoint does not lie within"),
        (Transcript(checkpoints={"a\n": 1}), "the name of a checkpoint is not"),
        (Transcript(messages=("text",)), "is not an object"),  # type: ignore[arg-type]
        (Transcript(messages=({1: "x"},)), "holds more than text"),  # type: ignore[dict-item]
        (Transcript(messages=({"x": b"bytes"},)), "holds more than text"),
        (Transcript(messages=({"x": {1, 2}},)), "holds more than text"),
        (Transcript(messages=({"x": float("inf")},)), "holds more than text"),
        (Transcript(messages=({"x": 1 << 64},)), "holds more than text"),
        (Transcript(messages=({"x": nested(MAX_DEPTH)},)), "32 deep"),
        (Transcript(messages=({"x": "\ud800"},)), "is not valid Unicode text"),
        (Transcript(messages=({"x": "a" * (1 << 24)},)), "is too large: its transcript has"),
        (Transcript(messages=({"x": [None] * (1 << 21)},)), "texts and separators"),
    ],
)
def test_what_would_not_come_back_is_not_written(transcript: Transcript, reason: str) -> None:
    with pytest.raises(SnapshotError, match=reason) as refusal:
        encode_transcript(transcript, TOKENS)
    assert str(refusal.value).isprintable()


def test_the_bounds_themselves_are_held() -> None:
    deep = {"x": nested(MAX_DEPTH - 1)}
    transcript = Transcript((TOKENS,) * MAX_TURNS, {"n" * 256: 0}, (deep, {"x": '"\\,[{' * 100_000}))
    assert decode_transcript(encode_transcript(transcript, TOKENS), TOKENS) == transcript


def test_a_file_may_come_without(tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    saved(path)
    assert read_snapshot(path).transcript is not None
    path.write_bytes(without(path.read_bytes(), "transcript"))
    verify_snapshot(path)
    assert read_snapshot(path).transcript is None
