"""Chats whose answers hold thoughts and calls: whole answers, streams, and what is asked of the engine for them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from tests.server.scripted import ScriptedEngine, data_of, scripted

TEMPLATE = (
    "{% for tool in tools or [] %}<tool_call>{{ tool.function.name }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
HELLO = [{"role": "user", "content": "hello"}]
Talk = Callable[[httpx.AsyncClient, ScriptedEngine], Awaitable[Any]]


def run(talk: Talk, answer: str, **options: Any) -> Any:
    async def go() -> Any:
        async with scripted(lambda *_: answer, **{"template": TEMPLATE, **options}) as (client, engine):
            return await asyncio.wait_for(talk(client, engine), 30)

    return asyncio.run(go())


def both(answer: str, body: dict[str, Any], **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first choice of a whole answer, and of a stream put together."""

    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> Any:
        request = {"messages": HELLO, **body}
        whole = await client.post("/v1/chat/completions", json=request)
        stream = await client.post("/v1/chat/completions", json={**request, "stream": True})
        assert whole.status_code == stream.status_code == 200, whole.text
        assert stream.text.endswith("data: [DONE]\n\n")
        return whole.json()["choices"][0], together(data_of(stream.text))

    return run(talk, answer, **options)


def together(events: list[Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": None}
    finish = None
    for event in events:
        for choice in event["choices"]:
            assert finish is None
            delta, finish = choice["delta"], choice["finish_reason"]
            for name in ("content", "reasoning_content"):
                if delta.get(name):
                    message[name] = (message.get(name) or "") + delta[name]
            for call in delta.get("tool_calls", []):
                calls = message.setdefault("tool_calls", [])
                if call["index"] == len(calls):
                    calls.append({"id": call["id"], "type": "function", "function": dict(call["function"])})
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return {"message": message, "finish_reason": finish}


def calls_of(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in choice["message"].get("tool_calls", [])
    ]


@pytest.mark.parametrize(
    ("answer", "body", "content", "reasoning", "calls", "finish"),
    [
        ("plain text", {}, "plain text", None, [], "stop"),
        ("<think>hm\n</think>\n\ntext", {}, "text", "hm", [], "stop"),
        ("hm\n</think>\n\ntext", {"chat_template_kwargs": {"enable_thinking": True}}, "text", "hm", [], "stop"),
        (CALL, {"tools": [WEATHER]}, None, None, [("weather", {"city": "Rome"})], "tool_calls"),
        ("I look.\n" + CALL, {"tools": [WEATHER]}, "I look.", None, [("weather", {"city": "Rome"})], "tool_calls"),
        (CALL, {}, CALL, None, [], "stop"),  # nothing is a call where no tools are offered
        (CALL, {"tools": [WEATHER], "tool_choice": "none"}, CALL, None, [], "stop"),
        (CALL, {"tools": [NOW]}, CALL, None, [], "stop"),  # nor is one of an unknown tool
        (
            f"<think>which?</think>{CALL}\n{SECOND}",
            {"tools": [WEATHER, NOW]},
            None,
            "which?",
            [("weather", {"city": "Rome"}), ("now", {})],
            "tool_calls",
        ),
        (
            f"{CALL}\n{SECOND}",
            {"tools": [WEATHER, NOW], "parallel_tool_calls": False},
            None,
            None,
            [("weather", {"city": "Rome"})],
            "tool_calls",
        ),
        (
            '{"name": "weather", "arguments": {"city": "Rome"}}',
            {"tools": [WEATHER], "tool_choice": "required"},
            None,
            None,
            [("weather", {"city": "Rome"})],
            "tool_calls",
        ),
    ],
)
def test_an_answer_is_told_in_its_parts_whole_and_streamed(
    answer: str, body: dict[str, Any], content: str, reasoning: str, calls: list[Any], finish: str
) -> None:
    for choice in both(answer, body):
        assert choice["message"]["content"] == content
        assert choice["message"].get("reasoning_content") == reasoning
        assert calls_of(choice) == calls
        assert choice["finish_reason"] == finish


def test_a_call_that_the_limit_cuts_is_content_in_a_whole_answer_and_ends_by_length() -> None:
    whole, streamed = both(CALL[:40], {"tools": [WEATHER]}, finish="length")
    assert whole["finish_reason"] == streamed["finish_reason"] == "length"
    assert calls_of(whole) == []
    assert whole["message"]["content"] == CALL[:40]


def test_the_choices_of_a_stream_do_not_mix() -> None:
    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> Any:
        body = {"messages": HELLO, "n": 3, "stream": True, "stream_options": {"include_usage": True}}
        return data_of((await client.post("/v1/chat/completions", json=body)).text)

    events = run(talk, "<think>hm</think>some text")
    for index in range(3):
        own = [{"choices": [c for c in event["choices"] if c["index"] == index]} for event in events]
        assert together(own)["message"] == {
            "role": "assistant",
            "content": "some text",
            "reasoning_content": "hm",
        }
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] > 0


def test_log_probabilities_of_every_token_reach_the_client_also_where_its_text_waits() -> None:
    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> Any:
        body = {"messages": HELLO, "logprobs": True, "top_logprobs": 1, "tools": [WEATHER], "stream": True}
        return data_of((await client.post("/v1/chat/completions", json=body)).text)

    told = [c for event in run(talk, "<think>hm</think>" + CALL) for c in event["choices"] if c["logprobs"]]
    assert sum(len(choice["logprobs"]["content"]) for choice in told) == -(-len("<think>hm</think>" + CALL) // 3)


def test_what_a_request_wants_is_what_the_engine_is_asked() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"type": "function", "function": {"name": "now"}}

    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> Any:
        for more in (
            {},
            {"tools": [WEATHER]},
            {"tools": [WEATHER, NOW], "tool_choice": named},
            {"response_format": {"type": "json_object"}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
            {
                "response_format": {"type": "json_object"},
                "chat_template_kwargs": {"enable_thinking": True},
            },
            {"structured_outputs": {"regex": "[0-9]+"}},
            {"guided_choice": ["yes", "no"]},
        ):
            response = await client.post("/v1/chat/completions", json={"messages": HELLO, **more})
            assert response.status_code == 200, response.text
        return [asked.params for asked in engine.asked]

    plain, tools, forced, anything, followed, thinking, regex, choice = run(talk, "{}")
    assert plain.structure is None
    assert plain.skip_special_tokens
    assert tools.structure is None
    assert tools.skip_special_tokens
    assert forced.structure.kind == "json_schema"
    assert "now" in forced.structure.value
    assert "weather" not in forced.structure.value
    assert anything.structure.kind == "json_object"
    assert json.loads(followed.structure.value) == schema
    assert thinking.structure.after == "</think>"
    assert (regex.structure.kind, regex.structure.value) == ("regex", "[0-9]+")
    assert json.loads(choice.structure.value) == ["yes", "no"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": "{"}, "guided_json"),
        ({"chat_template_kwargs": {"messages": []}}, "messages"),
        ({"session_id": "../../etc/passwd"}, "session_id"),
    ],
)
def test_what_cannot_be_wanted_is_refused_by_name_and_nothing_is_asked(body: dict[str, Any], field: str) -> None:
    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> Any:
        response = await client.post("/v1/chat/completions", json={"messages": HELLO, **body})
        return response, list(engine.asked)

    response, asked = run(talk, "x")
    assert response.status_code in (400, 404), response.text
    assert field in (response.json()["error"]["param"] or "")
    assert asked == []


def test_tools_are_refused_where_the_model_would_not_hear_of_them() -> None:
    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> Any:
        auto = await client.post("/v1/chat/completions", json={"messages": HELLO, "tools": [NOW]})
        forced = await client.post(
            "/v1/chat/completions", json={"messages": HELLO, "tools": [NOW], "tool_choice": "required"}
        )
        return auto, forced

    auto, forced = run(talk, '{"name": "now", "arguments": {}}', template=None)
    assert auto.status_code == 400
    assert "tool_choice" in auto.json()["error"]["message"]
    assert calls_of(forced.json()["choices"][0]) == [("now", {})]


def test_a_prompt_with_more_characters_than_can_fit_is_refused_before_it_is_read() -> None:
    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> Any:
        long = "x " * 1_000_000
        chat = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": long}]})
        text = await client.post("/v1/completions", json={"prompt": long})
        return chat, text

    for response in run(talk, "x"):
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert "characters" in response.json()["error"]["message"]


def asked_for(body: dict[str, Any], answer: str = "x", path: str = "chat/completions", **options: Any) -> Any:
    """The response, and what the engine was asked."""

    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> Any:
        response = await client.post(f"/v1/{path}", json=body)
        return response, list(engine.asked)

    return run(talk, answer, **options)


def test_allowed_tools_are_all_that_is_offered() -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NOW]}}
    response, asked = asked_for(
        {"messages": HELLO, "tools": [WEATHER, NOW], "tool_choice": choice}, '{"name": "now", "arguments": {}}'
    )
    assert calls_of(response.json()["choices"][0]) == [("now", {})]
    assert "weather" not in asked[0].params.structure.value
    response, _ = asked_for({"messages": HELLO, "tools": [WEATHER], "tool_choice": choice})
    assert response.status_code == 400


