"""OpenAI's own client: answers in a form, calls of tools, and the newer API for conversations.

The demo model has learnt neither JSON nor calls: what makes its answers fit is the structure that they must follow.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI, pydantic_function_tool
from pydantic import BaseModel, ConfigDict, Field

ADD: Any = [{"role": "user", "content": "What is 27 + 45?"}]
SUM = "27 + 45 = 72"


class Weather(BaseModel):
    """Tells the weather."""

    model_config = ConfigDict(extra="forbid")  # otherwise any other field may come as well, and here it does

    city: Literal["Rome", "Oslo", "Kyoto"]
    days: int = Field(ge=1, le=9)


class Verdict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    right: bool
    grade: Literal["good", "fair", "poor"]
    result: int = Field(ge=0, le=999)


WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": Weather.model_json_schema()},
}
NOTHING: Any = {"type": "object", "properties": {}, "additionalProperties": False}
NOW: Any = {"type": "function", "function": {"name": "now", "parameters": NOTHING}}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
SCHEMA: Any = {"name": "verdict", "schema": Verdict.model_json_schema(), "strict": True}
ASKED: Any = {"model": "demo", "messages": ADD, "temperature": 0, "max_tokens": 200}


@pytest.mark.parametrize(("choice", "names"), [("required", {"weather", "now"}), (NAMED, {"weather"})])
def test_a_call_can_be_forced(client: OpenAI, choice: Any, names: set[str]) -> None:
    asked = {**ASKED, "tools": [WEATHER, NOW], "tool_choice": choice}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None and whole.message.tool_calls
    for call in whole.message.tool_calls:
        assert call.type == "function" and call.id and call.function.name in names
        if call.function.name == "weather":
            Weather.model_validate_json(call.function.arguments)
        else:
            assert json.loads(call.function.arguments) == {}
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls" and streamed.message.tool_calls
    assert [(one.function.name, one.function.arguments) for one in streamed.message.tool_calls] == [
        (one.function.name, one.function.arguments) for one in whole.message.tool_calls if one.type == "function"
    ]


def test_calls_are_one_or_several_as_asked(client: OpenAI) -> None:
    asked = {**ASKED, "tools": [WEATHER, NOW], "tool_choice": "required"}
    one = client.chat.completions.create(**asked, parallel_tool_calls=False).choices[0].message
    assert one.tool_calls is not None and len(one.tool_calls) == 1
    several = client.chat.completions.create(**{**asked, "temperature": 1, "seed": 3}, n=4).choices
    calls = [call for choice in several for call in choice.message.tool_calls or []]
    assert len({call.id for call in calls}) == len(calls) >= 4


def test_calls_are_parsed_into_models(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        **ASKED, tools=[pydantic_function_tool(Weather, name="weather")], tool_choice=NAMED
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)


def test_tools_that_may_be_left_alone_are_refused_where_the_model_does_not_hear_of_them(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        client.chat.completions.create(**ASKED, tools=[WEATHER])
    free = client.chat.completions.create(**ASKED, tools=[WEATHER], tool_choice="none")
    assert free.choices[0].message.content == SUM
    for tools, choice in (([WEATHER], {"type": "function", "function": {"name": "nope"}}), ([], "required")):
        wrong: Any = {"tools": tools, "tool_choice": choice}
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**ASKED, **wrong)


def test_an_answer_follows_its_schema(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": SCHEMA}
    texts = set()
    for seed in range(3):
        asked = {**ASKED, "temperature": 1, "seed": seed, "response_format": form}
        choice = client.chat.completions.create(**asked).choices[0]
        assert choice.finish_reason == "stop"
        Verdict.model_validate_json(choice.message.content or "")
        stream = client.chat.completions.create(**asked, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert streamed == choice.message.content
        texts.add(streamed)
    assert len(texts) > 1
    parsed = client.chat.completions.parse(**ASKED, response_format=Verdict).choices[0].message
    assert isinstance(parsed.parsed, Verdict)
    free: Any = {"type": "text"}
    assert client.chat.completions.create(**ASKED, response_format=free).choices[0].message.content == SUM


def test_an_answer_is_an_object(client: OpenAI) -> None:
    form: Any = {"type": "json_object"}
    for seed in range(3):
        choice = client.chat.completions.create(
            **{**ASKED, "temperature": 1, "seed": seed}, response_format=form
        ).choices[0]
        text = choice.message.content or ""
        assert text.lstrip().startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"structured_outputs": {"regex": "[a-f]{3}-[0-9]{2}"}}, "[a-f]{3}-[0-9]{2}"),
        ({"structured_outputs": {"choice": ["north", "south"]}}, "north|south"),
        ({"guided_regex": "[xyz]{5}"}, "[xyz]{5}"),
        ({"guided_choice": ["yes", "no", "perhaps"]}, "yes|no|perhaps"),
        ({"guided_grammar": 'start: "(" (start | "x") ")"'}, r"\(+x?\)+|\(+"),
    ],
)
def test_other_forms_go_by_extra_body(client: OpenAI, extra: Any, pattern: str) -> None:
    chat = client.chat.completions.create(**ASKED, extra_body=extra).choices[0].message.content
    text = client.completions.create(model="demo", prompt="The", max_tokens=40, extra_body=extra).choices[0].text
    assert re.fullmatch(pattern, chat or "")
    assert re.fullmatch(pattern, text)


def test_forms_that_cannot_be_are_named(client: OpenAI) -> None:
    wrong: list[tuple[Any, str]] = [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"extra_body": {"guided_regex": "("}}, "expression"),
        ({"extra_body": {"guided_grammar": "start: nowhere"}}, "grammar"),
        ({"extra_body": {"guided_choice": ["a"], "guided_regex": "a"}}, "guided_choice"),
    ]
    for more, words in wrong:
        with pytest.raises(openai.BadRequestError, match=words):
            client.chat.completions.create(**ASKED, **more)


def test_a_response_whole_and_streamed(client: OpenAI) -> None:
    asked: Any = {"model": "demo", "input": "What is 27 + 45?", "temperature": 0}
    whole = client.responses.create(**asked)
    assert (whole.object, whole.status, whole.output_text) == ("response", "completed", SUM)
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == SUM
    assert events[-1].response.output_text == SUM
    with client.responses.stream(**asked) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == SUM


def test_a_response_heeds_instructions_limits_and_earlier_items(client: OpenAI) -> None:
    plain = client.responses.create(model="demo", input="What is 27 + 45?", temperature=0)
    told = client.responses.create(model="demo", input="What is 27 + 45?", instructions="You are kind.", temperature=0)
    assert told.instructions == "You are kind."
    assert told.usage is not None and plain.usage is not None
    assert told.usage.input_tokens > plain.usage.input_tokens
    cut = client.responses.create(model="demo", input="What is 27 + 45?", max_output_tokens=3, temperature=0)
    assert cut.status == "incomplete" and cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    earlier: Any = [*ADD, *(item.model_dump() for item in plain.output), {"role": "user", "content": "What is 3 + 4?"}]
    assert client.responses.create(model="demo", input=earlier, temperature=0).output_text == "3 + 4 = 7"
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="demo", input="a", previous_response_id=plain.id)


def test_a_response_follows_its_schema_and_calls_its_tools(client: OpenAI) -> None:
    asked: Any = {"model": "demo", "input": "What is 27 + 45?", "temperature": 0, "max_output_tokens": 200}
    form: Any = {"format": {"type": "json_schema", **SCHEMA}}
    Verdict.model_validate_json(client.responses.create(**asked, text=form).output_text)
    assert isinstance(client.responses.parse(**asked, text_format=Verdict).output_parsed, Verdict)
    tool: Any = {"type": "function", "strict": True, **WEATHER["function"]}
    for choice in ("required", {"type": "function", "name": "weather"}):
        (call,) = client.responses.create(**asked, tools=[tool], tool_choice=choice, parallel_tool_calls=False).output
        assert call.type == "function_call" and (call.name, bool(call.call_id)) == ("weather", True)
        Weather.model_validate_json(call.arguments)
    events = list(client.responses.create(**asked, tools=[tool], tool_choice="required", stream=True))
    spelled = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    done = [event.arguments for event in events if event.type == "response.function_call_arguments.done"]
    assert spelled == "".join(done) and done


def test_many_forms_at_once_do_not_mix(client: OpenAI) -> None:
    async def one(asker: AsyncOpenAI, digits: int) -> str | None:
        extra = {"guided_regex": f"[0-9]{{{digits}}}"}
        asked = {**ASKED, "temperature": 1, "seed": digits}
        return (await asker.chat.completions.create(**asked, extra_body=extra)).choices[0].message.content

    async def all_of_them() -> list[str | None]:
        async with AsyncOpenAI(base_url=client.base_url, api_key=client.api_key, max_retries=0) as asker:
            return await asyncio.gather(*(one(asker, digits) for digits in range(1, 13)))

    for digits, text in enumerate(asyncio.run(all_of_them()), 1):
        assert re.fullmatch(f"[0-9]{{{digits}}}", text or "")
