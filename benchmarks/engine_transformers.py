"""The transformers side of the comparison: one forward for the prompt, then cached forwards with a greedy argmax.

python -m benchmarks.engine_transformers CHECKPOINT --dtype float32
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.workload import CONTEXT, Result, arguments, measure, prompt

started = time.perf_counter()
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import DynamicCache, KimiLinearForCausalLM  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - started


class Transformers:
    """A model with its default attention and expert implementations."""

    def __init__(self, directory: Path, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)
        self.model: Any = KimiLinearForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """[N, 1] greedy next tokens of [N, T] tokens."""
        answer = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        following: torch.Tensor = answer.logits[:, -1].argmax(-1, keepdim=True)
        return following

    def start(self, prompts: list[list[int]]) -> tuple[torch.Tensor, DynamicCache]:
        cache = DynamicCache(config=self.model.config)
        return self.forward(torch.tensor(prompts), cache), cache

    def steps(self, tokens: torch.Tensor, cache: DynamicCache, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            tokens = self.forward(tokens, cache)
        return time.perf_counter() - start

    def prefill(self, prompt: list[int]) -> float:
        start = time.perf_counter()
        self.start([prompt])
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        return self.steps(*self.start(prompts), steps)

    @torch.inference_mode()
    def long_decode(self, length: int, steps: int) -> float:
        """The context behind the first `CONTEXT` tokens is random latents put into the cache: computing them would
        take minutes, and the time of a step does not depend on their values."""
        config = self.model.config
        tokens, cache = self.start([prompt(CONTEXT, seed=length)])
        for layer, kind in enumerate(config.layer_types):
            if kind == "full_attention":
                shape = (1, 1, length - CONTEXT)
                latents = torch.randn(*shape, config.kv_lora_rank, dtype=self.model.dtype)
                keys = torch.randn(*shape, config.qk_rope_head_dim, dtype=self.model.dtype)
                cache.update(latents, keys, layer)
        self.steps(tokens, cache, 2)
        return self.steps(tokens, cache, steps)


def main() -> None:
    options = arguments("the transformers side of the comparison")
    result = Result("transformers", transformers.__version__, options.dtype, import_s=IMPORT_SECONDS)
    if options.part == "long":
        result.notes.append("the cache behind the long context was filled, not computed")
    measure(options, result, lambda: Transformers(options.model, options.dtype, options.threads))


if __name__ == "__main__":
    main()
