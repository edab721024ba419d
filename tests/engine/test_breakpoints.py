"""`cache_breakpoints`: where the client asks, the memory of a prompt is kept."""

from __future__ import annotations

from typing import Any

import pytest

from statewise import LLM, SamplingParams
from statewise.errors import RequestError
from tests.engine.conftest import Engines, prompt
from tests.engine.test_prefix_cache import ask, same

TOKENS = prompt(100)


def sparing(make: Engines) -> LLM:
    """An engine that leaves no states on the way by itself."""
    llm = make(num_pages=64, page_size=16)
    llm.engine.scheduler.interior_states = False
    return llm


def test_a_later_prompt_goes_on_from_a_breakpoint(make: Engines) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, cache_breakpoints=[83, 30, 64, 83])
    plain = make(prefix_cache=False)
    for position in (30, 64, 83):
        llm = sparing(make)
        ask(llm, TOKENS, params)
        later = TOKENS[:position] + prompt(25, seed=position)
        output = ask(llm, later)
        assert output.metrics.cached_tokens == position
        same(output, ask(plain, later))


@pytest.mark.parametrize("bad", [[0], [-1], [1.5], [True], ["5"], 5, "55", [1] * 65, [1 << 31], None, {5}])
def test_breakpoints_that_are_none_are_refused(bad: Any) -> None:
    with pytest.raises(RequestError, match="cache_breakpoints") as refusal:
        SamplingParams(cache_breakpoints=bad)
    assert refusal.value.field == "cache_breakpoints"


@pytest.mark.parametrize("position", [101, 104, 5000])
def test_a_breakpoint_behind_the_prompt_is_refused(make: Engines, position: int) -> None:
    llm = sparing(make)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, cache_breakpoints=[50, position])
    with pytest.raises(RequestError, match="cache_breakpoints") as refusal:
        llm.engine.add(None, TOKENS, params)
    assert refusal.value.field == "cache_breakpoints"
    assert not llm.engine.has_work
