"""`best_of` makes more continuations than it gives, as forks of one prompt, and gives the likeliest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from statewise import LLM, SamplingParams
from statewise.errors import RequestError
from tests.engine.conftest import Engines, prompt
from tests.engine.test_prefix_cache import ask, counted

PARAMS = SamplingParams(temperature=1.3, seed=7, n=6, max_tokens=5, ignore_eos=True, logprobs=0)


@pytest.fixture(scope="module")
def llm(make: Engines) -> LLM:
    return make()


def mean(completion) -> float:  # type: ignore[no-untyped-def]
    return sum(one.logprob for one in completion.logprobs) / len(completion.logprobs)


@pytest.mark.parametrize("n", [1, 2, 6])
def test_the_likeliest_are_given_first_to_last(llm: LLM, n: int) -> None:
    tokens = prompt(90)
    everything = sorted(ask(llm, tokens, PARAMS).outputs, key=mean, reverse=True)
    best = ask(llm, tokens, replace(PARAMS, n=n, best_of=6))
    if n == 6:  # nothing to choose: they come as they were made
        everything.sort(key=lambda completion: completion.index)
    assert [one.token_ids for one in best.outputs] == [one.token_ids for one in everything[:n]]
    assert [one.index for one in best.outputs] == list(range(n))


def test_its_prompt_is_computed_once_and_its_logprobs_stay_inside(llm: LLM) -> None:
    params = replace(PARAMS, n=1, best_of=4, logprobs=None)
    with counted(llm) as rows:
        output = ask(llm, prompt(130, seed=3), params)
        assert rows() == 130 + 4 * (PARAMS.max_tokens - 1)
    assert output.outputs[0].logprobs is None


def test_it_cannot_be_streamed_and_is_bounded(llm: LLM) -> None:
    with pytest.raises(RequestError, match="best_of cannot be streamed"):
        next(llm.stream({"prompt_token_ids": prompt(5)}, SamplingParams(best_of=2)))
    with pytest.raises(RequestError, match="best_of must be an integer from 3 to 128, found 2"):
        SamplingParams(n=3, best_of=2)
    with pytest.raises(RequestError, match="fork it for 4"):
        llm.session().append(prompt(5)).generate(SamplingParams(best_of=4))
