"""The look at a body's JSON agrees with a parser, however the body is cut."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statewise.server.guards.json_body import JsonLimit, JsonScan
from statewise.server.guards.raw_errors import RawErrors
from tests.server.probes import Answer, asked

TEXTS = st.text(st.sampled_from('ab"\\[]{}ud8f, 界😀\n'), max_size=12)
VALUES = st.recursive(
    st.none() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=12,
)
CUTS = st.lists(st.integers(0, 400), max_size=8)
FRAGMENTS = [
    "\\",
    '"',
    "\\u",
    "\\ud83d",
    "\\ude00",
    "\\u00e9",
    "d83d",
    "[",
    "]",
    "{",
    "}",
    "a",
    "\\\\",
    '\\"',
    "\0",
    ",",
]


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


def containers(value: Any) -> int:
    if isinstance(value, dict | list):
        return 1 + sum(map(containers, value.values() if isinstance(value, dict) else value))
    return 0


def scanned(text: bytes, cuts: list[int], max_depth: int = 64, max_containers: int = 10_000) -> str | None:
    scan = JsonScan(max_depth, max_containers)
    ends = [*sorted(cut for cut in cuts if cut < len(text)), len(text)]
    for start, end in zip([0, *ends], ends):
        problem = scan.feed(text[start:end], last=end == len(text))
        if problem is not None:
            return problem
    return None


@given(VALUES, CUTS, st.booleans())
def test_depth_is_what_a_parser_finds(value: Any, cuts: list[int], ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert scanned(text, cuts, max_depth=depth(value)) is None
    if depth(value):
        problem = scanned(text, cuts, max_depth=depth(value) - 1)
        assert problem is not None
        assert "nested deeper" in problem


@given(VALUES, CUTS)
def test_containers_are_counted(value: Any, cuts: list[int]) -> None:
    text, count = json.dumps(value).encode(), containers(value)
    assert scanned(text, cuts, max_containers=count) is None
    assert count == 0 or scanned(text, cuts, max_containers=count - 1) is not None


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8), CUTS)
def test_a_string_is_refused_when_python_could_not_write_it(parts: list[str], cuts: list[int]) -> None:
    text = f'["{"".join(parts)}"]'
    try:
        value = json.loads(text)
    except ValueError:
        value = None  # whatever the scan says of it, the parser refuses it
    problem = scanned(text.encode(), cuts)
    if value is not None:
        halves = re.search("[\ud800-\udfff]", "".join(value) if all(isinstance(one, str) for one in value) else "")
        assert (problem is not None) == (halves is not None)


@given(st.binary(max_size=200), CUTS)
def test_any_bytes_are_refused_or_utf8(text: bytes, cuts: list[int]) -> None:
    problem = scanned(text, cuts)
    if problem is None:
        text.decode()
        assert b"\0" not in text


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_pair_may_be_cut_anywhere(cut: int) -> None:
    assert scanned(b'["\\\\\\ud83d\\ude00\\u0041"]', [cut]) is None
    assert scanned(b'["\\ud83d\\\\\\ude00\\u0041"]', [cut]) is not None


def test_which_bodies_are_looked_at() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    types = {b"application/json": 400, b"APPLICATION/ld+json;x": 400, b"text/plain": 200, b"multipart/form-data": 200}
    for kind, status in [*types.items(), (None, 400)]:
        headers = [] if kind is None else [(b"content-type", kind)]
        assert asked(RawErrors(JsonLimit(app)), "POST", headers=headers, pieces=[b"[" * 65]).status == status


def test_the_body_is_passed_on_as_it_comes() -> None:
    """Nothing is kept: each piece is the very object that the server gave."""
    pieces, seen = [b'{"a": "' + b"x" * 70_000, b'", "b": [[', b"]]}"], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            seen.append(message["body"])
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    answer: Answer = asked(JsonLimit(app), "POST", headers=[], pieces=pieces)
    assert answer.status == 200
    assert all(one is other for one, other in zip(seen, pieces))
