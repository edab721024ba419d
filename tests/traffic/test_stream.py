"""Streams of events, however their bytes are cut."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statewise.traffic.stream import MAX_EVENT, Stream, StreamError, explain


def events(*values: Any, end: str = "\n\n") -> bytes:
    return b"".join(
        b"data: " + (one if isinstance(one, bytes) else json.dumps(one).encode()) + end.encode() for one in values
    )


USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}
COMPLETION = events(
    {"choices": [{"index": 0, "text": "Grüße", "finish_reason": None}], "usage": None},
    {"choices": [{"index": 0, "text": "", "finish_reason": None}]},  # a token that has no text yet
    {"choices": [{"index": 0, "text": " an", "finish_reason": None}]},
    {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]},
    {"choices": [], "usage": USAGE},
    b"[DONE]",
)


@given(st.sets(st.integers(1, len(COMPLETION) - 1)), st.booleans())
def test_a_completion_is_read_however_it_is_cut(cuts: set[int], carriage: bool) -> None:
    content = COMPLETION.replace(b"\n", b"\r\n") if carriage else COMPLETION
    stream = Stream(keep_text=True)
    bounds = [0, *sorted(cuts), len(content)]
    for at, (begin, end) in enumerate(pairwise(bounds)):
        stream.take(float(at), content[begin:end])
    assert (len(stream.times), stream.finish_reason, stream.complete) == (3, "length", True)
    assert list(stream.times) == sorted(stream.times)
    assert stream.ended is not None
    assert stream.ended >= stream.times[-1]
    assert stream.usage is not None
    assert (stream.usage.prompt_tokens, stream.usage.completion_tokens, stream.usage.cached_tokens) == (7, 5, 4)
    assert "".join(stream.text or ()) == "Grüße an"


def test_a_chat_begins_with_its_first_token_and_not_with_its_role() -> None:
    stream = Stream()
    for at, delta in enumerate(({"role": "assistant", "content": ""}, {"reasoning_content": "Hm"}, {"content": "Yes"})):
        stream.take(float(at), events({"choices": [{"delta": delta, "finish_reason": None}]}))
    stream.take(3.0, events({"choices": [{"delta": {"tool_calls": [{"index": 0}]}, "finish_reason": None}]}))
    stream.take(4.0, events({"choices": [{"delta": {}, "finish_reason": "stop"}]}, b"[DONE]"))
    assert list(stream.times) == [1.0, 2.0, 3.0]


def test_an_answer_without_any_text_has_one_event() -> None:
    stream = Stream()
    stream.take(2.0, events({"choices": [{"delta": {}, "finish_reason": "stop"}]}))
    assert list(stream.times) == [2.0]


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (
            events({"error": {"message": "the engine died", "code": "engine_dead"}}),
            "error event engine_dead",
            "the engine died",
        ),
        (events({"error": {"message": "no", "code": 500}}), "error event", "no"),
        (events({"error": "Unauthorized"}), "error event", "Unauthorized"),
        (events(b"{"), "bad stream", "{"),
        (events({"choices": [{"text": 5}]}), "bad stream", "5"),
        (events({"choices": None}), "bad stream", "null"),
        (b"data: " + b"\xff\xfe" + b"\n\n", "bad stream", "none"),
        (b"x" * (MAX_EVENT + 1), "bad stream", "more than"),
    ],
)
def test_a_stream_that_goes_wrong_says_how(content: bytes, kind: str, message: str) -> None:
    with pytest.raises(StreamError) as raised:
        Stream().take(0.0, content)
    assert raised.value.kind == kind
    assert message in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"error": {"message": "two\\n lines", "code": "x"}}', ("x", "two lines")),
        (b'{"object": "error", "message": "flat", "code": 400}', (None, "flat")),
        (b'{"detail": "Not Found"}', (None, "Not Found")),
        (b"<html>Bad gateway</html>", (None, "<html>Bad gateway</html>")),
        (b"", (None, "no reason given")),
        (b"[1]", (None, "[1]")),
    ],
)
def test_errors_of_any_shape_are_explained(body: bytes, expected: tuple[str | None, str]) -> None:
    assert explain(body) == expected
