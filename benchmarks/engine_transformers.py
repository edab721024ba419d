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
from transformers import AutoModelForCausalLM  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - started


class Transformers:
    """A model with its default attention and expert implementations, and with the cache that it makes itself.

    Positions and masks are given: MiniMax counts the tokens of its first layer, whose cache holds none, and would
    take every cached token for the first one. None is the mask of sequences of equal length: a prompt is causal, and
    a token sees all that the cache holds.
    """

    def __init__(self, directory: Path, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
        self.cache: Any = None
        self.seen = 0  # tokens of each sequence in the cache

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, 1] greedy next tokens of [N, T] tokens."""
        answer = self.model(
            tokens,
            past_key_values=self.cache,
            use_cache=True,
            position_ids=torch.arange(self.seen, self.seen + tokens.shape[1])[None],
            attention_mask={"full_attention": None, "linear_attention": None},
            logits_to_keep=1,
        )
        self.cache = answer.past_key_values
        self.seen += tokens.shape[1]
        following: torch.Tensor = answer.logits[:, -1].argmax(-1, keepdim=True)
        return following

    def start(self, prompts: list[list[int]]) -> torch.Tensor:
        self.cache, self.seen = None, 0
        return self.forward(torch.tensor(prompts))

    def steps(self, tokens: torch.Tensor, steps: int) -> tuple[float, list[list[int]]]:
        answers = [tokens]
        start = time.perf_counter()
        for _ in range(steps):
            answers.append(self.forward(answers[-1]))
        seconds = time.perf_counter() - start
        return seconds, torch.cat(answers, dim=1).tolist()

    def prefill(self, prompts: list[list[int]]) -> float:
        start = time.perf_counter()
        self.start(prompts)
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], steps: int) -> tuple[float, list[list[int]]]:
        return self.steps(self.start(prompts), steps)

    @torch.inference_mode()
    def long_decode(self, length: int, steps: int) -> float:
        """The context behind the first `CONTEXT` tokens is random numbers put into the cache: computing them would
        take minutes, and the time of a step does not depend on their values."""
        tokens = self.start([prompt(CONTEXT, seed=length)])
        for index, kind in enumerate(self.model.config.layer_types):
            if kind == "full_attention":
                layer = self.cache.layers[index]
                rows = [
                    torch.randn(*x.shape[:-2], length - CONTEXT, x.shape[-1], dtype=x.dtype)
                    for x in (layer.keys, layer.values)
                ]
                self.cache.update(*rows, index)
        self.seen = length
        self.steps(tokens, 2)
        return self.steps(tokens, steps)[0]


def main() -> None:
    options = arguments("the transformers side of the comparison")
    result = Result("transformers", transformers.__version__, options.dtype, import_s=IMPORT_SECONDS)
    if options.part == "long":
        result.notes.append("the cache behind the long context was filled, not computed")
    measure(options, result, lambda: Transformers(options.model, options.dtype, options.threads))


if __name__ == "__main__":
    main()
