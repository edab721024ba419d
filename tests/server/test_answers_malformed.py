"""Calls that are none, or not quite: never an error, and what is no call is content, word for word."""

from __future__ import annotations

import pytest

from statewise.server.answers import make_parser, parse
from statewise.server.answers.tools import MAX_NAME
from statewise.server.answers.writer import MAX_ARGUMENTS, MAX_CALLS
from tests.server.test_answers import NOW, TOOLS, WEATHER, flat

KIMI_PARIS = 'functions.get_weather:0<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|>'
M2_NOW = '<invoke name="now"></invoke>'

# All of it is content, whether arguments stream or not.
NO_CALLS = [
    ("kimi", "<|tool_call_begin|>functions.nobody:0<|tool_call_argument_begin|>{}<|tool_call_end|>"),
    ("kimi", f"<|tool_call_begin|>{'x' * 500}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"),
    ("kimi", "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>[1]<|tool_call_end|>"),
    ("kimi", "<|tool_call_begin|>functions.now:0<|tool_call_end|>"),
    ("kimi", "<|tool_call_begin|>functions.now:0"),
    ("kimi", "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>"),
    ("kimi", "<|tool_calls_section_begin|>\n<|tool_calls_section_end|>"),
    ("kimi", "an end <|tool_call_end|> without a begin\n"),
    (  # an unknown tool's arguments hold what looks like a call
        "kimi",
        '<|tool_call_begin|>nobody<|tool_call_argument_begin|>{"text": "<|tool_call_begin|>functions.now:0'
        '<|tool_call_argument_begin|>{}"}<|tool_call_end|>',
    ),
    ("hermes", "<tool_call>"),
    ("hermes", "<tool_call>now</tool_call>"),
    ("hermes", "<tool_call>{}</tool_call>"),
    ("hermes", '<tool_call>["now"]</tool_call>'),
    ("hermes", '<tool_call>{"name": "nobody", "arguments": {"a": "<tool_call>{}"}}</tool_call>'),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": [{}]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": "no object"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "args": {"a": 1}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now" "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {}, "name": "now'),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    ("hermes", "<tool_call>{'name': 'now'}</tool_call>"),
    ("hermes", '{"name": "now", "arguments": {}}'),
    ("hermes", '<tool_call>{"name": "now", "more": ' + "[" * 500 + "]" * 500 + "}</tool_call>"),
    ("minimax", '<tool_calls>\n{"name": "nobody", "arguments": {}}\n\nwords\n</tool_calls>'),
    ("minimax", '<minimax:tool_call><invoke name="nobody"><parameter name="a">b</parameter></invoke>'),
    ("minimax", '<minimax:tool_call><invoke name="now">words</invoke></minimax:tool_call>'),
    ("minimax", '<minimax:tool_call>\n<invoke name="now'),
    ("minimax", f"<minimax:tool_call><invoke name={'now' * MAX_NAME}></invoke></minimax:tool_call>"),
    ("minimax", "<invoke name=now></invoke>"),
    ("minimax", "<function_call>```python\nfunctions.now()\n```"),
    ("minimax", "<function_call>```typescript\nfunctions.nobody({})\n```"),
    ("minimax", "<function_call>```typescript\nfunctions.now(1)\n```"),
    ("ling", "<tool_call>nobody\n<arg_key>a</arg_key><arg_value>b</arg_value></tool_call>"),
    ("ling", "<tool_call>now and then</tool_call>"),
    ("ling", "<tool_call>now"),
    ("json", "words"),
    ("json", '[{"name": "nobody", "arguments": {"a": [1, 2]}}, 5]'),
    ("json", '{"name": "get_weather", "argum'),
]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(("family", "text"), NO_CALLS)
def test_what_is_no_call_is_content(family: str, text: str, streamed: bool) -> None:
    text = f" see:\n{text} \n" if family != "json" else text
    assert flat(parse(make_parser(family, TOOLS, stream_arguments=streamed), text)) == (text, None, [])


@pytest.mark.parametrize("family", ["ling"])
def test_what_is_no_call_in_thoughts_is_a_thought(family: str) -> None:
    text = "a <tool_call> b <tool_call>nobody</tool_call> </think> c"
    message = parse(make_parser(family, TOOLS, thinking=True), text)
    assert flat(message) == ("c", "a <tool_call> b <tool_call>nobody</tool_call>", [])


# What surrounds real calls: family, text, content, calls.
AROUND = [
    (  # other words in a section, and a second section
        "kimi",
        f"a <|tool_calls_section_begin|> b <|tool_call_begin|>{KIMI_PARIS} c <|tool_calls_section_end|>"
        f"<|tool_calls_section_begin|><|tool_calls_section_begin|><|tool_call_begin|>{KIMI_PARIS}",
        "a <|tool_calls_section_begin|> b c <|tool_calls_section_end|>",
        [WEATHER, WEATHER],
    ),
    (
        "kimi",
        f"<|tool_call_begin|><|tool_call_begin|>{KIMI_PARIS}}}",
        "}",
        [WEATHER],
    ),
    (  # the last brace is missing, as small models do
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}\n</tool_call>',
        None,
        [WEATHER],
    ),
    (
        "hermes",
        '<tool_call>\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}}\n</tool_call></tool_call>',
        "}\n</tool_call></tool_call>",
        [WEATHER],
    ),
    (
        "minimax",
        '<tool_calls>\nfirst\n{"name": "nobody"}\n{"name": "now"}\n{bad}\n\n{"name": "get_weather", "arguments": '
        '{"city": "Paris"}}\n</tool_calls>\n<tool_calls>\n{"name": "now"}',
        '<tool_calls>\nfirst\n{"name": "nobody"}\n{bad}',
        [NOW, WEATHER, NOW],
    ),
    (
        "minimax",
        f"<minimax:tool_call>first {M2_NOW} then <minimax:tool_call>{M2_NOW}</minimax:tool_call>",
        "<minimax:tool_call>first then",
        [NOW, NOW],
    ),
    (  # the inner end is missing
        "minimax",
        "<minimax:tool_call><invoke name='get_weather'><parameter name='city'>Paris</parameter></minimax:tool_call> so",
        "so",
        [WEATHER],
    ),
    ("ling", "<tool_call>nobody</tool_call>\n<tool_call>now</tool_call>", "<tool_call>nobody</tool_call>", [NOW]),
]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(("family", "text", "content", "calls"), AROUND)
def test_what_surrounds_calls_is_content(
    family: str, text: str, content: str | None, calls: list[tuple[str, str]], streamed: bool
) -> None:
    assert flat(parse(make_parser(family, TOOLS, stream_arguments=streamed), text)) == (content, None, calls)


