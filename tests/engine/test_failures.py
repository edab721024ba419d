"""What breaks in the middle of a step must not reach another request, and must not leak a block."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch

from statewise import LLM, SamplingParams
from statewise.errors import BlockError, ConfigError, RequestError
from tests.checkpoints import kimi_linear_config, write_checkpoint
from tests.engine.conftest import Engines, answers, prompt

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def drain(llm: LLM) -> None:
    while llm.engine.step():
        pass


@pytest.mark.parametrize("where", ["forward", "logits"])
@pytest.mark.parametrize("call", [3, 5])
def test_an_interrupt_inside_a_step_leaves_every_answer_right(make: Engines, llm: LLM, where: str, call: int) -> None:
    """The states are half written when it comes."""
    alone = answers(llm, [prompt(30), prompt(50)])
    other = make()
    genuine, calls = getattr(other.engine.runner, where), []

    def interrupted(*inputs):  # type: ignore[no-untyped-def]
        result = genuine(*inputs)
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    setattr(other.engine.runner, where, interrupted)
    requests = [other.engine.add(None, tokens, GREEDY) for tokens in (prompt(30), prompt(50))]
    with pytest.raises(KeyboardInterrupt):
        drain(other)
    drain(other)
    assert [request.sequences[0].completion.token_ids for request in requests] == alone
    other.engine.check_integrity()
    other.engine.scheduler.cache.clear()
    assert other.engine.runner.records.num_free == 8


def test_an_interrupted_call_takes_its_requests_along(make: Engines) -> None:
    other = make()
    genuine = other.engine.step

    def interrupted() -> bool:
        genuine()
        raise KeyboardInterrupt

    other.engine.step = interrupted  # type: ignore[method-assign]
    for call in (lambda: other.generate({"prompt_token_ids": prompt(30)}, GREEDY), lambda: other.logits(prompt(30))):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert not other.engine.has_work
        other.engine.scheduler.cache.clear()
        assert other.engine.runner.records.num_free == 8


def test_an_error_while_finishing_frees_the_blocks(make: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    other = make()
    request = other.engine.add(None, prompt(30), SamplingParams(temperature=0, max_tokens=3, return_logits=True))
    request.sequences[0].logits.append(torch.zeros(7))  # cannot be stacked with rows of the vocabulary
    while other.engine.step():
        pass
    assert request.finished
    assert request.error is not None
    other.engine.scheduler.cache.clear()
    assert other.engine.runner.records.num_free == 8
    assert not other.engine.has_work


def test_a_stream_closed_early_frees_its_blocks_and_disturbs_nobody(make: Engines, llm: LLM) -> None:
    alone = answers(llm, [prompt(50)])[0]
    other = make()
    request = other.engine.add(None, prompt(50), GREEDY)
    stream = other.stream({"prompt_token_ids": prompt(30)}, GREEDY)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    other.engine.scheduler.cache.clear()
    assert other.engine.runner.records.num_free == 7
    while other.engine.step():
        pass
    assert request.sequences[0].completion.token_ids == alone


def test_idle_means_checked(make: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statewise.engine.engine.CHECK_INTERVAL_S", 0.0)
    other = make()
    other.engine.runner.records.allocate("leak")
    with pytest.raises(BlockError, match="1 references, 0 are held"):
        other.generate({"prompt_token_ids": prompt(5)}, GREEDY)


@pytest.fixture
def gapped(tmp_path: Path) -> LLM:
    """A tokenizer of 301 entries whose ids have gaps: its end token is 310, ids beyond it are padding rows."""
    write_checkpoint(tmp_path, kimi_linear_config(eos_token_id=310), seed=1)
    vocabulary = {f"w{i}": i for i in range(300)} | {"<|end|>": 310}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return LLM(tmp_path, dtype="float32", num_records=4, num_pages=16)


def test_an_end_token_behind_a_gap_can_be_chosen_and_padding_rows_cannot(gapped: LLM) -> None:
    tokens = {"prompt_token_ids": [5, 9]}
    ended = gapped.generate(tokens, SamplingParams(temperature=0, logit_bias={310: 100.0}))[0].outputs[0]
    assert (ended.token_ids, ended.finish_reason) == ([310], "stop")
    with pytest.raises(RequestError, match="token id 311 is outside the vocabulary of 311 tokens"):
        gapped.generate(tokens, SamplingParams(logit_bias={311: 1.0}))
    wild = gapped.generate([tokens] * 4, SamplingParams(temperature=100.0, max_tokens=60, ignore_eos=True))
    assert all(token <= 310 for output in wild for token in output.outputs[0].token_ids)


def test_a_penalty_on_a_padding_row_of_the_prompt_harms_nobody(gapped: LLM) -> None:
    calm = gapped.generate({"prompt_token_ids": [7, 8]}, GREEDY)[0].outputs[0].token_ids
    mixed = gapped.generate(
        [{"prompt_token_ids": [7, 8]}, {"prompt_token_ids": [5, 315]}],
        [GREEDY, SamplingParams(repetition_penalty=1.2, max_tokens=5)],
    )
    assert mixed[0].outputs[0].token_ids == calm
    assert mixed[1].error is None


def test_two_engines_in_one_process_do_not_mix(make: Engines, llm: LLM) -> None:
    alone = answers(llm, [prompt(40), prompt(41)])
    streams = [make().stream({"prompt_token_ids": prompt(length)}, GREEDY) for length in (40, 41)]
    got: list[list[int]] = [[], []]
    for deltas in zip(*streams, strict=True):
        for tokens, delta in zip(got, deltas, strict=True):
            tokens += delta.token_ids
    assert got == alone


def test_pools_that_cannot_be_had_are_refused(make: Engines) -> None:
    with pytest.raises(ConfigError, match=r"num_records 100000000 needs .* MiB, .* are there: lower it"):
        make(num_records=100_000_000)
    with pytest.raises(ConfigError, match="dtype 'float16' is not supported"):
        make(dtype="float16")


@pytest.mark.parametrize("bad", [None, 5, [1, 2, 3], [], {"messages": []}])
def test_chats_of_the_wrong_kind_are_refused(gapped: LLM, bad: object) -> None:
    with pytest.raises(RequestError):
        gapped.chat(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [None, 5, [1, 2, 3], [None]])
def test_prompts_of_the_wrong_kind_are_refused(gapped: LLM, bad: object) -> None:
    with pytest.raises(RequestError):
        gapped.generate(bad)  # type: ignore[arg-type]


def test_logits_take_any_integers(llm: LLM) -> None:
    plain = llm.logits([5, 6])
    assert torch.equal(llm.logits(torch.tensor([5, 6])), plain)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="token ids must be a list of integers"):
        llm.logits(None)  # type: ignore[arg-type]
