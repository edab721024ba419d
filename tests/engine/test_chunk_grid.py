"""Where prompts are cut on the chunk grid, memory is equal bit for bit: resumed or not, and behind other cuts as far as
the arithmetic allows. Single layers are held to it by the conformance checks "chunk grid" and "interior states".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from statewise import LLM, RequestOutput, SamplingParams
from statewise.memory.sharding import gather
from tests.checkpoints import bailing_config, kimi_linear_config, write_checkpoint
from tests.engine.conftest import prompt
from tests.engine.test_trees import FAMILIES

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, return_logits=True)
TOKENS = prompt(
    200
)  # in a longer piece PyTorch shares SiLU out to threads, and where it cuts a row it rounds otherwise
RESUMED = 128  # on the grid, and a cut whether pieces have 64 tokens or 128
LIMIT = 1e-4
DENSE = {
    "dense kimi-linear": kimi_linear_config(first_k_dense_replace=6),
    "dense ring-linear": bailing_config(first_k_dense_replace=7),
    "dense ling-2.5": bailing_config("v2_5", first_k_dense_replace=6),
}
Memory = dict[str, Tensor]
Open = Callable[..., LLM]


def engine(model: Path, **options: Any) -> LLM:
    small: dict[str, Any] = {"num_records": 8, "num_pages": 40, "page_size": 16, "dtype": "float32"}
    return LLM(model, **small | options)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), FAMILIES[request.param], seed=3)


@pytest.fixture(scope="module", params=[64, 128], ids=["pieces of 64", "pieces of 128"])
def build(request: pytest.FixtureRequest, model: Path) -> Open:
    return partial(engine, model, max_prefill_tokens=request.param)


@pytest.fixture(scope="module")
def in_one_go(build: Open) -> Memory:
    """What a prompt leaves that one engine has computed piece by piece, all of them equal."""
    llm = build()
    return outcome(llm, ask(llm, 0))


def memory(llm: LLM, tokens: list[int]) -> Memory:
    """All that is frozen behind `tokens`, by layer and field; pages as one run of tokens, whatever their size."""
    checkpoint, hidden = llm.engine.export(None, tokens)
    specs = (llm.engine.runner.records.spec, llm.engine.runner.pages.spec)
    return {**gather([checkpoint], *specs), "hidden": hidden}


def ask(llm: LLM, cached: int) -> RequestOutput:
    (output,) = llm.generate({"prompt_token_ids": TOKENS}, GREEDY)
    assert output.error is None
    assert output.metrics.cached_tokens == cached
    return output


def outcome(llm: LLM, output: RequestOutput) -> Memory:
    """The logits of an answer, and the memory at its beginning and at its end."""
    (answer,) = output.outputs
    assert answer.logits is not None
    begin = {f"prompt {name}": value for name, value in memory(llm, TOKENS).items()}
    end = memory(llm, TOKENS + answer.token_ids[:-1])
    llm.engine.check_integrity()
    return {"logits": answer.logits, **begin, **end}


def different(one: Memory, other: Memory) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_resumed_on_the_device(build: Open, in_one_go: Memory) -> None:
    llm = build()
    llm.session().append(TOKENS[:RESUMED])
    assert not different(outcome(llm, ask(llm, RESUMED)), in_one_go)


def test_resumed_from_host_memory(build: Open, in_one_go: Memory) -> None:
    llm = build(host_cache=1 << 22)
    llm.session().append(TOKENS[:RESUMED])
    cache = llm.engine.scheduler.cache
    for frozen in list(cache.device.held):
        cache.evict(frozen)
    assert not different(outcome(llm, ask(llm, RESUMED)), in_one_go)
    assert cache.counts.raised == 1


def test_resumed_from_the_disk_of_another_engine(build: Open, in_one_go: Memory, tmp_path: Path) -> None:
    with build(disk_cache=tmp_path) as first:
        first.session().append(TOKENS[:RESUMED])
    with build(disk_cache=tmp_path) as llm:
        assert not different(outcome(llm, ask(llm, RESUMED)), in_one_go)
        depot = llm.engine.scheduler.cache.depot
        assert depot is not None and depot.counts.fetched == 1


@pytest.mark.parametrize("page_size", [16, 24])
def test_resumed_from_a_session_file(build: Open, in_one_go: Memory, tmp_path: Path, page_size: int) -> None:
    build().session().append(TOKENS[:RESUMED]).save(tmp_path / "a.state")
    llm = build(page_size=page_size)
    llm.load_session(tmp_path / "a.state")
    assert not different(outcome(llm, ask(llm, RESUMED)), in_one_go)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preempted_at_every_step(build: Open, in_one_go: Memory, prefix_cache: bool) -> None:
    """Within the prompt each step ends on the grid, and a decode step is the same wherever its record lies."""
    llm = build(prefix_cache=prefix_cache)
    request = llm.engine.add(None, TOKENS, GREEDY)
    sequence = request.sequences[0]
    while not request.finished:
        llm.engine.step()
        if sequence.record is not None:
            llm.engine.scheduler.preempt(sequence)
    steps = -(-len(TOKENS) // llm.engine.config.max_prefill_tokens) + GREEDY.max_tokens - 1
    assert request.metrics.preemptions == llm.engine.scheduler.cache.counts.raised == steps - 1
    if prefix_cache:
        assert not different(outcome(llm, request.output()), in_one_go)
    else:
        assert sequence.completion.logits is not None
        assert torch.equal(sequence.completion.logits, in_one_go["logits"])


@pytest.mark.parametrize("family", [*FAMILIES, *DENSE])
def test_other_cuts_on_the_grid(family: str, tmp_path: Path) -> None:
    """Bit for bit in each layer that only linear and dense ones come before; in the whole model if there are no others.

    Experts take a few rows and many by different kernels, and softmax attention sums over a piece's own tokens by
    themselves: both round differently for another cut, and so does all behind them.
    """
    model, outcomes = write_checkpoint(tmp_path, (FAMILIES | DENSE)[family], seed=3), []
    for tokens in (4096, 64, 128, 192):
        llm = engine(model, max_prefill_tokens=tokens)
        outcomes.append(outcome(llm, ask(llm, 0)))
    mixers, dense = llm.engine.runner.model.mixers, llm.config.dense_layers
    exact = [mixer.scope == "record" and layer in dense for layer, mixer in enumerate(mixers)]
    first = exact.index(False) if False in exact else len(mixers)
    whole, *cuts = outcomes
    for cut in cuts:
        for name in different(cut, whole):
            layer = int(name.split(".")[1]) if "." in name else len(mixers)  # the last row and the logits
            assert layer > first, f"{name} is not the same"
            assert (cut[name] - whole[name]).abs().max() <= LIMIT, name
