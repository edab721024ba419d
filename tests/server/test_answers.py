"""What the models of each family write, and the messages that it makes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from statewise.server.answers import (
    Content,
    Message,
    Reasoning,
    ToolCall,
    ToolCallArguments,
    ToolCallBegin,
    Tools,
    make_parser,
    parse,
)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = Tools(
    [
        tool("get_weather", city={"type": "string"}, days={"type": "integer"}),
        tool("write_file", path={"type": "string"}, text={"type": "string"}, options={"type": "object"}),
        tool("now"),
    ]
)
WEATHER = ("get_weather", '{"city": "Paris"}')
ROME = ("get_weather", '{"city": "Rome", "days": 3}')
NOW = ("now", "{}")

# family, begins inside of thoughts, text, content, reasoning, calls
OUTPUTS: list[tuple[str, bool, str, str | None, str | None, list[tuple[str, str]]]] = [
    ("kimi", False, "The capital is Paris.", "The capital is Paris.", None, []),
    (
        "kimi",
        False,
        "I'll look it up.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        '<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>',
        "I'll look it up.",
        None,
        [WEATHER],
    ),
    (  # as some write it: lines, and the singular
        "kimi",
        False,
        "<|tool_call_section_begin|>\n<|tool_call_begin|>\nfunctions.get_weather:0\n<|tool_call_argument_begin|>\n"
        '{"city": "Paris"}\n<|tool_call_end|>\n<|tool_call_begin|>now:1<|tool_call_argument_begin|>'
        "<|tool_call_end|>\n<|tool_call_section_end|>\n",
        None,
        None,
        [WEATHER, NOW],
    ),
    (  # no section, an id that a client has changed, no end
        "kimi",
        False,
        '<|tool_call_begin|>functions_get_weather_1<|tool_call_argument_begin|>{"city": "Paris"}',
        None,
        None,
        [WEATHER],
    ),
    (
        "minimax",  # M1
        False,
        "<think>\nThe user wants the weather.\n</think>\n\nLet me check.\n\n<tool_calls>\n"
        '{"name": "get_weather", "arguments": {"city": "Paris"}}\n{"name": "now", "arguments": {}}\n</tool_calls>\n',
        "Let me check.",
        "The user wants the weather.",
        [WEATHER, NOW],
    ),
    (
        "minimax",  # what M1 writes inside of its thoughts is no call
        False,
        '<think><tool_calls>\n{"name": "now", "arguments": {}}\n</tool_calls></think>No need.',
        "No need.",
        '<tool_calls>\n{"name": "now", "arguments": {}}\n</tool_calls>',
        [],
    ),
    (
        "minimax",  # M2, whose prompt opens the thoughts
        True,
        "Two calls.\n</think>\n\n<minimax:tool_call>\n"
        '<invoke name="get_weather">\n<parameter name="city">Rome</parameter>\n<parameter name="days">3</parameter>\n'
        '</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        None,
        "Two calls.",
        [ROME, NOW],
    ),
    (
        "minimax",  # Text-01
        False,
        '<function_call>```typescript\nfunctions.get_weather({"city": "Paris"})\nfunctions.now()\n```',
        None,
        None,
        [WEATHER, NOW],
    ),
    (
        "ling",  # 2.x
        False,
        '<think>Hm.</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        None,
        "Hm.",
        [WEATHER, NOW],
    ),
    (
        "ling",  # 3, which calls without closing its thoughts
        True,
        "The weather of Rome?<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        None,
        "The weather of Rome?",
        [ROME],
    ),
    ("ling", True, "No tools.</think>Fine.<tool_call>now\n</tool_call>", "Fine.", "No tools.", [NOW]),
    (
        "hermes",
        False,
        'First.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\nThen.',
        "First.\nThen.",
        None,
        [WEATHER],
    ),
    (
        "hermes",  # arguments first, escaped, with more keys, on several lines
        False,
        '<tool_call>{"id": [1], "parameters": {"city": "Paris"}, "name": "get_weather"}</tool_call>'
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>'
        '<tool_call>\n{\n  "name": "get_weather",\n  "arguments": {"city": "Paris"},\n  "id": 7\n}\n</tool_call>'
        '<tool_call>{"name": "now"}</tool_call><tool_call>{"name": "now", "arguments": null}</tool_call>',
        None,
        None,
        [WEATHER, WEATHER, WEATHER, NOW, NOW],
    ),
    ("json", False, '{"name": "get_weather", "arguments": {"city": "Paris"}}', None, None, [WEATHER]),
    (
        "json",
        False,
        ' [ {"name": "now", "arguments": {}} , {"name":"get_weather","arguments":{"city": "Paris"}} ] ',
        None,
        None,
        [NOW, WEATHER],
    ),
    ("none", False, "<think>a</think> b <tool_call>", "b <tool_call>", "a", []),
    ("none", True, "<think>\n\n</think>\n\nb", "b", None, []),
    ("none", True, " a \n b ", "", "a \n b", []),
    ("none", False, "  say <think>a</think>\n", "  say <think>a</think>\n", None, []),
]


def flat(message: Message) -> tuple[str | None, str | None, list[tuple[str, str]]]:
    return message.content, message.reasoning, [(call.name, call.arguments) for call in message.tool_calls]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(("family", "thinking", "text", "content", "reasoning", "calls"), OUTPUTS)
def test_what_models_write_becomes_a_message(
    family: str,
    thinking: bool,
    text: str,
    content: str | None,
    reasoning: str | None,
    calls: list[tuple[str, str]],
    streamed: bool,
) -> None:
    parser = make_parser(family, TOOLS, thinking=thinking, stream_arguments=streamed)
    assert flat(parse(parser, text)) == (content, reasoning, calls)


@pytest.mark.parametrize(("family", "thinking", "text"), [output[:3] for output in OUTPUTS])
def test_without_tools_and_told_apart_thoughts_everything_is_content(family: str, thinking: bool, text: str) -> None:
    assert parse(make_parser(family, None, thinking=thinking, reasoning=False), text) == Message(text, None, ())


def test_thoughts_that_are_not_told_apart_hold_no_calls_either() -> None:
    text = '<think><tool_calls>\n{"name": "now"}\n</tool_calls></think>\n<tool_calls>\n{"name": "now"}\n</tool_calls>'
    content, _, calls = flat(parse(make_parser("minimax", TOOLS, reasoning=False), text))
    assert (content, calls) == (text[: text.index("\n<tool_calls>", 50)], [NOW])


def test_ids_are_those_that_kimis_template_wants_back() -> None:
    """The model's own where it wrote one that is new; else the name and the number of the call."""
    headers = ["functions.now:4", "functions.now:4", "now", "functions_now_2", "functions.now:3"]
    text = "".join(
        f"<|tool_call_begin|>{header}<|tool_call_argument_begin|>{{}}<|tool_call_end|>" for header in headers
    )
    ids = [call.id for call in parse(make_parser("kimi", TOOLS), text).tool_calls]
    assert ids == [f"functions.now:{number}" for number in (4, 1, 2, 3, 5)]


