"""What must not change an answer: cutting, batching, neighbours, recycling, preemption, failures of others."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from statewise import LLM, SamplingParams
from statewise.memory.tiers import Frozen
from tests.engine.conftest import Engines, answers, prompt
from tests.references import KimiReference

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, return_logits=True)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> tuple[list[int], torch.Tensor]:
    """A prompt with its greedy answer, and the logits of every position in fp64, token by token."""
    tokens = prompt(150)
    reference = KimiReference(checkpoint)
    state, rows = reference.start(), []
    for position in range(150 + 12):
        rows.append(reference.step(tokens[position], state))
        if position >= 149:
            tokens.append(int(rows[-1].argmax()))
    return tokens[:162], torch.stack(rows)


@pytest.mark.parametrize("budget", [1, 7, 33, 64, 4096])
def test_any_cutting_equals_token_by_token(
    make: Engines, expected: tuple[list[int], torch.Tensor], budget: int
) -> None:
    tokens, logits = expected
    llm = make(max_prefill_tokens=budget)
    assert (llm.logits(tokens) - logits).abs().max() < 1e-3
    output = llm.generate([{"prompt_token_ids": tokens[:150]}], GREEDY)[0].outputs[0]
    assert output.token_ids == tokens[150:]
    assert output.logits is not None
    assert (output.logits - logits[149:161]).abs().max() < 1e-3


def test_pieces_on_the_chunk_grid_leave_the_same_state(make: Engines) -> None:
    """Bit for bit in the linear layers that no softmax attention or expert comes before, within rounding behind."""
    tokens, states = prompt(300), []
    for budget in (64, 128, 4096):
        llm = make(max_prefill_tokens=budget, num_records=1)
        answers(llm, [tokens], max_tokens=1)
        layers = [state for state in llm.engine.runner.states if "recurrent" in state]
        states.append([state["recurrent"][0].clone() for state in layers])  # released, not yet handed out again
    for cut in states[:2]:
        assert torch.equal(cut[0], states[2][0])
        assert torch.equal(cut[1], states[2][1])
        for ours, whole in zip(cut, states[2], strict=True):
            assert (ours - whole).abs().max() < 1e-5


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_shuffled_batch_gives_each_its_own_answer(make: Engines, llm: LLM, order: int) -> None:
    prompts = [prompt(length) for length in (1, 2, 3, 63, 64, 65, 130, 200)]
    alone = [answers(llm, [tokens])[0] for tokens in prompts]
    shuffled = list(range(len(prompts)))
    random.Random(order).shuffle(shuffled)
    together = answers(make(max_prefill_tokens=96), [prompts[i] for i in shuffled])
    assert together == [alone[i] for i in shuffled]


@pytest.mark.parametrize("length", [1, 2, 5, 100])
def test_a_recycled_record_equals_a_fresh_one(make: Engines, length: int) -> None:
    fresh = answers(make(num_records=1), [prompt(length)])
    used = make(num_records=1)
    answers(used, [prompt(200, seed=9)])
    used.engine.runner.records.arena.fill_(127)  # and should anything be left, it would show
    used.engine.runner.pages.arena.fill_(127)
    assert answers(used, [prompt(length)]) == fresh


def test_a_preempted_sequence_goes_on_as_if_nothing_had_happened(make: Engines) -> None:
    prompts = [prompt(60, seed) for seed in range(4)]
    calm = answers(make(page_size=16), prompts, max_tokens=40)
    tight = make(page_size=16, num_pages=18)  # four sequences of 100 tokens need 28
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    outputs = tight.generate([{"prompt_token_ids": tokens} for tokens in prompts], params)
    assert [output.outputs[0].token_ids for output in outputs] == calm
    assert sum(output.metrics.preemptions for output in outputs) > 0
    tight.engine.check_integrity()
    tight.engine.scheduler.cache.clear()
    assert tight.engine.runner.pages.num_free == 18


def test_preemption_at_every_step_changes_nothing(make: Engines, llm: LLM) -> None:
    """Also in the middle of a prompt."""
    tokens = prompt(150)
    calm = answers(llm, [tokens])[0]
    other = make(max_prefill_tokens=40)
    request = other.engine.add(None, tokens, GREEDY)
    frozen: list[Frozen] = []
    while not request.finished:
        other.engine.step()
        sequence = request.sequences[0]
        if sequence.record is not None:
            other.engine.scheduler.preempt(sequence)
            assert sequence.frozen is not None
            assert sequence.frozen in other.engine.scheduler.cache.depot.host.held
            frozen.append(sequence.frozen)
    assert request.sequences[0].completion.token_ids == calm
    assert [point.num_tokens for point in frozen[:4]] == [40, 64, 104, 128]
    other.engine.check_integrity()


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_an_aborted_neighbour_disturbs_nobody(make: Engines, llm: LLM, steps: int) -> None:
    prompts = [prompt(70), prompt(300), prompt(5)]
    alone = [answers(llm, [tokens])[0] for tokens in (prompts[0], prompts[2])]
    other = make(max_prefill_tokens=64)
    requests = [other.engine.add(None, tokens, GREEDY) for tokens in prompts]
    for _ in range(steps):
        other.engine.step()
    other.engine.abort(requests[1])
    assert requests[1].finished
    other.engine.check_integrity()
    while other.engine.step():
        pass
    assert requests[1].sequences[0].completion.finish_reason == "abort"
    assert [requests[i].sequences[0].completion.token_ids for i in (0, 2)] == alone
    other.engine.check_integrity()


def test_more_requests_than_records_all_complete(make: Engines, llm: LLM) -> None:
    """64 requests of 1 to 2,000 tokens through 5 records."""
    lengths = [1, 2, 2000, 63, 64, 65, 1500] + [random.Random(i).randint(1, 600) for i in range(57)]
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    crowded = make(num_records=5, num_pages=64, max_prefill_tokens=512)
    alone = [answers(llm, [tokens], max_tokens=8)[0] for tokens in prompts]
    assert answers(crowded, prompts, max_tokens=8) == alone


def test_a_request_that_breaks_the_forward_pass_ends_alone(make: Engines, llm: LLM) -> None:
    prompts = [prompt(30, seed) for seed in range(4)]
    alone = answers(llm, prompts)
    broken = make()
    forward = broken.engine.runner.forward

    def fail_on_the_third(work):  # type: ignore[no-untyped-def]
        rows = forward(work)  # the states are half written when it fails
        for item in work:
            if item.sequence.request is requests[2] and item.sequence.generated >= 4:
                raise RuntimeError("planted")
        return rows

    broken.engine.runner.forward = fail_on_the_third  # type: ignore[method-assign]
    requests = [broken.engine.add(None, tokens, GREEDY) for tokens in prompts]
    while broken.engine.step():
        pass
    assert requests[2].error == "the request failed inside the engine (RuntimeError)"
    assert requests[2].sequences[0].completion.finish_reason == "error"
    for i in (0, 1, 3):
        assert requests[i].error is None
        assert requests[i].sequences[0].completion.token_ids == alone[i]
    broken.engine.check_integrity()
    broken.engine.scheduler.cache.clear()
    assert broken.engine.runner.records.num_free == 8


def test_non_finite_logits_end_one_request(make: Engines, llm: LLM) -> None:
    prompts = [prompt(30, seed) for seed in range(3)]
    alone = answers(llm, prompts)
    other = make()
    requests = [other.engine.add(None, tokens, GREEDY) for tokens in prompts]
    other.engine.step()
    record = requests[1].sequences[0].record
    assert record is not None
    other.engine.runner.states[0]["recurrent"][record] = float("nan")
    while other.engine.step():
        pass
    assert requests[1].error == "the model produced logits that are not finite"
    assert [requests[i].sequences[0].completion.token_ids for i in (0, 2)] == [alone[0], alone[2]]
