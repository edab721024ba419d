"""What every engine of the comparison runs: the prompts, the parts of a run and their result.

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
from typing import Protocol

VOCABULARY = 8192
PREFILL_TOKENS = 2048
CONTEXT = 512  # of the batch-1 decode
LONG_CONTEXT = 32768
DECODE_STEPS = 96
BATCH = 16
BATCH_CONTEXT = 64  # tokens of each prompt of the batched decode
BATCH_STEPS = 48
LONG_STEPS = 32
MANY, MANY_TOKENS = 32, 128  # short prompts together, against one prompt of as many tokens


@dataclass(frozen=True)
class Part:
    """What a process measures, and what its engine must make room for."""

    tokens: int  # of all sequences
    sequences: int


PARTS = {
    "main": Part(4096, BATCH),  # decode and prefill
    "long": Part(LONG_CONTEXT + 256, BATCH),  # decode behind a long context
    "many": Part(MANY * MANY_TOKENS + 256, MANY),  # many short prompts
}


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
    answers: list[list[int]] = field(default_factory=list)  # greedy tokens of the first batched decode
    long_decode_s: list[float] = field(default_factory=list)  # per step at batch 1 and LONG_CONTEXT
    many_s: list[float] = field(default_factory=list)  # of MANY prompts of MANY_TOKENS, until all have a token
    one_s: list[float] = field(default_factory=list)  # of one prompt of as many tokens
    peak_bytes: int = 0
    notes: list[str] = field(default_factory=list)


class Engine(Protocol):
    """One engine with the model loaded. Times in seconds; each call starts from an empty context."""

    def prefill(self, prompts: list[list[int]]) -> float:
        """Time from the prompts to the first greedy token of the last of them; all are equally long."""

    def decode(self, prompts: list[list[int]], steps: int) -> tuple[float, list[list[int]]]:
        """Time of `steps` greedy steps of all prompts together, after every one has its first token; all tokens."""

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
    parser.add_argument("--part", choices=PARTS, default="main")
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
        result.decode_s = [engine.decode([prompt(CONTEXT, seed + 2)], DECODE_STEPS)[0] / DECODE_STEPS]
        result.long_decode_s = [engine.long_decode(LONG_CONTEXT, LONG_STEPS) / LONG_STEPS]
    elif options.part == "many":
        measure_many(engine, options.repeats, seed, result)
    else:
        measure_main(engine, options.repeats, seed, result)
    result.peak_bytes = peak_bytes()
    print(json.dumps(asdict(result)), flush=True)


def measure_main(engine: Engine, repeats: int, seed: int, result: Result) -> None:
    engine.decode([prompt(8, seed + 3 + i) for i in range(BATCH)], 4)
    for repeat in range(repeats):
        base = seed + 100 * (repeat + 1)
        result.prefill_tok_s.append(PREFILL_TOKENS / engine.prefill([prompt(PREFILL_TOKENS, base)]))
        seconds, _ = engine.decode([prompt(CONTEXT, base + 1)], DECODE_STEPS)
        result.decode_s.append(seconds / DECODE_STEPS)
        seconds, answers = engine.decode([prompt(BATCH_CONTEXT, base + 2 + i) for i in range(BATCH)], BATCH_STEPS)
        result.batch_tok_s.append(BATCH * BATCH_STEPS / seconds)
        result.answers = result.answers or answers


def measure_many(engine: Engine, repeats: int, seed: int, result: Result) -> None:
    """Both kinds take turns; the first of each warms up and does not count."""
    for repeat in range(repeats + 1):
        base = seed + 100 * (repeat + 1)
        many_s = engine.prefill([prompt(MANY_TOKENS, base + 1 + i) for i in range(MANY)])
        one_s = engine.prefill([prompt(MANY * MANY_TOKENS, base)])
        if repeat:
            result.many_s.append(many_s)
            result.one_s.append(one_s)
