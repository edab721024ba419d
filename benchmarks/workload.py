"""What every engine of the comparison runs: the model's shape, the prompts, the parts of a run and their result.

Only the standard library: the engines import this in interpreters of their own.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

VOCABULARY = 8192
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 16,
    "num_experts_per_token": 2,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "linear_attn_config": {
        "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11],
        "full_attn_layers": [4, 8, 12],
        "num_heads": 8,
        "head_dim": 128,
    },
    "model_max_length": 65536,
}
"""The 110 M Kimi-Linear: what differs from the tiny configuration of `tests/checkpoints.py`."""

PREFILL_TOKENS = 2048
CONTEXT = 512  # of the batch-1 decode
LONG_CONTEXT = 32768
DECODE_STEPS = 96
BATCH = 16
BATCH_CONTEXT = 64  # tokens of each prompt of the batched decode
BATCH_STEPS = 48
LONG_STEPS = 32
CONTEXT_LIMIT = {"main": 4096, "long": LONG_CONTEXT + 256}  # tokens that an engine must make room for, by part


@dataclass
class Result:
    """Samples of one process; seconds, and tokens per second, one entry per repeat."""

    engine: str
    version: str
    dtype: str
    import_s: float = 0.0
    load_s: float = 0.0
    prefill_tok_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)  # per step at batch 1 and CONTEXT
    batch_tok_s: list[float] = field(default_factory=list)
    long_decode_s: list[float] = field(default_factory=list)  # per step at batch 1 and LONG_CONTEXT
    peak_bytes: int = 0
    notes: list[str] = field(default_factory=list)


class Engine(Protocol):
    """One engine with the model loaded. Times in seconds; each call starts from an empty context."""

    def prefill(self, prompt: list[int]) -> float:
        """Time from the prompt to its first greedy token."""

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Time of `steps` greedy steps of all prompts together, after every one has its first token."""

    def long_decode(self, length: int, steps: int) -> float:
        """Time of `steps` greedy steps of one sequence behind a context of `length` tokens."""


def prompt(length: int, seed: int) -> list[int]:
    """Random token ids; another prompt for every seed, so that no engine can reuse a prefix."""
    return random.Random(seed).choices(range(3, VOCABULARY), k=length)


def peak_bytes() -> int:
    """The largest resident memory that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def arguments(description: str) -> argparse.Namespace:
    """The command line of an engine's process."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="checkpoint directory, or the GGUF file for llama.cpp")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=("main", "long"), default="main")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    return parser.parse_args()


def measure(options: argparse.Namespace, result: Result, load: Callable[[], Engine]) -> None:
    """Load the engine, run one part of the workload and print the result as one line of JSON."""
    start = time.perf_counter()
    engine = load()
    result.load_s = time.perf_counter() - start
    seed = options.seed * 1000
    engine.decode([prompt(CONTEXT, seed + 1)], 8)  # warms up prefill and decode
    if options.part == "long":
        result.decode_s = [engine.decode([prompt(CONTEXT, seed + 2)], DECODE_STEPS) / DECODE_STEPS]
        result.long_decode_s = [engine.long_decode(LONG_CONTEXT, LONG_STEPS) / LONG_STEPS]
    else:
        engine.decode([prompt(8, seed + 3 + i) for i in range(BATCH)], 4)
        for repeat in range(options.repeats):
            base = seed + 100 * (repeat + 1)
            result.prefill_tok_s.append(PREFILL_TOKENS / engine.prefill(prompt(PREFILL_TOKENS, base)))
            result.decode_s.append(engine.decode([prompt(CONTEXT, base + 1)], DECODE_STEPS) / DECODE_STEPS)
            prompts = [prompt(BATCH_CONTEXT, base + 2 + i) for i in range(BATCH)]
            result.batch_tok_s.append(BATCH * BATCH_STEPS / engine.decode(prompts, BATCH_STEPS))
    result.peak_bytes = peak_bytes()
    print(json.dumps(asdict(result)), flush=True)
