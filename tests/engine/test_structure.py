"""Answers that must have a form: whatever is sampled, the form is kept, and nobody else notices."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statewise import LLM, SamplingParams
from statewise.engine.grammar import Grammars
from statewise.engine.structure import MAX_CHARACTERS, Structure
from statewise.engine.tokenizer import Tokenizer
from statewise.errors import RequestError
from statewise.models.directory import model_directory

ENDLESS = Structure.regex("a" + "{2}" * 20)
OVERFLOWING = Structure.grammar("start: r0\n" + "\n".join(f"r{at}: r{at + 1}" for at in range(4500)) + '\nr4500: "a"')
Check = Callable[[Any], bool]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", dtype="float32")


def answer(llm: LLM, structure: Structure, **params: Any) -> str:
    given = {"temperature": 1.0, "seed": 0, "max_tokens": 400, **params}
    output = llm.generate("The people", SamplingParams(structure=structure, **given))[0].outputs[0]
    assert output.finish_reason == "stop", output
    return output.text


# Schemas that are closed and bounded, so that every answer ends, each with a check of its own.
LEAVES: list[tuple[Any, Check]] = [
    ({"type": "boolean"}, lambda v: isinstance(v, bool)),
    ({"type": "null"}, lambda v: v is None),
    ({"type": "integer", "minimum": -5, "maximum": 120}, lambda v: type(v) is int and -5 <= v <= 120),
    ({"type": "string", "maxLength": 6}, lambda v: isinstance(v, str) and len(v) <= 6),
    ({"type": "string", "pattern": "^[a-c]{2,4}$"}, lambda v: re.fullmatch("[a-c]{2,4}", v) is not None),
    ({"enum": ["red", 7, None, "é\n"]}, lambda v: v in ["red", 7, None, "é\n"]),
    ({"const": {"a": [1, 2]}}, lambda v: v == {"a": [1, 2]}),
]


def composed(inner: st.SearchStrategy[tuple[Any, Check]]) -> st.SearchStrategy[tuple[Any, Check]]:
    def array(one: tuple[Any, Check]) -> tuple[Any, Check]:
        schema, check = one
        return (
            {"type": "array", "items": schema, "minItems": 1, "maxItems": 2},
            lambda v: isinstance(v, list) and 1 <= len(v) <= 2 and all(map(check, v)),
        )

    def record(fields: dict[str, tuple[Any, Check]]) -> tuple[Any, Check]:
        properties = {name: schema for name, (schema, _) in fields.items()}
        schema = {"type": "object", "properties": properties, "required": list(fields), "additionalProperties": False}
        return (
            schema,
            lambda v: (
                isinstance(v, dict) and v.keys() == fields.keys() and all(c(v[k]) for k, (_, c) in fields.items())
            ),
        )

    names = st.sampled_from(["a", "b c", "ü", 'q"'])
    return st.one_of(inner.map(array), st.dictionaries(names, inner, min_size=1, max_size=3).map(record))


SCHEMAS = st.recursive(st.sampled_from(LEAVES), composed, max_leaves=4)


@settings(max_examples=10, deadline=None)
@given(SCHEMAS, st.integers(0, 1000))
def test_every_answer_follows_its_schema(llm: LLM, case: tuple[Any, Check], seed: int) -> None:
    schema, check = case
    text = answer(llm, Structure.json_schema(schema), seed=seed)
    assert check(json.loads(text)), text


@pytest.mark.parametrize("expression", ["[0-9]{3}-[a-f]+!", "(yes|no){2}", r"\d{1,3}(\.\d{1,3}){3}", "é+ü?", "x"])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_every_answer_matches_its_expression_as_a_whole(llm: LLM, expression: str, temperature: float) -> None:
    text = answer(llm, Structure.regex(expression), temperature=temperature, max_tokens=2000)
    assert re.fullmatch(expression, text), text


def test_every_choice_can_come_and_nothing_else(llm: LLM) -> None:
    choices = ["yes", "no, never", 'é\n"x"', "{a}", "a" * 50, "yes and no"]
    params = SamplingParams(structure=Structure.choice(choices), temperature=50.0, seed=1, n=64)
    found = {one.text for one in llm.generate("Is it?", params)[0].outputs}
    assert found <= set(choices)
    assert len(found) >= 4


def test_a_grammar_is_followed(llm: LLM) -> None:
    text = answer(llm, Structure.grammar('start: "a" b+ "c"\nb: "bb" | "d"'), temperature=3.0)
    assert re.fullmatch("a(bb|d)+c", text)


def test_the_end_comes_with_the_form_whatever_else_is_asked(llm: LLM) -> None:
    form = Structure.regex("[a-z]{4}")
    for more in ({"ignore_eos": True}, {"min_tokens": 50}, {"logprobs": 2}, {"repetition_penalty": 1.5}, {"top_k": 1}):
        assert re.fullmatch("[a-z]{4}", answer(llm, form, **more))
    biased = SamplingParams(structure=form, temperature=0, logit_bias={5: 100.0}, stop=["zzzz"], best_of=3)
    assert re.fullmatch("[a-z]{4}", llm.generate("x", biased)[0].outputs[0].text)


def test_a_limit_and_a_stop_string_cut_it(llm: LLM) -> None:
    form = Structure.regex("[0-9]{1000}")
    cut = llm.generate("x", SamplingParams(structure=form, max_tokens=5, seed=1))[0].outputs[0]
    assert cut.finish_reason == "length"
    assert re.fullmatch("[0-9]+", cut.text)
    stopped = llm.generate("x", SamplingParams(structure=form, stop=["7"], seed=1))[0].outputs[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", "7")


def test_a_special_token_that_a_form_spells_stays_text(llm: LLM) -> None:
    special = llm.tokenizer._special
    for spelling in ("<|im_end|>", "<|im_system|>", "[BOS]"):
        for form in (
            Structure.choice([f"a{spelling}b"]),
            Structure.regex(re.escape(spelling)),
            Structure.grammar(f"start: {json.dumps(spelling)}"),
            Structure.json_schema({"const": spelling}),
        ):
            one = llm.generate("x", SamplingParams(structure=form, seed=0, max_tokens=60))[0].outputs[0]
            assert spelling in one.text
            assert not {*one.token_ids} & {*special.values()} - llm.engine.eos_ids
    for rule in ("<|im_system|>", "<[4]>", "<[4-11]>"):
        with pytest.raises(RequestError, match="the grammar cannot be followed"):
            llm.generate("x", SamplingParams(structure=Structure.grammar(f"start: {rule}")))


def test_a_grammar_that_grows_too_costly_ends_its_own_answer_only(llm: LLM) -> None:
    plain = SamplingParams(temperature=0, max_tokens=40)
    alone = llm.generate("The people", plain)[0].outputs[0].token_ids
    costly = Structure.grammar("start: s\ns: s s s s | /[a-z ]/")  # cubic in the length of the answer, and more
    shaped = SamplingParams(structure=costly, temperature=1.0, seed=1, max_tokens=2000)
    ended, free = llm.generate(["The people", "The people"], [shaped, plain])
    assert ended.error is not None and "too complex" in ended.error
    assert free.outputs[0].token_ids == alone
    assert not llm.engine.has_work


def test_neighbours_are_the_same_to_the_bit(llm: LLM) -> None:
    plain = SamplingParams(temperature=0.9, seed=3, max_tokens=12, logprobs=3)
    shaped = SamplingParams(structure=Structure.regex("[0-9]+[a-z]"), seed=4, max_tokens=12)

    def tokens(params: list[SamplingParams]) -> list[Any]:
        outputs = llm.generate(["The people", "Once"], params)
        return [(one.outputs[0].token_ids, one.outputs[0].logprobs) for one in outputs]

    assert tokens([plain, plain])[0] == tokens([plain, shaped])[0]
    assert tokens([plain, shaped])[1][0] == tokens([shaped, shaped])[1][0]


def test_continuations_keep_their_own_place_and_preemption_changes_nothing() -> None:
    params = SamplingParams(structure=Structure.regex("([0-9]{2}-){12}!"), n=4, seed=7, max_tokens=100)
    roomy = LLM("demo", dtype="float32")
    cramped = LLM("demo", dtype="float32", num_records=2, num_pages=6, max_length=256)
    first, second = (llm.generate("The people of the", params)[0] for llm in (roomy, cramped))
    texts = [one.text for one in first.outputs]
    assert texts == [one.text for one in second.outputs]
    assert len(set(texts)) == 4
    assert all(re.fullmatch(r"(\d\d-){12}!", text) for text in texts)
    cramped.engine.check_integrity()


def test_what_stands_before_the_form_is_free_and_does_not_end() -> None:
    tokenizer = Tokenizer.from_directory(model_directory("demo"))
    assert tokenizer is not None
    grammars = Grammars(tokenizer, tokenizer.eos_ids)
    try:
        matcher = grammars.compile(Structure("regex", "[0-9]", after="</think>")).matcher("structure")
        for token in tokenizer.encode("well, 2 < 3 </thin </think>"):
            assert not matcher.begun
            matcher.take(token)
        assert matcher.begun
        matcher.take(tokenizer.encode("7")[0])
        assert matcher.complete
    finally:
        grammars.close()


# What cannot be followed


@pytest.mark.parametrize(
    ("structure", "words"),
    [
        (ENDLESS, "too long"),
        (OVERFLOWING, "nested too deeply"),
        (Structure.regex("(" * 30_000 + ")" * 30_000), "regular expression"),
        (Structure.regex("(["), "regular expression"),
        (Structure.regex("(?=a)b"), "regular expression"),
        (Structure.grammar("start: nothing"), "grammar"),
        (Structure.grammar("start: " + "(" * 30_000 + '"a"' + ")" * 30_000), "nested"),
        (Structure.json_schema({"$ref": "http://example.com/schema"}), "JSON schema"),
        (Structure.json_schema({"$ref": "#"}), "JSON schema"),
        (Structure.json_schema(False), "JSON schema"),
        (Structure.json_schema({"type": "string", "pattern": "(["}), "JSON schema"),
    ],
)
def test_a_form_that_cannot_be_followed_is_refused_in_a_sentence(llm: LLM, structure: Structure, words: str) -> None:
    for _ in range(2):
        before = time.monotonic()
        with pytest.raises(RequestError, match=words) as caught:
            llm.generate("x", SamplingParams(structure=structure))
        assert time.monotonic() - before < 20
        assert "\n" not in str(caught.value)
    assert not llm.engine.has_work


def test_a_form_is_bounded_before_anything_reads_it() -> None:
    deep: Any = {}
    for _ in range(5000):
        deep = {"items": deep}
    for make in (
        lambda: Structure.json_schema(deep),
        lambda: Structure.json_schema("{" * 10_000),
        lambda: Structure.json_schema("[1]"),
        lambda: Structure.regex(""),
        lambda: Structure.regex("a" * (MAX_CHARACTERS + 1)),
        lambda: Structure.choice([]),
        lambda: Structure.choice(["a", ""]),
        lambda: Structure.choice(["x"] * 2000),
    ):
        with pytest.raises(RequestError):
            make()


def test_the_process_that_tries_them_out_comes_back_when_it_is_ended(llm: LLM) -> None:
    assert answer(llm, Structure.regex("[a-c]"))
    llm.engine.grammars._trial._process.kill()
    assert answer(llm, Structure.regex("[d-f]"))


def test_where_the_package_is_missing_the_request_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    tokenizer = Tokenizer.from_directory(model_directory("demo"))
    assert tokenizer is not None
    with pytest.raises(RequestError, match="pip install 'statewise") as caught:
        Grammars(tokenizer, tokenizer.eos_ids).compile(Structure.regex("[0-9]"))
    assert caught.value.field == "structure"
