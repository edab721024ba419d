"""Bad input: one clear sentence that names the field and the limit, and nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest

from statewise import LLM, SamplingParams
from statewise.errors import ConfigError, RequestError
from tests.engine.conftest import Engines, answers, prompt


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("temperature", 101),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", [1]),
        ("logit_bias", dict.fromkeys(range(2000), 0.0)),
        ("seed", -1),
        ("seed", 1 << 70),
        ("seed", True),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", ["x" * 300]),
        ("stop", [5]),
        ("stop", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", None),
        ("stop_token_ids", 5),
        ("temperature", 10**400),
        ("ignore_eos", 1),
        ("min_tokens", -1),
        ("min_tokens", 1000),
        ("max_tokens", -1),
        ("max_tokens", 1 << 40),
        ("max_tokens", None),
        ("n", 0),
        ("n", 129),
        ("logprobs", 21),
        ("logprobs", -1),
        ("prompt_logprobs", 21),
        ("return_logits", "yes"),
        ("skip_special_tokens", None),
    ],
)
def test_a_parameter_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as refusal:
        SamplingParams(**{field: value})
    assert refusal.value.field == field
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ({"prompt_token_ids": [320]}, "token id 320 is outside the vocabulary of 320 tokens"),
        ({"prompt_token_ids": [-1]}, "token id -1 is outside"),
        ({"prompt_token_ids": [1.5]}, "token id 1.5 is outside"),
        ({"prompt_token_ids": [True]}, "token id True is outside"),
        ({"prompt_token_ids": "12"}, "token ids must be a list of integers"),
        ({"ids": [1]}, "token ids must be a list of integers"),
        ({"prompt_token_ids": [5] * 9000}, r"maximum context length is 8192 tokens.*9000 input tokens"),
        ({"prompt_token_ids": [5] * 8192}, r"maximum context length is 8192 tokens"),
        ("text", "has no tokenizer.json; give the prompt as token ids"),
    ],
)
def test_a_bad_prompt_is_refused_and_harms_nobody(llm: LLM, bad: Any, message: str) -> None:
    calm = answers(llm, [prompt(20)])
    request = llm.engine.add(None, prompt(20), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    llm.engine.step()
    with pytest.raises(RequestError, match=message):
        llm.generate([{"prompt_token_ids": [5]}, bad])
    while llm.engine.step():
        pass
    assert request.sequences[0].completion.token_ids == calm[0]
    assert not llm.engine.has_work
    llm.engine.check_integrity()


def test_more_bad_calls(llm: LLM) -> None:
    ids = {"prompt_token_ids": [5]}
    with pytest.raises(RequestError, match="2 sampling parameters for 1 prompts"):
        llm.generate([ids], [SamplingParams(), SamplingParams()])
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        llm.generate([ids], SamplingParams(stop="x"))
    with pytest.raises(RequestError, match="logit_bias: token id 320 is outside"):
        llm.generate([ids], SamplingParams(logit_bias={320: 1.0}))
    with pytest.raises(RequestError, match="params must be a SamplingParams"):
        llm.generate([ids], {"temperature": 0})  # type: ignore[arg-type]
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_prefill_tokens", 0, "max_prefill_tokens must be an integer from 1"),
        ("max_running", 0, "max_running must be an integer from 1 to 4096"),
        ("num_records", 0, "num_records must be an integer from 1"),
        ("num_pages", -5, "num_pages must be an integer from 1"),
        ("page_size", 1.5, "page_size must be an integer"),
        ("max_length", 1, "a sequence of 1 tokens is too short to serve"),
        ("device", "tpu", "device 'tpu' is not supported by this version; choose auto or cpu"),
    ],
)
def test_an_engine_option_out_of_range_is_named(make: Engines, option: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**{option: value})


def test_a_prompt_longer_than_the_page_pool_is_refused(make: Engines) -> None:
    small = make(num_pages=2)
    with pytest.raises(RequestError, match="maximum context length is 128 tokens"):
        small.generate([{"prompt_token_ids": [5] * 128}])
    assert small.generate([{"prompt_token_ids": [5] * 127}], SamplingParams(max_tokens=9, ignore_eos=True))