# A call breaks off when it has begun: family, text before and behind its arguments, the arguments.
BROKEN = [
    ("kimi", "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>", "", '{"a": "b'),
    ("kimi", "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>", "<|tool_call_end|>", '{"a": 5" tall}'),
    ("hermes", '<tool_call>{"name": "now", "arguments": ', "</tool_call>", '{"a": 1,, "b": 2}}\n'),
    ("hermes", '<tool_call>{"name": "now", "arguments": ', "</tool_call>", '{"a": ' + "[" * 500),
    ("hermes", '<tool_call>{"name": "now", "arguments": ', "</tool_call>", '{"a": NaN}}'),
    ("minimax", "<function_call>```typescript\nfunctions.now(", "```", '{"a": tru}\n'),
    ("json", '{"name": "now", "arguments": ', "", '{"a": [1, 2'),
]


@pytest.mark.parametrize(("family", "before", "behind", "arguments"), BROKEN)
def test_a_call_that_breaks_off_is_one_while_arguments_stream(
    family: str, before: str, behind: str, arguments: str
) -> None:
    text = before + arguments + behind
    assert flat(parse(make_parser(family, TOOLS), text)) == (None, None, [("now", arguments)])
    assert flat(parse(make_parser(family, TOOLS, stream_arguments=False), text)) == (text, None, [])


@pytest.mark.parametrize(
    ("family", "text", "arguments"),
    [
        ("minimax", '<parameter name="city">Par', '{"city": "Par'),
        ("minimax", '<parameter name="days">3', '{"days": 3'),
        ("minimax", '<parameter name="city">Paris</parameter>\n', '{"city": "Paris"'),
        ("minimax", '<parameter name="city">Paris</parameter><para', '{"city": "Paris</parameter><para'),
        ("minimax", '<parameter name="ci', '{<parameter name="ci'),
        ("ling", "<arg_key>city</arg_key>\n<arg_value>Par", '{"city": "Par'),
        ("ling", "<arg_key>city</arg_key>words", "{<arg_key>city</arg_key>words"),
    ],
)
def test_a_call_between_tags_that_breaks_off_stays_open(family: str, text: str, arguments: str) -> None:
    """Its arguments must not become whole: the client would run half a call."""
    before = '<minimax:tool_call><invoke name="get_weather">' if family == "minimax" else "<tool_call>get_weather\n"
    message = parse(make_parser(family, TOOLS), before + text)
    assert flat(message) == (None, None, [("get_weather", arguments)])
    whole = make_parser(family, TOOLS, stream_arguments=False)
    assert flat(parse(whole, before + text)) == (before + text, None, [])


def test_markers_in_strings_are_text() -> None:
    inner = "<|tool_call_end|><tool_call></tool_call></tool_calls> \\\\ \\" + '"}'
    arguments = f'{{"path": "{inner}"}}'
    for family, before, behind in (
        ("kimi", "<|tool_call_begin|>write_file:0<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        ("hermes", '<tool_call>{"name": "write_file", "arguments": ', "}</tool_call>"),
        ("minimax", '<tool_calls>\n{"name": "write_file", "arguments": ', "}\n</tool_calls>"),
    ):
        message = parse(make_parser(family, TOOLS), before + arguments + behind)
        assert flat(message) == (None, None, [("write_file", arguments)])


@pytest.mark.parametrize(
    ("family", "call", "begin"),
    [
        ("kimi", "<|tool_call_begin|>now:0<|tool_call_argument_begin|>{}<|tool_call_end|>", ""),
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', ""),
        ("minimax", '{"name": "now"}\n', "<tool_calls>"),
        ("minimax", M2_NOW, "<minimax:tool_call>"),
        ("ling", "<tool_call>now</tool_call>", ""),
        ("json", '{"name": "now"},', "["),
    ],
)
def test_calls_beyond_the_limit_are_content(family: str, call: str, begin: str) -> None:
    message = parse(make_parser(family, TOOLS), begin + call * (MAX_CALLS + 2))
    assert len(message.tool_calls) == MAX_CALLS
    assert message.content is not None
    assert message.content.strip(",\n") == (call * 2).strip(",\n")


@pytest.mark.parametrize("streamed", [True, False])
def test_arguments_beyond_the_limit_are_content(streamed: bool) -> None:
    arguments = '{"path": "' + "x" * MAX_ARGUMENTS + '"}'
    text = f"<|tool_call_begin|>write_file:0<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
    parser = make_parser("kimi", TOOLS, stream_arguments=streamed)
    content, _, calls = flat(parse(parser, text))
    if streamed:
        assert calls == [("write_file", arguments[:MAX_ARGUMENTS])]
        assert content == arguments[MAX_ARGUMENTS:] + "<|tool_call_end|>"
    else:
        assert (content, calls) == (text, [])
