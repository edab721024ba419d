"""Sessions: whatever is appended, forked and rewound, the answers are those of fresh runs."""

from __future__ import annotations

from typing import Any

import pytest

from statewise import LLM, SamplingParams
from statewise.errors import RequestError
from tests.engine.conftest import Engines, prompt
from tests.engine.test_prefix_cache import counted

SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def fresh_answer(plain: LLM, tokens: list[int], params: SamplingParams = SHORT) -> list[int]:
    return plain.generate({"prompt_token_ids": tokens}, params)[0].outputs[0].token_ids


@pytest.fixture(scope="module")
def plain(make: Engines) -> LLM:
    return make(prefix_cache=False)


@pytest.fixture(scope="module")
def llm(make: Engines) -> LLM:
    return make(num_records=24)


def test_a_document_and_its_branches(llm: LLM, plain: LLM) -> None:
    document = prompt(1000, seed=1)
    questions = [prompt(20, seed=10 + i) for i in range(5)]
    with counted(llm) as rows:
        session = llm.session().append(document)
        branches = session.fork(5)
        answers = [
            branch.append(question).generate(SHORT) for branch, question in zip(branches, questions, strict=True)
        ]
        # The document once, each question, and of each answer the tokens that passed the model.
        assert rows() == 1000 + 5 * 20 + 5 * 3
    for question, answer in zip(questions, answers, strict=True):
        assert answer.token_ids == fresh_answer(plain, document + question)
    assert session.token_ids == document
    assert branches[2].token_ids == document + questions[2] + answers[2].token_ids


def test_rewinding_to_a_position_a_name_and_a_turn(llm: LLM, plain: LLM) -> None:
    session = llm.session().append(prompt(90, seed=2)).checkpoint("start")
    first = session.generate(SHORT).token_ids
    session.append(prompt(33, seed=3))
    second = session.generate(SHORT).token_ids
    assert session.info.turns == (90, 94, 127, 131)
    assert session.info.checkpoints == {"start": 90}
    session.rewind(turn=2)
    with counted(llm) as rows:
        assert session.generate(SHORT).token_ids == second
        assert rows() == SHORT.max_tokens - 1
    session.rewind(to="start")
    with counted(llm) as rows:
        assert session.generate(SHORT).token_ids == first
        assert rows() == SHORT.max_tokens - 1
    session.rewind(to=77)
    assert session.info.turns == ()
    assert session.generate(SHORT).token_ids == fresh_answer(plain, prompt(90, seed=2)[:77])


def test_the_tree_lies_on_the_way(llm: LLM) -> None:
    session = llm.session("tree").append(prompt(70, seed=4)).checkpoint("here")
    session.generate(SHORT)
    session.append(prompt(10, seed=5))
    info = session.info
    assert [point.num_tokens for point in info.tree if point.num_tokens % 64] == [70, 73, 84]
    (named,) = (point for point in info.tree if point.names)
    assert (named.num_tokens, named.names) == (70, ("here",))
    assert info.nbytes == llm.engine.memory_of(84) >= named.nbytes


def test_streaming_is_generating(llm: LLM) -> None:
    session = llm.session().append(prompt(50, seed=6))
    other = session.fork()[0]
    deltas = list(session.stream(SHORT))
    assert session.token_ids == other.append(other.generate(SHORT).token_ids and prompt(3, seed=1)).token_ids[:54]
    assert deltas[-1].finish_reason == "length"
    stream = session.stream(SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
    before = len(session.token_ids)
    next(stream), next(stream)
    stream.close()
    assert before < len(session.token_ids) < before + 50
    llm.engine.check_integrity()
    assert not llm.engine.has_work


def test_pinned_memory_is_evicted_last(make: Engines) -> None:
    small = make(num_records=4)
    session = small.session().append(prompt(100, seed=7)).pin(600)
    for seed in range(20, 30):
        small.generate({"prompt_token_ids": prompt(100, seed)}, SHORT)
    with counted(small) as rows:
        session.generate(SHORT)
        assert rows() == SHORT.max_tokens - 1
    small.engine.check_integrity()


@pytest.mark.parametrize(
    ("act", "field"),
    [
        (lambda s: s.append(""), "content"),
        (lambda s: s.append([]), "content"),
        (lambda s: s.append(5), "content"),
        (lambda s: s.append([99999]), "token_ids"),
        (lambda s: s.append("text"), "content"),
        (lambda s: s.append([1] * 9000), "prompt"),
        (lambda s: s.rewind(), "to"),
        (lambda s: s.rewind(to=11), "to"),
        (lambda s: s.rewind(to=-1), "to"),
        (lambda s: s.rewind(to="nowhere"), "to"),
        (lambda s: s.rewind(turn=1), "turn"),
        (lambda s: s.rewind(to=1, turn=0), "to"),
        (lambda s: s.fork(0), "n"),
        (lambda s: s.pin(0), "ttl"),
        (lambda s: s.pin(float("nan")), "ttl"),
        (lambda s: s.checkpoint(""), "name"),
        (lambda s: s.generate(SamplingParams(n=2)), "n"),
    ],
)
def test_what_a_session_cannot_do_is_said_and_changes_nothing(llm: LLM, act: Any, field: str) -> None:
    session = llm.session().append(prompt(10, seed=8))
    with pytest.raises(RequestError) as refusal:
        act(session)
    assert refusal.value.field == field
    assert session.token_ids == prompt(10, seed=8)
    assert session.info.turns == (10,)


def test_a_closed_session_and_an_empty_one(llm: LLM) -> None:
    with llm.session() as session:
        with pytest.raises(RequestError, match="the session is empty: append something first"):
            session.generate(SHORT)
        session.append(prompt(5))
    for act in (lambda: session.append([5]), lambda: session.generate(), lambda: session.fork(), lambda: session.info):
        with pytest.raises(RequestError, match="the session is closed"):
            act()


def test_messages_are_rendered_with_those_before_them() -> None:
    demo, plain = (LLM("demo", num_records=16, dtype="float32", prefix_cache=cache) for cache in (True, False))
    params = SamplingParams(temperature=0, max_tokens=40)
    session, messages = demo.session(), []
    for content in ("My name is Victor.", "What is 27 + 45?", "What is my name?"):
        messages.append({"role": "user", "content": content})
        answer = session.append(messages[-1:]).generate(params)
        assert answer.text == plain.chat(messages, params)[0].outputs[0].text
        messages.append({"role": "assistant", "content": answer.text})
    assert "Victor" in answer.text
    assert session.info.num_tokens == len(session.token_ids)