def test_other_ids_are_new_for_each_call() -> None:
    text = '<tool_call>{"name": "now"}</tool_call>' * 20
    ids = {call.id for call in parse(make_parser("hermes", TOOLS), text).tool_calls}
    assert len(ids) == 20
    assert all(one.startswith("call_") for one in ids)
    named = make_parser("hermes", TOOLS, new_id=lambda name, number: f"{name}-{number}")
    assert parse(named, text).tool_calls[1] == ToolCall("now-1", "now", "{}")


def test_arguments_are_told_as_they_come() -> None:
    parser = make_parser("kimi", TOOLS)
    begin = "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    assert parser.push("Yes. " + begin) == [Content("Yes.")]
    assert parser.push('{"ci') == [
        ToolCallBegin(0, "functions.get_weather:0", "get_weather"),
        ToolCallArguments(0, '{"ci'),
    ]
    assert parser.push('ty": "Par') == [ToolCallArguments(0, 'ty": "Par')]
    assert parser.push('is"}<|tool') == [ToolCallArguments(0, 'is"}')]
    assert parser.push("_call_end|>") + parser.finish() == []


def test_a_string_between_tags_is_told_as_it_comes_and_other_values_whole() -> None:
    parser = make_parser("minimax", TOOLS, new_id=lambda name, number: "id")
    parser.push('<minimax:tool_call><invoke name="write_file"><parameter name="text">')
    assert parser.push('say "hi"\n</para') == [ToolCallArguments(0, 'say \\"hi\\"\\n')]
    assert parser.push("graph> ") == [ToolCallArguments(0, "</paragraph> ")]
    assert parser.push('</parameter>\n<parameter name="options">{"a"') == [
        ToolCallArguments(0, '"'),
        ToolCallArguments(0, ', "options": '),
    ]
    assert parser.push(": 1}</parameter>") == []
    assert parser.push("</invoke>") == [ToolCallArguments(0, '{"a": 1}'), ToolCallArguments(0, "}")]


def test_text_is_told_at_once_unless_it_may_be_a_tag_or_precede_one() -> None:
    parser = make_parser("hermes", TOOLS)
    assert parser.push("one") == [Content("one")]
    assert parser.push(" two <tool") == [Content(" two")]
    assert parser.push("box> ") == [Content(" <toolbox>")]
    assert parser.finish() == [Content(" ")]
    thinking = make_parser("none", thinking=True)
    assert thinking.push("\n one ") == [Reasoning("one")]
    assert thinking.push("two</think>\nthree") == [Reasoning(" two"), Content("three")]


def test_nothing_may_follow_the_end() -> None:
    parser = make_parser("none")
    parser.finish()
    assert parser.finish() == []
    with pytest.raises(ValueError, match="finished"):
        parser.push("more")


@pytest.mark.parametrize("value", ['a <b> & "c"\\ \n', "</parameter>", " </parameter> </parameter>\n x ", "", "ü"])
def test_strings_between_tags_survive_as_they_are(value: str) -> None:
    text = (
        '<minimax:tool_call><invoke name="write_file"><parameter name="path">p</parameter>\n'
        f'<parameter name="text">{value}</parameter>\n</invoke></minimax:tool_call>'
    )
    (call,) = parse(make_parser("minimax", TOOLS), text).tool_calls
    assert json.loads(call.arguments) == {"path": "p", "text": value}
