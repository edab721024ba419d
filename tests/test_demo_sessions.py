"""Real models, a long document and five questions about it: read once, answered as if it were read for each."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from random import Random

import pytest

from statewise import LLM, SamplingParams
from statewise.evaluation.documents import Writer
from statewise.evaluation.filler import shipped_prose
from tests.engine.test_prefix_cache import counted
from tests.test_demo_models import SECOND

ANSWER = SamplingParams(temperature=0, max_tokens=12)
DOCUMENT, QUESTIONS = 4000, 5


def prompts(llm: LLM) -> tuple[list[list[int]], list[str]]:
    """Five prompts that begin with the same document, and the value that answers each."""
    rng, tokenizer = Random(6), llm.tokenizer
    assert tokenizer is not None
    writer = Writer(shipped_prose(), lambda text: len(tokenizer.encode(text)))
    while True:
        document = writer.document(rng, DOCUMENT + 50, with_change=False)
        asked = [document.target, *rng.sample(list(document.true.values()), min(len(document.true), QUESTIONS - 1))]
        if len({fact.key for fact in asked}) == QUESTIONS:
            asks = [tokenizer.encode_chat(document.ask(fact, rng)) for fact in asked]
            return asks, [fact.value for fact in asked]


@pytest.mark.parametrize("model", ["demo", SECOND], ids=["kimi", "lightning"])
def test_five_questions_about_one_document(model: str | Path) -> None:
    fresh, llm = LLM(model, dtype="float32", prefix_cache=False), LLM(model, dtype="float32")
    asks, values = prompts(llm)
    together = zip(*asks, strict=False)
    document = [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, together)]
    assert len(document) >= DOCUMENT
    with counted(llm) as rows:
        session = llm.session().append(document)
        branches = [
            branch.append(ask[len(document) :]) for branch, ask in zip(session.fork(QUESTIONS), asks, strict=True)
        ]
        assert rows() == len(document) + sum(len(ask) - len(document) for ask in asks)
        answers = [branch.generate(ANSWER) for branch in branches]
    expected = fresh.generate([{"prompt_token_ids": ask} for ask in asks], ANSWER)
    assert [answer.token_ids for answer in answers] == [output.outputs[0].token_ids for output in expected]
    right = sum(value in answer.text for value, answer in zip(values, answers, strict=True))
    assert right >= QUESTIONS - 1  # a wrong state finds none
    llm.engine.check_integrity()
