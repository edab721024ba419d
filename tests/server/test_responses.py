"""`/v1/responses`: the items of an answer, and a stream whose events build the same response."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.server.scripted import ScriptedEngine, data_of, scripted
from tests.server.test_chat import CALL, SECOND, TEMPLATE, run

WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
NOW = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}}
ANSWERS = ["plain text", "<think>hm</think>text", f"<think>which?</think>I look.\n{CALL}\n{SECOND}", CALL]


def ask(body: dict[str, Any], answer: str, **options: Any) -> httpx.Response:
    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> Any:
        return await client.post("/v1/responses", json={"input": "hello", **body})

    response: httpx.Response = run(talk, answer, **options)
    return response


def shape(response: dict[str, Any]) -> list[tuple[Any, ...]]:
    """A response without its ids."""
    return [
        (item["type"], item["status"], item["name"], json.loads(item["arguments"]))
        if item["type"] == "function_call"
        else (item["type"], item["status"], item["content"][0]["text"])
        for item in response["output"]
    ]


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_stream_builds_what_the_whole_answer_is(answer: str) -> None:
    whole = ask({"tools": [WEATHER, NOW]}, answer).json()
    stream = ask({"tools": [WEATHER, NOW], "stream": True}, answer)
    events = data_of(stream.text)
    assert "[DONE]" not in stream.text
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    names = [line.removeprefix("event: ") for line in stream.text.splitlines() if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == "response.completed"
    last = events[-1]["response"]
    assert shape(last) == shape(whole)
    assert whole["status"] == "completed"
    assert last["usage"] == whole["usage"]
    built: dict[int, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            built[event["output_index"]] = built.get(event["output_index"], "") + event["delta"]
    for index, item in enumerate(last["output"]):
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert built[index] == text
        assert sum(e["type"] == "response.output_item.done" and e["output_index"] == index for e in events) == 1


def test_thoughts_are_counted_and_calls_are_items() -> None:
    response = ask({"tools": [WEATHER, NOW]}, ANSWERS[2]).json()
    assert shape(response) == [
        ("reasoning", "completed", "which?"),
        ("message", "completed", "I look."),
        ("function_call", "completed", "weather", {"city": "Rome"}),
        ("function_call", "completed", "now", {}),
    ]
    details = response["usage"]["output_tokens_details"]
    assert 0 < details["reasoning_tokens"] < response["usage"]["output_tokens"]


def test_an_answer_that_the_limit_cuts_is_incomplete() -> None:
    whole = ask({"max_output_tokens": 4}, "some text", finish="length").json()
    assert whole["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["output"][0]["status"] == "incomplete"
    stream = ask({"stream": True}, "some text", finish="length")
    assert data_of(stream.text)[-1]["type"] == "response.incomplete"


def test_the_items_of_earlier_answers_become_the_messages_that_they_were() -> None:
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "weather in Rome?"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "weather in Rome?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]

    async def go() -> list[list[int]]:
        async with scripted(lambda *_: "x", template=TEMPLATE) as (client, engine):
            await client.post("/v1/responses", json={"input": items})
            await client.post("/v1/chat/completions", json={"messages": chat})
            return [asked.token_ids for asked in engine.asked]

    first, second = asyncio.run(go())
    assert first == second


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
            "input[0].content",
        ),
        ({"input": []}, "input"),
        ({"n": 2}, "n"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ],
)
def test_what_is_not_served_is_refused_by_name(body: dict[str, Any], field: str) -> None:
    response = ask(body, "x")
    assert response.status_code == 400, response.text
    assert (response.json()["error"]["param"] or "").startswith(field)


def test_the_form_of_the_text_is_asked_of_the_engine() -> None:
    schema = {"type": "object"}

    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> Any:
        form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
        body = {"input": "hello", "text": {"format": form}, "instructions": "Be kind.", "metadata": {"a": "b"}}
        response = await client.post("/v1/responses", json=body)
        return engine.asked[0].params, response.json()

    params, response = run(talk, "{}")
    assert json.loads(params.structure.value) == schema
    assert response["text"]["format"]["schema"] == schema
    assert response["instructions"] == "Be kind."
    assert response["metadata"] == {"a": "b"}
    assert response["store"] is False
