"""Choosing tokens: each parameter does what it says, row by row, whatever else is in the batch."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from statewise import LLM, SamplingParams
from statewise.engine.sampler import one_logprob, truncate
from tests.engine.conftest import Engines, prompt


def run(llm: LLM, tokens: list[int], **options: object):  # type: ignore[no-untyped-def]
    params = SamplingParams(**{"max_tokens": 12, "ignore_eos": True} | options)  # type: ignore[arg-type]
    return llm.generate([{"prompt_token_ids": tokens}], params)[0]


def test_the_same_seed_gives_the_same_tokens_in_any_company(make: Engines, llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, seed=7, max_tokens=20, ignore_eos=True)
    tokens = prompt(20)
    alone = run(llm, tokens, temperature=1.5, seed=7, max_tokens=20).outputs[0].token_ids
    company = [SamplingParams(temperature=2.0, top_p=0.9, max_tokens=15), params, SamplingParams(temperature=0)]
    prompts = [{"prompt_token_ids": ids} for ids in (prompt(33), tokens, prompt(90))]
    together = make(max_prefill_tokens=50).generate(prompts, company)
    assert together[1].outputs[0].token_ids == alone
    assert run(llm, tokens, temperature=1.5, seed=8, max_tokens=20).outputs[0].token_ids != alone


def test_continuations_of_one_prompt_differ_and_can_be_repeated(llm: LLM) -> None:
    first, again = (run(llm, prompt(10), temperature=1.5, seed=3, n=4) for _ in range(2))
    assert [c.index for c in first.outputs] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in first.outputs}) == 4
    assert [c.token_ids for c in first.outputs] == [c.token_ids for c in again.outputs]
    assert first.outputs[0].token_ids == run(llm, prompt(10), temperature=1.5, seed=3).outputs[0].token_ids


def test_draws_follow_the_distribution(llm: LLM) -> None:
    """2,000 first tokens against the softmax of the logits: a chi-square far below its 1e-6 quantile for 19 cells."""
    tokens = prompt(12)
    logits = llm.logits(tokens)[-1]
    probabilities = (logits / 0.8).softmax(-1)
    keep = SamplingParams(temperature=0.8, seed=1, n=100, max_tokens=1, ignore_eos=True)
    seen = [c.token_ids[0] for seed in range(20) for c in run(llm, tokens, **_with(keep, seed=seed)).outputs]
    likely = probabilities.topk(19).indices.tolist()
    expected = [float(probabilities[t]) * len(seen) for t in likely]
    counts = [seen.count(t) for t in likely]
    expected.append(len(seen) - sum(expected))
    counts.append(len(seen) - sum(counts))
    assert sum((c - e) ** 2 / e for c, e in zip(counts, expected) if e > 1) < 70


def _with(params: SamplingParams, **changes: object) -> dict[str, object]:
    names = ("temperature", "seed", "n", "max_tokens", "ignore_eos")
    return {name: getattr(params, name) for name in names} | changes


def test_top_k_one_is_greedy(llm: LLM) -> None:
    greedy = run(llm, prompt(9), temperature=0).outputs[0].token_ids
    assert run(llm, prompt(9), temperature=3.0, top_k=1).outputs[0].token_ids == greedy
    assert run(llm, prompt(9), temperature=3.0, top_p=1e-6).outputs[0].token_ids == greedy
    assert run(llm, prompt(9), temperature=3.0, min_p=1.0).outputs[0].token_ids == greedy


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=12),
    st.integers(0, 14),
    st.integers(1, 20).map(lambda twentieths: twentieths / 20),
    st.integers(0, 20).map(lambda twentieths: twentieths / 20),
)
def test_truncation_keeps_what_the_definitions_keep(weights: list[int], top_k: int, top_p: float, min_p: float) -> None:
    probabilities = torch.tensor(sorted(weights, reverse=True), dtype=torch.float32)
    probabilities = probabilities / probabilities.sum()
    kept = truncate(probabilities[None], [SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)])[0] > 0
    allowed = probabilities[: top_k or None].double()
    allowed = allowed / allowed.sum()
    mass = 0.0
    for rank, p in enumerate(allowed.tolist()):
        if abs(mass - top_p) > 1e-5 and abs(p - min_p * float(allowed[0])) > 1e-6:  # not a tie of rounding
            assert bool(kept[rank]) == ((mass < top_p or top_p >= 1) and p >= min_p * float(allowed[0]))
        mass += p
    assert bool(kept[0])
    assert not kept[len(allowed) :].any()


def test_logit_bias_and_penalties(llm: LLM) -> None:
    tokens = prompt(8)
    assert set(run(llm, tokens, temperature=0, logit_bias={17: 100.0}).outputs[0].token_ids) == {17}
    free = run(llm, tokens, temperature=0, logit_bias={17: 100.0}, frequency_penalty=2.0, max_tokens=80)
    assert len(set(free.outputs[0].token_ids)) > 1
    banned = run(llm, tokens, temperature=0).outputs[0].token_ids[0]
    assert banned not in run(llm, tokens, temperature=0, logit_bias={banned: -100.0}).outputs[0].token_ids
    presence = run(llm, tokens, temperature=0, logit_bias={17: 14.0}, presence_penalty=2.0, return_logits=True)
    rows = presence.outputs[0].logits
    assert rows is not None
    expected, seen = [], set()
    for row in rows:
        row = row.clone()
        row[17] += 14.0
        for token in seen:
            row[token] -= 2.0
        expected.append(int(row.argmax()))
        seen.add(expected[-1])
    assert presence.outputs[0].token_ids == expected


def test_the_repetition_penalty_counts_prompt_and_answer(llm: LLM) -> None:
    tokens = prompt(30)
    output = run(llm, tokens, temperature=0, repetition_penalty=1.7, return_logits=True).outputs[0]
    assert output.logits is not None
    seen = set(tokens)
    for row, token in zip(output.logits, output.token_ids, strict=True):
        row = row.clone()
        for other in seen:
            row[other] = row[other] / 1.7 if row[other] > 0 else row[other] * 1.7
        assert int(row.argmax()) == token
        seen.add(token)


def test_lengths_and_ends(make: Engines, llm: LLM) -> None:
    tokens = prompt(20)
    assert run(llm, tokens, temperature=0, max_tokens=5).outputs[0].finish_reason == "length"
    free = run(llm, tokens, temperature=0).outputs[0].token_ids
    ended = run(llm, tokens, temperature=0, stop_token_ids=[free[4]]).outputs[0]
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == (
        free[: free.index(free[4]) + 1],
        "stop",
        free[4],
    )
    later = run(llm, tokens, temperature=0, stop_token_ids=[free[4]], min_tokens=8).outputs[0]
    assert free[4] not in later.token_ids[:8]
    assert len(later.token_ids) >= 8
    ends = run(llm, tokens, temperature=0, ignore_eos=False, logit_bias={1: 100.0}).outputs[0]
    assert (ends.token_ids, ends.finish_reason) == ([1], "stop")
    kept = run(llm, tokens, temperature=0, ignore_eos=False, logit_bias={1: 100.0}, min_tokens=3).outputs[0]
    assert len(kept.token_ids) == 4
    assert kept.token_ids[3] == 1
    assert run(llm, tokens, max_tokens=0).outputs[0].token_ids == []
    full = make(max_length=30)
    assert len(run(full, tokens, max_tokens=100).outputs[0].token_ids) == 10


def test_log_probabilities(llm: LLM) -> None:
    tokens = prompt(70)
    result = run(llm, tokens, temperature=0, logprobs=3, prompt_logprobs=2, return_logits=True)
    output = result.outputs[0]
    assert output.logprobs is not None
    assert output.logits is not None
    for entry, row, token in zip(output.logprobs, output.logits.log_softmax(-1), output.token_ids, strict=True):
        assert entry.token_id == token
        assert entry.rank == 1
        assert abs(entry.logprob - float(row[token])) < 1e-6
        assert list(entry.top) == row.topk(3).indices.tolist()
    assert result.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == 70
    assert result.prompt_logprobs[0] is None
    rows = llm.logits(tokens).log_softmax(-1)
    for position, entry in enumerate(result.prompt_logprobs[1:], start=1):
        assert entry is not None
        assert abs(entry.logprob - float(rows[position - 1][tokens[position]])) < 1e-4
        assert len(entry.top) == 2


def test_rank_counts_the_tokens_that_are_more_likely() -> None:
    row = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert [one_logprob(row, token, 0).rank for token in range(4)] == [4, 1, 3, 2]


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 100.0])
def test_extreme_temperatures(llm: LLM, temperature: float) -> None:
    assert len(run(llm, prompt(5), temperature=temperature).outputs[0].token_ids) == 12


def test_any_mix_of_parameters_leaves_the_engine_whole(make: Engines) -> None:
    llm = make(num_records=4)
    draw = random.Random(0)
    prompts, params = [], []
    for index in range(40):
        prompts.append({"prompt_token_ids": prompt(draw.randint(1, 90), index)})
        params.append(
            SamplingParams(
                temperature=draw.choice([0, 1e-9, 0.7, 50.0]),
                top_p=draw.choice([1e-9, 0.5, 1.0]),
                top_k=draw.choice([0, 1, 5, 10**6]),
                min_p=draw.choice([0.0, 0.3, 1.0]),
                repetition_penalty=draw.choice([1.0, 0.01, 100.0]),
                presence_penalty=draw.choice([0.0, -2.0, 2.0]),
                frequency_penalty=draw.choice([0.0, -2.0, 2.0]),
                logit_bias=draw.choice([None, {0: -100.0, 319: 100.0}]),
                min_tokens=draw.choice([0, 3]),
                max_tokens=draw.choice([3, 9]),
                logprobs=draw.choice([None, 0, 20]),
                prompt_logprobs=draw.choice([None, 1]),
                n=draw.choice([1, 3]),
                seed=draw.choice([None, 5]),
                stop_token_ids=draw.choice([(), (5, 6, 7)]),
            )
        )
    outputs = llm.generate(prompts, params)
    assert all(output.error is None for output in outputs)
    assert [len(output.outputs) for output in outputs] == [p.n for p in params]
    llm.engine.check_integrity()
    llm.engine.scheduler.cache.clear()
    assert llm.engine.runner.records.num_free == 4
