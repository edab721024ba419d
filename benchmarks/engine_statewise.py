"""The Statewise side of the comparison, through its public Python interface.

python -m benchmarks.engine_statewise CHECKPOINT --dtype float32
"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.workload import PARTS, Part, Result, arguments, measure, prompt

started = time.perf_counter()
import statewise  # noqa: E402
from statewise import LLM, RequestOutput, SamplingParams  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - started
PAGE_SIZE = 64


class Statewise:
    """An `LLM` whose pools hold just what the workload needs."""

    def __init__(self, directory: Path, dtype: str, threads: int, room: Part) -> None:
        import torch  # behind Statewise, as for its users: it sets how long OpenMP's threads wait for work

        torch.set_num_threads(threads)
        self.llm = LLM(
            directory,
            dtype=dtype,
            max_prefill_tokens=2048,
            max_running=64,
            num_records=room.sequences + 4,
            num_pages=room.tokens // PAGE_SIZE + 4,
            page_size=PAGE_SIZE,
        )

    def generate(self, prompts: list[list[int]], tokens: int) -> list[RequestOutput]:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        outputs = self.llm.generate([{"prompt_token_ids": tokens} for tokens in prompts], params)
        for output in outputs:
            if output.error is not None or output.metrics.completion_tokens != tokens:
                raise RuntimeError(f"a request ended early: {output.error}")
        return outputs

    def prefill(self, prompts: list[list[int]]) -> float:
        start = time.perf_counter()
        self.generate(prompts, 1)
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], steps: int) -> tuple[float, list[list[int]]]:
        """The requests arrive together, so their first tokens and their last ones can be compared."""
        outputs = self.generate(prompts, steps + 1)
        metrics = [output.metrics for output in outputs]
        first = [one.time_to_first_token_s or 0.0 for one in metrics]
        last = [start + (one.decode_s or 0.0) for start, one in zip(first, metrics, strict=True)]
        return max(last) - max(first), [list(output.outputs[0].token_ids) for output in outputs]

    def long_decode(self, length: int, steps: int) -> float:
        return self.decode([prompt(length, seed=length)], steps)[0]


def main() -> None:
    options = arguments("the Statewise side of the comparison")
    result = Result("statewise", statewise.__version__, options.dtype, import_s=IMPORT_SECONDS)
    room = PARTS[options.part]
    measure(options, result, lambda: Statewise(options.model, options.dtype, options.threads, room))


if __name__ == "__main__":
    main()
