"""The schema of forced calls, the calls in such answers, and which family a model belongs to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from statewise.errors import ConfigError, RequestError
from statewise.server.answers import (
    FAMILIES,
    Tools,
    calls_from_json,
    family_of,
    make_parser,
    new_ids,
    opens_thinking,
    structure_for,
    takes_tools,
)
from tests.server.test_answers import TOOLS, tool

NAMED = {"type": "function", "function": {"name": "now"}}


def resolve(schema: Any, reference: str) -> Any:
    for step in reference.removeprefix("#").split("/")[1:]:
        schema = schema[int(step)] if isinstance(schema, list) else schema[step]
    return schema


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_a_choice_of_the_model_has_no_structure(choice: str | None) -> None:
    assert structure_for(TOOLS, choice) is None
    assert structure_for(None, choice) is None


def test_a_required_call_is_one_of_the_tools() -> None:
    schema = structure_for(TOOLS, "required")
    assert schema is not None
    assert [one["properties"]["name"] for one in schema["anyOf"]] == [{"const": name} for name in TOOLS.names]
    assert [one["properties"]["arguments"] for one in schema["anyOf"]] == [
        {**TOOLS.parameters(name), "additionalProperties": False} for name in TOOLS.names
    ]
    assert all(one["required"] == ["name", "arguments"] for one in schema["anyOf"])
    several = structure_for(TOOLS, "required", parallel=True)
    assert several is not None
    assert (several["type"], several["items"], several["minItems"]) == ("array", schema, 1)


def test_a_named_call_is_that_one() -> None:
    schema = structure_for(TOOLS, NAMED, parallel=True)
    assert schema is not None
    assert schema["properties"]["name"] == {"const": "now"}
    bare = Tools([{"type": "function", "function": {"name": "now"}}])
    schema = structure_for(bare, "required")
    assert schema is not None
    assert schema["properties"]["arguments"] == {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.mark.parametrize("parallel", [True, False])
def test_references_of_parameters_point_to_where_they_have_moved(parallel: bool) -> None:
    place = {"type": "object", "properties": {"$ref": {"type": "string"}, "near": {"$ref": "#/$defs/place"}}}
    parameters = {
        "type": "object",
        "properties": {"place": {"$ref": "#/$defs/place"}, "all": {"items": [{"$ref": "#"}]}},
        "$defs": {"place": place},
        "default": {"$ref": "#/kept"},
    }
    travel = {"type": "function", "function": {"name": "travel", "parameters": parameters}}
    for tools, choice in ((Tools([tool("now"), travel]), "required"), (Tools([travel]), "required")):
        schema = structure_for(tools, choice, parallel)
        assert schema is not None
        one = schema["items"] if parallel else schema
        moved = one.get("anyOf", [one])[-1]["properties"]["arguments"]
        near = moved["$defs"]["place"]["properties"]["near"]["$ref"]
        for reference in (moved["properties"]["place"]["$ref"], near):
            assert resolve(schema, reference) is moved["$defs"]["place"]
        assert resolve(schema, moved["properties"]["all"]["items"][0]["$ref"]) is moved
        assert moved["default"] == {"$ref": "#/kept"}
        assert moved["$defs"]["place"]["properties"]["$ref"] == {"type": "string"}


@pytest.mark.parametrize(
    ("tools", "choice", "reason"),
    [
        (None, "required", "tools is empty"),
        (TOOLS, "always", "must be auto, none, required"),
        (TOOLS, {"type": "function"}, "must be auto, none, required"),
        (TOOLS, {"type": "function", "function": {"name": "nobody"}}, "'nobody', which is not in tools"),
    ],
)
def test_bad_choices_are_refused(tools: Tools | None, choice: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        structure_for(tools, choice)
    assert caught.value.field == "tool_choice"


def test_a_schema_may_not_be_too_deep() -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(100):
        schema = {"type": "object", "properties": {"a": schema}}
    deep = Tools([{"type": "function", "function": {"name": "now", "parameters": schema}}])
    with pytest.raises(RequestError, match="nested more than"):
        structure_for(deep, "required")


def test_forced_answers_become_calls() -> None:
    new_id = new_ids("kimi", earlier_calls=2)
    text = '[{"name": "now", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "Ulm"}}]'
    first, second = calls_from_json(text, TOOLS, new_id)
    assert (first.id, first.name, first.arguments) == ("functions.now:2", "now", "{}")
    assert (second.id, second.name, json.loads(second.arguments)) == (
        "functions.get_weather:3",
        "get_weather",
        {"city": "Ulm"},
    )
    assert calls_from_json('{"name": "now", "arguments": {}}', TOOLS)[0].name == "now"
    assert calls_from_json('{"name": "now", "argu', TOOLS) == ()
    assert calls_from_json('{"name": "get_weather", "arguments": {"city": "U', TOOLS) == ()


@pytest.mark.parametrize(
    ("names", "family"),
    [
        ({"architecture": "KimiLinearForCausalLM"}, "kimi"),
        ({"architecture": "MiniMaxM2ForCausalLM"}, "minimax"),
        ({"model_type": "minimax_text_01"}, "minimax"),
        ({"architecture": "BailingMoeV2_5ForCausalLM"}, "ling"),
        ({"model_type": "bailing_hybrid"}, "ling"),
        ({"model_type": "qwen3_next"}, "hermes"),
        ({"architecture": "SomethingElse"}, "hermes"),
        ({}, "hermes"),
        # the template knows better
        ({"architecture": "KimiLinearForCausalLM", "chat_template": "{{ messages }}"}, "hermes"),
        ({"architecture": "KimiLinearForCausalLM", "chat_template": "{{ tools | tojson }}"}, "kimi"),
        ({"architecture": "Unknown", "chat_template": "{{ tools }}<|tool_call_begin|>"}, "kimi"),
        ({"architecture": "Unknown", "chat_template": "{{ tools }}<minimax:tool_call>"}, "minimax"),
        ({"architecture": "Unknown", "chat_template": "{{ tools }}system function_setting=functions"}, "minimax"),
        ({"architecture": "Unknown", "chat_template": "<role>{{ tools }}<tool_call>"}, "ling"),
        ({"architecture": "MiniMaxM1ForCausalLM", "chat_template": "{{ tools }}<tool_call>"}, "hermes"),
    ],
)
def test_the_family_of_a_model(names: dict[str, str], family: str) -> None:
    assert family_of(**names) == family
    assert family in FAMILIES


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of kimi, minimax, ling, hermes, json, none"):
        make_parser("gpt")


def test_prompts_and_templates_are_understood() -> None:
    assert opens_thinking("<role>ASSISTANT</role>\n<think>")
    assert opens_thinking("]~b]ai\n<think>\n")
    assert not opens_thinking("<role>ASSISTANT</role>\n<think></think>")
    assert not opens_thinking("<|im_assistant|>assistant<|im_middle|>")
    assert takes_tools("{% if tools %}…{% endif %}")
    assert not takes_tools("{{ messages }}")
