"""The pieces that parsers are made of: the end of a JSON value, markers, types of parameters."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statewise.errors import RequestError
from statewise.server.answers import Tools
from statewise.server.answers.feed import Markers
from statewise.server.answers.json_value import MAX_DEPTH, JsonScanner
from tests.server.test_answers import tool

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9, allow_subnormal=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def scan(text: str, step: int, inside_object: bool = False) -> tuple[bool, int]:
    """Whether a value is complete, and how far it reaches, when its text comes in pieces of `step`."""
    scanner = JsonScanner(inside_object)
    at = 0
    for begin in range(0, len(text), step):
        piece = text[begin : begin + step]
        end = scanner.scan(piece, 0)
        at += end
        if scanner.complete or scanner.broken:
            return scanner.complete, at
    return scanner.finish(), at


@given(value=VALUES, indent=st.sampled_from([None, 2]), step=st.integers(1, 50), rest=st.sampled_from(["", "}", "<a>"]))
def test_the_end_of_a_value_is_found(value: Any, indent: int | None, step: int, rest: str) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    assert scan(text + rest, step) == (True, len(text))
    behind = f', "a": {text}}}'
    assert scan(behind + rest, step, inside_object=True) == (True, len(behind))


@given(text=st.text(alphabet='{}[]",:\\ \n01.-e+tfnrualse', max_size=30), step=st.integers(1, 30))
def test_what_the_scanner_takes_for_a_value_is_one(text: str, step: int) -> None:
    """But for what strings may hold, and wherever the text is divided."""
    complete, end = scan(text, step)
    assert scan(text, 1000) == (complete, end)
    if complete and "\\" not in text and "\n" not in text:
        json.loads(text[:end])
    try:
        json.loads(text)
    except ValueError:
        return
    assert complete
    assert not text[end:].strip()


def test_strings_may_hold_what_json_forbids() -> None:
    text = '{"a": "\\d\n\t\\x"}'
    assert scan(text, 1) == (True, len(text))


@pytest.mark.parametrize(
    ("text", "end"), [('{"a" 1}', 5), ('{"a": 01}', 8), ("[1 2]", 3), ('{"a": 1,}', 8), ("[,]", 1), ("NaN", 0), ("", 0)]
)
def test_the_scanner_stops_where_a_value_breaks(text: str, end: int) -> None:
    assert scan(text, 100) == (False, end)


def test_depth_and_numbers_are_bounded() -> None:
    assert scan("[" * MAX_DEPTH + "]" * MAX_DEPTH, 7)[0]
    assert not scan("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), 7)[0]
    assert not scan("1" * 5000 + " ", 7)[0]


MARKERS = st.lists(st.text(alphabet="ab<", min_size=1, max_size=4), min_size=1, max_size=4)


@given(text=st.text(alphabet="ab<", max_size=20), markers=MARKERS)
def test_the_first_marker_is_found_and_of_those_the_longest(text: str, markers: list[str]) -> None:
    found = [
        (begin, -len(marker)) for begin in range(len(text)) for marker in markers if text.startswith(marker, begin)
    ]
    at, length = min(found, default=(len(text), 0))
    assert Markers(*markers).find(text, 0, ended=True) == (at, text[at : at - length])


def test_a_far_marker_among_many_near_ones_is_not_sought_again_and_again() -> None:
    markers = Markers("\n", "<end>")
    text = "\n" * 200_000
    at = 0
    while at < len(text):
        found, marker = markers.find(text, at, ended=True)
        at = found + len(marker)
    assert at == len(text)


TYPED = Tools(
    [
        tool(
            "f",
            string={"type": "string"},
            integer={"type": "integer"},
            number={"type": "number"},
            boolean={"type": "boolean"},
            array={"type": "array"},
            object={"type": "object"},
            optional={"type": ["string", "null"]},
            either={"anyOf": [{"type": "string"}, {"type": "integer"}]},
            choice={"enum": ["1", "2"]},
            constant={"const": 5},
            whole={"allOf": [{"description": "none"}, {"type": "integer"}]},
            any={},
            loop={"$ref": "#/properties/loop"},
            word={"$ref": "#/properties/string"},
            lost={"$ref": "#/nowhere"},
        )
    ]
)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("string", "5", "5"),
        ("string", " null ", " null "),
        ("string", '"a"', '"a"'),
        ("integer", " 5\n", 5),
        ("integer", "five", "five"),
        ("number", "1e3", 1000.0),
        ("number", "7", 7),
        ("number", "NaN", "NaN"),
        ("boolean", "True", True),
        ("boolean", "false", False),
        ("array", '[1, "a"]', [1, "a"]),
        ("array", "[1, 'a']", "[1, 'a']"),
        ("object", '{"a": {}}', {"a": {}}),
        ("object", "[" * 100_000, "[" * 100_000),
        ("optional", "null", None),
        ("optional", "5", "5"),
        ("either", "5", 5),
        ("either", "5.5", "5.5"),
        ("choice", "1", "1"),
        ("constant", "5", 5),
        ("whole", "5", 5),
        ("any", "5", 5),
        ("any", "null", None),
        ("any", "words", "words"),
        ("any", '"a"', '"a"'),
        ("loop", "5", 5),
        ("word", "5", "5"),
        ("lost", "[1]", [1]),
        ("unknown", "true", True),
    ],
)
def test_parameters_have_the_types_of_their_schemas(key: str, text: str, value: Any) -> None:
    assert json.loads(TYPED.value("f", key, text)) == value


def test_types_are_found_in_bounded_time() -> None:
    branching = {"anyOf": [{"$ref": "#/properties/a"}] * 100}
    assert Tools([tool("f", a=branching)]).types("f", "a") == frozenset()


@pytest.mark.parametrize(
    ("definitions", "field"),
    [
        ([{"type": "function"}], "tools[0].function"),
        (["now"], "tools[0].function"),
        ([tool("now"), {"function": {"name": ""}}], "tools[1].function.name"),
        ([{"function": {"name": "two words"}}], "tools[0].function.name"),
        ([{"function": {"name": "x" * 129}}], "tools[0].function.name"),
        ([{"function": {"name": "<b>"}}], "tools[0].function.name"),
        ([tool("now"), tool("now")], "tools[1].function.name"),
        ([{"function": {"name": "now", "parameters": []}}], "tools[0].function.parameters"),
        ([tool(f"tool{number}") for number in range(129)], "tools"),
    ],
)
def test_bad_definitions_are_named(definitions: Any, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        Tools(definitions)
    assert caught.value.field == field
