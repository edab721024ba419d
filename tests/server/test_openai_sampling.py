"""OpenAI's own client and what it can ask of the sampler: the answers are those of the engine."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI

from statewise import LLM, SamplingParams

ADD: Any = [{"role": "user", "content": "What is 27 + 45?"}]
SUM = "27 + 45 = 72"
PROMPT = "The people of the"


def test_completions_are_those_of_the_engine(client: OpenAI, offline: LLM) -> None:
    assert offline.tokenizer is not None
    prompts = [PROMPT, "In the year"]
    ids = [offline.tokenizer.encode(prompt) for prompt in prompts]
    params = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, min_p=0.02, seed=7, max_tokens=10, n=2)
    expected = [one.text for output in offline.generate(prompts, params) for one in output.outputs]
    extra = {"top_k": 50, "min_p": 0.02}
    asked: Any = {"model": "demo", "temperature": 0.9, "top_p": 0.95, "seed": 7, "max_tokens": 10, "n": 2}
    for prompt in (prompts, ids):
        answer = client.completions.create(prompt=prompt, extra_body=extra, **asked)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in answer.choices] == expected
    for one in (PROMPT, ids[0]):
        answer = client.completions.create(prompt=one, extra_body=extra, **asked)
        assert [choice.text for choice in answer.choices] == expected[:2]
    texts = [""] * 4
    for chunk in client.completions.create(prompt=prompts, stream=True, extra_body=extra, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == expected


def test_an_echoed_prompt_has_log_probabilities_and_places(client: OpenAI, offline: LLM) -> None:
    (choice,) = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=2, temperature=0, echo=True, logprobs=1
    ).choices
    logprobs = choice.logprobs
    assert choice.text.startswith(PROMPT) and logprobs is not None
    assert logprobs.tokens and logprobs.token_logprobs and logprobs.text_offset and logprobs.top_logprobs
    assert "".join(logprobs.tokens) == choice.text
    for at, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert choice.text[at:].startswith(token)
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=1, prompt_logprobs=1)
    (whole,) = offline.generate([PROMPT], params)
    entries = [*(whole.prompt_logprobs or []), *(whole.outputs[0].logprobs or [])][1:]
    assert logprobs.token_logprobs[1:] == pytest.approx([entry.logprob for entry in entries if entry], abs=1e-4)


def test_log_probabilities_of_a_stream_are_those_of_the_whole(client: OpenAI) -> None:
    asked: Any = {"model": "demo", "temperature": 0, "max_tokens": 8, "logprobs": 2, "prompt": PROMPT}
    whole = client.completions.create(**asked).choices[0].logprobs
    assert whole is not None and whole.tokens and len(whole.tokens) == 8
    told = [chunk.choices[0].logprobs for chunk in client.completions.create(stream=True, **asked)]
    for name in ("tokens", "text_offset"):
        assert [one for part in told if part for one in getattr(part, name)] == getattr(whole, name)
    streamed = [one for part in told if part for one in part.token_logprobs or []]
    assert streamed == pytest.approx(whole.token_logprobs, abs=1e-4)
    chat: Any = {"model": "demo", "temperature": 0, "messages": ADD, "logprobs": True, "top_logprobs": 3}
    said = client.chat.completions.create(**chat).choices[0].logprobs
    assert said is not None and said.content
    assert all(len(one.top_logprobs) == 3 for one in said.content)
    assert "".join(one.token for one in said.content).startswith(SUM)
    assert bytes(byte for one in said.content for byte in one.bytes or []).decode().startswith(SUM)
    parts = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(stream=True, **chat)]
    entries = [one for part in parts if part for one in part.content or []]
    assert [one.token for one in entries] == [one.token for one in said.content]
    assert [one.logprob for one in entries] == pytest.approx([one.logprob for one in said.content], abs=1e-4)


def test_stop_strings_and_limits_end_an_answer(client: OpenAI) -> None:
    for stop in ("=", ["#", " ="]):
        choice = client.chat.completions.create(model="demo", messages=ADD, temperature=0, stop=stop).choices[0]
        assert ((choice.message.content or "").strip(), choice.finish_reason) == ("27 + 45", "stop")
    limits: tuple[Any, ...] = ({"max_tokens": 3}, {"max_completion_tokens": 3})
    for limit in limits:
        answer = client.chat.completions.create(model="demo", messages=ADD, temperature=0, **limit)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None and answer.usage.completion_tokens == 3
    biased = client.completions.create(
        model="demo", prompt=PROMPT, temperature=0, max_tokens=4, logit_bias={"280": 100}
    )
    assert biased.choices[0].text == " of" * 4


def test_the_same_seed_gives_the_same_text(client: OpenAI) -> None:
    def text(seed: int) -> str:
        return client.completions.create(model="demo", prompt=PROMPT, seed=seed, max_tokens=12).choices[0].text

    assert text(5) == text(5)
    assert len({text(seed) for seed in range(4)}) > 1


def test_a_breakpoint_keeps_the_state_that_a_later_prompt_needs(client: OpenAI) -> None:
    head = list(range(100, 230))

    def cached(tail: list[int], **extra: Any) -> int:
        answer = client.completions.create(model="demo", prompt=[*head, *tail], max_tokens=1, extra_body=extra)
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert cached([7, 8, 9], cache_breakpoints=[len(head)]) == 0
    assert cached([17, 18, 19]) == len(head)
    assert cached([7, 8, 9], cache_salt="apart") == 0