def test_a_form_leaves_no_room_for_tools_and_says_so() -> None:
    form = {"response_format": {"type": "json_object"}, "tools": [NOW]}
    response, asked = asked_for({"messages": HELLO, **form})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "response_format"
    assert asked == []
    response, _ = asked_for({"messages": HELLO, **form, "tool_choice": "none"}, "{}")
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": True, "top_logprobs": 25}, "top_logprobs"),
    ],
)
def test_an_error_names_the_field_that_the_client_has_sent(body: dict[str, Any], param: str) -> None:
    response, _ = asked_for({"messages": HELLO, **body})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert param in response.json()["error"]["message"]


def test_the_developer_is_who_was_the_system_and_seeds_may_be_negative() -> None:
    tokens = []
    for role in ("developer", "system"):
        body = {"messages": [{"role": role, "content": "Be kind."}, *HELLO], "seed": -1}
        response, asked = asked_for(body, template=None)
        assert response.status_code == 200, response.text
        tokens.append(asked[0].token_ids)
        assert asked[0].params.seed == (1 << 63) - 1
    assert tokens[0] == tokens[1]


def test_best_of_counts_as_choices_and_the_queue_is_bounded_at_its_end() -> None:
    response, asked = asked_for({"prompt": ["x"] * 2, "best_of": 100}, path="completions")
    assert response.status_code == 400
    assert asked == []

    async def flood() -> list[int]:
        gate = threading.Event()

        def wait(*_: Any) -> str:
            gate.wait(30)
            return "x"

        async with scripted(wait, template=TEMPLATE) as (client, _):
            body = {"messages": HELLO}
            posted = [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for _ in range(600)]
            while sum(one.done() for one in posted) < 600 - 512:
                await asyncio.sleep(0.01)
            gate.set()
            return [response.status_code for response in await asyncio.gather(*posted)]

    codes = asyncio.run(asyncio.wait_for(flood(), 60))
    assert codes.count(503) == 600 - 512
    assert codes.count(200) == 512


