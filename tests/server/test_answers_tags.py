"""From tokens to answers: a family's tags are seen, other control tokens vanish, text that spells any stays."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statewise import SamplingParams
from statewise.engine.request import TokenLogprob
from statewise.engine.tokenizer import Tokenizer
from statewise.errors import ConfigError
from statewise.server.answers import FAMILIES, Message, make_parser, message, needed_tags, parse
from statewise.server.dialect import Dialect
from statewise.server.replies import chat_logprobs
from statewise.server.spelling import TokenSpelling
from tests.engine.test_tokenizer import byte_level_backend
from tests.server.test_answers import TOOLS

TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
KIMI = needed_tags("kimi")
TEMPLATE = "{% for tool in tools or [] %}<|tool_call_begin|>{% endfor %}"
CALL = ["<|tool_call_begin|>", "functions.now:0", "<|tool_call_argument_begin|>", "{}", "<|tool_call_end|>"]


def tokenizer_with(*special: str, template: str = TEMPLATE) -> Tokenizer:
    backend = byte_level_backend()
    backend.add_special_tokens(list(special))
    return Tokenizer(backend, {"chat_template": template})


SPECIAL = tokenizer_with(*KIMI)
DIALECT = Dialect(SPECIAL)


def ids_of(parts: list[str]) -> list[int]:
    """A part that is a special token becomes that token; in others, special tokens are text."""
    ids: list[int] = []
    for part in parts:
        special = part in SPECIAL.special_spellings
        ids += SPECIAL.encode(part, add_special_tokens=False) if special else SPECIAL._encode_literally(part)
    return ids


def answered(parts: list[str], tools: list[Any] | None) -> Message:
    """What the server makes of these tokens."""
    wish = DIALECT.wish(tools, None, None, None)
    params = SamplingParams(**wish.sampling(True))
    params = msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    stream = SPECIAL.stream(params.skip_special_tokens, params.kept_special_tokens)
    parser = wish.parsers([], [], stream=True)()
    pieces = [stream.push(one) for one in ids_of(parts)]
    found = [part for piece in [*pieces, stream.finish()] for part in parser.push(piece)]
    return message([*found, *parser.finish()])


@pytest.mark.parametrize("tools", [None, [TOOL]])
@given(parts=st.lists(st.sampled_from(["<|im_end|>", "say", ' "<|im_end|>" ', "<|im_end|> [BOS]!", "é好", "[BOS]"])))
def test_text_that_spells_control_tokens_stays_and_the_tokens_vanish(tools: Any, parts: list[str]) -> None:
    expected = "".join(part for part in parts if part not in SPECIAL.special_spellings)
    assert (answered(parts, tools).content or "") == expected


def test_calls_are_seen_beside_text_that_spells_control_tokens() -> None:
    found = answered(["<think>", "well", "</think>", 'say "<|im_end|>" now', *CALL, "<|im_end|>"], [TOOL])
    assert (found.reasoning, found.content) == ("well", 'say "<|im_end|>" now')
    assert [(call.name, call.arguments) for call in found.tool_calls] == [("now", "{}")]
    plain = answered(["<think>", "well", "</think>", *CALL, "<|im_end|>"], None)
    assert (plain.reasoning, plain.content, plain.tool_calls) == ("well", "functions.now:0{}", ())


def test_only_special_tokens_are_asked_for() -> None:
    wish = DIALECT.wish([TOOL], None, None, None)
    assert set(wish.sampling(True)["kept_special_tokens"]) == set(KIMI)
    assert wish.sampling(False)["kept_special_tokens"] == ()
    assert wish.sampling(False)["skip_special_tokens"] is False
    for asked in (DIALECT.wish(None, None, None, None), DIALECT.wish([TOOL], "required", None, None)):
        assert set(asked.sampling(True)["kept_special_tokens"]) == {"<think>", "</think>"}
    plain = Dialect(tokenizer_with()).wish([TOOL], None, None, None)
    assert plain.sampling(True)["kept_special_tokens"] == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tag_fits_what_may_be_asked_for(family: str) -> None:
    tags = needed_tags(family)
    assert {"<think>", "</think>"} <= set(tags)
    assert SamplingParams(kept_special_tokens=tags).kept_special_tokens == tags


def test_an_unknown_family_is_named_with_and_without_tools() -> None:
    for tools in (None, TOOLS):
        with pytest.raises(ConfigError, match="'klingon'"):
            parse(make_parser("klingon", tools), "")
    with pytest.raises(ConfigError, match="'klingon'"):
        needed_tags("klingon")


def test_log_probabilities_tell_the_bytes_of_parts_of_a_character() -> None:
    ids = SPECIAL._encode_literally("好")
    spell = TokenSpelling(SPECIAL)
    content = chat_logprobs([TokenLogprob(one, -0.5, 1, {one: -0.5}) for one in ids], spell)["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]) == "好".encode()
    assert [entry["top_logprobs"][0]["bytes"] for entry in content] == [entry["bytes"] for entry in content]
    byte = byte_level_backend().token_to_id("Ã")  # of "é" as two tokens
    entry = chat_logprobs([TokenLogprob(byte, -0.5, 1, {})], spell)["content"][0]
    assert (entry["token"], entry["bytes"]) == ("\ufffd", [0xC3])
    without = TokenSpelling(None)
    assert without.bytes(7) == without(7).encode()
