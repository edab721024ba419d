"""The llama.cpp side of the comparison, through the C functions that llama-cpp-python binds.

python -m benchmarks.engine_llama FILE.gguf --dtype float32
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workload import PARTS, Part, Result, arguments, measure, prompt

started = time.perf_counter()
import llama_cpp as api  # type: ignore[import-not-found,unused-ignore]  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - started
TOKENS_PER_CALL = 2048


class Llama:
    """A model and one context; prompts go in whole, then one token per sequence and step."""

    def __init__(self, file: Path, threads: int, room: Part, exact: bool = False) -> None:
        api.llama_backend_init()
        self.log = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self.log, None)
        self.model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp did not load the file")
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.kv_unified = room.tokens, room.sequences, True
        settings.n_batch = TOKENS_PER_CALL
        settings.n_threads = settings.n_threads_batch = threads
        if exact:  # its flash attention rounds to fp16 whatever the cache holds
            settings.type_k = settings.type_v = api.GGML_TYPE_F32
            settings.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp made no context")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch = api.llama_batch_init(TOKENS_PER_CALL, 0, 1)

    def clear(self) -> None:
        api.llama_memory_clear(api.llama_get_memory(self.context), True)

    def rows(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Run (token, position, sequence, are its logits wanted) for each row."""
        self.batch.n_tokens = len(entries)
        for row, (token, position, sequence, wanted) in enumerate(entries):
            self.batch.token[row], self.batch.pos[row] = token, position
            self.batch.n_seq_id[row], self.batch.seq_id[row][0] = 1, sequence
            self.batch.logits[row] = wanted
        status = api.llama_decode(self.context, self.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode answered {status}")

    def logits(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.ctypeslib.as_array(api.llama_get_logits_ith(self.context, row), (self.vocabulary,))

    def start(self, prompts: list[list[int]]) -> list[int]:
        """Run whole prompts, as many to a call as fit; returns their greedy next tokens."""
        self.clear()
        entries = [
            (token, i, sequence, i == len(tokens) - 1)
            for sequence, tokens in enumerate(prompts)
            for i, token in enumerate(tokens)
        ]
        following = []
        for first in range(0, len(entries), TOKENS_PER_CALL):
            call = entries[first : first + TOKENS_PER_CALL]
            self.rows(call)
            following += [int(self.logits(row).argmax()) for row, entry in enumerate(call) if entry[3]]
        return following

    def all_logits(self, tokens: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[T, vocabulary] of at most `TOKENS_PER_CALL` tokens: what the comparison of engines checks."""
        self.clear()
        self.rows([(token, i, 0, True) for i, token in enumerate(tokens)])
        return np.stack([self.logits(row) for row in range(len(tokens))])

    def prefill(self, prompts: list[list[int]]) -> float:
        start = time.perf_counter()
        self.start(prompts)
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], steps: int) -> tuple[float, list[list[int]]]:
        answers = [[token] for token in self.start(prompts)]
        start = time.perf_counter()
        for step in range(steps):
            self.rows([(answers[i][-1], len(tokens) + step, i, True) for i, tokens in enumerate(prompts)])
            for row, answer in enumerate(answers):
                answer.append(int(self.logits(row).argmax()))
        return time.perf_counter() - start, answers

    def long_decode(self, length: int, steps: int) -> float:
        return self.decode([prompt(length, seed=length)], steps)[0]


def main() -> None:
    options = arguments("the llama.cpp side of the comparison")
    result = Result("llama.cpp", f"llama-cpp-python {api.__version__}", options.dtype, import_s=IMPORT_SECONDS)
    measure(options, result, lambda: Llama(options.model, options.threads, PARTS[options.part]))


if __name__ == "__main__":
    main()
