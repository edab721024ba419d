"""A tiny model that all engine tests share, and its fp64 reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from statewise import LLM, SamplingParams
from tests.checkpoints import kimi_linear_config, write_checkpoint

Engines = Callable[..., LLM]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("kimi"), kimi_linear_config(model_max_length=8192), seed=1)


@pytest.fixture(scope="session")
def make(checkpoint: Path) -> Engines:
    """Build an engine on the tiny model; small pools unless told otherwise."""

    def build(**options: object) -> LLM:
        return LLM(checkpoint, **{"num_records": 8, "num_pages": 256, "dtype": "float32"} | options)  # type: ignore[arg-type]

    return build


@pytest.fixture(scope="session")
def llm(make: Engines) -> LLM:
    return make()


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return torch.randint(3, 320, (length,), generator=generator).tolist()


def answers(llm: LLM, prompts: list[list[int]], max_tokens: int = 12, **options: object) -> list[list[int]]:
    """Greedy tokens of each prompt, all in one batch; the pools must be clean afterwards."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **options)  # type: ignore[arg-type]
    outputs = llm.generate([{"prompt_token_ids": tokens} for tokens in prompts], params)
    assert all(output.error is None for output in outputs)
    llm.engine.check_integrity()
    llm.engine.scheduler.cache.clear()  # the next prompts are computed, not remembered
    assert llm.engine.runner.records.num_free == llm.engine.config.num_records
    assert llm.engine.runner.pages.num_free == llm.engine.config.num_pages
    return [output.outputs[0].token_ids for output in outputs]
