"""A prompt goes on from what is frozen of it, and nobody can tell from the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from statewise import LLM, RequestOutput, SamplingParams
from tests.engine.conftest import Engines, prompt

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, return_logits=True)


def ask(llm: LLM, tokens: list[int], params: SamplingParams = GREEDY) -> RequestOutput:
    output = llm.generate({"prompt_token_ids": tokens}, params)[0]
    assert output.error is None
    llm.engine.check_integrity()
    return output


@contextmanager
def counted(llm: LLM) -> Iterator[Callable[[], int]]:
    """How many tokens pass the model."""
    forward, rows = llm.engine.runner.forward, [0]

    def counting(work: Any) -> Any:
        rows[0] += sum(item.count for item in work)
        return forward(work)

    llm.engine.runner.forward = counting  # type: ignore[method-assign]
    yield lambda: rows[0]
    llm.engine.runner.forward = forward  # type: ignore[method-assign]


def same(one: RequestOutput, other: RequestOutput) -> None:
    for first, second in zip(one.outputs, other.outputs, strict=True):
        assert first.token_ids == second.token_ids
        assert first.logits is not None
        assert (first.logits - second.logits).abs().max() < 1e-4


def answer(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


@pytest.fixture
def fresh(make: Engines) -> LLM:
    return make(prefix_cache=False)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_the_same_prompt_again_computes_no_token_before_its_first(make: Engines, length: int) -> None:
    llm, tokens = make(), prompt(length)
    first = ask(llm, tokens)
    with counted(llm) as rows:
        again = ask(llm, tokens)
        assert rows() == GREEDY.max_tokens - 1
    assert again.metrics.cached_tokens == length
    assert answer(again) == answer(first)
    assert torch.equal(again.outputs[0].logits, first.outputs[0].logits)  # type: ignore[arg-type]


def test_the_next_turn_computes_its_own_tokens(make: Engines, fresh: LLM) -> None:
    llm, tokens = make(), prompt(150)
    for turn in range(4):
        first = ask(llm, tokens)
        same(first, ask(fresh, tokens))
        before, tokens = len(tokens), tokens + answer(first) + prompt(17, seed=turn)
        with counted(llm) as rows:
            ask(llm, tokens, SamplingParams(temperature=0, max_tokens=1))
            # All but the answer's last token, which was sampled and never passed the model.
            assert rows() == len(tokens) - before - GREEDY.max_tokens + 1


def test_the_second_user_of_a_shared_prefix_goes_on_near_its_end(make: Engines, fresh: LLM) -> None:
    llm, shared = make(num_records=300), prompt(2000)
    ask(llm, shared + prompt(60, seed=1))
    with counted(llm) as rows:
        second = ask(llm, shared + prompt(60, seed=2))
        assert rows() <= 0.01 * 2000 + 60 + GREEDY.max_tokens
    assert second.metrics.cached_tokens >= 0.99 * 2000
    same(second, ask(fresh, shared + prompt(60, seed=2)))


def test_where_two_prompts_part_the_third_goes_on(make: Engines, fresh: LLM) -> None:
    llm, shared = make(num_records=5), prompt(200)  # few records: nothing is left on the way
    llm.engine.scheduler.interior_states = False
    ask(llm, shared + prompt(30, seed=1))
    second = ask(llm, shared + prompt(30, seed=2))
    assert second.metrics.cached_tokens == 0
    assert second.metrics.cache_miss_reason == "never checkpointed"
    third = ask(llm, shared + prompt(30, seed=3))
    assert third.metrics.cached_tokens == 200
    assert third.metrics.cache_miss_reason is None
    same(third, ask(fresh, shared + prompt(30, seed=3)))


def test_states_left_on_the_way_are_those_of_pieces_that_end_there(make: Engines) -> None:
    llm, tokens = make(num_records=300), prompt(400)
    ask(llm, tokens)
    points = {f.num_tokens: (f, at) for f, at in llm.engine.scheduler.cache.device.held.items()}
    assert set(range(64, 400, 64)) <= points.keys()
    for length in (64, 256, 384):
        kept = llm.engine.runner.records.arena[points[length][1].record].clone()
        cut = make()
        ask(cut, tokens[:length], SamplingParams(temperature=0, max_tokens=1))
        ((other, at),) = (i for i in cut.engine.scheduler.cache.device.held.items() if i[0].num_tokens == length)
        # Experts and softmax attention round differently for another number of rows; all fields are float32 here.
        expected = cut.engine.runner.records.arena[at.record].view(torch.float32)
        assert torch.allclose(kept.view(torch.float32), expected, atol=1e-4)
        assert torch.allclose(points[length][0].hidden, other.hidden, atol=1e-5)


def test_a_failed_step_keeps_nothing_that_it_left(make: Engines, fresh: LLM) -> None:
    llm, tokens = make(num_records=40), prompt(500)
    forward = llm.engine.runner.forward

    def fail(work: Any) -> Any:
        forward(work)
        llm.engine.runner.forward = forward  # type: ignore[method-assign]
        raise RuntimeError("planted")

    other = llm.engine.add(None, prompt(90, seed=4), GREEDY)
    request = llm.engine.add(None, tokens, GREEDY)
    llm.engine.runner.forward = fail  # type: ignore[method-assign]
    while llm.engine.step():
        llm.engine.check_integrity()
    assert (other.error, request.error) == (None, None)
    assert request.sequences[0].completion.token_ids == answer(ask(fresh, tokens))


def test_continuations_are_forks_of_one_prompt(make: Engines, fresh: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=5, n=4, max_tokens=5, ignore_eos=True)
    llm, tokens = make(), prompt(130)
    with counted(llm) as rows:
        output = ask(llm, tokens, params)
        assert rows() == 130 + 4 * 4
    assert [one.token_ids for one in output.outputs] == [one.token_ids for one in ask(fresh, tokens, params).outputs]


def test_a_salt_separates_tenants(make: Engines) -> None:
    llm, tokens = make(), prompt(100)
    salted = SamplingParams(temperature=0, max_tokens=2, cache_salt="a")
    ask(llm, tokens, salted)
    other = ask(llm, tokens, SamplingParams(temperature=0, max_tokens=2, cache_salt="b"))
    assert (other.metrics.cached_tokens, other.metrics.cache_miss_reason) == (0, "other tenant")
    assert ask(llm, tokens, salted).metrics.cached_tokens == 100


def test_a_miss_says_why(make: Engines, fresh: LLM) -> None:
    llm, tokens = make(num_records=2), prompt(100)
    assert ask(fresh, tokens).metrics.cache_miss_reason == "disabled"
    assert ask(llm, tokens).metrics.cache_miss_reason == "no common prefix"
    for seed in range(1, 4):
        ask(llm, prompt(100, seed))
    assert ask(llm, tokens).metrics.cache_miss_reason == "evicted"
    wanting = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    scored = ask(llm, tokens, wanting)
    assert scored.metrics.cache_miss_reason == "the request wants every row of its prompt"
    assert scored.prompt_logprobs is not None
    assert len(scored.prompt_logprobs) == 100


def test_frozen_memory_never_stands_in_the_way(make: Engines, fresh: LLM) -> None:
    """Pools that the frozen points of a few prompts fill: every request still runs."""
    llm = make(num_records=3, num_pages=8, page_size=16)
    for seed in range(6):
        tokens = prompt(100, seed)
        same(ask(llm, tokens), ask(fresh, tokens))
    together = llm.generate([{"prompt_token_ids": prompt(60, seed)} for seed in range(5)], GREEDY)
    for seed, output in enumerate(together):
        assert answer(output) == answer(ask(fresh, prompt(60, seed)))
    llm.engine.scheduler.cache.clear()
    assert (llm.engine.runner.records.num_free, llm.engine.runner.pages.num_free) == (3, 8)


def test_an_aborted_request_leaves_no_wrong_memory(make: Engines, fresh: LLM) -> None:
    llm, tokens = make(max_prefill_tokens=64), prompt(300)
    for steps in (1, 2, 4, 7):
        request = llm.engine.add(None, tokens, GREEDY)
        for _ in range(steps):
            llm.engine.step()
        llm.engine.abort(request)
    same(ask(llm, tokens), ask(fresh, tokens))


def test_states_on_the_way_become_rare_where_nobody_uses_them(make: Engines) -> None:
    llm = make(num_records=300)
    cache = llm.engine.scheduler.cache

    def left(tokens: list[int]) -> list[int]:
        before = set(cache.device.held)
        ask(llm, tokens, SamplingParams(temperature=0, max_tokens=1))
        return sorted(f.num_tokens for f in cache.device.held.keys() - before if f.num_tokens < len(tokens))

    assert left(prompt(1100, seed=100)) == list(range(64, 1100, 64))
    for seed in range(101, 121):
        ask(llm, prompt(1100, seed=seed), SamplingParams(temperature=0, max_tokens=1))
    assert left(prompt(1100, seed=130)) == [512, 1024]
    shared = prompt(1100, seed=130)[:900]
    assert left(shared + prompt(300, seed=131))[-1] == 1152  # two prompts met: they may again
    assert left(prompt(1100, seed=132)) == list(range(64, 1100, 64))