@pytest.mark.parametrize(
    ("field", "status", "kind"), [("guided_regex", 400, "invalid_request_error"), (None, 500, "server_error")]
)
def test_a_failed_answer_is_told_by_whose_fault_it_is_and_never_as_an_end(
    field: str | None, status: int, kind: str
) -> None:
    failing = {"finish": "error", "error": "the structure has become too complex", "error_field": field}
    for path, body in (("chat/completions", {"messages": HELLO}), ("completions", {"prompt": "x"})):
        whole, _ = asked_for(body, "some text", path, **failing)
        assert (whole.status_code, whole.json()["error"]["type"]) == (status, kind)
        assert whole.json()["error"]["param"] == field
        streamed, _ = asked_for({**body, "stream": True}, "some text", path, **failing)
        events = data_of(streamed.text)
        assert events[-1]["error"]["type"] == kind
        assert all(choice["finish_reason"] is None for event in events[:-1] for choice in event["choices"])
    response, _ = asked_for({"input": "x", "stream": True}, "some text", "responses", **failing)
    assert data_of(response.text)[-1]["type"] == "response.failed"


def test_a_call_that_a_stop_string_cuts_does_not_end_as_a_call() -> None:
    body = {"messages": HELLO, "tools": [WEATHER], "stream": True}
    response, _ = asked_for(body, CALL[:-25])
    assert together(data_of(response.text))["finish_reason"] == "stop"
    response, _ = asked_for(body, CALL)
    assert together(data_of(response.text))["finish_reason"] == "tool_calls"
