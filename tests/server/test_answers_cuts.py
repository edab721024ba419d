"""What holds for every text: any division into pieces says the same, nothing is lost, and the work is linear."""

from __future__ import annotations

import json
import re
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statewise.server.answers import (
    FAMILIES,
    Content,
    Part,
    Reasoning,
    ToolCallArguments,
    ToolCallBegin,
    make_parser,
    message,
    parse,
)
from tests.server.test_answers import OUTPUTS, TOOLS

# What the formats are made of, whole and in halves, in any order.
FRAGMENTS = (
    "<think>",
    "</think>",
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_end|>",
    "<|tool_call_argument_begin|>",
    "functions.now:0",
    "functions.nobody:1",
    "<tool_calls>",
    "</tool_calls>",
    "<tool_call>",
    "</tool_call>",
    "<tool_call>now\n<arg_key>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    '<invoke name="get_weather">',
    "<invoke name=now>",
    '<parameter name="city">',
    "<parameter name=days>",
    "</parameter>",
    "</invoke>",
    "<function_call>```typescript\n",
    "functions.now(",
    ")\n```",
    '{"name": "get_weather", "arguments": {"city": "',
    '{"name": "now", "arguments": {}}',
    '{"arguments": {}, "name": "now"}',
    '{"name": "nobody", "arguments": {"a": [',
    '{"name": "now"',
    '{"city": "Paris"}',
    "[BOS]",
    "<",
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    ",",
    "3",
    " ",
    "\n",
    "\n\n",
)
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.just("WORD")), max_size=25).map(
    lambda parts: "".join(f"w{index}w" if part == "WORD" else part for index, part in enumerate(parts))
)
SETTINGS = st.fixed_dictionaries(
    {"thinking": st.booleans(), "reasoning": st.booleans(), "stream_arguments": st.booleans()}
)


def pieces(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[begin:end] for begin, end in pairwise(edges)]


def read(family: str, parts: list[str], **settings: bool) -> list[Part]:
    """The parts of a text that comes in pieces, neighbours of one kind as one."""
    parser = make_parser(family, TOOLS, new_id=lambda name, number: f"{number}", **settings)
    found: list[Part] = []
    for part in [*(one for text in parts for one in parser.push(text)), *parser.finish()]:
        last = found[-1] if found else None
        if isinstance(part, Content) and isinstance(last, Content):
            found[-1] = Content(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            found[-1] = Reasoning(last.text + part.text)
        elif isinstance(part, ToolCallArguments) and isinstance(last, ToolCallArguments):
            assert part.index == last.index
            found[-1] = ToolCallArguments(part.index, last.text + part.text)
        else:
            found.append(part)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 1000), max_size=12), settings=SETTINGS)
def test_any_division_of_the_text_says_the_same(
    family: str, text: str, cuts: list[int], settings: dict[str, bool]
) -> None:
    whole = read(family, [text], **settings)
    assert read(family, pieces(text, cuts), **settings) == whole
    assert read(family, list(text), **settings) == whole


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(("family", "thinking", "text"), [output[:3] for output in OUTPUTS])
def test_every_cut_in_two_says_the_same(family: str, thinking: bool, text: str, streamed: bool) -> None:
    whole = read(family, [text], thinking=thinking, stream_arguments=streamed)
    for cut in range(len(text)):
        parts = [text[:cut], text[cut:]]
        assert read(family, parts, thinking=thinking, stream_arguments=streamed) == whole


@pytest.mark.parametrize("family", FAMILIES)
@given(text=TEXTS, settings=SETTINGS)
def test_no_word_is_lost_or_told_twice(family: str, text: str, settings: dict[str, bool]) -> None:
    """But those in keys of a call's JSON that say nothing."""
    told = message(read(family, [text], **settings))
    everything = "".join((told.reasoning or "", told.content or "", *(call.arguments for call in told.tool_calls)))
    words = re.findall(r"w\d+w", everything)
    assert len(words) == len(set(words))
    if family != "json":
        assert set(re.findall(r"w\d+w", text)) <= set(words)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=TEXTS, streamed=st.booleans())
def test_an_answer_without_calls_comes_out_as_it_was_generated(family: str, text: str, streamed: bool) -> None:
    told = parse(make_parser(family, TOOLS, reasoning=False, stream_arguments=streamed), text)
    if not told.tool_calls:
        assert told.content == text


@pytest.mark.parametrize("family", FAMILIES)
@given(text=TEXTS, settings=SETTINGS)
def test_calls_are_well_formed(family: str, text: str, settings: dict[str, bool]) -> None:
    begun = [part for part in read(family, [text], **settings) if isinstance(part, ToolCallBegin)]
    assert [part.index for part in begun] == list(range(len(begun)))
    for call in message(read(family, [text], **settings)).tool_calls:
        assert call.name in TOOLS
        assert call.arguments.startswith("{")
        if not settings["stream_arguments"]:
            assert isinstance(json.loads(call.arguments), dict)


KIMI_CALL = "<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
M2_CALL = '<minimax:tool_call><invoke name="write_file"><parameter name='
# family, the beginning, and what follows it again and again
ADVERSARIAL = [
    ("kimi", "", "<"),
    ("kimi", "", "<|tool_call"),
    ("kimi", "", "<|tool_calls_section_begi"),
    ("kimi", "", "<|tool_calls_section_begin|>"),
    ("kimi", KIMI_CALL, "{"),
    ("kimi", KIMI_CALL + '{"a": [', "[],"),
    ("kimi", KIMI_CALL + '{"a": "', '\\"'),
    ("kimi", KIMI_CALL + '{"a": "', "<|tool_call_end|>"),
    ("minimax", "", "<tool_call"),
    ("minimax", "", "</tool_call"),
    ("minimax", "<tool_calls>", "\n{"),
    ("minimax", M2_CALL + '"text">', "</parameter>"),
    ("minimax", M2_CALL + '"text">', "</parameter> \n"),
    ("minimax", M2_CALL + '"options">', "</paramete"),
    ("ling", "", "<tool_cal"),
    ("ling", "<tool_call>now\n", "<arg_key>k</arg_key><arg_value>v</arg_value>"),
    ("hermes", "", "<tool_call"),
    ("hermes", "<tool_call>", '{"name": "now"'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}', " "),
    ("json", "[", '{"name": "now"},'),
    ("none", "", "<think"),
    ("none", "", "\n "),
]


@pytest.mark.parametrize(("size", "piece"), [(1_000_000, 1_000_000), (250_000, 16)])
@pytest.mark.parametrize(("family", "begin", "again"), ADVERSARIAL)
def test_half_markers_take_linear_time(family: str, begin: str, again: str, size: int, piece: int) -> None:
    """A megabyte takes less than a second on an idle machine; work that is not linear would take minutes."""
    text = (begin + again * (size // len(again) + 1))[:size]
    parser = make_parser(family, TOOLS, thinking=family == "none")
    started = time.process_time()
    for at in range(0, size, piece):
        parser.push(text[at : at + piece])
    parser.finish()
    assert time.process_time() - started < 3.0
